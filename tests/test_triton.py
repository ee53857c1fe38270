"""The Triton kernels: the same numbers as plain operations, on a GPU or in Triton's interpreter

Triton asks for the interpreter when it is imported, and other tests need it without. So where there is no GPU, the
tests of this file run in a process of their own.
"""
import os
import subprocess
import sys

import pytest
import torch
from helpers import run
from timm_cbam.ops.cbam_residual import ChannelPoolFn, GateAddFn, SpatialPoolFn

from timm_cbam.ops import cbam_residual_ref

pytest.importorskip('triton')

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
INTERPRETER = os.environ.get('TRITON_INTERPRET') == '1'
if DEVICE == 'cuda' or INTERPRETER:
    from timm_cbam.ops.tail_triton import TritonTail

runs_kernels = pytest.mark.skipif(
    DEVICE == 'cpu' and not INTERPRETER, reason='without a GPU test_in_interpreter runs this')
FORMATS = {'nchw': torch.contiguous_format, 'nhwc': torch.channels_last}
# Relative, in the 2-norm. In low precision rounding decides now and then on the channel of a maximum.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
CASES = [  # shape, training, relu
    ((2, 16, 5, 7), True, True), ((2, 40, 8, 10), False, False), ((1, 17, 1, 13), False, True),
    ((3, 33, 9, 1), True, False), ((2, 1, 3, 4), True, True), ((5, 7, 1, 1), True, True)]


@pytest.fixture
def untuned():
    """Tuning compiles all tiles, which takes seconds for each shape."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def fused(x, shortcut, channel_gate, spatial_gate, weight, bias, running_mean, running_var, training, relu):
    tail = TritonTail(relu, training)
    mc = channel_gate(ChannelPoolFn.apply(tail, x, weight, bias, running_mean, running_var, 0.1, 1e-5))
    ms = spatial_gate(SpatialPoolFn.apply(tail, x, mc))
    return GateAddFn.apply(tail, x, mc, ms, shortcut)


def run_chain(chain, tensors, training, relu, equal_channels=False):
    """Output, running statistics and all gradients"""
    t = {k: v.clone().requires_grad_(not k.startswith('running')) for k, v in tensors.items() if k != 'grad'}

    def channel_gate(pooled):
        logits = torch.relu(pooled @ t['w0'].T).sum(0) @ t['w1'].T
        if equal_channels:
            logits = logits[:, :1].expand_as(logits)
        return torch.sigmoid(logits)[..., None, None]

    def spatial_gate(pooled):
        return torch.sigmoid(torch.nn.functional.conv2d(pooled, t['w7'], padding=3))

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        out = chain(
            t['x'], t['shortcut'], channel_gate, spatial_gate, t['weight'], t['bias'], t['running_mean'],
            t['running_var'], training=training, relu=relu)
        out.backward(tensors['grad'])
    return {'out': out.detach(), **{k: v.detach() if v.grad is None else v.grad for k, v in t.items()}}


def make_tensors(shape, dtype, memory_format):
    b, c, h, w = shape
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(size, generator=generator)

    def other_strides(t):  # neither of the two formats
        return t.transpose(2, 3).contiguous().transpose(2, 3)

    shortcut = randn(*shape)
    tensors = {
        'x': (1.5 * randn(*shape) + randn(c, 1, 1)).contiguous(memory_format=memory_format),
        # no sum near zero, where rounding would decide on the gradient
        'shortcut': other_strides(shortcut + 3 * shortcut.sign()),
        'grad': other_strides(randn(*shape)),
        'w0': randn(5, c) / (c + 5) ** 0.5, 'w1': randn(c, 5) / 5, 'w7': randn(1, 2, 7, 7) / 7,
        'weight': randn(c), 'bias': randn(c), 'running_mean': randn(c), 'running_var': 1 + randn(c) ** 2,
    }
    tensors['weight'][1::5] = 0
    for k, t in tensors.items():  # batch-norm's parameters are not in low precision
        is_map_or_gate = k in ('x', 'shortcut', 'grad', 'w0', 'w1', 'w7')
        tensors[k] = t.to(DEVICE, dtype if is_map_or_gate else torch.promote_types(dtype, torch.float32))
    return tensors


def check(tensors, training, relu, **kwargs):
    expected = {k: t.cpu().double() for k, t in tensors.items()}
    expected = run_chain(cbam_residual_ref, expected, training, relu, **kwargs)
    actual = run_chain(fused, tensors, training, relu, **kwargs)
    again = run_chain(fused, tensors, training, relu, **kwargs)
    dtype = tensors['x'].dtype
    assert actual['out'].dtype == actual['x'].dtype == dtype
    for name, a in actual.items():
        assert torch.equal(a, again[name]), name
        error = (a.cpu().double() - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)
        assert error < TOLERANCE[dtype], f'{name}: {error}'
    for name in ('out', 'x'):
        for memory_format in FORMATS.values():
            if tensors['x'].is_contiguous(memory_format=memory_format):
                assert actual[name].is_contiguous(memory_format=memory_format)


@runs_kernels
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('dtype,shape,training,relu', [
    (dtype, *case) for dtype in TOLERANCE for case in (CASES if dtype == torch.float32 else CASES[:2])])
def test_equals_reference(dtype, shape, training, relu, memory_format, untuned):
    check(make_tensors(shape, dtype, FORMATS[memory_format]), training, relu)


@runs_kernels
@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('levels', [1, 3])
@pytest.mark.parametrize('training', [True, False])
def test_ties(training, levels, memory_format):
    """The first channel of a maximum gets its gradient, pixels share it."""
    tensors = make_tensors((2, 20, 6, 13), torch.float32, FORMATS[memory_format])
    x = torch.randint(levels, (2, 20, 6, 13), generator=torch.Generator().manual_seed(1)).float()
    tensors['x'] = x[:1, :1].expand_as(x).to(DEVICE).contiguous(memory_format=FORMATS[memory_format])
    for k in ('weight', 'bias', 'running_mean', 'running_var'):
        tensors[k] = tensors[k][-1:].repeat(20)
    check(tensors, training, True, equal_channels=True)


@runs_kernels
def test_nan():
    tensors = make_tensors((2, 20, 3, 5), torch.float32, torch.contiguous_format)
    x = tensors['x']
    x[1, 18, 2, 1] = x[1, 19, 2, 1] = float('nan')
    tail = TritonTail(True, False)
    pooled = ChannelPoolFn.apply(
        tail, x, *(tensors[k] for k in ('weight', 'bias', 'running_mean', 'running_var')), 0.1, 1e-5)
    assert torch.equal(pooled.isnan(), x.isnan().any(3).any(2).expand(2, -1, -1))
    pooled = SpatialPoolFn.apply(tail, x, torch.ones_like(x[..., :1, :1]))
    assert torch.equal(pooled.isnan(), x.isnan().any(1, keepdim=True).expand_as(pooled))
    assert tail.index[1, 0, 2, 1] == 18
    out = tail.gate_add(x, torch.ones_like(x[..., :1, :1]), torch.ones_like(x[:, :1]), x)
    assert torch.equal(out.isnan(), x.isnan())


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == 'cuda' or INTERPRETER, reason='the kernels run in this process')
def test_in_interpreter():
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', __file__],
        env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETER, reason='the interpreter does not compile')
def test_compiles_for_gpu(tmp_path):
    """A GPU is needed to run kernels, but not to compile them."""
    run('''
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from timm_cbam.ops import tail_triton

        MAPS = ('x', 'grad', 'out', 'g', 'shortcut', 'pooled', 'dx', 'top', 'mc', 'ms', 'davg', 'dmax')
        VARIANTS = [  # type of maps, of sums and parameters, format, what the launcher knows to be constant
            ('*bf16', '*fp32', False, dict(RELU=True)),
            ('*bf16', '*fp32', True, dict(RELU=True)),
            ('*fp16', '*fp32', False, dict(RELU=False, k_x_ptr=None, C=1)),
            ('*fp32', '*fp32', True, dict(RELU=True, P=1)),
            ('*fp64', '*fp64', True, dict(RELU=True)),
        ]
        kernels = [k for k in vars(tail_triton).values() if isinstance(k, triton.runtime.Autotuner)]
        assert len(kernels) == 6
        for kernel in kernels:
            for maps, others, channels_last, known in VARIANTS:
                config = tail_triton._candidates(kernel.configs, {}, CHANNELS_LAST=channels_last)[0]
                constants = {**known, **config.kwargs, 'CHANNELS_LAST': channels_last}
                constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
                signature = {}
                for arg in kernel.arg_names:
                    name = arg.removesuffix('_ptr')
                    signature[arg] = (
                        'constexpr' if arg in constants else 'i32' if name in ('C', 'P') else
                        '*i32' if name in ('index', 'ties') else maps if name in MAPS else others)
                source = ASTSource(fn=kernel.fn, signature=signature, constexprs=constants)
                for capability in (80, 90):
                    target = GPUTarget('cuda', capability, 32)
                    assert triton.compile(source, target, dict(num_warps=config.num_warps)).asm['cubin']
        ''', TRITON_INTERPRET='0', TRITON_CACHE_DIR=str(tmp_path))
