#!/usr/bin/env python3
"""Where a ResNet, one with SE and one with CBAM look: Grad-CAM of garments, as the CBAM paper's figure 4

Three narrow ResNet-18 with the small stem, plain, with SE (timm's attn_layer='se') and with CBAM, are trained on a part
of Fashion-MNIST (real photographs, 28x28 pixels, ten classes) with the same seed, recipe and order of the batches. Of
some classes the first held-out image that all three classify right goes into the picture, with each network's
probability for the class. Prints the accuracy on the held-out images, too.

Every epoch is kept in the folder --work, and the same command goes on where it was stopped.
"""
import argparse
import math
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import torch
from PIL import Image
from timm import create_model
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from timm_cbam.explain import explain
from timm_cbam.hub import save_model, staged_file, staged_folder
from timm_cbam.pictures import SUFFIXES

_CLASSES = ['t-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'ankle boot']
_SHOWN = ['t-shirt', 'trouser', 'dress', 'coat', 'sandal', 'sneaker', 'bag', 'ankle boot']
_SETTINGS = dict(width=16, batch_size=64, opt='adamw', lr=0.004, weight_decay=0.05, seed=0)

# Without the stride of the last stage, whose map would have 4x4 pixels, which is coarse for Grad-CAM. The plain
# ResNet counts its strides as if it had the large stem.
_NETWORKS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    'ResNet-18': ('resnet18_s1', dict(output_stride=16)),
    'ResNet-18 + SE': ('resnet18_s1', dict(output_stride=16, block_args=dict(attn_layer='se'))),
    'ResNet-18 + CBAM': ('cbam_resnet18_s1', dict(output_stride=4)),
}

Data = Tuple[torch.Tensor, torch.Tensor]


class SmallResNet(ResNet):
    """timm's ResNet with the stem of cbam_resnet18_s1."""

    def __init__(self, *args, in_chans: int = 3, **kwargs) -> None:
        super().__init__(*args, in_chans=in_chans, **kwargs)
        self.conv1 = nn.Conv2d(in_chans, self.conv1.out_channels, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
        self.maxpool = nn.Identity()


default_cfgs = generate_default_cfgs({
    'resnet18_s1.untrained': dict(input_size=(3, 32, 32), first_conv='conv1', classifier='fc'),
})


@register_model
def resnet18_s1(pretrained: bool = False, **kwargs) -> SmallResNet:
    """Constructs a ResNet-18 model for small images.
    """
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return build_model_with_cfg(SmallResNet, 'resnet18_s1', pretrained, **dict(model_args, **kwargs))


def _load(data: str) -> Tuple[Data, Data]:
    """Images (N, 28, 28) and classes (N,) to train on, and held out."""
    if data.endswith('.npz'):
        with np.load(data) as arrays:
            images, labels = torch.tensor(arrays['images']), torch.tensor(arrays['labels'], dtype=torch.long)
        # of each class the last seventh, which is as many as in Zalando's split, are held out
        held_out = torch.zeros(len(labels), dtype=torch.bool)
        for label in labels.unique():
            index = (labels == label).nonzero()[:, 0]
            held_out[index[-len(index) // 7:]] = True
        return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])
    from torchvision.datasets import FashionMNIST

    train, test = (FashionMNIST(data, train=train, download=True) for train in (True, False))
    return (train.data, train.targets), (test.data, test.targets)


def _first(data: Data, number: int) -> Data:
    """The first images, equally many of each class."""
    images, labels = data
    index = torch.cat([(labels == label).nonzero()[:number // len(_CLASSES), 0] for label in range(len(_CLASSES))])
    return images[index], labels[index]


def _input(images: torch.Tensor) -> torch.Tensor:
    return (images[:, None] / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _create(name: str) -> Tuple[nn.Module, Dict[str, Any]]:
    """A new network, and the arguments that are recorded with it."""
    architecture, kwargs = _NETWORKS[name]
    kwargs = dict(kwargs, channels=[_SETTINGS['width'] * i for i in (1, 2, 4, 8)])
    random_seed(_SETTINGS['seed'])
    overlay = dict(
        tag='fashion_mnist', num_classes=len(_CLASSES), label_names=_CLASSES, input_size=(1, 28, 28), pool_size=None,
        mean=(0.5,), std=(0.5,), crop_pct=1.0, interpolation='bilinear')
    model = create_model(architecture, pretrained_cfg_overlay=overlay, **kwargs)
    return model.to(memory_format=torch.channels_last), kwargs


def _train(name: str, data: Data, epochs: int, file: Path, progress: tqdm) -> Tuple[nn.Module, Dict[str, Any]]:
    """Train a network, or go on after the last epoch that the file has.

    Raises:
        ValueError: If the file was made with other settings.
    """
    model, kwargs = _create(name)
    images, labels = data
    optimizer = create_optimizer_v2(
        model, opt=_SETTINGS['opt'], lr=_SETTINGS['lr'], weight_decay=_SETTINGS['weight_decay'])
    updates = math.ceil(len(labels) / _SETTINGS['batch_size'])
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=epochs, warmup_epochs=0, step_on_epochs=False, updates_per_epoch=updates)
    settings = dict(_SETTINGS, epochs=epochs, images=len(labels))
    start = 0
    if file.exists():
        checkpoint = torch.load(file, weights_only=True)
        if checkpoint['settings'] != settings:
            raise ValueError(
                f"{file} was made with {checkpoint['settings']}, not {settings}; choose another --work, or remove it.")
        model.load_state_dict(checkpoint['model'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        start = checkpoint['epoch']
    progress.set_description(name)
    progress.update(start * updates)
    model.train()
    for epoch in range(start, epochs):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        for step, index in enumerate(order.split(_SETTINGS['batch_size'])):
            scheduler.step_update(epoch * updates + step)
            loss = F.cross_entropy(model(_input(images[index])), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.set_postfix(epoch=epoch + 1, loss=f'{loss.item():.3f}', refresh=False)
            progress.update()
        checkpoint = dict(
            settings=settings, epoch=epoch + 1, model=model.state_dict(), optimizer=optimizer.state_dict())
        with staged_file(file, replace=True) as staged:
            torch.save(checkpoint, staged)
    return model.eval(), kwargs


@torch.inference_mode()
def _right(model: nn.Module, data: Data) -> torch.Tensor:
    """Whether each image is classified right, (N,)."""
    images, labels = data
    return torch.cat([model(_input(batch)).argmax(1) for batch in images.split(500)]) == labels


def _write_images(data: Data, right: torch.Tensor, folder: Path) -> List[str]:
    """Write the first image of each class to show that is classified right by all."""
    images, labels = data
    files = []
    folder.mkdir(exist_ok=True)
    for name in _SHOWN:
        found = (right & (labels == _CLASSES.index(name))).nonzero()
        if len(found):
            files.append(str(folder / f'{name}.png'))
            Image.fromarray(images[found[0, 0]].numpy()).save(files[-1])
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--data', default='fashion-mnist',
        help='.npz file with `images` (N, 28, 28) and `labels` sorted by class, or the folder that torchvision '
        'downloads to (default: %(default)s)')
    parser.add_argument('--images', type=int, default=5000, help='number of images to train on (default: %(default)s)')
    parser.add_argument('--epochs', type=int, default=3, help='epochs of each training (default: %(default)s)')
    parser.add_argument(
        '--work', type=Path, default=Path('fashion-grid'), help='folder for the networks (default: %(default)s)')
    parser.add_argument(
        '--output', default=str(Path(__file__).with_suffix('.png')), help='picture to write (default: %(default)s)')
    args = parser.parse_args()
    for name, least in (('images', len(_CLASSES)), ('epochs', 1)):
        if getattr(args, name) < least:
            parser.error(f'--{name} is {getattr(args, name)}, must be {least} or more')
    if Path(args.output).suffix.lower() not in SUFFIXES:
        parser.error(f'--output {args.output} must end in {", ".join(SUFFIXES)}')

    try:
        train, test = _load(args.data)
    except (OSError, RuntimeError, ValueError, KeyError) as e:
        parser.error(f'--data {args.data} cannot be read: {e}')
    train = _first(train, args.images)
    args.work.mkdir(parents=True, exist_ok=True)
    right: Dict[str, torch.Tensor] = {}
    steps = len(_NETWORKS) * args.epochs * math.ceil(len(train[1]) / _SETTINGS['batch_size'])
    with tqdm(total=steps, unit='step') as progress:
        for name in _NETWORKS:
            try:
                model, kwargs = _train(name, train, args.epochs, args.work / f'{name}.pt', progress)
            except ValueError as e:
                parser.error(str(e))
            right[name] = _right(model, test)
            with staged_folder(args.work / name) as folder:
                # safetensors takes no other format
                save_model(model.to(memory_format=torch.contiguous_format), folder, model_args=kwargs)
    print(f'trained on {len(train[1]):,} images, {args.epochs} epochs; held-out images: {len(test[1]):,}')
    for name, correct in right.items():
        print(f'{name}: {100 * correct.float().mean():.2f} % right')
    files = _write_images(test, torch.stack(list(right.values())).all(0), args.work / 'images')
    if not files:
        raise SystemExit('No held-out image is classified right by all three: more --images or --epochs.')
    plain, se, cbam = (f'local-dir:{args.work / name}' for name in _NETWORKS)
    explain(files, cbam, compare=(plain, se), output=args.output, grid=True)


if __name__ == '__main__':
    main()
