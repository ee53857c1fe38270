"""CBAM-ResNets for timm. Importing this package registers its models, see `timm.list_models('cbam*')`."""
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
