"""May a residual block run as one operator, and how does it

The operator of ops/tail.py stands for a dozen modules, which then do not run. It may do so only where nobody can tell:
every module of the block has exactly the type that it computes, with nothing attached to it, and nothing watches or
transforms what is executed. Otherwise the block runs module by module, as timm's does. :func:`match` is the only place
that decides this, and :func:`forward` the only one that turns modules into arguments.

At batch 1 what happens here takes as long as the attention itself: everything is looked at once, where it is stored.
"""
import os
from itertools import chain, zip_longest
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from timm.layers import AvgPool2dSame, DropPath, Sigmoid
from torch import nn
from torch._C import (
    _are_functorch_transforms_active,
    _get_function_stack_at,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_exporting
from torch.nn.modules import module as nn_module
from torch.utils._device import DeviceContext

from .layers import Cbam, ChannelAttention, SpatialAttention
from .ops import Tail, cbam_tail, check, norm_relu_, tail_cpu

__all__ = ['forward', 'match']

FUSED = os.environ.get('TIMM_CBAM_FUSED', '1') != '0'

_Dtypes = Tuple[torch.dtype, ...]
_Tensor = Optional[torch.Tensor]
_DTYPES: Dict[str, _Dtypes] = {'cpu': (torch.float32, torch.float64, torch.bfloat16), **check.DTYPES}

# Modules of the blocks up to se, in the order in which they run, and of se's parts
_BASIC = dict(
    conv1=nn.Conv2d, bn1=nn.BatchNorm2d, drop_block=nn.Identity, act1=nn.ReLU, aa=nn.Identity,
    conv2=nn.Conv2d, bn2=nn.BatchNorm2d, act2=nn.ReLU, se=Cbam)
_BOTTLENECK = dict(
    conv1=nn.Conv2d, bn1=nn.BatchNorm2d, act1=nn.ReLU,
    conv2=nn.Conv2d, bn2=nn.BatchNorm2d, drop_block=nn.Identity, act2=nn.ReLU, aa=nn.Identity,
    conv3=nn.Conv2d, bn3=nn.BatchNorm2d, act3=nn.ReLU, se=Cbam)
_CBAM = dict(channel=ChannelAttention, spatial=SpatialAttention)
_CHANNEL = dict(fc1=nn.Conv2d, act=nn.ReLU, fc2=nn.Conv2d, gate=Sigmoid)
_SPATIAL = dict(conv=nn.Conv2d, bn=nn.Identity, gate=Sigmoid)
_SPATIAL_NORM = dict(_SPATIAL, bn=nn.BatchNorm2d)
_DOWNSAMPLE = frozenset((nn.Conv2d, nn.AvgPool2d, AvgPool2dSame, nn.Identity, nn.BatchNorm2d))


def _types(block: Dict[str, type]) -> Tuple[Tuple[type, ...], ...]:
    common = *block.values(), *_CBAM.values(), *_CHANNEL.values()
    return (*common, *_SPATIAL.values()), (*common, *_SPATIAL_NORM.values())


_TYPES_BASIC, _TYPES_BOTTLENECK = _types(_BASIC), _types(_BOTTLENECK)

# What runs when a module is called. Instances that have one of these names of their own, and classes that somebody has
# patched, are not what their type says.
_METHODS = frozenset((
    'forward', '_call_impl', '_compiled_call_impl', '_slow_forward', '_conv_forward', '_check_input_dim',
    'attention_map'))
_PATCHABLE = tuple(
    (cls, name)
    for cls, names in (
        (nn.Module, ('__call__', '_call_impl')), (nn.Conv2d, ('__call__', 'forward', '_conv_forward')),
        *((cls, ('__call__', 'forward')) for cls in (
            nn.BatchNorm2d, nn.ReLU, Sigmoid, nn.Identity, nn.Sequential, DropPath, Cbam)),
        *((cls, ('__call__', 'forward', 'attention_map')) for cls in (ChannelAttention, SpatialAttention)))
    for name in names)
_CLASSES, _NAMES = zip(*_PATCHABLE, strict=True)
_ORIGINALS = tuple(map(getattr, _CLASSES, _NAMES))

_TENSOR_TYPES = frozenset((torch.Tensor, nn.Parameter))


class Parts(NamedTuple):
    """Of a block that runs as one operator"""
    branch: List[nn.Module]  # up to the last convolution
    norm: nn.BatchNorm2d
    act: nn.ReLU
    se: Cbam
    drop_path: Optional[DropPath]
    downsample: Optional[nn.Sequential]
    tensors: Tuple[_Tensor, ...]  # with which Tail begins


def _are_plain(tensors: Sequence[torch.Tensor], device: torch.device, dtypes: _Dtypes) -> bool:
    """Whether these are ordinary tensors on the device, all of one of the dtypes."""
    if not _TENSOR_TYPES.issuperset(map(type, tensors)):
        return False
    kinds = {(t.dtype, t.device, t.layout) for t in tensors}
    return not kinds or len(kinds) == 1 and kinds.pop() in [(dtype, device, torch.strided) for dtype in dtypes]


def _weights(m: nn.Module) -> Tuple[_Tensor, _Tensor]:
    parameters = m._parameters
    return parameters.get('weight'), parameters.get('bias')


def _norm_tensors(m: nn.BatchNorm2d) -> Tuple[_Tensor, _Tensor, _Tensor, _Tensor]:
    buffers = m._buffers
    return *_weights(m), buffers.get('running_mean'), buffers.get('running_var')


def _is_norm(m: nn.BatchNorm2d, device: torch.device, dtypes: _Dtypes) -> bool:
    if m.momentum is None or not m.track_running_stats:
        return False
    tensors = _norm_tensors(m)
    return _are_plain(tensors, device, dtypes) and len({t.shape for t in tensors}) == 1


def _norm_dtypes(dtype: torch.dtype) -> _Dtypes:
    """Of parameters with which PyTorch's batch-norm takes a map of this dtype"""
    return (dtype, torch.float32) if dtype.itemsize < 4 else (dtype,)


def _keeps_size(conv: nn.Conv2d, weight: torch.Tensor, shape: Tuple[int, ...]) -> bool:
    """Whether a convolution is as the operator computes it: of this shape, same size of output as of input."""
    return (
        weight.shape == shape and conv.stride == conv.dilation == (1, 1)
        and conv.padding == (shape[2] // 2, shape[3] // 2) and conv.groups == 1 and conv.padding_mode == 'zeros')


def _is_watched() -> bool:
    """Whether something sees or transforms what is executed: global hooks, modes, transforms, tracers, patches."""
    if (
            nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks
            or nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks
            or _len_torch_dispatch_stack() or _are_functorch_transforms_active() or forward_ad._current_level >= 0
            or _is_tracing()):
        return True
    for i in range(_len_torch_function_stack()):
        if type(_get_function_stack_at(i)) is not DeviceContext:  # torch.set_default_device
            return True
    return tuple(map(getattr, _CLASSES, _NAMES)) != _ORIGINALS


def match(block: nn.Module, x: torch.Tensor) -> Optional[Parts]:
    """The parts of a block that may run as one operator for this input, and is faster so; otherwise None.

    Args:
        block: CbamBasicBlock or CbamBottleneck.
        x: Input of the block.
    """
    if not FUSED:
        return None
    if is_compiling():
        # Exporters write plain operations down, and other devices' compilers fuse them.
        if is_exporting() or tail_cpu.LIBRARY is None or x.device.type != 'cpu':
            return None
    elif type(x) is not torch.Tensor and type(x) is not nn.Parameter or _is_watched():
        return None
    device, dtype = x.device, x.dtype
    if device.type not in _DTYPES:
        return None
    weight_dtypes: _Dtypes = (dtype,)
    if torch.is_autocast_enabled(device.type):
        # Convolutions give this, and cast float32 weights to it.
        dtype = torch.get_autocast_dtype(device.type)
        weight_dtypes = (torch.float32, dtype)
    if x.ndim != 4 or x.layout is not torch.strided or dtype not in _DTYPES[device.type]:
        return None
    if tail_cpu.LIBRARY is None and device.type == 'cpu' and x.shape[0] == 1 and not torch.is_grad_enabled():
        return None  # in PyTorch's operations the tail of a single image takes no less time than the modules
    norm_dtypes = _norm_dtypes(dtype)

    # ---- which modules these are
    if block._backward_hooks and not block._is_full_backward_hook:
        return None  # they see the last operation of the block
    inside = block._modules
    if type(inside.get('se')) is not Cbam:
        return None
    is_bottleneck = 'conv3' in inside
    try:
        own = [inside[name] for name in (_BOTTLENECK if is_bottleneck else _BASIC)]
        channel, spatial = parts = [own[-1]._modules[name] for name in _CBAM]
        if type(channel) is not ChannelAttention or type(spatial) is not SpatialAttention:
            return None
        modules = (
            *own, *parts, *[channel._modules[name] for name in _CHANNEL],
            *[spatial._modules[name] for name in _SPATIAL])
    except KeyError:  # somebody has deleted one: to the error that this gives in timm
        return None
    if tuple(map(type, modules)) not in (_TYPES_BOTTLENECK if is_bottleneck else _TYPES_BASIC):
        return None
    *branch, norm, act, se = own
    fc1, _, fc2, _, conv, bn, _ = modules[-7:]
    drop_path, downsample = block.drop_path, block.downsample
    if downsample is not None:
        if type(downsample) is not nn.Sequential:
            return None
        children = tuple(downsample._modules.values())
        # Here it runs before the tail, in timm after it: it may not fail, nor be the tail's.
        if norm in children or not _DOWNSAMPLE.issuperset(map(type, children)):
            return None
        for m in children:
            if type(m) is nn.BatchNorm2d:
                if not _is_norm(m, device, norm_dtypes):
                    return None
            elif not _are_plain([p for p in m._parameters.values() if p is not None], device, weight_dtypes):
                return None
        modules = *modules, downsample, *children
    if drop_path is not None:
        if type(drop_path) is not DropPath or not 0 <= drop_path.drop_prob <= 1:
            return None
        modules = *modules, drop_path

    # ---- whether somebody has attached something to one of them
    for m in modules:
        state = m.__dict__
        if (
                state['_forward_hooks'] or state['_forward_pre_hooks'] or state['_backward_hooks']
                or state['_backward_pre_hooks'] or not _METHODS.isdisjoint(state)):
            return None

    # ---- whether they compute what the operator computes
    if se.parallel or se.spatial_first or channel.pooling != 'avgmax' or spatial.pooling != 'avgmax':
        return None
    if not _is_norm(norm, device, norm_dtypes):
        return None
    (w0, b0), (w1, b1), (kernel, kernel_bias) = weights = _weights(fc1), _weights(fc2), _weights(conv)
    if not _are_plain([t for t in chain(*weights) if t is not None], device, weight_dtypes):
        return None
    if w0 is None or w1 is None or kernel is None or kernel_bias is not None or w0.ndim != 4:
        return None
    norm_tensors = _norm_tensors(norm)
    (channels,), hidden, size = norm_tensors[0].shape, w0.shape[0], kernel.shape[-1]
    if not (
            _keeps_size(fc1, w0, (hidden, channels, 1, 1)) and _keeps_size(fc2, w1, (channels, hidden, 1, 1))
            and size % 2 == 1 and _keeps_size(conv, kernel, (1, 2, size, size))
            and (b0 is None or b0.shape == (hidden,)) and (b1 is None or b1.shape == (channels,))):
        return None
    bn_tensors: Tuple[_Tensor, ...] = (None,) * 4
    if type(bn) is nn.BatchNorm2d:
        bn_tensors = _norm_tensors(bn)
        if not _is_norm(bn, device, norm_dtypes) or bn_tensors[0].shape != (1,):
            return None
    return Parts(
        branch, norm, act, se, drop_path, downsample, (*norm_tensors, w0, b0, w1, b1, kernel, *bn_tensors))


def _run(x: torch.Tensor, modules: Iterable[nn.Module]) -> torch.Tensor:
    """Run modules one after the other; where no gradient is computed, batch-norm and ReLU in the convolution's place.

    A fresh map costs more than the arithmetic: the system has to provide its pages. (torch.compile does so by itself.)
    """
    modules = [m for m in modules if type(m) is not nn.Identity]
    if torch.is_grad_enabled() or is_compiling():
        for m in modules:
            x = m(x)
        return x
    previous, relu_is_done = None, False
    for m, following in zip_longest(modules, modules[1:]):
        if _normalizes_in_place(m, previous, x):
            relu_is_done = type(following) is nn.ReLU
            x = norm_relu_(x, *_norm_tensors(m), m.eps, relu_is_done)
        elif not (type(m) is nn.ReLU and relu_is_done):
            x = m(x)
            relu_is_done = False
        previous = m
    return x


def _normalizes_in_place(m: nn.Module, previous: Optional[nn.Module], x: torch.Tensor) -> bool:
    return (
        type(m) is nn.BatchNorm2d and type(previous) is nn.Conv2d and not m.training and type(x) is torch.Tensor
        and _is_norm(m, x.device, _norm_dtypes(x.dtype)) and _suits(m, x) and x.numel() > 0
        and _is_served(x, training=False))


def _suits(norm: nn.Module, x: torch.Tensor) -> bool:
    """Whether a convolution's output is what the norm takes: its weights may have been of another kind or size."""
    weight = norm._parameters['weight']
    return type(x) is torch.Tensor and weight.dtype in _norm_dtypes(x.dtype) and x.shape[1:2] == weight.shape


def _is_served(x: torch.Tensor, training: bool) -> bool:
    """Whether the operator is known to be right where this map is."""
    return x.device.type not in check.DTYPES or check.implementation(x, training) is not None


def forward(parts: Parts, x: torch.Tensor) -> torch.Tensor:
    """Output of the block for x, the input for which :func:`match` has found its parts."""
    branch, norm, act, se, drop_path, downsample, tensors = parts
    shortcut = x
    x = _run(x, branch)
    bn = se.spatial.bn
    training = torch.is_grad_enabled() or norm.training or type(bn) is nn.BatchNorm2d and bn.training
    # more than one value for each channel, as batch-norm wants in training
    fits = _suits(norm, x) and x.numel() > x.shape[1] and _is_served(x, training)
    if fits and downsample is not None:
        shortcut = _run(shortcut, downsample)
    if not fits or x.shape != shortcut.shape or x.dtype != shortcut.dtype:  # timm's way, to timm's error or broadcast
        x = se(norm(x))
        if drop_path is not None:
            x = drop_path(x)
        if not fits and downsample is not None:
            shortcut = downsample(shortcut)
        return act(x + shortcut)

    bn_training, bn_eps, bn_momentum = False, 0., 0.
    if type(bn) is nn.BatchNorm2d:
        bn_training, bn_eps, bn_momentum = bn.training, bn.eps, bn.momentum
        _count(bn)
    _count(norm)
    factor = None
    if drop_path is not None and drop_path.training and drop_path.drop_prob:
        factor = drop_path(x.new_ones(x.shape[0], 1, 1, 1))
    p = Tail._make((*tensors, factor, norm.training, norm.eps, bn_training, bn_eps))
    return cbam_tail(x, shortcut, p, norm.momentum, bn_momentum, inplace=True)


def _count(norm: nn.BatchNorm2d) -> None:
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
