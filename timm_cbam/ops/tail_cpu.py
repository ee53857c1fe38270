"""The operator of tail.py by native loops, tail_cpu.cpp: each function is one call into the library

Maps are handed over as they are, dense in one of both memory formats, everything else in the dtype of accumulation.
"""
import ctypes
from typing import List, Optional

import torch

from . import native
from .arguments import Gradients, Results, Tail, accumulation_dtype, gradient_shapes, result_shapes

LIBRARY = native.load()[0]
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


class _Args(ctypes.Structure):
    """The struct of the same name in tail_cpu.cpp."""
    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            'dtype', 'channels_last', 'threads', 'b', 'c', 'h', 'w', 'r', 'k', 'stride_c', 'stride_y', 'stride_x',
            'training', 'bn_training', 'collect', 'round_invstd')),
        *((name, ctypes.c_double) for name in ('eps', 'bn_eps')),
        *((name, ctypes.c_void_p) for name in (
            'x', 'shortcut', 'out', 'weight', 'bias', 'mean', 'var', 'fc1', 'fc1_bias', 'fc2', 'fc2_bias', 'kernel',
            'bn_weight', 'bn_bias', 'bn_mean', 'bn_var', 'factor', 'stats', 'bn_stats', 'space', 'hidden', 'mc',
            'pooled', 'conv', 'grad', 'g', 'dx', 'dweight', 'dbias', 'dfc1', 'dfc1_bias', 'dfc2', 'dfc2_bias',
            'dkernel', 'dbn')),
    ]


if LIBRARY is not None:
    LIBRARY.cbam_norm_relu.argtypes = (
        *(ctypes.c_int64,) * 6, ctypes.c_double, ctypes.c_int64, *(ctypes.c_void_p,) * 5)


def supports(x: torch.Tensor) -> bool:
    return x.device.type == 'cpu' and x.dtype in _DTYPES and x.numel() > 0 and LIBRARY is not None


def _small(t: Optional[torch.Tensor], dtype: torch.dtype, alive: List[torch.Tensor]) -> Optional[int]:
    """Address of a tensor in this dtype; `alive` holds what has been made for it."""
    if t is None:
        return None
    if t.dtype is not dtype or not t.is_contiguous():
        t = t.to(dtype).contiguous()
        alive.append(t)
    return t.data_ptr()


def _args(x: torch.Tensor, p: Tail, alive: List[torch.Tensor]) -> _Args:
    """What all calls have in common"""
    dtype = accumulation_dtype(x)
    b, c, h, w = x.shape
    kernel = p.conv_weight
    if kernel.dtype is not dtype:
        kernel = kernel.to(dtype)
        alive.append(kernel)
    _, stride_c, stride_y, stride_x = kernel.stride()
    weight, bias, mean, var, fc1, fc1_bias, fc2, fc2_bias = [_small(t, dtype, alive) for t in p[:8]]
    bn_weight, bn_bias, bn_mean, bn_var, factor = [_small(t, dtype, alive) for t in p[9:14]]
    return _Args(
        _DTYPES[x.dtype], not x.is_contiguous(), torch.get_num_threads(), b, c, h, w, p.fc1_weight.shape[0],
        kernel.shape[-1], stride_c, stride_y, stride_x, p.training, p.bn_training, False,
        p.training and p.weight.dtype == torch.bfloat16, p.eps, p.bn_eps, x.data_ptr(), None, None, weight, bias, mean,
        var, fc1, fc1_bias, fc2, fc2_bias, kernel.data_ptr(), bn_weight, bn_bias, bn_mean, bn_var, factor)


def _set_results(args: _Args, r: Results) -> None:
    (args.stats, args.bn_stats, args.space, args.hidden, args.mc, args.pooled, args.conv) = (
        t.data_ptr() for t in r)


def _run(name: str, *args) -> None:
    if getattr(LIBRARY, name)(*args):
        raise MemoryError(f'timm_cbam: not enough memory for {name}')


def forward(x: torch.Tensor, shortcut: torch.Tensor, out: torch.Tensor, p: Tail) -> Results:
    alive: List[torch.Tensor] = []
    args = _args(x, p, alive)
    r = Results(*(x.new_empty(shape, dtype=accumulation_dtype(x)) for shape in result_shapes(x, p)))
    if p.training:
        # PyTorch's own statistics where they cannot be computed anew in all bits, and faster
        args.collect = x.dtype == torch.float32 and x.is_contiguous() and x[0, 0].numel() > 1
        if not args.collect:
            r.stats[0], r.stats[1] = torch.batch_norm_update_stats(x, p.mean.clone(), p.var.clone(), 0.)[:2]
    args.shortcut, args.out = shortcut.data_ptr(), out.data_ptr()
    _set_results(args, r)
    _run('cbam_forward', ctypes.byref(args))
    return r


def infer(x: torch.Tensor, shortcut: torch.Tensor, p: Tail) -> None:
    alive: List[torch.Tensor] = []
    args = _args(x, p, alive)
    args.shortcut, args.out = shortcut.data_ptr(), x.data_ptr()
    _run('cbam_forward', ctypes.byref(args))


def backward(grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor, p: Tail, r: Results) -> Gradients:
    alive: List[torch.Tensor] = []
    args = _args(x, p, alive)
    _set_results(args, r)
    small = (x.new_empty(shape, dtype=accumulation_dtype(x)) for shape in gradient_shapes(p))
    d = Gradients(torch.empty_like(x), torch.empty_like(x), *small)
    if p.bn_weight is None:
        d.bn.zero_()
    args.grad, args.out = grad.data_ptr(), out.data_ptr()
    (args.dx, args.g, args.dweight, args.dbias, args.dfc1, args.dfc1_bias, args.dfc2, args.dfc2_bias, args.dkernel,
     args.dbn) = (t.data_ptr() for t in d)
    _run('cbam_backward', ctypes.byref(args))
    return d


def norm_relu(x, weight, bias, mean, var, eps: float, relu: bool) -> None:
    alive: List[torch.Tensor] = []
    dtype = accumulation_dtype(x)
    addresses = [_small(t, dtype, alive) for t in (weight, bias, mean, var)]
    _run('cbam_norm_relu', _DTYPES[x.dtype], not x.is_contiguous(), *x.shape, eps, relu, x.data_ptr(), *addresses)
