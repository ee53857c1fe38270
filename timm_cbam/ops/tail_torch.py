"""The operator of tail.py in PyTorch's operations, for any device

What costs time is reading and writing maps, and on CPU most of all fresh ones, whose pages the system has to provide.
So the forward pass works in the one map that becomes its result. The backward pass goes through chunks of samples, so
that a map is still in the cache when the next operation needs it; weighted sums are matrix products, several times as
fast as a product and a sum.

Maps are dense, in the format of x. Everything else is of the dtype of accumulation: (C,) or (B, C) per channel,
(B, 1, H, W) per pixel.
"""
from typing import Iterator, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F

from .arguments import Gradients, Results, Tail, accumulation_dtype

_CHUNK = 1 << 18  # elements for each thread: two such maps in float32 fill the 2 MB of a core's cache
_CHUNK_GPU = 1 << 26  # elements, so that launches do not count: 256 MB in float32


class Norm(NamedTuple):
    """Batch-norm, ``F = (x - mean) * scale + bias``: (C,) each, in the dtype of accumulation."""
    mean: torch.Tensor
    invstd: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor


def _norm(stats: torch.Tensor, p: Tail) -> Norm:
    mean, var, weight, bias = stats
    if p.training and stats.device.type == 'cpu':  # in double, and then of the parameters' dtype: as PyTorch
        invstd = torch.rsqrt(var.double() + p.eps).to(p.weight.dtype).to(stats.dtype)
    else:
        invstd = torch.rsqrt(var + p.eps)
    return Norm(mean, invstd, invstd * weight, bias)


def _normalize(x: torch.Tensor, n: Norm, out: torch.Tensor) -> torch.Tensor:
    """F, with the same bits each time and those of PyTorch's batch-norm: the scale as weight, one as variance."""
    return _batch_norm(x, n.scale, n.bias, n.mean, torch.ones_like(n.mean), 0., out)


def _gated(x: torch.Tensor, n: Norm, mc: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """F', with the same bits each time"""
    return _normalize(x, n, out).mul_(_map(mc))


def _batch_norm(x, weight, bias, mean, var, eps: float, out: torch.Tensor) -> torch.Tensor:
    """In eval mode, to `out`, which may be x"""
    dtype = mean.dtype if x.device.type == 'cpu' else accumulation_dtype(x)
    torch.ops.aten.native_batch_norm.out(
        x, *(t.contiguous() for t in (weight, bias, mean, var)), False, 0., eps, out=out,
        save_mean=mean.new_empty(0, dtype=dtype), save_invstd=mean.new_empty(0, dtype=dtype))
    return out


def _map(t: torch.Tensor) -> torch.Tensor:
    """Numbers per channel, to be broadcast along space"""
    return t[..., None, None]


def _sum_channels(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """``sum_C x * factor`` for each of the factors (B, K, C): (B, K, H, W)."""
    return torch.bmm(factors, x.flatten(2).to(factors.dtype)).view(len(x), -1, *x.shape[2:])


def _sum_space(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``sum_HW x * factor`` with a factor per pixel, (B, 1, H, W): (B, C)."""
    return torch.bmm(factor.flatten(2), x.flatten(2).mT.to(factor.dtype))[:, 0]


def _pool_channels(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    b, _, h, w = x.shape
    pooled = x.new_empty(b, h, w, 2, dtype=dtype).permute(0, 3, 1, 2)  # convolution is faster so
    pooled[:, 0] = x.mean(1, dtype=dtype)
    pooled[:, 1] = x.amax(1)
    return pooled


def _chunks(*tensors: torch.Tensor) -> Iterator[Tuple[torch.Tensor, ...]]:
    """Split tensors of the same batch, the first of them a map, into chunks of samples."""
    size = torch.get_num_threads() * _CHUNK if tensors[0].device.type == 'cpu' else _CHUNK_GPU
    samples = max(1, size // tensors[0][0].numel())
    return zip(*(t.split(samples) for t in tensors), strict=True)


def _scratch(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(next(_chunks(x))[0], dtype=dtype)


def _pool_space(x: torch.Tensor, p: Tail, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the batch-norm, (2, C), and average, maximum and minimum of x over space, (3, B, C)."""
    if not p.training:
        stats = torch.stack([p.mean, p.var])
    elif x.device.type in ('cpu', 'cuda'):
        stats = torch.stack(torch.batch_norm_update_stats(x, p.mean.clone(), p.var.clone(), 0.)[:2])
    else:
        var, mean = torch.var_mean(x.to(dtype), (0, 2, 3), correction=0)
        stats = torch.stack([mean, var])
    flat, mean = x.flatten(2), x.mean((2, 3), dtype=dtype)
    return stats.to(dtype), torch.stack([mean, flat.amax(2).to(dtype), flat.amin(2).to(dtype)])


def _a(grad, x, out, n: Norm, mc, ms, highest) -> Tuple[torch.Tensor, ...]:
    """g, dms, sums over space of g * ms and of g * ms * (x - mean); number of channels with the maximum of a pixel,
    and of their indices the sum, which is the index where there is one."""
    g = torch.ops.aten.threshold_backward(grad, out, 0)
    channels = torch.arange(x.shape[1], dtype=mc.dtype, device=x.device)
    counting = torch.stack([torch.ones_like(channels), channels])
    parts = []
    scratch = _scratch(x, x.dtype), _scratch(x, mc.dtype)
    for x_, g_, mc_, ms_, highest_ in _chunks(x, g, mc, ms, highest):
        one, other = (t[:len(x_)] for t in scratch)
        f = _gated(x_, n, mc_, one)
        ties = _sum_channels(torch.eq(f, highest_, out=other), counting.expand(len(x_), -1, -1))
        dms = _sum_channels(f.mul_(g_), torch.ones_like(mc_)[:, None])
        centred = torch.sub(x_, _map(n.mean), out=one if one.dtype == mc.dtype else None).mul_(g_)
        parts.append((dms, _sum_space(g_, ms_), _sum_space(centred, ms_), ties[:, :1], ties[:, 1:]))
    return g, *(torch.cat(part) for part in zip(*parts, strict=True))


def _b(
        x, n: Norm, mc, avg, davg, dmax, highest, index: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Sums over space of ``d = davg + dmax * [F' is the maximum]`` and of ``d * (x - mean)``, (B, C).

    index: channel of the only maximum of each pixel, None if one has several.
    """
    s0 = davg.sum((2, 3)).expand_as(mc).clone()
    even = davg - davg.mean((2, 3), keepdim=True)  # so that no large numbers cancel
    s1 = _sum_space(x, even) + s0 * (avg - n.mean)
    if index is not None:
        i, d = index.flatten(1), dmax.flatten(1)
        s0.scatter_add_(1, i, d)
        s1.scatter_add_(1, i, d * (x.gather(1, index).flatten(1) - n.mean[i]))
    else:
        for x_, mc_, dmax_, highest_, s0_, s1_ in _chunks(x, mc, dmax, highest, s0, s1):
            f = _gated(x_, n, mc_, torch.empty_like(x_))
            d = torch.eq(f, highest_, out=torch.empty_like(f, dtype=mc.dtype)).mul_(dmax_)
            s0_ += d.sum((2, 3))
            s1_ += d.mul_(torch.sub(x_, _map(n.mean))).sum((2, 3))
    return s0, s1


def _c(x, g, n: Norm, mc, ms, davg, dmax, highest, index, k_gate, k_tie, k_centred, k) -> torch.Tensor:
    """``dx = k_gate * (g * ms + d) + k_tie * [F is the maximum] / ties + k_centred * (x - mean) + k``, d as in b.

    Where x is not at its maximum F can be at its: F is rounded."""
    dx = torch.empty_like(x)
    columns = torch.stack([k_gate, k], dim=2)  # k_gate * davg + k is a matrix of rank 2
    rows = torch.cat([davg, torch.ones_like(davg)], dim=1).flatten(2)
    i = dmax if index is None else index
    scratch = _scratch(x, x.dtype), _scratch(x, mc.dtype)
    for x_, g_, mc_, ms_, dmax_, highest_, i_, kg, kt, kx, column, row, dx_ in _chunks(
            x, g, mc, ms, dmax, highest, i, k_gate, k_tie, k_centred, columns, rows, dx):
        one, other = (t[:len(x_)] for t in scratch)
        d = torch.mul(g_, ms_, out=dx_ if dx.dtype == ms.dtype else None).mul_(_map(kg))
        d.flatten(2).baddbmm_(column, row)
        if index is not None:
            d.scatter_add_(1, i_, dmax_ * kg.gather(1, i_.flatten(1)).view_as(dmax_))
        f = _normalize(x_, n, one)
        # numbers, at once: a mask that is converted takes ten times as long
        at_highest = torch.eq(f, f.amax((2, 3), keepdim=True), out=other)
        d.addcmul_(at_highest, _map(kt / _sum_space(at_highest, torch.ones_like(ms_))))
        if index is None:
            d += torch.eq(f.mul_(_map(mc_)), highest_, out=other).mul_(dmax_ * _map(kg))
        d.addcmul_(torch.sub(x_, _map(n.mean), out=other), _map(kx))
        if d is not dx_:
            dx_.copy_(d)
    return dx


def _pooled(n: Norm, space: torch.Tensor) -> torch.Tensor:
    """Average and maximum of F over space, (2, B, C)"""
    avg, high, low = (space - n.mean) * n.scale + n.bias
    return torch.stack([avg, torch.maximum(high, low)])  # F falls with x where the scale is negative


def _top(n: Norm, space: torch.Tensor) -> torch.Tensor:
    return torch.where(n.scale < 0, space[2], space[1])


def _spatial_gate(conv: torch.Tensor, bn_stats: Optional[torch.Tensor], p: Tail) -> Tuple[torch.Tensor, ...]:
    """The sigmoid, the normalised output of the convolution, and its 1 / deviation."""
    if p.bn_weight is None:
        return conv.sigmoid(), conv, conv.new_ones(1)
    invstd = (bn_stats[1] + p.bn_eps).rsqrt()
    normal = (conv - bn_stats[0]) * invstd
    return (normal * bn_stats[2] + bn_stats[3]).sigmoid(), normal, invstd


def _matrices(p: Tail, dtype: torch.dtype):
    return tuple(
        None if t is None else t.to(dtype).flatten(1) if t.ndim == 4 else t.to(dtype)
        for t in (p.fc1_weight, p.fc1_bias, p.fc2_weight, p.fc2_bias))


def _channel_gate(pooled: torch.Tensor, p: Tail) -> Tuple[torch.Tensor, torch.Tensor]:
    """The hidden layer before its activation, and the gate, given average and maximum of F"""
    w0, b0, w1, b1 = _matrices(p, pooled.dtype)
    hidden = F.linear(pooled, w0, b0)
    return hidden, F.linear(hidden.relu().sum(0), w1, None if b1 is None else 2 * b1).sigmoid()


def _convolve(pooled: torch.Tensor, p: Tail) -> torch.Tensor:
    return F.conv2d(pooled, p.conv_weight.to(pooled.dtype), padding=p.conv_weight.shape[-1] // 2)


def forward(x: torch.Tensor, shortcut: torch.Tensor, out: torch.Tensor, p: Tail) -> Results:
    dtype = accumulation_dtype(x)
    stats, space = _pool_space(x, p, dtype)
    stats = torch.cat([stats, torch.stack([p.weight, p.bias]).to(dtype)])
    n = _norm(stats, p)
    hidden, mc = _channel_gate(_pooled(n, space), p)
    pooled = _pool_channels(_gated(x, n, mc, out), dtype)
    conv = _convolve(pooled, p)
    bn_stats = conv.new_zeros(4, 1)
    if p.bn_weight is not None:
        mean, var = (conv.mean(), conv.var(correction=0)) if p.bn_training else (p.bn_mean, p.bn_var)
        bn_stats[0], bn_stats[1], bn_stats[2], bn_stats[3] = mean, var, p.bn_weight, p.bn_bias
    ms, _, _ = _spatial_gate(conv, bn_stats, p)
    if p.factor is not None:
        ms = ms * p.factor
    torch.addcmul(shortcut, out, ms.to(out.dtype), out=out).relu_()
    return Results(stats, bn_stats, space, hidden, mc, pooled.contiguous(), conv.contiguous())


def infer(x: torch.Tensor, shortcut: torch.Tensor, p: Tail) -> None:
    """In the place of x, by fewer operations: the poolings over space are those of F."""
    dtype = accumulation_dtype(x)
    _batch_norm(x, p.weight, p.bias, p.mean, p.var, p.eps, x)
    _, mc = _channel_gate(torch.stack([x.mean((2, 3), dtype=dtype), x.flatten(2).amax(2).to(dtype)]), p)
    conv = _convolve(_pool_channels(x.mul_(_map(mc)), dtype), p)
    bn_stats = None
    if p.bn_weight is not None:
        bn_stats = torch.stack([p.bn_mean, p.bn_var, p.bn_weight, p.bn_bias]).to(dtype)
    ms, _, _ = _spatial_gate(conv, bn_stats, p)
    if p.factor is not None:
        ms = ms * p.factor
    torch.addcmul(shortcut, x, ms.to(x.dtype), out=x).relu_()


def backward(grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor, p: Tail, r: Results) -> Gradients:
    dtype = accumulation_dtype(x)
    n, mc = _norm(r.stats, p), r.mc
    avg, top = r.space[0], _top(n, r.space)
    kernel = p.conv_weight.to(dtype)
    gate, normal, bn_invstd = _spatial_gate(r.conv, r.bn_stats, p)
    ms = gate if p.factor is None else gate * p.factor
    highest = r.pooled[:, 1:]
    g, dms, s0, s1, ties, index = _a(grad, x, out, n, mc, ms, highest)

    dz = dms * gate * (1 - gate)
    if p.factor is not None:
        dz = dz * p.factor
    dbn = torch.stack([(dz * normal).sum(), dz.sum()])
    if p.bn_weight is not None:
        if p.bn_training:
            dz = dz - (dbn[1] + normal * dbn[0]) / dz.numel()
        dz = dz * (bn_invstd * p.bn_weight.to(dtype))
    dpooled, dkernel, _ = torch.ops.aten.convolution_backward(
        dz, r.pooled.contiguous(memory_format=torch.channels_last), kernel, None,
        [1, 1], [kernel.shape[-1] // 2] * 2, [1, 1], False, [0, 0], 1, [True, True, False])
    davg, dmax = dpooled[:, :1] / x.shape[1], dpooled[:, 1:] / ties
    index = index.long() if x.device.type == 'cpu' and bool((ties == 1).all()) else None
    t0, t1 = _b(x, n, mc, avg, davg, dmax, highest, index)
    s0, s1 = s0 + t0, s1 + t1  # sums over space of dF' and of dF' * (x - mean)

    w0, b0, w1, b1 = _matrices(p, dtype)
    dlogit = (n.scale * s1 + n.bias * s0) * mc * (1 - mc)
    dhidden = torch.where(r.hidden <= 0, 0, dlogit @ w1)
    pooled = _pooled(n, r.space)
    dfc1 = torch.einsum('kbr,kbc->rc', dhidden, pooled)
    dfc2 = dlogit.T @ r.hidden.relu().sum(0)
    davg_space, dmax_space = dhidden @ w0

    # Where F is constant all pixels share the maximum, so that on average it is at the average.
    at = torch.where(n.scale == 0, avg, top)
    dbias = (mc * s0 + davg_space + dmax_space).sum(0)
    dscale = (mc * s1 + davg_space * (avg - n.mean) + dmax_space * (at - n.mean)).sum(0)
    size = x[0, 0].numel()
    slope = n.invstd * p.weight.to(dtype)  # as the weight is now, which may have changed
    k, k_centred = slope * davg_space / size, torch.zeros_like(mc)
    if p.training:
        k = k - slope * dbias / (len(x) * size)
        k_centred = (-slope * n.invstd.square() * dscale / (len(x) * size)).expand_as(mc)
    dx = _c(x, g, n, mc, ms, davg, dmax, highest, index, slope * mc, slope * dmax_space, k_centred, k)
    return Gradients(
        dx, g, dscale * n.invstd, dbias, dfc1.view_as(p.fc1_weight), dhidden.sum((0, 1)), dfc2.view_as(p.fc2_weight),
        2 * dlogit.sum(0), dkernel.contiguous(), dbn)


def norm_relu(x, weight, bias, mean, var, eps: float, relu: bool) -> None:
    _batch_norm(x, weight, bias, mean, var, eps, x)
    if relu:
        x.relu_()
