#!/usr/bin/env python3
"""The paper's ablations (tables 1 to 3) on real data of small size, several seeds

A small CBAM-ResNet-18 is trained on 200 of scikit-learn's handwritten digits (real scans, 8x8 pixels, upsampled) with
every kind of attention of the paper's tables that `timm_cbam.Cbam` has, and tested on the 1,597 others. Split, order of
the batches, optimizer and initial weights outside the attention are the same for all kinds in each seed, so that they
are compared in pairs. Prints the tables in Markdown, beside the paper's figures for ResNet50 on ImageNet, and draws a
picture beside the CSV.

Every finished training is one line of the CSV. The same command goes on after the lines that are there; with those that
are in the repository it trains nothing and shows them.
"""
import argparse
import statistics
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from matplotlib.figure import Figure
from results import append, compare, read, save_figure, spread
from sklearn.datasets import load_digits
from timm import create_model
from timm.models.resnet import BasicBlock
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import timm_cbam  # noqa: F401  registers the models where the autoload is off

_SETTINGS = dict(
    model='cbam_resnet18_s1', width=16, img_size=16, train_images=200, batch_size=20, opt='adamw', lr=0.003,
    weight_decay=0.05)

# Arguments of Cbam (None: no attention at all) and the paper's top-1 and top-5 errors.
_KINDS: Dict[str, Tuple[Optional[Dict[str, Any]], Optional[Tuple[float, float]]]] = {
    'no attention': (None, (24.56, 7.50)),
    'channel avg (as in SE)': (dict(arrangement='channel', channel_pooling='avg'), (23.14, 6.70)),
    'channel max': (dict(arrangement='channel', channel_pooling='max'), (23.20, 6.83)),
    'channel avg & max': (dict(arrangement='channel'), (22.80, 6.52)),
    'channel + spatial avg 7x7': (dict(spatial_pooling='avg'), None),
    'channel + spatial max 7x7': (dict(spatial_pooling='max'), None),
    'channel + spatial avg & max 3x3': (dict(kernel_size=3), (22.68, 6.41)),
    'channel + spatial avg & max 7x7': (dict(), (22.66, 6.31)),
    'spatial + channel': (dict(arrangement='spatial_channel'), (22.78, 6.42)),
    'channel & spatial in parallel': (dict(arrangement='parallel'), (22.95, 6.59)),
    'spatial avg & max 7x7': (dict(arrangement='spatial'), None),
}
_CBAM = 'channel + spatial avg & max 7x7'

# Title, the paper's choice and what it is compared with, of each of the paper's tables.
_TABLES: Dict[int, Tuple[str, str, Tuple[str, ...]]] = {
    1: ('Channel attention: pooling', 'channel avg & max', (
        'no attention', 'channel avg (as in SE)', 'channel max')),
    2: ('Spatial attention after it: pooling and kernel', _CBAM, (
        'channel avg & max', 'channel + spatial avg 7x7', 'channel + spatial max 7x7',
        'channel + spatial avg & max 3x3')),
    3: ('Arrangement', _CBAM, (
        'channel avg & max', 'spatial avg & max 7x7', 'spatial + channel', 'channel & spatial in parallel')),
}
_NOTES = {
    2: 'The paper also tries a 1x1 convolution in place of the pooling over the channels (top-1 and top-5 error with a '
       '3x3 kernel after it 22.96 and 6.64, with 7x7 22.90 and 6.47), which `Cbam` does not have.',
}


def _load() -> Tuple[torch.Tensor, torch.Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=_SETTINGS['img_size'], mode='bilinear', align_corners=False)
    return images, torch.tensor(digits.target)


def _create(cbam_args: Optional[Dict[str, Any]], seed: int) -> nn.Module:
    """Create a network whose weights outside the attention depend on the seed only."""
    kwargs = dict(num_classes=10, in_chans=1, channels=tuple(_SETTINGS['width'] * i for i in (1, 2, 4, 8)))
    random_seed(seed)
    shared = {k: v for k, v in create_model(_SETTINGS['model'], **kwargs).state_dict().items() if '.se.' not in k}
    random_seed(seed)
    model = create_model(_SETTINGS['model'], cbam_args=cbam_args, **kwargs)
    for key, value in model.state_dict().items():
        if key in shared:  # not by load_state_dict, which would make a warm start of the gates
            value.copy_(shared[key])
    if cbam_args is None:
        for block in model.modules():
            if isinstance(block, BasicBlock):
                block.se = nn.Identity()
    return model


def _train(kind: str, seed: int, epochs: int, images: torch.Tensor, target: torch.Tensor, progress: tqdm) -> float:
    """Train, and return the error on the held-out images in percent."""
    progress.set_description(f'seed {seed}: {kind}')
    model = _create(_KINDS[kind][0], seed)
    random_seed(seed)  # kinds of attention draw different quantities of numbers
    train, test = torch.randperm(len(target)).tensor_split([_SETTINGS['train_images']])
    optimizer = create_optimizer_v2(
        model, opt=_SETTINGS['opt'], lr=_SETTINGS['lr'], weight_decay=_SETTINGS['weight_decay'])
    updates = -(-len(train) // _SETTINGS['batch_size'])
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=epochs, warmup_epochs=0, step_on_epochs=False, updates_per_epoch=updates)
    model.train()
    for epoch in range(epochs):
        for step, index in enumerate(train[torch.randperm(len(train))].split(_SETTINGS['batch_size']), 1):
            loss = F.cross_entropy(model(images[index]), target[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step_update(epoch * updates + step)
        progress.update()
    model.eval()
    with torch.inference_mode():
        predicted = torch.cat([model(images[index]).argmax(1) for index in test.split(200)])
    return 100 * (predicted != target[test]).float().mean().item()


def _measure(file: Path, tables: List[int], seeds: int, epochs: int) -> Dict[str, List[float]]:
    """Do the trainings that the file lacks, and return the errors of each kind by seed."""
    settings = dict(_SETTINGS, epochs=epochs)
    rows = read(file, ['kind', 'seed', 'error'], settings)
    errors = {(row['kind'], int(row['seed'])): float(row['error']) for row in rows}
    asked = {kind for table in tables for kind in (_TABLES[table][1], *_TABLES[table][2])}
    kinds = [kind for kind in _KINDS if kind in asked]
    runs = [(kind, seed) for seed in range(seeds) for kind in kinds]
    missing = [run for run in runs if run not in errors]
    images, target = _load()
    with tqdm(total=epochs * len(runs), initial=epochs * (len(runs) - len(missing)), unit='epoch') as progress:
        for kind, seed in missing:
            error = f'{_train(kind, seed, epochs, images, target, progress):.2f}'
            append(file, [kind, seed, error, *settings.values()])
            errors[kind, seed] = float(error)
    return {kind: [errors[kind, seed] for seed in range(seeds)] for kind in kinds}


def _table(number: int, errors: Dict[str, List[float]]) -> str:
    title, choice, others = _TABLES[number]
    lines = [
        f'Table {number}. {title}',
        '',
        "| attention | error, % | difference to the paper's choice, its standard error "
        '| paper, ImageNet, ResNet50: top-1 error, % | top-5 error, % |',
        '|---|---|---|---|---|']
    for kind in (*others, choice):
        difference = "the paper's choice" if kind == choice else compare(errors[kind], errors[choice])
        paper = [f'{figure:.2f}' for figure in _KINDS[kind][1] or ()] or ['-', '-']
        lines.append('| ' + ' | '.join([kind, spread(errors[kind]), difference, *paper]) + ' |')
    if number in _NOTES:
        lines += ['', _NOTES[number]]
    return '\n'.join(lines)


def _draw(file: Path, tables: List[int], errors: Dict[str, List[float]]) -> None:
    rows = [1 + len(_TABLES[number][2]) for number in tables]
    figure = Figure(figsize=(10, 1 + 0.45 * sum(rows) + 0.4 * len(rows)), layout='constrained')
    axes = figure.subplots(len(tables), 2, sharex='col', squeeze=False, height_ratios=rows)
    for (left, right), number in zip(axes, tables, strict=True):
        title, choice, others = _TABLES[number]
        for y, kind in enumerate((*others, choice)):
            color = '#d55e00' if kind == choice else '#0072b2'
            differences = [a - b for a, b in zip(errors[kind], errors[choice], strict=True)]
            for ax, values in ((left, errors[kind]), (right, differences)):
                ax.scatter(values, [y] * len(values), s=28, color=color, alpha=0.6, linewidths=0)
                ax.plot([statistics.mean(values)] * 2, [y - 0.3, y + 0.3], color=color, linewidth=2.5)
        left.set_yticks(range(len(others) + 1), (*others, choice))
        left.set_title(f'Table {number}. {title}', loc='left', fontsize=10)
        right.set_yticks(range(len(others) + 1), [])
        right.axvline(0, color='#000000', linewidth=0.8, zorder=0)
        for ax in (left, right):
            ax.set_ylim(len(others) + 0.6, -0.6)
            ax.grid(axis='x', alpha=0.3)
    axes[-1][0].set_xlabel('error on held-out digits, %')
    axes[-1][1].set_xlabel("difference to the paper's choice (orange), %")
    figure.suptitle('A dot for each seed, a line for their mean', fontsize=10)
    save_figure(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=5, help='number of seeds')
    parser.add_argument('--epochs', type=int, default=20, help='epochs of each training')
    parser.add_argument('--tables', type=int, nargs='+', choices=_TABLES, default=list(_TABLES), help='which of them')
    parser.add_argument(
        '--output', type=Path, default=Path(__file__).with_suffix('.csv'),
        help='CSV file to write or to go on with; the picture goes beside it')
    args = parser.parse_args()
    for name in ('seeds', 'epochs'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} is {getattr(args, name)}, must be 1 or more')
    if args.output.suffix != '.csv':
        parser.error(f'--output is {args.output}, must end in .csv')
    try:
        errors = _measure(args.output, args.tables, args.seeds, args.epochs)
    except ValueError as e:
        parser.error(str(e))
    _draw(args.output.with_suffix('.png'), args.tables, errors)
    print('\n\n'.join(_table(number, errors) for number in args.tables))


if __name__ == '__main__':
    main()
