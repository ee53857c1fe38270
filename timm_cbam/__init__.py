"""CBAM-ResNets (Convolutional Block Attention Module, https://arxiv.org/abs/1807.06521) for timm

Importing this package registers its models, see `timm.list_models('cbam*')`. Once it is installed, timm does so itself.

    timm.create_model('cbam_resnet50')     the models, of class CbamResNet
    Cbam, ChannelAttention, ...            the layers, also for timm's `attn_layer`
    add_cbam, remove_cbam                  attention in any CNN, which computes the same at first
    attention_maps                         the gates of a forward pass
    convert_state_dict                     state dicts of other CBAM code and of plain ResNets
"""
__version__ = '0.1.0'

from importlib import import_module
from typing import TYPE_CHECKING

# Before any module of ours, and no module of timm's: a thread that waits for another one to import timm then holds up
# nothing but this module, and the start-up hook registers the models there (startup/_timm_cbam_loader.py).
import timm  # noqa: F401

from . import registration  # noqa: F401
from .cbam_resnet import CbamResNet
from .layers import Cbam, ChannelAttention, SpatialAttention
from .weights import convert_state_dict

if TYPE_CHECKING:
    from .explain import AttentionMaps, attention_maps
    from .insert import add_cbam, remove_cbam

__all__ = [
    'AttentionMaps',
    'Cbam',
    'CbamResNet',
    'ChannelAttention',
    'SpatialAttention',
    'add_cbam',
    'attention_maps',
    'convert_state_dict',
    'remove_cbam',
]

# What the models do without comes when it is asked for: if it cannot be imported, they are there all the same.
_LATER = {
    'AttentionMaps': 'explain', 'attention_maps': 'explain', 'add_cbam': 'insert', 'remove_cbam': 'insert'}


if not TYPE_CHECKING:
    def __getattr__(name):
        if name in _LATER:
            return getattr(import_module(f'.{_LATER[name]}', __name__), name)
        if name in _LATER.values():
            return import_module(f'.{name}', __name__)
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def __dir__():
        return [*globals(), *_LATER]
