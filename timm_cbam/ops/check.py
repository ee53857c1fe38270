"""Which implementation of the operator serves a device other than the CPU: the first that is right there

What runs on a GPU depends on its model, on driver, compiler and PyTorch's build, and the tests have seen none of their
combinations. So nothing runs that has not given, on this very device, what tail_torch gives in float64 on CPU. That is
done once in a process for each dtype and memory format. What takes time is compiling: a second or two for training,
half of it for kernels that are needed anyway, and next to nothing where Triton finds them in its cache on disk.
"""
import threading
import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Dict, Iterator, Optional, Tuple, Union

import torch

from . import tail_torch
from .arguments import Gradients, Results, Tail, accumulation_dtype, memory_format

__all__ = ['DTYPES', 'implementation']

# What tail_torch computes on each kind of device. ROCm's devices are PyTorch's cuda.
_HALF = torch.float32, torch.float16, torch.bfloat16
DTYPES: Dict[str, Tuple[torch.dtype, ...]] = {'cuda': _HALF, 'mps': _HALF, 'xpu': _HALF}

# A kernel gets another tile in a small batch than in a large one. None of these sizes fills its last tile.
_SHAPES = (2, 80, 12, 12), (320, 80, 4, 4)
# Relative, in the 2-norm. PyTorch's convolutions may work in TF32, which costs 5e-4, rounding to bfloat16 2e-3, and a
# single tile that is wrong or missing at least 5e-2.
_TOLERANCE = 2e-2

_Kind = Tuple[torch.device, torch.dtype, torch.memory_format, bool]
_CHOSEN: Dict[_Kind, Optional[ModuleType]] = {}
_LOCK = threading.Lock()


def implementation(x: torch.Tensor, training: bool) -> Optional[ModuleType]:
    """The module that does the work for a map, None if blocks have to run module by module.

    Args:
        x: On one of the devices of DTYPES.
        training: Whether gradients are wanted or a batch-norm is in training, or neither.
    """
    kind = x.device, x.dtype, memory_format(x), training
    if kind not in _CHOSEN:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # a graph would capture the check
        with _LOCK:
            if kind not in _CHOSEN:
                _CHOSEN[kind] = _choose(*kind)
    return _CHOSEN[kind]


def _candidates(device: torch.device) -> Iterator[str]:
    if device.type == 'cuda' and find_spec('triton') is not None:
        yield 'tail_triton'
    yield 'tail_torch'


def _choose(
        device: torch.device, dtype: torch.dtype, format_: torch.memory_format, training: bool,
) -> Optional[ModuleType]:
    for name in _candidates(device):
        try:
            module = import_module(f'.{name}', __package__)  # tail_triton imports triton, which takes long
            reason = _difference(module, device, dtype, format_, training)
        except Exception as e:  # of a compiler, a driver, a launcher: there is no list of them
            reason = f'{type(e).__name__}: {e}'
        if reason is None:
            return module
        what = 'Triton kernels' if name == 'tail_triton' else "PyTorch operations for a block's tail"
        warnings.warn(
            f'timm_cbam: {what} are not used for {"training" if training else "inference"} in '
            f'{_name(dtype)} and {_name(format_)} on {device}, because a check of them failed: {reason}. '
            f'Results are right, but take longer.', stacklevel=3)
    return None


def _name(kind: Union[torch.dtype, torch.memory_format]) -> str:
    return str(kind).removeprefix('torch.')


def _difference(
        module: ModuleType,
        device: torch.device,
        dtype: torch.dtype,
        format_: torch.memory_format,
        training: bool,
) -> Optional[str]:
    """What a module computes wrong, None if nothing"""
    with (
            torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False),
            torch.autocast('cpu', enabled=False)):
        for shape in _SHAPES:
            maps, parameters = _problem(shape, dtype)
            expected = _compute(tail_torch, maps, parameters, training, torch.device('cpu'), torch.float64)
            found = _compute(module, maps, parameters, training, device, dtype, format_)
            for name, value in expected.items():
                error = (found[name].to('cpu', torch.float64) - value).norm() / value.norm()
                if not error < _TOLERANCE:  # nor NaN
                    return f'{name} of {shape} is wrong by {error:.1%}'
    return None


def _problem(shape: Tuple[int, ...], dtype: torch.dtype) -> Tuple[Tuple[torch.Tensor, ...], Tuple[torch.Tensor, ...]]:
    """x, shortcut and gradient in this precision, and what a Tail begins with; in float64, the same every time

    Rounding decides on nothing: maxima over the channels stand out, no sum before the ReLU is near zero, and gradients
    of one sign do not cancel.
    """
    b, c, h, w = shape
    generator = torch.Generator().manual_seed(0)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64, device='cpu') * 2 - 1

    x = uniform(*shape)
    n, p = torch.arange(b, device='cpu')[:, None], torch.arange(h * w, device='cpu')
    x.flatten(2)[n, (7 * p + n) % c, p] += 4
    shortcut = uniform(*shape)
    maps = x, shortcut + 9 * shortcut.sign(), 1 + uniform(*shape) / 2
    parameters = (
        1.5 + uniform(c) / 2, uniform(c) / 4, uniform(c) / 4, 1.5 + uniform(c) / 2,
        uniform(8, c, 1, 1) / 8, None, uniform(c, 8, 1, 1) / 8, None, uniform(1, 2, 7, 7) / 8)
    return tuple(t.to(dtype).double() for t in maps), parameters


def _compute(
        module: ModuleType,
        maps: Tuple[torch.Tensor, ...],
        parameters: Tuple[Optional[torch.Tensor], ...],
        training: bool,
        device: torch.device,
        dtype: torch.dtype,
        format_: torch.memory_format = torch.contiguous_format,
) -> Dict[str, torch.Tensor]:
    x, shortcut, grad = (t.to(device, dtype, copy=True).contiguous(memory_format=format_) for t in maps)
    small = [None if t is None else t.to(device, accumulation_dtype(x)) for t in parameters]
    p = Tail._make((*small, *(None,) * 5, training, 1e-5, False, 0.))
    if not training:
        normal = x.clone()
        module.norm_relu(normal, *p[:4], p.eps, True)
        module.infer(x, shortcut, p)
        return dict(out=x, norm_relu=normal)
    out = torch.empty_like(x)
    results: Results = module.forward(x, shortcut, out, p)
    gradients: Gradients = module.backward(grad, x, out, p, results)
    used = ('x', 'shortcut', 'weight', 'bias', 'fc1_weight', 'fc2_weight', 'conv_weight')
    return dict(out=out, stats=results.stats[:2], **{name: getattr(gradients, name) for name in used})
