"""May a residual block run as one operator, and how does it

The operator of ops/tail.py stands for a dozen modules, which then do not run. It may do so only where nobody can tell:
every module of the block has exactly the type that it computes, with nothing attached to it, and nothing watches or
transforms what is executed. Otherwise the block runs module by module, as timm's does. :func:`fuses` is the only place
that decides this, and :func:`forward` the only one that turns modules into arguments.
"""
import os
from itertools import zip_longest
from typing import Dict, Iterable, Optional, Tuple

import torch
from timm.layers import AvgPool2dSame, DropPath, Sigmoid
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils._device import DeviceContext

from .layers import Cbam, ChannelAttention, SpatialAttention
from .ops import HAS_TRITON, Tail, cbam_tail, norm_relu_, tail_cpu

__all__ = ['forward', 'fuses']

FUSED = os.environ.get('TIMM_CBAM_FUSED', '1') != '0'

_Dtypes = Tuple[torch.dtype, ...]
_DTYPES: Dict[str, _Dtypes] = {
    'cpu': (torch.float32, torch.float64, torch.bfloat16),
    'cuda': (torch.float32, torch.float16, torch.bfloat16) if HAS_TRITON else (),
}

# Branches up to the convolution before the tail, with the types of their modules; the last norm and act are the tail's.
_BASIC = (
    ('conv1', nn.Conv2d), ('bn1', nn.BatchNorm2d), ('drop_block', nn.Identity), ('act1', nn.ReLU), ('aa', nn.Identity),
    ('conv2', nn.Conv2d))
_BOTTLENECK = (
    ('conv1', nn.Conv2d), ('bn1', nn.BatchNorm2d), ('act1', nn.ReLU), ('conv2', nn.Conv2d), ('bn2', nn.BatchNorm2d),
    ('drop_block', nn.Identity), ('act2', nn.ReLU), ('aa', nn.Identity), ('conv3', nn.Conv2d))
_DOWNSAMPLE = (nn.Conv2d, nn.AvgPool2d, AvgPool2dSame, nn.Identity)  # beside batch-norm

# What runs when a module is called. Instances that have one of these names of their own, and classes that somebody has
# patched, are not what their type says.
_METHODS = frozenset(('forward', '_call_impl', '_slow_forward', '_conv_forward', '_check_input_dim', 'attention_map'))
_ORIGINALS = tuple(
    (cls, name, getattr(cls, name))
    for cls, names in (
        (nn.Module, ('__call__', '_call_impl')), (nn.Conv2d, ('__call__', 'forward', '_conv_forward')),
        *((cls, ('__call__', 'forward')) for cls in (
            nn.BatchNorm2d, nn.ReLU, Sigmoid, nn.Identity, nn.Sequential, nn.AvgPool2d, AvgPool2dSame, DropPath, Cbam)),
        *((cls, ('__call__', 'forward', 'attention_map')) for cls in (ChannelAttention, SpatialAttention)))
    for name in names)


def _is(m: Optional[nn.Module], cls: type) -> bool:
    """Whether a module is what its class says, and nobody has attached anything to it."""
    if type(m) is not cls:
        return False
    d = m.__dict__
    return not (
        d['_forward_hooks'] or d['_forward_pre_hooks'] or d['_backward_hooks'] or d['_backward_pre_hooks']
        or d.get('_compiled_call_impl')) and _METHODS.isdisjoint(d)


def _are_plain(tensors: Iterable[Optional[torch.Tensor]], device: torch.device, dtypes: _Dtypes) -> bool:
    """Whether these are ordinary tensors on the device, all of one of the dtypes."""
    found = None
    for t in tensors:
        if type(t) is not nn.Parameter and type(t) is not torch.Tensor:
            return False
        found = found or t.dtype
        if t.dtype is not found or t.device != device or t.layout is not torch.strided:
            return False
    return found is None or found in dtypes


def _is_norm(m: Optional[nn.Module], device: torch.device, dtypes: _Dtypes) -> bool:
    if not _is(m, nn.BatchNorm2d) or m.momentum is None or not m.track_running_stats:
        return False
    parameters, buffers = m._parameters, m._buffers
    weight, bias = parameters.get('weight'), parameters.get('bias')
    mean, var = buffers.get('running_mean'), buffers.get('running_var')
    return (
        _are_plain((weight, bias, mean, var), device, dtypes)
        and weight.shape == bias.shape == mean.shape == var.shape)


def _norm_dtypes(dtype: torch.dtype) -> _Dtypes:
    """Of parameters with which PyTorch's batch-norm takes a map of this dtype"""
    return (dtype, torch.float32) if dtype.itemsize < 4 else (dtype,)


def _has_kind(conv: nn.Module, shape: Tuple[int, ...]) -> bool:
    """Whether a convolution is as the operator computes it: of this shape, same size of output as of input."""
    return (
        conv.weight.shape == shape and conv.stride == conv.dilation == (1, 1)
        and conv.padding == (shape[2] // 2, shape[3] // 2) and conv.groups == 1 and conv.padding_mode == 'zeros')


def _is_attention(
        se: Optional[nn.Module],
        channels: int,
        device: torch.device,
        weight_dtypes: _Dtypes,
        norm_dtypes: _Dtypes,
) -> bool:
    """Whether this is the attention that the operator computes, with parameters of these dtypes."""
    if not _is(se, Cbam) or se.parallel or se.spatial_first:
        return False
    channel, spatial = se._modules['channel'], se._modules['spatial']
    if not (
            _is(channel, ChannelAttention) and channel.pooling == 'avgmax'
            and _is(spatial, SpatialAttention) and spatial.pooling == 'avgmax'):
        return False
    c, s = channel._modules, spatial._modules
    fc1, fc2, conv = c['fc1'], c['fc2'], s['conv']
    if not (
            _is(fc1, nn.Conv2d) and _is(c['act'], nn.ReLU) and _is(fc2, nn.Conv2d) and _is(c['gate'], Sigmoid)
            and _is(conv, nn.Conv2d) and _is(s['gate'], Sigmoid)
            and (_is(s['bn'], nn.Identity) or _is_norm(s['bn'], device, norm_dtypes) and s['bn'].weight.shape == (1,))):
        return False
    tensors = [p for m in (fc1, fc2, conv) for p in m._parameters.values() if p is not None]
    if not _are_plain(tensors, device, weight_dtypes) or conv.bias is not None or fc1.weight.ndim != 4:
        return False
    hidden, kernel = fc1.weight.shape[0], conv.weight.shape[-1]
    return (
        _has_kind(fc1, (hidden, channels, 1, 1)) and _has_kind(fc2, (channels, hidden, 1, 1))
        and kernel % 2 == 1 and _has_kind(conv, (1, 2, kernel, kernel))
        and (fc1.bias is None or fc1.bias.shape == (hidden,)) and (fc2.bias is None or fc2.bias.shape == (channels,)))


def _is_watched() -> bool:
    """Whether something sees or transforms what is executed: global hooks, modes, transforms, tracers, patches."""
    if (
            nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks
            or nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks
            or torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
            or torch.autograd.forward_ad._current_level >= 0 or torch._C._is_tracing()):
        return True
    for i in range(torch._C._len_torch_function_stack()):
        if type(torch._C._get_function_stack_at(i)) is not DeviceContext:  # torch.set_default_device
            return True
    for cls, name, original in _ORIGINALS:
        if getattr(cls, name) is not original:
            return True
    return False


def _parts(block: nn.Module) -> Tuple[Tuple[Tuple[str, type], ...], nn.Module, nn.Module]:
    """Names and types up to the tail, the norm and act of the tail"""
    m = block._modules
    return (_BOTTLENECK, m['bn3'], m['act3']) if 'conv3' in m else (_BASIC, m['bn2'], m['act2'])


def fuses(block: nn.Module, x: torch.Tensor) -> bool:
    """Whether the block may run as one operator for this input, and is faster so.

    Args:
        block: CbamBasicBlock or CbamBottleneck.
        x: Input of the block.
    """
    if not FUSED:
        return False
    if torch.compiler.is_compiling():
        # Exporters write plain operations down, and other devices' compilers fuse them.
        if torch.compiler.is_exporting() or tail_cpu.LIBRARY is None or x.device.type != 'cpu':
            return False
    elif type(x) is not torch.Tensor and type(x) is not nn.Parameter or _is_watched():
        return False
    device, dtype = x.device, x.dtype
    if device.type not in _DTYPES:
        return False
    weight_dtypes: _Dtypes = (dtype,)
    if torch.is_autocast_enabled(device.type):
        # Convolutions give this, and cast float32 weights to it.
        dtype = torch.get_autocast_dtype(device.type)
        weight_dtypes = (torch.float32, dtype)
    if x.ndim != 4 or x.layout is not torch.strided or dtype not in _DTYPES[device.type]:
        return False
    norm_dtypes = _norm_dtypes(dtype)
    modules = block._modules
    names, norm, act = _parts(block)
    if block._backward_hooks and not block._is_full_backward_hook:
        return False  # they see the last operation of the block
    for name, cls in names:
        if not (_is_norm(modules[name], device, norm_dtypes) if cls is nn.BatchNorm2d else _is(modules[name], cls)):
            return False
    if not (
            _is_norm(norm, device, norm_dtypes) and _is(act, nn.ReLU)
            and _is_attention(modules['se'], norm.weight.shape[0], device, weight_dtypes, norm_dtypes)):
        return False
    drop_path, downsample = block.drop_path, block.downsample
    if downsample is not None:
        if not _is(downsample, nn.Sequential):
            return False
        for m in downsample._modules.values():
            # Here it runs before the tail, in timm after it: it may not fail, nor be the tail's.
            if type(m) is nn.BatchNorm2d:
                if m is norm or not _is_norm(m, device, norm_dtypes):
                    return False
            elif type(m) not in _DOWNSAMPLE or not _is(m, type(m)) or not _are_plain(
                    [p for p in m._parameters.values() if p is not None], device, weight_dtypes):
                return False
    return drop_path is None or _is(drop_path, DropPath) and 0 <= drop_path.drop_prob <= 1


def _run(x: torch.Tensor, modules: Iterable[nn.Module]) -> torch.Tensor:
    """Run modules one after the other; where no gradient is computed, batch-norm and ReLU in the convolution's place.

    A fresh map costs more than the arithmetic: the system has to provide its pages.
    """
    modules = [m for m in modules if type(m) is not nn.Identity]
    if torch.is_grad_enabled():
        for m in modules:
            x = m(x)
        return x
    previous, relu_is_done = None, False
    for m, following in zip_longest(modules, modules[1:]):
        if _normalizes_in_place(m, previous, x):
            relu_is_done = type(following) is nn.ReLU
            x = norm_relu_(x, m, relu_is_done)
        elif not (type(m) is nn.ReLU and relu_is_done):
            x = m(x)
            relu_is_done = False
        previous = m
    return x


def _normalizes_in_place(m: nn.Module, previous: Optional[nn.Module], x: torch.Tensor) -> bool:
    return (
        type(m) is nn.BatchNorm2d and type(previous) is nn.Conv2d and not m.training and _suits(m, x) and x.numel() > 0)


def _suits(norm: nn.Module, x: torch.Tensor) -> bool:
    """Whether a convolution's output is what the norm takes: its weights may have been of another kind or size."""
    return (
        type(x) is torch.Tensor and norm.weight.dtype in _norm_dtypes(x.dtype) and x.shape[1:2] == norm.weight.shape)


def forward(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Output of a block that :func:`fuses`."""
    modules = block._modules
    names, norm, act = _parts(block)
    shortcut = x
    x = _run(x, [modules[name] for name, _ in names])
    se, drop_path, downsample = modules['se'], block.drop_path, block.downsample
    # more than one value for each channel, as batch-norm wants in training
    fits = _suits(norm, x) and x.numel() > x.shape[1]
    if fits and downsample is not None:
        shortcut = _run(shortcut, downsample)
    if not fits or x.shape != shortcut.shape or x.dtype != shortcut.dtype:  # timm's way, to timm's error or broadcast
        x = se(norm(x))
        if drop_path is not None:
            x = drop_path(x)
        if not fits and downsample is not None:
            shortcut = downsample(shortcut)
        return act(x + shortcut)

    channel, spatial = se.channel, se.spatial
    bn = spatial.bn if type(spatial.bn) is nn.BatchNorm2d else None
    for n in (norm, bn):
        if n is not None and n.training and n.num_batches_tracked is not None:
            n.num_batches_tracked.add_(1)
    factor = None
    if drop_path is not None and drop_path.training and drop_path.drop_prob:
        factor = drop_path(x.new_ones(x.shape[0], 1, 1, 1))
    p = Tail(
        norm.weight, norm.bias, norm.running_mean, norm.running_var,
        channel.fc1.weight, channel.fc1.bias, channel.fc2.weight, channel.fc2.bias, spatial.conv.weight,
        *((None,) * 4 if bn is None else (bn.weight, bn.bias, bn.running_mean, bn.running_var)),
        factor, norm.training, norm.eps, bn is not None and bn.training, 0. if bn is None else bn.eps)
    return cbam_tail(x, shortcut, p, norm.momentum, 0. if bn is None else bn.momentum, inplace=True)
