"""State-dict layouts of CBAM-ResNets

Every published CBAM-ResNet names its weights in its own way. The table below says how each is recognised and renamed;
what is left to convert are the MLP's linear weights (here 1x1 convolutions) and the order in which the spatial
attention concatenates its two poolings (here average, maximum, as in the paper's equation 3).

The weights of a plain ResNet get gates that let everything through, see :func:`_warm_start`.
"""
import copy
import logging
import math
import re
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Tuple

import torch
from timm.models import clean_state_dict
from torch import nn

from .layers import Cbam, ChannelAttention, SpatialAttention

_logger = logging.getLogger(__name__)

__all__ = ['convert_state_dict']


class Layout(NamedTuple):
    name: str
    family: str  # such a checkpoint fits cbam_resnet*<family>
    mark: str  # pattern found in this layout's keys only
    names: Tuple[Tuple[str, str], ...]  # parts of keys, theirs and ours, in either direction; ^ is where a key begins
    max_first: bool = False  # the spatial attention concatenates maximum, average
    linear: bool = False  # the MLP's weights are 2-d


LAYOUTS = {
    'article': Layout(
        'the reproduction article',
        '_s1',
        r'^layer\d+\.\d+\.channel\.fc1\.',
        (
            ('.channel.', '.se.channel.'),
            ('.spatial.conv1.', '.se.spatial.conv.'),
            ('.shortcut.', '.downsample.'),
            ('^linear.', '^fc.'),
        ),
    ),
    'community': Layout(
        'luuuyi/CBAM.PyTorch',
        '',
        r'\.ca\.fc\.0\.',
        (
            ('.ca.fc.0.', '.se.channel.fc1.'),
            ('.ca.fc.2.', '.se.channel.fc2.'),
            ('.sa.conv1.', '.se.spatial.conv.'),
        ),
    ),
    'official': Layout(
        'Jongchan/attention-module (the authors)',
        '_eccv18',
        r'\.cbam\.ChannelGate\.',
        (
            ('.cbam.ChannelGate.mlp.1.', '.se.channel.fc1.'),
            ('.cbam.ChannelGate.mlp.3.', '.se.channel.fc2.'),
            ('.cbam.SpatialGate.spatial.', '.se.spatial.'),
        ),
        max_first=True,
        linear=True,
    ),
    'pytorchcv': Layout(
        'pytorchcv (osmr/imgclsmob)',
        '_eccv18',
        r'\.cbam\.ch_gate\.',
        (
            ('^features.init_block.conv.conv.', '^conv1.'),
            ('^features.init_block.conv.bn.', '^bn1.'),
            # ResNet-152 has a stage of 36 blocks
            *((f'^features.stage{s}.unit{b + 1}.', f'^layer{s}.{b}.') for s in range(1, 5) for b in range(36)),
            *((f'.body.conv{i}.{kind}.', f'.{kind}{i}.') for i in (1, 2, 3) for kind in ('conv', 'bn')),
            ('.identity_conv.conv.', '.downsample.0.'),
            ('.identity_conv.bn.', '.downsample.1.'),
            ('.cbam.ch_gate.mlp.', '.se.channel.'),
            ('.cbam.sp_gate.conv.', '.se.spatial.'),
            ('^output.', '^fc.'),
        ),
        max_first=True,
        linear=True,
    ),
    'timm': Layout(
        "timm's block_args=dict(attn_layer='cbam')",
        ' with cbam_args=dict(spatial_norm=True)',
        r'\.se\.spatial\.conv\.bn\.',
        (
            ('.se.spatial.conv.conv.', '.se.spatial.conv.'),
            ('.se.spatial.conv.bn.', '.se.spatial.bn.'),
        ),
    ),
}

_MLP_WEIGHT = r'\.se\.channel\.fc[12]\.weight$'
_SPATIAL_WEIGHT = '.se.spatial.conv.weight'


def find_layout(state_dict: Mapping[str, Any]) -> Optional[Layout]:
    for layout in LAYOUTS.values():
        if any(re.search(layout.mark, key) for key in state_dict):
            return layout
    return None


def unwrap(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take the weights out of a training checkpoint and of DistributedDataParallel's and torch.compile's names."""
    if isinstance(state_dict.get('state_dict'), Mapping):
        state_dict = state_dict['state_dict']
    if any(key.startswith(('module.', '_orig_mod.')) for key in state_dict):
        state_dict = clean_state_dict(state_dict)
    return state_dict


def _has_own_attention(state_dict: Mapping[str, Any]) -> bool:
    return any('.se.channel.' in key or '.se.spatial.' in key for key in state_dict)


def _has_blocks(state_dict: Mapping[str, Any]) -> bool:
    return any(re.match(_BLOCK, key) for key in state_dict)


def describe_layout(state_dict: Mapping[str, Any]) -> str:
    """Say in a sentence what a state dict looks like, for error messages."""
    state_dict = unwrap(state_dict)
    layout = find_layout(state_dict)
    if layout is not None:
        return f'The state dict has the layout of {layout.name}, which fits cbam_resnet*{layout.family}.'
    if _has_own_attention(state_dict):
        return "The state dict has this package's layout, of another depth, stem or cbam_args."
    if any('.se.fc1.' in key for key in state_dict):
        return 'The state dict looks like an SE-ResNet, whose attention is another.'
    if is_plain_resnet(state_dict):
        return 'The state dict looks like a plain ResNet, of another depth, width or stem.'
    if _has_blocks(state_dict):
        unknown = foreign_keys(state_dict)
        in_blocks = [key for key in unknown if re.match(_BLOCK, key)]
        what = 'attention of a layout that is not known' if in_blocks else 'more in it than a ResNet has'
        return f'The state dict is that of a ResNet with {what}: {_shorten(in_blocks or unknown)}.'
    return f'The state dict has no layout of a CBAM-ResNet, its keys are {", ".join(list(state_dict)[:4])}, ...'


# What ResNets of timm and torchvision have, and a classifier of any name, which is no attention.
_BLOCK = r'layer\d+\.\d+\.'
_PLAIN = re.compile(
    rf'(({_BLOCK})?(conv|bn|act)\d|{_BLOCK}downsample|maxpool)\.|'
    r'(fc|head|classifier|linear|last_linear|output|logits|projector|projection_head|predictor)\d*\.')


def foreign_keys(state_dict: Mapping[str, Any]) -> List[str]:
    """Keys that a plain ResNet does not have."""
    return [key for key in state_dict if not _PLAIN.match(key)]


def is_plain_resnet(state_dict: Mapping[str, Any]) -> bool:
    """Whether these are weights of a plain ResNet, of all or some of its blocks, and nothing else."""
    return _has_blocks(state_dict) and not foreign_keys(state_dict)


def _rename(key: str, names: Iterable[Tuple[str, str]]) -> str:
    key = f'^{key}'
    for old, new in names:
        key = key.replace(old, new)
    return key[1:]


def rename_keys(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give the weights of any known layout this package's names, leave their values and unknown layouts as they are."""
    state_dict = unwrap(state_dict)
    layout = find_layout(state_dict)
    return {_rename(k, layout.names): v for k, v in state_dict.items()} if layout else state_dict


def to_native_layout(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rename and reorder the weights of any known layout, return those of an unknown one as they are."""
    state_dict = unwrap(state_dict)
    layout = find_layout(state_dict)
    if layout is None:
        return state_dict
    out = dict(rename_keys(state_dict))
    for key, value in out.items():
        if re.search(_MLP_WEIGHT, key):
            out[key] = value.reshape(value.shape[0], -1, 1, 1)
        elif layout.max_first and key.endswith(_SPATIAL_WEIGHT):
            out[key] = value.flip(1)
    return out


def from_native_layout(state_dict: Mapping[str, torch.Tensor], layout: Layout) -> Dict[str, torch.Tensor]:
    """The inverse of :func:`to_native_layout`, for a state dict of a model that the layout's code can build."""
    out = {}
    names = [(ours, theirs) for theirs, ours in layout.names]
    for key, value in state_dict.items():
        if layout.linear and re.search(_MLP_WEIGHT, key):
            value = value.flatten(1)
        elif layout.max_first and key.endswith(_SPATIAL_WEIGHT):
            value = value.flip(1)
        out[_rename(key, names)] = value
    return out


def _gate_at_zero(gate: nn.Module) -> float:
    value = float(gate(torch.zeros(1, device='cpu')))  # where another device may be the default
    if math.frexp(value)[0] != 0.5:
        raise RuntimeError(
            f"gate_layer {type(gate).__name__} is {value:g} at zero, which is no power of two: attention cannot start "
            f"without changing what the network computes. Choose gate_layer='sigmoid' or 'hard_sigmoid'.")
    return value


def open_gates(attention: Cbam) -> Tuple[Dict[str, torch.Tensor], float]:
    """Weights with which attention is a constant, and the factor that makes up for it.

    The last layer of each gate is zero, so that a gate is sigma(0) = 1/2 everywhere, and the factor is 2 for each gate:
    powers of two are exact in binary floating point. Gradients reach the zeros at the first step, because what they are
    multiplied with is not zero. A batch-norm after the spatial convolution is set to zero in the convolution's place,
    for two zeros in a row would never learn.

    Raises:
        RuntimeError: If a gate is no power of two at zero.
    """
    factor = 1.
    for part in (attention.channel, attention.spatial):
        if not isinstance(part, nn.Identity):
            factor /= _gate_at_zero(part.gate)
    gates = attention.state_dict()
    last = ('channel.fc2.', 'spatial.bn.' if 'spatial.bn.weight' in gates else 'spatial.conv.')
    for key, value in gates.items():
        zero = key.startswith(last) and key.endswith(('weight', 'bias'))
        gates[key] = torch.zeros_like(value) if zero else value.clone()
    return gates, factor


def _drawn(attention: Cbam, device: torch.device) -> Cbam:
    """Attention of the same kind with weights of its own, for one that has none yet (on the meta device)."""
    attention = copy.deepcopy(attention).to_empty(device=device)
    for m in attention.modules():
        if isinstance(m, (ChannelAttention, SpatialAttention)):
            m.reset_parameters()
    return attention


def _warm_start(state_dict: Mapping[str, Any], model: nn.Module, assign: bool) -> Dict[str, Any]:
    """Add attention to the weights of a plain ResNet such that the network computes the same, bit for bit.

    The gates are those of :func:`open_gates`. The last batch-norm of the block makes up for them: its weight and bias
    are multiplied by the factor. Blocks of which the state dict has not the whole branch stay as they are.

    Args:
        state_dict: Weights of a plain ResNet, of all or some of its blocks.
        model: Model with attention.
        assign: Whether the model takes the tensors themselves, so that gates must have the device and dtype of the
            block's other weights.
    """
    stem, own_stem = state_dict.get('conv1.weight'), getattr(getattr(model, 'conv1', None), 'weight', None)
    if stem is not None and own_stem is not None and stem.shape[2:] != own_stem.shape[2:]:
        raise RuntimeError(
            f'The state dict is that of a plain ResNet whose stem is a {stem.shape[2]}x{stem.shape[3]} convolution, '
            f'the model has a {own_stem.shape[2]}x{own_stem.shape[3]} one. Load it into a model with the same stem '
            f"(without '_s1' in its name).")
    out = dict(state_dict)
    started = False
    for name, block in model.named_modules():
        attention = getattr(block, 'se', None)
        if not isinstance(attention, Cbam):
            continue
        branch = [f'{name}.{k}' for k, _ in block.named_parameters() if not k.startswith(('se.', 'downsample.'))]
        if not all(key in out for key in branch):
            continue
        norm_name = 'bn3' if hasattr(block, 'bn3') else 'bn2'
        if getattr(block, norm_name).weight is None:
            raise RuntimeError(
                f'{name}.{norm_name} has no weight, which would have to make up for the gates: the weights of a plain '
                f'ResNet cannot be continued exactly. Choose a norm_layer with an affine part.')
        like = out[f'{name}.conv1.weight']
        if assign and any(p.is_meta for p in attention.parameters()):
            attention = _drawn(attention, like.device)
        gates, factor = open_gates(attention)
        for key, value in gates.items():
            if assign:
                value = value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
            out[f'{name}.se.{key}'] = value
        for key in (f'{name}.{norm_name}.weight', f'{name}.{norm_name}.bias'):
            if key in out:
                out[key] = out[key] * factor
        started = True
    if started:
        _logger.info('Weights of a plain ResNet: attention starts such that the network computes the same.')
    return out


def adapt_state_dict(state_dict: Mapping[str, Any], model: nn.Module, assign: bool = False) -> Mapping[str, Any]:
    """Bring a state dict of any known layout, or of a plain ResNet, into the model's; others stay as they are."""
    state_dict = to_native_layout(state_dict)
    return _warm_start(state_dict, model, assign) if is_plain_resnet(state_dict) else state_dict


def adapt_on_load(
        model: nn.Module,
        state_dict: Dict[str, Any],
        prefix: str,
        local_metadata: Dict[str, Any],
        *args: Any,
) -> None:
    """:func:`adapt_state_dict` as a hook for `register_load_state_dict_pre_hook`, which is called at any depth.

    What it changes is the copy of the caller's dict that PyTorch has made for this.
    """
    own = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
    if find_layout(own) is None and not _has_own_attention(own) and _has_blocks(own) and not is_plain_resnet(own):
        # strict=False raises nothing where attention is lost
        _logger.warning(f'{describe_layout(own)} Attention stays as it is.')
    adapted = adapt_state_dict(own, model, assign=local_metadata.get('assign_to_params_buffers', False))
    if adapted is not own:
        for key in own:
            del state_dict[prefix + key]
        state_dict.update({prefix + key: value for key, value in adapted.items()})


def convert_state_dict(state_dict: Mapping[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Convert a checkpoint of any known CBAM-ResNet layout for a model of this package.

    Known are the layouts of this package, the reproduction article, luuuyi/CBAM.PyTorch, Jongchan/attention-module
    (the authors' code), pytorchcv, and timm's ``attn_layer='cbam'``. A plain ResNet's (timm's, torchvision's) is
    completed with gates such that the model computes exactly what the ResNet does. The classifier may be missing and
    tensors may have other shapes than the model's, so that timm's adaptation to other ``num_classes`` and ``in_chans``
    can follow.

    Args:
        state_dict: State dict, also as a training checkpoint's ``state_dict`` or with ``module.`` before its keys.
        model: Model that the state dict is meant for.

    Returns:
        State dict with the model's names.

    Raises:
        RuntimeError: If weights of the model are missing or others are left over; says which layout it looks like.
            Also if a plain ResNet cannot be continued exactly, because of the stem, gate_layer or norm_layer.
    """
    out = dict(adapt_state_dict(state_dict, model))
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
