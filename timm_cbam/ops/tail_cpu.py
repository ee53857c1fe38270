"""The passes of :class:`.tail.Tail` in PyTorch's operations, for CPU

What costs time on CPU is reading and writing maps, and most of all fresh ones, whose pages the system has to
provide. So the passes work in place, in the one map that becomes their result, and in chunks of samples, so that a map
is still in the cache when the next operation needs it.
"""
from typing import Callable, Iterator, Tuple

import torch

from .tail import Norm, Tail

_CHUNK = 1 << 18  # elements for each thread: two such maps in float32 fill the 2 MB of a core's cache


def _chunks(*tensors: torch.Tensor) -> Iterator[Tuple[torch.Tensor, ...]]:
    """Split tensors of the same batch, the first of them a map, into chunks of samples."""
    sample = tensors[0][0].numel()
    return zip(*(t.split(max(1, torch.get_num_threads() * _CHUNK // sample)) for t in tensors), strict=True)


def _scratch(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(next(_chunks(x))[0])


def normalize(x: torch.Tensor, norm: Norm, out: torch.Tensor) -> torch.Tensor:
    """Write F to out, which may be x. It has the same bits each time, so that a maximum is found by equality."""
    empty = norm.mean.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        x, *norm[:4], False, 0., norm.eps, out=out, save_mean=empty, save_invstd=empty)
    return out


def batch_norm_(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        eps: float,
) -> torch.Tensor:
    """Batch-norm in eval mode, in the place of x, with the bits of torch.nn.functional.batch_norm."""
    return normalize(x, Norm(weight, bias, running_mean, running_var, eps), x)


def _pool_space(x: torch.Tensor, *pools: Callable) -> Tuple[torch.Tensor, ...]:
    parts = [[pool(part, (2, 3), keepdim=True) for pool in pools] for part, in _chunks(x)]
    return tuple(torch.cat(p) for p in zip(*parts, strict=True))


def gate_pool(f: torch.Tensor, mc: torch.Tensor) -> torch.Tensor:
    """Write F' in the place of F, return its average and maximum over the channels."""
    stats = f.new_empty(len(f), 2, *f.shape[2:])
    for part, gate, out in _chunks(f, mc, stats):
        part.mul_(gate)
        torch.mean(part, 1, keepdim=True, out=out[:, :1])
        torch.amax(part, 1, keepdim=True, out=out[:, 1:])
    return stats


def infer_cpu(
        x: torch.Tensor,
        shortcut: torch.Tensor,
        channel_gate: Callable,
        spatial_gate: Callable,
        norm: Norm,
        relu: bool,
        inplace: bool,
) -> torch.Tensor:
    """All passes where no gradient is needed: x is not either, so the result may take its place."""
    f = normalize(x, norm, x if inplace else torch.empty_like(x))
    mc = channel_gate(torch.stack(_pool_space(f, torch.mean, torch.amax)).flatten(2))
    ms = spatial_gate(gate_pool(f, mc))
    torch.addcmul(shortcut, f, ms, out=f)
    return f.relu_() if relu else f


class CpuTail(Tail):

    def channel_pool(self, x, weight, bias, running_mean, running_var, momentum, eps):
        self.avg, self.top = _pool_space(x, torch.mean, torch.amax)
        falling = (weight < 0).view(1, -1, 1, 1)
        if falling.any():  # there F is largest where x is smallest
            self.top = torch.where(falling, *_pool_space(x, torch.amin), self.top)
        self.map = torch.empty_like(x)
        if self.training:
            mean, invstd = weight.new_empty(2, len(weight))
            torch.ops.aten.native_batch_norm.out(
                x, weight, bias, running_mean, running_var, True, momentum, eps,
                out=self.map, save_mean=mean, save_invstd=invstd)
            # a batch-norm without variance of its own repeats the above to the bit
            dtype = torch.promote_types(weight.dtype, torch.float32)
            weight, bias, mean, self.invstd = (t.to(dtype) for t in (weight, bias, mean, invstd))
            self.norm = Norm(weight * self.invstd, bias, mean, torch.ones_like(mean), 0.)
        else:
            self.norm = Norm(weight, bias, running_mean, running_var, eps)
            self.invstd = torch.rsqrt(running_var + eps)
            normalize(x, self.norm, self.map)

    def spatial_pool(self, x, mc):
        return gate_pool(self.map, mc)

    def gate_add(self, x, mc, ms, shortcut):
        out = self.map
        torch.addcmul(shortcut, out, ms, out=out)
        return out.relu_() if self.relu else out

    def gate_add_backward(self, grad, out):
        self.g = torch.empty_like(self.x) if self.relu else grad
        dms = torch.empty_like(self.ms)
        scratch = _scratch(self.x)
        for x, mc, part, y, g, dm in _chunks(self.x, self.mc, grad, out, self.g, dms):
            if self.relu:
                torch.ops.aten.threshold_backward.grad_input(part, y, 0, grad_input=g)
            f = normalize(x, self.norm, scratch[:len(x)])
            torch.sum(f.mul_(mc).mul_(g), 1, keepdim=True, out=dm)
        return dms

    def spatial_pool_backward(self, davg, dmax):
        self.map = torch.empty_like(self.x)
        mean = self.norm.mean.to(self.x.dtype).view(1, -1, 1, 1)
        scratch = _scratch(self.x)
        sums = []
        for x, mc, ms, g, top, da, dm, df in _chunks(
                self.x, self.mc, self.ms, self.g, self.stats[:, 1:], davg, dmax, self.map):
            at_top = normalize(x, self.norm, df).mul_(mc).eq_(top)
            df = at_top.mul_(dm / at_top.sum(1, keepdim=True)).add_(da).addcmul_(g, ms)
            centered = torch.sub(x, mean, out=scratch[:len(x)])
            sums.append([t.sum((2, 3), keepdim=True, dtype=self.norm.mean.dtype) for t in (df, centered.mul_(df))])
        self.s0, s1 = (torch.cat(s) for s in zip(*sums, strict=True))
        self.s1 = s1 + (mean - self.norm.mean.view_as(mean)) * self.s0  # mean was rounded to the type of x

    def channel_pool_backward(self, k_gate, k_top, k_x, k):
        scratch = _scratch(self.x)
        for x, top, kg, kt, k0, df in _chunks(self.x, self.top, k_gate, k_top, k, self.map):
            at_top = torch.eq(x, top, out=scratch[:len(x)])
            df.mul_(kg).addcmul_(at_top, kt / at_top.sum((2, 3), keepdim=True)).add_(k0)
            if k_x is not None:
                df.addcmul_(x, k_x)
        return self.map
