"""What the experiments on Fashion-MNIST share: the images, the plain ResNet for small ones, and the training loop

Fashion-MNIST (Zalando, MIT licence) has 70,000 photographs of garments, 28x28 pixels, ten classes, 10,000 held out.
"""
import math
from typing import Callable, Optional, Tuple

import numpy as np
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

CLASSES = ['t-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'ankle boot']

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


def load(data: str) -> Tuple[Data, Data]:
    """Images (N, 28, 28) and classes (N,) to train on, and held out.

    Args:
        data: A .npz file with `images` and `labels`, sorted by class, or the folder that torchvision downloads to.
    """
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


def first(data: Data, number: int) -> Data:
    """The first images, so many of each class."""
    images, labels = data
    index = torch.cat([(labels == label).nonzero()[:number, 0] for label in labels.unique()])
    return images[index], labels[index]


def as_input(images: torch.Tensor) -> torch.Tensor:
    return (images[:, None] / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def train(
        model: nn.Module, data: Data, epochs: int, optimizer: torch.optim.Optimizer, batch_size: int, progress: tqdm,
        start: int = 0, seed: int = 0, dtype: Optional[torch.dtype] = None,
        after_epoch: Optional[Callable[[int], None]] = None,
) -> None:
    """Train with a rate that falls as a cosine, step by step.

    Args:
        start: Number of epochs that have been trained before.
        seed: Decides on the order of the batches, together with the epoch.
        dtype: Of autocast, off by default.
        after_epoch: Called with the number of epochs that are finished.
    """
    images, labels = data
    updates = math.ceil(len(labels) / batch_size)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=epochs, warmup_epochs=0, step_on_epochs=False, updates_per_epoch=updates)
    for epoch in range(start, epochs):
        model.train()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for step, index in enumerate(order.split(batch_size)):
            scheduler.step_update(epoch * updates + step)
            with torch.autocast('cpu', dtype, enabled=dtype is not None):
                logits = model(as_input(images[index]))
            loss = F.cross_entropy(logits.float(), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.set_postfix(epoch=epoch + 1, loss=f'{loss.item():.3f}', refresh=False)
            progress.update()
        if after_epoch is not None:
            after_epoch(epoch + 1)


@torch.inference_mode()
def right(model: nn.Module, data: Data) -> torch.Tensor:
    """Whether each image is classified right, (N,)."""
    images, labels = data
    model.eval()
    return torch.cat([model(as_input(batch)).argmax(1) for batch in images.split(500)]) == labels
