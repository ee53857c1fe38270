"""Inference of :func:`timm_cbam.ops.cbam_residual` for torch.compile on CPU

Operations as the compiler likes them. It would write a batch-norm into each loop over a map, with a root and a division
for every element, and a gate with an exponential; so both become one factor and one summand per channel before, in an
operation that it cannot look into. Space is pooled from x, a row at a time, because a row stays in the cache.
"""
from typing import Callable

import torch
import torch.nn.functional as F


def _channel_factors(weight, bias, mean, var, eps, gate=None):
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight, bias, mean, var = (t.to(dtype) for t in (weight, bias, mean, var))
    scale = weight * torch.rsqrt(var + eps)
    factor, summand = scale.view(-1, 1, 1), (bias - mean * scale).view(-1, 1, 1)
    return (factor, summand) if gate is None else (gate * factor, gate * summand)


def _channel_factors_meta(weight, bias, mean, var, eps, gate=None):
    shape = (len(weight), 1, 1) if gate is None else gate.shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.new_empty(shape, dtype=dtype), weight.new_empty(shape, dtype=dtype)


# Not by torch.library.custom_op, which looks for its caller among all modules: half the time of importing timm_cbam.
_LIBRARY = torch.library.Library('timm_cbam', 'DEF')
_LIBRARY.define(
    'channel_factors(Tensor weight, Tensor bias, Tensor mean, Tensor var, float eps, Tensor? gate=None) '
    '-> (Tensor factor, Tensor summand)')
_LIBRARY.impl('channel_factors', _channel_factors, 'CPU')
_LIBRARY.impl('channel_factors', _channel_factors_meta, 'Meta')

# Factor and summand with which ``batch_norm(x) * gate = x * factor + summand``. Their shape is that of the gate,
# (B, C, 1, 1), or (C, 1, 1) without one, and their dtype at least float32.
channel_factors = torch.ops.timm_cbam.channel_factors.default


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
    factor, summand = channel_factors(weight, bias, running_mean, running_var, eps, mc)
    f = (x * factor + summand).to(x.dtype)
    ms = spatial_gate(torch.cat([f.mean(1, keepdim=True), f.amax(1, keepdim=True)], dim=1))
    out = shortcut + f * ms
    return F.relu(out) if relu else out
