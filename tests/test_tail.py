"""The operator for a block's tail equals its reference, by native loops and by PyTorch's operations, in models too"""
import copy
import functools
import itertools
import shutil
from statistics import median

import hypothesis
import hypothesis.strategies as st
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import liven, plain_path, relative_error, run
from torch.utils.checkpoint import checkpoint

from timm_cbam import fusion
from timm_cbam.ops import Tail, cbam_tail, cbam_tail_ref, native, norm_relu_, tail_cpu

MAPS = ('x', 'shortcut', 'grad')
PARAMETERS = (
    'weight', 'bias', 'fc1_weight', 'fc1_bias', 'fc2_weight', 'fc2_bias', 'conv_weight', 'bn_weight', 'bn_bias')
INPUTS = ('x', 'shortcut', *PARAMETERS)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
LAYOUTS = {
    'contiguous': lambda t: t.contiguous(),
    'channels_last': lambda t: t.contiguous(memory_format=torch.channels_last),
    'strided': lambda t: torch.stack([t, t], dim=-1)[..., 0],
    'transposed': lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.fixture(params=['native', 'torch'])
def implementation(request, monkeypatch):
    """A test that has this runs by both."""
    if request.param == 'torch':
        monkeypatch.setattr(tail_cpu, 'supports', lambda x: False)
    elif tail_cpu.LIBRARY is None:
        pytest.skip(f'there are no native loops here: {native.load()[1]}')
    return request.param


def test_library_is_there():
    """Not so is right where there is no compiler, PyTorch is 2.9, or somebody has said so."""
    library, why = native.load()
    if any(map(shutil.which, ('c++', 'g++', 'clang++'))) and why != 'TIMM_CBAM_NATIVE=0' and 'has no torch_' not in why:
        assert library is not None, why


def make(
        shape, dtype=torch.float64, *, hidden=None, mlp_bias=False, spatial_norm=False, factor=False, kernel=7,
        offset=0., seed=0):
    """Arguments by name, in float64 but with the values of a lower precision."""
    b, c = shape[:2]
    hidden = max(1, c // 4) if hidden is None else hidden
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    means = offset * normal(c).sign()
    values = dict(
        x=normal(*shape) + means[:, None, None], shortcut=normal(*shape), grad=normal(*shape), weight=normal(c),
        bias=normal(c), mean=0.5 * normal(c) + means, var=normal(c).square() + 0.5,
        # gates away from 0 and 1, where 1 - gate has no digits in bfloat16
        fc1_weight=normal(hidden, c, 1, 1) / c ** 0.5, fc2_weight=normal(c, hidden, 1, 1) / hidden ** 0.5,
        conv_weight=normal(1, 2, kernel, kernel) / kernel)
    if mlp_bias:
        values.update(fc1_bias=normal(hidden), fc2_bias=normal(c))
    if spatial_norm:
        values.update(bn_weight=normal(1), bn_bias=normal(1), bn_mean=0.1 * normal(1), bn_var=normal(1).square() + 0.5)
    if factor:
        values.update(factor=torch.tensor([2., 0., 1.5, 1.], dtype=torch.float64)[torch.arange(b) % 4].view(b, 1, 1, 1))
    return {name: value.to(dtype).double() for name, value in values.items()}


def tail(values, training=False, bn_training=False, eps=1e-5, bn_eps=1e-5):
    names = Tail._fields[:14]
    return Tail(*(values.get(name) for name in names), training, eps, bn_training and 'bn_weight' in values, bn_eps)


def compute(
        function, values, dtype, *, training=False, bn_training=False, wanted=INPUTS, layout='contiguous', small=None):
    """Output, the gradients that are wanted, and what became of the running statistics.

    small: dtype of the parameters.
    """
    values = {
        name: t.detach().to(dtype if name in (*MAPS, 'factor') else small or dtype, copy=True)
        for name, t in values.items()}
    for name in MAPS:
        values[name] = LAYOUTS[layout](values[name])
    wanted = [name for name in INPUTS if name in wanted and name in values]
    for name in wanted:
        values[name].requires_grad_()
    out = function(values['x'], values['shortcut'], tail(values, training, bn_training))
    found = dict(out=out.detach())
    if wanted:
        gradients = torch.autograd.grad(out, [values[name] for name in wanted], values['grad'])
        found.update(zip(wanted, gradients, strict=True))
    statistics = {name: values[name] for name in ('mean', 'var', 'bn_mean', 'bn_var') if name in values}
    return found, statistics


def keep_from_zero(values, **kwargs):
    """Change the shortcut so that no sum is about zero, where rounding decides what the ReLU lets pass."""
    far = torch.full_like(values['shortcut'], 1e4)
    with torch.no_grad():
        branch = cbam_tail_ref(values['x'], far, tail(values, **kwargs)) - far
    near = (branch + values['shortcut']).abs() < 0.1 + 0.1 * branch.abs()
    values['shortcut'] = torch.where(near, 2 * branch.round() + 1, values['shortcut'])


def errors(actual, expected):
    """By name, relative; those of a parameter in whose gradient everything cancels, to the other parameters'."""
    floor = 0.02 * sum(t.square().sum() for name, t in expected.items() if name in PARAMETERS) ** 0.5
    return {
        name: ((actual[name].double() - e).norm() / (e.norm() + (floor if name in PARAMETERS else 0.) + 1e-30)).item()
        for name, e in expected.items()}


sizes = st.sampled_from([1, 2, 3, 5, 7, 8, 13, 16, 17, 33])


@hypothesis.settings(
    max_examples=200, deadline=None, derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    shape=st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3, 16, 17, 64, 129]), sizes, sizes),
    dtype=st.sampled_from(DTYPES),
    small=st.sampled_from([None, torch.float32]),
    layout=st.sampled_from(list(LAYOUTS)),
    training=st.booleans(),
    bn_training=st.booleans(),
    hidden=st.sampled_from([None, 1, 2, 5, 17]),
    kinds=st.fixed_dictionaries(dict(
        mlp_bias=st.booleans(), spatial_norm=st.booleans(), factor=st.booleans(), kernel=st.sampled_from([1, 3, 7]))),
    wanted=st.one_of(st.just(set(INPUTS)), st.sets(st.sampled_from(INPUTS))),
    seed=st.integers(0, 1000),
)
def test_equals_float64_reference(
        implementation, shape, dtype, small, layout, training, bn_training, hidden, kinds, wanted, seed):
    if shape[0] * shape[2] * shape[3] < 3 and (training or bn_training):
        return  # batch statistics of two elements make every output +-1, whatever x is: gradients are rounding errors
    if dtype != torch.bfloat16:
        small = None
    kwargs = dict(training=training, bn_training=bn_training, wanted=wanted)
    found = []
    # In bfloat16 a maximum that ties or not, or a ReLU's input about zero, changes a gradient: in few of the cases.
    for i in range(5 if dtype == torch.bfloat16 else 1):
        values = make(shape, dtype, hidden=hidden, seed=seed + i, **kinds)
        keep_from_zero(values, training=training, bn_training=bn_training)
        expected, _ = compute(cbam_tail_ref, values, torch.float64, **kwargs)
        plain, _ = compute(cbam_tail_ref, values, dtype, small=small, **kwargs)
        actual, _ = compute(cbam_tail, values, dtype, small=small, layout=layout, **kwargs)
        assert {name: (t.shape, t.dtype) for name, t in actual.items()} == {
            name: (t.shape, t.dtype) for name, t in plain.items()}
        found.append((errors(actual, expected), errors(plain, expected)))
    for name in expected:
        error, plain_error = (median(e[name] for e in both) for both in zip(*found, strict=True))
        allowed = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 0.05}[dtype]
        assert error < allowed + 3 * plain_error, name


def mean_errors(shape, dtype, samples, **kwargs):
    """Of the operator and of plain operations, in three quarters of the cases: in bfloat16 rounding decides on maxima,
    and where one goes elsewhere, a gradient is half wrong, by whatever operations."""
    found = {}
    for seed in range(samples):
        values = make(shape, dtype, seed=seed, offset=kwargs.get('offset', 0.))
        keep_from_zero(values, training=kwargs['training'])
        expected, _ = compute(cbam_tail_ref, values, torch.float64, training=kwargs['training'])
        for i, function in enumerate((cbam_tail, cbam_tail_ref)):
            actual, _ = compute(function, values, dtype, training=kwargs['training'])
            for name, e in errors(actual, expected).items():
                found.setdefault(name, ([], []))[i].append(e)
    kept = samples * 3 // 4
    return {name: [sum(sorted(e)[:kept]) / kept for e in both] for name, both in found.items()}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('offset', [0, 1, 10, 30, 100])
def test_no_less_accurate_than_plain_operations(implementation, dtype, training, offset):
    """Where channels' means are that many deviations, too: on average over some cases."""
    found = mean_errors((2, 24, 12, 10), dtype, 8, training=training, offset=offset)
    rounding = {torch.float32: 1e-6 + 6e-8 * offset, torch.bfloat16: 0.015}[dtype]
    wrong = {name: both for name, both in found.items() if not both[0] <= 1.25 * both[1] + rounding}
    assert not wrong


@functools.cache
def large_case(batch, training):
    values = make((batch, 72, 65, 67), torch.float32, mlp_bias=True, spatial_norm=batch == 4, factor=True)
    keep_from_zero(values, training=training)
    return values, compute(cbam_tail_ref, values, torch.float64, training=training)[0]


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('threads', [1, 2])
def test_large_maps(implementation, layout, training, threads):
    """More than fits in one piece of work, for a thread with a sample of its own as for all of them with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (3, 4):
            values, expected = large_case(batch, training)
            actual, _ = compute(cbam_tail, values, torch.float32, training=training, layout=layout)
            assert max(errors(actual, expected).values()) < 1e-4
    finally:
        torch.set_num_threads(before)


def small_arguments(spatial_norm):
    values = make((2, 3, 2, 3), hidden=2, mlp_bias=True, spatial_norm=spatial_norm, factor=True, kernel=3)
    names = [name for name in INPUTS if name in values]
    return values, names, [values[name].clone().requires_grad_() for name in names]


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('spatial_norm', [False, True])
def test_gradcheck(implementation, training, spatial_norm):
    values, names, inputs = small_arguments(spatial_norm)

    def function(*tensors):
        now = {name: t.clone() for name, t in values.items()} | dict(zip(names, tensors, strict=True))
        return cbam_tail(now['x'], now['shortcut'], tail(now, training, training))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_second_derivatives_are_those_of_the_reference(implementation, training):
    values, names, inputs = small_arguments(True)
    found = []
    for function in (cbam_tail, cbam_tail_ref):
        now = {name: t.clone() for name, t in values.items()} | dict(zip(names, inputs, strict=True))
        out = function(now['x'], now['shortcut'], tail(now, training, training))
        first = torch.autograd.grad((out * now['grad']).sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(
            sum(g.square().sum() for g in first), inputs, allow_unused=True, materialize_grads=True))
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9 * e.abs().max().item())
    assert sum(bool(e.any()) for e in found[1]) > 8


def test_second_derivatives_where_inputs_are_computed_from_each_other(implementation):
    """What came before the operator is not differentiated twice."""
    found = []
    for function in (cbam_tail, cbam_tail_ref):
        values, _, _ = small_arguments(False)
        weight = values['weight'].requires_grad_()
        values.update(bias=weight.square(), fc2_bias=weight)
        out = function(values['x'], values['shortcut'], tail(values))
        first, = torch.autograd.grad((out * values['grad']).sum(), weight, create_graph=True)
        second, = torch.autograd.grad(first.square().sum(), weight)
        found.append((first.detach(), second))
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


def test_backward_twice(implementation):
    values = make((2, 8, 5, 3))
    inputs = [values[name].requires_grad_() for name in ('x', 'weight')]
    out = cbam_tail(values['x'], values['shortcut'], tail(values, True))
    first, second = (torch.autograd.grad(out, inputs, values['grad'], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second)) and all(g.any() for g in first)


def tied_channels(values):
    values['x'][:, 1:] = values['x'][:, :1]
    for name in ('weight', 'bias', 'mean', 'var'):
        values[name][:] = values[name][0]
    values['fc2_weight'][:] = 0.  # so that F' ties where F does


def tied_pixels(values):
    values['x'][..., 3:] = values['x'][..., :3]


def tied_after_rounding(values):
    """Pixels whose values differ by so little that those of F, which are large, do not."""
    tied_pixels(values)
    values['x'][..., 3:] *= 1 + 2 ** -52
    values['bias'][:] = 2. ** 16
    # gates as if F were small
    values.update(fc1_bias=-2 ** 16 * values['fc1_weight'].sum((1, 2, 3)), fc2_bias=torch.zeros_like(values['bias']))
    values['conv_weight'] /= 2 ** 16


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('tie, bound', [(tied_channels, 1e-11), (tied_pixels, 1e-11), (tied_after_rounding, 1e-9)])
def test_ties_share(implementation, tie, bound, training, layout):
    """As torch.amax does: equal channels in the maximum over channels, equal pixels in that over space."""
    values = make((2, 16, 4, 6))
    tie(values)
    kwargs = dict(training=training)
    expected, _ = compute(cbam_tail_ref, values, torch.float64, **kwargs)
    actual, _ = compute(cbam_tail, values, torch.float64, layout=layout, **kwargs)
    assert max(errors(actual, expected).values()) < bound
    # and so it is the maximum's gradient that this is about
    values['x'].add_(1e-9 * torch.randn(values['x'].shape, generator=torch.Generator().manual_seed(1)))
    other, _ = compute(cbam_tail_ref, values, torch.float64, **kwargs)
    assert errors(other, expected)['x'] > 1e-3


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_constant_maps_share(implementation, dtype, layout):
    """Everything ties: a weight of zero, as in a block's last batch-norm at the start, and a map of equal values."""
    for what in ('weight', 'x'):
        values = make((2, 8, 5, 7), dtype)
        values[what][:] = 0.
        expected, _ = compute(cbam_tail_ref, values, torch.float64)
        actual, _ = compute(cbam_tail, values, dtype, layout=layout)
        bound = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.02}[dtype]
        assert max(errors(actual, expected).values()) < bound


PLACES = {
    'x': ('x', (1, 2, 3, 1)), 'first of x': ('x', (1, 0, 0, 0)), 'last of x': ('x', (1, 8, 8, 8)),
    'shortcut': ('shortcut', (1, 2, 3, 1)), 'weight': ('weight', (2,)), 'bias': ('bias', (2,)), 'mean': ('mean', (2,)),
    'var': ('var', (2,)), 'fc1_weight': ('fc1_weight', (1, 2, 0, 0)), 'fc2_weight': ('fc2_weight', (2, 1, 0, 0)),
    'fc1_bias': ('fc1_bias', (1,)), 'fc2_bias': ('fc2_bias', (2,)), 'conv_weight': ('conv_weight', (0, 1, 3, 3)),
    'bn_bias': ('bn_bias', (0,)), 'factor': ('factor', (1, 0, 0, 0)),
}


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_not_finite(implementation, value, training, layout):
    """NaN and infinities come out where they do of the plain operations, from wherever they come in, whatever the sign
    of the norm's weight; for NaN in the same gradients, too."""
    dtypes = (torch.float32, torch.bfloat16)
    for (place, (name, index)), weight, dtype in itertools.product(PLACES.items(), (1., -1., 0.), dtypes):
        values = make((2, 9, 9, 9), torch.float32, mlp_bias=True, spatial_norm=True, factor=True, seed=1)
        values['weight'][[0, 2, 8]] = weight
        values[name][index] = value
        kwargs = dict(training=training)
        expected, _ = compute(cbam_tail_ref, values, dtype, **kwargs)
        actual, _ = compute(cbam_tail, values, dtype, layout=layout, **kwargs)
        bound = 0.1 if dtype == torch.bfloat16 else 1e-4
        assert torch.allclose(
            actual['out'], expected['out'], rtol=bound, atol=bound, equal_nan=True), (place, weight, dtype)
        for what, e in expected.items() if value != value else ():
            assert actual[what].isfinite().all() == e.isfinite().all(), (place, weight, dtype, what)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_expanded_and_overlapping(implementation, training):
    """Maps whose elements share memory: of a sum's gradient, a broadcast shortcut, a sliding window."""
    values = make((3, 16, 6, 9))
    window = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    odd = {
        'x': (values['x'][:1].expand(3, -1, -1, -1), window.as_strided((3, 16, 6, 9), (16, 4, 2, 1))),
        'shortcut': (
            values['shortcut'][..., :1].expand(-1, -1, -1, 9), values['shortcut'][:1, :1].expand(3, 16, -1, -1)),
        'grad': (
            torch.ones((), dtype=torch.float64).expand(3, 16, 6, 9), window.as_strided((3, 16, 6, 9), (0, 1, 7, 3))),
    }
    for name, tensors in odd.items():
        for t in tensors:
            before = t.clone()
            found = []
            for function in (cbam_tail, cbam_tail_ref):
                now = {name: t.clone() for name, t in values.items()} | {name: t.detach()}
                inputs = [now[n].requires_grad_() for n in ('x', 'shortcut', 'weight', 'conv_weight')]
                out = function(now['x'], now['shortcut'], tail(now, training))
                found.append((out, *torch.autograd.grad(out, inputs, now['grad'])))
            for a, e in zip(*found, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)
            assert torch.equal(t, before)


def test_parameters_of_any_strides(implementation):
    values = make((3, 16, 6, 9), mlp_bias=True, spatial_norm=True, factor=True)
    expected, _ = compute(cbam_tail_ref, values, torch.float64)
    strided = {
        name: t if name in MAPS else torch.stack([t, t + 1], dim=-1)[..., 0] for name, t in values.items()}
    inputs = [strided[name].requires_grad_() for name in INPUTS]
    out = cbam_tail(strided['x'], strided['shortcut'], tail(strided))
    actual = dict(zip(INPUTS, torch.autograd.grad(out, inputs, strided['grad']), strict=True), out=out.detach())
    assert max(errors(actual, expected).values()) < 1e-11
    with torch.no_grad():
        inferred = cbam_tail(strided['x'].clone(), strided['shortcut'], tail(strided), inplace=True)
        torch.testing.assert_close(inferred, out)


def test_saved_tensors_may_come_back_in_another_format(implementation):
    """As by hooks which keep the output of a ReLU, half of it zeros, as a sparse tensor."""
    values = make((2, 16, 5, 7))
    expected, _ = compute(cbam_tail, values, torch.float64, layout='channels_last')
    for wanted in ('out', 'x'):
        def unpack(t, wanted=wanted):
            is_output = bool((t >= 0).all()) and bool((t == 0).any())
            return t.contiguous() if t.shape == values['x'].shape and is_output == (wanted == 'out') else t

        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            actual, _ = compute(cbam_tail, values, torch.float64, layout='channels_last')
        assert max(errors(actual, expected).values()) < 1e-11, wanted


def test_more_elements_than_an_int32_counts():
    """By shapes only."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(64, 64, 1024, 1024, device='meta').to(memory_format=layout).requires_grad_()
        values = {name: t.float().to('meta') for name, t in make((1, 64, 2, 2)).items()}
        p = tail(values, True)
        p.weight.requires_grad_()
        out, stats, bn_stats, space, hidden, mc, pooled, conv = torch.ops.timm_cbam.tail(x, x.detach(), *p)
        assert out.shape == x.shape and out.is_contiguous(memory_format=layout)
        assert pooled.shape == (64, 2, 1024, 1024) and space.shape == (3, 64, 64)
        dx, dweight = torch.autograd.grad(out, (x, p.weight), torch.empty_like(out))
        assert dx.shape == x.shape and dx.is_contiguous(memory_format=layout) and dweight.shape == (64,)


def all_of(values, dtype, layout, training):
    found, statistics = compute(cbam_tail, values, dtype, training=training, bn_training=training, layout=layout)
    return [*found.values(), *statistics.values()]


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_same_bits_each_time_and_for_any_number_of_threads(implementation, training, layout, dtype):
    before = torch.get_num_threads()
    try:
        for shape in ((1, 32, 17, 19), (3, 40, 9, 11), (4, 40, 9, 11)):
            values = make(shape, dtype, mlp_bias=True, spatial_norm=shape[0] == 4, factor=True)
            runs = []
            for threads in (1, 2, 2):
                torch.set_num_threads(threads)
                runs.append(all_of(values, dtype, layout, training))
            assert all(map(torch.equal, runs[1], runs[2]))
            if implementation == 'native' and not (training and layout == 'channels_last'):  # statistics by PyTorch
                assert all(map(torch.equal, runs[0], runs[1]))
    finally:
        torch.set_num_threads(before)


def test_deterministic_algorithms(implementation):
    values = make((3, 32, 9, 7), torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [all_of(values, torch.float32, 'contiguous', True) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('layout', list(LAYOUTS))
def test_arguments_are_left_alone(implementation, layout, dtype):
    """But x, where no gradient is computed and if so asked for."""
    values = make((2, 16, 5, 3), dtype, mlp_bias=True, spatial_norm=True, factor=True)
    values = {name: t.to(dtype) for name, t in values.items()}
    values.update({name: LAYOUTS[layout](values[name]) for name in MAPS})
    before = copy.deepcopy(values)
    statistics = {name: values[name].clone() for name in ('mean', 'var')}
    for enabled, inplace in ((False, False), (True, False), (True, True)):
        with torch.set_grad_enabled(enabled):
            expected = cbam_tail(values['x'], values['shortcut'], tail(values), inplace=inplace)
    leaf = values['x'].detach().requires_grad_()
    cbam_tail(leaf, values['shortcut'], tail(values), inplace=True).backward(values['grad'])
    assert all(torch.equal(t, before[name]) for name, t in values.items())
    with torch.no_grad():
        trained = cbam_tail(values['x'], values['shortcut'], tail(values | statistics, True), inplace=True)
        assert trained.data_ptr() != values['x'].data_ptr() and torch.equal(values['x'], before['x'])
        out = cbam_tail(values['x'], values['shortcut'], tail(values), inplace=True)
    torch.testing.assert_close(out, expected)
    assert layout in ('strided', 'transposed') or out.data_ptr() == values['x'].data_ptr()
    assert torch.equal(values['shortcut'], before['shortcut'])


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
def test_running_statistics(implementation, layout, dtype):
    """Those of F.batch_norm, of the spatial batch-norm too; none in eval mode."""
    values = make((3, 16, 9, 5), dtype, spatial_norm=True, offset=3.)
    _, statistics = compute(cbam_tail, values, dtype, training=True, bn_training=True, layout=layout)
    mean, var = values['mean'].to(dtype, copy=True), values['var'].to(dtype, copy=True)
    F.batch_norm(LAYOUTS[layout](values['x'].to(dtype)), mean, var, training=True, momentum=0.1)
    bound = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else dict(rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(statistics['mean'], mean, **bound)
    torch.testing.assert_close(statistics['var'], var, **bound)
    assert not torch.equal(mean.double(), values['mean'])

    p = tail(values, True, True)
    z = torch.ops.timm_cbam.tail(values['x'], values['shortcut'], *p)[-1]
    bn_mean, bn_var = values['bn_mean'].clone(), values['bn_var'].clone()
    F.batch_norm(z, bn_mean, bn_var, training=True, momentum=0.01)
    bound = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics['bn_mean'].double(), bn_mean, **bound)
    torch.testing.assert_close(statistics['bn_var'].double(), bn_var, **bound)

    _, statistics = compute(cbam_tail, values, dtype, layout=layout)
    assert all(torch.equal(t.double(), values[name]) for name, t in statistics.items())


@torch.no_grad()
@pytest.mark.parametrize('relu', [False, True], ids=['norm', 'norm and relu'])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('small', [None, torch.float32, 'strided'], ids=str)
def test_norm_relu_has_the_bits_of_pytorch(implementation, small, dtype, relu):
    for shape in ((2, 16, 5, 7), (1, 1, 1, 1), (3, 5, 1, 1), (2, 129, 3, 1), (1, 3, 65, 67), (4, 72, 28, 28)):
        values = make(shape, dtype, offset=2.)
        norm = torch.nn.BatchNorm2d(shape[1]).eval()
        norm.load_state_dict(dict(
            weight=values['weight'], bias=values['bias'], running_mean=values['mean'], running_var=values['var'],
            num_batches_tracked=torch.tensor(0)))
        norm = norm.to(torch.float32 if small == torch.float32 and dtype == torch.bfloat16 else dtype)
        dense = copy.deepcopy(norm)  # of strided parameters PyTorch's batch-norm rounds differently
        tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
        if small == 'strided':
            for t in tensors:
                t.data = torch.stack([t.data, t.data + 1], dim=-1)[..., 0]
        for layout in ('contiguous', 'channels_last'):
            x = LAYOUTS[layout](values['x'].to(dtype))
            expected = F.relu(dense(x)) if relu else dense(x)
            out = norm_relu_(x, *tensors, norm.eps, relu)
            assert out.data_ptr() == x.data_ptr()
            if small == 'strided':  # PyTorch's own bits are others then
                torch.testing.assert_close(out, expected, rtol=1e-2, atol=3e-2 if dtype == torch.bfloat16 else 1e-5)
            else:
                assert torch.equal(out, expected), (shape, layout)
    for value in (float('nan'), float('inf'), -float('inf')):
        norm, x = torch.nn.BatchNorm2d(4).eval(), torch.randn(2, 4, 5, 5)
        x[1, 2, 3, 4] = value
        expected = F.relu(norm(x)) if relu else norm(x)
        out = norm_relu_(x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, relu)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'transposed'])
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_operators_are_what_pytorch_expects(implementation, training, layout):
    """Schemas, fake kernels, registered derivatives, and what the compiler makes of them."""
    every = dict(mlp_bias=True, spatial_norm=True, factor=True)
    for kinds in (every, {}) if layout == 'contiguous' else (every,):
        values = make((2, 4, 3, 5), torch.float32, **kinds)
        values = {name: LAYOUTS[layout](t.float()) if name in MAPS else t.float() for name, t in values.items()}
        p = tail(values, training, training)
        x, shortcut = values['x'], values['shortcut']
        with torch.no_grad():
            out, *results = torch.ops.timm_cbam.tail(x, shortcut, *p)
        torch.library.opcheck(torch.ops.timm_cbam.tail_backward.default, (values['grad'], x, out, *p, results))
        if not training:
            dense = x.contiguous() if layout == 'transposed' else x
            torch.library.opcheck(torch.ops.timm_cbam.tail_.default, (dense.clone(), shortcut, *p))
        for name in INPUTS:
            if name in values:
                values[name] = values[name].detach().requires_grad_()
        torch.library.opcheck(
            torch.ops.timm_cbam.tail.default, (values['x'], values['shortcut'], *tail(values, training, training)))


def test_imported_twice_in_one_process():
    """As in notebooks, and under reloading servers: the operators outlive the modules that defined them."""
    code = """
        import gc, sys, timm, torch

        def train():
            import timm_cbam
            torch.manual_seed(0)
            model = timm.create_model('cbam_resnet18', num_classes=5, zero_init_last=False, layers=(1, 1, 1, 1))
            x = torch.randn(2, 3, 32, 32)
            loss = model(x).square().sum()
            loss.backward()
            with torch.no_grad():
                total = sum(p.grad.abs().sum() for p in model.parameters())
                return loss.item(), total.item(), model.eval()(x).sum().item()

        first = train()
        for kept in (dict(sys.modules), None):
            for name in [n for n in sys.modules if n.partition('.')[0] == 'timm_cbam']:
                del sys.modules[name]
            for name in [n for n in timm.models._registry._model_entrypoints if n.startswith('cbam_')]:
                del timm.models._registry._model_entrypoints[name]
            gc.collect()
            assert train() == first
            gc.collect()
        print('fine')
    """
    assert run(code, TIMM_CBAM_AUTOLOAD='0').endswith('fine\n')


# ---- in the model

def small_model(name='cbam_resnet18', layers=(1, 1, 1, 1), cbam_args=None, **kwargs):
    """With few channels, but several hidden ones in the MLPs."""
    return liven(timm.create_model(
        name, num_classes=10, layers=layers, channels=(32, 32, 64, 64),
        cbam_args=dict(rd_ratio=1 / 4, **cbam_args or {}), **kwargs))


@pytest.fixture(params=['cbam_resnet18', 'cbam_resnet50', 'cbam_resnet18_eccv18'] + [
    pytest.param(name, marks=pytest.mark.slow) for name in ('cbam_resnet50d', 'cbam_resnext50_32x4d')])
def model(request):
    torch.manual_seed(0)
    return small_model(request.param, layers=(2, 1, 1, 1))


@pytest.fixture
def images():
    return torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def gradients(model, images):
    model.zero_grad()
    logits = model(images)
    logits.square().sum().backward()
    return [logits.detach()] + [p.grad.clone() for p in model.parameters()] + [b.clone() for b in model.buffers()]


def assert_equal_to_plain(model, images):
    """In float64 to rounding; batch-norms' statistics and counters included."""
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    fused = gradients(model, images)
    with plain_path():
        torch.manual_seed(3)
        plain = gradients(other, images)
    assert all((a - b).norm() <= 1e-8 * b.norm() for a, b in zip(fused, (t.double() for t in plain), strict=True))


def nodes(out):
    """Names of the nodes of a graph"""
    names, queue = set(), [out.grad_fn]
    while queue:
        node = queue.pop()
        names.add(node.name())
        queue += [n for n, _ in node.next_functions if n is not None and n.name() not in names]
    return names


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('channels_last', [False, True])
def test_model_equals_plain_operations(implementation, model, images, training, channels_last):
    model = model.double().train(training)
    images = images.double()
    if channels_last:
        model, images = (t.to(memory_format=torch.channels_last) for t in (model, images))
    with torch.no_grad():
        fused_logits = copy.deepcopy(model)(images)
    with torch.no_grad(), plain_path():
        assert relative_error(fused_logits, copy.deepcopy(model)(images)) < 1e-11
    assert any('Tail' in name for name in nodes(model(images)))
    with plain_path():
        assert not any('Tail' in name for name in nodes(model(images)))
    assert_equal_to_plain(model, images)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_empty_batch_and_single_element(implementation, training):
    """What module by module says: nothing, or PyTorch's error."""
    block = liven(timm.create_model('cbam_resnet18')).layer1[0].train(training)
    for shape in ((0, 64, 4, 4), (1, 64, 1, 1), (2, 64, 1, 1), (1, 64, 0, 4)):
        x = torch.randn(shape)
        found = []
        for context in (plain_path, torch.enable_grad, torch.no_grad):
            with context():
                try:
                    found.append(copy.deepcopy(block)(x))
                except (RuntimeError, ValueError, IndexError) as e:
                    found.append((type(e), str(e)))
        for other in found[1:]:
            if isinstance(other, torch.Tensor):
                torch.testing.assert_close(other, found[0])
            else:
                assert other == found[0]
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        block.train()(torch.randn(1, 64, 1, 1))


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

    assert kept('cbam_resnet18') < 1.03 * kept('resnet18')
    assert kept('cbam_resnet50') < 1.02 * kept('resnet50')


@torch.no_grad()
def test_features_stay_as_they_were_taken(implementation, images):
    """A later block may not write into what an earlier one has returned."""
    model = liven(timm.create_model('cbam_resnet18', features_only=True))
    kept = []
    for name in ('layer1', 'layer2', 'layer3'):
        model[name].register_forward_hook(lambda m, i, o: kept.append((o, o.clone())))
    before = images.clone()
    model(images)
    assert torch.equal(images, before) and len(kept) == 3
    assert all(torch.equal(a, b) for a, b in kept)


def test_stochastic_depth(implementation, images):
    model = small_model(layers=(2, 1, 1, 1)).double().train()
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            block.drop_path = timm.layers.DropPath(0.5)
    assert_equal_to_plain(model, images.double())


@pytest.mark.parametrize('kwargs', [
    dict(act_layer='silu'), dict(act_layer='leaky_relu'), dict(norm_layer='groupnorm'),
    dict(cbam_args=dict(gate_layer='hard_sigmoid')), dict(cbam_args=dict(kernel_size=3, mlp_bias=True)),
], ids=str)
def test_other_layers(kwargs, images):
    model = small_model(layers=(2, 1, 1, 1), **kwargs).double()
    assert_equal_to_plain(model, images.double())
    assert_equal_to_plain(model.train(), images.double())


def test_checkpointing_and_autocast(implementation, model, images):
    model = model.double().train()
    expected = gradients(copy.deepcopy(model), images.double())
    again = copy.deepcopy(model)
    again.set_grad_checkpointing(True)
    gradients(again, images.double())
    for p, e in zip(again.parameters(), expected[1:], strict=False):
        assert (p.grad - e).norm() <= 1e-8 * e.norm()

    block = model.float().layer1[0]
    x = torch.randn(2, 64, 8, 8).requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = checkpoint(block, x, use_reentrant=False)
        loss = out.float().square().sum()
        loss.backward()  # under autocast, as some do
    with plain_path(), torch.autocast('cpu', dtype=torch.bfloat16):
        expected, = torch.autograd.grad(block(x).float().square().sum(), x)
    assert (x.grad - expected).norm() < 0.1 * expected.norm()


def test_functional_transforms(images):
    model = small_model().double()
    images = images[:2].double()
    params = {k: v.detach() for k, v in model.named_parameters()}

    def loss(params, x):
        return torch.func.functional_call(model, params, (x[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, images)
    gradients(model, images)
    for name, p in model.named_parameters():
        assert (per_sample[name].sum(0) - p.grad).norm() <= 1e-8 * p.grad.norm(), name


@pytest.fixture
def maps():
    """Input of layer1"""
    return torch.randn(3, 64, 12, 12, generator=torch.Generator().manual_seed(1))


def test_compile_does_not_recompile_over_batch_size(maps):
    model = small_model(layers=(2, 1, 1, 1)).layer1  # a block with a downsample and one without
    torch.compiler.reset()  # what other tests have compiled of the same code would count
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True, backend='eager')
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for x in (maps.repeat(n, 1, 1, 1) for n in (2, 3, 5)):
            assert relative_error(compiled(x), model(x)) < 1e-5
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(copy.deepcopy(model).train(), fullgraph=True, dynamic=True, backend='aot_eager')
        for x in (maps.repeat(n, 1, 1, 1) for n in (2, 3)):
            compiled(x).sum().backward()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_compiled_inference(model, maps, dtype):
    """What the compiler makes of it, weights of batch-norms of both signs among it."""
    model = model.layer1
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.weight.data[::2] *= -1
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.no_grad(), torch.autocast('cpu', dtype=dtype, enabled=dtype == torch.bfloat16):
        assert relative_error(compiled(maps), model(maps)) < (1e-5 if dtype == torch.float32 else 0.05)


def test_compiled_training(images):
    model = small_model().double().train()
    other, images = copy.deepcopy(model), images.double()
    torch.compiler.reset()
    compiled = gradients(torch.compile(model, fullgraph=True, backend='aot_eager'), images)
    expected = gradients(other, images)
    assert all((a - b).norm() <= 1e-8 * b.norm() for a, b in zip(compiled, (t.double() for t in expected), strict=True))


def test_switch():
    code = """
        import timm, torch
        from timm_cbam import fusion
        torch.manual_seed(0)
        model = timm.create_model('cbam_resnet18', zero_init_last=False).eval()
        print(fusion.match(model.layer1[0], torch.randn(2, 64, 8, 8)))
        print(model(torch.randn(2, 3, 64, 64)).shape)
    """
    assert run(code, TIMM_CBAM_FUSED='0') == 'None\ntorch.Size([2, 1000])\n'
    assert fusion.match(liven(timm.create_model('cbam_resnet18')).layer1[0], torch.randn(2, 64, 8, 8))


def test_import_without_triton():
    code = """
        import sys, timm
        before = {name for name in sys.modules if 'triton' in name}  # PyTorch's own
        import timm_cbam
        print({name for name in sys.modules if 'triton' in name} - before)
        sys.modules['timm_cbam.ops.tail_triton'] = None
        print({name for name in sys.modules if 'triton' in name} - before)
    """
    printed, seen = run(code, TIMM_CBAM_AUTOLOAD='0').splitlines()
    assert printed == 'set()' and 'tail_triton' in seen  # so it would have been seen


def training_curve():
    """Losses on handwritten digits"""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images[:, None], dtype=torch.float64) / 16 - 0.5
    target = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = timm.create_model(
        'cbam_resnet18_s1', num_classes=10, in_chans=1, channels=(16, 16, 32, 32), layers=(1, 1, 1, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for step in range(100):
        i = torch.arange(32 * step, 32 * step + 32) % len(x)
        loss = F.cross_entropy(model(x[i]), target[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@functools.cache
def plain_training_curve():
    with plain_path():
        return training_curve()


def test_trains_like_plain_operations(implementation):
    """100 steps: the same losses."""
    fused, plain = training_curve(), plain_training_curve()
    assert fused[-10:].sum() < 0.7 * fused[:10].sum()
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=0)
