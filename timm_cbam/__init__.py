"""CBAM-ResNets (Convolutional Block Attention Module, https://arxiv.org/abs/1807.06521) for timm

Importing this package registers its models, see `timm.list_models('cbam*')`. Once it is installed, timm does so itself.

    timm.create_model('cbam_resnet50')     the models, of class CbamResNet
    Cbam, ChannelAttention, ...            the layers, also for timm's `attn_layer`
    add_cbam, remove_cbam                  attention in any CNN, which computes the same at first
    attention_maps                         the gates of a forward pass
    convert_state_dict                     state dicts of other CBAM code and of plain ResNets
"""
from .cbam_resnet import CbamResNet
from .explain import AttentionMaps, attention_maps
from .insert import add_cbam, remove_cbam
from .layers import Cbam, ChannelAttention, SpatialAttention
from .weights import convert_state_dict

__version__ = '0.1.0'

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
