"""The whole way on real data, offline: train, save, reload, look

The data are the 1,797 handwritten digits that scikit-learn ships: real scans, 8x8 pixels, ten classes.
"""
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import List, Optional, Tuple

import torch
from timm import create_model
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy, random_seed
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from .explain import attention_maps
from .hub import save_model, staged_folder

__all__ = ['run_demo']

_IMG_SIZE = 16  # the scans are resized to it; 32 would take four times as long
_BATCH_SIZE = 32


def _best_device() -> str:
    for name in ('cuda', 'mps'):
        if getattr(torch, name).is_available():
            return name
    return 'cpu'


def _write_digits(root: Path) -> None:
    """Write the digits as the folders of PNG images, one a class, that timm's scripts train on."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype('uint8')
    split = train_test_split(range(len(images)), test_size=0.2, random_state=0, stratify=digits.target)
    for name, indices in zip(('train', 'validation'), split, strict=True):
        for i in indices:
            folder = root / name / str(digits.target[i])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(folder / f'{i:04d}.png')


def _create_loader(root: Path, split: str, model: nn.Module, device: torch.device):
    dataset = create_dataset('', root=str(root), split=split, input_img_mode='L')
    data_config = resolve_data_config(model=model)
    return create_loader(
        dataset,
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        batch_size=_BATCH_SIZE,
        is_training=split == 'train',
        scale=(0.6, 1.),
        hflip=0.,  # a mirrored digit is none
        color_jitter=None,
        num_workers=0,
        persistent_workers=False,
        device=device,
    )


def _train_epoch(model: nn.Module, ema: ModelEmaV3, loader, optimizer, scheduler, epoch: int, epochs: int) -> None:
    model.train()
    losses, top1 = AverageMeter(), AverageMeter()
    updates = epoch * len(loader)
    with tqdm(loader, desc=f'epoch {epoch + 1}/{epochs}', leave=False) as progress:
        for images, target in progress:
            logits = model(images)
            loss = F.cross_entropy(logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
            ema.update(model, step=updates)
            scheduler.step_update(updates)
            losses.update(loss.item(), len(target))
            top1.update(accuracy(logits, target)[0].item(), len(target))
            progress.set_postfix(loss=f'{losses.avg:.3f}', acc=f'{top1.avg:.1f}%')


@torch.inference_mode()
def _predict(model: nn.Module, loader) -> Tuple[torch.Tensor, torch.Tensor]:
    """Predicted and true classes of all images of a loader."""
    model.eval()
    results = [(model(images).argmax(1).cpu(), target.cpu()) for images, target in loader]
    predicted, target = map(torch.cat, zip(*results, strict=True))
    return predicted, target


def _draw(file: Path, model: nn.Module, loader, predicted: torch.Tensor, target: torch.Tensor) -> None:
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    first = [int((target == digit).nonzero()[0]) for digit in range(10)]
    images = torch.cat([images for images, _ in loader])[first]
    # of the last block of each stage, because later ones take the place of former ones
    gates = {name.partition('.')[0]: maps.spatial.cpu() for name, maps in attention_maps(model, images).items()}
    low, high = min(float(g.min()) for g in gates.values()), max(float(g.max()) for g in gates.values())

    figure = Figure(figsize=(15, 1.05 * (len(gates) + 1)), layout='constrained')
    (left, right), = figure.subfigures(1, 2, squeeze=False, width_ratios=(2.4, 1))
    axes = left.subplots(len(gates) + 1, 10)
    for ax, image, i in zip(axes[0], images.cpu(), first, strict=True):
        ax.imshow(image[0], cmap='gray')
        ax.set_title(f'{target[i]} read as {predicted[i]}', fontsize=8)
    for row, (name, gate) in zip(axes[1:], gates.items(), strict=True):
        row[0].set_ylabel(f'{name}\n{gate.shape[1]}x{gate.shape[2]}', fontsize=8)
        for ax, g in zip(row, gate, strict=True):
            shown = ax.imshow(g, cmap='cividis', vmin=low, vmax=high)
    axes[0][0].set_ylabel('image', fontsize=8)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    left.colorbar(shown, ax=axes[1:], label='spatial gate', shrink=0.9)
    ax = right.subplots()
    ConfusionMatrixDisplay.from_predictions(target, predicted, ax=ax, cmap='Blues', colorbar=False)
    ax.set_title(f'{len(target)} held-out digits', fontsize=10)
    figure.savefig(file, dpi=120)


def run_demo(
        output: str = 'timm-cbam-demo',
        epochs: int = 5,
        seed: int = 42,
        device: Optional[str] = None,
        model_name: str = 'cbam_resnet18_s1',
) -> float:
    """Train a CBAM-ResNet on handwritten digits, save it as a Hub folder, reload it from there and picture it.

    Args:
        output: Folder for config.json, model.safetensors and demo.png; appears whole or not at all.
        epochs: Number of epochs.
        seed: Seed of everything random. The same seed gives the same result on the same machine.
        device: Device to train on, the best there is if None.
        model_name: Name of a model of this package.

    Returns:
        Accuracy on the held-out digits, in percent.

    Raises:
        FileExistsError: If something else than a model folder is at output.
    """
    device = torch.device(device or _best_device())
    labels: List[str] = [str(digit) for digit in range(10)]
    with staged_folder(output) as folder, TemporaryDirectory() as root:
        _write_digits(Path(root))
        # only now, for what the data's libraries do when imported draws random numbers too
        random_seed(seed)
        model = create_model(
            model_name,
            pretrained_cfg_overlay=dict(
                tag='digits', description='Handwritten digits of scikit-learn.',
                num_classes=len(labels), label_names=labels,
                input_size=(1, _IMG_SIZE, _IMG_SIZE), pool_size=None, mean=(0.5,), std=(0.5,), crop_pct=1.0,
                interpolation='bilinear'),
        ).to(device)
        train_loader = _create_loader(Path(root), 'train', model, device)
        test_loader = _create_loader(Path(root), 'validation', model, device)
        print(
            f'{model_name}: {sum(p.numel() for p in model.parameters()):,} parameters, '
            f'{len(train_loader.dataset)} digits to train on, {len(test_loader.dataset)} held out, {device}')

        optimizer = create_optimizer_v2(model, opt='adamw', lr=2e-3, weight_decay=0.05)
        scheduler, _ = create_scheduler_v2(
            optimizer, num_epochs=epochs, warmup_epochs=1 if epochs > 1 else 0, warmup_lr=1e-4,
            step_on_epochs=False, updates_per_epoch=len(train_loader))
        scheduler.step_update(0)
        ema = ModelEmaV3(model, decay=0.9)
        for epoch in range(epochs):
            _train_epoch(model, ema, train_loader, optimizer, scheduler, epoch, epochs)
            predicted, target = _predict(ema.module, test_loader)
            correct = int((predicted == target).sum())
            print(f'epoch {epoch + 1}/{epochs}: {100 * correct / len(target):.2f} % of the held-out digits right')

        save_model(ema.module, folder)
        reloaded = create_model(f'local-dir:{folder}', pretrained=True).to(device)
        test_loader = _create_loader(Path(root), 'validation', reloaded, device)
        again, _ = _predict(reloaded, test_loader)
        if not torch.equal(again, predicted):
            raise RuntimeError(f'{int((again != predicted).sum())} digits are read differently by the reloaded model.')
        _draw(folder / 'demo.png', reloaded, test_loader, predicted, target)

    top1 = 100 * correct / len(target)
    print(
        f'held-out accuracy {top1:.2f} % ({correct} of {len(target)}), the same after reloading\n'
        f"picture: {output}/demo.png\n"
        f"model:   timm.create_model('local-dir:{output}', pretrained=True)")
    return top1
