"""The operator by Triton kernels: what autograd finds for the reference, on a GPU or in Triton's interpreter

Triton asks for the interpreter when it is imported, and other tests need it without. So where there is no GPU, the
tests of this file run in a process of their own.
"""
import collections
import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import run, script
from torch.utils._python_dispatch import TorchDispatchMode

from timm_cbam.ops import Tail, cbam_tail, cbam_tail_ref, tail
from timm_cbam.ops import check as check_device

pytest.importorskip('triton')

ROOT = Path(__file__).parents[1]

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
INTERPRETER = os.environ.get('TRITON_INTERPRET') == '1'
if DEVICE == 'cuda' or INTERPRETER:
    from timm_cbam.ops import tail_triton


KERNELS = (
    '_pool_space', '_statistics', '_pool_norm', '_pool_channels', '_convolve', '_gate_add', '_a', '_b', '_factors',
    '_c', '_norm_relu')


def runs_kernels(test):
    """Without a GPU test_in_interpreter runs it, and here there is nothing to collect."""
    return test if DEVICE == 'cuda' or INTERPRETER else None


FORMATS = {'nchw': torch.contiguous_format, 'nhwc': torch.channels_last}
# Relative, in the 2-norm; in low precision at least the error of plain operations, in which rounding decides on maxima.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}
GRADIENTS = (
    'x', 'shortcut', 'weight', 'bias', 'fc1_weight', 'fc1_bias', 'fc2_weight', 'fc2_bias', 'conv_weight', 'bn_weight',
    'bn_bias')
PLAIN, ALL = {}, dict(mlp_bias=True, norm=True, factor=True)
CASES = [  # shape, hidden channels, what there is beside a plain block's, and which batch-norms are in training
    ((2, 16, 5, 7), 3, PLAIN, True, False), ((2, 40, 8, 10), 5, ALL, False, True),
    ((1, 17, 1, 13), 3, ALL, False, False), ((3, 33, 9, 1), 2, ALL, True, True),
    ((2, 1, 3, 4), 1, PLAIN, True, False), ((5, 7, 1, 1), 2, ALL, True, False),
    ((2, 70, 9, 10), 4, PLAIN, False, False)]  # the last one has several tiles in each direction


@pytest.fixture(autouse=True)
def triton_implementation(monkeypatch):
    """Also for maps in the CPU's memory, where the interpreter works."""
    if DEVICE == 'cuda' or INTERPRETER:
        monkeypatch.setattr(tail, '_implementation', lambda x, training: tail_triton)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def make(shape, r=3, dtype=torch.float64, mlp_bias=False, norm=False, factor=False, deviations=0., seed=0):
    """Tensors by name in float64, with the values of a lower precision. deviations: distance of x from 0."""
    generator = torch.Generator().manual_seed(seed)
    b, c, _, _ = shape

    def randn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    shortcut = randn(*shape)
    tensors = dict(
        x=randn(*shape) + deviations, grad=randn(*shape),
        # no sum near zero, where rounding would decide on the gradient
        shortcut=shortcut + 3 * shortcut.sign(),
        weight=randn(c), bias=randn(c), mean=randn(c) + deviations, var=randn(c).square() + 0.5,
        fc1_weight=randn(r, c, 1, 1) / c ** 0.5, fc1_bias=randn(r) if mlp_bias else None,
        fc2_weight=randn(c, r, 1, 1) / r ** 0.5, fc2_bias=randn(c) if mlp_bias else None,
        conv_weight=randn(1, 2, 7, 7) / 7,
        bn_weight=1 + randn(1).square() if norm else None, bn_bias=randn(1) if norm else None,
        bn_mean=randn(1) if norm else None, bn_var=randn(1).square() + 0.5 if norm else None,
        factor=torch.tensor([2., 0., 1.])[torch.arange(b) % 3].view(b, 1, 1, 1) if factor else None)
    tensors['weight'][2::5] = 0
    return {name: None if t is None else t.to(dtype).double() for name, t in tensors.items()}


def compute(function, tensors, dtype, training, bn_training, memory_format=torch.contiguous_format, device=DEVICE):
    """Output and gradients by name"""
    t = {name: None if t is None else t.to(device, dtype, copy=True) for name, t in tensors.items()}
    for name in ('x', 'shortcut', 'grad'):
        t[name] = t[name].contiguous(memory_format=memory_format)
    for name in ('shortcut', 'grad'):  # of neither format
        t[name] = t[name].transpose(2, 3).contiguous().transpose(2, 3)
    inputs = {name: t[name].requires_grad_() for name in GRADIENTS if t[name] is not None}
    p = Tail(
        **{name: t[name] for name in Tail._fields if name in t}, training=training, eps=1e-5, bn_training=bn_training,
        bn_eps=1e-5)
    out = function(t['x'], t['shortcut'], p)
    gradients = torch.autograd.grad(out, list(inputs.values()), t['grad'])
    return dict(zip(('out', *inputs), (out.detach(), *gradients), strict=True))


def error(actual, expected):
    return ((actual.cpu().double() - expected).norm() / (expected.norm() + 1e-30)).item()


def check(tensors, dtype, training, bn_training=False, memory_format=torch.contiguous_format):
    args = tensors, dtype, training, bn_training
    expected = compute(cbam_tail_ref, tensors, torch.float64, training, bn_training, device='cpu')
    plain = compute(cbam_tail_ref, *args, device='cpu') if dtype.itemsize == 2 else expected
    actual = compute(cbam_tail, *args, memory_format)
    for name, a in actual.items():
        assert a.dtype == dtype
        limit = max(TOLERANCE[dtype], 1.25 * error(plain[name], expected[name]))
        assert error(a, expected[name]) < limit, f'{name}: {error(a, expected[name])}'
    for name in ('out', 'x'):
        assert actual[name].is_contiguous(memory_format=memory_format)


@runs_kernels
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('dtype,shape,r,parts,training,bn_training', [
    (dtype, *case) for dtype in TOLERANCE for case in (CASES if dtype == torch.float32 else CASES[:2])])
def test_equals_reference(dtype, shape, r, parts, training, bn_training, memory_format):
    check(make(shape, r, dtype, **parts), dtype, training, bn_training, FORMATS[memory_format])


@runs_kernels
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('channels,levels', [(10, 1000), (1, 1000), (1, 3), (1, 1)])
def test_ties(channels, levels, training, memory_format):
    """Equal channels share the gradient of a pixel's maximum, equal pixels that of a channel's."""
    tensors = make((2, 20, 6, 13), 1)  # one hidden channel: no sums, whose order could make equal channels differ
    x = torch.randint(levels, (2, 20, 6, 13), generator=torch.Generator().manual_seed(1))
    tensors['x'] = 3 * x.double() / levels
    tensors['weight'] = 1 + tensors['weight'].abs()
    tensors['fc2_weight'] /= 10  # gates away from 1, near which there are no digits
    for name in ('x', 'weight', 'bias', 'mean', 'var', 'fc2_weight'):
        along = 1 if name == 'x' else 0
        first = tensors[name].narrow(along, 0, channels)
        tensors[name] = torch.cat([first] * (20 // channels), along)
    check(tensors, torch.float64, training, memory_format=FORMATS[memory_format])


@runs_kernels
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('training', [True, False])
def test_ties_after_rounding(training, memory_format):
    """Pixels that differ by so little that their F, which are large, do not."""
    tensors = make((2, 20, 6, 12), mlp_bias=True)
    tensors['x'][..., 6:] = tensors['x'][..., :6] * (1 + 2 ** -52)
    tensors['bias'][:] = 2. ** 15
    tensors['fc1_bias'][:] = -2 ** 15 * tensors['fc1_weight'].sum((1, 2, 3))
    tensors['conv_weight'] /= 2 ** 15
    check(tensors, torch.float64, training, memory_format=FORMATS[memory_format])


@runs_kernels
@pytest.mark.parametrize('scale', [-1., 0.])
def test_ties_where_the_weight_is_not_positive(scale):
    """The maximum of F is where x is smallest, or everywhere."""
    tensors = make((2, 20, 6, 13))
    tensors['x'] = tensors['x'].round()
    tensors['weight'] = scale * tensors['weight'].abs()
    check(tensors, torch.float64, True)


@runs_kernels
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_not_finite(value, training, memory_format):
    """NaN and infinities are where the reference has them, also those of gradients."""
    tensors = make((2, 20, 3, 5))
    tensors['weight'] = 1 + tensors['weight'].abs()
    for channel in (18, 19):
        tensors['x'][1, channel, 2, 1] = value
    args = tensors, torch.float64, training, False
    expected = compute(cbam_tail_ref, *args, device='cpu')
    actual = compute(cbam_tail, *args, FORMATS[memory_format])
    for name, a in actual.items():
        a, e = a.cpu(), expected[name]
        assert torch.equal(a.isnan(), e.isnan()), name
        assert torch.allclose(a, e, rtol=1e-9, equal_nan=True), name


@runs_kernels
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('deviations', [30., 100.])
def test_far_from_zero(deviations, dtype, memory_format):
    """Where the mean of x is large nothing is lost by cancellation: plain operations normalise, and then multiply."""
    tensors = make((2, 40, 9, 10), 4, dtype, deviations=deviations)
    expected = compute(cbam_tail_ref, tensors, torch.float64, True, False, device='cpu')
    plain = compute(cbam_tail_ref, tensors, dtype, True, False, device='cpu')
    actual = compute(cbam_tail, tensors, dtype, True, False, FORMATS[memory_format])
    for name, a in actual.items():
        limit = max(1.5 * error(plain[name], expected[name]), {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype])
        assert error(a, expected[name]) < limit, f'{name}: {error(a, expected[name])}'


@runs_kernels
@pytest.mark.parametrize('memory_format', FORMATS)
def test_statistics(memory_format):
    """Mean and variance of the batch, from the pass that pools."""
    for shape, deviations, dtype in (
            ((3, 33, 9, 10), 0., torch.float64), ((2, 17, 12, 13), 100., torch.float32),
            ((4, 5, 1, 1), 0., torch.float32)):
        tensors = make(shape, dtype=dtype, deviations=deviations)
        x = tensors['x'].to(DEVICE, dtype).contiguous(memory_format=FORMATS[memory_format])
        parameters = {name: t if t is None else t.to(DEVICE, dtype) for name, t in tensors.items()}
        p = Tail(**{name: parameters[name] for name in Tail._fields if name in parameters}, training=True, eps=1e-5,
                 bn_training=False, bn_eps=1e-5)
        stats, _, space, *_ = tail_triton.forward(x, x, torch.empty_like(x), p)
        var, mean = torch.var_mean(tensors['x'], (0, 2, 3), correction=0)
        flat = tensors['x'].flatten(2)
        assert error(stats[0], mean) < 10 * torch.finfo(dtype).eps
        assert error(stats[1], var) < 10 * torch.finfo(dtype).eps * (1 + deviations)
        assert error(space, torch.stack([flat.mean(2), flat.amax(2), flat.amin(2)])) < 10 * torch.finfo(dtype).eps


@runs_kernels
@pytest.mark.parametrize('memory_format', FORMATS)
def test_deterministic(memory_format):
    tensors = make((2, 70, 9, 10), 4, torch.float32, **ALL)
    first, second = (
        compute(cbam_tail, tensors, torch.float32, True, True, FORMATS[memory_format]) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@runs_kernels
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('dtype', TOLERANCE)
def test_inference(dtype, memory_format):
    """In the place of x, with the same bits."""
    tensors = make((2, 40, 8, 10), dtype=dtype, **ALL)
    t = {name: t.to(DEVICE, dtype) for name, t in tensors.items()}
    p = Tail(
        **{name: t[name] for name in Tail._fields if name in t}, training=False, eps=1e-5, bn_training=False,
        bn_eps=1e-5)
    x = t['x'].contiguous(memory_format=FORMATS[memory_format])
    with torch.no_grad():
        expected = cbam_tail(x, t['shortcut'], p)
        out = cbam_tail(x, t['shortcut'], p, inplace=True)
    assert out is x
    assert torch.equal(out, expected)


@runs_kernels
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('relu', [True, False])
@pytest.mark.parametrize('parameters,maps', [
    (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16)])
def test_norm_relu(parameters, maps, relu, memory_format):
    tensors = make((2, 40, 9, 10), dtype=torch.bfloat16)
    x = tensors['x'].to(DEVICE, maps).contiguous(memory_format=FORMATS[memory_format])
    weight, bias, mean, var = (tensors[name] for name in ('weight', 'bias', 'mean', 'var'))
    expected = torch.nn.functional.batch_norm(x.cpu().double(), mean, var, weight, bias, eps=1e-5)
    tail_triton.norm_relu(x, *(t.to(DEVICE, parameters) for t in (weight, bias, mean, var)), 1e-5, relu)
    assert x.is_contiguous(memory_format=FORMATS[memory_format])
    precision = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[maps]
    assert error(x, expected.relu() if relu else expected) < precision


@pytest.fixture
def short_check(monkeypatch):
    """The interpreter would need minutes. Tiles of the large batch are those of few processors."""
    if INTERPRETER:
        monkeypatch.setattr(check_device, '_SHAPES', [(2, 40, 5, 7)])


@runs_kernels
@pytest.mark.parametrize('processors', [1, 1000])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_passes_its_own_check(dtype, memory_format, training, processors, short_check, monkeypatch):
    monkeypatch.setattr(tail_triton, '_processors', lambda device: processors)
    assert check_device._difference(
        tail_triton, torch.device(DEVICE), dtype, FORMATS[memory_format], training) is None


@runs_kernels
@pytest.mark.parametrize('kernel', KERNELS)
def test_a_kernel_that_does_nothing_is_found_by_the_check(kernel, short_check, monkeypatch):
    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    monkeypatch.setattr(tail_triton, kernel, Nothing())
    training = kernel != '_norm_relu'
    assert check_device._difference(
        tail_triton, torch.device(DEVICE), torch.float32, torch.contiguous_format, training)


@runs_kernels
@pytest.mark.parametrize('where', [(0, 0, 0, 0), (1, 39, 8, 9)])
def test_gradient_scaling_sees_overflow(where):
    """An infinite gradient in half precision reaches the gradients of all that it flows to."""
    tensors = make((2, 40, 9, 10), 4, torch.float16)
    tensors['shortcut'][where] = 9  # not cut off by the ReLU
    tensors['grad'][where] = float('inf')
    found = compute(cbam_tail, tensors, torch.float16, True, False)
    for name in ('x', 'shortcut', 'weight', 'bias', 'fc1_weight', 'fc2_weight', 'conv_weight'):
        assert not found[name].isfinite().all(), name


@runs_kernels
def test_current_device_is_that_of_the_map(monkeypatch):
    devices = []

    class DeviceOf(contextlib.nullcontext):
        def __init__(self, t):
            super().__init__()
            devices.append(t)

    monkeypatch.setattr(torch.cuda, 'device_of', DeviceOf)
    compute(cbam_tail, make((2, 16, 5, 7)), torch.float32, True, False)
    assert len(devices) == 2  # forward and backward


def test_offsets_have_64_bits():
    """As numbers of 32 bits they would be negative."""
    run('''
        import torch, triton, triton.language as tl
        from timm_cbam.ops.tail_triton import _offsets

        @triton.jit
        def kernel(out_ptr, b, C, P, CHANNELS_LAST: tl.constexpr):
            offsets = _offsets(b, tl.arange(0, 16) + C - 16, tl.arange(0, 16) + P - 16, C, P, CHANNELS_LAST)
            tl.store(out_ptr + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], offsets)

        for channels_last in (False, True):
            out = torch.empty(16, 16, dtype=torch.int64)
            kernel[1,](out, torch.tensor(0).item(), 1 << 17, 1 << 16, CHANNELS_LAST=channels_last)
            assert out[-1, -1] == (1 << 33) - 1
        ''', TRITON_INTERPRET='1')


@pytest.fixture
def kernels():
    return script('kernels')


def what_triton_compiles(launch):
    """Launches with the same are of one compiled kernel."""
    key = [launch.kernel.__name__]
    for param in launch.kernel.params:
        value = launch.arguments[param.name]
        if param.is_constexpr or value is None:
            key.append(value)
        elif isinstance(value, torch.Tensor):
            key.append(value.dtype)
        elif not param.do_not_specialize:
            key.append('one' if value == 1 else value % 16 == 0)
    return tuple(key)


@pytest.mark.skipif(INTERPRETER, reason='interpreted kernels do not tell what Triton would compile')
@pytest.mark.parametrize('memory_format', FORMATS)
def test_new_sizes_compile_nothing_new(memory_format, kernels):
    """Over 20 image sizes, all stages of ResNets and three batches: two tiles for kernels that walk along the map, and
    what Triton makes of sizes that are multiples of 16 or 1."""
    with kernels.recorded() as launches:
        for image in range(33, 33 + 20 * 37, 37):
            for stage, channels in enumerate((256, 512, 1024, 2048)):
                size = -(-image // (4 << stage))
                for batch in (1, 8, 256):
                    kernels.run_tail((batch, channels, size, size), torch.bfloat16, FORMATS[memory_format], True)
    per_kernel = collections.Counter(name for name, *_ in set(map(what_triton_compiles, launches)))
    assert set(per_kernel) == set(KERNELS) - {'_norm_relu'}
    limits = dict(_pool_space=6, _pool_channels=6, _a=6, _b=6, _gate_add=3, _c=3)
    for kernel, count in per_kernel.items():
        assert count <= limits.get(kernel, 1), kernel


class Operations(TorchDispatchMode):
    """PyTorch's, but those that launch nothing"""
    FREE = (
        'promote_types', 'empty', 'empty_like', 'new_empty', 'view', '_unsafe_view', 'as_strided', 'alias', 'detach',
        'permute', 'transpose', 't', 'expand', 'unbind', 'select', 'slice', 'split', 'split_with_sizes', 'squeeze',
        'unsqueeze')

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(INTERPRETER, reason='it launches nothing, so that the run without the interpreter says the same')
@pytest.mark.parametrize('training,limit', [(True, 24), (False, 11)])
def test_launches(training, limit, kernels):
    """At batch 1 they are the time. timm's CBAM has 59 in training and 21 in inference."""
    with kernels.recorded() as launches, Operations() as operations:
        kernels.run_tail((1, 256, 14, 14), torch.bfloat16, torch.channels_last, training)
    assert len(launches) + len(operations.names) <= limit, operations.names


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('shape,processors,wide', [
    ((1, 256, 56, 56), 132, False), ((1, 2048, 7, 7), 132, False), ((256, 64, 56, 56), 132, True),
    ((256, 2048, 7, 7), 132, True), ((1, 2048, 7, 7), 16, True)])
def test_tiles_leave_no_processor_idle(shape, processors, wide, memory_format, monkeypatch):
    triton = importlib.import_module('timm_cbam.ops.tail_triton')
    monkeypatch.setattr(triton, '_processors', lambda device: processors)
    x = torch.empty(shape, device='meta', memory_format=FORMATS[memory_format])
    (block_c, block_p), (_, narrow_p) = triton._tile(x, True, False), triton._tile(x, False, True)
    assert block_c * block_p == 2048
    assert block_c == {True: 32, False: 8}[wide] * (1 if memory_format == 'nchw' else 2)
    if shape[2] == 56:
        assert narrow_p == (64 if memory_format == 'nchw' else 32) // (1 if wide else 4)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == 'cuda' or INTERPRETER, reason='this very process has run the kernels')
def test_in_interpreter():
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-n0', '-p', 'no:cacheprovider', __file__],
        env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETER, reason='in the interpreter nothing is compiled; the run without it has this test')
def test_compiles_for_gpus(tmp_path):
    """A GPU is needed to run kernels, but not to compile them: for each generation, in the formats and dtypes that
    people use, nothing is spilled and what is contiguous is read by 16 bytes."""
    script = ROOT / 'scripts' / 'kernels.py'
    result = subprocess.run(
        [sys.executable, script], env={**os.environ, 'TRITON_CACHE_DIR': str(tmp_path), 'TRITON_INTERPRET': '0'},
        capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    names, _, *rows = (line.strip('| ').split(' | ') for line in result.stdout.splitlines())
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    assert len(rows) == 6 * len(KERNELS) * 2 * 2  # GPUs, kernels, formats, dtypes
    for row in rows:
        assert row['spilled'] == '0', row
        assert int(row['warps']) >= 8, row
        if row['kernel'] in ('_pool_space', '_pool_channels', '_gate_add', '_a', '_b', '_c', '_norm_relu'):
            assert row['load'] == '16', row
        if row['kernel'] in ('_gate_add', '_a', '_c', '_norm_relu'):
            assert row['store'] == '16', row
