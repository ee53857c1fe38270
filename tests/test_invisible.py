"""Whatever is done to a module of a block, and whoever watches it, has the very effect that it has without fusion"""
import functools
import re
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import timm
import torch
import torchvision
from helpers import liven, plain_path
from timm.layers import DropPath, LayerScale2d
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from timm_cbam import Cbam
from timm_cbam.cbam_resnet import CbamBasicBlock, CbamBottleneck
from timm_cbam.fusion import match
from timm_cbam.layers import ChannelAttention, SpatialAttention

# ---- blocks, and what running one leaves behind


def downsample():
    return nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))


attention = partial(Cbam, rd_ratio=1 / 4)

BLOCKS = {
    'basic': lambda: CbamBasicBlock(8, 8, attn_layer=attention, drop_path=DropPath(0.4)),
    'basic_eccv18': lambda: CbamBasicBlock(
        8, 12, 2, downsample(), attn_layer=partial(attention, mlp_bias=True, spatial_norm=True)),
    'bottleneck': lambda: CbamBottleneck(8, 3, 2, downsample(), attn_layer=attention, drop_path=DropPath(0.4)),
}

MODES = ('train', 'eval', 'no_grad', 'train_no_grad')


@functools.cache
def _prototype(name):
    torch.manual_seed(1)
    block = liven(BLOCKS[name]()).double()
    with torch.no_grad():
        for p in block.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) / 4)  # the biases of the channel attention, too, are zero in a new block
    return block


def _copy(m):
    """As deepcopy, which takes longer than to run a block, copies a module that has nothing unusual."""
    new = type(m).__new__(type(m))
    new.__dict__.update({k: v.copy() if isinstance(v, (dict, set)) else v for k, v in m.__dict__.items()})
    for name, p in m._parameters.items():
        new._parameters[name] = None if p is None else nn.Parameter(p.detach().clone())
    for name, b in m._buffers.items():
        new._buffers[name] = None if b is None else b.clone()
    for name, child in m._modules.items():
        new._modules[name] = None if child is None else _copy(child)
    return new


def make(name, inplace=True):
    block = _copy(_prototype(name))
    for m in block.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = inplace
    return block


def sample(shape=(4, 8, 6, 6)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)


def tensors(value):
    """Tensors, and None in their place, of nested arguments."""
    if value is None or isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors(v)]
    return []


def copies(*values):
    return [None if t is None else t.detach().clone() for t in tensors(values)]


def nothing(block, seen):
    return nullcontext()


def outcome(name, mode, touch=nothing, around=nothing, x=sample, inplace=True, use=None):
    """All that can be seen of one run of a block: values, gradients, buffers, calls, errors."""
    seen = []
    result = {}
    block = make(name, inplace).train(mode.startswith('train'))
    x = x()
    torch.default_generator.manual_seed(3)  # torch.manual_seed, which sees to GPUs, too, takes as long as a block
    try:
        touch(block, seen)
        torch.default_generator.manual_seed(4)
        with around(block, seen), torch.set_grad_enabled('no_grad' not in mode):
            out = block(x) if use is None else use(block, x)
            result['out'] = copies(out)
            result['type of out'] = (
                type(out), out.requires_grad, out.is_contiguous(), out.is_contiguous(memory_format=torch.channels_last))
            if torch.is_grad_enabled():
                grad = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).reshape(out.shape)
                out.backward(grad)
                result['gradient of out, afterwards'] = copies(grad)
            result['out, afterwards'] = copies(out)
    except Exception as e:
        result['error'] = type(e), re.sub('0x[0-9a-f]+', '', str(e))
    result['random numbers left'] = [torch.get_rng_state()]
    result['x, afterwards'] = copies(x)
    result['gradient of x'] = copies(getattr(x, 'grad', None))
    for n, p in block.named_parameters():
        result[f'gradient of {n}'] = copies(p.grad)
    for n, b in block.named_buffers():
        result[f'buffer {n}'] = copies(b)
    result['number of calls seen'] = len(seen)
    for i, (kind, *values) in enumerate(seen):
        result[f'call {i}'] = kind
        result[f'values of call {i}'] = values
    return result


def close(a, b):
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return a == b if type(a) is type(b) else False
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or type(a) is not type(b):
        return False
    if a.device.type == 'meta':
        return True
    if torch.equal(a, b) or not a.is_floating_point():
        return torch.equal(a, b)
    rtol = 1e-9 if a.dtype == torch.float64 else 1e-4
    with torch._C.DisableTorchFunctionSubclass():
        a, b = a.double(), b.double()
        scale = b.nan_to_num(0, 0, 0).abs().max().item() if b.numel() else 0.
        # gradients that cancel to zero are rounding errors
        return torch.allclose(a, b, rtol=0., atol=max(rtol * scale, rtol / 1e3), equal_nan=True)


def alike(a, b):
    kinds = [None if t is None else (type(t), t.shape, t.dtype, t.device) for t in (a, b)]
    return kinds[0] == kinds[1]


def same(a, b, close=close):
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(close(i, j) for i, j in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def differences(actual, expected, close=close):
    faults = []
    for key in {**expected, **actual}:
        a, e = actual.get(key, 'nothing'), expected.get(key, 'nothing')
        if not same(a, e, close):
            values = '' if isinstance(a, list) or isinstance(e, list) else f': {a}, plain: {e}'
            faults.append(key + values)
    return faults


@functools.cache
def _untouched(name, mode):
    with plain_path():
        return outcome(name, mode)


def check(name, touch=nothing, modes=MODES, without_effect=(), effect=all, compare_values=True, **kwargs):
    """Fused and plain agree in every mode; what is done has an effect on the plain path, or it would prove nothing."""
    faults, effects = [], []
    for mode in modes:
        with plain_path():
            expected = outcome(name, mode, touch, **kwargs)
        if mode not in without_effect:
            effects.append(bool(differences(expected, _untouched(name, mode))))
        found = differences(outcome(name, mode, touch, **kwargs), expected, close if compare_values else alike)
        if found:
            more = f' and {len(found) - 4} more' if len(found) > 4 else ''
            faults.append(f'{mode}: ' + '; '.join(found[:4]) + more)
    assert effect(effects), f'nothing happened: {effects}'
    assert not faults, '\n'.join(faults)


blocks = pytest.mark.parametrize('name', list(BLOCKS))


@blocks
@pytest.mark.parametrize('mode', MODES)
def test_untouched(name, mode):
    """An untouched block is fused, and plain is timm's block, which knows nothing of fusion, bit for bit."""
    block = make(name).train(mode.startswith('train'))
    with torch.set_grad_enabled('no_grad' not in mode):
        assert match(block, sample())
        with plain_path():
            assert not match(block, sample())
    check(name, modes=[mode], without_effect=MODES)
    theirs = outcome(name, mode, use=lambda b, x: type(b).__base__.forward(b, x))
    expected = _untouched(name, mode)
    assert theirs.keys() == expected.keys()
    for key, value in theirs.items():
        if isinstance(value, list):
            torch.testing.assert_close(value, expected[key], rtol=0, atol=0, msg=key)
        else:
            assert value == expected[key], key


# ---- the table: submodules x observers

OBSERVERS = {}


def observer(applies=lambda m: True, without_effect=(), **kwargs):
    def add(touch):
        OBSERVERS[touch.__name__] = touch, applies, dict(kwargs, without_effect=without_effect)
        return touch
    return add


ONLY_GRADIENTS = ('no_grad', 'train_no_grad')


def has_weight(m):
    return isinstance(m, (nn.Conv2d, nn.BatchNorm2d))


def has_parameters(m):
    return any(True for _ in m.parameters())


def changed(t):
    return t + 0.3 * t.flip(0) + 0.01


def own_parameters(m):
    return [(n, p) for n, p in m.named_parameters(recurse=False) if p is not None]


def replace(block, where, module):
    parent, _, name = where.rpartition('.')
    setattr(block.get_submodule(parent), name, module)


@observer()
def forward_hook(block, m, where, seen):
    m.register_forward_hook(lambda m, args, out: seen.append(('forward', *copies(args, out))))


@observer()
def forward_hook_with_kwargs_always_called(block, m, where, seen):
    m.register_forward_hook(
        lambda m, args, kwargs, out: seen.append((f'forward {kwargs}', *copies(args, out))),
        with_kwargs=True, always_call=True)


@observer()
def forward_hook_that_changes(block, m, where, seen):
    def hook(m, args, out):
        seen.append(('forward', *copies(args, out)))
        return changed(out)

    m.register_forward_hook(hook)


@observer()
def forward_hook_that_detaches(block, m, where, seen):
    def hook(m, args, out):
        seen.append(('forward', *copies(args, out)))
        return out.detach()

    m.register_forward_hook(hook)


@observer()
def forward_hook_that_raises(block, m, where, seen):
    def hook(m, args, out):
        raise KeyError(where)

    m.register_forward_hook(hook)


@observer()
def forward_pre_hook(block, m, where, seen):
    m.register_forward_pre_hook(lambda m, args: seen.append(('before', *copies(args))))


@observer()
def forward_pre_hook_that_changes(block, m, where, seen):
    def hook(m, args):
        seen.append(('before', *copies(args)))
        return (changed(args[0]),)

    m.register_forward_pre_hook(hook)


@observer(without_effect=ONLY_GRADIENTS, inplace=False)
def full_backward_hook(block, m, where, seen):
    m.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(('backward', *copies(grad_in, grad_out))))


# PyTorch refuses to modify what such a hook has wrapped, as an activation in place does
@observer(without_effect=ONLY_GRADIENTS)
def full_backward_hook_before_in_place_activation(block, m, where, seen):
    full_backward_hook(block, m, where, seen)


@observer(without_effect=ONLY_GRADIENTS, inplace=False)
def full_backward_hook_that_changes(block, m, where, seen):
    def hook(m, grad_in, grad_out):
        seen.append(('backward', *copies(grad_in, grad_out)))
        return tuple(None if g is None else changed(g) for g in grad_in)

    m.register_full_backward_hook(hook)


@observer(without_effect=ONLY_GRADIENTS, inplace=False)
def full_backward_pre_hook(block, m, where, seen):
    m.register_full_backward_pre_hook(lambda m, grad_out: seen.append(('before backward', *copies(grad_out))))


@observer(without_effect=ONLY_GRADIENTS, inplace=False)
def full_backward_pre_hook_that_changes(block, m, where, seen):
    m.register_full_backward_pre_hook(lambda m, grad_out: tuple(changed(g) for g in grad_out))


@observer(without_effect=ONLY_GRADIENTS)
def old_backward_hook(block, m, where, seen):
    m.register_backward_hook(lambda m, grad_in, grad_out: seen.append(('backward', *copies(grad_in, grad_out))))


@observer()
def own_forward(block, m, where, seen):
    original = m.forward

    def forward(x):
        seen.append(('called', *copies(x)))
        return changed(original(x))

    m.forward = forward


@observer()
def own_forward_without_grad(block, m, where, seen):
    original = m.forward

    def forward(x):
        seen.append(('called', *copies(x)))
        with torch.no_grad():
            return original(x)

    m.forward = forward


@observer()
def subclass(block, m, where, seen):
    class Other(type(m)):
        def forward(self, x):
            seen.append(('called', *copies(x)))
            return changed(super().forward(x))

    m.__class__ = Other


@observer()
def compiled(block, m, where, seen):
    """As nn.Module.compile() leaves a module."""
    def call(x):
        seen.append(('called', *copies(x)))
        return changed(m._call_impl(x))

    m._compiled_call_impl = call


class Wrapper(nn.Module):
    def __init__(self, base, seen):
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.seen = seen

    def forward(self, x):
        self.seen.append(('called', *copies(x)))
        out = self.base(x)
        return out + self.scale * out.flip(0)


@observer(applies=lambda m: not isinstance(m, (CbamBasicBlock, CbamBottleneck)))
def wrapper(block, m, where, seen):
    """As LoRA's libraries put their layers in the place of others."""
    replace(block, where, Wrapper(m, seen))


class Scale(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


@observer(applies=has_weight)
def parametrization(block, m, where, seen):
    parametrize.register_parametrization(m, 'weight', Scale())


@observer(applies=has_weight)
def parametrization_of_all(block, m, where, seen):
    for n, _ in own_parameters(m):
        parametrize.register_parametrization(m, n, Scale())


@observer(applies=has_weight, without_effect=ONLY_GRADIENTS)
def weight_norm(block, m, where, seen):
    nn.utils.weight_norm(m)


@observer(applies=lambda m: isinstance(m, nn.Conv2d))
def spectral_norm(block, m, where, seen):
    nn.utils.spectral_norm(m)


@observer(applies=has_weight)
def prune_mask(block, m, where, seen):
    prune.l1_unstructured(m, 'weight', amount=0.5)


@observer(applies=has_weight)
def computed_weight(block, m, where, seen):
    """As hyper-networks and fast weights have them: a tensor, no parameter."""
    m.leaf = m.weight
    del m.weight
    m.weight = m.leaf * 0.5


@observer(applies=has_parameters, without_effect=ONLY_GRADIENTS)
def frozen(block, m, where, seen):
    for p in m.parameters():
        p.requires_grad_(False)


@observer(applies=has_parameters, without_effect=ONLY_GRADIENTS)
def parameter_hook(block, m, where, seen):
    for n, p in m.named_parameters():
        p.register_hook(lambda grad, n=n: changed(grad))


@observer(applies=has_parameters, without_effect=ONLY_GRADIENTS)
def parameter_hook_after_accumulation(block, m, where, seen):
    def step(p):  # as optimizers in the backward pass do
        with torch.no_grad():
            p.sub_(p.grad)
        p.grad = None

    for p in m.parameters():
        p.register_post_accumulate_grad_hook(step)


@observer(applies=has_weight)
def other_dtype(block, m, where, seen):
    m.float()


# where PyTorch's own convolutions on CPU raise nothing, and return memory as they found it, there is nothing to compare
@observer(applies=has_weight, compare_values=False, without_effect=ONLY_GRADIENTS)
def meta(block, m, where, seen):
    """As `load_state_dict(assign=True)` leaves a model on meta, whose checkpoint lacks these parameters."""
    m.to('meta')


@observer(applies=has_weight)
def strided(block, m, where, seen):
    for n, p in own_parameters(m):
        setattr(m, n, nn.Parameter(torch.stack([p.detach(), 2 * p.detach()], -1)[..., 1]))
    for n, b in m.named_buffers(recurse=False):
        setattr(m, n, torch.stack([b, 2 * b], -1)[..., 1])


@observer(applies=lambda m: has_weight(m) and m.weight.numel() > 1)
def expanded(block, m, where, seen):
    for n, p in own_parameters(m):
        setattr(m, n, nn.Parameter(p.detach().flatten()[:1].reshape([1] * p.ndim).expand(p.shape)))


class Watched(torch.Tensor):
    seen = None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if cls.seen is not None:
            cls.seen.append((func.__name__,))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture(autouse=True)
def watched():
    yield
    Watched.seen = None


@observer(applies=has_weight)
def tensor_subclass(block, m, where, seen):
    Watched.seen = None
    m.weight = nn.Parameter(m.weight.detach().as_subclass(Watched))
    Watched.seen = seen


@observer(
    applies=lambda m: any(isinstance(i, (nn.BatchNorm2d, DropPath)) for i in m.modules()))
def other_mode(block, m, where, seen):
    m.train(not m.training)


def table():
    for name in BLOCKS:
        for where, m in _prototype(name).named_modules():
            for kind, (_, applies, _) in OBSERVERS.items():
                # the two blocks with a downsample have all that this one has
                if applies(m) and (name != 'basic' or kind in ('forward_hook', 'full_backward_hook', 'own_forward')):
                    yield pytest.param(name, where, kind, id=f'{name}-{where or "block"}-{kind}')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name, where, kind', list(table()))
def test_observer(name, where, kind):
    touch, _, kwargs = OBSERVERS[kind]
    check(
        name, lambda block, seen: touch(block, block.get_submodule(where), where, seen), modes=MODES[:3], **kwargs)


def hook_all(block, seen):
    for where, m in block.named_modules():
        m.register_forward_pre_hook(lambda m, args, where=where: seen.append((f'before {where}', *copies(args))))
        m.register_forward_hook(lambda m, args, out, where=where: seen.append((f'after {where}', *copies(out))))


def hook_all_backward(block, seen):
    for where, m in block.named_modules():
        m.register_full_backward_pre_hook(lambda m, g, where=where: seen.append((f'before {where}', *copies(g))))
        m.register_full_backward_hook(lambda m, g, out, where=where: seen.append((f'after {where}', *copies(g))))


@blocks
def test_all_modules_hooked(name):
    check(name, hook_all)
    check(name, hook_all_backward, inplace=False, without_effect=ONLY_GRADIENTS)


# ---- what is kept without a copy

def kept(name, mode, where, inplace):
    """What a hook sees in every call: the tensors themselves when all is done, and copies from when it ran."""
    calls = []

    def hook(m, args, out):
        calls.append((tensors([args, out]), copies(args, out)))

    @contextmanager
    def around(block, seen):
        register = torch.nn.modules.module.register_module_forward_hook if where == 'everywhere' else (
            block.get_submodule(where).register_forward_hook)
        handle = register(hook)
        try:
            yield
        finally:
            handle.remove()

    outcome(name, mode, around=around, inplace=inplace)
    return [(copies(now), then) for now, then in calls]


@blocks
@pytest.mark.parametrize('where', ['everywhere', 'submodule'])
@pytest.mark.parametrize('inplace', [False, True], ids=['out_of_place', 'in_place'])
def test_kept_tensors(name, where, inplace):
    """They stay as they were when the hook ran; with activations in place, they end as they do on the plain path."""
    faults = []
    for mode in MODES:
        for place in [where] if where == 'everywhere' else [n for n, _ in _prototype(name).named_modules() if n]:
            actual = kept(name, mode, place, inplace)
            with plain_path():
                expected = kept(name, mode, place, inplace)
            assert expected
            if len(actual) != len(expected):
                faults.append(f'{mode}, {place}: {len(actual)} calls, plain: {len(expected)}')
            elif inplace:
                if not all(same(a, e) for (a, _), (e, _) in zip(actual, expected, strict=True)):
                    faults.append(f'{mode}, {place}: overwritten otherwise than on the plain path')
            else:
                faults += [f'{mode}, {place}: overwritten, fused' for now, then in actual if not same(now, then)]
                faults += [f'{mode}, {place}: overwritten, plain' for now, then in expected if not same(now, then)]
    assert not faults, '\n'.join(faults)


# ---- who watches everything

def _names(block):
    return {id(m): n for n, m in block.named_modules()}


@contextmanager
def global_hook(register, hook, block, seen):
    names = _names(block)
    handle = getattr(torch.nn.modules.module, f'register_module_{register}')(partial(hook, names, seen))
    try:
        yield
    finally:
        handle.remove()


def record(names, seen, m, *values):
    seen.append((names[id(m)], *copies(*values)))


def record_and_change(names, seen, m, *values):
    record(names, seen, m, *values)
    return changed(values[-1]) if isinstance(values[-1], torch.Tensor) else tuple(map(changed, values[0]))


GLOBAL_HOOKS = {
    'forward_pre_hook': (), 'forward_hook': (), 'full_backward_hook': ONLY_GRADIENTS,
    'full_backward_pre_hook': ONLY_GRADIENTS}


@blocks
@pytest.mark.parametrize('kind', GLOBAL_HOOKS)
@pytest.mark.parametrize('hook', [record, record_and_change])
def test_global_hooks(name, kind, hook):
    check(
        name, around=partial(global_hook, kind, hook), inplace='backward' not in kind,
        without_effect=GLOBAL_HOOKS[kind])


class DispatchWatch(TorchDispatchMode):
    def __init__(self, seen, change=None):
        super().__init__()
        self.seen, self.change = seen, change

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((str(func), *(str(tuple(t.shape)) for t in tensors(args) if t is not None)))
        out = func(*args, **(kwargs or {}))
        return 0.5 * out if func is self.change else out


class FunctionWatch(TorchFunctionMode):
    def __init__(self, seen, change=None):
        super().__init__()
        self.seen, self.change = seen, change

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append((func.__name__,))
        out = func(*args, **(kwargs or {}))
        return 0.5 * out if func is self.change else out


@blocks
@pytest.mark.parametrize('mode', [
    pytest.param(lambda block, seen: DispatchWatch(seen), id='dispatch'),
    pytest.param(lambda block, seen: DispatchWatch(seen, torch.ops.aten.amax.default), id='dispatch_changes_amax'),
    pytest.param(lambda block, seen: DispatchWatch(seen, torch.ops.aten.sigmoid.default), id='dispatch_changes_gates'),
    pytest.param(lambda block, seen: FunctionWatch(seen), id='function'),
    pytest.param(lambda block, seen: FunctionWatch(seen, torch.Tensor.amax), id='function_changes_amax'),
    pytest.param(lambda block, seen: FunctionWatch(seen, torch.cat), id='function_changes_pooled'),
])
def test_modes_of_torch(name, mode):
    check(name, around=mode)


@blocks
@pytest.mark.parametrize('around', [
    pytest.param(lambda *_: torch.device('cpu'), id='default_device'),
    pytest.param(lambda *_: torch.autograd.set_detect_anomaly(True), id='anomaly_mode'),
    pytest.param(lambda *_: torch.autograd.graph.save_on_cpu(), id='save_on_cpu'),
    pytest.param(lambda *_: torch.autograd.graph.allow_mutation_on_saved_tensors(), id='allow_mutation'),
    pytest.param(lambda *_: torch.autograd.set_multithreading_enabled(False), id='one_thread'),
])
@pytest.mark.filterwarnings('ignore')
def test_surroundings(name, around):
    check(name, around=around, without_effect=MODES)


@blocks
def test_inference_mode(name):
    def use(block, x):
        with torch.inference_mode():
            out = block(x)
        assert out.is_inference()
        return out.clone()

    check(name, use=use, modes=ONLY_GRADIENTS, without_effect=MODES)


@blocks
@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointing(name, reentrant):
    # in training, the batch-norms run twice
    check(name, use=lambda block, x: checkpoint(block, x, use_reentrant=reentrant), effect=any)


@blocks
def test_functional_call(name):
    """Parameters that are computed from others, as MAML's are."""
    def use(block, x):
        return functional_call(block, {n: 0.5 * p for n, p in block.named_parameters()}, (x,))

    check(name, use=use)


# ---- patched classes

def _watch(original, seen):
    def patched(self, *args, **kwargs):
        seen.append((type(self).__name__, *copies(args)))
        out = original(self, *args, **kwargs)
        return changed(out)

    return patched


PATCHES = {
    f'{cls.__name__}.{method}': (cls, method) for cls, method in (
        (nn.Conv2d, 'forward'), (nn.Conv2d, '_conv_forward'), (nn.BatchNorm2d, 'forward'),
        (nn.modules.batchnorm._BatchNorm, 'forward'), (nn.ReLU, 'forward'), (nn.Identity, 'forward'),
        (timm.layers.Sigmoid, 'forward'), (DropPath, 'forward'), (nn.Sequential, 'forward'),
        (Cbam, 'forward'), (ChannelAttention, 'forward'), (ChannelAttention, 'attention_map'),
        (SpatialAttention, 'forward'), (SpatialAttention, 'attention_map'),
        (nn.Conv2d, '__call__'), (nn.Module, '__call__'), (nn.Module, '_call_impl'), (nn.Module, '_wrapped_call_impl'),
    )
}


@blocks
@pytest.mark.parametrize('patch', PATCHES)
def test_patched_class(name, patch, monkeypatch):
    cls, method = PATCHES[patch]
    if not any(isinstance(m, cls) for m in _prototype(name).modules()):
        cls = None  # no drop_path in this block, no Sequential in that one

    @contextmanager
    def around(block, seen):
        with monkeypatch.context() as m:
            if cls is not None:
                m.setattr(cls, method, _watch(getattr(cls, method), seen))
            yield

    # `_wrapped_call_impl` is what `__call__` was bound to when the class was made
    check(name, around=around, without_effect=MODES if cls is None or method == '_wrapped_call_impl' else ())


@blocks
@pytest.mark.parametrize('where, method', [
    ('conv2', '_conv_forward'), ('se.channel.fc1', '_conv_forward'), ('se.spatial.conv', '_conv_forward'),
    ('bn2', '_check_input_dim'),
])
def test_own_method(name, where, method):
    def touch(block, seen):
        m = block.get_submodule(where)
        original = getattr(m, method)

        def own(*args):
            seen.append((method, *copies(args)))
            return original(*args)

        setattr(m, method, own)

    check(name, touch)


# ---- other modules in their place

class Double(nn.Module):
    def forward(self, x):
        return 2 * x


class Shifted(nn.ReLU):
    def forward(self, x):
        return super().forward(x - 0.1)


class Same(nn.ReLU):
    pass


# where, and the module that takes its place in a block of c channels
REPLACED = {
    'drop_path=None': ('drop_path', lambda c: None),
    'drop_path=Identity': ('drop_path', lambda c: nn.Identity()),
    'drop_path=Dropout2d': ('drop_path', lambda c: nn.Dropout2d(0.5)),
    'drop_path=LayerScale2d': ('drop_path', lambda c: LayerScale2d(c)),
    'drop_path=Double': ('drop_path', lambda c: Double()),
    'drop_path=GroupNorm': ('drop_path', lambda c: nn.GroupNorm(1, c)),
    'drop_path=of_nothing': ('drop_path', lambda c: DropPath(0.)),
    'drop_path=of_all': ('drop_path', lambda c: DropPath(1.)),
    'drop_path=unscaled': ('drop_path', lambda c: DropPath(0.5, scale_by_keep=False)),
    'last_act=Shifted': ('last_act', lambda c: Shifted()),
    'last_act=Same': ('last_act', lambda c: Same()),
    'last_act=Threshold': ('last_act', lambda c: nn.Threshold(0.5, 0.)),
    'last_act=LeakyReLU': ('last_act', lambda c: nn.LeakyReLU(0.2, inplace=True)),
    'last_act=PReLU': ('last_act', lambda c: nn.PReLU()),
    'last_act=Identity': ('last_act', lambda c: nn.Identity()),
    'last_norm=Identity': ('last_norm', lambda c: nn.Identity()),
    'last_norm=GroupNorm': ('last_norm', lambda c: nn.GroupNorm(1, c)),
    'last_norm=InstanceNorm2d': ('last_norm', lambda c: nn.InstanceNorm2d(c, affine=True)),
    'last_norm=LazyBatchNorm2d': ('last_norm', lambda c: nn.LazyBatchNorm2d()),
    'last_norm=BatchNormAct2d': ('last_norm', lambda c: timm.layers.BatchNormAct2d(c)),
    'bn1=Identity': ('bn1', lambda c: nn.Identity()),
    'act1=Shifted': ('act1', lambda c: Shifted()),
    'drop_block=DropBlock2d': ('drop_block', lambda c: timm.layers.DropBlock2d(0.3, 3)),
    'aa=AvgPool2d': ('aa', lambda c: nn.AvgPool2d(3, 1, 1)),
    'se=None': ('se', lambda c: None),
    'se=Identity': ('se', lambda c: nn.Identity()),
    'se=SEModule': ('se', lambda c: timm.layers.SEModule(c, rd_channels=2)),
    'se=CbamModule': ('se', lambda c: timm.layers.CbamModule(c, rd_channels=2)),
    'se=parallel': ('se', lambda c: Cbam(c, rd_ratio=1 / 2, arrangement='parallel')),
    'se=spatial_channel': ('se', lambda c: Cbam(c, rd_ratio=1 / 2, arrangement='spatial_channel')),
    'se=max': ('se', lambda c: Cbam(c, rd_ratio=1 / 2, channel_pooling='max', spatial_pooling='avg')),
    'se.channel=Identity': ('se.channel', lambda c: nn.Identity()),
    'se.channel=SEModule': ('se.channel', lambda c: timm.layers.SEModule(c, rd_channels=2)),
    'se.channel.act=SiLU': ('se.channel.act', lambda c: nn.SiLU()),
    'se.channel.act=Shifted': ('se.channel.act', lambda c: Shifted()),
    'se.channel.gate=Hardsigmoid': ('se.channel.gate', lambda c: nn.Hardsigmoid()),
    'se.channel.gate=Sigmoid': ('se.channel.gate', lambda c: nn.Sigmoid()),
    'se.channel.fc2=biased': ('se.channel.fc2', lambda c: nn.Conv2d(c // 4, c, 1)),
    'se.channel.fc2=grouped': ('se.channel.fc2', lambda c: nn.Conv2d(c // 4, c, 1, groups=c // 4)),
    'se.channel.fc2=3x3': ('se.channel.fc2', lambda c: nn.Conv2d(c // 4, c, 3, padding=1)),
    'se.channel.fc2=Sequential': (
        'se.channel.fc2', lambda c: nn.Sequential(nn.Dropout(0.5), nn.Conv2d(c // 4, c, 1))),
    'se.spatial=Identity': ('se.spatial', lambda c: nn.Identity()),
    'se.spatial.gate=Hardsigmoid': ('se.spatial.gate', lambda c: nn.Hardsigmoid()),
    'se.spatial.conv=3x3': ('se.spatial.conv', lambda c: nn.Conv2d(2, 1, 3, padding=1, bias=False)),
    'se.spatial.conv=biased': ('se.spatial.conv', lambda c: nn.Conv2d(2, 1, 7, padding=3)),
    'se.spatial.conv=dilated': ('se.spatial.conv', lambda c: nn.Conv2d(2, 1, 3, padding=2, dilation=2, bias=False)),
    'se.spatial.conv=even': ('se.spatial.conv', lambda c: nn.Conv2d(2, 1, 4, padding='same', bias=False)),
    'se.spatial.conv=oblong': ('se.spatial.conv', lambda c: nn.Conv2d(2, 1, (3, 7), padding=(1, 3), bias=False)),
    'se.spatial.conv=of_all_channels': ('se.spatial.conv', lambda c: nn.Conv2d(2, c, 7, padding=3, bias=False)),
    'se.spatial.bn=BatchNorm2d': ('se.spatial.bn', lambda c: nn.BatchNorm2d(1)),
    'se.spatial.bn=GroupNorm': ('se.spatial.bn', lambda c: nn.GroupNorm(1, 1)),
    'last_conv=biased': ('last_conv', lambda c: nn.LazyConv2d(c, 3, padding=1)),
    'last_conv=reflect': ('last_conv', lambda c: nn.LazyConv2d(c, 3, padding=1, padding_mode='reflect')),
    'last_conv=other_channels': ('last_conv', lambda c: nn.LazyConv2d(1, 1)),
    'downsample=Double': ('downsample', lambda c: nn.Sequential(nn.LazyConv2d(c, 1), Double())),
    'downsample=Conv2d': ('downsample', lambda c: nn.LazyConv2d(c, 1)),
}
HARMLESS = ('last_act=Same', 'se.channel.gate=Sigmoid')
HARMLESS_WITHOUT_DROP_PATH = ('drop_path=None', 'drop_path=Identity', 'drop_path=of_nothing')


def located(block, where):
    """The last convolution, norm and activation have other numbers in other blocks."""
    depth = 3 if isinstance(block, CbamBottleneck) else 2
    for kind, name in (('conv', 'conv'), ('norm', 'bn'), ('act', 'act')):
        where = where.replace(f'last_{kind}', f'{name}{depth}')
    return where


@pytest.mark.filterwarnings('ignore:Lazy modules', 'ignore:Using padding')
@blocks
@pytest.mark.parametrize('case', REPLACED)
def test_replaced_module(name, case):
    where, factory = REPLACED[case]

    def touch(block, seen):
        module = factory(block.se.channel.fc2.weight.shape[0])
        replace(block, located(block, where), module and module.double().train(block.training))

    same = case in HARMLESS or name == 'basic_eccv18' and case in HARMLESS_WITHOUT_DROP_PATH
    check(name, touch, effect=any if not same else all, without_effect=MODES if same else ())


@blocks
@pytest.mark.parametrize('where, other', [
    ('bn1', 'last_norm'), ('act1', 'last_act'), ('downsample.1', 'last_norm'), ('se.channel.act', 'last_act'),
    ('se.channel.gate', 'se.spatial.gate'),
])
def test_shared_module(name, where, other):
    """One module in two places: its statistics are updated twice, its gradients are sums."""
    def touch(block, seen):
        if block.downsample is None:
            block.downsample = nn.Sequential(nn.Identity(), nn.Identity())
        replace(block, where, block.get_submodule(located(block, other)))

    stateless = where in ('act1', 'se.channel.act', 'se.channel.gate')
    check(name, touch, without_effect=MODES if stateless else (), effect=all if stateless else any)


# ---- attributes, by which a module computes another function than it was built for

ATTRIBUTES = [
    ('conv1', 'stride', (2, 2)),
    ('conv1', 'padding', (0, 0)),
    ('conv2', 'padding_mode', 'reflect'),
    ('conv2', 'dilation', (2, 2)),
    ('last_conv', 'stride', (2, 2)),
    ('last_conv', 'padding', (2, 2)),
    ('last_conv', 'groups', 2),
    ('last_norm', 'eps', 0.1),
    ('last_norm', 'momentum', 0.7),
    ('last_norm', 'momentum', 0.),
    ('last_norm', 'momentum', None),
    ('last_norm', 'training', True),
    ('last_norm', 'training', False),
    ('last_norm', 'track_running_stats', False),
    ('last_norm', 'weight', None),
    ('last_norm', 'bias', None),
    ('last_norm', 'running_mean', None),
    ('last_norm', 'running_var', None),
    ('se', 'parallel', True),
    ('se', 'spatial_first', True),
    ('se.channel', 'pooling', 'avg'),
    ('se.channel', 'pooling', 'max'),
    ('se.channel.fc1', 'groups', 2),
    ('se.channel.fc1', 'stride', (1, 2)),
    ('se.channel.fc2', 'padding', (1, 0)),
    ('se.spatial', 'pooling', 'avg'),
    ('se.spatial', 'pooling', 'max'),
    ('se.spatial.conv', 'stride', (2, 2)),
    ('se.spatial.conv', 'padding', (0, 0)),
    ('se.spatial.conv', 'dilation', (2, 2)),
    ('se.spatial.conv', 'groups', 2),
    ('se.spatial.conv', 'padding_mode', 'reflect'),
    ('drop_path', 'drop_prob', 0.),
    ('drop_path', 'drop_prob', 0.8),
    ('drop_path', 'drop_prob', 1.),
    ('drop_path', 'drop_prob', 1.5),
    ('drop_path', 'scale_by_keep', False),
    ('drop_path', 'training', True),
    ('drop_path', 'training', False),
    ('downsample.1', 'eps', 0.1),
    ('downsample.0', 'padding', (1, 1)),
]

# without effect, in some of the blocks at least
INERT = [
    ('last_norm', 'affine', False),
    ('last_norm', 'num_features', 3),
    ('last_norm', 'num_batches_tracked', None),
    ('se', 'training', False),
    ('se.channel.fc1', 'padding', (0, 1)),
    ('se.channel.fc1', 'bias', None),
    ('se.channel.fc2', 'dilation', (2, 2)),
    ('se.channel.fc2', 'padding_mode', 'circular'),
    ('se.channel.act', 'inplace', False),
    ('se.channel.gate', 'inplace', True),
    ('se.spatial.conv', 'padding', 'same'),
    ('se.spatial.conv', 'padding', 3),
    ('se.spatial.gate', 'inplace', True),
    ('act1', 'inplace', False),
    ('last_act', 'inplace', False),
]


def attributes():
    for name in BLOCKS:
        block = _prototype(name)
        modules = dict(block.named_modules())
        for case in ATTRIBUTES + INERT:
            where, attribute, value = case
            where = located(block, where)
            if where in modules and getattr(modules[where], attribute) != value:
                yield pytest.param(
                    name, where, attribute, value, case in INERT, id=f'{name}-{where}.{attribute}={value}')


@pytest.mark.filterwarnings('ignore:Using padding')
@pytest.mark.parametrize('name, where, attribute, value, inert', list(attributes()))
def test_attribute(name, where, attribute, value, inert):
    check(
        name,
        lambda block, seen: setattr(block.get_submodule(where), attribute, value),
        without_effect=MODES if inert else (),
        effect=all if inert else any)


# ---- batch-norms

def set_to_none(*names):
    def touch(norm, parent, name):
        for n in names:
            setattr(norm, n, None)
    return touch


def put(factory):
    def touch(norm, parent, name):
        with torch.no_grad():
            module = factory(norm).double().train(norm.training)
            own = module.state_dict()
            module.load_state_dict({k: v for k, v in norm.state_dict().items() if k in own}, strict=False)
        setattr(parent, name, module)
    return touch


def set_attributes(**attributes):
    def touch(norm, parent, name):
        for n, value in attributes.items():
            setattr(norm, n, value)
    return touch


def freeze(norm, parent, name):
    norm.eval().requires_grad_(False)


def float_statistics(norm, parent, name):
    norm.running_mean, norm.running_var = norm.running_mean.float(), norm.running_var.float()


def negate_weight(norm, parent, name):
    norm.weight.data.neg_()


def statistics_of_nothing(norm, parent, name):
    norm.reset_running_stats()
    norm.running_var.zero_()


NORMS = {
    'no_bias': set_to_none('bias'),
    'no_weight': set_to_none('weight'),
    'no_affine': put(lambda m: nn.BatchNorm2d(m.num_features, affine=False)),
    'no_affine_set_later': set_to_none('weight', 'bias'),
    'no_statistics': put(lambda m: nn.BatchNorm2d(m.num_features, track_running_stats=False)),
    'statistics_set_to_none': set_to_none('running_mean', 'running_var'),
    'mean_set_to_none': set_to_none('running_mean'),
    'counter_set_to_none': set_to_none('num_batches_tracked'),
    'nothing_left': set_to_none('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'),
    'not_tracking': set_attributes(track_running_stats=False),
    'momentum_none': set_attributes(momentum=None),
    'momentum_one': set_attributes(momentum=1.),
    'frozen': freeze,
    'FrozenBatchNorm2d_of_torchvision': put(lambda m: torchvision.ops.FrozenBatchNorm2d(m.num_features, m.eps)),
    'FrozenBatchNormAct2d_of_timm': put(lambda m: timm.layers.FrozenBatchNormAct2d(m.num_features, m.eps)),
    'SyncBatchNorm': put(lambda m: nn.SyncBatchNorm(m.num_features, m.eps, m.momentum)),
    'BatchNorm3d': put(lambda m: nn.BatchNorm3d(m.num_features)),
    'float_statistics': float_statistics,
    'negative_weight': negate_weight,
    'statistics_of_nothing': statistics_of_nothing,
}


def norms():
    for name in BLOCKS:
        for where, m in _prototype(name).named_modules():
            if isinstance(m, nn.BatchNorm2d):
                for kind in NORMS:
                    yield pytest.param(name, where, kind, id=f'{name}-{where}-{kind}')


@pytest.mark.parametrize('name, where, kind', list(norms()))
def test_batch_norm(name, where, kind):
    def touch(block, seen):
        parent, _, child = where.rpartition('.')
        NORMS[kind](block.get_submodule(where), block.get_submodule(parent), child)

    same = kind in ('SyncBatchNorm', 'momentum_none', 'counter_set_to_none')
    check(name, touch, without_effect=MODES if same else (), effect=all if same else any)


@blocks
@pytest.mark.parametrize('convert, same', [
    pytest.param(nn.SyncBatchNorm.convert_sync_batchnorm, True, id='SyncBatchNorm'),
    pytest.param(timm.layers.convert_sync_batchnorm, True, id='SyncBatchNorm_by_timm'),
    pytest.param(lambda block: timm.utils.freeze(block) or block, False, id='frozen'),
    pytest.param(lambda block: timm.utils.freeze(block, ['bn1', 'se']) or block, False, id='partly_frozen'),
])
def test_converted_block(name, convert, same):
    # without a process group, SyncBatchNorm is an ordinary one
    check(
        name, use=lambda block, x: convert(block)(x), without_effect=MODES if same else (), effect=all if same else any)


@blocks
def test_one_value_per_channel(name):
    """In training it is an error, whichever batch-norm meets it."""
    for where, norm in _prototype(name).named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            def touch(block, seen, where=where):
                for n, m in block.named_modules():
                    if n != where and isinstance(m, nn.BatchNorm2d):
                        m.eval()

            for mode in MODES[::3]:
                with plain_path():
                    assert outcome(name, mode, touch, x=partial(sample, (1, 8, 1, 1)))['error'][0] is ValueError
            check(name, touch, x=partial(sample, (1, 8, 1, 1)))


# ---- inputs

def dtype(dtype):
    return lambda: sample().detach().mul(4).to(dtype)


INPUTS = {
    'without_gradient': lambda: sample().detach(),
    'not_a_leaf': lambda: sample() * 1,
    'channels_last': lambda: sample().detach().contiguous(memory_format=torch.channels_last).requires_grad_(),
    'strided': lambda: torch.stack([sample().detach()] * 2, -1)[..., 0].requires_grad_(),
    'transposed': lambda: sample().detach().mT.contiguous().mT.requires_grad_(),
    'expanded': lambda: sample((1, 8, 6, 6)).detach().expand(4, -1, -1, -1).requires_grad_(),
    'empty': lambda: sample((0, 8, 6, 6)),
    'one_sample': lambda: sample((1, 8, 6, 6)),
    'one_pixel': lambda: sample((4, 8, 1, 1)),
    'no_pixels': lambda: sample((4, 8, 0, 6)),
    'no_batch': lambda: sample((8, 6, 6)),
    'five_dimensions': lambda: sample((1, 4, 8, 6, 6)),
    'other_channels': lambda: sample((4, 7, 6, 6)),
    'float32': dtype(torch.float32),
    'bfloat16': dtype(torch.bfloat16),
    'float16': dtype(torch.float16),
    'int64': dtype(torch.int64),
    'complex128': dtype(torch.complex128),
    'meta': lambda: sample().detach().to('meta'),
    'parameter': lambda: nn.Parameter(sample().detach()),
    'subclass': lambda: sample().detach().as_subclass(Watched).requires_grad_(),
    'not_finite': lambda: sample().detach().index_fill(0, torch.tensor(1), float('inf')).requires_grad_(),
    'none': lambda: None,
    'list': lambda: [sample()],
}


@pytest.mark.filterwarnings('ignore')
@blocks
@pytest.mark.parametrize('kind', INPUTS)
def test_input(name, kind):
    same = kind in ('channels_last', 'strided', 'transposed', 'parameter')
    check(name, x=INPUTS[kind], without_effect=MODES if same else (), effect=any if not same else all)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@blocks
def test_block_of_other_dtype(name, dtype):
    """Also those that the operator may not know work as on the plain path, whose rounding errors are the bound."""
    runs = []
    for path, d in ((nullcontext, dtype), (plain_path, dtype), (plain_path, torch.float64)):
        block = make(name).train().to(d)
        torch.manual_seed(4)
        with path(), torch.no_grad():
            runs.append(block(sample().detach().to(d)))
            assert runs[-1].dtype == d
    expected = runs.pop()
    actual, plain = ((run.double() - expected).norm() for run in runs)
    assert actual < 1.25 * plain + torch.finfo(dtype).eps * expected.norm()


# ---- changed between forward and backward

@blocks
@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_changed_before_backward(name, mode):
    """PyTorch's error where the plain path raises it, or the gradients at the values of the forward pass."""
    def use(what, block, x):
        out = block(x)
        with torch.no_grad():
            {**dict(block.named_parameters()), **dict(block.named_buffers()), 'out': out}[what].add_(1)
        return out

    untouched = outcome(name, mode)
    block = _prototype(name)
    faults = []
    for what in [*(n for n, _ in block.named_parameters()), *(n for n, _ in block.named_buffers()), 'out']:
        with plain_path():
            plain = outcome(name, mode, use=partial(use, what))
        fused = outcome(name, mode, use=partial(use, what))
        modified = 'modified by an inplace operation'
        assert 'error' not in plain or modified in plain['error'][1]
        if 'error' in fused:
            if 'error' not in plain or modified not in fused['error'][1]:
                faults.append(f'{what}: {fused["error"]}, plain: {plain.get("error", "none")}')
        else:
            expected = untouched if 'error' in plain else plain
            faults += [f'{what}: {key}' for key in fused if 'gradient' in key and not same(fused[key], expected[key])]
    assert not faults, '\n'.join(faults)
