"""In every graph that a user may build, a block's fused tail gives what timm's modules one by one give, or their error

Blocks, inputs and random numbers are the same on both paths; all is in float64 unless it says otherwise, and gradients
are those of the input and of every parameter.
"""
import copy
import gc
import io
import itertools
import pickle
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.autograd.forward_ad as fwAD
from helpers import liven, plain_path
from torch import nn
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import functional, gradcheck, gradgradcheck
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import keystr, tree_flatten_with_path
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from timm_cbam import Cbam
from timm_cbam.cbam_resnet import CbamBasicBlock, CbamBottleneck

KINDS = ('basic', 'bottleneck', 'eccv18')

every_kind = pytest.mark.parametrize('kind', KINDS)
both_modes = pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])


def each(*scenarios):
    return pytest.mark.parametrize('scenario', scenarios, ids=lambda f: f.__name__)


def noise(shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))  # vmap refuses PyTorch's own


def build(kind, training=False):
    torch.manual_seed(0)
    attn_layer = partial(Cbam, rd_channels=4, mlp_bias=kind == 'eccv18', spatial_norm=kind == 'eccv18')
    if kind == 'bottleneck':
        downsample = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
        block = CbamBottleneck(8, 4, downsample=downsample, attn_layer=attn_layer)
    else:
        block = CbamBasicBlock(8, 8, attn_layer=attn_layer)
    return liven(block).double().train(training)


def build_model(kind='cbam_resnet18', training=False):
    torch.manual_seed(0)
    model = timm.create_model(kind, channels=(16,) * 4, layers=(1,) * 4, num_classes=3, output_stride=8)
    return liven(model).double().train(training)


def images(seed=1):
    return noise((2, 8, 5, 6), seed)


def last(block):
    """Last convolution and batch-norm of the branch."""
    return (block.conv3, block.bn3) if hasattr(block, 'conv3') else (block.conv2, block.bn2)


def loss(out, seed=2):
    return (out.square() * noise(out.shape, seed).to(out.dtype)).sum()


def inputs(block, x):
    return [x, *block.parameters()]


def gradients(block, x, value, **kwargs):
    return torch.autograd.grad(value, inputs(block, x), **kwargs)


def accumulated(block, x):
    return [t.grad for t in inputs(block, x)]


def is_close(actual, expected, tol, floor):
    if not isinstance(expected, torch.Tensor):
        return actual == expected
    if not isinstance(actual, torch.Tensor) or (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return False
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    # what cancels to zero leaves rounding errors behind
    return bool((actual - expected).norm() <= tol * (expected.norm() + floor))


def strings(result):
    return [leaf for _, leaf in result[0] if isinstance(leaf, str)] or f'{len(result[0])} results'


def outcome(scenario, block, x):
    block = copy.deepcopy(block)
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(0)
    try:
        result = scenario(block, x)
    except Exception as e:
        return e, None
    leaves, spec = tree_flatten_with_path({'': result, ' of buffers': dict(block.named_buffers())})
    return None, ([(keystr(path), leaf) for path, leaf in leaves], spec)


def check(scenario, block, x, raises=None, tol=1e-8, floor=1e-3):
    """Run a scenario, a function of block and input, on both paths: both give the same, or raise what is said."""
    error, result = outcome(scenario, block, x)
    with plain_path():
        plain_error, expected = outcome(scenario, block, x)
    assert type(plain_error) is (raises or type(None)), repr(plain_error)  # what is wrong with the test itself
    if raises is not None:
        assert type(error) is raises, f'{error!r} where the plain path raises {plain_error!r}'
        return
    if error is not None:
        raise error
    assert result[1] == expected[1], f'{strings(result)} where the plain path has {strings(expected)}'
    wrong = [name for (name, a), (_, e) in zip(result[0], expected[0], strict=True) if not is_close(a, e, tol, floor)]
    assert not wrong, f'{len(wrong)} of {len(expected[0])} results differ: {", ".join(wrong[:10])}'


def node_names(out):
    names, nodes = set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [n for n, _ in getattr(node, 'next_functions', ()) if n is not None]
    return names


@every_kind
@both_modes
def test_what_is_compared(kind, training):
    """Without it the other tests could compare the plain path with itself."""
    block, x = build(kind, training), images()
    assert 'AmaxBackward0' not in node_names(block(x))
    with plain_path():
        assert 'AmaxBackward0' in node_names(block(x))


@every_kind
@both_modes
@pytest.mark.parametrize('channels_last', [False, True], ids=['nchw', 'channels_last'])
def test_first_order(kind, training, channels_last):
    def everything(block, x):
        out = block(x)
        with torch.no_grad():
            inferred = block(x)
        return out, out.stride(), inferred, inferred.stride(), gradients(block, x, loss(out))

    block, x = build(kind, training), images()
    if channels_last:
        block, x = (t.to(memory_format=torch.channels_last) for t in (block, x))
    check(everything, block, x)


# ---- second and higher derivatives

@every_kind
@both_modes
@pytest.mark.parametrize('check', [gradcheck, gradgradcheck], ids=['gradcheck', 'gradgradcheck'])
def test_numerical_derivatives(kind, training, check):
    """Random inputs are further from ties and from the zeros of ReLU than the step of the differences, 1e-6."""
    block, x = build(kind, training), images()
    assert check(lambda x, *_: block(x), inputs(block, x.requires_grad_()), fast_mode=True)


@every_kind
def test_numerical_derivatives_forward_mode(kind):
    block, x = build(kind), images()
    assert gradcheck(
        block, x.requires_grad_(), fast_mode=True, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True)
    assert gradgradcheck(block, x, fast_mode=True, check_fwd_over_rev=True, check_batched_grad=True)


def gradient_of_gradients(block, x):
    first = gradients(block, x, loss(block(x)), create_graph=True)
    value = sum((g * noise(g.shape, i)).sum() for i, g in enumerate(first))
    return first, gradients(block, x, value)


def gradient_of_each_gradient(block, x):
    first = gradients(block, x, loss(block(x)), create_graph=True)
    return first, [
        gradients(block, x, (g * noise(g.shape)).sum(), retain_graph=True, allow_unused=True) for g in first]


def gradient_of_input_gradient(block, x):
    g, = torch.autograd.grad(loss(block(x)), x, create_graph=True)
    return g, gradients(block, x, g.square().sum())


def third_derivative(block, x):
    first = gradients(block, x, loss(block(x)), create_graph=True)
    second = gradients(block, x, sum(g.square().sum() for g in first), create_graph=True)
    return second, gradients(block, x, sum((g * noise(g.shape, i)).sum() for i, g in enumerate(second)))


def backward_with_graph(block, x):
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*reference cycle')
        loss(block(x)).backward(create_graph=True)
    first = accumulated(block, x)
    return first, gradients(block, x, sum(g.square().sum() for g in first))


def first_order_after_second(block, x):
    value = loss(block(x))
    first = gradients(block, x, value, create_graph=True, retain_graph=True)
    second = gradients(block, x, sum(g.square().sum() for g in first), retain_graph=True)
    again = gradients(block, x, value, create_graph=True)
    value.backward()
    return first, second, again, accumulated(block, x)


def second_order_after_first(block, x):
    value = loss(block(x))
    value.backward(retain_graph=True)
    return accumulated(block, x), gradients(
        block, x, gradients(block, x, value, create_graph=True)[0].square().sum())


def two_second_orders(block, x):
    out = block(x)
    first, second = (gradients(block, x, loss(out, seed), create_graph=True) for seed in (2, 3))
    return gradients(block, x, sum((g * h).sum() for g, h in zip(first, second, strict=True)))


def hvp(block, x):
    return functional.hvp(lambda x: loss(block(x)), x, noise(x.shape))


def vhp(block, x):
    return functional.vhp(lambda x: loss(block(x)), x, noise(x.shape))


def with_parameters(block, x):
    """Loss as a function of some parameters, and those parameters."""
    names = [n for n, p in block.named_parameters() if p.numel() <= 16 or n.endswith('fc1.weight')]
    params = tuple(block.get_parameter(n).detach().clone() for n in names)
    return lambda *p: loss(functional_call(block, dict(zip(names, p, strict=True)), (x,))), params


def hessian_of_parameters(block, x):
    return functional.hessian(*with_parameters(block, x))


def hessian_by_rows(block, x):
    _, norm = last(block)
    wanted = [norm.weight, norm.bias, next(block.se.channel.fc2.parameters()), next(block.parameters())]
    first = torch.autograd.grad(loss(block(x)), wanted, create_graph=True)
    return [
        torch.autograd.grad(value, wanted, retain_graph=True)
        for g in first[:2] for value in g.flatten()]


def r1_penalty(block, x):
    scores = block(x).flatten(1).square().sum(1)
    g, = torch.autograd.grad(scores.sum(), x, create_graph=True)
    (scores.mean() + 5 * g.square().sum()).backward()
    return g, accumulated(block, x)


def maml_functional(block, x):
    params = dict(block.named_parameters())
    first = torch.autograd.grad(loss(functional_call(block, params, (x,))), params.values(), create_graph=True)
    adapted = {n: p - 0.01 * g for (n, p), g in zip(params.items(), first, strict=True)}
    loss(functional_call(block, adapted, (x.flip(3),)), seed=3).backward()
    return accumulated(block, x)


def maml_in_modules(block, x):
    """As learn2learn does: the adapted tensors take the parameters' places in the modules."""
    params = dict(block.named_parameters())
    for _ in range(2):
        now = {n: block.get_submodule(n.rpartition('.')[0])._parameters[n.rpartition('.')[2]] for n in params}
        first = torch.autograd.grad(loss(block(x)), list(now.values()), create_graph=True)
        for (name, p), g in zip(now.items(), first, strict=True):
            module, _, own = name.rpartition('.')
            block.get_submodule(module)._parameters[own] = p - 0.01 * g
    loss(block(x.flip(3)), seed=3).backward()
    return [p.grad for p in params.values()]


SECOND_ORDER = (
    gradient_of_gradients, gradient_of_each_gradient, gradient_of_input_gradient, third_derivative,
    backward_with_graph, first_order_after_second, second_order_after_first, two_second_orders, hvp, vhp,
    hessian_of_parameters, hessian_by_rows, r1_penalty, maml_functional, maml_in_modules)


@every_kind
@both_modes
@each(*SECOND_ORDER)
def test_second_order(scenario, kind, training):
    beyond_batch_norm = scenario is third_derivative and training  # which has two derivatives
    check(scenario, build(kind, training), images(), raises=RuntimeError if beyond_batch_norm else None)


@pytest.mark.parametrize('name', ['cbam_resnet18', 'cbam_resnet50', 'cbam_resnet18_eccv18'])
@both_modes
@each(gradient_of_gradients, r1_penalty, maml_functional, maml_in_modules)
def test_second_order_of_models(scenario, name, training):
    check(scenario, build_model(name, training), noise((2, 3, 32, 32)))


def test_second_order_channels_last():
    block, x = (t.to(memory_format=torch.channels_last) for t in (build('basic', True), images()))
    check(gradient_of_each_gradient, block, x)


# ---- batched, forward-mode, functional and traced derivatives

def jacobian_vectorized(block, x):
    return functional.jacobian(lambda x: block(x).sum((2, 3)), x, vectorize=True)


def jacobian_forward_mode(block, x):
    return functional.jacobian(
        lambda column: block(torch.cat([column, x[..., 1:]], dim=3)), x[..., :1], strategy='forward-mode',
        vectorize=True)


def batched_gradients(block, x):
    out = block(x)
    return gradients(block, x, out, grad_outputs=noise((3, *out.shape)), is_grads_batched=True)


def batched_second_gradients(block, x):
    g, = torch.autograd.grad(loss(block(x)), x, create_graph=True)
    return gradients(block, x, g, grad_outputs=noise((3, *g.shape)), is_grads_batched=True)


def batched_gradients_with_graph(block, x):
    out = block(x)
    rows = gradients(block, x, out, grad_outputs=noise((2, *out.shape)), is_grads_batched=True, create_graph=True)
    return gradients(block, x, sum(r.square().sum() for r in rows))


def dual_input(block, x):
    with fwAD.dual_level():
        return list(fwAD.unpack_dual(block(fwAD.make_dual(x, noise(x.shape)))))


def dual_input_no_grad(block, x):
    with torch.no_grad():
        return dual_input(block, x)


def dual_parameters(block, x):
    results = []
    with torch.no_grad(), fwAD.dual_level():
        for name, p in block.named_parameters():
            dual = fwAD.make_dual(p.detach(), noise(p.shape))
            results += fwAD.unpack_dual(functional_call(block, {name: dual}, (x,)))
    return results


def dual_gradient_of_eager_graph(block, x):
    """Forward over reverse, where the graph was there before the level."""
    out = block(x)
    with fwAD.dual_level():
        grad = fwAD.make_dual(noise(out.shape), noise(out.shape, 1))
        return [tuple(fwAD.unpack_dual(g)) for g in gradients(block, x, out, grad_outputs=grad)]


def func_jvp_of_eager_backward(block, x):
    out = block(x)
    return torch.func.jvp(
        lambda g: gradients(block, x, out, grad_outputs=g), (noise(out.shape),), (noise(out.shape, 1),))


def func_vmap_of_eager_backward(block, x):
    out = block(x)
    return torch.func.vmap(lambda g: gradients(block, x, out, grad_outputs=g, retain_graph=True))(
        noise((3, *out.shape)))


def autograd_jvp(block, x):
    return functional.jvp(block, x, noise(x.shape))


def autograd_vjp(block, x):
    return functional.vjp(block, x, noise(block(x).shape))


def func_grad(block, x):
    return torch.func.grad(lambda x: loss(block(x)))(x)


def func_grad_of_parameters(block, x):
    f, params = with_parameters(block, x)
    return torch.func.grad(f, argnums=tuple(range(len(params))))(*params)


def func_grad_with_buffers(block, x):
    def value(params, buffers):
        buffers = {n: b.clone() for n, b in buffers.items()}
        return loss(functional_call(block, {**params, **buffers}, (x,))), buffers

    return torch.func.grad(value, has_aux=True)(dict(block.named_parameters()), dict(block.named_buffers()))


def func_vjp(block, x):
    out, pull = torch.func.vjp(block, x)
    return out, pull(noise(out.shape))


def func_jvp(block, x):
    return torch.func.jvp(block, (x,), (noise(x.shape),))


def func_vmap(block, x):
    return torch.func.vmap(block)(torch.stack([x, 2 * x]))


def func_vmap_of_samples(block, x):
    return torch.func.vmap(lambda x: torch.func.grad(lambda x: loss(block(x[None])))(x))(x)


def func_vmap_of_ensemble(block, x):
    params = {n: torch.stack([p, 1.1 * p]).detach() for n, p in block.named_parameters()}
    return torch.func.vmap(lambda p: functional_call(block, p, (x,)))(params)


def func_jacrev(block, x):
    return torch.func.jacrev(lambda x: block(x).sum((2, 3)))(x)


def func_jacfwd(block, x):
    return torch.func.jacfwd(lambda column: block(torch.cat([column, x[..., 1:]], dim=3)))(x[..., :1])


def func_hessian(block, x):
    f, params = with_parameters(block, x)
    return torch.func.hessian(f, argnums=(0, 1))(*params)


def traced_forward(block, x):
    return make_fx(block)(x.detach())(2 * x.detach())


def traced_forward_and_backward(block, x):
    def step(x):
        x = x.detach().requires_grad_()
        out = block(x)
        return out, gradients(block, x, loss(out))

    return make_fx(step)(x.detach())(2 * x.detach())


def traced_backward_of_eager_graph(block, x):
    """The traced function has to depend on its argument, rather than hold what the trace's gradient gave."""
    out = block(x)
    traced = make_fx(lambda g: gradients(block, x, out, grad_outputs=g, retain_graph=True))(noise(out.shape))
    return traced(noise(out.shape, 1))


def fake_tensors(block, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(x.detach()).requires_grad_()
        out = block(x)
        return out.shape, [g.shape for g in gradients(block, x, loss(out))]


def fake_gradient_of_eager_graph(block, x):
    out = block(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        grad = mode.from_tensor(noise(out.shape))
        return [g.shape for g in gradients(block, x, out, grad_outputs=grad)]


TRANSFORMS = (
    jacobian_vectorized, jacobian_forward_mode, batched_gradients, batched_second_gradients,
    batched_gradients_with_graph, dual_input, dual_input_no_grad, dual_parameters, dual_gradient_of_eager_graph,
    func_jvp_of_eager_backward, func_vmap_of_eager_backward, autograd_jvp, autograd_vjp, func_grad,
    func_grad_of_parameters, func_grad_with_buffers, func_vjp, func_jvp, func_vmap, func_vmap_of_samples,
    func_vmap_of_ensemble, func_jacrev, func_jacfwd, func_hessian, traced_forward, traced_forward_and_backward,
    traced_backward_of_eager_graph, fake_tensors, fake_gradient_of_eager_graph)
# In train mode they meet statistics which are not theirs to update.
EVAL_ONLY = (
    func_grad, func_grad_of_parameters, func_vjp, func_jvp, func_vmap, func_vmap_of_samples, func_vmap_of_ensemble,
    func_jacrev, func_jacfwd, func_hessian)


@every_kind
@both_modes
@each(*TRANSFORMS)
def test_transforms(scenario, kind, training):
    refused = training and scenario in EVAL_ONLY
    check(scenario, build(kind, training), images(), raises=RuntimeError if refused else None)


def compiled_backward(backend, order):
    def scenario(block, x):
        value = loss(block(x))
        torch.compiler.reset()
        with compiled_autograd._enable(torch.compile(backend=backend, fullgraph=True)):
            if order == 1:
                value.backward()
                return accumulated(block, x)
            g, = torch.autograd.grad(value, x, create_graph=True)
        return gradients(block, x, g.square().sum())

    return scenario


def test_compiled_autograd():
    check(compiled_backward('aot_eager', 1), build('bottleneck', True), images())


def test_compiled_autograd_second_order():
    check(compiled_backward('eager', 2), build('basic'), images())


def test_compiled_autograd_by_its_setting():
    def scenario(block, x):
        value = loss(block(x))
        torch.compiler.reset()
        with torch._dynamo.config.patch(compiled_autograd=True):
            torch.compile(lambda: value.backward(), backend='eager')()
        return accumulated(block, x)

    check(scenario, build('eccv18', True), images())


# ---- several losses, several forward passes

@every_kind
@both_modes
def test_losses_in_every_order(kind, training):
    """Every order of three losses over one forward pass, after each of which the graph is retained or not."""
    def scenario(order, kept):
        def run(block, x):
            out = block(x)
            losses = loss(out), out[:, ::2].mean(), (out * noise(out.shape, 3)).sum()
            results = []
            for i in order:
                try:
                    results.append(gradients(block, x, losses[i], retain_graph=i in kept))
                except RuntimeError as e:
                    results.append(str(e)[:60])  # a graph that is gone
            return results

        return run

    block, x = build(kind, training), images()
    for order in itertools.permutations(range(3)):
        for n in range(3):
            for kept in itertools.combinations(range(3), n):
                check(scenario(order, kept), block, x)


def siamese_first_first(block, x):
    a, b = loss(block(x)), loss(block(x.flip(3)), 3)
    return gradients(block, x, a), gradients(block, x, b)


def siamese_last_first(block, x):
    a, b = loss(block(x)), loss(block(x.flip(3)), 3)
    return gradients(block, x, b), gradients(block, x, a)


def siamese_interleaved(block, x):
    a, b = loss(block(x)), loss(block(x.flip(3)), 3)
    results = [gradients(block, x, value, retain_graph=True) for value in (a, b, a, b, b, a)]
    return results, gradients(block, x, a * b)


def siamese_together(block, x):
    a, b = block(x), block(x.flip(3))
    (a - b).square().sum().backward(retain_graph=True)
    (a * b).sum().backward()
    return accumulated(block, x)


def siamese_one_without_gradient(block, x):
    a = block(x)
    with torch.no_grad():
        b = block(x.flip(3))
    loss(a - b).backward()
    return accumulated(block, x)


def siamese_one_dropped(block, x):
    a, b = block(x), block(x.flip(3))
    del a
    loss(b).backward()
    return accumulated(block, x)


def same_input_twice(block, x):
    return gradients(block, x, loss(block(x) + 2 * block(x)))


def block_after_itself(block, x):
    out = block(x)
    for _ in range(2):
        out = block(out if block.downsample is None else out[:, ::2])
    return out, gradients(block, x, loss(out))


def output_twice(block, x):
    out = block(x)
    return gradients(block, x, loss(out) + (out.relu() * noise(out.shape, 5)).sum() + out[0].amax())


def output_and_input(block, x):
    """The input goes elsewhere, too, as in a network with skip connections."""
    x2 = x * 1.5
    return gradients(block, x, loss(block(x2)) + loss(x2) + x2[:, :1].exp().sum())


def backward_twice(block, x):
    value = loss(block(x))
    first, second = (gradients(block, x, value, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    value.backward(retain_graph=True)
    value.backward()
    return first, accumulated(block, x)


def one_input_at_a_time(block, x):
    value = loss(block(x))
    return [torch.autograd.grad(value, t, retain_graph=True) for t in inputs(block, x)]


def backward_with_inputs(block, x):
    value = loss(block(x))
    for t in reversed(inputs(block, x)):
        value.backward(inputs=[t], retain_graph=True)
    return accumulated(block, x)


def gradients_of_many_layouts(block, x):
    out = block(x)
    g = noise(out.shape)
    grads = (
        g, g.to(memory_format=torch.channels_last), g.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([g, g], dim=-1)[..., 1], g[:1, :1, :1, :1].expand_as(g), g[:, :1].expand_as(g), g.flip(0) * 0)
    return [gradients(block, x, out, grad_outputs=t, retain_graph=True) for t in grads]


def inputs_of_many_layouts(block, x):
    views = (
        x.transpose(2, 3).contiguous().transpose(2, 3), torch.stack([x, x], dim=-1)[..., 1], x[:1].expand_as(x),
        x.to(memory_format=torch.channels_last), torch.cat([x, x], dim=1)[:, :x.shape[1]], x[..., :1].expand_as(x))
    return [(out, gradients(block, x, loss(out))) for out in map(block, views)]


def hooks_on_tensors(block, x):
    seen = []
    handles = [t.register_hook(lambda g, i=i: seen.append(g) or (i + 1) * g) for i, t in enumerate(inputs(block, x))]
    out = block(x)
    out.register_hook(lambda g: seen.append(g) or 2 * g)
    out.retain_grad()
    out.grad_fn.register_prehook(lambda g: tuple(3 * t for t in g))
    loss(out).backward()
    del handles
    return seen[0], out.grad, accumulated(block, x)


def hooks_after_accumulation(block, x):
    """As optimizers do which step within the backward pass."""
    def step(p):
        with torch.no_grad():
            p -= 0.01 * p.grad
        p.grad = None

    for p in block.parameters():
        p.register_post_accumulate_grad_hook(step)
    loss(block(x)).backward()
    return list(block.parameters()), x.grad


GRAPHS = (
    siamese_first_first, siamese_last_first, siamese_interleaved, siamese_together, siamese_one_without_gradient,
    siamese_one_dropped, same_input_twice, block_after_itself, output_twice, output_and_input, backward_twice,
    one_input_at_a_time, backward_with_inputs, gradients_of_many_layouts, inputs_of_many_layouts, hooks_on_tensors,
    hooks_after_accumulation)


@every_kind
@both_modes
@each(*GRAPHS)
def test_graphs(scenario, kind, training):
    check(scenario, build(kind, training), images())


@every_kind
@both_modes
@pytest.mark.parametrize('when', ['map_alone', 'map_first', 'map_last', 'together', 'map_retained', 'hooks_removed'])
@pytest.mark.parametrize('gate', ['se.channel.gate', 'se.spatial.gate', 'both'])
def test_losses_on_attention_maps(gate, when, kind, training):
    def scenario(block, x):
        maps = []
        for name in ('se.channel.gate', 'se.spatial.gate') if gate == 'both' else (gate,):
            handle = block.get_submodule(name).register_forward_hook(lambda m, i, o: maps.append(o))
        out = block(x)
        if when == 'hooks_removed':
            handle.remove()
        task, attention = loss(out), sum(loss(m, 5) for m in maps)
        losses = {
            'map_alone': [attention], 'map_first': [attention, task], 'map_last': [task, attention],
            'together': [task + 3 * attention], 'map_retained': [attention, attention, task, attention],
            'hooks_removed': [task, attention]}[when]
        return maps, [gradients(block, x, value, retain_graph=True, allow_unused=True) for value in losses]

    check(scenario, build(kind, training), images())


@every_kind
@both_modes
def test_frozen_subsets(kind, training):
    """Every subset of input, early layers, the last norm's weight, its bias, both gates and downsample."""
    _, norm = last(build(kind))
    names = {id(p): n for n, p in build(kind).named_parameters()}
    groups = {'input': []}
    for name in names.values():
        module = name.split('.')[0]
        group = name if module == ('bn3' if kind == 'bottleneck' else 'bn2') else (
            name.rpartition('.')[0][:10] if module == 'se' else 'downsample' if module == 'downsample' else 'early')
        groups.setdefault(group, []).append(name)
    block, x = build(kind, training), images()

    def scenario(wanted):
        def run(block, x):
            x.requires_grad_('input' in wanted)
            for group, members in groups.items():
                for name in members:
                    block.get_parameter(name).requires_grad_(group in wanted)
            out = block(x)
            if wanted:
                loss(out).backward()
            return out, out.requires_grad, accumulated(block, x)

        return run

    for n in range(len(groups) + 1):
        for wanted in itertools.combinations(groups, n):
            check(scenario(wanted), block, x)


def frozen_second_order(block, x):
    """Only the gates learn, from a penalty on the gradient by the gates' own weights."""
    block.requires_grad_(False)
    block.se.requires_grad_(True)
    x.requires_grad_(False)
    wanted = list(block.se.parameters())
    first = torch.autograd.grad(loss(block(x)), wanted, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)


def frozen_after_forward(block, x):
    value = loss(block(x))
    block.requires_grad_(False)
    block.se.requires_grad_(True)
    value.backward()
    return accumulated(block, x)


# ---- what happens between forward and backward

def doubled_output(block, x):
    out = block(x)
    out.mul_(2)
    return out, gradients(block, x, loss(out))


def incremented_output(block, x):
    out = block(x)
    out += 1
    return out, gradients(block, x, loss(out))


def relu_on_output(block, x):
    out = torch.relu_(block(x))
    return out, gradients(block, x, loss(out))


def view_of_output(block, x):
    out = block(x)
    out[:, 0].zero_()
    return out, gradients(block, x, loss(out))


def output_restored(block, x):
    """Values are the same again, but autograd counts writes."""
    out = block(x)
    with torch.no_grad():
        out.add_(1).sub_(1)
    return gradients(block, x, loss(out))


def changed_input(block, x):
    x2 = x * 1
    out = block(x2)
    x2 += 1
    return out, gradients(block, x, loss(out))


def changed_input_without_gradients(block, x):
    with torch.no_grad():
        x2 = x * 1
        out = block(x2)
        before = out.clone()
        x2 += 1
        return before, out


def cleared_data(block, x):
    """What was saved is the tensor, whatever its parameter points to by now."""
    value = loss(block(x))
    for p in block.parameters():
        p.data = torch.zeros_like(p)
    return gradients(block, x, value)


def replaced_parameters(block, x):
    value = loss(block(x))
    wanted = inputs(block, x)
    for m in block.modules():
        for name, p in list(m._parameters.items()):
            m._parameters[name] = None if p is None else nn.Parameter(2 * p.detach())
    first = torch.autograd.grad(value, wanted, create_graph=True)
    return first, torch.autograd.grad(sum(g.square().sum() for g in first), wanted)


def changed_settings(block, x):
    value = loss(block(x))
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps, m.momentum = 0.5, 0.9
    block.train(not block.training)
    first = gradients(block, x, value, create_graph=True)
    return first, gradients(block, x, sum(g.square().sum() for g in first))


def replaced_statistics(block, x):
    """Other buffers in the places of those that forward used."""
    value = loss(block(x))
    for m in block.modules():
        for name, b in list(m._buffers.items()):
            m._buffers[name] = b + 1
    first = gradients(block, x, value, create_graph=True)
    return first, gradients(block, x, sum(g.square().sum() for g in first))


def optimizer_step_between(block, x):
    """A step of the optimizer between a forward pass and its backward pass, as in GANs that are written wrongly."""
    value = loss(block(x))
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    loss(block(x), 3).backward(retain_graph=True)
    optimizer.step()
    return gradients(block, x, value)


def freed_graph(block, x):
    value = loss(block(x))
    value.backward()
    value.backward()


def second_order_of_freed_graph(block, x):
    first = gradients(block, x, loss(block(x)), create_graph=True, retain_graph=False)
    gradients(block, x, first[0].square().sum())
    gradients(block, x, first[0].sum())


BETWEEN = {
    doubled_output: RuntimeError, incremented_output: RuntimeError, relu_on_output: RuntimeError,
    view_of_output: RuntimeError, output_restored: RuntimeError, changed_input: RuntimeError,
    optimizer_step_between: RuntimeError, freed_graph: RuntimeError, second_order_of_freed_graph: RuntimeError,
    changed_input_without_gradients: None, cleared_data: None, replaced_parameters: None, changed_settings: None,
    replaced_statistics: None, frozen_second_order: None, frozen_after_forward: None}


@every_kind
@both_modes
@each(*BETWEEN)
def test_between_forward_and_backward(scenario, kind, training):
    check(scenario, build(kind, training), images(), raises=BETWEEN[scenario])


@pytest.mark.parametrize('name', [
    n for kind in ('eccv18', 'bottleneck') for n in (f'{kind}:{k}' for k in build(kind).state_dict())])
@both_modes
def test_tensor_changed_before_backward(name, training):
    """Parameters and buffers written to after the forward pass: an error where one is needed, else no difference."""
    kind, name = name.split(':')

    def scenario(block, x):
        value = loss(block(x))
        with torch.no_grad():
            block.state_dict(keep_vars=True)[name].mul_(2)
        try:
            return gradients(block, x, value)
        except RuntimeError as e:
            return str(e)[:80]

    check(scenario, build(kind, training), images())


# ---- what does not fit

def empty_batch(block, x):
    out = block(x[:0])
    return out, gradients(block, x, out.sum())


def single_element(block, x):
    return block(x[:1, :, :1, :1])


def single_row(block, x):
    out = block(x[:, :, :1])
    return out, gradients(block, x, loss(out))


def without_batch(block, x):
    return block(x[0])


def other_channels(block, x):
    return block(x[:, 1:])


def other_dtype(block, x):
    return block(x.float())


def integers(block, x):
    return block(x.long())


def meta_input(block, x):
    return block(x.to('meta'))


def not_a_tensor(block, x):
    return block(x.tolist())


def smaller_branch(block, x):
    conv, _ = last(block)
    conv.stride = 2
    return block(x)


def broadcast_shortcut(block, x):
    block.downsample = nn.Sequential(nn.AdaptiveAvgPool2d(1), *(block.downsample or ()))
    if block.training:
        block.downsample.eval()
    out = block(x)
    return out, gradients(block, x, loss(out))


def single_precision_shortcut(block, x):
    class Single(nn.Module):
        def forward(self, x):
            return x.float()

    block.downsample = nn.Sequential(*(block.downsample or ()), Single())
    out = block(x)
    return out, gradients(block, x, loss(out))


MISFITS = {
    empty_batch: None, single_element: ValueError, single_row: None, without_batch: ValueError,
    other_channels: RuntimeError, other_dtype: RuntimeError, integers: RuntimeError, meta_input: RuntimeError,
    not_a_tensor: TypeError, smaller_branch: RuntimeError, broadcast_shortcut: None, single_precision_shortcut: None}


@every_kind
@both_modes
@each(*MISFITS)
def test_misfits(scenario, kind, training):
    raises = MISFITS[scenario]
    if scenario is single_element and not training:
        raises = None
    check(scenario, build(kind, training), images(), raises=raises, tol=1e-6)


# ---- where and how graphs run

def backward_in_another_thread(block, x):
    value = loss(block(x))
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(gradients, block, x, value).result()


def forward_in_another_thread(block, x):
    with ThreadPoolExecutor(1) as pool:
        value = pool.submit(lambda: loss(block(x))).result()
    return gradients(block, x, value)


def threads_at_once(block, x):
    state = copy.deepcopy(block.state_dict())
    start = threading.Barrier(2)

    def work(seed):
        start.wait()
        return [gradients(block, x, loss(block(x * seed), seed), create_graph=True)[:2] for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, (1, 2)))
    block.load_state_dict(state)  # the threads' updates of the statistics have no order
    return results


def two_backwards_at_once(block, x):
    value = loss(block(x))
    start = threading.Barrier(2)

    def work(scale):
        start.wait()
        return [gradients(block, x, scale * value, retain_graph=True) for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, (1, 2)))


def saved_tensors_hooks(block, x):
    """Which hand out a copy, of another layout, at a later time."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.detach().clone().numpy(), t.dtype),
                                                  lambda s: torch.from_numpy(s[0].copy()).to(s[1])):
        value = loss(block(x))
    return gradients(block, x, value)


def saved_on_cpu(block, x):
    with torch.autograd.graph.save_on_cpu():
        value = loss(block(x))
        first = gradients(block, x, value, create_graph=True)
    return first, gradients(block, x, first[0].square().sum())


def saved_tensors_hooks_disabled(block, x):
    with torch.autograd.graph.disable_saved_tensors_hooks('none here'):
        return gradients(block, x, loss(block(x)))


def mutation_allowed(block, x):
    """Autograd clones what is written to, so that an output may be changed."""
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        out = block(x)
        out.mul_(2)
        return out, gradients(block, x, loss(out))


def checkpoint_reentrant(block, x):
    loss(checkpoint(block, x, use_reentrant=True)).backward()
    return accumulated(block, x)


def checkpoint_not_reentrant(block, x):
    value = loss(checkpoint(block, x, use_reentrant=False))
    first = gradients(block, x, value, create_graph=True)
    return first, gradients(block, x, first[0].square().sum())


def checkpoint_selective(block, x):
    def policy(ctx, op, *args, **kwargs):
        of_map = 'convolution' in str(op) and args[0].shape[-1] > 2  # ReLU overwrites those of the MLP
        return CheckpointPolicy.MUST_SAVE if of_map else CheckpointPolicy.PREFER_RECOMPUTE

    context_fn = partial(create_selective_checkpoint_contexts, policy)
    loss(checkpoint(block, x, use_reentrant=False, context_fn=context_fn)).backward()
    return accumulated(block, x)


def checkpoint_nested(block, x):
    def inner(x):
        return checkpoint(block, x, use_reentrant=False)

    loss(checkpoint(inner, x, use_reentrant=False)).backward()
    return accumulated(block, x)


def copied_after_forward(block, x):
    fields = [sorted(vars(m)) for m in block.modules()]
    size = len(pickle.dumps(block))
    value = loss(block(x))
    assert fields == [sorted(vars(m)) for m in block.modules()] and size == len(pickle.dumps(block))
    copies = copy.deepcopy(block), pickle.loads(pickle.dumps(block))
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    copies += torch.load(buffer, weights_only=False),
    return gradients(block, x, value), [gradients(b, x, loss(b(x))) for b in copies]


def anomaly_mode(block, x):
    with torch.autograd.detect_anomaly():
        return gradient_of_input_gradient(block, x)


def anomaly_mode_infinite(block, x):
    with torch.autograd.detect_anomaly():
        loss(block(x / 0)).backward()


def inference_mode_then_training(block, x):
    with torch.inference_mode():
        before = block(x)
    return before.is_inference(), before.clone(), gradients(block, x, loss(block(x)))


def inference_input_in_graph(block, x):
    with torch.inference_mode():
        x2 = x * 2
    return gradients(block, x, loss(block(x2)))


def graph_is_freed(block, x):
    """By counting references alone, with and without a backward pass."""
    results = []
    gc.disable()
    try:
        for order in (0, 1, 2):
            x2 = x * 1
            alive = weakref.ref(x2)
            value = loss(block(x2))
            if order:
                first = gradients(block, x, value, create_graph=order == 2)
                del first
            del value, x2
            results.append(alive() is None)
    finally:
        gc.enable()
    return results


CIRCUMSTANCES = {
    backward_in_another_thread: None, forward_in_another_thread: None, threads_at_once: None,
    two_backwards_at_once: None, saved_tensors_hooks: None, saved_on_cpu: None, saved_tensors_hooks_disabled: None,
    mutation_allowed: None, checkpoint_reentrant: None, checkpoint_not_reentrant: None, checkpoint_selective: None,
    checkpoint_nested: None, copied_after_forward: None, anomaly_mode: None, anomaly_mode_infinite: RuntimeError,
    inference_mode_then_training: None, inference_input_in_graph: RuntimeError, graph_is_freed: None}


@every_kind
@both_modes
@each(*CIRCUMSTANCES)
@pytest.mark.filterwarnings('ignore:Anomaly Detection')
def test_circumstances(scenario, kind, training):
    check(scenario, build(kind, training), images(), raises=CIRCUMSTANCES[scenario])


@pytest.mark.parametrize('options', [{}, {'find_unused_parameters': True}, {'static_graph': True}], ids=str)
@both_modes
def test_distributed_data_parallel(options, training):
    """One process, whose gradients DDP's hooks put into buckets."""
    def scenario(model, x):
        torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(model, **options)
            for seed in (2, 3):
                loss(parallel(x), seed).backward()
        finally:
            torch.distributed.destroy_process_group()
        return accumulated(model, x)

    check(scenario, build_model(training=training), noise((2, 3, 32, 32)))


def backward_under_autocast(block, x):
    value = loss(block(x))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        return gradients(block, x, value)


def backward_of_graph_under_autocast(block, x):
    """The first derivative's graph is made under autocast, the second is taken outside it."""
    value = loss(block(x))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        first = gradients(block, x, value, create_graph=True)
    return first, gradients(block, x, first[0].square().sum())


@every_kind
@both_modes
@each(backward_under_autocast, backward_of_graph_under_autocast)
def test_backward_under_autocast(scenario, kind, training):
    """It is the forward pass whose precision autocast chooses."""
    check(scenario, build(kind, training).float(), images().float(), tol=1e-4)


# ---- numbers

def offset_block(kind, training, deviations, dtype, seed):
    """A block whose last batch-norm gets channels with means that many deviations from zero, and images for it.

    What the last convolution sees as its first channel is one everywhere.
    """
    torch.manual_seed(seed)
    block, x = build(kind), noise((16, 8, 9, 7), seed)
    conv, norm = last(block)
    before = block.bn2 if kind == 'bottleneck' else block.bn1
    seen = []
    handle = conv.register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        for p in block.parameters():
            if p.ndim == 4:
                p.copy_(noise(p.shape, 100 * seed + p.numel()) * p[0].numel() ** -0.5)
        before.weight[0], before.bias[0] = 0, 1
        conv.weight[:, 0] = 0
        block(x)
        deviation = seen.pop().std((0, 2, 3))
        center = conv.kernel_size[0] // 2
        conv.weight[:, 0, center, center] = deviations * deviation * noise(deviation.shape, seed).sign()
        block(x)
        norm.running_mean.copy_(seen[0].mean((0, 2, 3)))
        norm.running_var.copy_(seen[0].var((0, 2, 3)))
    handle.remove()
    return block.train(training).to(dtype), x.to(dtype)


PRECISIONS = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'autocast': torch.float32}


def errors_by_path(block, x, autocast):
    """Relative errors of output, gradients and buffers by name, of the fused and of the plain path.

    The reference in float64 gets the map that the last convolution gives in the lower precision, because what that has
    rounded away before would hide all that the tail does.
    """
    def compute(block, x, hook=None):
        block, x = copy.deepcopy(block), x.clone().requires_grad_()
        if hook is not None:
            last(block)[0].register_forward_hook(hook)
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
            out = block(x)
        names = ['input', *(n for n, _ in block.named_parameters())]
        grads = gradients(block, x, out, grad_outputs=noise(out.shape).bfloat16().to(out.dtype))
        buffers = {f'buffer {n}': b for n, b in block.named_buffers() if b.is_floating_point()}
        return {'output': out.detach(), **dict(zip(names, grads, strict=True)), **buffers}

    maps = []
    fused = compute(block, x)
    with plain_path():
        plain = compute(block, x, lambda m, i, o: maps.append(o.detach().double()))
        exact = compute(copy.deepcopy(block).double(), x.double(), lambda m, i, o: o + (maps[0] - o).detach())
    constant = ('bn2' if hasattr(block, 'conv3') else 'bn1') + '.'
    for name, e in exact.items():
        # of the constant channel, one number is rounding alone
        own = slice(1, None) if name.startswith(constant) else slice(None)
        yield name, *(((t[name].double() - e)[own].norm() / e[own].norm()).clamp(min=1e-12) for t in (fused, plain))


@pytest.mark.parametrize('precision, deviations', [
    *itertools.product(['float32', 'bfloat16'], [0, 1, 10, 30, 100]), ('autocast', 0), ('autocast', 30)])
@both_modes
@pytest.mark.parametrize('kind, memory_format', [
    ('basic', torch.contiguous_format), ('bottleneck', torch.channels_last)], ids=['basic', 'bottleneck-channels_last'])
def test_accuracy(kind, memory_format, training, precision, deviations):
    """Output, running statistics and all gradients are about as near to float64's as plain operations' are.

    In the geometric mean over random blocks, since in one block a maximum that rounding moves elsewhere decides. What
    computes the tail in the next higher precision stays well within these bounds, with any eight blocks.
    """
    errors = []
    for seed in range(8):
        block, x = (t.to(memory_format=memory_format) for t in offset_block(
            kind, training, deviations, PRECISIONS[precision], seed))
        errors.append(list(errors_by_path(block, x, precision == 'autocast')))
    rounding = 4 * torch.finfo(torch.float32).eps if precision == 'float32' else torch.finfo(torch.bfloat16).eps
    worse = []
    for of_name in zip(*errors, strict=True):
        name = of_name[0][0]
        fused, plain = torch.tensor([e[1:] for e in of_name]).log().mean(0).exp().tolist()
        if not fused <= 1.25 * plain + (rounding / 4 if name == 'output' else rounding):
            worse.append(f'{name}: {fused:.2g} where the plain path has {plain:.2g}')
    assert not worse


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@every_kind
@both_modes
def test_not_finite(value, dtype, kind, training):
    """NaN and infinities are where the plain path has them, and do not reach other samples' gradients."""
    def scenario(position):
        def run(block, x):
            with torch.no_grad():
                x[position] = value
                inferred = copy.deepcopy(block)(x)
            out = block(x)
            others, = torch.autograd.grad(out, x, torch.ones_like(out))
            if training or position[0] != 1:
                others = others[:0]
            else:
                others = others[:1]
            where = [(t.isnan(), t.isposinf(), t.isneginf()) for t in (out, inferred, *block.buffers())]
            for b in block.buffers():
                b.nan_to_num_(0, 0, 0)
            return where, others, others.isfinite().all()

        return run

    block, x = build(kind, training).to(dtype), images().to(dtype)
    rows = slice(None)
    for position in ((1, 0, 0, 0), (1, 7, 4, 5), (1, rows, 2, 3), (1, 2), (1,), (rows, 4, 1, 1)):
        check(scenario(position), block, x, tol=1e-4 if dtype == torch.float32 else 0.05)


def equal_channels(block, x):
    """Of the maps before and after the channel gate, so that all channels are the largest in each pixel."""
    for m in (*last(block), block.se.channel.fc2):
        for t in (*m.parameters(), *m.buffers()):
            if t.ndim:
                t[:] = t[:1]


def equal_pairs_of_channels(block, x):
    for m in (*last(block), block.se.channel.fc2):
        for t in (*m.parameters(), *m.buffers()):
            if t.ndim:
                t[1::2] = t[::2]


def equal_pixels(block, x):
    """Convolutions see one pixel each, and these are the same in both halves."""
    for m in block.modules():
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3):
            center = m.weight[..., 1, 1].clone()
            m.weight.zero_()
            m.weight[..., 1, 1] = center
    x[..., 3:] = x[..., :3]


def all_pixels_equal(block, x):
    equal_pixels(block, x)
    x[:] = x[..., :1, :1]


def everything_equal(block, x):
    all_pixels_equal(block, x)
    equal_channels(block, x)
    x[:] = 0.5


def zero_input(block, x):
    x.zero_()


def zero_weight(block, x):
    """timm's zero_init_last before its first step of training."""
    _, norm = last(block)
    norm.weight.zero_()
    norm.bias.zero_()


def zero_weight_with_bias(block, x):
    last(block)[1].weight.zero_()


def some_zero_weights(block, x):
    _, norm = last(block)
    norm.weight[::3] = 0
    norm.weight[1::3] *= -1
    norm.bias[:] = 0


def zero_convolution(block, x):
    last(block)[0].weight.zero_()


def closed_relus(block, x):
    """Ties of the shortcut with zero, after maps which are zero in most pixels."""
    last(block)[1].weight.mul_(1e-3)
    x.clamp_(max=0)


@every_kind
@both_modes
@pytest.mark.parametrize('order, channels_last', [(1, False), (1, True), (2, False)], ids=[
    'first-nchw', 'first-channels_last', 'second-nchw'])
@each(
    equal_channels, equal_pairs_of_channels, equal_pixels, all_pixels_equal, everything_equal, zero_input, zero_weight,
    zero_weight_with_bias, some_zero_weights, zero_convolution, closed_relus)
def test_ties(scenario, order, channels_last, kind, training):
    """Of equal maxima each gets the same share of the gradient, over channels as over space."""
    block, x = build(kind, training), images()
    with torch.no_grad():
        scenario(block, x)
    if channels_last:
        block, x = (t.to(memory_format=torch.channels_last) for t in (block, x))
    # without any variance the last batch-norm amplifies rounding errors by the hundreds, each time
    scenario, floor = (gradient_of_gradients, 1e3) if order == 2 else (lambda b, x: gradients(b, x, loss(b(x))), 1.)
    check(scenario, block, x, floor=floor)
