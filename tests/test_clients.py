"""Tools that offload, adapt, attribute and count through modules get from fused models what they get without fusion"""
import copy
from contextlib import nullcontext

import accelerate
import captum.attr
import peft
import pytest
import timm
import torch
import torchinfo
from helpers import liven, plain_path, relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_cbam.fusion import match

NAMES = ('cbam_resnet18', 'cbam_resnet50', 'cbam_resnet18_eccv18')


def create(name, inplace=True):
    torch.manual_seed(0)
    kwargs = dict(cbam_args=dict(rd_ratio=1 / 4), layers=(1, 1, 1, 1), channels=(16, 16, 16, 16), num_classes=5)
    model = liven(timm.create_model(name, **kwargs)).double()
    for m in model.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = inplace
    return model


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_models_are_fused(name):
    for inplace in (False, True):
        model = create(name, inplace)
        assert all(match(layer[0], torch.zeros(2, layer[0].conv1.in_channels, 8, 8, dtype=torch.float64)) for layer in (
            model.layer1, model.layer2, model.layer3, model.layer4))


def both(function):
    """What function returns with fusion and on the plain path, from the same random numbers."""
    results = []
    for path in (nullcontext, plain_path):
        torch.manual_seed(2)
        with path():
            results.append(function())
    return results


def assert_close(actual, expected):
    assert expected.abs().max() > 0
    assert relative_error(actual, expected) < 1e-9


# ---- accelerate

@pytest.mark.parametrize('tool', ['cpu_offload', 'disk_offload', 'dispatch_model', 'dispatch_model_to_disk'])
@torch.no_grad()
def test_accelerate(name, images, tool, tmp_path):
    expected = create(name)(images)
    model = create(name)
    if tool == 'cpu_offload':
        accelerate.cpu_offload(model, execution_device=torch.device('cpu'))
    elif tool == 'disk_offload':
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device('cpu'))
    else:
        disk = 'disk' if tool.endswith('disk') else 'cpu'
        device_map = {n: disk if n in ('layer1', 'layer3') else 'cpu' for n, _ in model.named_children()}
        model = accelerate.dispatch_model(
            model, device_map, main_device='cpu', offload_dir=tmp_path, force_hooks=True)
    if tool != 'dispatch_model':
        assert model.layer1[0].se.channel.fc1.weight.is_meta  # it is offloaded indeed
    for _ in range(2):
        assert_close(model(images), expected)
    assert tool == 'dispatch_model' or model.layer1[0].se.channel.fc1.weight.is_meta


def test_accelerate_training(name, images):
    """Weights that come to their layer only while it runs."""
    def gradients():
        model = create(name).train()
        accelerate.cpu_offload(model.layer1[0].se, execution_device=torch.device('cpu'))
        model(images).square().sum().backward()
        return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None])

    assert_close(*both(gradients))


# ---- captum

@pytest.mark.filterwarnings('ignore')
def test_deep_lift(name, images):
    # it refuses activations in place, with or without fusion
    attributions = both(lambda: captum.attr.DeepLift(create(name, inplace=False)).attribute(images, target=1))
    assert_close(*attributions)


def test_integrated_gradients(name, images):
    model = create(name)
    actual, expected = both(lambda: captum.attr.IntegratedGradients(model).attribute(images, target=1, n_steps=20))
    assert_close(actual, expected)


@pytest.mark.parametrize('where', ['se', 'se.spatial', 'last norm', 'last act', 'conv1', ''])
def test_layer_integrated_gradients(name, images, where):
    """Of a block's modules, the last of its branch among them, onto whose output the shortcut is added."""
    def attribute():
        model = create(name, inplace=where == '')
        block = model.layer2[0]
        depth = 3 if hasattr(block, 'bn3') else 2
        layer = block.get_submodule(where.replace('last norm', f'bn{depth}').replace('last act', f'act{depth}'))
        method = captum.attr.LayerIntegratedGradients(model, layer)
        return method.attribute(images, target=1, n_steps=50, return_convergence_delta=True)

    (actual, _), (expected, delta) = both(attribute)
    assert_close(actual, expected)
    if where in ('last act', ''):  # all that the classifier sees, so that attributions add up to what it says
        assert (delta.abs() < 0.05 * expected.sum((1, 2, 3)).abs() + 0.05).all()


def test_layer_attribution_by_hooks(name, images):
    def attribute():
        model = create(name, inplace=False)
        return captum.attr.LayerGradCam(model, model.layer2[0].se.channel).attribute(images, target=1)

    assert_close(*both(attribute))


# ---- LoRA

def train_step(model, images, forward=lambda model, images: model(images)):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    outputs = []
    for _ in range(2):
        out = forward(model, images)
        optimizer.zero_grad()
        out.square().sum().backward()
        optimizer.step()
        outputs.append(out.detach().flatten())
    return torch.cat(outputs + [p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize('targets', [['conv2'], ['fc1', 'fc2'], ['spatial.conv'], ['conv1', 'conv2', 'fc1', 'conv']])
@pytest.mark.parametrize('training', [False, True])
def test_peft(name, images, targets, training):
    def train():
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, lora_dropout=0.2)
        return train_step(peft.get_peft_model(create(name), config).train(training), images)

    assert_close(*both(train))


class KohyaLora(nn.Module):
    """The layer stays in its place, its forward is replaced: as in kohya-ss/sd-scripts."""

    def __init__(self, module):
        super().__init__()
        self.original = [module.forward]
        self.down = nn.Conv2d(
            module.in_channels, 2, module.kernel_size, module.stride, module.padding, bias=False, dtype=torch.float64)
        self.up = nn.Conv2d(2, module.out_channels, 1, bias=False, dtype=torch.float64)
        module.forward = self.forward

    def forward(self, x):
        return self.original[0](x) + self.up(self.down(x))


@pytest.mark.parametrize('targets', ['conv', 'fc', 'se'])
@pytest.mark.parametrize('training', [False, True])
def test_kohya_lora(name, images, targets, training):
    def train():
        model = create(name).train(training).requires_grad_(False)
        loras = nn.ModuleDict({
            n.replace('.', '_'): KohyaLora(m) for n, m in model.named_modules()
            if isinstance(m, nn.Conv2d) and targets in n})
        assert loras
        before = copy.deepcopy(loras.state_dict())
        result = train_step(nn.ModuleList([model, loras]), images, lambda m, x: m[0](x))
        assert all(not torch.equal(before[k], v) for k, v in loras.state_dict().items())
        return result

    assert_close(*both(train))


# ---- counters

@pytest.mark.parametrize('backward', [False, True])
def test_flop_counter(name, images, backward):
    def count():
        model = create(name)
        with FlopCounterMode(display=False) as counter:
            out = model(images)
            if backward:
                out.sum().backward()
        return counter.get_total_flops(), counter.get_flop_counts()

    (total, by_module), (expected, expected_by_module) = both(count)
    assert total == expected and by_module == expected_by_module
    assert any(n.endswith('se.channel.fc1') for n in by_module)


def test_torchinfo(name, images):
    def rows():
        result = torchinfo.summary(create(name), input_data=images, depth=9, verbose=0, cache_forward_pass=False)
        return [(r.get_layer_name(True, True), r.output_size, r.macs) for r in result.summary_list]

    actual, expected = both(rows)
    assert actual == expected
    assert any('fc1' in row[0] for row in expected)
