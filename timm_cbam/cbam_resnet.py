"""CBAM-ResNet

ResNets with a Convolutional Block Attention Module at the end of every residual branch, after its last batch-norm and
before the shortcut is added.

Papers:
* `CBAM: Convolutional Block Attention Module` - https://arxiv.org/abs/1807.06521
* `Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385
* `Aggregated Residual Transformations for Deep Neural Networks` (ResNeXt) - https://arxiv.org/abs/1611.05431
* `Wide Residual Networks` - https://arxiv.org/abs/1605.07146
* `Bag of Tricks for Image Classification with Convolutional Neural Networks` (ResNet-D) -
  https://arxiv.org/abs/1812.01187
"""
from dataclasses import replace
from functools import partial
from typing import Any, Dict, Mapping, Optional, Tuple, Type, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    register_model,
)
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from . import fusion
from .files import read_checkpoint
from .layers import Cbam, ChannelAttention, SpatialAttention
from .weights import adapt_on_load, convert_state_dict, explain_misfit, find_weights

__all__ = ['CbamResNet', 'CbamBasicBlock', 'CbamBottleneck']  # register_model adds each entrypoint fn to this


class CbamBasicBlock(BasicBlock):
    """Basic residual block with CBAM, timm's in all but how it runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            parts = fusion.match(self, x)
            if parts is not None:
                return fusion.forward(parts, x)

        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)
        x = self.conv2(x)
        x = self.bn2(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x = x + shortcut
        return self.act2(x)


class CbamBottleneck(Bottleneck):
    """Bottleneck residual block with CBAM, timm's in all but how it runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            parts = fusion.match(self, x)
            if parts is not None:
                return fusion.forward(parts, x)

        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)
        x = self.conv2(x)
        x = self.bn2(x)
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.aa(x)
        x = self.conv3(x)
        x = self.bn3(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x = x + shortcut
        return self.act3(x)


class CbamResNet(ResNet):
    """ResNet with CBAM in every block, `block.se` in timm's naming.

    It is timm's ResNet in every other respect. Beside the stems of ResNet it has
      * 's1' - a single 3x3 conv of stride 1 and no max-pool, for small images (stem_type='s1')

    Example:
        >>> model = timm.create_model('cbam_resnet18_s1', num_classes=10, cbam_args=dict(rd_ratio=1 / 8))
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> model.layer1[0].se.channel.fc1
        Conv2d(64, 8, kernel_size=(1, 1), stride=(1, 1), bias=False)
    """

    def __init__(
            self,
            block: Type[Union[BasicBlock, Bottleneck]],
            layers: Tuple[int, ...],
            in_chans: int = 3,
            output_stride: int = 32,
            stem_type: str = '',
            cbam_args: Optional[Dict[str, Any]] = None,
            block_args: Optional[Dict[str, Any]] = None,
            kaiming_head: bool = False,
            device=None,
            dtype=None,
            **kwargs,
    ) -> None:
        """
        Args:
            block: Class of the residual block.
            layers: Number of blocks in each stage.
            in_chans: Number of input (color) channels.
            output_stride: Largest stride of the network's output, further stages are dilated. One of 32, 16, 8, with
                the 's1' stem (whose network has stride 8) one of 8, 4, 2 or a larger one of those above.
            stem_type: The type of stem, 's1' or one of ResNet's.
            cbam_args: Arguments of :class:`timm_cbam.Cbam`.
            block_args: Extra arguments of the block module.
            kaiming_head: Initialise the classifier as the authors' code does, Kaiming normal with zero bias.
            **kwargs: Arguments of :class:`timm.models.ResNet`.

        Raises:
            ValueError: If block_args has an attention layer of its own, or the output_stride does not fit the stem.
        """
        dd = {'device': device, 'dtype': dtype}
        block_args = dict(block_args or {})
        if 'attn_layer' in block_args:
            raise ValueError(
                f"block_args has attn_layer={block_args['attn_layer']!r}, which would replace CBAM. Remove it, pass "
                f"cbam_args to change the attention, or create the ResNet without 'cbam_' in its name.")
        small_stem = stem_type == 's1'
        strides = (2, 4, 8, 16, 32) if small_stem else (8, 16, 32)
        if output_stride not in strides:
            raise ValueError(f'output_stride={output_stride} must be one of {strides}.')
        self.kaiming_head = kaiming_head  # init_weights, which ResNet's __init__ calls, needs it
        super().__init__(
            block,
            layers,
            in_chans=in_chans,
            # ResNet counts from its stem's stride of 4, the small stem has 1
            output_stride=min(4 * output_stride, 32) if small_stem else output_stride,
            stem_type='' if small_stem else stem_type,
            block_args=dict(block_args, attn_layer=partial(Cbam, **(cbam_args or {}))),
            **kwargs,
            **dd,
        )
        if small_stem:
            inplanes = self.feature_info[0]['num_chs']
            self.conv1 = nn.Conv2d(in_chans, inplanes, kernel_size=3, padding=1, bias=False, **dd)
            nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
            self.maxpool = nn.Identity()
            for info, stem_stride in zip(self.feature_info, (2, 4, 4, 4, 4), strict=True):
                info['reduction'] //= stem_stride
        self.register_load_state_dict_pre_hook(adapt_on_load)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialize model weights.

        Args:
            zero_init_last: Zero-initialize the last BN in each residual branch.
        """
        super().init_weights(zero_init_last=zero_init_last)
        for m in self.modules():
            if isinstance(m, (ChannelAttention, SpatialAttention)):
                m.reset_parameters()  # ResNet has initialised every Conv2d its own way
        if self.kaiming_head and isinstance(self.fc, nn.Linear):
            nn.init.kaiming_normal_(self.fc.weight)
            nn.init.zeros_(self.fc.bias)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """Load a state dict of this model, or any that :func:`timm_cbam.convert_state_dict` knows, plain ResNets' too.

        Conversion is a hook's, which is called in models that this one is a part of, too; here an error gets a reason.

        Raises:
            RuntimeError: If the state dict does not fit (strict); says which layout it looks like.
        """
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as e:
            if not str(e).startswith('Error(s) in loading'):
                raise
            raise RuntimeError(f'{e}\n\t{explain_misfit(find_weights(state_dict, self), self)}') from None

    def load_pretrained(self, checkpoint_path: str, prefix: str = '') -> None:
        """Load a file that timm hands to its model, as it does with NumPy's suffixes.

        Raises:
            ValueError: If it holds no weights that can be read; says what it is and what to do.
            RuntimeError: If they do not fit.
        """
        self.load_state_dict(read_checkpoint(checkpoint_path))


def _create_cbam_resnet(variant: str, pretrained: bool = False, **kwargs) -> CbamResNet:
    overlay = dict(kwargs.pop('pretrained_cfg_overlay', None) or {})
    file = overlay.get('file') if pretrained and not overlay.get('custom_load') else None
    if file:
        overlay['state_dict'] = read_checkpoint(file)  # more kinds than timm reads, and errors that say what it is
    model = build_model_with_cfg(
        CbamResNet,
        variant,
        pretrained,
        pretrained_filter_fn=convert_state_dict,
        pretrained_cfg_overlay=overlay,
        **kwargs,
    )
    if file:
        model.pretrained_cfg.pop('state_dict', None)
    if not any(isinstance(m, CbamResNet) for m in model.modules()):  # features_only=True takes the parts out of it
        model.register_load_state_dict_pre_hook(adapt_on_load)
    return model


def _cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc',
        'license': 'apache-2.0',
        'paper_ids': 'arXiv:1807.06521',
        'paper_name': 'CBAM: Convolutional Block Attention Module',
        **kwargs
    }


def _s1_cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    return _cfg(url=url, **dict({'input_size': (3, 32, 32), 'pool_size': (4, 4), 'crop_pct': 1.0}, **kwargs))


def _eccv18_cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    return _cfg(url=url, **dict({'interpolation': 'bilinear'}, **kwargs))


def _warm_cfgs(base: str) -> Dict[str, Any]:
    """One cfg for each of timm's weights for a plain ResNet, which the model continues exactly (weights.py).

    All fields are timm's, the weights' own license, paper and preprocessing among them, and so is the default tag.
    """
    default_tag = get_pretrained_cfg(base).tag
    return {
        f"cbam_{base}.warm_{cfg.tag}{'*' if cfg.tag == default_tag else ''}": replace(cfg, architecture=None, tag=None)
        for cfg in get_arch_pretrained_cfgs(base).values() if cfg.has_weights
    }


default_cfgs = generate_default_cfgs({
    **_warm_cfgs('resnet18'),
    **_warm_cfgs('resnet34'),
    **_warm_cfgs('resnet50'),
    **_warm_cfgs('resnet101'),
    **_warm_cfgs('resnet152'),
    **_warm_cfgs('resnet50d'),
    **_warm_cfgs('resnext50_32x4d'),
    **_warm_cfgs('resnext101_32x4d'),
    **_warm_cfgs('resnext101_32x8d'),
    **_warm_cfgs('wide_resnet50_2'),

    'cbam_resnet18_s1.untrained': _s1_cfg(),
    'cbam_resnet34_s1.untrained': _s1_cfg(),
    'cbam_resnet50_s1.untrained': _s1_cfg(),
    'cbam_resnet101_s1.untrained': _s1_cfg(),
    'cbam_resnet152_s1.untrained': _s1_cfg(),

    'cbam_resnet18_eccv18.untrained': _eccv18_cfg(),
    'cbam_resnet34_eccv18.untrained': _eccv18_cfg(),
    'cbam_resnet50_eccv18.osmr_in1k': _eccv18_cfg(
        url='https://github.com/osmr/imgclsmob/releases/download/v0.0.537/cbam_resnet50-0505-d8cf8488.pth.zip',
        license='mit', origin_url='https://github.com/osmr/imgclsmob'),
    'cbam_resnet50_eccv18.eccv18_in1k': _eccv18_cfg(
        url='https://github.com/osmr/imgclsmob/releases/download/v0.0.125/cbam_resnet50-0605-a1172fe6.pth.zip',
        license='mit', origin_url='https://github.com/Jongchan/attention-module',
        notes=('Checkpoint of the authors, converted by osmr/imgclsmob.',)),
    'cbam_resnet101_eccv18.untrained': _eccv18_cfg(),
    'cbam_resnet152_eccv18.untrained': _eccv18_cfg(),
})


def _eccv18_args(kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Put the caller's arguments, cbam_args one by one, over those of the authors' released code."""
    cbam_args = dict(dict(mlp_bias=True, spatial_norm=True), **(kwargs.get('cbam_args') or {}))
    return dict(dict(zero_init_last=False, kaiming_head=True), **dict(kwargs, cbam_args=cbam_args))


@register_model
def cbam_resnet18(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNet-18 model, the network of the paper.
    """
    model_args = dict(block=CbamBasicBlock, layers=(2, 2, 2, 2))
    return _create_cbam_resnet('cbam_resnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def cbam_resnet34(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNet-34 model, the network of the paper.
    """
    model_args = dict(block=CbamBasicBlock, layers=(3, 4, 6, 3))
    return _create_cbam_resnet('cbam_resnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def cbam_resnet50(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNet-50 model, the network of the paper.
    """
    model_args = dict(block=CbamBottleneck, layers=(3, 4, 6, 3))
    return _create_cbam_resnet('cbam_resnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def cbam_resnet101(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNet-101 model, the network of the paper.
    """
    model_args = dict(block=CbamBottleneck, layers=(3, 4, 23, 3))
    return _create_cbam_resnet('cbam_resnet101', pretrained, **dict(model_args, **kwargs))


@register_model
def cbam_resnet152(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNet-152 model, the network of the paper.
    """
    model_args = dict(block=CbamBottleneck, layers=(3, 8, 36, 3))
    return _create_cbam_resnet('cbam_resnet152', pretrained, **dict(model_args, **kwargs))


@register_model
def cbam_resnet50d(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNet-50-D model, with a deep stem and average pooling in the shortcuts.
    """
    model_args = dict(block=CbamBottleneck, layers=(3, 4, 6, 3), stem_width=32, stem_type='deep', avg_down=True)
    return _create_cbam_resnet('cbam_resnet50d', pretrained, **dict(model_args, **kwargs))


@register_model
def cbam_resnext50_32x4d(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNeXt-50 32x4d model, a network of the paper.
    """
    model_args = dict(block=CbamBottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create_cbam_resnet('cbam_resnext50_32x4d', pretrained, **dict(model_args, **kwargs))


@register_model
def cbam_resnext101_32x4d(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNeXt-101 32x4d model, a network of the paper.
    """
    model_args = dict(block=CbamBottleneck, layers=(3, 4, 23, 3), cardinality=32, base_width=4)
    return _create_cbam_resnet('cbam_resnext101_32x4d', pretrained, **dict(model_args, **kwargs))


@register_model
def cbam_resnext101_32x8d(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNeXt-101 32x8d model.
    """
    model_args = dict(block=CbamBottleneck, layers=(3, 4, 23, 3), cardinality=32, base_width=8)
    return _create_cbam_resnet('cbam_resnext101_32x8d', pretrained, **dict(model_args, **kwargs))


@register_model
def cbam_wide_resnet50_2(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-Wide-ResNet-50-2 model, whose 3x3 convolutions have twice the channels.
    """
    model_args = dict(block=CbamBottleneck, layers=(3, 4, 6, 3), base_width=128)
    return _create_cbam_resnet('cbam_wide_resnet50_2', pretrained, **dict(model_args, **kwargs))


@register_model
def cbam_resnet18_s1(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNet-18 model with a 3x3 stride-1 stem, for small images.
    """
    model_args = dict(block=CbamBasicBlock, layers=(2, 2, 2, 2), stem_type='s1')
    return _create_cbam_resnet('cbam_resnet18_s1', pretrained, **dict(model_args, **kwargs))


@register_model
def cbam_resnet34_s1(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNet-34 model with a 3x3 stride-1 stem, for small images.
    """
    model_args = dict(block=CbamBasicBlock, layers=(3, 4, 6, 3), stem_type='s1')
    return _create_cbam_resnet('cbam_resnet34_s1', pretrained, **dict(model_args, **kwargs))


@register_model
def cbam_resnet50_s1(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNet-50 model with a 3x3 stride-1 stem, for small images.
    """
    model_args = dict(block=CbamBottleneck, layers=(3, 4, 6, 3), stem_type='s1')
    return _create_cbam_resnet('cbam_resnet50_s1', pretrained, **dict(model_args, **kwargs))


@register_model
def cbam_resnet101_s1(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNet-101 model with a 3x3 stride-1 stem, for small images.
    """
    model_args = dict(block=CbamBottleneck, layers=(3, 4, 23, 3), stem_type='s1')
    return _create_cbam_resnet('cbam_resnet101_s1', pretrained, **dict(model_args, **kwargs))


@register_model
def cbam_resnet152_s1(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNet-152 model with a 3x3 stride-1 stem, for small images.
    """
    model_args = dict(block=CbamBottleneck, layers=(3, 8, 36, 3), stem_type='s1')
    return _create_cbam_resnet('cbam_resnet152_s1', pretrained, **dict(model_args, **kwargs))


@register_model
def cbam_resnet18_eccv18(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNet-18 model as in the authors' released code.
    """
    model_args = dict(block=CbamBasicBlock, layers=(2, 2, 2, 2))
    return _create_cbam_resnet('cbam_resnet18_eccv18', pretrained, **dict(model_args, **_eccv18_args(kwargs)))


@register_model
def cbam_resnet34_eccv18(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNet-34 model as in the authors' released code.
    """
    model_args = dict(block=CbamBasicBlock, layers=(3, 4, 6, 3))
    return _create_cbam_resnet('cbam_resnet34_eccv18', pretrained, **dict(model_args, **_eccv18_args(kwargs)))


@register_model
def cbam_resnet50_eccv18(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNet-50 model as in the authors' released code.
    """
    model_args = dict(block=CbamBottleneck, layers=(3, 4, 6, 3))
    return _create_cbam_resnet('cbam_resnet50_eccv18', pretrained, **dict(model_args, **_eccv18_args(kwargs)))


@register_model
def cbam_resnet101_eccv18(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNet-101 model as in the authors' released code.
    """
    model_args = dict(block=CbamBottleneck, layers=(3, 4, 23, 3))
    return _create_cbam_resnet('cbam_resnet101_eccv18', pretrained, **dict(model_args, **_eccv18_args(kwargs)))


@register_model
def cbam_resnet152_eccv18(pretrained: bool = False, **kwargs) -> CbamResNet:
    """Constructs a CBAM-ResNet-152 model as in the authors' released code.
    """
    model_args = dict(block=CbamBottleneck, layers=(3, 8, 36, 3))
    return _create_cbam_resnet('cbam_resnet152_eccv18', pretrained, **dict(model_args, **_eccv18_args(kwargs)))
