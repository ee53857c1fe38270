"""CBAM in any CNN

:func:`add_cbam` puts attention after chosen modules of a network that has none, such that the network computes the same
as before and attention learns from the first step on; :func:`remove_cbam` takes it out again.
"""
import re
from collections import Counter
from contextlib import nullcontext
from fnmatch import fnmatchcase
from typing import Any, Callable, Dict, Final, FrozenSet, Iterable, List, NamedTuple, Optional, Set, Tuple, Union

import torch
from timm.layers import BatchNormAct2d, ConvNormAct, GroupNorm, GroupNorm1, LayerNorm2d
from timm.layers.cbam import CbamModule, LightCbamModule
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torchvision.models.regnet import ResBottleneckBlock

from .layers import Cbam
from .observe import observed
from .weights import open_gates

__all__ = ['WithCbam', 'add_cbam', 'remove_cbam']

Where = Union[None, str, Iterable[str], Callable[[str, nn.Module], bool]]

# Layers of which the output is multiplied by a factor where their weight and bias are. Subclasses may use the weight in
# another way (standardised, reparametrised, with an activation after it).
_AFFINE = (
    nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.GroupNorm, GroupNorm,
    GroupNorm1, LayerNorm2d)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)
_SHORTCUTS = ('downsample', 'shortcut')  # what residual blocks call it
_BRANCH = re.compile(r'(conv|bn|norm)\d|se|se_module|attn_last')  # what they call the modules that may end the branch


class WithCbam(nn.Module):
    """A module with attention after it, in the module's place.

    ``F = module(x)``, ``y = scale * Cbam(F)``. The scale is 1 where the module's own weight and bias have been
    multiplied by `folded`, which makes up for the gates of 1/2 that attention starts with.

    What the module was made with (`out_channels`, `grad_checkpointing`, its parts and methods) is read and set through
    either of them, for code that looks at it. Its weights are the module's alone, so that nobody who goes through all
    modules meets them twice, and what is attached later belongs to the one that it was attached to.

    Shape:
        - Input: that of the module
        - Output: (B, C, H, W)
    """
    scale: Final[float]

    def __init__(self, module: nn.Module, cbam: Cbam, scale: float, folded: float) -> None:
        """
        Args:
            module: Module with an output of shape (B, C, H, W).
            cbam: Attention for C channels.
            scale: Factor of the output.
            folded: Factor that the module's weight and bias have been multiplied by.
        """
        super().__init__()
        self.training = module.training
        self.scale = scale
        self.folded = folded
        self.cbam = cbam.train(module.training)
        self.module = module
        made_with = (*vars(module), *module._modules)
        # underscores are PyTorch's and other tools'; last, from here on these attributes are the module's
        self.shared = tuple(name for name in made_with if name[0] != '_' and not hasattr(self, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.cbam(self.module(x))
        if self.scale != 1.:
            x = x * self.scale
        return x

    def _is_shared(self, name: str) -> bool:
        # before it is unpickled or copied there is nothing yet
        module = self.__dict__.get('_modules', {}).get('module')
        return name in self.__dict__.get('shared', ()) or (name[0] != '_' and hasattr(type(module), name))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not self._is_shared(name):
                raise
            return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ or hasattr(type(self), name) or not self._is_shared(name):
            super().__setattr__(name, value)
        else:
            setattr(self.module, name, value)


class _Call(NamedTuple):
    """What a module did in the forward pass."""
    module: nn.Module
    inputs: int
    output: str  # class and shape
    shape: Optional[torch.Size]  # of an output that is a tensor
    device: Optional[torch.device]
    dtype: Optional[torch.dtype]
    sources: FrozenSet[int]  # earlier calls that the inputs were computed from, if they were followed

    @property
    def is_map(self) -> bool:
        return self.shape is not None and len(self.shape) == 4


class _Follow(TorchFunctionMode):
    """Notes on every tensor which calls of modules it was computed from, in `sources`."""

    def __torch_function__(self, func: Callable, types: Any, args: Tuple = (), kwargs: Optional[Dict] = None) -> Any:
        output = func(*args, **(kwargs or {}))
        sources = _sources((args, kwargs))
        if sources:
            _add_sources(output, sources)
        return output


def _sources(values: Any) -> FrozenSet[int]:
    return frozenset().union(*(
        getattr(t, 'sources', ()) for t in tree_leaves(values) if isinstance(t, torch.Tensor)))


def _add_sources(values: Any, sources: FrozenSet[int]) -> None:
    for t in tree_leaves(values):
        if isinstance(t, torch.Tensor) and not isinstance(t, nn.Parameter):
            t.sources = getattr(t, 'sources', frozenset()) | sources


def _run(model: nn.Module, example: Any, follow: bool = False) -> List[_Call]:
    """Record the calls of all modules in the order in which they return, and leave no trace in the model.

    With `follow` also which of them the inputs of each come from.
    """
    if example is None:
        cfg = getattr(model, 'pretrained_cfg', None) or {}
        example = next(model.parameters(), torch.empty(0)).new_zeros(1, *cfg.get('input_size', (3, 224, 224)))
    calls: List[_Call] = []

    def record(m: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any], output: Any) -> None:
        is_tensor = isinstance(output, torch.Tensor)
        description = f'a tensor of shape {tuple(output.shape)}' if is_tensor else f'a {type(output).__name__}'
        tensor = (output.shape, output.device, output.dtype) if is_tensor else (None, None, None)
        sources = _sources((args, kwargs))
        if follow:
            _add_sources(output, sources | {len(calls)})
        calls.append(_Call(m, len(args) + len(kwargs), description, *tensor, sources))

    try:
        with observed(model) as handles, _Follow() if follow else nullcontext():
            # TorchScript takes no hooks, and calls no modules
            modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
            handles += [m.register_forward_hook(record, with_kwargs=True) for m in modules]
            model(*example) if isinstance(example, tuple) else model(example)
    except Exception as e:  # whatever a model does with an input that it is not made for
        given = f'of shape {tuple(example.shape)}' if isinstance(example, torch.Tensor) else repr(type(example))
        raise ValueError(
            f'{type(model).__name__} fails on the example {given}: {type(e).__name__}: {e}\n'
            f'Pass example=..., an input that the model takes, or a tuple of its arguments.') from e
    return calls


def _branch_ends(model: nn.Module) -> List[nn.Module]:
    """Ends of the residual branches of ResNet-like networks, nothing for others.

    A residual block has a child conv1 and a shortcut, which some blocks of the class may lack. Its branch ends with the
    last of its convolutions, norms and attention.
    """
    def is_residual(m: nn.Module) -> bool:
        return 'conv1' in m._modules and any(hasattr(m, name) for name in _SHORTCUTS)

    classes = {type(m) for m in model.modules() if is_residual(m)}
    ends = []
    for m in model.modules():
        if isinstance(m, ResBottleneckBlock):
            ends.append(m.f)
        elif type(m) in classes:
            ends.append([child for name, child in m.named_children() if _BRANCH.fullmatch(name)][-1])
    return ends


def _timm_stages(model: nn.Module) -> List[nn.Module]:
    """Modules that timm's feature_info names, nothing for models without."""
    for network in model.modules():  # timm's model may be a part of the model
        info = getattr(network, 'feature_info', None)
        if not info or callable(info):
            continue
        info = info if isinstance(info, list) else info.get_dicts()
        modules = dict(network.named_modules())
        # features_only=True flattens names
        names = [name for d in info for name in (d['module'], d['module'].replace('.', '_')) if name in modules]
        if names:
            return [modules[name] for name in names if not isinstance(modules[name], _POOLS)]
    return []


def _chain(calls: List[_Call], candidates: List[int]) -> List[int]:
    """The longest sequence of the candidates in which each was computed from the one before."""
    before: Dict[int, Optional[int]] = {}
    length: Dict[int, int] = {}
    for i in candidates:
        before[i] = max((j for j in before if j in calls[i].sources), default=None)
        length[i] = 1 + length.get(before[i], 0)
    chain = []
    last = max(length, key=length.__getitem__, default=None)
    while last is not None:
        chain.append(last)
        last = before[last]
    return chain[::-1]


def _resolution_ends(model: nn.Module, calls: List[_Call]) -> List[nn.Module]:
    """The children after which the resolution changes, of the module in which it changes most often.

    Only children that feed each other count: not heads that look at several maps each for itself, and not the
    embedding in front of a transformer, which feeds no map.
    """
    best: List[nn.Module] = []
    for parent in model.modules():
        children = set(parent.children())
        maps = [i for i, c in enumerate(calls) if c.module in children and c.is_map and c.shape[2:].numel() > 1]
        chain = _chain(calls, maps)
        if len(chain) < 2:
            continue
        runs: List[List[_Call]] = []  # children that follow each other with the same resolution
        for call in (calls[i] for i in chain):
            if not runs or runs[-1][-1].shape[2:] != call.shape[2:]:
                runs.append([])
            runs[-1].append(call)
        # what has no weights (a pooling after the last stage) is no stage
        ends = [run[-1].module for run in runs if any(next(c.module.parameters(), None) is not None for c in run)]
        if len(ends) > len(best):
            best = ends
    return best


def _default_places(model: nn.Module, example: Any) -> List[nn.Module]:
    if any(isinstance(m, (torch.fx.GraphModule, torch.jit.ScriptModule)) for m in model.modules()):
        raise ValueError(
            f'{type(model).__name__} is, or has in it, a traced or exported graph, which shows no blocks and stages. '
            f'Call add_cbam before, or pass where=..., names of modules that the graph calls.')
    chosen = _branch_ends(model) or _timm_stages(model) or _resolution_ends(model, _run(model, example, follow=True))
    if not chosen:
        raise ValueError(f'{type(model).__name__} has no stages with maps of shape (B, C, H, W). Pass where=...')
    return chosen


def _choose(model: nn.Module, where: Where, example: Any) -> List[nn.Module]:
    if where is None:
        return _default_places(model, example)
    named = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    if callable(where):
        chosen = [m for name, m in named.items() if where(name, m)]
        if not chosen:
            raise ValueError(f'where={where} chooses none of the {len(named)} modules of {type(model).__name__}.')
        return chosen
    patterns = [where] if isinstance(where, str) else list(where)
    chosen = []
    for pattern in patterns:
        matched = [m for name, m in named.items() if name == pattern or fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(
                f'where={pattern!r} matches no module of {type(model).__name__}. It takes names and globs of '
                f'model.named_modules(), the first of which are {", ".join(list(named)[:8])}, ...')
        chosen += matched
    if not chosen:
        raise ValueError('where=[] chooses nothing. Leave it out for the default places.')
    return chosen


def _end(module: nn.Module, times: Counter) -> nn.Module:
    """The last module in a sequence, which stays a sequence then for code that iterates over it."""
    while True:
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module):
            last = module[-1]
        elif type(module) is ConvNormAct and module.aa is None:
            last = module.bn
        else:
            return module
        if times[last] > 1 or module._forward_hooks:
            return module
        module = last


def _is_affine(module: nn.Module, times: Counter) -> bool:
    """Whether to multiply the weight and bias is to multiply the output, and nothing else."""
    plain = type(module) in _AFFINE or (
        type(module) is BatchNormAct2d and isinstance(module.act, nn.Identity) and isinstance(module.drop, nn.Identity))
    return (
        plain and module.weight is not None and not module._forward_hooks and not module._forward_pre_hooks
        and all(times[p] == 1 for p in module.parameters()))


_PARALLEL = {'DistributedDataParallel', 'FullyShardedDataParallel', 'FSDPModule', 'DeepSpeedEngine'}


def _check_model(model: nn.Module) -> None:
    """Check what would not show in the forward pass: whether modules that are put in now can be trained.

    Raises:
        ValueError: If they cannot.
    """
    for m in model.modules():
        names = _PARALLEL & {c.__name__ for c in type(m).__mro__}
        if names or getattr(m, '_is_replica', False):
            by = next(iter(names), 'DataParallel (it is a replica)')
            raise ValueError(
                f'{type(model).__name__} is wrapped by {by}, which does not know weights that come later, so that they '
                f'would drift apart. Call add_cbam before wrapping.')
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise ValueError(
            f'{type(model).__name__} has, or would get, weights made under torch.inference_mode(), which can never be '
            f'trained. Make the model and call add_cbam outside of it (torch.no_grad() is fine).')


def _check(place: nn.Module, name: str, calls: List[_Call]) -> _Call:
    """Find the call of a place and check that attention can follow it.

    Raises:
        ValueError: If it cannot.
    """
    own = [call for call in calls if call.module is place]
    if not own:
        raise ValueError(f'{name} is not called in the forward pass of the example, so that its channels are unknown.')
    for call in own:
        if call.inputs != 1 or not call.is_map:
            raise ValueError(
                f'{name} ({type(place).__name__}) takes {call.inputs} arguments and returns {call.output}; CBAM can '
                f'only follow modules with one argument that return a map of shape (B, C, H, W).')
        if call.shape[1] == call.shape[2] != call.shape[3]:
            raise ValueError(
                f'{name} ({type(place).__name__}) returns {call.output}, which looks like (B, H, W, C); CBAM needs '
                f'(B, C, H, W). If that is what it is, pass an example of another size.')
        if call.shape[1] != own[0].shape[1]:
            raise ValueError(
                f'{name} ({type(place).__name__}) is used for maps of {own[0].shape[1]} and {call.shape[1]} channels, '
                f'CBAM can only follow modules whose outputs have as many channels every time.')
    return own[0]


def _attended(model: nn.Module) -> Set[nn.Module]:
    """All modules that have attention right after them, and those of attention itself."""
    attended: Set[nn.Module] = set()
    for m in model.modules():
        if isinstance(m, (Cbam, CbamModule, LightCbamModule)):
            attended.update(m.modules())
        elif isinstance(m, WithCbam):
            attended.update((m, m.module))
    return attended


@torch.no_grad()
def _scale(module: nn.Module, factor: float) -> None:
    if factor != 1.:
        for p in module.parameters():
            p.mul_(factor)


def _replace(model: nn.Module, replacements: Dict[nn.Module, nn.Module]) -> None:
    """Put modules into the places of others, under all names that these have."""
    parents = [(p, name, child) for p in model.modules() for name, child in p._modules.items()]
    for parent, name, child in parents:
        if child in replacements:
            parent.register_module(name, replacements[child])


def add_cbam(
        model: nn.Module,
        where: Where = None,
        *,
        example: Any = None,
        dry_run: bool = False,
        **cbam_args,
) -> List[str]:
    """Put attention after modules of a network, in place, such that the network computes the same as before.

    Every gate starts at ``sigmoid(0) = 1/2``: the last layer of the MLP and the spatial kernel are zero. The factor
    that makes up for both gates, 4, is multiplied into weight and bias of the module where it is a plain convolution
    or norm, ``y = Cbam(4 F)``, and is otherwise held by its :class:`WithCbam`, ``y = 4 Cbam(F)``. Powers of two are
    exact, so that outputs are equal bit for bit, in eval and train mode, as long as 4 F does not overflow. Gradients
    reach the zeros at the first step and all weights from the second on.

    Without `where` CBAM stands at the end of every residual branch as in the paper (section 4: ResNet, ResNeXt, RegNet
    ... of timm, torchvision or others whose blocks have `conv1` and `downsample` or `shortcut`). In other
    networks it stands at the end of every stage: those of timm's `feature_info`, or, in models without, the children
    that feed each other and after which the resolution changes, of the module in which it changes most often.

    Names in the state dict change from ``NAME.weight`` to ``NAME.module.weight``, so load weights before, and make the
    optimizer afterwards. Hooks on the modules stay where they are, before attention.

    Args:
        model: CNN with maps of shape (B, C, H, W).
        where: Names of modules, globs (``*`` matches dots, too), or a predicate of name and module. Of an
            `nn.Sequential` the last module is meant.
        example: Input with which the network is run once to find out the channels, in eval mode and without gradients;
            a tuple for several arguments. The size in the model's pretrained_cfg, or (1, 3, 224, 224), if None.
        dry_run: Check and list the places only.
        **cbam_args: Arguments of :class:`timm_cbam.Cbam`. Every place has at least one hidden channel. Where there are
            few channels choose a larger rd_ratio: 32 have two hidden ones by default, and if both are dead from the
            start the channel attention never learns.

    Returns:
        Names of the modules that CBAM follows.

    Raises:
        ValueError: If a name or pattern matches nothing, or CBAM cannot follow one of the modules: it returns no map,
            is not called, or has a CBAM already. Also if a gate is no power of two at zero, the example does not fit,
            or Cbam refuses its arguments, if the model is wrapped for several processes, was made in inference mode, or
            is a traced graph, for which there are no default places. The model is unchanged then.

    Example:
        >>> model = timm.create_model('resnet10t').eval()
        >>> x = torch.randn(1, 3, 64, 64)
        >>> before = model(x)
        >>> add_cbam(model, ['layer3', 'layer4'])
        ['layer3.0', 'layer4.0']
        >>> torch.equal(model(x), before)
        True
    """
    _check_model(model)
    calls = _run(model, example)
    times: Counter = Counter(m for parent in model.modules() for m in parent._modules.values())
    times.update(p for m in model.modules() for p in m._parameters.values())
    places = {_end(m, times) for m in _choose(model, where, example)}
    taken = _attended(model)
    wrappers: Dict[nn.Module, WithCbam] = {}
    names = []
    for name, place in model.named_modules():
        if place not in places:
            continue
        if place in taken:
            raise ValueError(f'{name} has a CBAM already, or is a part of one. Choose others, or first remove_cbam.')
        call = _check(place, name, calls)
        # one hidden channel is the least that a place can have
        narrow = dict(rd_channels=1) if 0 < call.shape[1] * cbam_args.get('rd_ratio', 1 / 16) < 1 else {}
        try:
            cbam = Cbam(call.shape[1], **{'device': call.device, 'dtype': call.dtype, **narrow, **cbam_args})
            gates, factor = open_gates(cbam)
        except (ValueError, RuntimeError) as e:
            raise ValueError(f'No CBAM after {name}: {e}') from e
        cbam.load_state_dict(gates)
        affine = _is_affine(place, times)
        wrappers[place] = WithCbam(place, cbam, 1. if affine else factor, factor if affine else 1.)
        names.append(name)
    if not dry_run:
        for wrapper in wrappers.values():
            _scale(wrapper.module, wrapper.folded)
        _replace(model, wrappers)
    return names


def remove_cbam(model: nn.Module) -> List[str]:
    """Take out what :func:`add_cbam` has put into a network, in place.

    Without training in between, the state dict is bit for bit what it was before. What attention has learned is lost,
    the network then computes something else.

    Args:
        model: Network with or without attention.

    Returns:
        Names of the modules that CBAM followed.

    Example:
        >>> model = timm.create_model('resnet10t')
        >>> add_cbam(model, 'layer4')
        ['layer4.0']
        >>> remove_cbam(model)
        ['layer4.0']
        >>> remove_cbam(model)
        []
    """
    wrappers = [m for m in model.modules() if isinstance(m, WithCbam)]
    for wrapper in wrappers:
        _scale(wrapper.module, 1 / wrapper.folded)
        _replace(model, {wrapper: wrapper.module})
    modules = {wrapper.module for wrapper in wrappers}
    return [name for name, m in model.named_modules() if m in modules]
