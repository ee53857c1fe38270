"""What the operator of tail.py and its implementations hand to each other"""
from typing import NamedTuple, Optional, Tuple

import torch


class Tail(NamedTuple):
    """Arguments of the operator beside the maps: parameters, buffers and attributes of a block's modules."""
    weight: torch.Tensor  # (C,) of the batch-norm
    bias: torch.Tensor
    mean: torch.Tensor  # running statistics
    var: torch.Tensor
    fc1_weight: torch.Tensor  # (R, C, 1, 1)
    fc1_bias: Optional[torch.Tensor]
    fc2_weight: torch.Tensor  # (C, R, 1, 1)
    fc2_bias: Optional[torch.Tensor]
    conv_weight: torch.Tensor  # (1, 2, K, K), K odd
    bn_weight: Optional[torch.Tensor]  # (1,) of the spatial attention's batch-norm, which may be missing
    bn_bias: Optional[torch.Tensor]
    bn_mean: Optional[torch.Tensor]
    bn_var: Optional[torch.Tensor]
    factor: Optional[torch.Tensor]  # (B, 1, 1, 1) of each sample's branch: stochastic depth
    training: bool  # the batch-norm's statistics are those of the batch
    eps: float
    bn_training: bool  # and of the spatial attention's batch-norm
    bn_eps: float


class Results(NamedTuple):
    """What the forward pass leaves for the backward pass, in the dtype of accumulation."""
    stats: torch.Tensor  # (4, C) mean and (biased) variance, weight and bias of the batch-norm as they are now
    bn_stats: torch.Tensor  # (4, 1) of the spatial attention's
    space: torch.Tensor  # (3, B, C) average, maximum and minimum of x over space
    hidden: torch.Tensor  # (2, B, R) of the MLP before its activation, for average and maximum
    mc: torch.Tensor  # (B, C)
    pooled: torch.Tensor  # (B, 2, H, W) average and maximum of F' over the channels
    conv: torch.Tensor  # (B, 1, H, W) output of the convolution


class Gradients(NamedTuple):
    """In the order of the operator's arguments"""
    x: torch.Tensor
    shortcut: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor
    conv_weight: torch.Tensor
    bn: torch.Tensor  # (2,) weight and bias


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def result_shapes(x: torch.Tensor, p: Tail) -> Tuple[Tuple[int, ...], ...]:
    b, c, h, w = x.shape
    return (4, c), (4, 1), (3, b, c), (2, b, p.fc1_weight.shape[0]), (b, c), (b, 2, h, w), (b, 1, h, w)


def gradient_shapes(p: Tail) -> Tuple[Tuple[int, ...], ...]:
    """Of all but the maps; also of biases that are missing, whose gradients nobody uses"""
    r, c = p.fc1_weight.shape[:2]
    return (c,), (c,), (r, c, 1, 1), (r,), (c, r, 1, 1), (c,), tuple(p.conv_weight.shape), (2,)


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """One of the two, also for maps that have neither."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def dense(t: torch.Tensor, x: Optional[torch.Tensor] = None) -> torch.Tensor:
    """A map in the memory format of x, or in one of the two."""
    return t.contiguous(memory_format=memory_format(t if x is None else x))
