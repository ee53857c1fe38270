"""The same numbers in every way that PyTorch has to run a model"""
import copy

import onnxruntime
import openvino
import pytest
import timm
import torch
from helpers import liven, relative_error
from timm.models import FeatureGraphNet

# everything that takes a path of its own through the layers
VARIANTS = {
    'cbam_resnet18': ('cbam_resnet18', {}),
    'bottleneck-s1': ('cbam_resnet50_s1', {}),
    'deep-stem': ('cbam_resnet50d', {}),
    'eccv18': ('cbam_resnet18_eccv18', {}),
    'spatial_channel': ('cbam_resnet18', dict(arrangement='spatial_channel')),
    'parallel': ('cbam_resnet18', dict(arrangement='parallel')),
    'channel': ('cbam_resnet18', dict(arrangement='channel', channel_pooling='avg')),
    'spatial': ('cbam_resnet18', dict(arrangement='spatial', spatial_pooling='max')),
}


@pytest.fixture(params=VARIANTS)
def model(request):
    torch.manual_seed(0)
    name, cbam_args = VARIANTS[request.param]
    return liven(timm.create_model(
        name, num_classes=10, layers=(2, 1, 1, 1), channels=(32, 32, 64, 64),
        cbam_args=dict(rd_ratio=1 / 4, **cbam_args)))


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_script(model, x):
    assert relative_error(torch.jit.script(model)(x), model(x)) < 1e-5


@torch.no_grad()
def test_trace(model, x):
    traced = torch.jit.trace(model, x, check_trace=False)  # which would trace it again
    for inputs in (x, x[:1, :, :, :50]):
        assert relative_error(traced(inputs), model(inputs)) < 1e-5


@torch.no_grad()
def test_fx_as_timm_does_it(model, x):
    graph = FeatureGraphNet(copy.deepcopy(model), out_indices=(0, 4))
    expected = model.forward_intermediates(x, indices=[0, 4], intermediates_only=True)
    for actual, wanted in zip(graph(x), expected, strict=True):
        assert relative_error(actual, wanted) < 1e-6


@torch.no_grad()
def test_export_with_dynamic_batch(model, x):
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},)).module()
    for inputs in (x, x.repeat(3, 1, 1, 1)):
        assert relative_error(exported(inputs), model(inputs)) < 1e-6


@pytest.mark.parametrize('dynamo', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_onnx_with_dynamic_batch(model, x, dynamo, tmp_path):
    file = str(tmp_path / 'model.onnx')
    if dynamo:
        dynamic = dict(dynamic_shapes=({0: torch.export.Dim('batch')},))
    else:
        dynamic = dict(dynamic_axes={'x': {0: 'batch'}})
    torch.onnx.export(model, (x,), file, input_names=['x'], dynamo=dynamo, verbose=False, **dynamic)
    session = onnxruntime.InferenceSession(file)
    for inputs in (x, x.repeat(3, 1, 1, 1)):
        logits = torch.from_numpy(session.run(None, {'x': inputs.numpy()})[0])
        assert relative_error(logits, model(inputs).detach()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('scripted', [True, False])
@torch.no_grad()
def test_openvino(model, x, scripted):
    network = torch.jit.script(model) if scripted else model  # which it traces
    compiled = openvino.compile_model(
        openvino.convert_model(network, example_input=x), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    assert relative_error(torch.from_numpy(compiled(x.numpy())[0]), model(x)) < 1e-5


@torch.no_grad()
def test_channels_last(model, x):
    expected = model(x)
    logits = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert relative_error(logits, expected) < 1e-5


@torch.no_grad()
def test_low_precision(model, x):
    expected = model(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16 and relative_error(logits, expected) < 0.05
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float16, 0.005)):
        logits = copy.deepcopy(model).to(dtype)(x.to(dtype))
        assert logits.dtype == dtype and relative_error(logits, expected) < tolerance


@pytest.mark.slow
def test_compile_without_graph_break(model, x):
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 1e-5
