"""Convolutional Block Attention Module (CBAM) layers

Paper: `CBAM: Convolutional Block Attention Module` - https://arxiv.org/abs/1807.06521

The equations are those of section 3 of the paper, for a feature map F of shape (B, C, H, W), with sigma the sigmoid
and * the element-wise product (gates are broadcast along their missing dimensions).
"""
from typing import Final, Optional, Type, Union

import torch
from timm.layers import create_act_layer, make_divisible
from torch import nn

__all__ = ['ChannelAttention', 'SpatialAttention', 'Cbam']

_POOLINGS = ('avg', 'max', 'avgmax')
_ARRANGEMENTS = ('channel_spatial', 'spatial_channel', 'parallel', 'channel', 'spatial')


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f'Unknown {name} {value!r}, choose one of {", ".join(map(repr, choices))}.')


class ChannelAttention(nn.Module):
    """Channel attention, section 3, equation 2.

    ``Mc(F) = sigma(W1 act(W0 avg_HW(F)) + W1 act(W0 max_HW(F)))`` of shape (B, C, 1, 1), ``F' = F * Mc(F)``.

    The multi-layer perceptron (W0: C to C/r, W1: C/r to C) is shared by both poolings. It is made of 1x1 convolutions,
    so that its weights have the names and shapes that they have in timm.

    Shape:
        - Input: (B, C, H, W)
        - Output: (B, C, H, W)

    Example:
        >>> attention = ChannelAttention(64, rd_ratio=1 / 8)
        >>> x = torch.randn(2, 64, 28, 28)
        >>> attention(x).shape, attention.attention_map(x).shape
        (torch.Size([2, 64, 28, 28]), torch.Size([2, 64, 1, 1]))
    """
    pooling: Final[str]  # a constant, so that TorchScript compiles one pooling only, which OpenVINO needs

    def __init__(
            self,
            channels: int,
            rd_ratio: float = 1. / 16,
            rd_channels: Optional[int] = None,
            rd_divisor: int = 1,
            mlp_bias: bool = False,
            pooling: str = 'avgmax',
            act_layer: Union[str, Type[nn.Module]] = nn.ReLU,
            gate_layer: Union[str, Type[nn.Module]] = 'sigmoid',
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            channels: Number of input channels C.
            rd_ratio: Reduction 1/r of the hidden width relative to the input channels.
            rd_channels: Hidden width, takes precedence over the ratio.
            rd_divisor: The hidden width that follows from the ratio is made a multiple of this.
            mlp_bias: Biases in both layers of the MLP, initialised to zero as in the authors' code.
            pooling: 'avg', 'max', or 'avgmax' for both (the paper's table 1 compares them).
            act_layer: Activation between the layers of the MLP.
            gate_layer: Activation that makes the gate.

        Raises:
            ValueError: If the pooling is unknown or the channels are too few for the reduction.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        _check_choice('pooling', pooling, _POOLINGS)
        if not rd_channels:
            if channels * rd_ratio < 1:
                raise ValueError(
                    f'channels={channels} are too few for rd_ratio={rd_ratio:g}: less than one hidden channel is left. '
                    f'Pass a larger rd_ratio, or rd_channels=1 or more.')
            rd_channels = make_divisible(channels * rd_ratio, rd_divisor, round_limit=0.)
        self.pooling = pooling
        self.fc1 = nn.Conv2d(channels, rd_channels, 1, bias=mlp_bias, **dd)
        self.act = create_act_layer(act_layer, inplace=True)
        self.fc2 = nn.Conv2d(rd_channels, channels, 1, bias=mlp_bias, **dd)
        self.gate = create_act_layer(gate_layer)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the authors' code does: PyTorch's default for linear weights, zero biases."""
        for fc in (self.fc1, self.fc2):
            fc.reset_parameters()
            if fc.bias is not None:
                nn.init.zeros_(fc.bias)

    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """Channel gate ``Mc(x)``, shape (B, C, 1, 1)."""
        torch._assert(x.ndim == 4, f'Expected a 4-d input (B, C, H, W), got {x.ndim}-d; see torch.Tensor.unsqueeze().')
        if self.pooling == 'avg':
            return self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))
        if self.pooling == 'max':
            return self.gate(self.fc2(self.act(self.fc1(x.amax((2, 3), keepdim=True)))))
        # The shared MLP runs once, over both pooled maps side by side as two pixels.
        pooled = torch.cat([x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)], dim=3)
        logits = self.fc2(self.act(self.fc1(pooled)))
        # Added, not reduced: quantizers give a sum over a dimension the range of its input.
        return self.gate(logits[..., :1] + logits[..., 1:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.attention_map(x)


class SpatialAttention(nn.Module):
    """Spatial attention, section 3, equation 3.

    ``Ms(F) = sigma(conv7x7([avg_C(F); max_C(F)]))`` of shape (B, 1, H, W), ``F' = F * Ms(F)``.

    Shape:
        - Input: (B, C, H, W)
        - Output: (B, C, H, W)

    Example:
        >>> attention = SpatialAttention(kernel_size=3)
        >>> x = torch.randn(2, 64, 28, 28)
        >>> attention(x).shape, attention.attention_map(x).shape
        (torch.Size([2, 64, 28, 28]), torch.Size([2, 1, 28, 28]))
    """
    pooling: Final[str]

    def __init__(
            self,
            kernel_size: int = 7,
            spatial_norm: bool = False,
            pooling: str = 'avgmax',
            gate_layer: Union[str, Type[nn.Module]] = 'sigmoid',
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            kernel_size: Size of the convolution's kernel, odd (the paper's table 2 compares 3 and 7).
            spatial_norm: Batch-norm after the convolution as in the authors' code (momentum 0.01, weight zero at
                init), which the paper does not have.
            pooling: 'avg', 'max', or 'avgmax' for both, in this order.
            gate_layer: Activation that makes the gate.

        Raises:
            ValueError: If the pooling is unknown or the kernel size even.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        _check_choice('pooling', pooling, _POOLINGS)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f'kernel_size={kernel_size} must be odd and positive, so that the gate has the size of its input; '
                f'the paper uses 7 and 3.')
        self.pooling = pooling
        self.conv = nn.Conv2d(
            2 if pooling == 'avgmax' else 1, 1, kernel_size, padding=kernel_size // 2, bias=False, **dd)
        self.bn = nn.BatchNorm2d(1, momentum=0.01, **dd) if spatial_norm else nn.Identity()
        self.gate = create_act_layer(gate_layer)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the authors' code does: Kaiming normal (fan out) convolution, zero batch-norm weight."""
        nn.init.kaiming_normal_(self.conv.weight, mode='fan_out', nonlinearity='relu')
        if isinstance(self.bn, nn.BatchNorm2d):
            self.bn.reset_parameters()
            nn.init.zeros_(self.bn.weight)

    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """Spatial gate ``Ms(x)``, shape (B, 1, H, W)."""
        torch._assert(x.ndim == 4, f'Expected a 4-d input (B, C, H, W), got {x.ndim}-d; see torch.Tensor.unsqueeze().')
        if self.pooling == 'avg':
            pooled = x.mean(1, keepdim=True)
        elif self.pooling == 'max':
            pooled = x.amax(1, keepdim=True)
        else:
            pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return self.gate(self.bn(self.conv(pooled)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.attention_map(x)


class Cbam(nn.Module):
    """Convolutional Block Attention Module, section 3, equation 1.

    ``F' = F * Mc(F)``, ``F'' = F' * Ms(F')``, with Mc of :class:`ChannelAttention` and Ms of
    :class:`SpatialAttention`. It fits wherever timm takes an ``attn_layer``.

    Shape:
        - Input: (B, C, H, W)
        - Output: (B, C, H, W)

    Example:
        >>> Cbam(64, arrangement='parallel')(torch.randn(2, 64, 28, 28)).shape
        torch.Size([2, 64, 28, 28])

        In another network of timm's:

        >>> model = timm.create_model('resnet10t', block_args=dict(attn_layer=Cbam))
        >>> type(model.layer1[0].se).__name__
        'Cbam'
    """
    parallel: Final[bool]  # constants, so that TorchScript compiles one arrangement only
    spatial_first: Final[bool]

    def __init__(
            self,
            channels: int,
            rd_ratio: float = 1. / 16,
            rd_channels: Optional[int] = None,
            rd_divisor: int = 1,
            mlp_bias: bool = False,
            kernel_size: int = 7,
            spatial_norm: bool = False,
            channel_pooling: str = 'avgmax',
            spatial_pooling: str = 'avgmax',
            arrangement: str = 'channel_spatial',
            act_layer: Union[str, Type[nn.Module]] = nn.ReLU,
            gate_layer: Union[str, Type[nn.Module]] = 'sigmoid',
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            channels: Number of input channels C.
            rd_ratio: Reduction 1/r of the channel attention's hidden width.
            rd_channels: Hidden width, takes precedence over the ratio.
            rd_divisor: The hidden width that follows from the ratio is made a multiple of this.
            mlp_bias: Biases in the channel attention's MLP.
            kernel_size: Size of the spatial attention's kernel, odd.
            spatial_norm: Batch-norm after the spatial attention's convolution.
            channel_pooling: Pooling of the channel attention: 'avg', 'max' or 'avgmax'.
            spatial_pooling: Pooling of the spatial attention: 'avg', 'max' or 'avgmax'.
            arrangement: 'channel_spatial' (the paper's choice), 'spatial_channel', 'parallel' (both gates computed from
                F and both applied to it: ``F * Mc(F) * Ms(F)``), or one attention only: 'channel', 'spatial'. The
                paper's table 3 compares them.
            act_layer: Activation between the layers of the MLP.
            gate_layer: Activation that makes the gates.

        Raises:
            ValueError: If the arrangement or a pooling is unknown, the kernel size even, or the channels too few for
                the reduction.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        _check_choice('arrangement', arrangement, _ARRANGEMENTS)
        self.parallel = arrangement == 'parallel'
        self.spatial_first = arrangement == 'spatial_channel'
        self.channel = nn.Identity() if arrangement == 'spatial' else ChannelAttention(
            channels,
            rd_ratio=rd_ratio,
            rd_channels=rd_channels,
            rd_divisor=rd_divisor,
            mlp_bias=mlp_bias,
            pooling=channel_pooling,
            act_layer=act_layer,
            gate_layer=gate_layer,
            **dd,
        )
        self.spatial = nn.Identity() if arrangement == 'channel' else SpatialAttention(
            kernel_size,
            spatial_norm=spatial_norm,
            pooling=spatial_pooling,
            gate_layer=gate_layer,
            **dd,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.parallel:
            return x * self.channel.attention_map(x) * self.spatial.attention_map(x)
        if self.spatial_first:
            return self.channel(self.spatial(x))
        return self.spatial(self.channel(x))
