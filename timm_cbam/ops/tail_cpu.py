"""The operator of tail.py by native loops, tail_cpu.cpp: each function is one call into the library

Maps are handed over as they are, dense in one of both memory formats, everything else in the dtype of accumulation.
"""
import ctypes
from itertools import accumulate
from math import prod
from typing import Any, List, Optional, Sequence

import torch

from . import native
from .arguments import Gradients, Results, Tail, accumulation_dtype, gradient_shapes, result_shapes

LIBRARY = native.load()[0]
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


class _Args(ctypes.Structure):
    """The struct of the same name in tail_cpu.cpp."""
    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            'dtype', 'channels_last', 'threads', 'b', 'c', 'h', 'w', 'r', 'k', 'training', 'bn_training', 'collect',
            'round_invstd')),
        *((name, ctypes.c_double) for name in ('eps', 'bn_eps')),
        *((name, ctypes.c_void_p) for name in (
            'x', 'shortcut', 'out', 'mean', 'var', 'weight', 'bias', 'slope', 'fc1', 'fc1_bias', 'fc2', 'fc2_bias',
            'kernel', 'bn_slope', 'bn_stats', 'factor', 'space', 'hidden', 'mc', 'pooled', 'conv', 'grad', 'g', 'dx',
            'dweight', 'dbias', 'dfc1', 'dfc1_bias', 'dfc2', 'dfc2_bias', 'dkernel', 'dbn')),
    ]


def supports(x: torch.Tensor) -> bool:
    return x.device.type == 'cpu' and x.dtype in _DTYPES and x.numel() > 0 and LIBRARY is not None


class _Call:
    """Arguments of one call, and the tensors that must live as long as it."""

    def __init__(self, x: torch.Tensor, p: Tail) -> None:
        self.dtype = accumulation_dtype(x)
        self.alive: List[torch.Tensor] = []
        b, c, h, w = x.shape
        self.args = _Args(
            _DTYPES[x.dtype], not x.is_contiguous(), torch.get_num_threads(), b, c, h, w, len(p.fc1_weight),
            p.conv_weight.shape[-1], p.training, p.bn_training, 0,
            p.training and p.weight.dtype == torch.bfloat16, p.eps, p.bn_eps)
        self.set(
            x=x, **{name: self.small(t) for name, t in dict(
                slope=p.weight, fc1=p.fc1_weight, fc1_bias=p.fc1_bias, fc2=p.fc2_weight,
                fc2_bias=p.fc2_bias, kernel=p.conv_weight, bn_slope=p.bn_weight,
                factor=p.factor).items()})

    def small(self, t: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        return None if t is None else t.to(self.dtype).contiguous()

    def set(self, **tensors: Optional[torch.Tensor]) -> None:
        for name, t in tensors.items():
            if t is not None:
                setattr(self.args, name, t.data_ptr())
                self.alive.append(t)

    def set_results(self, r: Results) -> None:
        self.set(
            mean=r.stats[0], var=r.stats[1], weight=r.stats[2], bias=r.stats[3], bn_stats=r.bn_stats, space=r.space,
            hidden=r.hidden, mc=r.mc, pooled=r.pooled, conv=r.conv)

    def run(self, name: str, *args: Any) -> None:
        if getattr(LIBRARY, name)(ctypes.byref(self.args), *args):
            raise MemoryError(f'timm_cbam: not enough memory for {name}')


def _scratch(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list:
    """Tensors in one piece of memory"""
    ends = list(accumulate(map(prod, shapes)))
    memory = torch.empty(ends[-1], dtype=dtype, device='cpu')
    return [memory[end - prod(shape):end].view(shape) for end, shape in zip(ends, shapes, strict=True)]


def forward(x: torch.Tensor, shortcut: torch.Tensor, out: torch.Tensor, p: Tail) -> Results:
    call = _Call(x, p)
    r = Results(*(x.new_empty(shape, dtype=call.dtype) for shape in result_shapes(x, p)))
    r.stats[2] = p.weight
    r.stats[3] = p.bias
    if not p.training:
        r.stats[0] = p.mean
        r.stats[1] = p.var
    elif x.dtype == torch.float32 and x.is_contiguous() and x[0, 0].numel() > 1:
        call.args.collect = 1
    else:  # PyTorch's own statistics: only those above can be computed anew in all bits, and faster
        r.stats[0], r.stats[1] = torch.batch_norm_update_stats(x, p.mean.clone(), p.var.clone(), 0.)[:2]
    if p.bn_weight is None:
        r.bn_stats.zero_()
    else:
        r.bn_stats[2] = p.bn_weight
        r.bn_stats[3] = p.bn_bias
        if not p.bn_training:
            r.bn_stats[0] = p.bn_mean
            r.bn_stats[1] = p.bn_var
    call.set_results(r)
    call.set(shortcut=shortcut, out=out)
    call.run('cbam_forward')
    return r


def infer(x: torch.Tensor, shortcut: torch.Tensor, p: Tail) -> None:
    call = _Call(x, p)
    call.set_results(Results(*_scratch(result_shapes(x, p), call.dtype)))
    small = call.small
    call.set(shortcut=shortcut, out=x)
    call.set(mean=small(p.mean), var=small(p.var), weight=small(p.weight), bias=small(p.bias))
    if p.bn_weight is not None:
        call.set(bn_stats=torch.cat([small(t) for t in (p.bn_mean, p.bn_var, p.bn_weight, p.bn_bias)]))
    call.run('cbam_forward')


def backward(grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor, p: Tail, r: Results) -> Gradients:
    call = _Call(x, p)
    call.set_results(r)

    small = (x.new_empty(shape, dtype=call.dtype) for shape in gradient_shapes(p))
    d = Gradients(torch.empty_like(x), torch.empty_like(x), *small)
    if p.bn_weight is None:
        d.bn.zero_()
    call.set(
        grad=grad, out=out, g=d.shortcut, dx=d.x, dweight=d.weight, dbias=d.bias, dfc1=d.fc1_weight,
        dfc1_bias=d.fc1_bias, dfc2=d.fc2_weight, dfc2_bias=d.fc2_bias, dkernel=d.conv_weight, dbn=d.bn)
    call.run('cbam_backward')
    return d


def norm_relu(x, weight, bias, mean, var, eps: float, relu: bool) -> None:
    b, c, h, w = x.shape
    args = _Args(_DTYPES[x.dtype], not x.is_contiguous(), torch.get_num_threads(), b, c, h, w, 0, 1, eps=eps)
    dtype = accumulation_dtype(x)
    small = [t.to(dtype).contiguous() for t in (weight, bias, mean, var)]
    args.out = x.data_ptr()
    args.weight, args.bias, args.mean, args.var = (t.data_ptr() for t in small)
    if LIBRARY.cbam_norm_relu(ctypes.byref(args), ctypes.c_int64(relu)):
        raise MemoryError('timm_cbam: not enough memory for cbam_norm_relu')
