"""What the implementations of :func:`timm_cbam.ops.cbam_residual` for different devices share: what their passes are

With F the output of the batch-norm, F' = F * mc and F'' = F' * ms (paper section 3), the tail of a block is three
passes over its maps. Each has a small tensor as its result, and between them ordinary layers compute the gates:

    channel_pool: x -> average and maximum of F over space     -> channel gate mc
    spatial_pool: x, mc -> average and maximum of F' over C    -> spatial gate ms
    gate_add:     x, mc, ms, shortcut -> act(shortcut + F'')

Three passes in the opposite order compute the gradients, since those of the gates' inputs are small tensors, too. F, F'
and F'' are not kept for them, because they follow from x. With g the gradient of the sum before the activation:

    gate_add_backward:     g, dms = sum_C g * F'
    spatial_pool_backward: dF' = g * ms + davg / C + dmax * [channel of the maximum], dmc = sum_HW dF' * F
    channel_pool_backward: dF = dF' * mc + davg / HW + dmax * [x is at the top] / ties, dx by batch-norm's rule

Of dF' the second needs only sums over space, of dF' and dF' * (x - mean): dmc follows from them, and so do the sums
over batch and space in batch-norm's rule. So no map of dF' or dF is ever written.
"""
from typing import Optional

import torch


class Tail:
    """One call of :func:`timm_cbam.ops.cbam_residual`: its passes, and the tensors that they leave for each other.

    Shapes: maps (B, C, H, W); per channel (B, C, 1, 1) or, of the batch-norm, (C,); per pixel (B, 1, H, W).

    Attributes:
        relu: Whether the activation is ReLU, or there is none.
        training: Whether the batch-norm's statistics are those of the batch.
        mean, invstd, scale, bias: Batch-norm, ``F = (x - mean) * scale + bias``.
        avg: Average of x over space.
        top: Value of x where F is largest.
        index: Channel where F' is largest, the first of several.
        x, mc, ms: Arguments of the forward passes, for the backward ones.
        g: Gradient of the sum before the activation, set by gate_add_backward.
        s0, s1: Sums over space of dF' and of dF' * (x - mean), known after spatial_pool_backward.
    """

    def __init__(self, relu: bool, training: bool) -> None:
        self.relu = relu
        self.training = training

    def clear(self) -> None:
        """Let go of all tensors. Between forward and backward pass autograd keeps them."""
        self.__dict__ = {'relu': self.relu, 'training': self.training}

    def channel_pool(self, x: torch.Tensor, weight, bias, running_mean, running_var, momentum: float, eps: float):
        """Set avg and top, update the running statistics, return mean and invstd."""
        raise NotImplementedError

    def spatial_pool(self, x: torch.Tensor, mc: torch.Tensor) -> torch.Tensor:
        """Set index, return average and maximum of F' over the channels, (B, 2, H, W)."""
        raise NotImplementedError

    def gate_add(self, x: torch.Tensor, mc: torch.Tensor, ms: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        raise NotImplementedError

    def gate_add_backward(self, grad: torch.Tensor, out: Optional[torch.Tensor]) -> torch.Tensor:
        """Set g, return dms, given the gradient of the output and, with ReLU, the output."""
        raise NotImplementedError

    def spatial_pool_backward(self, davg: torch.Tensor, dmax: torch.Tensor) -> None:
        """Set s0 and s1, given what average (divided by C) and maximum over the channels add to dF'."""
        raise NotImplementedError

    def channel_pool_backward(self, davg, dmax, k_gate, k_top, k_x, k) -> torch.Tensor:
        """Return ``dx = k_gate * dF' + k_top * [x is at the top] / ties + k_x * x + k``.

        davg and dmax are those of spatial_pool_backward; the factors are per channel, k_x is None in eval mode.
        """
        raise NotImplementedError
