"""Inference of :func:`timm_cbam.ops.cbam_residual` for torch.compile on CPU

Operations as the compiler likes them. It would write a batch-norm into each loop over a map, with a root and a division
for every element, and a gate with an exponential; so both become one factor and one summand per channel before, in an
operation that it cannot look into. Space is pooled from x, a row at a time, because a row stays in the cache.
"""
from typing import Callable, Tuple

import torch
import torch.nn.functional as F


@torch.library.custom_op('timm_cbam::channel_factors', mutates_args=())
def channel_factors(
        mc: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        eps: float,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Factor and summand, (B, C, 1, 1), with which ``F' = x * factor + summand``."""
    scale = weight * torch.rsqrt(var + eps)
    return mc * scale.view(-1, 1, 1), mc * (bias - mean * scale).view(-1, 1, 1)


@channel_factors.register_fake
def _(mc, weight, bias, mean, var, eps):
    dtype = torch.promote_types(mc.dtype, weight.dtype)
    return torch.empty_like(mc, dtype=dtype), torch.empty_like(mc, dtype=dtype)


def infer_compiled(
        x: torch.Tensor,
        shortcut: torch.Tensor,
        channel_gate: Callable,
        spatial_gate: Callable,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        eps: float,
        relu: bool,
) -> torch.Tensor:
    top = torch.where(weight < 0, x.amin(3).amin(2), x.amax(3).amax(2))  # F falls with x where the weight is negative
    pooled = torch.stack([x.mean(3).mean(2), top])
    pooled = (pooled - running_mean) * (weight * torch.rsqrt(running_var + eps)) + bias
    mc = channel_gate(pooled.to(x.dtype))
    factor, summand = channel_factors(mc, weight, bias, running_mean, running_var, eps)
    f = (x * factor + summand).to(x.dtype)
    ms = spatial_gate(torch.cat([f.mean(1, keepdim=True), f.amax(1, keepdim=True)], dim=1))
    out = shortcut + f * ms
    return F.relu(out) if relu else out
