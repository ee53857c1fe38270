#!/usr/bin/env python3
"""What CBAM is worth on 70,000 real images of small size, several seeds

scratch: narrow ResNet-10 (ResNet-18's stages of one block each, the small stem) are trained on the 60,000 images of
Fashion-MNIST, plain, with SE (timm's attn_layer='se'), with CBAM and with each of its two gates alone.
finetune: a plain one is trained on five classes and then fine-tuned on a few images of each of the other five, in three
ways: as it is; with CBAM as everybody inserts it, at its default initialisation; with this package's warm start.

In each seed images, order of the batches, recipe and initial weights outside the attention are the same for all, so
that they are compared in pairs. Prints the accuracy on the held-out images as a table in Markdown and draws a picture
beside the CSV.

Every finished training is one line of the CSV. The same command goes on after the lines that are there; with those that
are in the repository it trains nothing and shows them.
"""
import argparse
import math
import statistics
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from fashion import Data, first, load, right, train
from matplotlib.figure import Figure
from results import append, compare, read, save_figure, spread
from timm import create_model
from timm.optim import create_optimizer_v2
from timm.utils import random_seed
from torch import nn
from tqdm import tqdm

import timm_cbam  # noqa: F401  registers the models where the autoload is off

_CHANNELS = (16, 32, 64, 128)
_COLUMNS = ['network', 'seed', 'accuracies']
_COLORS = ('#000000', '#009e73', '#d55e00', '#0072b2', '#cc79a7')

_SCRATCH = dict(batch_size=128, opt='adamw', lr=0.004, weight_decay=0.05, autocast='bfloat16')
_NETWORKS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    'plain': ('resnet18_s1', dict()),
    'SE': ('resnet18_s1', dict(block_args=dict(attn_layer='se'))),
    'CBAM': ('cbam_resnet18_s1', dict()),
    'channel gate only': ('cbam_resnet18_s1', dict(cbam_args=dict(arrangement='channel'))),
    'spatial gate only': ('cbam_resnet18_s1', dict(cbam_args=dict(arrangement='spatial'))),
}

_FINETUNE = dict(shots=100, batch_size=20, opt='momentum', lr=0.01, weight_decay=1e-4)
_PRETRAIN_EPOCHS = 2
_NOVEL = 5  # the first class that the network has not seen before
_WAYS = {
    'plain': ('plain', 'loaded'),
    'CBAM, default init': ('CBAM', 'copied'),  # load_state_dict would make a warm start of the gates
    'CBAM, warm start': ('CBAM', 'loaded'),
}


def _create(network: str, num_classes: int = 10) -> nn.Module:
    architecture, kwargs = _NETWORKS[network]
    return create_model(
        architecture, num_classes=num_classes, in_chans=1, layers=(1, 1, 1, 1), channels=_CHANNELS, **kwargs)


def _copy(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> None:
    """Copy the weights outside the attention, which stays as it is."""
    own = model.state_dict()
    for key, value in state_dict.items():
        own[key].copy_(value)


def _fit(
        model: nn.Module, data: Data, test: Optional[Data], epochs: int, settings: Dict[str, Any], seed: int,
        progress: tqdm) -> List[float]:
    """Train, and return the accuracy on the held-out images after each epoch in percent."""
    model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(
        model, opt=settings['opt'], lr=settings['lr'], weight_decay=settings['weight_decay'])
    accuracies = []

    def measure(epoch: int) -> None:
        if test is not None:
            accuracies.append(100 * right(model, test).float().mean().item())

    dtype = getattr(torch, settings['autocast']) if 'autocast' in settings else None
    train(
        model, data, epochs, optimizer, settings['batch_size'], progress, seed=seed, dtype=dtype, after_epoch=measure)
    return accuracies


def _scratch(network: str, seed: int, epochs: int, data: Data, test: Data, progress: tqdm) -> List[float]:
    random_seed(seed)
    state_dict = _create('plain').state_dict()
    random_seed(seed)
    model = _create(network)
    _copy(state_dict, model)
    return _fit(model, data, test, epochs, _SCRATCH, seed, progress)


def _part(data: Data, novel: bool) -> Data:
    """The images of five classes, which are numbered from 0."""
    images, labels = data
    chosen = (labels >= _NOVEL) == novel
    return images[chosen], labels[chosen] - _NOVEL * novel


def _pretrain(seed: int, data: Data, progress: tqdm) -> Dict[str, torch.Tensor]:
    """A plain network that knows the first five classes, with a new classifier for the others."""
    random_seed(seed)
    model = _create('plain', num_classes=_NOVEL)
    _fit(model, _part(data, novel=False), None, _PRETRAIN_EPOCHS, _SCRATCH, seed, progress)
    model.reset_classifier(_NOVEL)
    return model.state_dict()


def _finetune(
        way: str, seed: int, epochs: int, state_dict: Dict[str, torch.Tensor], data: Data, test: Data, progress: tqdm,
) -> List[float]:
    network, how = _WAYS[way]
    random_seed(seed)
    model = _create(network, num_classes=_NOVEL)
    if how == 'copied':
        _copy(state_dict, model)
    else:
        model.load_state_dict(state_dict)
    images, labels = _part(data, novel=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    few = first((images[order], labels[order]), _FINETUNE['shots'])
    return _fit(model, few, _part(test, novel=True), epochs, _FINETUNE, seed, progress)


def _steps(images: int, epochs: int, settings: Dict[str, Any]) -> int:
    return epochs * math.ceil(images / settings['batch_size'])


def _measure(study: str, file: Path, seeds: int, epochs: int, images: str) -> Dict[str, List[List[float]]]:
    """Do the trainings that the file lacks, and return the accuracies of each network by seed and epoch."""
    networks, settings = (_NETWORKS, _SCRATCH) if study == 'scratch' else (
        _WAYS, dict(_FINETUNE, pretrain_epochs=_PRETRAIN_EPOCHS))
    settings = dict(settings, epochs=epochs)
    found = {
        (row['network'], int(row['seed'])): [float(a) for a in row['accuracies'].split()]
        for row in read(file, _COLUMNS, settings)}
    missing = {seed: [n for n in networks if (n, seed) not in found] for seed in range(seeds)}
    if any(missing.values()):
        data, test = load(images)
        steps = _steps(len(data[1]), epochs, _SCRATCH)
        pretrain_steps = 0
        if study == 'finetune':
            steps = _steps(_NOVEL * _FINETUNE['shots'], epochs, _FINETUNE)
            pretrain_steps = _steps(len(_part(data, novel=False)[1]), _PRETRAIN_EPOCHS, _SCRATCH)
        total = sum(len(networks) * steps + pretrain_steps for networks in missing.values() if networks)
        with tqdm(total=total, unit='step') as progress:
            for seed, networks_missing in missing.items():
                state_dict = None
                for network in networks_missing:
                    progress.set_description(f'seed {seed}: {network}')
                    if study == 'scratch':
                        accuracies = _scratch(network, seed, epochs, data, test, progress)
                    else:
                        state_dict = state_dict or _pretrain(seed, data, progress)
                        accuracies = _finetune(network, seed, epochs, state_dict, data, test, progress)
                    line = ' '.join(f'{a:.2f}' for a in accuracies)
                    append(file, [network, seed, line, *settings.values()])
                    found[network, seed] = [float(a) for a in line.split()]
    return {network: [found[network, seed] for seed in range(seeds)] for network in networks}


def _scratch_table(accuracies: Dict[str, List[List[float]]]) -> str:
    last = {network: [a[-1] for a in runs] for network, runs in accuracies.items()}
    lines = [
        '| network | parameters | accuracy, % | difference to plain | difference to CBAM |',
        '|---|---|---|---|---|']
    for network, values in last.items():
        parameters = sum(p.numel() for p in _create(network).parameters())
        cells = [network, f'{parameters:,}', spread(values)]
        cells += ['-' if network == other else compare(values, last[other]) for other in ('plain', 'CBAM')]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def _finetune_table(accuracies: Dict[str, List[List[float]]]) -> str:
    epochs = len(accuracies['plain'][0])
    shown = [e for e in (1, 2, 5, 10) if e < epochs] + [epochs]
    lines = ['| epoch | ' + ' | '.join(map(str, shown)) + ' |', '|---' * (len(shown) + 1) + '|']
    for way, runs in accuracies.items():
        lines.append(f'| {way} | ' + ' | '.join(spread([a[e - 1] for a in runs]) for e in shown) + ' |')
    for way, other in (
            ('CBAM, warm start', 'plain'), ('CBAM, default init', 'plain'), ('CBAM, warm start', 'CBAM, default init')):
        pairs = [([a[e - 1] for a in accuracies[way]], [a[e - 1] for a in accuracies[other]]) for e in shown]
        lines.append(f'| {way} - {other} | ' + ' | '.join(compare(*pair) for pair in pairs) + ' |')
    return '\n'.join(lines)


def _draw(study: str, accuracies: Dict[str, List[List[float]]], file: Path) -> None:
    figure = Figure(figsize=(10, 4), layout='constrained')
    curves, last = figure.subplots(1, 2, width_ratios=(3, 2))
    for y, (color, runs) in enumerate(zip(_COLORS, accuracies.values(), strict=False)):
        epochs = range(1, len(runs[0]) + 1)
        curves.plot(epochs, [statistics.mean(a) for a in zip(*runs, strict=True)], 'o-', color=color, markersize=4)
        curves.fill_between(
            epochs, *([f(a) for a in zip(*runs, strict=True)] for f in (min, max)), color=color, alpha=0.1, linewidth=0)
        values = [a[-1] for a in runs]
        last.scatter(values, [y] * len(values), s=28, color=color, alpha=0.6, linewidths=0)
        last.plot([statistics.mean(values)] * 2, [y - 0.3, y + 0.3], color=color, linewidth=2.5)
    last.set_yticks(range(len(accuracies)), list(accuracies))
    for label, color in zip(last.get_yticklabels(), _COLORS, strict=False):
        label.set_color(color)
    last.set_ylim(len(accuracies) - 0.4, -0.6)
    last.set_title('last epoch: seeds and their mean', fontsize=9)
    last.set_xlabel('accuracy on held-out images, %')
    curves.set_title('mean and range of the seeds', fontsize=9)
    curves.set_xlabel('epoch')
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.set_ylabel('accuracy on held-out images, %')
    for ax in (curves, last):
        ax.grid(axis='both' if ax is curves else 'x', alpha=0.3)
    what = 'trained from scratch' if study == 'scratch' else (
        f"trained on five classes, fine-tuned on {_FINETUNE['shots']} images each of the other five")
    figure.suptitle(f'Fashion-MNIST, narrow ResNet-10 {what}', fontsize=10)
    save_figure(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('study', choices=['scratch', 'finetune'])
    parser.add_argument(
        '--data', default='fashion-mnist',
        help='.npz file with `images` (N, 28, 28) and `labels` sorted by class, or the folder that torchvision '
        'downloads to (default: %(default)s)')
    parser.add_argument('--seeds', type=int, help='number of seeds (default: 3 from scratch, 5 of tuning)')
    parser.add_argument('--epochs', type=int, help='epochs of each training (default: 5 from scratch, 20 of tuning)')
    parser.add_argument(
        '--output', type=Path,
        help='CSV file to write or to go on with; the picture goes beside it (default: fashion_STUDY.csv here)')
    args = parser.parse_args()
    default_seeds, default_epochs = (3, 5) if args.study == 'scratch' else (5, 20)
    seeds = default_seeds if args.seeds is None else args.seeds
    epochs = default_epochs if args.epochs is None else args.epochs
    output = args.output or Path(__file__).with_name(f'fashion_{args.study}.csv')
    for name, value in (('seeds', seeds), ('epochs', epochs)):
        if value < 1:
            parser.error(f'--{name} is {value}, must be 1 or more')
    if output.suffix != '.csv':
        parser.error(f'--output is {output}, must end in .csv')
    try:
        accuracies = _measure(args.study, output, seeds, epochs, args.data)
    except (OSError, RuntimeError, ValueError, KeyError) as e:
        parser.error(str(e))
    _draw(args.study, accuracies, output.with_suffix('.png'))
    print(_scratch_table(accuracies) if args.study == 'scratch' else _finetune_table(accuracies))


if __name__ == '__main__':
    main()
