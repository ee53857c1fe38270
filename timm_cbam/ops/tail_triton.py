"""The operator of tail.py for CUDA: tail_torch's, with its steps over maps as Triton kernels

Every kernel computes F and F' anew from x, in registers, so that neither is ever in memory.

A map is a matrix of channels and pixels for each sample, and contiguous is one or the other: pixels in PyTorch's
default memory format, channels in channels-last. The kernels work on tiles [BLOCK_C, BLOCK_P], and the format matters
only for the tiles' addresses and for their shape, whose long side is the contiguous one; so one code serves both.

A kernel that sums over channels or pixels has a program for each block of the others. The program keeps the sum as a
tile while it walks along the map, and reduces it once at the end; sums across the walk it writes for each program, to
be added up later. So no two programs add to the same number, and the order of the additions is always the same. Sums
and batch-norm are float32, or float64 for maps in float64.
"""
from typing import Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl

from . import tail_torch
from .arguments import Gradients, Results, Tail
from .tail_torch import Norm, Steps


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
def _per_pixel(ptr, p, P):
    return tl.load(ptr + p, mask=p < P, other=0)[None, :]


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _gated(x, mean_ptr, scale_ptr, bias_ptr, mc_ptr, b, c, C):
    """F'. The backward pass looks for the pixels where it equals the maximum that the forward pass found, so it must
    have the same bits in all kernels. Hence fma, which does not leave it to the compiler where to round."""
    mean, scale = _per_channel(mean_ptr, c, C), _per_channel(scale_ptr, c, C)
    f = tl.fma(x - mean, scale, _per_channel(bias_ptr, c, C))
    return f * _per_channel(mc_ptr + b * C, c, C)


@triton.jit
def _pool_space(
        x_ptr, avg_ptr, high_ptr, low_ptr, m2_ptr,
        C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Average, maximum and minimum, and the sum of the squared differences from the average."""
    blocks = tl.cdiv(C, BLOCK_C)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    acc: tl.constexpr = avg_ptr.dtype.element_ty
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
    avg = tl.reshape(avg + first, [BLOCK_C])
    n = b * C + c
    tl.store(avg_ptr + n, avg, mask=c < C)
    tl.store(high_ptr + n, tl.reduce(high, 1, _max), mask=c < C)
    tl.store(low_ptr + n, tl.reduce(low, 1, _min), mask=c < C)
    tl.store(m2_ptr + n, tl.sum(m2 + count * delta * delta, 1), mask=c < C)


@triton.jit
def _pool_channels(
        x_ptr, mean_ptr, scale_ptr, bias_ptr, mc_ptr, pooled_ptr,
        C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    blocks = tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    acc: tl.constexpr = mean_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_C, BLOCK_P], acc)
    highest = tl.full([BLOCK_C, BLOCK_P], float('-inf'), acc)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = (c < C)[:, None] & (p < P)[None, :]
        x = tl.load(x_ptr + _offsets(b, c, p, C, P, CHANNELS_LAST), mask=inside, other=0).to(acc)
        f = _gated(x, mean_ptr, scale_ptr, bias_ptr, mc_ptr, b, c, C)
        total += tl.where(inside, f, 0)
        highest = _max(highest, tl.where(inside, f, float('-inf')))
    pooled_ptr += b * 2 * P
    tl.store(pooled_ptr + p, tl.sum(total, 0) / C, mask=p < P)
    tl.store(pooled_ptr + P + p, tl.reduce(highest, 0, _max), mask=p < P)


@triton.jit
def _gate_add(
        x_ptr, shortcut_ptr, out_ptr, mean_ptr, scale_ptr, bias_ptr, mc_ptr, ms_ptr,
        C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    blocks_c, blocks_p = tl.cdiv(C, BLOCK_C), tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // (blocks_c * blocks_p)).to(tl.int64)
    c = tl.program_id(0) // blocks_p % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    acc: tl.constexpr = mean_ptr.dtype.element_ty
    inside = (c < C)[:, None] & (p < P)[None, :]
    offsets = _offsets(b, c, p, C, P, CHANNELS_LAST)
    x = tl.load(x_ptr + offsets, mask=inside, other=0).to(acc)
    shortcut = tl.load(shortcut_ptr + offsets, mask=inside, other=0).to(acc)
    f = _gated(x, mean_ptr, scale_ptr, bias_ptr, mc_ptr, b, c, C)
    out = shortcut + f * _per_pixel(ms_ptr + b * P, p, P)
    out = tl.where(out < 0, 0, out)  # lets NaN pass, as torch.relu does
    tl.store(out_ptr + offsets, out, mask=inside)


@triton.jit
def _a(
        x_ptr, grad_ptr, out_ptr, g_ptr, mean_ptr, scale_ptr, bias_ptr, mc_ptr, ms_ptr, highest_ptr,
        dms_ptr, ties_ptr, s0_ptr, s1_ptr,
        C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """s0, s1: sums over the pixels of each program, (B, programs, C)."""
    blocks = tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    acc: tl.constexpr = mean_ptr.dtype.element_ty
    ms = _per_pixel(ms_ptr + b * P, p, P)
    highest = _per_pixel(highest_ptr + b * P, p, P)
    dms = tl.zeros([BLOCK_C, BLOCK_P], acc)
    ties = tl.zeros([BLOCK_C, BLOCK_P], tl.int32)
    program = tl.program_id(0).to(tl.int64)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        inside = (c < C)[:, None] & (p < P)[None, :]
        offsets = _offsets(b, c, p, C, P, CHANNELS_LAST)
        x = tl.load(x_ptr + offsets, mask=inside, other=0).to(acc)
        g = tl.load(grad_ptr + offsets, mask=inside, other=0)
        g = tl.where(tl.load(out_ptr + offsets, mask=inside, other=0) <= 0, 0, g)
        tl.store(g_ptr + offsets, g, mask=inside)
        f = _gated(x, mean_ptr, scale_ptr, bias_ptr, mc_ptr, b, c, C)
        ties += (inside & (f == highest)).to(tl.int32)
        dms += g.to(acc) * f
        d = g.to(acc) * ms
        tl.store(s0_ptr + program * C + c, tl.sum(d, 1), mask=c < C)
        tl.store(s1_ptr + program * C + c, tl.sum(d * (x - _per_channel(mean_ptr, c, C)), 1), mask=c < C)
    tl.store(dms_ptr + b * P + p, tl.sum(dms, 0), mask=p < P)
    tl.store(ties_ptr + b * P + p, tl.sum(ties, 0).to(acc), mask=p < P)


@triton.jit
def _b(
        x_ptr, mean_ptr, scale_ptr, bias_ptr, mc_ptr, davg_ptr, dmax_ptr, highest_ptr, top_ptr,
        s0_ptr, s1_ptr, ties_ptr,
        C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    blocks = tl.cdiv(C, BLOCK_C)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    acc: tl.constexpr = mean_ptr.dtype.element_ty
    mean = _per_channel(mean_ptr, c, C)
    top = _per_channel(top_ptr + b * C, c, C)
    s0 = tl.zeros([BLOCK_C, BLOCK_P], acc)
    s1 = tl.zeros([BLOCK_C, BLOCK_P], acc)
    ties = tl.zeros([BLOCK_C, BLOCK_P], tl.int32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        davg = _per_pixel(davg_ptr + b * P, p, P)
        dmax = _per_pixel(dmax_ptr + b * P, p, P)
        highest = _per_pixel(highest_ptr + b * P, p, P)
        inside = (c < C)[:, None] & (p < P)[None, :]
        x = tl.load(x_ptr + _offsets(b, c, p, C, P, CHANNELS_LAST), mask=inside, other=0).to(acc)
        f = _gated(x, mean_ptr, scale_ptr, bias_ptr, mc_ptr, b, c, C)
        # A product rather than a choice: a maximum of NaN has no place, dmax is then dmax / 0, and all get NaN.
        d = davg + (f == highest).to(acc) * dmax
        s0 += d
        s1 += d * (x - mean)
        ties += (inside & (x == top)).to(tl.int32)
    n = b * C + c
    tl.store(s0_ptr + n, tl.sum(s0, 1), mask=c < C)
    tl.store(s1_ptr + n, tl.sum(s1, 1), mask=c < C)
    tl.store(ties_ptr + n, tl.sum(ties, 1).to(acc), mask=c < C)


@triton.jit
def _c(
        x_ptr, g_ptr, dx_ptr, mean_ptr, scale_ptr, bias_ptr, mc_ptr, ms_ptr, davg_ptr, dmax_ptr, highest_ptr, top_ptr,
        k_gate_ptr, k_tie_ptr, k_centred_ptr, k_ptr,
        C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    blocks_c, blocks_p = tl.cdiv(C, BLOCK_C), tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // (blocks_c * blocks_p)).to(tl.int64)
    c = tl.program_id(0) // blocks_p % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    acc: tl.constexpr = mean_ptr.dtype.element_ty
    inside = (c < C)[:, None] & (p < P)[None, :]
    offsets = _offsets(b, c, p, C, P, CHANNELS_LAST)
    x = tl.load(x_ptr + offsets, mask=inside, other=0).to(acc)
    g = tl.load(g_ptr + offsets, mask=inside, other=0).to(acc)
    f = _gated(x, mean_ptr, scale_ptr, bias_ptr, mc_ptr, b, c, C)
    at_highest = (f == _per_pixel(highest_ptr + b * P, p, P)).to(acc)
    d = _per_pixel(davg_ptr + b * P, p, P) + at_highest * _per_pixel(dmax_ptr + b * P, p, P)
    dx = _per_channel(k_gate_ptr + b * C, c, C) * (g * _per_pixel(ms_ptr + b * P, p, P) + d)
    at_top = (x == _per_channel(top_ptr + b * C, c, C)).to(acc)
    dx += at_top * _per_channel(k_tie_ptr + b * C, c, C)
    dx += _per_channel(k_centred_ptr + b * C, c, C) * (x - _per_channel(mean_ptr, c, C))
    tl.store(dx_ptr + offsets, dx + _per_channel(k_ptr + b * C, c, C), mask=inside)


@triton.jit
def _norm_relu(
        x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, EPS: tl.constexpr, RELU: tl.constexpr,
        C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
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


def _tile(c: int, p: int, channels_last: bool) -> Tuple[int, int]:
    """BLOCK_C and BLOCK_P: 64 numbers along what is contiguous, a cache line in half precision, and 32 across; so each
    of the 128 threads has 16. Half or a quarter of that where the map is smaller, which it hardly ever is.

    So a kernel is compiled once for each memory format and dtype, and again only where Triton finds it worthwhile: for
    sizes that are multiples of 16, and for those that are 1. The order of additions depends on nothing but the map's
    shape and format.
    """
    long, short = (c, p) if channels_last else (p, c)
    long = min(64, max(16, triton.next_power_of_2(long)))
    short = min(32, max(16, triton.next_power_of_2(short)))
    return (long, short) if channels_last else (short, long)


def _launch(
        kernel, maps: Sequence[torch.Tensor], numbers: Sequence[torch.Tensor], *constants,
        channels: bool = False, pixels: bool = False) -> None:
    """Run a kernel with one program for each sample and block of its channels, its pixels, or both.

    maps: Dense in the same memory format. numbers: All other tensors; those to be written to are contiguous.
    """
    x = maps[0]
    b, c, h, w = x.shape
    channels_last = not x.is_contiguous()
    block_c, block_p = _tile(c, h * w, channels_last)
    grid = b * (triton.cdiv(c, block_c) if channels else 1) * (triton.cdiv(h * w, block_p) if pixels else 1),
    with torch.cuda.device_of(x):
        kernel[grid](
            *maps, *(t.contiguous() for t in numbers), *constants, c, h * w,
            CHANNELS_LAST=channels_last, BLOCK_C=block_c, BLOCK_P=block_p)


class TritonSteps(Steps):
    """An instance serves one call. In the backward pass `b`, which reads all of x anyway, counts for `c` how many
    pixels share the maximum over space. What is compared is x, as in tail_torch: where F is equal for different x only
    because it is rounded, x still tells which is larger.

    space: as in :class:`.arguments.Results`.
    """

    def __init__(self, space: Optional[torch.Tensor] = None) -> None:
        self.space = space

    def pool_space(self, x: torch.Tensor, p: Tail, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor]:
        b, c, h, w = x.shape
        space = x.new_empty(3, b, c, dtype=dtype)
        m2 = x.new_empty(b, c, dtype=dtype)
        _launch(_pool_space, [x], [*space, m2], channels=True)
        if not p.training:
            return torch.stack([p.mean, p.var]).to(dtype), space
        mean = space[0].mean(0, dtype=torch.float64).to(dtype)
        var = (m2 / (h * w) + (space[0] - mean).square()).mean(0)
        return torch.stack([mean, var]), space

    def pool_channels(self, x: torch.Tensor, n: Norm, mc: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        b, _, h, w = x.shape
        pooled = x.new_empty(b, 2, h, w, dtype=mc.dtype)
        _launch(_pool_channels, [x], [n.mean, n.scale, n.bias, mc, pooled], pixels=True)
        return pooled

    def gate_add(self, x, n: Norm, mc, ms, shortcut: torch.Tensor, out: torch.Tensor) -> None:
        _launch(_gate_add, [x, shortcut, out], [n.mean, n.scale, n.bias, mc, ms], channels=True, pixels=True)

    def a(self, grad, x, out, n: Norm, mc, ms, highest) -> Tuple[torch.Tensor, ...]:
        b, c, h, w = x.shape
        _, block_p = _tile(c, h * w, not x.is_contiguous())
        g = torch.empty_like(x)
        dms, ties = x.new_empty(2, b, 1, h, w, dtype=mc.dtype)
        sums = x.new_empty(2, b, triton.cdiv(h * w, block_p), c, dtype=mc.dtype)
        _launch(
            _a, [x, grad, out, g], [n.mean, n.scale, n.bias, mc, ms, highest, dms, ties, *sums], pixels=True)
        s0, s1 = sums.sum(2)
        return g, dms, s0, s1, ties, ties  # the index of the maximum is tail_torch's alone

    def b(
            self, x, n: Norm, mc, avg, davg, dmax, highest, index: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        s0, s1, self.ties = torch.empty_like(self.space)
        top = tail_torch._top(n, self.space)
        _launch(
            _b, [x], [n.mean, n.scale, n.bias, mc, davg, dmax, highest, top, s0, s1, self.ties], channels=True)
        return s0, s1

    def c(
            self, x, g, n: Norm, mc, ms, davg, dmax, highest, index, top, k_gate, k_tie, k_centred, k) -> torch.Tensor:
        dx = torch.empty_like(x)
        numbers = [
            n.mean, n.scale, n.bias, mc, ms, davg, dmax, highest, top, k_gate, k_tie / self.ties, k_centred, k]
        _launch(_c, [x, g, dx], numbers, channels=True, pixels=True)
        return dx


def forward(x: torch.Tensor, shortcut: torch.Tensor, out: torch.Tensor, p: Tail) -> Results:
    return tail_torch.forward(x, shortcut, out, p, TritonSteps())


def infer(x: torch.Tensor, shortcut: torch.Tensor, p: Tail) -> None:
    forward(x, shortcut, x, p)


def backward(grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor, p: Tail, r: Results) -> Gradients:
    return tail_torch.backward(grad, x, out, p, r, TritonSteps(r.space))


def norm_relu(x, weight, bias, mean, var, eps: float, relu: bool) -> None:
    _launch(_norm_relu, [x], [weight, bias, mean, var], eps, relu, channels=True, pixels=True)
