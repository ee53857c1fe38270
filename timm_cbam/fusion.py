"""May a residual block run as one operator, and how does it

The operator of ops/tail.py stands for a dozen modules, which then do not run. It may do so only where nobody can tell:
every module of the block has exactly the type that it computes, with nothing attached to it, and nothing watches or
transforms what is executed. Otherwise the block runs module by module, as timm's does. :func:`fuses` is the only place
that decides this, and :func:`forward` the only one that turns modules into arguments.
"""
import os
from importlib.util import find_spec
from typing import Optional, Tuple

import torch
from timm.layers import DropPath
from timm.layers.activations import Sigmoid
from timm.layers.pool2d_same import AvgPool2dSame
from torch import nn
from torch.nn.modules import module as nn_module

from .layers import Cbam, ChannelAttention, SpatialAttention
from .ops import Tail, cbam_tail, norm_relu_
from .ops.tail_cpu import LIBRARY

__all__ = ['forward', 'fuses']

FUSED = os.environ.get('TIMM_CBAM_FUSED', '1') != '0'

_DTYPES = {
    'cpu': (torch.float32, torch.float64, torch.bfloat16),
    'cuda': (torch.float32, torch.float16, torch.bfloat16) if find_spec('triton') else (),
}

# Branches up to the convolution before the tail, with the types of their modules; the last norm and act are the tail's.
_BASIC = (
    ('conv1', nn.Conv2d), ('bn1', nn.BatchNorm2d), ('drop_block', nn.Identity), ('act1', nn.ReLU), ('aa', nn.Identity),
    ('conv2', nn.Conv2d))
_BOTTLENECK = (
    ('conv1', nn.Conv2d), ('bn1', nn.BatchNorm2d), ('act1', nn.ReLU), ('conv2', nn.Conv2d), ('bn2', nn.BatchNorm2d),
    ('drop_block', nn.Identity), ('act2', nn.ReLU), ('aa', nn.Identity), ('conv3', nn.Conv2d))
_DOWNSAMPLE = (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d, AvgPool2dSame, nn.Identity)

# What runs when a module is called. Instances that have one of these names of their own, and classes that somebody has
# patched, are not what their type says.
_METHODS = frozenset(('forward', '_call_impl', '_slow_forward', '_conv_forward', '_check_input_dim', 'attention_map'))
_ORIGINALS = tuple(
    (cls, name, getattr(cls, name))
    for cls, names in (
        (nn.Module, ('__call__', '_call_impl')), (nn.Conv2d, ('forward', '_conv_forward')),
        (nn.BatchNorm2d, ('forward',)), (nn.ReLU, ('forward',)), (Sigmoid, ('forward',)),
        (nn.Identity, ('forward',)), (nn.Sequential, ('forward',)), (DropPath, ('forward',)), (Cbam, ('forward',)),
        (ChannelAttention, ('forward', 'attention_map')), (SpatialAttention, ('forward', 'attention_map')))
    for name in names)


def _is(m: Optional[nn.Module], cls: type) -> bool:
    """Whether a module is what its class says, and nobody has attached anything to it."""
    return type(m) is cls and not (
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        or m._compiled_call_impl is not None) and _METHODS.isdisjoint(m.__dict__)


def _is_norm(m: nn.Module, x: torch.Tensor, *dtypes: torch.dtype) -> bool:
    return (
        _is(m, nn.BatchNorm2d)
        and m.momentum is not None
        and _are_plain((m.weight, m.bias, m.running_mean, m.running_var), x, dtypes)
        and m.weight.dtype == m.bias.dtype == m.running_mean.dtype == m.running_var.dtype)


def _is_conv(m: nn.Module, groups: int = 1) -> bool:
    """Whether a convolution of the attention is of the kind that the operator computes; what its size is shows its weight.
    """
    kernel = m.weight.shape[-1]
    return (
        m.stride == m.dilation == (1, 1) and m.padding == (kernel // 2, kernel // 2) and m.groups == 1
        and m.padding_mode == 'zeros')


def _are_plain(tensors: Tuple[Optional[torch.Tensor], ...], x: torch.Tensor, dtypes: Tuple[torch.dtype, ...]) -> bool:
    """Whether these are ordinary tensors on the device of x and of one of the dtypes."""
    for t in tensors:
        if type(t) not in (torch.Tensor, nn.Parameter) or t.device != x.device or t.dtype not in dtypes:
            return False
    return True


def _is_watched() -> bool:
    """Whether something sees or transforms what is executed: hooks of all modules, modes, transforms, tracers."""
    return bool(
        nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks
        or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
        or torch.jit.is_tracing()
        or any(getattr(cls, name) is not original for cls, name, original in _ORIGINALS))


def _is_attention(se: nn.Module, x: torch.Tensor, weight_dtypes: Tuple[torch.dtype, ...], norm_dtypes) -> bool:
    if not _is(se, Cbam) or se.parallel or se.spatial_first:
        return False
    channel, spatial = se.channel, se.spatial
    if not (_is(channel, ChannelAttention) and _is(spatial, SpatialAttention)):
        return False
    fc1, fc2, conv, bn = channel.fc1, channel.fc2, spatial.conv, spatial.bn
    if not (
            channel.pooling == spatial.pooling == 'avgmax'
            and _is(fc1, nn.Conv2d) and _is(fc2, nn.Conv2d) and _is(conv, nn.Conv2d)
            and _is(channel.act, nn.ReLU) and _is(channel.gate, Sigmoid) and _is(spatial.gate, Sigmoid)
            and (_is(bn, nn.Identity) or _is_norm(bn, x, *norm_dtypes))):
        return False
    w0, w1, kernel = fc1.weight, fc2.weight, conv.weight
    biases = tuple(b for b in (fc1.bias, fc2.bias) if b is not None)
    return (
        _are_plain((w0, w1, kernel, *biases), x, weight_dtypes)
        and w0.dtype == w1.dtype == kernel.dtype and all(b.dtype == w0.dtype for b in biases)
        and w0.ndim == w1.ndim == kernel.ndim == 4
        and w0.shape[2:] == w1.shape[2:] == (1, 1) and w1.shape[:2] == w0.shape[1::-1]
        and kernel.shape[:2] == (1, 2) and kernel.shape[2] == kernel.shape[3] and kernel.shape[3] % 2 == 1
        and conv.bias is None
        and _is_conv(fc1) and _is_conv(fc2) and _is_conv(conv))


def fuses(block: nn.Module, x: torch.Tensor) -> bool:
    """Whether the block runs as one operator for this input: nobody can tell, and it is faster.

    Args:
        block: CbamBasicBlock or CbamBottleneck.
        x: Input of the block.
    """
    if not FUSED:
        return False
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting() or LIBRARY is None or x.device.type != 'cpu':
            return False  # exporters write plain operations down, and other devices' compilers fuse them
    elif type(x) not in (torch.Tensor, nn.Parameter) or _is_watched():
        return False
    device = x.device.type
    dtype = x.dtype
    if torch.is_autocast_enabled(device):
        # what the convolutions give, whose float32 weights are cast; in other dtypes autocast casts to and fro
        dtype = torch.get_autocast_dtype(device)
        weight_dtypes: Tuple[torch.dtype, ...] = (torch.float32, dtype)
    else:
        weight_dtypes = (dtype,)
    if x.ndim != 4 or dtype not in _DTYPES.get(device, ()) or x.layout is not torch.strided:
        return False
    norm_dtypes = (dtype, torch.float32)
    names, norm, act = _parts(block)
    for name, cls in names:
        if not _is(getattr(block, name), cls):
            return False
    if not (
            _is(act, nn.ReLU) and _is_norm(norm, x, *norm_dtypes)
            and _is_attention(block.se, x, weight_dtypes, norm_dtypes)
            and norm.weight.shape[0] == block.se.channel.fc1.weight.shape[1]):
        return False
    if block.drop_path is not None and not _is(block.drop_path, DropPath):
        return False
    if block.downsample is not None:
        if not _is(block.downsample, nn.Sequential):
            return False
        for m in block.downsample:
            if type(m) not in _DOWNSAMPLE or not _is(m, type(m)):
                return False
    return True


def _parts(block: nn.Module):
    if hasattr(block, 'conv3'):
        return _BOTTLENECK, block.bn3, block.act3
    return _BASIC, block.bn2, block.act2


def _run(x: torch.Tensor, modules: Tuple[nn.Module, ...]) -> torch.Tensor:
    """Run modules one after the other; where no gradient is computed, batch-norm and ReLU in the convolution's place.

    A fresh map costs more than the arithmetic: the system has to provide its pages.
    """
    if torch.is_grad_enabled():
        for m in modules:
            x = m(x)
        return x
    i = 0
    while i < len(modules):
        m, previous = modules[i], modules[i - 1] if i else None
        if type(m) is nn.BatchNorm2d and type(previous) is nn.Conv2d and not m.training and LIBRARY is not None and _is_norm(
                m, x, x.dtype, torch.float32) and x.is_contiguous() | x.is_contiguous(memory_format=torch.channels_last):
            followers = [n for n in modules[i + 1:i + 3] if type(n) is not nn.Identity]
            relu = bool(followers) and type(followers[0]) is nn.ReLU
            x = norm_relu_(x, m, relu)
            if relu:
                i = modules.index(followers[0])
        elif type(m) is not nn.Identity:
            x = m(x)
        i += 1
    return x


def forward(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Output of a block that :func:`fuses`."""
    names, norm, _ = _parts(block)
    shortcut = x if block.downsample is None else _run(x, tuple(block.downsample))
    x = _run(x, tuple(getattr(block, name) for name, _ in names))
    channel, spatial, bn, drop_path = block.se.channel, block.se.spatial, block.se.spatial.bn, block.drop_path
    if x.shape != shortcut.shape or x.dtype != shortcut.dtype or x.numel() <= x.shape[1]:
        raise NotImplementedError
    if bn_is_norm := type(bn) is nn.BatchNorm2d:
        if bn.training and bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    factor = None
    if drop_path is not None and drop_path.training and drop_path.drop_prob:
        factor = drop_path(x.new_ones(len(x), 1, 1, 1))
    p = Tail(
        norm.weight, norm.bias, norm.running_mean, norm.running_var,
        channel.fc1.weight, channel.fc1.bias, channel.fc2.weight, channel.fc2.bias, spatial.conv.weight,
        *((bn.weight, bn.bias, bn.running_mean, bn.running_var) if bn_is_norm else (None,) * 4),
        factor, norm.training, norm.eps, bn_is_norm and bn.training, bn.eps if bn_is_norm else 0.)
    return cbam_tail(x, shortcut, p, norm.momentum, bn.momentum if bn_is_norm else 0., inplace=True)
