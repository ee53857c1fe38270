"""What the implementations of :func:`timm_cbam.ops.cbam_residual` for different devices share: what their passes are

With F the output of the batch-norm, F' = F * mc and F'' = F' * ms (paper section 3), the tail of a block is three
passes over its maps. Each has a small tensor as its result, and between them ordinary layers compute the gates:

    channel_pool: x -> average and maximum of F over space     -> channel gate mc
    spatial_pool: x, mc -> average and maximum of F' over C    -> spatial gate ms
    gate_add:     x, mc, ms, shortcut -> act(shortcut + F'')

Three passes in the opposite order compute the gradients, since those of the gates' inputs are small tensors, too. F, F'
and F'' are not kept for them, because they follow from x. With g the gradient of the sum before the activation:

    gate_add_backward:     g, dms = sum_C g * F'
    spatial_pool_backward: dF' = g * ms + davg / C + dmax * [F' is the maximum] / ties,   dmc = sum_HW dF' * F
    channel_pool_backward: dF = dF' * mc + davg / HW + dmax * [F is the maximum] / ties,  dx by batch-norm's rule

The sums over the batch that batch-norm's rule needs follow from the sums of dF' and dF' * (x - mean) over space, which
the second pass has computed for dmc.
"""
from typing import NamedTuple, Optional

import torch


class Norm(NamedTuple):
    """Batch-norm with given statistics: ``F = (x - mean) * weight / sqrt(var + eps) + bias``."""
    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor
    eps: float

    def scale(self) -> torch.Tensor:
        return self.weight * torch.rsqrt(self.var + self.eps)


class Tail:
    """One call of :func:`timm_cbam.ops.cbam_residual`: the passes, and what they leave for each other.

    Shapes: maps (B, C, H, W); pooled (2, B, C), average first; mc and all else per channel (B, C, 1, 1); stats, the
    pooled F', (B, 2, H, W), average first; ms (B, 1, H, W).
    """
    relu: bool  # whether the activation is ReLU, or there is none
    training: bool  # whether the batch-norm's statistics are those of the batch
    # Small tensors that forward passes leave for backward ones:
    norm: Norm
    invstd: torch.Tensor  # of the batch-norm, (C,)
    avg: torch.Tensor  # of x over space
    top: torch.Tensor  # x where F is largest; ties are those of x
    stats: torch.Tensor
    # What each backward pass leaves for the next:
    x: torch.Tensor
    g: torch.Tensor
    mc: torch.Tensor
    ms: torch.Tensor
    s0: torch.Tensor  # sum of dF' over space
    s1: torch.Tensor  # sum of dF' * (x - mean) over space

    def __init__(self, relu: bool, training: bool) -> None:
        self.relu = relu
        self.training = training

    def clear(self) -> None:
        """Let go of all tensors. Between forward and backward pass autograd keeps them."""
        self.__dict__ = {'relu': self.relu, 'training': self.training}

    def channel_pool(
            self,
            x: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor,
            running_mean: Optional[torch.Tensor],
            running_var: Optional[torch.Tensor],
            momentum: float,
            eps: float,
    ) -> None:
        """Set norm, invstd, avg and top, update the running statistics."""
        raise NotImplementedError

    def spatial_pool(self, x: torch.Tensor, mc: torch.Tensor) -> torch.Tensor:
        """Return stats."""
        raise NotImplementedError

    def gate_add(self, x: torch.Tensor, mc: torch.Tensor, ms: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        raise NotImplementedError

    def gate_add_backward(self, grad: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Set g and return dms."""
        raise NotImplementedError

    def spatial_pool_backward(self, davg: torch.Tensor, dmax: torch.Tensor) -> None:
        """Set s0 and s1, given the gradients of stats, davg divided by C."""
        raise NotImplementedError

    def channel_pool_backward(
            self,
            k_gate: torch.Tensor,
            k_top: torch.Tensor,
            k_x: Optional[torch.Tensor],
            k: torch.Tensor,
    ) -> torch.Tensor:
        """Return ``dx = k_gate * dF' + k_top * [x is at the top] / ties + k_x * x + k``, with k_x (1, C, 1, 1)."""
        raise NotImplementedError
