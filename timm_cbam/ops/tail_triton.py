"""The operator of tail.py for CUDA, its steps over maps as Triton kernels

Every kernel computes F and F' anew from x, in registers, so that neither is ever in memory. What is small (the spatial
gate, the gradients' factors per channel) is computed inside the kernels, too, since at batch 1 launching them is what
takes time: 11 launches for inference, against 23 of PyTorch's operations. The MLP's products are PyTorch's.

A map is a matrix of channels and pixels for each sample, and contiguous is one or the other: pixels in PyTorch's
default memory format, channels in channels-last. The kernels work on tiles [BLOCK_C, BLOCK_P], and the format matters
only for the tiles' addresses and for their shape; so one code serves both.

A kernel that sums over channels or pixels has a program for each block of the others. The program keeps the sum as a
tile while it walks along the map, and reduces it once at the end; sums across the walk it writes for each program, to
be added up later. So no two programs add to the same number, and the order of the additions is always the same. Sums
and batch-norm are float32, or float64 for maps in float64.
"""
from functools import cache
from typing import Optional, Tuple

import torch
import triton
import triton.language as tl

from .arguments import Gradients, Results, Tail, accumulation_dtype, gradient_shapes, result_shapes


@triton.jit
def _offsets(b, c, p, C, P, CHANNELS_LAST: tl.constexpr):
    """Of a tile in a map, in 64 bits."""
    c, p = c[:, None].to(tl.int64), p[None, :].to(tl.int64)
    if CHANNELS_LAST:
        return b * C * P + (p * C + c)
    else:
        return b * C * P + (c * P + p)


@triton.jit
def _per_channel(ptr, c, C):
    return tl.load(ptr + c, mask=c < C, other=0)[:, None]


@triton.jit
def _per_pixel(ptr, p, P, other: tl.constexpr = 0):
    return tl.load(ptr + p, mask=p < P, other=other)[None, :]


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _normalize(x, norm_ptr, c, C):
    """F. The backward pass looks for the pixels where it, or F', equals the maximum that the forward pass found, so it
    must have the same bits in all kernels. Hence fma, which does not leave it to the compiler where to round."""
    mean, scale = _per_channel(norm_ptr, c, C), _per_channel(norm_ptr + 2 * C, c, C)
    return tl.fma(x - mean, scale, _per_channel(norm_ptr + 3 * C, c, C))


@triton.jit
def _gated(x, norm_ptr, mc_ptr, b, c, C):
    """F'"""
    return _normalize(x, norm_ptr, c, C) * _per_channel(mc_ptr + b * C, c, C)


@triton.jit
def _gate(conv_ptr, bn_ptr, b, p, P, BN_EPS: tl.constexpr):
    """Sigmoid of the convolution, or of its batch-norm"""
    z = _per_pixel(conv_ptr + b * P, p, P)
    if bn_ptr is not None:
        z = (z - tl.load(bn_ptr)) / tl.sqrt(tl.load(bn_ptr + 1) + BN_EPS) * tl.load(bn_ptr + 2) + tl.load(bn_ptr + 3)
    return 1 / (1 + tl.exp(-z))


@triton.jit
def _ms(conv_ptr, bn_ptr, factor_ptr, b, p, P, BN_EPS: tl.constexpr):
    ms = _gate(conv_ptr, bn_ptr, b, p, P, BN_EPS)
    return ms if factor_ptr is None else ms * tl.load(factor_ptr + b)


@triton.jit
def _highest(space_ptr, norm_ptr, b, c, B, C):
    """The largest F, which falls with x where the scale is negative. Several x can have it: F is rounded."""
    high, low = _per_channel(space_ptr + (B + b) * C, c, C), _per_channel(space_ptr + (2 * B + b) * C, c, C)
    return _normalize(tl.where(_per_channel(norm_ptr + 2 * C, c, C) < 0, low, high), norm_ptr, c, C)


@triton.jit(do_not_specialize=['B'])
def _pool_space(
        x_ptr, space_ptr, m2_ptr,
        B, C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Average, maximum and minimum, and the sum of the squared differences from the average."""
    blocks = tl.cdiv(C, BLOCK_C)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    acc: tl.constexpr = space_ptr.dtype.element_ty
    # Sums are of differences from the first pixel, if that is finite. A sum of large numbers that hardly differ loses
    # the digits in which they do.
    first = tl.load(x_ptr + _offsets(b, c, tl.arange(0, 1), C, P, CHANNELS_LAST), mask=c[:, None] < C, other=0).to(acc)
    first = tl.where(tl.abs(first) < float('inf'), first, 0)
    total = tl.zeros([BLOCK_C, BLOCK_P], acc)
    m2 = tl.zeros([BLOCK_C, BLOCK_P], acc)
    high = tl.full([BLOCK_C, BLOCK_P], float('-inf'), acc)
    low = tl.full([BLOCK_C, BLOCK_P], float('inf'), acc)
    count = tl.zeros([1, BLOCK_P], acc)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (p < P)[None, :]
        x = tl.load(x_ptr + _offsets(b, c, p, C, P, CHANNELS_LAST), mask=inside, other=0).to(acc)
        high = _max(high, tl.where(inside, x, float('-inf')))
        low = _min(low, tl.where(inside, x, float('inf')))
        # Each place of the tile has squares of its own, from the average of what it has seen before. The average itself
        # is a plain sum, which infinities survive.
        x = tl.where(inside, x - first, 0)
        delta = x - total * (1 / tl.maximum(count, 1))
        m2 += tl.where(inside, delta * (delta * (count / (count + 1))), 0)
        total += x
        count += (p < P)[None, :].to(acc)
    avg = tl.sum(total, 1)[:, None] / P
    delta = total * (1 / tl.maximum(count, 1)) - avg
    n = b * C + c
    size = tl.cast(B, tl.int64) * C
    tl.store(space_ptr + n, tl.reshape(avg + first, [BLOCK_C]), mask=c < C)
    tl.store(space_ptr + size + n, tl.reduce(high, 1, _max), mask=c < C)
    tl.store(space_ptr + 2 * size + n, tl.reduce(low, 1, _min), mask=c < C)
    tl.store(m2_ptr + n, tl.sum(m2 + count * delta * delta, 1), mask=c < C)


@triton.jit(do_not_specialize=['B', 'P'])
def _statistics(
        space_ptr, m2_ptr, weight_ptr, bias_ptr, stats_ptr,
        B, C, P, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and variance of the batch from those of its samples, with the parameters as they are now"""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc: tl.constexpr = space_ptr.dtype.element_ty
    first = tl.load(space_ptr + c, mask=c < C, other=0)[None, :]
    first = tl.where(tl.abs(first) < float('inf'), first, 0)  # as in _pool_space
    total = tl.zeros([BLOCK_B, BLOCK_C], acc)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        inside = (b < B)[:, None] & (c < C)[None, :]
        total += tl.where(inside, tl.load(space_ptr + b[:, None] * C + c[None, :], mask=inside, other=0) - first, 0)
    mean = first + tl.sum(total, 0)[None, :] / B
    total = tl.zeros([BLOCK_B, BLOCK_C], acc)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        inside = (b < B)[:, None] & (c < C)[None, :]
        delta = tl.load(space_ptr + b[:, None] * C + c[None, :], mask=inside, other=0) - mean
        m2 = tl.load(m2_ptr + b[:, None] * C + c[None, :], mask=inside, other=0)
        total += tl.where(inside, m2 / P + delta * delta, 0)
    tl.store(stats_ptr + c, tl.reshape(mean, [BLOCK_C]), mask=c < C)
    tl.store(stats_ptr + C + c, tl.sum(total, 0) / B, mask=c < C)
    tl.store(stats_ptr + 2 * C + c, tl.load(weight_ptr + c, mask=c < C).to(acc), mask=c < C)
    tl.store(stats_ptr + 3 * C + c, tl.load(bias_ptr + c, mask=c < C).to(acc), mask=c < C)


@triton.jit(do_not_specialize=['B'])
def _pool_norm(space_ptr, stats_ptr, norm_ptr, pooled_ptr, B, C, EPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Batch-norm as ``(x - mean) * scale + bias``: mean, 1 / deviation, scale and bias; average and maximum of F."""
    blocks = tl.cdiv(C, BLOCK_C)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, bias = tl.load(stats_ptr + c, mask=c < C, other=0), tl.load(stats_ptr + 3 * C + c, mask=c < C, other=0)
    invstd = 1 / tl.sqrt(tl.load(stats_ptr + C + c, mask=c < C, other=0) + EPS)
    scale = invstd * tl.load(stats_ptr + 2 * C + c, mask=c < C, other=0)
    if b == 0:
        tl.store(norm_ptr + c, mean, mask=c < C)
        tl.store(norm_ptr + C + c, invstd, mask=c < C)
        tl.store(norm_ptr + 2 * C + c, scale, mask=c < C)
        tl.store(norm_ptr + 3 * C + c, bias, mask=c < C)
    n = b * C + c
    avg = tl.load(space_ptr + n, mask=c < C, other=0)
    high = tl.load(space_ptr + B * C + n, mask=c < C, other=0)
    low = tl.load(space_ptr + 2 * B * C + n, mask=c < C, other=0)
    tl.store(pooled_ptr + n, (avg - mean) * scale + bias, mask=c < C)
    tl.store(pooled_ptr + B * C + n, _max((high - mean) * scale + bias, (low - mean) * scale + bias), mask=c < C)


@triton.jit(do_not_specialize=['B'])
def _pool_channels(
        x_ptr, norm_ptr, mc_ptr, pooled_ptr,
        B, C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Average and maximum of F' over the channels"""
    blocks = tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    acc: tl.constexpr = norm_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_C, BLOCK_P], acc)
    highest = tl.full([BLOCK_C, BLOCK_P], float('-inf'), acc)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = (c < C)[:, None] & (p < P)[None, :]
        x = tl.load(x_ptr + _offsets(b, c, p, C, P, CHANNELS_LAST), mask=inside, other=0).to(acc)
        f = _gated(x, norm_ptr, mc_ptr, b, c, C)
        total += tl.where(inside, f, 0)
        highest = _max(highest, tl.where(inside, f, float('-inf')))
    pooled_ptr += b * 2 * P
    tl.store(pooled_ptr + p, tl.sum(total, 0) / C, mask=p < P)
    tl.store(pooled_ptr + P + p, tl.reduce(highest, 0, _max), mask=p < P)


@triton.jit(do_not_specialize=['H', 'W'])
def _convolve(pooled_ptr, kernel_ptr, conv_ptr, H, W, K: tl.constexpr, TAPS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Both channels with a K x K kernel, padded by zeros. A tile has pixels and, across, all that each of them sees."""
    P = H * W
    blocks = tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    tap = tl.arange(0, TAPS)
    y = (p // W)[:, None] + (tap // K % K - K // 2)[None, :]
    x = (p % W)[:, None] + (tap % K - K // 2)[None, :]
    inside = (p < P)[:, None] & (tap < 2 * K * K)[None, :] & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    value = tl.load(pooled_ptr + b * 2 * P + (tap // (K * K))[None, :] * P + y * W + x, mask=inside, other=0)
    weight = tl.load(kernel_ptr + tap, mask=tap < 2 * K * K, other=0)
    tl.store(conv_ptr + b * P + p, tl.sum(value * weight[None, :], 1), mask=p < P)


@triton.jit(do_not_specialize=['B'])
def _gate_add(
        x_ptr, shortcut_ptr, out_ptr, norm_ptr, mc_ptr, conv_ptr, bn_ptr, factor_ptr, BN_EPS: tl.constexpr,
        B, C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """``relu(shortcut + F'')``"""
    blocks_c, blocks_p = tl.cdiv(C, BLOCK_C), tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // (blocks_c * blocks_p)).to(tl.int64)
    c = tl.program_id(0) // blocks_p % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    acc: tl.constexpr = norm_ptr.dtype.element_ty
    inside = (c < C)[:, None] & (p < P)[None, :]
    offsets = _offsets(b, c, p, C, P, CHANNELS_LAST)
    x = tl.load(x_ptr + offsets, mask=inside, other=0).to(acc)
    shortcut = tl.load(shortcut_ptr + offsets, mask=inside, other=0).to(acc)
    f = _gated(x, norm_ptr, mc_ptr, b, c, C)
    out = shortcut + f * _ms(conv_ptr, bn_ptr, factor_ptr, b, p, P, BN_EPS)
    out = tl.where(out < 0, 0, out)  # lets NaN pass, as torch.relu does
    tl.store(out_ptr + offsets, out, mask=inside)


@triton.jit(do_not_specialize=['B'])
def _a(
        x_ptr, grad_ptr, out_ptr, g_ptr, norm_ptr, mc_ptr, conv_ptr, bn_ptr, factor_ptr, pooled_ptr,
        dz_ptr, ties_ptr, sums_ptr, BN_EPS: tl.constexpr,
        B, C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """g; the gradient of the sigmoid's argument, dms * gate * (1 - gate); the number of channels with the maximum of a
    pixel. sums: of g * ms and of g * ms * (x - mean) over the pixels of each program, (2, B, programs, C)."""
    blocks = tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    acc: tl.constexpr = norm_ptr.dtype.element_ty
    ms = _ms(conv_ptr, bn_ptr, factor_ptr, b, p, P, BN_EPS)
    highest = _per_pixel(pooled_ptr + (2 * b + 1) * P, p, P)
    dms = tl.zeros([BLOCK_C, BLOCK_P], acc)
    ties = tl.zeros([BLOCK_C, BLOCK_P], tl.int32)
    sums_ptr += tl.program_id(0).to(tl.int64) * C
    second = tl.cast(B, tl.int64) * blocks * C
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = (c < C)[:, None] & (p < P)[None, :]
        offsets = _offsets(b, c, p, C, P, CHANNELS_LAST)
        x = tl.load(x_ptr + offsets, mask=inside, other=0).to(acc)
        g = tl.load(grad_ptr + offsets, mask=inside, other=0)
        g = tl.where(tl.load(out_ptr + offsets, mask=inside, other=0) <= 0, 0, g)
        tl.store(g_ptr + offsets, g, mask=inside)
        f = _gated(x, norm_ptr, mc_ptr, b, c, C)
        ties += (inside & (f == highest)).to(tl.int32)
        dms += g.to(acc) * f
        d = g.to(acc) * ms
        tl.store(sums_ptr + c, tl.sum(d, 1), mask=c < C)
        tl.store(sums_ptr + second + c, tl.sum(d * (x - _per_channel(norm_ptr, c, C)), 1), mask=c < C)
    gate = _gate(conv_ptr, bn_ptr, b, p, P, BN_EPS)
    dz = tl.sum(dms, 0)[None, :] * ms * (1 - gate)  # ms is the gate with stochastic depth's factor
    tl.store(dz_ptr + b * P + p, tl.reshape(dz, [BLOCK_P]), mask=p < P)
    tl.store(ties_ptr + b * P + p, tl.sum(ties, 0).to(acc), mask=p < P)


@triton.jit
def _d(f, dpooled_ptr, pooled_ptr, ties_ptr, b, p, C, P):
    """Gradient of F' by the poolings over the channels: ``davg / C + dmax * [F' is the maximum] / ties``

    A product rather than a choice: a maximum of NaN has no place, dmax is then dmax / 0, and all get NaN."""
    dmax = _per_pixel(dpooled_ptr + (2 * b + 1) * P, p, P) / _per_pixel(ties_ptr + b * P, p, P, other=1)
    at_highest = (f == _per_pixel(pooled_ptr + (2 * b + 1) * P, p, P)).to(f.dtype)
    return _per_pixel(dpooled_ptr + 2 * b * P, p, P) / C + at_highest * dmax


@triton.jit(do_not_specialize=['B', 'BLOCKS_P'])
def _b(
        x_ptr, space_ptr, norm_ptr, mc_ptr, dpooled_ptr, pooled_ptr, ties_ptr, sums_ptr,
        s_ptr, ties_space_ptr, dlogit_ptr, BLOCKS_P,
        B, C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sums of dF' and of dF' * (x - mean) over space, (2, B, C); the number of pixels with the maximum of a channel;
    the gradient of the channel gate's argument. BLOCKS_P: programs of _a for each sample."""
    blocks = tl.cdiv(C, BLOCK_C)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    acc: tl.constexpr = norm_ptr.dtype.element_ty
    mean = _per_channel(norm_ptr, c, C)
    highest = _highest(space_ptr, norm_ptr, b, c, B, C)
    s0 = tl.zeros([BLOCK_C, BLOCK_P], acc)
    s1 = tl.zeros([BLOCK_C, BLOCK_P], acc)
    ties = tl.zeros([BLOCK_C, BLOCK_P], tl.int32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (p < P)[None, :]
        x = tl.load(x_ptr + _offsets(b, c, p, C, P, CHANNELS_LAST), mask=inside, other=0).to(acc)
        f = _normalize(x, norm_ptr, c, C)
        d = _d(f * _per_channel(mc_ptr + b * C, c, C), dpooled_ptr, pooled_ptr, ties_ptr, b, p, C, P)
        s0 += d
        s1 += d * (x - mean)
        ties += (inside & (f == highest)).to(tl.int32)
    s0, s1 = tl.sum(s0, 1), tl.sum(s1, 1)
    size = tl.cast(B, tl.int64) * C
    for block in range(BLOCKS_P):
        row = sums_ptr + (b * BLOCKS_P + block) * C
        s0 += tl.load(row + c, mask=c < C, other=0)
        s1 += tl.load(row + size * BLOCKS_P + c, mask=c < C, other=0)
    n = b * C + c
    mc = tl.load(mc_ptr + n, mask=c < C, other=0)
    scale = tl.load(norm_ptr + 2 * C + c, mask=c < C, other=0)
    bias = tl.load(norm_ptr + 3 * C + c, mask=c < C, other=0)
    tl.store(s_ptr + n, s0, mask=c < C)
    tl.store(s_ptr + size + n, s1, mask=c < C)
    tl.store(ties_space_ptr + n, tl.sum(ties, 1).to(acc), mask=c < C)
    tl.store(dlogit_ptr + n, (scale * s1 + bias * s0) * mc * (1 - mc), mask=c < C)


@triton.jit(do_not_specialize=['B', 'P'])
def _factors(
        space_ptr, norm_ptr, weight_ptr, mc_ptr, s_ptr, ties_ptr, dspace_ptr, dweight_ptr, dbias_ptr, k_ptr,
        k_centred_ptr, TRAINING: tl.constexpr, B, C, P, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):
    """Gradients of the batch-norm's parameters, and the factors of _c: k, (3, B, C), and k_centred, (C,).

    dspace: gradients of average and maximum of F, (2, B, C)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc: tl.constexpr = norm_ptr.dtype.element_ty
    mean, invstd = tl.load(norm_ptr + c, mask=c < C, other=0), tl.load(norm_ptr + C + c, mask=c < C, other=0)
    scale = tl.load(norm_ptr + 2 * C + c, mask=c < C, other=0)
    slope = invstd * tl.load(weight_ptr + c, mask=c < C, other=0)  # as the weight is now, which may have changed
    dbias = tl.zeros([BLOCK_B, BLOCK_C], acc)
    dscale = tl.zeros([BLOCK_B, BLOCK_C], acc)
    size = tl.cast(B, tl.int64) * C
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        inside = (b < B)[:, None] & (c < C)[None, :]
        n = b[:, None] * C + c[None, :]
        avg = tl.load(space_ptr + n, mask=inside, other=0)
        top = tl.where(
            scale[None, :] < 0, tl.load(space_ptr + 2 * size + n, mask=inside, other=0),
            tl.load(space_ptr + size + n, mask=inside, other=0))
        # Where F is constant all pixels share the maximum, so that on average it is at the average.
        top = tl.where(scale[None, :] == 0, avg, top)
        mc = tl.load(mc_ptr + n, mask=inside, other=0)
        davg, dmax = tl.load(dspace_ptr + n, mask=inside, other=0), tl.load(dspace_ptr + size + n, mask=inside, other=0)
        s0, s1 = tl.load(s_ptr + n, mask=inside, other=0), tl.load(s_ptr + size + n, mask=inside, other=0)
        dbias += mc * s0 + davg + dmax
        dscale += tl.where(inside, mc * s1 + davg * (avg - mean[None, :]) + dmax * (top - mean[None, :]), 0)
    dbias, dscale = tl.sum(dbias, 0), tl.sum(dscale, 0)
    tl.store(dbias_ptr + c, dbias, mask=c < C)
    tl.store(dweight_ptr + c, dscale * invstd, mask=c < C)
    shift = tl.zeros([BLOCK_C], acc)
    centred = tl.zeros([BLOCK_C], acc)
    if TRAINING:
        shift = slope * dbias / P / B
        centred = -slope * invstd * invstd * dscale / P / B
    tl.store(k_centred_ptr + c, centred, mask=c < C)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        inside = (b < B)[:, None] & (c < C)[None, :]
        n = b[:, None] * C + c[None, :]
        mc, ties = tl.load(mc_ptr + n, mask=inside, other=0), tl.load(ties_ptr + n, mask=inside, other=1)
        davg, dmax = tl.load(dspace_ptr + n, mask=inside, other=0), tl.load(dspace_ptr + size + n, mask=inside, other=0)
        tl.store(k_ptr + n, slope[None, :] * mc, mask=inside)
        tl.store(k_ptr + size + n, slope[None, :] * dmax / ties, mask=inside)
        tl.store(k_ptr + 2 * size + n, slope[None, :] * davg / P - shift[None, :], mask=inside)


@triton.jit(do_not_specialize=['B'])
def _c(
        x_ptr, g_ptr, dx_ptr, space_ptr, norm_ptr, mc_ptr, conv_ptr, bn_ptr, factor_ptr, dpooled_ptr, pooled_ptr,
        ties_ptr, k_ptr, k_centred_ptr, BN_EPS: tl.constexpr,
        B, C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """``dx = k0 * (g * ms + d) + k1 * [F is the maximum] + k_centred * (x - mean) + k2``"""
    blocks_c, blocks_p = tl.cdiv(C, BLOCK_C), tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // (blocks_c * blocks_p)).to(tl.int64)
    c = tl.program_id(0) // blocks_p % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    acc: tl.constexpr = norm_ptr.dtype.element_ty
    inside = (c < C)[:, None] & (p < P)[None, :]
    offsets = _offsets(b, c, p, C, P, CHANNELS_LAST)
    x = tl.load(x_ptr + offsets, mask=inside, other=0).to(acc)
    g = tl.load(g_ptr + offsets, mask=inside, other=0).to(acc)
    f = _normalize(x, norm_ptr, c, C)
    d = _d(f * _per_channel(mc_ptr + b * C, c, C), dpooled_ptr, pooled_ptr, ties_ptr, b, p, C, P)
    d += g * _ms(conv_ptr, bn_ptr, factor_ptr, b, p, P, BN_EPS)
    size = tl.cast(B, tl.int64) * C
    k_ptr += b * C
    dx = _per_channel(k_ptr, c, C) * d
    at_highest = (f == _highest(space_ptr, norm_ptr, b, c, B, C)).to(acc)
    dx += at_highest * _per_channel(k_ptr + size, c, C)
    dx += _per_channel(k_centred_ptr, c, C) * (x - _per_channel(norm_ptr, c, C))
    tl.store(dx_ptr + offsets, dx + _per_channel(k_ptr + 2 * size, c, C), mask=inside)


@triton.jit(do_not_specialize=['B'])
def _norm_relu(
        x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, EPS: tl.constexpr, RELU: tl.constexpr,
        B, C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    blocks_c, blocks_p = tl.cdiv(C, BLOCK_C), tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // (blocks_c * blocks_p)).to(tl.int64)
    c = tl.program_id(0) // blocks_p % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    acc: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    inside = (c < C)[:, None] & (p < P)[None, :]
    offsets = _offsets(b, c, p, C, P, CHANNELS_LAST)
    x = tl.load(x_ptr + offsets, mask=inside, other=0).to(acc)
    invstd = 1 / tl.sqrt(_per_channel(var_ptr, c, C).to(acc) + EPS)
    scale = invstd * _per_channel(weight_ptr, c, C).to(acc)
    x = tl.fma(x - _per_channel(mean_ptr, c, C).to(acc), scale, _per_channel(bias_ptr, c, C).to(acc))
    if RELU:
        x = tl.where(x < 0, 0, x)
    tl.store(x_ptr + offsets, x, mask=inside)


# ---- launching them

_SMALL = dict(BLOCK_B=32, BLOCK_C=32)  # of kernels over (B, C)


@cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU"""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 1


def _tile(x: torch.Tensor, channels: bool, pixels: bool) -> Tuple[int, int]:
    """BLOCK_C and BLOCK_P of a kernel that has a program for each block of channels, of pixels, or of both.

    A tile has 2048 numbers, 16 for each thread of four warps: two loads of 16 bytes in half precision, four in float32.
    Wide are 64 numbers along what is contiguous, a cache line in half precision, and 32 across. A kernel that walks
    along one side has few programs where the batch is small: where they would not give each processor one, its tiles
    are a quarter as wide and four times as long, which makes four times as many programs with a quarter of the steps.
    A map's size matters in no other way, so each kernel is compiled for two tiles at most, and again only where Triton
    finds it worthwhile: for sizes that are multiples of 16, and for those that are 1.

    There are no stages to choose: Triton pipelines the loads of matrix products only.
    """
    b, c, h, w = x.shape
    block_c, block_p = (32, 64) if x.is_contiguous() else (64, 32)
    if channels and pixels:
        return block_c, block_p
    blocks = triton.cdiv(c, block_c) if channels else triton.cdiv(h * w, block_p)
    if b * blocks >= _processors(x.device):
        return block_c, block_p
    return (block_c // 4, block_p * 4) if channels else (block_c * 4, block_p // 4)


def _launch(kernel, x: torch.Tensor, *args, channels: bool = False, pixels: bool = False) -> None:
    """Run a kernel over the map x, with one program for each sample and block of its channels, its pixels, or both."""
    b, c, h, w = x.shape
    block_c, block_p = _tile(x, channels, pixels)
    grid = b * (triton.cdiv(c, block_c) if channels else 1) * (triton.cdiv(h * w, block_p) if pixels else 1),
    kernel[grid](
        x, *args, b, c, h * w, CHANNELS_LAST=not x.is_contiguous(), BLOCK_C=block_c, BLOCK_P=block_p)


def _small(t: Optional[torch.Tensor], dtype: torch.dtype) -> Optional[torch.Tensor]:
    return None if t is None else t.to(dtype).contiguous()


def _norm(space: torch.Tensor, stats: torch.Tensor, p: Tail) -> Tuple[torch.Tensor, torch.Tensor]:
    """Batch-norm, (4, C), and average and maximum of F over space, (2, B, C)"""
    _, b, c = space.shape
    norm, pooled = torch.empty_like(stats), space.new_empty(2, b, c)
    _pool_norm[b * triton.cdiv(c, 256),](space, stats, norm, pooled, b, c, EPS=p.eps, BLOCK_C=256)
    return norm, pooled


def _matrices(p: Tail, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor]:
    return p.fc1_weight.to(dtype).flatten(1), p.fc2_weight.to(dtype).flatten(1)


def _forward(x: torch.Tensor, shortcut: torch.Tensor, out: torch.Tensor, p: Tail) -> Results:
    dtype = accumulation_dtype(x)
    b, c, h, w = x.shape
    r = Results(*(x.new_empty(shape, dtype=dtype) for shape in result_shapes(x, p)))
    m2 = x.new_empty(b, c, dtype=dtype)
    _launch(_pool_space, x, r.space, m2, channels=True)
    if p.training:
        _statistics[triton.cdiv(c, _SMALL['BLOCK_C']),](
            r.space, m2, p.weight.contiguous(), p.bias.contiguous(), r.stats, b, c, h * w, **_SMALL)
    else:
        torch.stack([t.to(dtype) for t in (p.mean, p.var, p.weight, p.bias)], out=r.stats)
    norm, pooled = _norm(r.space, r.stats, p)

    w0, w1 = _matrices(p, dtype)
    torch.matmul(pooled, w0.T, out=r.hidden)
    if p.fc1_bias is not None:
        r.hidden.add_(p.fc1_bias)
    torch.matmul(r.hidden.relu().sum(0), w1.T, out=r.mc)
    if p.fc2_bias is not None:
        r.mc.add_(p.fc2_bias, alpha=2)
    r.mc.sigmoid_()

    _launch(_pool_channels, x, norm, r.mc, r.pooled, pixels=True)
    size = p.conv_weight.shape[-1]
    _convolve[b * triton.cdiv(h * w, 32),](
        r.pooled, _small(p.conv_weight, dtype), r.conv, h, w, K=size, TAPS=triton.next_power_of_2(2 * size * size),
        BLOCK_P=32)
    if p.bn_weight is not None:
        mean, var = (r.conv.mean(), r.conv.var(correction=0)) if p.bn_training else (p.bn_mean, p.bn_var)
        r.bn_stats[0], r.bn_stats[1], r.bn_stats[2], r.bn_stats[3] = mean, var, p.bn_weight, p.bn_bias
    _launch(_gate_add, x, shortcut, out, norm, r.mc, *_gate_arguments(p, r), channels=True, pixels=True)
    return r


def _gate_arguments(p: Tail, r: Results):
    """conv_ptr, bn_ptr, factor_ptr of the kernels, and BN_EPS"""
    return r.conv, None if p.bn_weight is None else r.bn_stats, _small(p.factor, r.conv.dtype), p.bn_eps


def _backward(grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor, p: Tail, r: Results) -> Gradients:
    dtype = accumulation_dtype(x)
    b, c, h, w = x.shape
    d = Gradients(
        torch.empty_like(x), torch.empty_like(x), *(x.new_empty(shape, dtype=dtype) for shape in gradient_shapes(p)))
    norm, pooled = _norm(r.space, r.stats, p)
    *gate, bn_eps = _gate_arguments(p, r)

    blocks = triton.cdiv(h * w, _tile(x, False, True)[1])
    dz, ties = torch.empty_like(r.conv), torch.empty_like(r.conv)
    sums = x.new_empty(2, b, blocks, c, dtype=dtype)
    _launch(
        _a, x, grad, out, d.shortcut, norm, r.mc, *gate, r.pooled, dz, ties, sums, bn_eps, pixels=True)
    if p.bn_weight is not None:
        mean, var, weight, _ = r.bn_stats
        invstd = (var + p.bn_eps).rsqrt()
        normal = (r.conv - mean) * invstd
        d.bn[0], d.bn[1] = (dz * normal).sum(), dz.sum()
        if p.bn_training:
            dz = dz - (d.bn[1] + normal * d.bn[0]) / dz.numel()
        dz = dz * (invstd * p.bn_weight.to(dtype))
    size = p.conv_weight.shape[-1]
    dpooled, dkernel, _ = torch.ops.aten.convolution_backward(
        dz, r.pooled, _small(p.conv_weight, dtype), None, [1, 1], [size // 2] * 2, [1, 1], False, [0, 0], 1,
        [True, True, False])
    dpooled = dpooled.contiguous()

    s, ties_space, dlogit = x.new_empty(2, b, c, dtype=dtype), torch.empty_like(r.mc), torch.empty_like(r.mc)
    _launch(
        _b, x, r.space, norm, r.mc, dpooled, r.pooled, ties, sums, s, ties_space, dlogit, blocks, channels=True)

    w0, w1 = _matrices(p, dtype)
    dhidden = torch.ops.aten.threshold_backward((dlogit @ w1).expand_as(r.hidden), r.hidden, 0)
    dspace = dhidden @ w0
    torch.matmul(dhidden.flatten(0, 1).T, pooled.flatten(0, 1), out=d.fc1_weight.flatten(1))
    torch.matmul(dlogit.T, r.hidden.relu().sum(0), out=d.fc2_weight.flatten(1))
    if p.fc1_bias is not None:
        torch.sum(dhidden, (0, 1), out=d.fc1_bias)
    if p.fc2_bias is not None:
        torch.sum(dlogit, 0, out=d.fc2_bias).mul_(2)

    k, k_centred = x.new_empty(3, b, c, dtype=dtype), x.new_empty(c, dtype=dtype)
    _factors[triton.cdiv(c, _SMALL['BLOCK_C']),](
        r.space, norm, _small(p.weight, dtype), r.mc, s, ties_space, dspace, d.weight, d.bias, k, k_centred,
        TRAINING=p.training, B=b, C=c, P=h * w, **_SMALL)
    _launch(
        _c, x, d.shortcut, d.x, r.space, norm, r.mc, *gate, dpooled, r.pooled, ties, k, k_centred, bn_eps,
        channels=True, pixels=True)
    return d._replace(conv_weight=dkernel.contiguous())


# Triton launches on the current device, which need not be that of the map.

def forward(x: torch.Tensor, shortcut: torch.Tensor, out: torch.Tensor, p: Tail) -> Results:
    with torch.cuda.device_of(x):
        return _forward(x, shortcut, out, p)


def infer(x: torch.Tensor, shortcut: torch.Tensor, p: Tail) -> None:
    forward(x, shortcut, x, p)


def backward(grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor, p: Tail, r: Results) -> Gradients:
    with torch.cuda.device_of(x):
        return _backward(grad, x, out, p, r)


def norm_relu(x, weight, bias, mean, var, eps: float, relu: bool) -> None:
    with torch.cuda.device_of(x):
        parameters = (t.contiguous() for t in (weight, bias, mean, var))
        _launch(_norm_relu, x, *parameters, eps, relu, channels=True, pixels=True)
