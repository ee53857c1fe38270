"""State-dict layouts of CBAM-ResNets

Every published CBAM-ResNet names its weights in its own way. The table below says how each is recognised and renamed;
what is left to convert are the MLP's linear weights (here 1x1 convolutions) and the order in which the spatial
attention concatenates its two poolings (here average, maximum, as in the paper's equation 3).
"""
import re
from typing import Any, Dict, Mapping, NamedTuple, Optional, Tuple

import torch
from timm.models import clean_state_dict
from torch import nn

__all__ = ['convert_state_dict']


class _Layout(NamedTuple):
    name: str
    fits: str  # the models that such a checkpoint fits
    mark: str  # pattern found in this layout's keys only
    renames: Tuple[Tuple[str, str], ...]
    max_first: bool = False  # the spatial attention concatenates maximum, average


_LAYOUTS = (
    _Layout(
        'the reproduction article',
        'cbam_resnet*_s1',
        r'^layer\d+\.\d+\.channel\.fc1\.',
        (
            (r'\.channel\.', '.se.channel.'),
            (r'\.spatial\.conv1\.', '.se.spatial.conv.'),
            (r'\.shortcut\.', '.downsample.'),
            (r'^linear\.', 'fc.'),
        ),
    ),
    _Layout(
        'luuuyi/CBAM.PyTorch',
        'cbam_resnet*',
        r'\.ca\.fc\.0\.',
        (
            (r'\.ca\.fc\.0\.', '.se.channel.fc1.'),
            (r'\.ca\.fc\.2\.', '.se.channel.fc2.'),
            (r'\.sa\.conv1\.', '.se.spatial.conv.'),
        ),
    ),
    _Layout(
        'Jongchan/attention-module (the authors)',
        'cbam_resnet*_eccv18',
        r'\.cbam\.ChannelGate\.',
        (
            (r'\.cbam\.ChannelGate\.mlp\.1\.', '.se.channel.fc1.'),
            (r'\.cbam\.ChannelGate\.mlp\.3\.', '.se.channel.fc2.'),
            (r'\.cbam\.SpatialGate\.spatial\.', '.se.spatial.'),
        ),
        max_first=True,
    ),
    _Layout(
        'pytorchcv (osmr/imgclsmob)',
        'cbam_resnet*_eccv18',
        r'\.cbam\.ch_gate\.',
        (
            (r'^features\.init_block\.conv\.conv\.', 'conv1.'),
            (r'^features\.init_block\.conv\.bn\.', 'bn1.'),
            (r'^features\.stage(\d+)\.unit(\d+)\.', lambda m: f'layer{m[1]}.{int(m[2]) - 1}.'),
            (r'\.body\.conv(\d)\.(conv|bn)\.', r'.\2\1.'),
            (r'\.identity_conv\.conv\.', '.downsample.0.'),
            (r'\.identity_conv\.bn\.', '.downsample.1.'),
            (r'\.cbam\.ch_gate\.mlp\.', '.se.channel.'),
            (r'\.cbam\.sp_gate\.conv\.', '.se.spatial.'),
            (r'^output\.', 'fc.'),
        ),
        max_first=True,
    ),
    _Layout(
        "timm's block_args=dict(attn_layer='cbam')",
        'cbam_resnet* with cbam_args=dict(spatial_norm=True)',
        r'\.se\.spatial\.conv\.bn\.',
        ((r'\.se\.spatial\.conv\.(conv|bn)\.', r'.se.spatial.\1.'),),
    ),
)


def _find_layout(state_dict: Mapping[str, Any]) -> Optional[_Layout]:
    for layout in _LAYOUTS:
        if any(re.search(layout.mark, key) for key in state_dict):
            return layout
    return None


def _unwrap(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take the weights out of a training checkpoint and of DistributedDataParallel's and torch.compile's names."""
    if isinstance(state_dict.get('state_dict'), Mapping):
        state_dict = state_dict['state_dict']
    if any(key.startswith(('module.', '_orig_mod.')) for key in state_dict):
        state_dict = clean_state_dict(state_dict)
    return state_dict


def describe_layout(state_dict: Mapping[str, Any]) -> str:
    """Say in a sentence what a state dict looks like, for error messages."""
    state_dict = _unwrap(state_dict)
    layout = _find_layout(state_dict)
    if layout is not None:
        return f'The state dict has the layout of {layout.name}, which fits {layout.fits}.'
    if any('.se.channel.' in key or '.se.spatial.' in key for key in state_dict):
        return "The state dict has this package's layout, of another depth, stem or cbam_args."
    if 'layer1.0.conv1.weight' in state_dict:
        return 'The state dict looks like a plain ResNet: it has no attention weights.'
    return f'The state dict has no layout of a CBAM-ResNet, its keys are {", ".join(list(state_dict)[:4])}, ...'


def to_native_layout(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rename and reorder the weights of any known layout, return those of an unknown one as they are."""
    state_dict = _unwrap(state_dict)
    layout = _find_layout(state_dict)
    if layout is None:
        return state_dict
    out = {}
    for key, value in state_dict.items():
        for pattern, replacement in layout.renames:
            key = re.sub(pattern, replacement, key)
        if re.search(r'\.se\.channel\.fc[12]\.weight$', key):
            value = value.reshape(value.shape[0], -1, 1, 1)
        elif layout.max_first and key.endswith('.se.spatial.conv.weight'):
            value = value.flip(1)
        out[key] = value
    return out


def convert_state_dict(state_dict: Mapping[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Convert a checkpoint of any known CBAM-ResNet layout for a model of this package.

    Known are the layouts of this package, the reproduction article, luuuyi/CBAM.PyTorch, Jongchan/attention-module
    (the authors' code), pytorchcv, and timm's ``attn_layer='cbam'``. The classifier may be missing and tensors may have
    other shapes than the model's, so that timm's adaptation to other ``num_classes`` and ``in_chans`` can follow.

    Args:
        state_dict: State dict, also as a training checkpoint's ``state_dict`` or with ``module.`` before its keys.
        model: Model that the state dict is meant for.

    Returns:
        State dict with the model's names.

    Raises:
        RuntimeError: If weights of the model are missing or others are left over; says which layout it looks like.
    """
    out = dict(to_native_layout(state_dict))
    expected = model.state_dict()
    head = f'{model.get_classifier(name_only=True)}.'
    # BatchNorm2d itself fills in counters, which checkpoints from before PyTorch 0.4.1 do not have
    missing = [k for k in expected if k not in out and not k.startswith(head) and not k.endswith('num_batches_tracked')]
    left_over = [k for k in out if k not in expected and not k.startswith(head)]
    if missing or left_over:
        raise RuntimeError(
            f'The state dict does not fit {type(model).__name__}. {describe_layout(state_dict)}\n'
            f'\tMissing: {_shorten(missing)}\n\tLeft over: {_shorten(left_over)}')
    return out


def _shorten(keys: list, most: int = 8) -> str:
    rest = f', ... ({len(keys)} in all)' if len(keys) > most else ''
    return (', '.join(keys[:most]) or 'none') + rest
