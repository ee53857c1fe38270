"""The fused tail of a block equals the reference in values and gradients, and nobody sees that it is there"""
import copy
from functools import partial

import hypothesis
import hypothesis.strategies as st
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import fail, liven, relative_error, run
from timm_cbam.ops.compiled import channel_factors
from torch.utils.checkpoint import checkpoint

from timm_cbam.ops import cbam_residual, cbam_residual_ref

GRADIENTS = ('x', 'shortcut', 'weight', 'bias', 'w0', 'w1', 'kernel')


def channel_gate(w0, w1, pooled):
    return torch.sigmoid(F.linear(torch.relu(F.linear(pooled, w0)).sum(0), w1))[..., None, None]


def spatial_gate(kernel, pooled):
    return torch.sigmoid(F.conv2d(pooled, kernel, padding=3))


def arguments(shape, dtype=torch.float64, seed=0):
    """Arguments of cbam_residual by name, in float64 but with the values of a lower precision."""
    c = shape[1]
    g = torch.Generator().manual_seed(seed)
    shapes = dict(
        x=shape, shortcut=shape, grad=shape, weight=(c,), bias=(c,), running_mean=(c,), running_var=(c,),
        w0=(max(1, c // 4), c), w1=(c, max(1, c // 4)), kernel=(1, 2, 7, 7))
    values = {name: torch.randn(s, generator=g, dtype=torch.float64) for name, s in shapes.items()}
    values['running_var'] = values['running_var'].square() + 0.5
    for name in ('w0', 'w1', 'kernel'):  # gates away from 0 and 1, where 1 - gate has no digits in bfloat16
        values[name] /= values[name][0].numel() ** 0.5
    return {name: value.to(dtype).double() for name, value in values.items()}


def compute(function, args, dtype, training, relu, wanted=GRADIENTS, layout=lambda t: t, **kwargs):
    """Output, running statistics, and the gradients that are wanted."""
    args = {name: t.to(dtype, copy=True) for name, t in args.items()}
    for name in ('x', 'shortcut', 'grad'):
        args[name] = layout(args[name])
    for name in wanted:
        args[name].requires_grad_()
    out = function(
        args['x'], args['shortcut'],
        partial(channel_gate, args['w0'], args['w1']), partial(spatial_gate, args['kernel']),
        args['weight'], args['bias'], args['running_mean'], args['running_var'], training, relu=relu, **kwargs)
    gradients = torch.autograd.grad(out, [args[name] for name in wanted], args['grad']) if wanted else ()
    return out.detach(), args['running_mean'], args['running_var'], *gradients


def error(actual, expected):
    return ((actual.double() - expected).norm() / (expected.norm() + 1e-30)).item()


LAYOUTS = {
    'contiguous': lambda t: t,
    'channels_last': lambda t: t.contiguous(memory_format=torch.channels_last),
    'strided': lambda t: torch.stack([t, t], dim=-1)[..., 0],
    'transposed': lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}
sizes = st.sampled_from([1, 2, 3, 5, 7, 8, 13, 16, 17])


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(
    shape=st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3, 16, 17, 64, 129]), sizes, sizes),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    layout=st.sampled_from(list(LAYOUTS)),
    training=st.booleans(),
    relu=st.booleans(),
    wanted=st.sets(st.sampled_from(GRADIENTS)),
    seed=st.integers(0, 1000),
)
def test_equals_float64_reference(shape, dtype, layout, training, relu, wanted, seed):
    """Relative errors are those of rounding; in bfloat16, where maxima tie, at most twice those of plain operations."""
    if training and shape[0] * shape[2] * shape[3] < 3:
        return  # batch statistics of two elements make every output +-1, whatever x is: gradients are rounding errors
    args = arguments(shape, dtype, seed)
    kinds = dict(training=training, relu=relu, wanted=[name for name in GRADIENTS if name in wanted])
    expected = compute(cbam_residual_ref, args, torch.float64, **kinds)
    plain = compute(cbam_residual_ref, args, dtype, **kinds)
    actual = compute(cbam_residual, args, dtype, layout=LAYOUTS[layout], **kinds)
    for a, p, e in zip(actual, plain, expected, strict=True):
        assert a.shape == e.shape and a.dtype == p.dtype
        bound = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 2 * error(p, e) + 0.05}[dtype]
        assert error(a, e) < bound


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('relu', [False, True])
def test_gradcheck(training, relu):
    args = arguments((2, 4, 3, 5))

    def function(x, shortcut, weight, bias, w0, w1, kernel):
        return cbam_residual(
            x, shortcut, partial(channel_gate, w0, w1), partial(spatial_gate, kernel), weight, bias,
            args['running_mean'].clone(), args['running_var'].clone(), training, relu=relu)

    assert torch.autograd.gradcheck(function, [args[name].requires_grad_() for name in GRADIENTS])


def test_ties():
    """Equal channels: the first gets the gradient of the maximum. Equal pixels: each gets the same share."""
    args = arguments((1, 4, 3, 4))
    args['x'][:, 1:] = args['x'][:, :1]
    for name in ('weight', 'bias', 'running_mean', 'running_var'):
        args[name][:] = args[name][0]
    args['w0'][:] = args['w1'][:] = 0.  # so that F' ties where F does
    actual = compute(cbam_residual, args, torch.float64, False, True)
    expected = compute(cbam_residual_ref, args, torch.float64, False, True)
    assert all(error(a, e) < 1e-12 for a, e in zip(actual, expected, strict=True))

    args = arguments((2, 16, 4, 6))
    args['x'] = args['x'][..., :3].repeat(1, 1, 1, 2)
    args['kernel'][:] = 0.
    actual, expected = (
        compute(f, args, torch.float64, False, False) for f in (cbam_residual, cbam_residual_ref))
    assert all(error(a, e) < 1e-12 for a, e in zip(actual, expected, strict=True))
    args['grad'] = args['grad'][..., :3].repeat(1, 1, 1, 2)
    shared = compute(cbam_residual, args, torch.float64, False, False)[3]
    assert torch.allclose(shared[..., :3], shared[..., 3:], rtol=1e-12)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('training', [False, True])
def test_not_finite(value, training):
    args = arguments((2, 8, 5, 3), torch.float32)
    args['x'][1, 2, 3, 1] = value
    actual, expected = (
        compute(f, args, torch.float32, training, True, wanted=()) for f in (cbam_residual, cbam_residual_ref))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)
    gradients = [compute(f, args, torch.float32, training, True)[3] for f in (cbam_residual, cbam_residual_ref)]
    assert torch.equal(gradients[0].isfinite()[0], gradients[1].isfinite()[0])  # of the sample without it


def test_single_element_and_empty_batch():
    args = arguments((0, 16, 4, 4))
    assert compute(cbam_residual, args, torch.float32, False, True)[0].shape == (0, 16, 4, 4)
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        compute(cbam_residual, arguments((1, 16, 1, 1)), torch.float32, True, True)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_deterministic_and_reproducible(training, layout):
    args = arguments((3, 32, 9, 7), torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [compute(cbam_residual, args, torch.float32, training, True, layout=LAYOUTS[layout]) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_arguments_are_left_alone():
    args = arguments((2, 16, 5, 3), torch.float32)
    for enabled in (False, True):
        before = copy.deepcopy(args)
        with torch.set_grad_enabled(enabled):
            compute(cbam_residual, args, torch.float64, False, True, wanted=GRADIENTS if enabled else ())
        assert all(torch.equal(args[name], before[name]) for name in args)
    # asked for, x holds the result
    x, s = args['x'].float(), args['shortcut'].float()
    with torch.no_grad():
        out = cbam_residual(
            x, s, partial(channel_gate, args['w0'].float(), args['w1'].float()),
            partial(spatial_gate, args['kernel'].float()),
            *(args[name].float() for name in ('weight', 'bias', 'running_mean', 'running_var')), inplace=True)
    assert out.data_ptr() == x.data_ptr()


def test_second_derivative_is_refused():
    args = arguments((2, 8, 5, 3))
    x = args['x'].requires_grad_()
    out = cbam_residual(
        x, args['shortcut'], partial(channel_gate, args['w0'], args['w1']), partial(spatial_gate, args['kernel']),
        *(args[name] for name in ('weight', 'bias', 'running_mean', 'running_var')))
    gradient, = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.sum().backward()


def test_backward_twice():
    args = arguments((2, 8, 5, 3))
    x = args['x'].requires_grad_()
    out = cbam_residual(
        x, args['shortcut'], partial(channel_gate, args['w0'], args['w1']), partial(spatial_gate, args['kernel']),
        *(args[name] for name in ('weight', 'bias', 'running_mean', 'running_var')), True)
    first, second = (torch.autograd.grad(out, x, args['grad'], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# ---- in the model

@pytest.fixture(params=['cbam_resnet18', 'cbam_resnet50', 'cbam_resnet18_eccv18'] + [
    pytest.param(name, marks=pytest.mark.slow) for name in ('cbam_resnet50d', 'cbam_resnext50_32x4d')])
def model(request):
    torch.manual_seed(0)
    return liven(timm.create_model(request.param, num_classes=10, drop_path_rate=0.))


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def plain_operations(monkeypatch):
    monkeypatch.setattr('timm_cbam.cbam_resnet.is_fusable', lambda x: False)


def gradients(model, images, **kwargs):
    model.zero_grad()
    logits = model(images)
    logits.square().sum().backward()
    return [logits.detach()] + [p.grad.clone() for p in model.parameters()] + [b.clone() for b in model.buffers()]


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('channels_last', [False, True])
def test_model_equals_plain_operations(model, images, training, channels_last, monkeypatch):
    """In float64 to rounding; batch-norm's statistics and counters included."""
    model = model.double().train(training)
    images = images.double()
    if channels_last:
        model, images = (t.to(memory_format=torch.channels_last) for t in (model, images))
    other = copy.deepcopy(model)
    with torch.no_grad():
        fused_logits = copy.deepcopy(model)(images)
    fused = gradients(model, images)
    names = set()
    graph = [model(images).grad_fn]
    while graph:
        node = graph.pop()
        names.add(type(node).__name__)
        # those of our functions are not to be had before torch 2.10, but GateAddFn is the first of them
        following = () if isinstance(node, torch._C._FunctionBase) else node.next_functions
        graph += [n for n, _ in following if n is not None and n.name() not in names]
    assert 'GateAddFnBackward' in names
    plain_operations(monkeypatch)
    plain = gradients(other, images)
    assert relative_error(fused_logits, plain[0]) < 1e-12
    assert all(error(a, b.double()) < 1e-8 for a, b in zip(fused, plain, strict=True))


def test_keeps_what_a_resnet_keeps():
    """Bytes for the backward pass beside those of the ResNet without attention."""
    def kept(name):
        model = timm.create_model(name).train()
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randn(2, 3, 224, 224)).sum()
        return sum(s.nbytes() for pointer, s in storages.items() if pointer not in own)

    assert kept('cbam_resnet18') < 1.06 * kept('resnet18')
    assert kept('cbam_resnet50') < 1.02 * kept('resnet50')


@torch.no_grad()
@pytest.mark.parametrize('where', ['conv3', 'bn3', 'se', 'se.channel', 'se.channel.fc1', 'se.spatial', 'act3'])
def test_hooks_see_what_they_always_saw(images, where, monkeypatch):
    torch.manual_seed(0)
    model = liven(timm.create_model('cbam_resnet50', num_classes=10))
    seen = []
    model.layer1[1].get_submodule(where).register_forward_hook(lambda m, i, o: seen.append(o))
    logits = model(images)
    plain_operations(monkeypatch)
    assert relative_error(model(images), logits) < 1e-5
    assert len(seen) == 2 and relative_error(seen[0], seen[1]) < 1e-5


@torch.no_grad()
def test_features_stay_as_they_were_taken(images):
    """A later block may not write into what an earlier one has returned."""
    model = liven(timm.create_model('cbam_resnet18', features_only=True))
    kept = []
    for name in ('layer1', 'layer2', 'layer3'):
        model[name].register_forward_hook(lambda m, i, o: kept.append((o, o.clone())))
    before = images.clone()
    model(images)
    assert torch.equal(images, before) and len(kept) == 3
    assert all(torch.equal(a, b) for a, b in kept)


def test_stochastic_depth(model, images, monkeypatch):
    for block in (b for n, b in model.named_modules() if n.count('.') == 1 and hasattr(b, 'drop_path')):
        block.drop_path = timm.layers.DropPath(0.5)
    model = model.double().train()
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    fused = gradients(model, images.double())
    plain_operations(monkeypatch)
    torch.manual_seed(3)
    plain = gradients(other, images.double())
    assert all(error(a, b.double()) < 1e-8 for a, b in zip(fused, plain, strict=True))


@pytest.mark.parametrize('act_layer', ['silu', 'gelu', 'leaky_relu'])
def test_other_activations(act_layer, images, monkeypatch):
    """They follow the fused tail as they are, in place where they are so."""
    model = liven(timm.create_model('cbam_resnet18', num_classes=10, act_layer=act_layer)).double()
    other = copy.deepcopy(model)
    fused = gradients(model, images.double())
    plain_operations(monkeypatch)
    plain = gradients(other, images.double())
    assert all(error(a, b.double()) < 1e-8 for a, b in zip(fused, plain, strict=True))


def test_other_layers_fall_back(images):
    """Modules that are not what their class says run as they are: other layers, parametrised and replaced ones."""
    model = liven(timm.create_model('cbam_resnet18', num_classes=10, act_layer='silu', norm_layer='groupnorm'))
    assert model(images).isfinite().all()
    model = liven(timm.create_model('cbam_resnet18', num_classes=10))
    expected = model(images)
    torch.nn.utils.parametrizations.weight_norm(model.layer1[0].se.channel.fc1)
    assert relative_error(model(images), expected) < 1e-5
    model.layer1[1].bn2 = torch.nn.Identity()
    assert relative_error(model(images), expected) > 1e-3


def test_checkpointing_and_autocast(model, images):
    model = model.double().train()
    expected = gradients(copy.deepcopy(model), images.double())
    again = copy.deepcopy(model)
    again.set_grad_checkpointing(True)
    gradients(again, images.double())
    assert all(error(p.grad, e) < 1e-8 for p, e in zip(again.parameters(), expected[1:], strict=False))

    block = model.float().layer1[0]
    x = torch.randn(2, 64, 8, 8).requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = checkpoint(block, x, use_reentrant=False)
        loss = out.float().square().sum()
        loss.backward()  # under autocast, as some do
    assert x.grad.isfinite().all()


def test_functional_transforms(images):
    model = liven(timm.create_model('cbam_resnet18', num_classes=10)).double()
    images = images[:2].double()
    params = {k: v.detach() for k, v in model.named_parameters()}

    def loss(params, x):
        return torch.func.functional_call(model, params, (x[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, images)
    gradients(model, images)
    for name, p in model.named_parameters():
        assert error(per_sample[name].sum(0), p.grad) < 1e-8


def test_compile_does_not_recompile_over_batch_size(images):
    model = liven(timm.create_model('cbam_resnet18', num_classes=10))
    torch.compiler.reset()  # what other tests have compiled of the same code would count
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True, backend='eager')
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for x in (images.repeat(n, 1, 1, 1) for n in (2, 3, 5)):
            assert relative_error(compiled(x), model(x)) < 1e-5


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_compiled_inference(model, images, dtype):
    """What the compiler gets in place of plain operations, weights of batch-norms of both signs among it."""
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.weight.data[::2] *= -1
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.no_grad(), torch.autocast('cpu', dtype=dtype, enabled=dtype == torch.bfloat16):
        assert relative_error(compiled(images), model(images)) < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_channel_factors(dtype):
    weight, bias, mean, var = torch.rand(4, 6, dtype=dtype).unbind()
    gate = torch.rand(2, 6, 1, 1, dtype=dtype)
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    expected = F.batch_norm(x, mean.double(), var.double(), weight.double(), bias.double())
    for gates in ((), (gate,)):
        factor, summand = channel_factors(weight, bias, mean, var, 1e-5, *gates)
        scaled = expected * gate.double() if gates else expected
        assert error(x * factor + summand, scaled) < 1e-5  # in float32, whatever the arguments' dtype
        torch.library.opcheck(channel_factors, (weight, bias, mean, var, 1e-5, *gates))


def test_switch():
    code = '''
        import timm, torch
        from timm_cbam.ops import is_fusable
        x = torch.randn(2, 3, 64, 64)
        print(is_fusable(x))
        torch.manual_seed(0)
        print(timm.create_model('cbam_resnet18', zero_init_last=False).eval()(x).shape)
    '''
    assert run(code).startswith('True') and run(code, TIMM_CBAM_FUSED='0').startswith('False')


NO_TRITON = '''
    import sys, timm
    before = {name for name in sys.modules if 'triton' in name}  # PyTorch's own
    import timm_cbam
    added = {name for name in sys.modules if 'triton' in name} - before
    assert not added, f'imported {added}'
'''


def test_import_without_triton():
    run(NO_TRITON, TIMM_CBAM_AUTOLOAD='0')
    code = NO_TRITON.replace('import timm_cbam', 'import timm_cbam.ops.tail_triton')
    assert 'imported' in fail(code, TIMM_CBAM_AUTOLOAD='0')  # the test itself can fail


def test_trains_like_plain_operations(monkeypatch):
    """200 steps on handwritten digits: the same losses."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images[:, None], dtype=torch.float64) / 16 - 0.5
    target = torch.tensor(digits.target)
    curves = []
    for fused in (True, False):
        if not fused:
            plain_operations(monkeypatch)
        torch.manual_seed(0)
        model = timm.create_model(
            'cbam_resnet18_s1', num_classes=10, in_chans=1, channels=(16, 16, 32, 32), layers=(1, 1, 1, 1)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        curve = []
        for step in range(200):
            i = torch.arange(32 * step, 32 * step + 32) % len(x)
            loss = F.cross_entropy(model(x[i]), target[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert sum(curves[0][-20:]) < 0.2 * sum(curves[0][:20])
    assert torch.allclose(*curves, rtol=1e-6)
