"""The tail of a CBAM residual block as one operation: batch-norm, CBAM, shortcut and activation

What makes attention slow is not arithmetic but memory: maps that are written, read again, and kept for the backward
pass. :func:`cbam_residual` does what :func:`cbam_residual_ref` says in fewer passes, and keeps no map for the backward
pass that a ResNet without attention does not keep, see tail.py.
"""
import os
from importlib.util import find_spec
from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .compiled import infer_compiled
from .tail import Tail
from .tail_cpu import CpuTail, batch_norm, infer_cpu

__all__ = ['cbam_residual', 'cbam_residual_ref', 'is_fusable']

FUSED = os.environ.get('TIMM_CBAM_FUSED', '1') != '0'

Gate = Callable[[torch.Tensor], torch.Tensor]

_DTYPES = {
    'cpu': (torch.float32, torch.float64, torch.bfloat16),
    'cuda': (torch.float32, torch.float16, torch.bfloat16) if find_spec('triton') else (),
}


def is_fusable(x: torch.Tensor) -> bool:
    """Whether cbam_residual does better for x than plain operations: PyTorch runs eagerly, on a device that we know.

    Compilers and exporters get plain operations, which they fuse or write down themselves, and so do torch.func's
    transforms, which want to see every operation. Of compiled code we know better for inference on CPU.
    """
    if torch.compiler.is_compiling():
        return (
            FUSED and not torch.compiler.is_exporting() and not torch.is_grad_enabled() and x.device.type == 'cpu')
    return (
        FUSED
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and type(x) is torch.Tensor
        and x.dtype in _DTYPES.get(x.device.type, ())
        and x.ndim == 4
        and x.numel() > x.shape[1]  # no batch-norm has statistics of a single element
    )


def _tail(x: torch.Tensor, relu: bool, training: bool) -> Tail:
    if x.device.type == 'cpu':
        return CpuTail(relu, training)
    from .tail_triton import TritonTail  # triton is imported where it is used

    return TritonTail(relu, training)


def cbam_residual_ref(
        x: torch.Tensor,
        shortcut: torch.Tensor,
        channel_gate: Gate,
        spatial_gate: Gate,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: Optional[torch.Tensor],
        running_var: Optional[torch.Tensor],
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
        relu: bool = True,
) -> torch.Tensor:
    """Reference of :func:`cbam_residual`, whose arguments are the same."""
    f = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    f = f * channel_gate(torch.stack([f.mean((2, 3)), f.amax((2, 3))]))
    f = f * spatial_gate(torch.cat([f.mean(1, keepdim=True), f.max(1, keepdim=True).values], dim=1))
    out = shortcut + f
    return F.relu(out) if relu else out


class ChannelPoolFn(Function):

    @staticmethod
    def forward(ctx, tail, x, weight, bias, running_mean, running_var, momentum, eps):
        mean, invstd = tail.channel_pool(x, weight, bias, running_mean, running_var, momentum, eps)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        tail.mean, tail.invstd, tail.bias = mean.to(dtype), invstd.to(dtype), bias.to(dtype)
        tail.scale = weight * tail.invstd
        ctx.tail = tail
        pooled = torch.stack([tail.avg, tail.top]).flatten(2)
        return ((pooled - tail.mean) * tail.scale + tail.bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tail = ctx.tail
        mean, invstd, scale = (t.view(1, -1, 1, 1) for t in (tail.mean, tail.invstd, tail.scale))
        davg, dtop = grad[..., None, None]
        top = torch.where(scale == 0, tail.avg, tail.top)  # without a slope all pixels of F are equal and share
        # sums of dF and of dF * (x - mean) over batch and space
        s0 = (tail.mc * tail.s0 + davg + dtop).sum(0, keepdim=True)
        s1 = (tail.mc * tail.s1 + davg * (tail.avg - mean) + dtop * (top - mean)).sum(0, keepdim=True)
        b, c, h, w = tail.x.shape
        k_x, k = None, scale * davg / (h * w)
        if tail.training:
            k_x = -scale * invstd.square() * s1 / (b * h * w)
            k = k - scale * s0 / (b * h * w) - k_x * mean
        with torch.autocast(grad.device.type, enabled=False):
            dx = tail.channel_pool_backward(tail.davg, tail.dmax, scale * tail.mc, scale * dtop, k_x, k)
        tail.clear()
        return None, dx, (s1 * invstd).flatten(), s0.flatten(), None, None, None, None


class SpatialPoolFn(Function):

    @staticmethod
    def forward(ctx, tail, x, mc):
        ctx.tail = tail
        return tail.spatial_pool(x, mc)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tail = ctx.tail
        tail.davg, tail.dmax = grad[:, :1] / tail.x.shape[1], grad[:, 1:]
        with torch.autocast(grad.device.type, enabled=False):
            tail.spatial_pool_backward(tail.davg, tail.dmax)
        scale, bias = (t.view(1, -1, 1, 1) for t in (tail.scale, tail.bias))
        return None, None, scale * tail.s1 + bias * tail.s0  # dF' * F, summed over space


class GateAddFn(Function):

    @staticmethod
    def forward(ctx, tail, x, mc, ms, shortcut):
        out = tail.gate_add(x, mc, ms, shortcut)
        ctx.tail = tail
        # only ReLU's gradient needs the output, which another activation may overwrite
        ctx.save_for_backward(
            x, mc, ms, out if tail.relu else None, tail.mean, tail.invstd, tail.scale, tail.bias, tail.avg, tail.top,
            tail.index)
        tail.clear()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tail = ctx.tail
        (tail.x, tail.mc, tail.ms, out, tail.mean, tail.invstd, tail.scale, tail.bias, tail.avg, tail.top,
         tail.index) = (None if t is None else t.detach() for t in ctx.saved_tensors)
        with torch.autocast(grad.device.type, enabled=False):
            dms = tail.gate_add_backward(grad, out)
        return None, None, None, dms, tail.g


def cbam_residual(
        x: torch.Tensor,
        shortcut: torch.Tensor,
        channel_gate: Gate,
        spatial_gate: Gate,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: Optional[torch.Tensor],
        running_var: Optional[torch.Tensor],
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
        relu: bool = True,
        inplace: bool = False,
) -> torch.Tensor:
    """``act(shortcut + F'')`` with ``F = batch_norm(x)``, ``F' = F * Mc(F)``, ``F'' = F' * Ms(F')`` (paper section 3).

    Where several channels have the same maximum the first of them gets its gradient, as with torch.max and in the
    authors' code. Several pixels share it equally, as with torch.amax. Forward and backward pass give the same bits
    each time. A second derivative is refused with an error.

    Args:
        x: Output of the block's last convolution, (B, C, H, W).
        shortcut: Input of the block or its downsampled form, (B, C, H, W).
        channel_gate: Computes Mc, (B, C, 1, 1), from average and maximum over space, (2, B, C).
        spatial_gate: Computes Ms, (B, 1, H, W), from average and maximum over the channels, (B, 2, H, W).
        weight, bias, running_mean, running_var, training, momentum, eps: As in torch.nn.functional.batch_norm.
        relu: The activation is ReLU, otherwise there is none.
        inplace: x may be overwritten if no gradient is computed.

    Returns:
        Output of the block, (B, C, H, W).
    """
    args = (weight, bias, running_mean, running_var)
    compiling = torch.compiler.is_compiling()
    if compiling and is_fusable(x) and not training:
        return infer_compiled(x, shortcut, channel_gate, spatial_gate, *args, eps, relu)
    if compiling or not is_fusable(x) or shortcut.shape != x.shape or shortcut.dtype != x.dtype:
        return cbam_residual_ref(
            x, shortcut, channel_gate, spatial_gate, *args, training=training, momentum=momentum, eps=eps, relu=relu)
    if not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    if x.device.type == 'cpu' and not torch.is_grad_enabled() and not training:
        f = batch_norm(x, *args, eps, x if inplace else torch.empty_like(x))
        return infer_cpu(f, shortcut, channel_gate, spatial_gate, relu)
    tail = _tail(x, relu, training)
    mc = channel_gate(ChannelPoolFn.apply(tail, x, *args, momentum, eps))
    ms = spatial_gate(SpatialPoolFn.apply(tail, x, mc))
    return GateAddFn.apply(tail, x, mc, ms, shortcut)
