"""Weights out of what is saved around them

A checkpoint holds a network's weights in some container, under some prefix, with other things beside them. Neither is
looked up in a list: what is looked for is a ResNet's blocks, and what stands before and around them is the wrapping.
The rest must be accounted for, so that nothing is lost in silence.
"""
import re
from collections import Counter
from typing import Any, Callable, Collection, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import numpy as np
import torch

__all__ = ['Weights', 'replace_parts', 'shorten', 'unwrap']

# How a block's weights begin: in timm, torchvision and most code; in pytorchcv; where a ResNet's children were put into
# an nn.Sequential, as fastai does. Groups are what stands before.
_BLOCKS = (
    re.compile(r'((?:.*\.)?)layer\d+\.\d+\.'),
    re.compile(r'((?:.*\.)?)features\.stage\d+\.unit\d+\.'),
    re.compile(r'((?:.*\.)?)[4-7]\.\d+\.(?:conv|bn)\d\.'),
)
# What torch.compile, FullyShardedDataParallel and activation checkpointing put into names, also in the middle
_WRAPPERS = re.compile(r'(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')
# What is saved with weights and is none: counters of AveragedModel (SWA) and thop, extra state, losses and metrics
_STRAYS = re.compile(r'/?((.*\.)?(n_averaged|total_ops|total_params|_extra_state)|(criterion|loss|loss_fn|metric)\..*)')
# The order in which timm's own loader looks for containers, which gets to see the file first
_CONTAINERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
_DEPTH = 4  # of containers in containers


class Weights:
    """Weights by name, where each comes from, and what there is to say about them."""

    def __init__(self, values: Mapping[str, Any], prefix: str = '') -> None:
        self.values = dict(values)
        self.origin = {key: prefix + key for key in values}  # names in the file
        self.prefix = prefix
        self.notes: List[str] = []
        self._renamed: List[List[Tuple[str, str]]] = []

    def rename(self, new_name: Callable[[str], str]) -> None:
        """Rename all.

        Raises:
            RuntimeError: If two would have one name, so that one of them were lost.
        """
        names = {key: new_name(key) for key in self.values}
        if any(key != name for key, name in names.items()):
            same = [name for name, count in Counter(names.values()).items() if count > 1]
            if same:
                both = ' and '.join(self.origin[key] for key, name in names.items() if name == same[0])
                raise RuntimeError(f'{both} are names of one weight, {same[0]}. Remove what is not meant.')
            self.values = {names[key]: value for key, value in self.values.items()}
            self.origin = {names[key]: name for key, name in self.origin.items()}

    def replace(self, parts: Iterable[Tuple[str, str]]) -> None:
        """Replace parts of names, theirs by ours, see :func:`replace_parts`."""
        used = [(old, new) for old, new in parts if any(old in f'^{key}' for key in self.values)]
        self.rename(lambda key: replace_parts(key, used))
        self._renamed.append(used)

    def theirs(self, key: str) -> str:
        """What a weight of ours is, or would be, called in the file."""
        if key in self.origin:
            return self.origin[key]
        for parts in self._renamed[::-1]:
            key = replace_parts(key, [(new, old) for old, new in parts])
        return self.prefix + key

    def drop(self, keys: Collection[str], why: str) -> None:
        if keys:
            self.notes.append(f'{why}: {shorten([self.origin[key] for key in keys])}')
            for key in keys:
                del self.values[key], self.origin[key]


def replace_parts(key: str, parts: Iterable[Tuple[str, str]]) -> str:
    """Replace parts of a name, where ^ is its beginning."""
    key = f'^{key}'
    for old, new in parts:
        key = key.replace(old, new)
    return key[1:]


class _Candidate(NamedTuple):
    """A place in a checkpoint where there are blocks."""
    path: Tuple[str, ...]  # keys of the containers
    prefix: str
    container: Mapping[str, Any]

    @property
    def name(self) -> str:
        return '.'.join((*self.path, self.prefix))

    @property
    def rank(self) -> int:
        return _CONTAINERS.index(self.path[0]) if self.path and self.path[0] in _CONTAINERS else len(_CONTAINERS)


def shorten(keys: List[str], most: int = 8) -> str:
    rest = f', ... ({len(keys)} in all)' if len(keys) > most else ''
    return (', '.join(keys[:most]) or 'none') + rest


def _is_array(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray))


def _containers(value: Mapping[Any, Any], path: Tuple[str, ...] = ()) -> Iterator[Tuple[Tuple[str, ...], Mapping]]:
    """Mappings that arrays are in, outermost first."""
    if any(isinstance(k, str) and _is_array(v) for k, v in value.items()):
        yield path, value
    if len(path) < _DEPTH:
        for key, inner in value.items():
            if isinstance(key, str) and isinstance(inner, Mapping):
                yield from _containers(inner, (*path, key))


def _candidates(checkpoint: Mapping[Any, Any]) -> List[_Candidate]:
    found = []
    for path, container in _containers(checkpoint):
        prefixes: Dict[str, re.Pattern] = {}  # in their order
        for key, value in container.items():
            if isinstance(key, str) and _is_array(value) and not _STRAYS.fullmatch(key):
                match = next(filter(None, (pattern.match(key) for pattern in _BLOCKS)), None)
                if match:
                    prefixes[match[1]] = match.re
        found += [
            _Candidate(path, prefix, container) for prefix, pattern in prefixes.items()
            # numbers alone say little: the stem has to be there, too
            if pattern is not _BLOCKS[2] or f'{prefix}0.weight' in container or f'{prefix}0.0.weight' in container]
    return found


def _choose(
        candidates: List[_Candidate],
        own_names: Collection[str],
        fits: Callable[[Weights], bool],
        prefix: Optional[str],
) -> List[_Candidate]:
    """Those that may be meant, one if it is clear."""
    if prefix is not None:
        wanted = prefix.rstrip('.')
        chosen = [c for c in candidates if wanted in (c.name.rstrip('.'), c.prefix.rstrip('.'), '.'.join(c.path))]
        if not chosen:
            names = ', '.join(repr(c.name) for c in candidates) or 'no blocks of a ResNet'
            raise RuntimeError(f'There are no blocks under the prefix {prefix!r}. There are: {names}.')
        return chosen
    # a network whose blocks have no prefix is the whole, others in the same container are parts of it
    whole = [id(c.container) for c in candidates if not c.prefix]
    candidates = [c for c in candidates if not c.prefix or id(c.container) not in whole]
    if len(candidates) > 1:
        candidates = [c for c in candidates if fits(_clean(Weights(_under(c)), own_names))] or candidates
    first = min((c.rank for c in candidates), default=0)
    return [c for c in candidates if c.rank == first]


def _under(candidate: _Candidate) -> Dict[str, Any]:
    n = len(candidate.prefix)
    return {k[n:]: v for k, v in candidate.container.items() if isinstance(k, str) and k.startswith(candidate.prefix)}


def _to_tensors(weights: Weights, own_names: Collection[str]) -> None:
    """Make tensors of NumPy's arrays, and drop what is no array, like the epoch."""
    no_weights = []
    for key, value in weights.values.items():
        if isinstance(value, (np.ndarray, np.generic)) or (
                isinstance(value, int) and key.endswith('num_batches_tracked')):
            weights.values[key] = torch.tensor(value)
        elif not isinstance(value, torch.Tensor) and key not in own_names:
            no_weights.append(key)
    weights.drop(no_weights, 'No weights, dropped')
    quantized = [k for k, v in weights.values.items() if k not in own_names and (
        k.endswith(('.zero_point', '_packed_params')) or isinstance(v, torch.Tensor) and v.is_quantized)]
    if quantized:
        raise RuntimeError(
            f'The weights are quantized ({shorten([weights.origin[k] for k in quantized], 3)}), what they were before '
            f'cannot be told. Take the checkpoint from before quantization.')


def _normed(g: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What `weight_norm` computes.

    Raises:
        ValueError: If shapes do not go together, with which PyTorch's own operation writes where it must not.
    """
    if not g.ndim:
        return torch._weight_norm(v, g, -1)
    for dim, size in enumerate(v.shape):
        if g.shape == torch.Size([1] * dim + [size] + [1] * (v.ndim - dim - 1)) and g.dtype == v.dtype:
            return torch._weight_norm(v, g, dim)
    raise ValueError(f'lengths of shape {tuple(g.shape)} for directions of shape {tuple(v.shape)}')


def _spectral_normed(weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What `spectral_norm` computes in eval mode."""
    return weight / torch.dot(u, torch.mv(weight.flatten(1), v))


# Names of a weight that is computed from others: theirs, what they are called without it, and how it is computed
_FOLDS: Tuple[Tuple[Tuple[str, ...], str, Callable[..., torch.Tensor]], ...] = (
    (('{}_orig', '{}_mask'), 'pruned', lambda weight, mask: mask.to(weight.dtype) * weight),
    (('{}_g', '{}_v'), 'weight_norm', _normed),
    (('{}_orig', '{}_u', '{}_v'), 'spectral_norm', _spectral_normed),
)


def _fold(weights: Weights, own_names: Collection[str]) -> None:
    """Compute the weights that a reparametrisation computes from others, as it does."""
    values, origin = weights.values, weights.origin
    done: Dict[str, List[str]] = {}
    split = re.compile(r'\.parametrizations\.(\w+)\.original([01])$')
    parts = {split.sub(lambda m: f'.{m[1]}_{"gv"[int(m[2])]}', key): key for key in values}
    for names, what, compute in _FOLDS:
        suffix = names[0][2:]
        for first in [name for name in parts if name.endswith(suffix)]:
            base = first[:-len(suffix)]
            keys = [parts.get(name.format(base)) for name in names]
            if base in values or not all(key in values and key not in own_names for key in keys):
                continue
            try:
                values[base] = compute(*(values[key] for key in keys))
            except (RuntimeError, ValueError) as e:
                raise RuntimeError(f'{", ".join(origin[key] for key in keys)} do not go together as {what}: {e}') from e
            origin[base] = origin[keys[0]]
            for key in keys:
                del values[key], origin[key]
            done.setdefault(what, []).append(origin[base])
    for what, keys in done.items():
        weights.notes.append(f'{what.capitalize()}, computed as there: {shorten(keys, 3)}')


def _clean(weights: Weights, own_names: Collection[str]) -> Weights:
    """Take away and compute what is no weight of a network, or not yet."""
    weights.rename(lambda key: key if key in own_names else _WRAPPERS.sub('', key))
    foreign = [key for key in weights.values if key not in own_names]
    weights.drop([key for key in foreign if _STRAYS.fullmatch(key)], 'No weights, dropped')
    _to_tensors(weights, own_names)
    _fold(weights, own_names)
    return weights


def unwrap(
        checkpoint: Mapping[Any, Any],
        own_names: Collection[str] = (),
        fits: Callable[[Weights], bool] = lambda weights: True,
        prefix: Optional[str] = None,
) -> Weights:
    """Find the weights of a ResNet of whatever layout in a checkpoint.

    Args:
        checkpoint: State dict, or containers around one, with other things beside it.
        own_names: Names of the model that they are meant for, which are left alone.
        fits: Whether weights fit that model, asked where there are several.
        prefix: Which of several to take: containers' keys and the prefix of names, joined by dots.

    Returns:
        Weights with the names that they have after the prefix.

    Raises:
        RuntimeError: If there are several and none is chosen, none under the prefix, or weights are quantized.
    """
    candidates = _candidates(checkpoint)
    if prefix is None and checkpoint and all(key in own_names for key in checkpoint):
        candidates = []  # nothing is around them
    chosen = _choose(candidates, own_names, fits, prefix)
    if len(chosen) > 1:
        raise RuntimeError(
            f'There are weights of {len(chosen)} networks: {", ".join(repr(c.name) for c in chosen)}. Choose one: '
            f'`timm-cbam convert --prefix {chosen[0].name}`, or convert_state_dict(..., prefix={chosen[0].name!r}).')
    if not chosen:  # parts without blocks, or what is no ResNet
        containers = list(_containers(checkpoint))
        path, container = containers[0] if containers else ((), checkpoint)
        weights = Weights({k: v for k, v in container.items() if isinstance(k, str)}, ''.join(f'{p}.' for p in path))
        if not all(key in own_names for key in weights.values):
            weights.rename(lambda key: _WRAPPERS.sub('', key).removeprefix('module.'))
    else:
        candidate = chosen[0]
        weights = Weights(_under(candidate), candidate.name)
        weights.notes += [
            f'{c.name!r} has weights, too, which are not looked at; --prefix {c.name} chooses them'
            for c in candidates if c.path != candidate.path and prefix is None]
        outside = {
            k: v for k, v in candidate.container.items() if isinstance(k, str) and not k.startswith(candidate.prefix)}
        if prefix is None:
            for key, value in outside.items():
                # where names are numbers alone, 1.2.weight of a head would be that of a stem
                name = key if key not in weights.values and '4.0.conv1.weight' not in weights.values else f'/{key}'
                weights.values[name], weights.origin[name] = value, '.'.join((*candidate.path, key))
        elif outside:
            weights.notes.append(f'Not under {prefix!r}, dropped: {shorten(list(outside))}')
    return _clean(weights, own_names)
