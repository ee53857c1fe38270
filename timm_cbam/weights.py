"""State-dict layouts of CBAM-ResNets

Every published CBAM-ResNet names its weights in its own way. The table below says how each is recognised and renamed;
what is left to convert are the MLP's linear weights (here 1x1 convolutions), the order in which the spatial attention
concatenates its two poolings (here average, maximum, as in the paper's equation 3), and a bias of its convolution.

The weights of a plain ResNet get gates that let everything through, see :func:`_warm_start`.
"""
import copy
import logging
import math
import re
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import nn

from .layers import Cbam, ChannelAttention, SpatialAttention
from .unwrap import Weights, replace_parts, shorten, unwrap

_logger = logging.getLogger(__name__)

__all__ = ['adapt_on_load', 'convert_state_dict']


class Layout(NamedTuple):
    name: str
    family: str  # such a checkpoint fits cbam_resnet*<family>
    mark: str  # pattern found in this layout's keys only; its group `at` is what blocks call the module with both gates
    # Parts of keys, theirs and ours; ^ is where a key begins. Of several of theirs the first is written.
    names: Tuple[Tuple[str, str], ...] = ()
    max_first: bool = False  # the spatial attention concatenates maximum, average
    linear: bool = False  # the MLP's weights are 2-d
    at: str = ''  # in place of {at} in names
    reason: str = ''  # why no model here computes what such a checkpoint does

    @property
    def parts(self) -> List[Tuple[str, str]]:
        return [(theirs.format(at=self.at), ours) for theirs, ours in self.names]


_BLOCK = r'layer\d+\.\d+\.'
_AT = rf'^{_BLOCK}(?P<at>(?:\w+\.)?)'

LAYOUTS = {
    'article': Layout(
        'the reproduction article',
        '_s1',
        rf'^{_BLOCK}channel\.fc1\.',
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
        rf'{_AT}ca\.fc\.0\.',
        (
            ('.{at}ca.fc.0.', '.se.channel.fc1.'),
            ('.{at}ca.fc.2.', '.se.channel.fc2.'),
            ('.{at}sa.conv1.', '.se.spatial.conv.'),
            ('.{at}sa.conv.', '.se.spatial.conv.'),
        ),
    ),
    'community_fc1': Layout(
        'luuuyi/CBAM.PyTorch in its first form, which most code has copied',
        '',
        rf'{_AT}ca\.fc1\.',
        (
            ('.{at}ca.fc1.', '.se.channel.fc1.'),
            ('.{at}ca.fc2.', '.se.channel.fc2.'),
            ('.{at}sa.conv1.', '.se.spatial.conv.'),
            ('.{at}sa.conv.', '.se.spatial.conv.'),
        ),
    ),
    'channelattention': Layout(
        'the cbam_block of channelattention and spatialattention',
        '',
        rf'{_AT}channel_?attention\.fc(1|2|\.0|\.2)\.',
        (
            ('.{at}channelattention.fc1.', '.se.channel.fc1.'),
            ('.{at}channelattention.fc2.', '.se.channel.fc2.'),
            ('.{at}channelattention.fc.0.', '.se.channel.fc1.'),
            ('.{at}channelattention.fc.2.', '.se.channel.fc2.'),
            ('.{at}spatialattention.conv1.', '.se.spatial.conv.'),
            ('.{at}spatialattention.conv.', '.se.spatial.conv.'),
            ('.{at}channel_attention.fc1.', '.se.channel.fc1.'),
            ('.{at}channel_attention.fc2.', '.se.channel.fc2.'),
            ('.{at}channel_attention.fc.0.', '.se.channel.fc1.'),
            ('.{at}channel_attention.fc.2.', '.se.channel.fc2.'),
            ('.{at}spatial_attention.conv1.', '.se.spatial.conv.'),
            ('.{at}spatial_attention.conv.', '.se.spatial.conv.'),
        ),
        at='cbam.',
    ),
    'official': Layout(
        'Jongchan/attention-module (the authors)',
        '_eccv18',
        rf'{_AT}ChannelGate\.',
        (
            ('.{at}ChannelGate.mlp.1.', '.se.channel.fc1.'),
            ('.{at}ChannelGate.mlp.3.', '.se.channel.fc2.'),
            ('.{at}SpatialGate.spatial.', '.se.spatial.'),
        ),
        max_first=True,
        linear=True,
        at='cbam.',
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
    'elbuco1': Layout(
        'elbuco1/CBAM',
        '_s1 with cbam_args=dict(mlp_bias=True, spatial_norm=True, rd_ratio=..., kernel_size=...)',
        rf'{_AT}channel_attention\.bottleneck\.',
        (
            ('.{at}channel_attention.bottleneck.0.', '.se.channel.fc1.'),
            ('.{at}channel_attention.bottleneck.2.', '.se.channel.fc2.'),
            ('.{at}spatial_attention.conv.', '.se.spatial.conv.'),
            ('.shortcut.', '.downsample.'),
            ('^linear.', '^fc.'),
        ),
        max_first=True,
        linear=True,
        at='cbam.',
    ),
    'peachypie98': Layout(
        'Peachypie98/CBAM', '', rf'{_AT}cam\.linear_(max|avg)\.',
        reason='it adds the input of the attention to its output, and has an MLP for each of the poolings',
    ),
    'ultralytics': Layout(
        "Ultralytics' CBAM", '', rf'{_AT}(channel_attention\.fc\.(weight|bias)$|spatial_attention\.cv1\.)',
        reason='its channel attention is one C x C convolution of the average, without the maximum and a hidden layer',
    ),
    'ugenteraan': Layout(
        'Ugenteraan/ResNet-50-CBAM-PyTorch', '', rf'{_AT}(identity_connection|channel_attention\.shared_mlp)\.',
        reason='its blocks stride in their first 1x1 convolution, here in the 3x3',
    ),
    'network': Layout(
        'a ResNet with attention between its stages', '', r'^/?(ca|sa|cbam)_?\d*\.',
        reason='its attention stands after the stem or a stage, here in every block',
    ),
    'se': Layout(
        'an SE-ResNet', '', rf'^{_BLOCK}se\.(fc1|fc2|fc|conv_reduce|conv_expand)\.',
        reason='its attention is another, of the average of each channel only',
    ),
}

_MLP_WEIGHT = r'\.se\.channel\.fc[12]\.weight$'
_SPATIAL_WEIGHT = '.se.spatial.conv.weight'
_SPATIAL_BIAS = '.se.spatial.conv.bias'
# Weight and variance with which a batch-norm with eps=1e-5 multiplies by 1, to 4e-15: both are exact in float32
_UNIT_NORM = 1.2529171705245972, 1.5697914361953735
# A ResNet's children in an nn.Sequential, as in fastai and feature extractors; 2 and 3 have no weights
_SEQUENTIAL = (('^0.', '^conv1.'), ('^1.', '^bn1.'), *((f'^{i + 3}.', f'^layer{i}.') for i in range(1, 5)))

# A classifier, of any name, is no attention.
_HEAD = (
    r'/?((fc|head|heads|classifier|cls|linear|last_linear|output|logits|projector|projection_head|predictor)\d*\.|'
    r'\d+\.(\d+\.)?(weight|bias|running_mean|running_var|num_batches_tracked)$)')
# What ResNets of timm and torchvision have
_PLAIN = re.compile(rf'({_BLOCK})?(conv|bn|act)\d\.|{_BLOCK}downsample\.|maxpool\.|{_HEAD}')


def find_layout(state_dict: Mapping[str, Any]) -> Optional[Layout]:
    """Which of the layouts above the names are in, with the name that blocks give to their attention."""
    for layout in sorted(LAYOUTS.values(), key=lambda layout: not layout.reason):
        mark = re.compile(layout.mark)
        match = next(filter(None, map(mark.search, state_dict)), None)
        if match:
            return layout._replace(at=match.groupdict().get('at', layout.at))
    return None


def _has_own_attention(state_dict: Mapping[str, Any]) -> bool:
    return any('.se.channel.' in key or '.se.spatial.' in key for key in state_dict)


def _has_blocks(state_dict: Mapping[str, Any]) -> bool:
    return any(re.match(_BLOCK, key) for key in state_dict)


def _foreign_keys(state_dict: Mapping[str, Any]) -> List[str]:
    """Keys that a plain ResNet does not have."""
    return [key for key in state_dict if not _PLAIN.match(key)]


def is_plain_resnet(state_dict: Mapping[str, Any]) -> bool:
    """Whether these are weights of a plain ResNet, of all or some of its blocks, and nothing else."""
    return _has_blocks(state_dict) and not _foreign_keys(state_dict)


class Found(NamedTuple):
    """Weights of a checkpoint with this package's names, and what they were."""
    weights: Weights
    layout: Optional[Layout]
    is_plain: bool

    @property
    def values(self) -> Dict[str, Any]:
        return self.weights.values

    @property
    def is_lost(self) -> bool:
        """Whether there is attention in it that no model here has."""
        unknown = _has_blocks(self.values) and not _has_own_attention(self.values) and not self.is_plain
        return unknown or bool(self.layout and self.layout.reason)

    def describe(self) -> str:
        """What it is, in words that follow 'from'."""
        if self.layout is not None:
            return f'a checkpoint of {self.layout.name}'
        return 'a plain ResNet' if self.is_plain else "a checkpoint in this package's own layout"

    def explain(self) -> str:
        """Say in a sentence what it looks like, for error messages."""
        values, names = self.values, [self.weights.theirs(key) for key in self.values]
        if self.layout is not None and self.layout.reason:
            return (
                f'The state dict looks like {self.layout.name}, which no model here computes: {self.layout.reason}.')
        if self.layout is not None:
            return f'The state dict has the layout of {self.layout.name}, which fits cbam_resnet*{self.layout.family}.'
        if _has_own_attention(values):
            return "The state dict has this package's layout, of another depth, stem or cbam_args."
        if self.is_plain:
            return 'The state dict looks like a plain ResNet, of another depth, width or stem.'
        if _has_blocks(values):
            unknown = _foreign_keys(values)
            in_blocks = [key for key in unknown if re.match(_BLOCK, key)]
            what = 'attention of a layout that is not known' if in_blocks else 'more in it than a ResNet has'
            unknown = [self.weights.theirs(key) for key in in_blocks or unknown]
            return f'The state dict is that of a ResNet with {what}: {shorten(unknown)}.'
        return f'The state dict has no layout of a CBAM-ResNet, its keys are {shorten(names, 4)}.'


def _own_shapes(model: Optional[nn.Module]) -> Dict[str, torch.Size]:
    """Names and shapes in the model's state dict; that itself would have wrappers gather their parts."""
    shapes = {}
    for prefix, m in model.named_modules(remove_duplicate=False) if model is not None else ():
        buffers = {k: b for k, b in m._buffers.items() if k not in m._non_persistent_buffers_set}
        for name, tensor in (*m._parameters.items(), *buffers.items()):
            if tensor is not None:
                shapes[f'{prefix}.{name}' if prefix else name] = tensor.shape
    return shapes


def _name(weights: Weights, own: Mapping[str, torch.Size]) -> Found:
    """Give weights this package's names."""
    if not _has_blocks(weights.values) and any(re.match(r'[4-7]\.\d+\.(conv|bn)\d\.', key) for key in weights.values):
        weights.replace(_SEQUENTIAL)
    layout = find_layout(weights.values)
    weights.replace([*(layout.parts if layout is not None else ()), ('.shortcut.', '.downsample.')])
    found = Found(weights, layout, is_plain_resnet(weights.values))
    _name_head(weights, own)
    return found


def _form(found: Found, own: Mapping[str, torch.Size], max_first: Optional[bool] = None) -> Found:
    """Give weights of this package's names its form."""
    weights = found.weights
    if max_first is None:
        max_first = found.layout is not None and found.layout.max_first
    for key, value in list(weights.values.items()):
        if re.search(_MLP_WEIGHT, key) and value.ndim == 2:
            weights.values[key] = value[:, :, None, None]
        elif max_first and key.endswith(_SPATIAL_WEIGHT):
            weights.values[key] = value.flip(1)
        elif key.endswith(_SPATIAL_BIAS) and key not in own:
            _norm_of_bias(weights, key)
    return found


def _norm_of_bias(weights: Weights, key: str) -> None:
    """Make a bias of the spatial convolution that of a batch-norm which does nothing else (in eval mode)."""
    bias, origin = weights.values.pop(key), weights.origin.pop(key)
    bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
    norm = dict(
        weight=torch.full_like(bias, _UNIT_NORM[0]), bias=bias, running_mean=torch.zeros_like(bias),
        running_var=torch.full_like(bias, _UNIT_NORM[1]), num_batches_tracked=torch.tensor(0, device=bias.device))
    for name, value in norm.items():
        new = key.replace('.conv.bias', f'.bn.{name}')
        weights.values[new], weights.origin[new] = value, origin


def _name_head(weights: Weights, own: Mapping[str, torch.Size]) -> None:
    """Take a classifier of one linear layer as ours, whatever its name is."""
    head = [key for key in weights.values if re.match(_HEAD, key) and key not in own]
    name = head[0].rpartition('.')[0] if head else 'fc'
    if name.startswith(('proj', 'predictor')):  # of self-supervised training, which classify nothing
        return
    weight = weights.values.get(f'{name}.weight')
    if name == 'fc' or 'fc.weight' in weights.values or not {*head} <= {f'{name}.weight', f'{name}.bias'}:
        return
    if weight is None or weight.ndim != 2 or own and own.get('fc.weight') != weight.shape:
        return
    weights.notes.append(
        f'{weights.theirs(f"{name}.weight")} is taken for the weight of the classifier, fc: nothing but '
        f'dropout is assumed to stand before it')
    weights.replace([(f'^{name}.', '^fc.')])


def find_weights(
        checkpoint: Mapping[Any, Any],
        model: Optional[nn.Module] = None,
        prefix: Optional[str] = None,
        max_first: Optional[bool] = None,
) -> Found:
    """Find the weights in a checkpoint, and give those of any known layout this package's names and form.

    Args:
        checkpoint: State dict, or what is saved around one.
        model: Model that they are meant for, if there is one.
        prefix: Which weights to take, where there are those of several networks.
        max_first: Whether the spatial attention concatenates maximum, average. By the layout, if None.

    Raises:
        RuntimeError: If it is not clear which weights are meant, or they are quantized.
    """
    own = _own_shapes(model)

    def fits(weights: Weights) -> bool:
        found = _form(_name(weights, own), own)
        needed = [
            key for key in own
            if not key.startswith('fc.') and not key.endswith('num_batches_tracked')
            and not (found.is_plain and '.se.' in key)]
        return all(
            key in found.values and (key.startswith('conv1') or tuple(found.values[key].shape) == tuple(own[key]))
            for key in needed)

    return _form(_name(unwrap(checkpoint, own, fits, prefix), own), own, max_first)


def name_weights(checkpoint: Mapping[Any, Any], prefix: Optional[str] = None) -> Found:
    """Give the weights in a checkpoint this package's names, and leave their values as they are."""
    return _name(unwrap(checkpoint, prefix=prefix), {})


def from_native_layout(state_dict: Mapping[str, torch.Tensor], layout: Layout) -> Dict[str, torch.Tensor]:
    """The inverse of :func:`find_weights`, for a state dict of a model that the layout's code can build."""
    out = {}
    names = [(ours, theirs) for theirs, ours in layout.parts]
    for key, value in state_dict.items():
        if layout.linear and re.search(_MLP_WEIGHT, key):
            value = value.flatten(1)
        elif layout.max_first and key.endswith(_SPATIAL_WEIGHT):
            value = value.flip(1)
        out[replace_parts(key, names)] = value
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


def adapt_on_load(
        model: nn.Module,
        state_dict: Dict[str, Any],
        prefix: str,
        local_metadata: Dict[str, Any],
        *args: Any,
) -> None:
    """Convert as :func:`convert_state_dict` does: a hook for `register_load_state_dict_pre_hook`, called at any depth.

    What it changes is the copy of the caller's dict that PyTorch has made for this.
    """
    own = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)} if prefix else dict(state_dict)
    found = find_weights(own, model)
    adapted = found.values
    if found.is_plain:
        adapted = _warm_start(adapted, model, assign=local_metadata.get('assign_to_params_buffers', False))
    for note in found.weights.notes:
        _logger.warning(note)
    if found.is_lost:
        # strict=False raises nothing where attention is lost
        _logger.warning(f'{found.explain()} The attention of the model stays as it is.')
    for key in own:
        del state_dict[prefix + key if prefix else key]
    state_dict.update({prefix + key: value for key, value in adapted.items()})


def explain_misfit(found: Found, model: nn.Module) -> str:
    """Say in a sentence why weights do not fit a model, for error messages."""
    own = _own_shapes(model)
    left_over = [key for key in found.values if key not in own]
    if left_over and all(re.match(_HEAD, key) for key in left_over):
        return (
            f'The state dict differs in its head: it has {shorten([found.weights.theirs(k) for k in left_over])}, the '
            f'model one linear layer, fc. Leave these keys out to start with a new one (strict=False).')
    return found.explain()


def fit_weights(found: Found, model: nn.Module) -> Dict[str, torch.Tensor]:
    """Make what was found complete for a model, see :func:`convert_state_dict`."""
    out = _warm_start(found.values, model, assign=False) if found.is_plain else found.values
    expected = model.state_dict()
    head = model.get_classifier(name_only=True)
    optional = {f'{head}.weight', f'{head}.bias'}
    # BatchNorm2d itself fills in counters, which checkpoints from before PyTorch 0.4.1 do not have
    missing = [k for k in expected if k not in out and k not in optional and not k.endswith('num_batches_tracked')]
    left_over = [k for k in out if k not in expected and k not in optional]
    if missing or left_over:
        theirs = [list(dict.fromkeys(map(found.weights.theirs, keys))) for keys in (missing, left_over)]
        raise RuntimeError(
            f'The state dict does not fit {type(model).__name__}. {explain_misfit(found, model)}\n'
            f'\tMissing: {shorten(theirs[0])}\n\tLeft over: {shorten(theirs[1])}')
    return out


def convert_state_dict(
        state_dict: Mapping[Any, Any],
        model: nn.Module,
        prefix: Optional[str] = None,
) -> Dict[str, torch.Tensor]:
    """Convert a checkpoint of any known CBAM-ResNet layout for a model of this package.

    Known are the layouts of this package, the reproduction article, luuuyi/CBAM.PyTorch and its copies,
    Jongchan/attention-module (the authors' code), pytorchcv, elbuco1/CBAM, and timm's ``attn_layer='cbam'``. A plain
    ResNet's (timm's, torchvision's) is completed with gates such that the model computes exactly what the ResNet does.
    The classifier may be missing and tensors may have other shapes than the model's, so that timm's adaptation to other
    ``num_classes`` and ``in_chans`` can follow.

    Args:
        state_dict: State dict, also within what training code saves around one, and with prefixes before its keys.
        model: Model that the state dict is meant for.
        prefix: Which weights to take where there are those of several networks, ``'teacher.'``.

    Returns:
        State dict with the model's names.

    Raises:
        RuntimeError: If weights of the model are missing or others are left over; says which layout it looks like.
            Also if it is not clear which weights are meant, and if a plain ResNet cannot be continued exactly, because
            of the stem, gate_layer or norm_layer.

    Example:
        >>> resnet, model = timm.create_model('resnet18').eval(), timm.create_model('cbam_resnet18').eval()
        >>> state_dict = convert_state_dict({'epoch': 3, 'state_dict': resnet.state_dict()}, model)
        >>> model.load_state_dict(state_dict)
        <All keys matched successfully>
        >>> x = torch.randn(1, 3, 64, 64)
        >>> torch.equal(model(x), resnet(x))
        True
    """
    found = find_weights(state_dict, model, prefix)
    out = fit_weights(found, model)
    for note in found.weights.notes:
        _logger.warning(note)
    return out
