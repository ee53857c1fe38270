#!/usr/bin/env python3
"""What becomes of a ResNet's weights when CBAM is added: fine-tuning curves on real data, several seeds

A plain ResNet is trained on the digits 0 to 4 of scikit-learn's handwritten digits (real scans, 8x8 pixels,
upsampled) and then fine-tuned on a few images of each of the digits 5 to 9, in three ways: as it is; with CBAM as
everybody inserts it, at its default initialisation; with this package's warm start. Data, order of the batches,
optimizer and initial classifier are the same for all three in each seed. Writes the accuracy on the held-out digits
after every epoch as CSV, a picture, and a table in Markdown.
"""
import argparse
import csv
import statistics
from pathlib import Path
from typing import Dict, List, Tuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from timm import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

_MODEL = 'resnet18'
_IMG_SIZE = 64
_SHOTS = 20  # images of each digit to fine-tune on
_PRETRAIN_EPOCHS = 10
_EPOCHS = 20
_BATCH_SIZE = 20
_LR = 0.01
_WAYS = ('plain ResNet', 'CBAM, default init', 'CBAM, warm start')


def _load() -> Tuple[torch.Tensor, torch.Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=_IMG_SIZE, mode='bilinear', align_corners=False)
    return images.repeat(1, 3, 1, 1), torch.tensor(digits.target)


def _split(target: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices of all digits 0 to 4, of some images of each of the digits 5 to 9, and of the others of these."""
    order = torch.randperm(len(target))
    few = torch.cat([order[target[order] == digit][:_SHOTS] for digit in range(5, 10)])
    novel = order[target[order] >= 5]
    return order[target[order] < 5], few, novel[~torch.isin(novel, few)]


@torch.inference_mode()
def _accuracy(model: nn.Module, images: torch.Tensor, target: torch.Tensor) -> float:
    model.eval()
    predicted = torch.cat([model(batch).argmax(1) for batch in images.split(100)])
    return 100 * (predicted == target).float().mean().item()


def _train(model: nn.Module, train, test, epochs: int, progress: tqdm) -> List[float]:
    """Train and return the accuracy on the test set after each epoch, in percent."""
    optimizer = create_optimizer_v2(model, opt='momentum', lr=_LR, weight_decay=1e-4)
    updates = -(-len(train[0]) // _BATCH_SIZE)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=epochs, warmup_epochs=0, step_on_epochs=False, updates_per_epoch=updates)
    accuracies = []
    for epoch in range(epochs):
        model.train()
        for step, index in enumerate(torch.randperm(len(train[0])).split(_BATCH_SIZE), 1):
            loss = F.cross_entropy(model(train[0][index]), train[1][index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step_update(epoch * updates + step)
        accuracies.append(_accuracy(model, *test))
        progress.set_postfix(accuracy=f'{accuracies[-1]:.1f}%')
        progress.update()
    return accuracies


def _create(way: str, state_dict: Dict[str, torch.Tensor], classifier: Dict[str, torch.Tensor]) -> nn.Module:
    model = create_model(_MODEL if way == 'plain ResNet' else f'cbam_{_MODEL}', num_classes=5)
    if way == 'CBAM, default init':
        for key, value in model.state_dict().items():
            if key in state_dict:  # not by load_state_dict, which would make a warm start of the gates
                value.copy_(state_dict[key])
    else:
        model.load_state_dict(state_dict)
    model.fc.load_state_dict(classifier)
    return model


def _compare(seeds: int) -> List[Dict[str, object]]:
    images, target = _load()
    rows = []
    steps = seeds * (_PRETRAIN_EPOCHS + len(_WAYS) * _EPOCHS)
    with tqdm(total=steps, desc='finetune_compare') as progress:
        for seed in range(seeds):
            random_seed(seed)
            base, few, rest = _split(target)
            plain = create_model(_MODEL, num_classes=5)
            data = images[base], target[base]
            _train(plain, data, data, _PRETRAIN_EPOCHS, progress)
            state_dict = plain.state_dict()
            plain.reset_classifier(5)
            classifier = {k: v.clone() for k, v in plain.fc.state_dict().items()}
            for way in _WAYS:
                random_seed(seed)
                model = _create(way, state_dict, classifier)
                random_seed(seed)  # creating a model with attention draws more numbers
                accuracies = _train(
                    model, (images[few], target[few] - 5), (images[rest], target[rest] - 5), _EPOCHS, progress)
                rows += [
                    dict(way=way, seed=seed, epoch=epoch, accuracy=accuracy)
                    for epoch, accuracy in enumerate(accuracies, 1)]
    return rows


def _curves(rows: List[Dict[str, object]], way: str) -> List[Tuple[float, float]]:
    """Mean and standard deviation over the seeds, by epoch."""
    by_epoch: Dict[int, List[float]] = {}
    for row in rows:
        if row['way'] == way:
            by_epoch.setdefault(row['epoch'], []).append(row['accuracy'])
    return [(statistics.mean(a), statistics.stdev(a)) for a in by_epoch.values()]


def _draw(rows: List[Dict[str, object]], seeds: int, file: Path) -> None:
    figure = Figure(figsize=(7, 4), layout='constrained')
    ax = figure.subplots()
    for way, color, style in zip(_WAYS, ('#000000', '#d55e00', '#0072b2'), ('--', '-', '-'), strict=True):
        mean, deviation = zip(*_curves(rows, way), strict=True)
        epochs = range(1, len(mean) + 1)
        ax.plot(epochs, mean, style, color=color, label=way)
        ax.fill_between(
            epochs, [m - d for m, d in zip(mean, deviation, strict=True)],
            [m + d for m, d in zip(mean, deviation, strict=True)], color=color, alpha=0.15, linewidth=0)
    ax.set_xlabel('epoch')
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_ylabel('accuracy on held-out digits, %')
    ax.set_title(
        f'{_MODEL} trained on digits 0-4, fine-tuned on {_SHOTS} images each of 5-9\n'
        f'mean and standard deviation of {seeds} seeds', fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(loc='lower right')
    figure.savefig(file, dpi=120)


def _table(rows: List[Dict[str, object]]) -> str:
    shown = (1, 2, 3, 5, 10, 20)
    lines = [
        '| epoch | ' + ' | '.join(map(str, shown)) + ' |',
        '|---' * (len(shown) + 1) + '|']
    for way in _WAYS:
        curve = _curves(rows, way)
        lines.append(f'| {way} | ' + ' | '.join('{:.1f} ± {:.1f}'.format(*curve[e - 1]) for e in shown) + ' |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=5, help='number of seeds, 2 or more')
    parser.add_argument(
        '--output', type=Path, default=Path(__file__).with_suffix(''), help='file name without .csv and .png')
    args = parser.parse_args()
    rows = _compare(args.seeds)
    with args.output.with_suffix('.csv').open('w', newline='') as f:
        writer = csv.DictWriter(f, rows[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(dict(row, accuracy=f"{row['accuracy']:.2f}") for row in rows)
    _draw(rows, args.seeds, args.output.with_suffix('.png'))
    print(_table(rows))


if __name__ == '__main__':
    main()
