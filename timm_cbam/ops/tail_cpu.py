"""The passes of :class:`.tail.Tail` in PyTorch's operations, for CPU

What costs time on CPU is reading and writing maps, and most of all fresh ones, whose pages the system has to
provide. So the passes work in place, in the one map that becomes their result, and in chunks of samples, so that a map
is still in the cache when the next operation needs it. Weighted sums are matrix products, several times as fast as a
product and a sum.
"""
from typing import Callable, Iterator, Tuple

import torch

from .compiled import channel_factors
from .tail import Tail

_CHUNK = 1 << 18  # elements for each thread: two such maps in float32 fill the 2 MB of a core's cache


def _chunks(*tensors: torch.Tensor) -> Iterator[Tuple[torch.Tensor, ...]]:
    """Split tensors of the same batch, the first of them a map, into chunks of samples."""
    sample = tensors[0][0].numel()
    return zip(*(t.split(max(1, torch.get_num_threads() * _CHUNK // sample)) for t in tensors), strict=True)


def _scratch(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(next(_chunks(x))[0])


def _per_channel(t: torch.Tensor) -> torch.Tensor:
    return t.view(1, -1, 1, 1)


def _sum_channels(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``sum_C x * factor``, with a factor per channel: (B, 1, H, W)."""
    return torch.bmm(factor.flatten(2).mT, x.flatten(2).to(factor.dtype)).view(len(x), 1, *x.shape[2:])


def _sum_space(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``sum_HW x * factor``, with a factor per pixel: (B, C, 1, 1)."""
    return torch.bmm(factor.flatten(2), x.flatten(2).mT.to(factor.dtype)).view(*x.shape[:2], 1, 1)


def _mean_space(x: torch.Tensor) -> torch.Tensor:
    """Average over space as a matrix product, (B, C)."""
    return torch.bmm(x.new_full((len(x), 1, x[0, 0].numel()), 1 / x[0, 0].numel()), x.flatten(2).mT)[:, 0]


def batch_norm(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        eps: float,
        out: torch.Tensor,
) -> torch.Tensor:
    """Batch-norm in eval mode, eagerly with the bits of torch.nn.functional.batch_norm and in the place of `out`.

    The output may take the place of x. A compiler finds a place of its own.
    """
    if torch.compiler.is_compiling():
        factor, summand = channel_factors(weight, bias, running_mean, running_var, eps)
        return (x * factor + summand).to(x.dtype)
    empty = weight.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        x, weight, bias, running_mean, running_var, False, 0., eps, out=out, save_mean=empty, save_invstd=empty)
    return out


def _empty_pooled(x: torch.Tensor) -> torch.Tensor:
    """Channels-last, because that convolution's backward pass is twice as fast with it."""
    b, _, h, w = x.shape
    return x.new_empty(b, h, w, 2).permute(0, 3, 1, 2)


def infer_cpu(
        f: torch.Tensor,
        shortcut: torch.Tensor,
        channel_gate: Callable,
        spatial_gate: Callable,
        relu: bool,
) -> torch.Tensor:
    """All passes where no gradient is needed, in the place of the batch-norm's output f."""
    f *= channel_gate(torch.stack([_mean_space(f), f.flatten(2).amax(2)]))
    pooled = _empty_pooled(f)
    pooled[:, 0] = f.mean(1)
    pooled[:, 1] = f.amax(1)
    torch.addcmul(shortcut, f, spatial_gate(pooled), out=f)
    return f.relu_() if relu else f


class CpuTail(Tail):

    def channel_pool(self, x, weight, bias, running_mean, running_var, momentum, eps):
        flat = x.flatten(2)
        top = torch.where(weight < 0, flat.amin(2), flat.amax(2))  # F falls with x where the weight is negative
        self.avg, self.top = (t[..., None, None] for t in (_mean_space(x), top))
        self.map = torch.empty_like(x)
        if self.training:
            mean, invstd = weight.new_empty(2, len(weight))
            torch.ops.aten.native_batch_norm.out(
                x, weight, bias, running_mean, running_var, True, momentum, eps,
                out=self.map, save_mean=mean, save_invstd=invstd)
        else:
            mean, invstd = running_mean, torch.rsqrt(running_var + eps)
            batch_norm(x, weight, bias, running_mean, running_var, eps, self.map)
        return mean, invstd

    def spatial_pool(self, x, mc):
        pooled = _empty_pooled(x)
        self.map *= mc
        pooled[:, :1] = self.map.mean(1, keepdim=True)
        pooled[:, 1:], index = self.map.max(1, keepdim=True)
        self.index = index.to(torch.int32)
        return pooled

    def gate_add(self, x, mc, ms, shortcut):
        torch.addcmul(shortcut, self.map, ms, out=self.map)
        return self.map.relu_() if self.relu else self.map

    def gate_add_backward(self, grad, out):
        self.g = torch.ops.aten.threshold_backward(grad, out, 0) if self.relu else grad
        scale, bias, mean = (_per_channel(t) for t in (self.scale, self.bias, self.mean))
        k_gx, ms = self.mc * scale, self.ms.to(scale.dtype)
        k_g = self.mc * (bias - mean * scale)
        scratch = _scratch(self.x)
        parts = []
        for x, k1, k0, m, g in _chunks(self.x, k_gx, k_g, ms, self.g):
            gx = torch.mul(x, g, out=scratch[:len(x)])
            parts.append((_sum_channels(gx, k1) + _sum_channels(g, k0), _sum_space(g, m), _sum_space(gx, m)))
        dms, self.s0, s1 = (torch.cat(p) for p in zip(*parts, strict=True))
        self.s1 = s1 - mean * self.s0
        return dms

    def spatial_pool_backward(self, davg, dmax):
        # sum_HW davg * (x - mean), written such that no large numbers cancel
        davg = davg.to(self.s1.dtype)
        total = davg.sum((2, 3), keepdim=True)
        davg = davg - total / davg[0].numel()
        self.s0 += total
        self.s1 += total * (self.avg - _per_channel(self.mean))
        self.s1 += _sum_space(self.x, davg)
        index = self.index.long()
        centered = self.x.gather(1, index) - self.mean[index]
        for s, value in ((self.s0, dmax), (self.s1, dmax * centered)):
            s.flatten(1).scatter_add_(1, index.flatten(1), value.to(s.dtype).flatten(1))

    def channel_pool_backward(self, davg, dmax, k_gate, k_top, k_x, k):
        dx = torch.empty_like(self.x)
        scratch = _scratch(self.x)
        index, one = self.index.long(), torch.ones_like(self.s0[:, :1, :1, :1]).expand_as(self.ms)
        dmax = dmax * k_gate.flatten(1).gather(1, index.flatten(1)).view_as(dmax)
        # k_gate * davg + k is a matrix of rank 2
        columns = torch.stack([k_gate, k], dim=2).flatten(2).to(dx.dtype)
        rows = torch.cat([davg, torch.ones_like(davg)], dim=1).flatten(2).to(dx.dtype)
        for x, g, ms, i, dm, column, row, top, kg, kt, d in _chunks(
                self.x, self.g, self.ms, index, dmax.to(dx.dtype), columns, rows, self.top, k_gate, k_top, dx):
            torch.mul(g, ms, out=d).mul_(kg).flatten(2).baddbmm_(column, row)
            d.scatter_add_(1, i, dm)
            at_top = torch.eq(x, top, out=scratch[:len(x)])
            d.addcmul_(at_top, kt / _sum_space(at_top, one[:len(x)]))
            if k_x is not None:
                d.addcmul_(x, k_x)
        return dx
