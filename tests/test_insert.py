"""Attention put into networks that have none: they compute the same, bit for bit, and then learn"""
import copy
import io
import re
from collections import OrderedDict

import pytest
import timm
import torch
import torchvision
from helpers import liven
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from timm_cbam import Cbam, add_cbam, remove_cbam
from timm_cbam.insert import WithCbam


def handwritten():
    return nn.Sequential(OrderedDict(
        stem=nn.Conv2d(3, 32, 3, padding=1), act1=nn.ReLU(inplace=True), pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(32, 64, 3, padding=1), norm2=nn.GroupNorm(8, 64), pool2=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(), fc=nn.Linear(64, 10)))


def normalizer_free():
    model = timm.create_model('nf_resnet26')
    for block in model.stages.modules():
        if hasattr(block, 'conv3'):
            nn.init.ones_(block.conv3.gain)  # zero, as the last batch-norm of other ResNets is
    return model


class PreActBlock(nn.Module):
    """As in kuangliu/pytorch-cifar: blocks have a shortcut only where they need a projection."""

    def __init__(self, in_planes, planes):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        if in_planes != planes:
            self.shortcut = nn.Conv2d(in_planes, planes, 1, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, 'shortcut') else x
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


# How it is made, where CBAM stands by default (the first and last place, and how many), and how many of the places have
# an affine layer that takes the factor.
NETWORKS = {
    'resnet18': (lambda: timm.create_model('resnet18'), 'layer1.0.bn2', 'layer4.1.bn2', 8, 8),
    'regnety_002': (lambda: timm.create_model('regnety_002'), 's1.b1.conv3.bn', 's4.b7.conv3.bn', 13, 13),
    'convnext_tiny': (lambda: timm.create_model('convnext_tiny'), 'stages.0', 'stages.3', 4, 0),
    'efficientnet_b0': (lambda: timm.create_model('efficientnet_b0'), 'blocks.0.0', 'blocks.6.0', 5, 0),
    'mobilenetv3_large_100': (
        lambda: timm.create_model('mobilenetv3_large_100'), 'blocks.0.0', 'blocks.6.0', 5, 0),
    'densenet121': (lambda: timm.create_model('densenet121'), 'features.norm0', 'features.norm5', 5, 0),
    'vgg16_bn': (lambda: timm.create_model('vgg16_bn', mlp_ratio=1 / 64), 'features.5', 'features.42', 5, 0),
    'seresnet18': (lambda: timm.create_model('seresnet18'), 'layer1.0.se', 'layer4.1.se', 8, 0),
    'resnetv2_50': (
        lambda: timm.create_model('resnetv2_50'), 'stages.0.blocks.0.conv3', 'stages.3.blocks.2.conv3', 16, 16),
    'nf_resnet26': (normalizer_free, 'stages.0.0.conv3', 'stages.3.1.conv3', 8, 0),
    'res2net50_14w_8s': (lambda: timm.create_model('res2net50_14w_8s'), 'layer1.0.bn3', 'layer4.2.bn3', 16, 16),
    'torchvision resnet50': (torchvision.models.resnet50, 'layer1.0.bn3', 'layer4.2.bn3', 16, 16),
    'torchvision regnet_y_400mf': (
        torchvision.models.regnet_y_400mf, 'trunk_output.block1.block1-0.f.c.1',
        'trunk_output.block4.block4-5.f.c.1', 16, 16),
    'torchvision efficientnet_b0': (torchvision.models.efficientnet_b0, 'features.1.0', 'features.8.2', 5, 0),
    'Sequential': (handwritten, 'act1', 'norm2', 2, 1),
    'PreActBlock': (lambda: nn.Sequential(PreActBlock(3, 32), PreActBlock(32, 32)), '0.conv2', '1.conv2', 2, 2),
}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module', params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return request.param, liven(NETWORKS[request.param][0]())


def run(model, x=IMAGES, training=False):
    torch.manual_seed(2)  # of dropout
    with torch.no_grad():
        return model.train(training)(x)


def attended(model, *args, **kwargs):
    model = copy.deepcopy(model)
    add_cbam(model, *args, **{'example': IMAGES[:1], **kwargs})
    return model


def equal_state(model, other):
    a, b = model.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def gates(model):
    return {k: p for k, p in model.named_parameters() if '.cbam.' in k}


def test_bitwise_equal_and_back(network):
    name, theirs = network
    _, first, last, count, folded = NETWORKS[name]
    ours, before = copy.deepcopy(theirs), copy.deepcopy(theirs)
    planned = add_cbam(ours, example=IMAGES[:1], dry_run=True)
    assert equal_state(ours, theirs) and not any(isinstance(m, WithCbam) for m in ours.modules())
    assert add_cbam(ours, example=IMAGES[:1]) == planned
    assert (planned[0], planned[-1], len(planned)) == (first, last, count)
    wrappers = [m for m in ours.modules() if isinstance(m, WithCbam)]
    assert sum(m.scale == 1 for m in wrappers) == folded and all(m.scale * m.folded == 4 for m in wrappers)
    expected = run(before)
    assert torch.equal(run(ours), expected) and expected.std() > 0
    assert torch.equal(run(ours, training=True), run(before, training=True))
    assert remove_cbam(ours) == planned
    assert equal_state(ours, before)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]


def test_learns(network):
    """The zeros from the first step on, and what stands before them from the second."""
    ours = attended(network[1], rd_ratio=0.25).train()  # with one or two hidden channels all may be dead
    optimizer = torch.optim.Adam(gates(ours).values(), lr=1e-3)
    zero = ('.fc2.weight', '.spatial.conv.weight')
    for step in range(2):
        optimizer.zero_grad()
        ours(IMAGES).square().mean().backward()
        for key, p in gates(ours).items():
            assert p.grad.any() == (step == 1 or key.endswith(zero)), (key, step)
            assert p.any() == (step == 1 or not key.endswith(zero)), (key, step)
        optimizer.step()


def test_round_trip_and_in_the_path(network):
    theirs = network[1]
    ours, fresh = attended(theirs, rd_ratio=0.25), attended(theirs, rd_ratio=0.25)
    reference = run(ours)
    torch.manual_seed(3)
    for p in gates(ours).values():
        nn.init.normal_(p, std=0.5)
    expected = run(ours)
    for key in [k for k in gates(ours) if k.endswith('fc2.weight')][::5]:  # more take longer
        weight = ours.get_parameter(key).data
        drawn = weight.clone()
        weight.zero_()
        assert not torch.equal(run(ours), expected), key
        weight.copy_(drawn)
    assert not torch.allclose(expected, reference)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(run(fresh), expected) and torch.equal(run(copy.deepcopy(ours)), expected)


def test_bitwise_equal_where_it_learns_for_every_variant():
    theirs = liven(timm.create_model('resnet18', num_classes=10))
    for cbam_args, factor in (
            (dict(spatial_norm=True, mlp_bias=True), 4), (dict(gate_layer='hard_sigmoid'), 4),
            (dict(arrangement='channel'), 2), (dict(arrangement='spatial', kernel_size=3), 2),
            (dict(arrangement='parallel'), 4)):
        for where in ('layer?.?.bn2', 'layer?.?.act2'):  # with and without an affine layer
            ours, before = attended(theirs, where, **cbam_args), copy.deepcopy(theirs)
            assert {m.scale * m.folded for m in ours.modules() if isinstance(m, WithCbam)} == {factor}
            assert torch.equal(run(ours), run(before)), (cbam_args, where)
            assert torch.equal(run(ours, training=True), run(before, training=True)), (cbam_args, where)


def without_addresses(value):
    return re.sub(' at 0x[0-9a-f]+', '', str(value))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
def test_dtype_and_memory_format(dtype):
    theirs = liven(timm.create_model('resnet18')).to(dtype=dtype, memory_format=torch.channels_last)
    ours = attended(theirs, example=IMAGES[:1].to(dtype))
    assert {p.dtype for p in ours.parameters()} == {dtype}
    x = IMAGES.to(dtype=dtype, memory_format=torch.channels_last)
    assert torch.equal(run(ours, x), run(theirs, x))


def test_outputs_of_feature_pyramid():
    theirs = liven(resnet_fpn_backbone(backbone_name='resnet18', weights=None))
    ours = copy.deepcopy(theirs)
    places = add_cbam(ours, 'fpn.layer_blocks.?', example=IMAGES[:1])
    assert places == [f'fpn.layer_blocks.{i}.0' for i in range(4)]
    expected = run(theirs)
    assert all(torch.equal(v, expected[k]) for k, v in run(ours).items())
    nn.init.normal_(ours.fpn.layer_blocks[1][0].cbam.channel.fc2.weight)
    assert [k for k, v in run(ours).items() if not torch.equal(v, expected[k])] == ['1']
    detector = torchvision.models.detection.FasterRCNN(theirs, num_classes=2, min_size=64)
    places = [f'backbone.{name}' for name in places]
    assert add_cbam(detector, 'backbone.fpn.layer_blocks.?', example=([IMAGES[0]],)) == places


@pytest.mark.parametrize('where,expected', [
    ('act1', ['act1']),
    (['conv2', 'act1'], ['act1', 'conv2']),
    ('conv[12]', ['conv2']),
    (['conv2', 'conv*'], ['conv2']),
    (lambda name, m: isinstance(m, nn.ReLU) or name == 'pool1', ['act1', 'pool1']),
], ids=without_addresses)
def test_where(where, expected):
    assert add_cbam(handwritten(), where, example=IMAGES[:1]) == expected


class TwoBranches(nn.Module):
    def __init__(self, *branches, act=None):
        super().__init__()
        self.a, self.b = branches
        self.act = act or nn.Identity()

    def forward(self, x):
        return self.act(self.a(x)) + self.act(self.b(x))


def test_shared():
    """A module with two names gets one CBAM, and weights that others use as well are left alone."""
    conv = nn.Conv2d(3, 16, 3)
    theirs = TwoBranches(conv, conv)
    ours = attended(theirs, 'b')
    assert ours.a is ours.b and isinstance(ours.a, WithCbam) and ours.a.folded == 4
    assert torch.equal(run(ours), run(theirs))
    assert remove_cbam(ours) == ['a'] and equal_state(ours, theirs) and ours.a is ours.b
    tied = TwoBranches(nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3))
    tied.a.weight = tied.b.weight
    ours = attended(tied, 'b')
    assert ours.b.scale == 4 and torch.equal(run(ours), run(tied))
    for change in (nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm, lambda m: m.register_forward_hook(
            lambda m, args, output: output.clamp(-0.1, 0.1))):
        theirs = TwoBranches(nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3))
        change(theirs.b)
        theirs.eval()
        assert torch.equal(run(attended(theirs, 'b')), run(theirs))


def test_nested_and_one_after_the_other():
    theirs = liven(timm.create_model('resnet18'))
    ours = attended(theirs, ['layer1.0', 'layer1.0.bn2'])
    assert add_cbam(ours, 'layer4', example=IMAGES[:1]) == ['layer4.1']
    assert torch.equal(run(ours), run(theirs))
    assert remove_cbam(ours) == ['layer1.0', 'layer1.0.bn2', 'layer4.1'] and equal_state(ours, theirs)
    assert remove_cbam(ours) == []


def test_attributes_are_those_of_the_module():
    model = attended(timm.create_model('convnext_tiny', num_classes=0), ['stages.0', 'stem.0'])
    assert model.stem[0].out_channels == 96 and not hasattr(model.stem[0], 'bias')
    model.set_grad_checkpointing()
    assert model.stages[0].module.grad_checkpointing and 'grad_checkpointing' not in vars(model.stages[0])
    assert not hasattr(model.stages[0], 'no_such')
    model.stages[0].scale_of_mine = 3
    assert model.stages[0].scale_of_mine == 3 and not hasattr(model.stages[0].module, 'scale_of_mine')
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    assert equal_state(torch.load(file, weights_only=False), model)


def test_clients_that_iterate_over_stages():
    """Checkpointing and features_only see attention, too."""
    theirs = liven(timm.create_model('efficientnet_b0'))
    ours = attended(theirs)
    nn.init.normal_(ours.blocks[2][-1].cbam.channel.fc2.weight)
    maps = [m.eval().forward_intermediates(IMAGES, intermediates_only=True) for m in (ours, theirs)]
    assert [torch.equal(a, b) for a, b in zip(*maps, strict=True)] == [True, True, False, False, False]
    expected = ours.train()(IMAGES)
    ours.set_grad_checkpointing()
    torch.testing.assert_close(ours(IMAGES), expected)
    assert not torch.allclose(theirs.train()(IMAGES), expected)
    for name, places in (
            ('convnext_tiny', [f'stages_{i}' for i in range(4)]), ('efficientnet_b0', add_cbam(theirs, dry_run=True)),
            ('regnety_002', add_cbam(timm.create_model('regnety_002'), dry_run=True))):
        net = liven(timm.create_model(name, features_only=True))
        before = run(net)
        placed = add_cbam(net, example=IMAGES[:1])
        assert [p.replace('.', '_') for p in placed] == [p.replace('.', '_') for p in places]
        assert all(torch.equal(a, b) for a, b in zip(run(net), before, strict=True))


@pytest.mark.parametrize('create', [lambda: timm.create_model('resnet18', layers=(2, 1, 1, 1)), handwritten])
def test_script_trace_compile(create):
    """With attention that does something, and with the scale in the affine layer and in the wrapper."""
    model = attended(liven(create()))
    for p in gates(model).values():
        nn.init.normal_(p, std=0.3)
    expected = run(model)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    torch.testing.assert_close(run(torch.jit.load(file)), expected)
    torch.testing.assert_close(run(torch.fx.symbolic_trace(model)), expected)
    torch.testing.assert_close(torch.export.export(model, (IMAGES,)).module()(IMAGES), expected)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(run(compiled), expected)


class Odd(nn.Module):
    """Modules that CBAM cannot follow."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.wide = nn.Conv2d(16, 32, 1)
        self.relu = nn.ReLU()
        self.gru = nn.GRU(64, 16)
        self.nhwc = nn.Linear(16, 24)
        self.product = nn.Bilinear(3, 3, 3)
        self.unused = nn.Conv2d(3, 16, 3)
        self.cbam = Cbam(32)

    def forward(self, x):
        self.gru(x[0])
        self.product(x.mT[..., :3], x.mT[..., :3])
        x = self.relu(self.conv(x))
        self.nhwc(x.permute(0, 2, 3, 1))
        return self.cbam(self.relu(self.wide(x)))


@pytest.mark.parametrize('kwargs,message', [
    (dict(where='layer9'), "where='layer9' matches no module of Odd.* conv, wide, relu"),
    (dict(where=['conv', 'x*']), r"where='x\*' matches no module"),
    (dict(where=[]), r'where=\[\] chooses nothing'),
    (dict(where=lambda name, m: False), 'chooses none of the 17 modules of Odd'),
    (dict(where='gru'), r'gru \(GRU\) takes 1 arguments and returns a tuple'),
    (dict(where='product'), r'product \(Bilinear\) takes 2 arguments'),
    (dict(where='nhwc'), r'nhwc \(Linear\) returns a tensor of shape \(1, 62, 62, 24\), which looks like \(B, H, W, C'),
    (dict(where='relu'), r'relu \(ReLU\) is used for maps of 16 and 32 channels'),
    (dict(where='unused'), 'unused is not called in the forward pass'),
    (dict(where='cbam'), 'cbam has a CBAM already'),
    (dict(where='cbam.spatial.conv'), 'cbam.spatial.conv has a CBAM already, or is a part of one'),
    (dict(where='conv', gate_layer='tanh'), "No CBAM after conv: gate_layer Tanh is 0 at zero.* 'hard_sigmoid'"),
    (dict(where='conv', arrangement='serial'), "No CBAM after conv: Unknown arrangement 'serial'"),
    (dict(where='conv', example=IMAGES[:, :1]), r'Odd fails on the example of shape \(2, 1, 64, 64\).*Pass example='),
], ids=without_addresses)
def test_refused(kwargs, message):
    model = Odd()
    model.conv.eval()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=f'(?s){message}'):
        add_cbam(model, **{'example': IMAGES[:1], **kwargs})
    assert equal_state(model, before)
    for (name, m), (other, n) in zip(model.named_modules(), before.named_modules(), strict=True):
        assert (name, type(m), m.training) == (other, type(n), n.training) and not m._forward_hooks


def test_twice():
    model = attended(timm.create_model('resnet18'))
    before = copy.deepcopy(model)
    for where in (None, 'layer1.1.bn2', 'layer1.0.bn2.module', lambda name, m: isinstance(m, nn.BatchNorm2d)):
        with pytest.raises(ValueError, match='has a CBAM already'):
            add_cbam(model, where, example=IMAGES[:1])
    assert equal_state(model, before)


@pytest.mark.parametrize('name,message', [
    ('vit_tiny_patch16_224', r'returns a tensor of shape \(1, 197, 192\)'),
    ('swin_tiny_patch4_window7_224', r'shape \(1, 56, 56, 96\), which looks like \(B, H, W, C\)'),
    ('cbam_resnet18', 'layer1.0.se has a CBAM already'),
])
def test_networks_without_maps_or_with_attention(name, message):
    model = timm.create_model(name)  # the example is of the size in its pretrained_cfg
    with pytest.raises(ValueError, match=message):
        add_cbam(model)


def test_example_leaves_no_trace():
    model = timm.create_model('resnet18', drop_rate=0.5).train()
    model.layer1.eval()
    before, state = copy.deepcopy(model), torch.get_rng_state()
    add_cbam(model, dry_run=True)
    assert equal_state(model, before) and not any(p.grad is not None for p in model.parameters())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    add_cbam(model, ['layer1.0.bn2', 'layer2.0.bn2'])
    assert not torch.equal(torch.get_rng_state(), state)  # the first layers of attention are drawn
    for layer, training in ((model.layer1, False), (model.layer2, True)):
        assert {m.training for m in layer[0].bn2.modules()} == {training}


def test_narrow_places_have_one_hidden_channel():
    for kwargs, hidden in (({}, [1, 1, 2]), (dict(rd_ratio=1 / 32), [1, 1, 1]), (dict(rd_channels=3), [3, 3, 3])):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 32, 3))
        before = copy.deepcopy(model)
        add_cbam(model, '?', example=IMAGES[:1], **kwargs)
        assert [m.cbam.channel.fc1.out_channels for m in model] == hidden
        assert torch.equal(run(model), run(before))
    with pytest.raises(ValueError, match='rd_ratio=0'):
        add_cbam(before, '0', example=IMAGES[:1], rd_ratio=0)


@pytest.mark.parametrize('order', [list, lambda modules: list(modules)[::-1]], ids=['outer first', 'inner first'])
def test_what_tools_attach_stays_where_it_was_attached(order):
    """Counters are buffers (thop), dunder names (calflops, ptflops) or plain attributes, on every module."""
    model = attended(timm.create_model('convnext_tiny', num_classes=0), ['stages.0', 'stem.0'])
    modules = order(model.modules())
    for i, m in enumerate(modules):
        m.register_buffer('total_ops', torch.tensor(i))
        m.register_parameter('lora', nn.Parameter(torch.tensor(float(i))))
        m.__flops__ = m.note = i
    for i, m in enumerate(modules):
        assert (m.total_ops.item(), m.lora.item(), m.__flops__, m.note) == (i, i, i, i)
    for m in modules:
        del m.total_ops, m.lora, m.__flops__, m.note
    assert not any(hasattr(m, name) for m in modules for name in ('total_ops', 'lora', '__flops__', 'note'))


def test_weights_are_met_once():
    """By what goes through all modules and looks for weights: torchsummary, the parameter groups of YOLO."""
    for where in ('stem.0', None):
        model = attended(timm.create_model('convnext_atto', num_classes=0), where)
        tensors = [p for m in model.modules() for p in (getattr(m, 'weight', None), getattr(m, 'bias', None))]
        found = [p for p in tensors if isinstance(p, nn.Parameter)]
        assert len(found) == len(set(found)) > 0


@pytest.mark.parametrize('create,prefix', [
    pytest.param(
        lambda: torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None), 'backbone.features.',
        marks=pytest.mark.slow),
    (lambda: torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None),
     'backbone.'),
    (lambda: torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, min_size=64),
     'backbone.body.layer'),
    (lambda: torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None),
     'backbone.body.'),
], ids=['ssd', 'ssdlite', 'retinanet', 'fasterrcnn'])
def test_default_of_detectors_is_their_backbone(create, prefix):
    places = add_cbam(create(), example=([IMAGES[0]],))
    assert len(places) >= 4 and all(place.startswith(prefix) for place in places), places


class Head(nn.Module):
    """Stages that are made one after the other, with operations in between, and heads that look at each of them."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.heads = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(4))

    def forward(self, x):
        x = F.relu(self.one(x))
        y = self.two(F.max_pool2d(x, 2) * 2)
        return [head(z) for head, z in zip(self.heads, (x, y, F.max_pool2d(y, 2), F.max_pool2d(y, 4)), strict=True)]


def test_stages_feed_each_other():
    assert add_cbam(Head(), example=IMAGES[:1]) == ['one', 'two']


@pytest.mark.parametrize('create', [
    lambda: torchvision.models.VisionTransformer(64, 16, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=32),
    lambda: nn.Sequential(nn.Conv2d(3, 32, 8, stride=8), nn.Flatten(2), nn.Linear(64, 8)),
], ids=['vit', 'embedding'])
def test_an_embedding_is_no_stage(create):
    with pytest.raises(ValueError, match='has no stages with maps.*Pass where='):
        add_cbam(create(), example=IMAGES[:1])


@pytest.fixture
def one_process():
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_refused_where_weights_drift_apart(one_process):
    wrapped = nn.parallel.DistributedDataParallel(handwritten())
    for model in (wrapped, nn.Sequential(wrapped)):
        with pytest.raises(ValueError, match='DistributedDataParallel, .*Call add_cbam before wrapping'):
            add_cbam(model, example=IMAGES[:1])
    sharded = torch.distributed.fsdp.fully_shard(
        handwritten(), mesh=torch.distributed.device_mesh.init_device_mesh('cpu', (1,)))
    with pytest.raises(ValueError, match='FSDPModule, .*Call add_cbam before wrapping'):
        add_cbam(sharded, example=IMAGES[:1])
    replica = handwritten()._replicate_for_data_parallel()
    with pytest.raises(ValueError, match='DataParallel.*Call add_cbam before wrapping'):
        add_cbam(replica, example=IMAGES[:1])
    model = handwritten()
    add_cbam(nn.DataParallel(model), example=IMAGES[:1])  # which copies it anew for every forward pass
    assert isinstance(model.act1, WithCbam)


GRAPHS = {
    'fx': torch.fx.symbolic_trace,
    'exported': lambda m: torch.export.export(m, (IMAGES,)).module(),
    'traced': lambda m: torch.jit.trace(m, IMAGES),
    'scripted': torch.jit.script,
}


@pytest.mark.parametrize('create', [lambda: timm.create_model('resnet18', layers=(1, 1, 1, 1)), handwritten])
@pytest.mark.parametrize('graph', GRAPHS)
def test_no_default_places_in_graphs(graph, create):
    traced = GRAPHS[graph](create().eval())
    for model in (traced, nn.Sequential(traced)):
        with pytest.raises(ValueError, match='graph.*[Cc]all add_cbam before'):
            add_cbam(model, example=IMAGES)


def test_places_in_a_graph():
    theirs = liven(timm.create_model('resnet18', layers=(1, 1, 1, 1)))
    graph = torch.fx.symbolic_trace(copy.deepcopy(theirs))  # its modules are those of what was traced
    assert add_cbam(graph, 'layer?.0.bn2', example=IMAGES[:1]) == [f'layer{i}.0.bn2' for i in range(1, 5)]
    assert torch.equal(run(graph), run(theirs))
    for name in ('exported', 'traced', 'scripted'):
        with pytest.raises(ValueError, match='(?i)not called in the forward pass|no module|graph'):
            add_cbam(GRAPHS[name](copy.deepcopy(theirs)), 'layer1.0.bn2', example=IMAGES)


def test_refused_in_inference_mode():
    with torch.inference_mode():
        made = handwritten()
        with pytest.raises(ValueError, match='inference_mode.*outside'):
            add_cbam(made, example=IMAGES[:1])
        with pytest.raises(ValueError, match='inference_mode.*outside'):
            add_cbam(handwritten(), example=IMAGES[:1])
    with pytest.raises(ValueError, match='inference_mode.*outside'):
        add_cbam(made, example=IMAGES[:1])
