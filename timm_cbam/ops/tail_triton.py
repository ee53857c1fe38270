"""The passes of :class:`.tail.Tail` as Triton kernels, for CUDA

Every kernel computes F and F' anew from x, in registers, so that neither is ever in memory.

A map is a matrix of channels and pixels for each sample, and contiguous is one or the other: pixels in PyTorch's
default memory format, channels in channels-last. The kernels work on tiles [BLOCK_C, BLOCK_P], and the format matters
only for the tiles' addresses and for their shape, whose long side is the contiguous one; so one code serves both.

A kernel that sums over channels or pixels has a program for each block of the others. The program keeps the sum as a
tile while it walks along the map, and reduces it once at the end: no two programs add to the same number, and the order
of the additions is always the same. Sums and batch-norm are float32, or float64 for maps in float64.
"""
import torch
import triton
import triton.language as tl

from .tail import Tail


def _config(block_c: int, block_p: int, num_warps: int) -> triton.Config:
    return triton.Config({'BLOCK_C': block_c, 'BLOCK_P': block_p}, num_warps=num_warps)


_SIDES = [(64, 32, 4), (64, 16, 4), (128, 32, 8), (256, 16, 8)]  # long, short, warps; the first is the default
_CONFIGS = [_config(*c) for long, short, warps in _SIDES for c in ((short, long, warps), (long, short, warps))]
if triton.knobs.runtime.interpret:
    _CONFIGS = [_config(16, 64, 4)]  # nothing to tune in the interpreter


def _candidates(configs, named_args, CHANNELS_LAST, **kwargs):
    """The tile decides on the order of additions. So there is no choice of tiles for who asks PyTorch for
    deterministic algorithms; otherwise two processes may choose differently."""
    configs = [c for c in configs if (c.kwargs['BLOCK_C'] > c.kwargs['BLOCK_P']) == CHANNELS_LAST]
    return configs[:1] if torch.are_deterministic_algorithms_enabled() else configs


_tune = triton.autotune(
    _CONFIGS, key=['C', 'P', 'CHANNELS_LAST'], prune_configs_by={'early_config_prune': _candidates})


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


@_tune
@triton.jit
def _pool_space(
        x_ptr, weight_ptr, avg_ptr, top_ptr,
        C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    blocks = tl.cdiv(C, BLOCK_C)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    acc: tl.constexpr = avg_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + c, mask=c < C, other=0)
    sign = tl.where(weight < 0, -1., 1.).to(acc)  # F falls with x where the weight is negative
    total = tl.zeros([BLOCK_C, BLOCK_P], acc)
    top = tl.full([BLOCK_C, BLOCK_P], float('-inf'), acc)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (p < P)[None, :]
        x = tl.load(x_ptr + _offsets(b, c, p, C, P, CHANNELS_LAST), mask=inside, other=0).to(acc)
        total += x
        top = _max(top, tl.where(inside, x * sign[:, None], float('-inf')))
    tl.store(avg_ptr + b * C + c, tl.sum(total, 1) / P, mask=c < C)
    tl.store(top_ptr + b * C + c, tl.reduce(top, 1, _max) * sign, mask=c < C)


@_tune
@triton.jit
def _pool_channels(
        x_ptr, mc_ptr, mean_ptr, scale_ptr, bias_ptr, pooled_ptr, index_ptr,
        C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    blocks = tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    acc: tl.constexpr = mean_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_C, BLOCK_P], acc)
    top = tl.full([BLOCK_C, BLOCK_P], float('-inf'), acc)
    index = tl.zeros([BLOCK_C, BLOCK_P], tl.int32) + tl.arange(0, BLOCK_C)[:, None]
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mean = _per_channel(mean_ptr, c, C)
        scale = _per_channel(scale_ptr, c, C)
        bias = _per_channel(bias_ptr, c, C)
        mc = _per_channel(mc_ptr + b * C, c, C).to(acc)
        inside = (c < C)[:, None] & (p < P)[None, :]
        x = tl.load(x_ptr + _offsets(b, c, p, C, P, CHANNELS_LAST), mask=inside, other=0).to(acc)
        f = ((x - mean) * scale + bias) * mc
        total += tl.where(inside, f, 0)
        f = tl.where(inside, f, float('-inf'))
        larger = (f > top) | ((f != f) & (top == top))  # as torch.max: nothing exceeds the first NaN
        index = tl.where(larger, c[:, None], index)
        top = tl.where(larger, f, top)
    largest = tl.reduce(top, 0, _max)
    index = tl.min(tl.where((top == largest[None, :]) | (top != top), index, C), 0)
    tl.store(pooled_ptr + b * 2 * P + p, tl.sum(total, 0) / C, mask=p < P)
    tl.store(pooled_ptr + b * 2 * P + P + p, largest, mask=p < P)
    tl.store(index_ptr + b * P + p, index, mask=p < P)


@_tune
@triton.jit
def _gate_add(
        x_ptr, mc_ptr, ms_ptr, mean_ptr, scale_ptr, bias_ptr, shortcut_ptr, out_ptr, RELU: tl.constexpr,
        C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    blocks_c, blocks_p = tl.cdiv(C, BLOCK_C), tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // (blocks_c * blocks_p)).to(tl.int64)
    c = tl.program_id(0) // blocks_p % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    acc: tl.constexpr = mean_ptr.dtype.element_ty
    mean = _per_channel(mean_ptr, c, C)
    scale = _per_channel(scale_ptr, c, C)
    bias = _per_channel(bias_ptr, c, C)
    mc = _per_channel(mc_ptr + b * C, c, C).to(acc)
    ms = _per_pixel(ms_ptr + b * P, p, P).to(acc)
    inside = (c < C)[:, None] & (p < P)[None, :]
    offsets = _offsets(b, c, p, C, P, CHANNELS_LAST)
    x = tl.load(x_ptr + offsets, mask=inside, other=0).to(acc)
    out = tl.load(shortcut_ptr + offsets, mask=inside, other=0).to(acc) + ((x - mean) * scale + bias) * mc * ms
    if RELU:
        out = tl.where(out < 0, 0, out)  # lets NaN pass, as torch.relu does
    tl.store(out_ptr + offsets, out, mask=inside)


@_tune
@triton.jit
def _gate_add_backward(
        x_ptr, grad_ptr, out_ptr, mc_ptr, mean_ptr, scale_ptr, bias_ptr, g_ptr, dms_ptr, RELU: tl.constexpr,
        C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    blocks = tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    acc: tl.constexpr = mean_ptr.dtype.element_ty
    dms = tl.zeros([BLOCK_C, BLOCK_P], acc)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mean = _per_channel(mean_ptr, c, C)
        scale = _per_channel(scale_ptr, c, C)
        bias = _per_channel(bias_ptr, c, C)
        mc = _per_channel(mc_ptr + b * C, c, C).to(acc)
        inside = (c < C)[:, None] & (p < P)[None, :]
        offsets = _offsets(b, c, p, C, P, CHANNELS_LAST)
        x = tl.load(x_ptr + offsets, mask=inside, other=0).to(acc)
        g = tl.load(grad_ptr + offsets, mask=inside, other=0)
        if RELU:
            g = tl.where(tl.load(out_ptr + offsets, mask=inside, other=0) <= 0, 0, g)
            tl.store(g_ptr + offsets, g, mask=inside)
        dms += g.to(acc) * (((x - mean) * scale + bias) * mc)
    tl.store(dms_ptr + b * P + p, tl.sum(dms, 0), mask=p < P)


@_tune
@triton.jit
def _spatial_pool_backward(
        x_ptr, g_ptr, ms_ptr, davg_ptr, dmax_ptr, index_ptr, mean_ptr, top_ptr, s0_ptr, s1_ptr, ties_ptr,
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
        ms = _per_pixel(ms_ptr + b * P, p, P).to(acc)
        davg = _per_pixel(davg_ptr + b * P, p, P).to(acc)
        dmax = _per_pixel(dmax_ptr + b * P, p, P).to(acc)
        index = _per_pixel(index_ptr + b * P, p, P)
        inside = (c < C)[:, None] & (p < P)[None, :]
        offsets = _offsets(b, c, p, C, P, CHANNELS_LAST)
        x = tl.load(x_ptr + offsets, mask=inside, other=0)
        g = tl.load(g_ptr + offsets, mask=inside, other=0).to(acc)
        df = g * ms + davg + tl.where(index == c[:, None], dmax, 0)
        s0 += df
        s1 += df * (x.to(acc) - mean)
        ties += (inside & (x == top)).to(tl.int32)
    tl.store(s0_ptr + b * C + c, tl.sum(s0, 1), mask=c < C)
    tl.store(s1_ptr + b * C + c, tl.sum(s1, 1), mask=c < C)
    tl.store(ties_ptr + b * C + c, tl.sum(ties, 1), mask=c < C)


@_tune
@triton.jit
def _channel_pool_backward(
        x_ptr, g_ptr, ms_ptr, davg_ptr, dmax_ptr, index_ptr, top_ptr, k_gate_ptr, k_top_ptr, k_x_ptr, k_ptr, dx_ptr,
        C, P, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    blocks_c, blocks_p = tl.cdiv(C, BLOCK_C), tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // (blocks_c * blocks_p)).to(tl.int64)
    c = tl.program_id(0) // blocks_p % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    acc: tl.constexpr = k_ptr.dtype.element_ty
    top = _per_channel(top_ptr + b * C, c, C)
    k_gate = _per_channel(k_gate_ptr + b * C, c, C)
    k_top = _per_channel(k_top_ptr + b * C, c, C)
    k = _per_channel(k_ptr + b * C, c, C)
    ms = _per_pixel(ms_ptr + b * P, p, P).to(acc)
    davg = _per_pixel(davg_ptr + b * P, p, P).to(acc)
    dmax = _per_pixel(dmax_ptr + b * P, p, P).to(acc)
    index = _per_pixel(index_ptr + b * P, p, P)
    inside = (c < C)[:, None] & (p < P)[None, :]
    offsets = _offsets(b, c, p, C, P, CHANNELS_LAST)
    x = tl.load(x_ptr + offsets, mask=inside, other=0)
    g = tl.load(g_ptr + offsets, mask=inside, other=0).to(acc)
    dx = k_gate * (g * ms + davg + tl.where(index == c[:, None], dmax, 0)) + tl.where(x == top, k_top, 0) + k
    if k_x_ptr is not None:
        dx += _per_channel(k_x_ptr, c, C) * x.to(acc)
    tl.store(dx_ptr + offsets, dx, mask=inside)


def _format(x: torch.Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _launch(kernel, x: torch.Tensor, *args, channels: bool = False, pixels: bool = False) -> None:
    """Run a kernel with one program for each sample and block of its channels, its pixels, or both."""
    b, c, h, w = x.shape

    def grid(meta):
        blocks_c, blocks_p = triton.cdiv(c, meta['BLOCK_C']), triton.cdiv(h * w, meta['BLOCK_P'])
        return b * (blocks_c if channels else 1) * (blocks_p if pixels else 1),

    with torch.cuda.device_of(x):
        kernel[grid](x, *args, c, h * w, CHANNELS_LAST=_format(x) is torch.channels_last)


class TritonTail(Tail):
    """Here gate_add_backward leaves s0 and s1 to spatial_pool_backward, whose kernel then reads x and g once for all of
    them, and for the ties, too: the number of pixels where x is at the top."""

    def channel_pool(self, x, weight, bias, running_mean, running_var, momentum, eps):
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if self.training:
            mean, var = torch.batch_norm_update_stats(x, running_mean, running_var, momentum)
        else:
            mean, var = running_mean, running_var
        self.avg = x.new_empty(*x.shape[:2], 1, 1, dtype=dtype)
        self.top = torch.empty_like(self.avg, dtype=x.dtype)
        _launch(_pool_space, x, weight, self.avg, self.top, channels=True)
        return mean, torch.rsqrt(var.to(dtype) + eps)

    def spatial_pool(self, x, mc):
        b, _, h, w = x.shape
        pooled = x.new_empty(b, 2, h, w)
        self.index = x.new_empty(b, 1, h, w, dtype=torch.int32)
        _launch(
            _pool_channels, x, mc.contiguous(), self.mean, self.scale, self.bias, pooled, self.index, pixels=True)
        return pooled

    def gate_add(self, x, mc, ms, shortcut):
        shortcut = shortcut.contiguous(memory_format=_format(x))
        out = torch.empty_like(x, memory_format=_format(x))
        _launch(
            _gate_add, x, mc.contiguous(), ms.contiguous(), self.mean, self.scale, self.bias, shortcut, out, self.relu,
            channels=True, pixels=True)
        return out

    def gate_add_backward(self, grad, out):
        x = self.x
        grad = grad.contiguous(memory_format=_format(x))
        self.g = torch.empty_like(x, memory_format=_format(x)) if self.relu else grad
        dms = torch.empty_like(self.ms, dtype=self.mean.dtype, memory_format=torch.contiguous_format)
        _launch(
            _gate_add_backward, x, grad, out, self.mc.contiguous(), self.mean, self.scale, self.bias, self.g, dms,
            self.relu, pixels=True)
        return dms

    def spatial_pool_backward(self, davg, dmax):
        self.s0, self.s1 = torch.empty_like(self.avg), torch.empty_like(self.avg)
        self.ties = torch.empty_like(self.avg, dtype=torch.int32)
        _launch(
            _spatial_pool_backward, self.x, self.g, self.ms.contiguous(), davg.contiguous(), dmax.contiguous(),
            self.index, self.mean, self.top, self.s0, self.s1, self.ties, channels=True)

    def channel_pool_backward(self, davg, dmax, k_gate, k_top, k_x, k):
        dx = torch.empty_like(self.x, memory_format=_format(self.x))
        k_gate, k_top, k = (t.contiguous() for t in (k_gate, k_top / self.ties, k))
        _launch(
            _channel_pool_backward, self.x, self.g, self.ms.contiguous(), davg.contiguous(), dmax.contiguous(),
            self.index, self.top, k_gate, k_top, k_x, k, dx, channels=True, pixels=True)
        return dx
