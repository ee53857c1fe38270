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

import torch
from fashion import CLASSES, Data, first, load, right, train
from PIL import Image
from timm import create_model
from timm.optim import create_optimizer_v2
from timm.utils import random_seed
from torch import nn
from tqdm import tqdm

from timm_cbam.explain import explain
from timm_cbam.hub import save_model, staged_file, staged_folder
from timm_cbam.pictures import SUFFIXES

_SHOWN = ['t-shirt', 'trouser', 'dress', 'coat', 'sandal', 'sneaker', 'bag', 'ankle boot']
_SETTINGS = dict(width=16, batch_size=64, opt='adamw', lr=0.004, weight_decay=0.05, seed=0)

# Without the stride of the last stage, whose map would have 4x4 pixels, which is coarse for Grad-CAM. The plain
# ResNet counts its strides as if it had the large stem.
_NETWORKS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    'ResNet-18': ('resnet18_s1', dict(output_stride=16)),
    'ResNet-18 + SE': ('resnet18_s1', dict(output_stride=16, block_args=dict(attn_layer='se'))),
    'ResNet-18 + CBAM': ('cbam_resnet18_s1', dict(output_stride=4)),
}


def _create(name: str) -> Tuple[nn.Module, Dict[str, Any]]:
    """A new network, and the arguments that are recorded with it."""
    architecture, kwargs = _NETWORKS[name]
    kwargs = dict(kwargs, channels=[_SETTINGS['width'] * i for i in (1, 2, 4, 8)])
    random_seed(_SETTINGS['seed'])
    overlay = dict(
        tag='fashion_mnist', num_classes=len(CLASSES), label_names=CLASSES, input_size=(1, 28, 28), pool_size=None,
        mean=(0.5,), std=(0.5,), crop_pct=1.0, interpolation='bilinear')
    model = create_model(architecture, pretrained_cfg_overlay=overlay, **kwargs)
    return model.to(memory_format=torch.channels_last), kwargs


def _train(name: str, data: Data, epochs: int, file: Path, progress: tqdm) -> Tuple[nn.Module, Dict[str, Any]]:
    """Train a network, or go on after the last epoch that the file has.

    Raises:
        ValueError: If the file was made with other settings.
    """
    model, kwargs = _create(name)
    optimizer = create_optimizer_v2(
        model, opt=_SETTINGS['opt'], lr=_SETTINGS['lr'], weight_decay=_SETTINGS['weight_decay'])
    settings = dict(_SETTINGS, epochs=epochs, images=len(data[1]))
    start = 0
    if file.exists():
        checkpoint = torch.load(file, weights_only=True)
        if checkpoint['settings'] != settings:
            raise ValueError(
                f"{file} was made with {checkpoint['settings']}, not {settings}; choose another --work, or remove it.")
        model.load_state_dict(checkpoint['model'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        start = checkpoint['epoch']

    def save(epoch: int) -> None:
        checkpoint = dict(settings=settings, epoch=epoch, model=model.state_dict(), optimizer=optimizer.state_dict())
        with staged_file(file, replace=True) as staged:
            torch.save(checkpoint, staged)

    progress.set_description(name)
    progress.update(start * math.ceil(len(data[1]) / _SETTINGS['batch_size']))
    train(model, data, epochs, optimizer, _SETTINGS['batch_size'], progress, start=start, after_epoch=save)
    return model.eval(), kwargs


def _write_images(data: Data, correct: torch.Tensor, folder: Path) -> List[str]:
    """Write the first image of each class to show that is classified right by all."""
    images, labels = data
    files = []
    folder.mkdir(exist_ok=True)
    for name in _SHOWN:
        found = (correct & (labels == CLASSES.index(name))).nonzero()
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
    for name, least in (('images', len(CLASSES)), ('epochs', 1)):
        if getattr(args, name) < least:
            parser.error(f'--{name} is {getattr(args, name)}, must be {least} or more')
    if Path(args.output).suffix.lower() not in SUFFIXES:
        parser.error(f'--output {args.output} must end in {", ".join(SUFFIXES)}')

    try:
        data, test = load(args.data)
    except (OSError, RuntimeError, ValueError, KeyError) as e:
        parser.error(f'--data {args.data} cannot be read: {e}')
    data = first(data, args.images // len(CLASSES))
    args.work.mkdir(parents=True, exist_ok=True)
    found: Dict[str, torch.Tensor] = {}
    steps = len(_NETWORKS) * args.epochs * math.ceil(len(data[1]) / _SETTINGS['batch_size'])
    with tqdm(total=steps, unit='step') as progress:
        for name in _NETWORKS:
            try:
                model, kwargs = _train(name, data, args.epochs, args.work / f'{name}.pt', progress)
            except ValueError as e:
                parser.error(str(e))
            found[name] = right(model, test)
            with staged_folder(args.work / name) as folder:
                # safetensors takes no other format
                save_model(model.to(memory_format=torch.contiguous_format), folder, model_args=kwargs)
    print(f'trained on {len(data[1]):,} images, {args.epochs} epochs; held-out images: {len(test[1]):,}')
    for name, correct in found.items():
        print(f'{name}: {100 * correct.float().mean():.2f} % right')
    files = _write_images(test, torch.stack(list(found.values())).all(0), args.work / 'images')
    if not files:
        raise SystemExit('No held-out image is classified right by all three: more --images or --epochs.')
    plain, se, cbam = (f'local-dir:{args.work / name}' for name in _NETWORKS)
    explain(files, cbam, compare=(plain, se), output=args.output, grid=True)


if __name__ == '__main__':
    main()
