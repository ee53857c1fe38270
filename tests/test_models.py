import copy

import pytest
import timm
import torch
import torchinfo
from helpers import golden_cases, golden_input, golden_state_dict, liven, relative_error
from torch import nn

from timm_cbam import Cbam, CbamResNet

# Parameters of the networks as published: the paper's, the authors' released code's, the reproduction article's.
PARAMETERS = {
    'cbam_resnet18': 11_777_336, 'cbam_resnet34': 21_956_424, 'cbam_resnet50': 28_073_544,
    'cbam_resnet101': 49_295_562, 'cbam_resnet152': 66_775_884,
    'cbam_resnet18_eccv18': 11_779_392, 'cbam_resnet34_eccv18': 21_960_468, 'cbam_resnet50_eccv18': 28_089_624,
    'cbam_resnet101_eccv18': 49_330_172, 'cbam_resnet152_eccv18': 66_826_848,
    'cbam_resnet18_s1': 11_769_656, 'cbam_resnet34_s1': 21_948_744, 'cbam_resnet50_s1': 28_065_864,
    'cbam_resnet101_s1': 49_287_882, 'cbam_resnet152_s1': 66_768_204,
    # the paper's table 4 has 27.56 and 48.96 million for the ResNeXts, with biases in the MLP and batch-norms
    'cbam_resnext50_32x4d': 27_545_416, 'cbam_resnext101_32x4d': 48_924_106, 'cbam_resnext101_32x8d': 93_537_738,
    'cbam_wide_resnet50_2': 71_399_752, 'cbam_resnet50d': 28_092_776,
}
KINDS = ['cbam_resnet18', 'cbam_resnet50', 'cbam_resnet18_s1', 'cbam_resnet18_eccv18', 'cbam_resnext50_32x4d']


def test_registered():
    assert set(timm.list_models('cbam*')) == set(PARAMETERS)
    assert timm.list_models(module='cbam_resnet') == timm.list_models('cbam*')


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameters(name):
    model = timm.create_model(name, device='meta')
    assert isinstance(model, CbamResNet)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    cfg = model.pretrained_cfg
    assert cfg['architecture'] == name
    if cfg['tag'].startswith('warm_'):  # the paper and license of timm's weights
        theirs = timm.get_pretrained_cfg(name.replace('cbam_', ''))
        assert (cfg.get('paper_ids'), cfg['license']) == (theirs.paper_ids, theirs.license)
    else:
        assert cfg['paper_ids'] == 'arXiv:1807.06521'
        assert cfg['license'] == ('mit' if cfg.get('url') else 'apache-2.0')


@pytest.mark.parametrize('source,name,case', [pytest.param(*c, id=f'{c[0]}-{c[1]}') for c in golden_cases()])
def test_computes_what_was_published(source, name, case):
    model = timm.create_model(name, device='meta').eval()  # no initialization, which would take most of the time
    model.load_state_dict(golden_state_dict(case), assign=True)
    with torch.inference_mode():
        logits = model.double()(golden_input(case))
    assert relative_error(logits, torch.tensor(case['logits'], dtype=torch.float64)) < 1e-9


def test_article_multiply_adds_and_feature_maps():
    model = timm.create_model('cbam_resnet50_s1', device='meta')
    info = torchinfo.summary(model, (1, 3, 224, 224), device='meta', verbose=0)
    assert info.total_params == 28_065_864
    assert abs(info.total_mult_adds - 63.60e9) < 0.05e9
    features = timm.create_model('cbam_resnet50_s1', features_only=True, device='meta')
    shapes = [tuple(f.shape[1:]) for f in features(torch.empty(1, 3, 224, 224, device='meta'))]
    assert shapes == [(64, 224, 224), (256, 224, 224), (512, 112, 112), (1024, 56, 56), (2048, 28, 28)]


@pytest.mark.parametrize('base,layers', [
    ('resnet50', (3, 4, 6, 3)), ('resnet50d', (3, 4, 6, 3)), ('wide_resnet50_2', (3, 4, 6, 3)),
    ('resnext50_32x4d', (3, 4, 6, 3)), ('resnext101_32x4d', (3, 4, 23, 3)), ('resnext101_32x8d', (3, 4, 23, 3)),
])
def test_cost_beside_the_plain_resnet(base, layers):
    """Attention that is left out, or applied to fewer blocks, would show here."""
    plain, cbam = (
        torchinfo.summary(timm.create_model(name, device='meta'), (1, 3, 224, 224), device='meta', verbose=0)
        for name in (base, f'cbam_{base}'))
    # per block two matrices of C x C/16 and a 7x7 kernel of two channels, which runs over the map
    stages = list(zip(layers, (256, 512, 1024, 2048), (56, 28, 14, 7), strict=True))
    assert cbam.total_params - plain.total_params == sum(n * (c * c // 8 + 98) for n, c, _ in stages)
    multiply_adds = sum(n * (2 * c * c // 8 + 98 * size ** 2) for n, c, size in stages)
    assert cbam.total_mult_adds - plain.total_mult_adds == multiply_adds


@pytest.mark.parametrize('name', KINDS)
@torch.no_grad()
def test_attention_in_every_block(name):
    model = liven(timm.create_model(name, num_classes=7, channels=(16, 16, 32, 32), cbam_args=dict(rd_ratio=1 / 4)))
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    assert len(blocks) == (8 if '18' in name else 16) and all(isinstance(block.se, Cbam) for block in blocks)
    x = torch.randn(1, 3, 64, 64)
    logits = model(x)
    for i, block in enumerate(blocks):
        before = copy.deepcopy(block.se.state_dict())
        for p in block.se.parameters():
            nn.init.normal_(p)
        assert relative_error(model(x), logits) > 1e-6, f'logits do not depend on the attention of block {i}'
        block.se.load_state_dict(before)


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('kwargs,shape', [
    (dict(num_classes=5), (2, 5)),
    (dict(num_classes=0), None),
    (dict(in_chans=1), (2, 1000)),
    (dict(in_chans=4, num_classes=3), (2, 3)),
    (dict(global_pool='max', num_classes=3), (2, 3)),
    (dict(global_pool='catavgmax', num_classes=3), (2, 3)),
    (dict(drop_rate=0.5, drop_path_rate=0.5, drop_block_rate=0.5, num_classes=3), (2, 3)),
    (dict(zero_init_last=False, act_layer='silu', norm_layer='groupnorm', num_classes=3), (2, 3)),
    (dict(block_args={}, num_classes=3), (2, 3)),
    (dict(stem_type='deep', stem_width=32, avg_down=True, num_classes=3), (2, 3)),
])
def test_resnet_arguments(name, kwargs, shape):
    model = timm.create_model(
        name, layers=(2, 1, 1, 1), channels=(32, 32, 64, 64), cbam_args=dict(rd_ratio=1 / 4), **kwargs)
    x = torch.randn(2, kwargs.get('in_chans', 3), 64, 64)
    out = model(x)
    assert out.shape == (shape or (2, model.num_features))
    out.square().sum().backward()
    assert any(isinstance(m, Cbam) for m in model.modules())


def test_arguments_reach_the_modules():
    model = timm.create_model(
        'cbam_resnet18', act_layer='silu', norm_layer='groupnorm',
        drop_rate=0.3, drop_path_rate=0.2, drop_block_rate=0.1)
    assert isinstance(model.act1, nn.SiLU) and isinstance(model.bn1, nn.GroupNorm) and model.drop_rate == 0.3
    assert model.layer4[1].drop_path.drop_prob == pytest.approx(0.2)
    assert model.layer4[1].drop_block.drop_prob == 0.1
    zero = {name: timm.create_model(name, device='cpu').layer1[0].bn2.weight.abs().max().item() for name in KINDS}
    assert zero == {
        'cbam_resnet18': 0, 'cbam_resnet50': 1, 'cbam_resnet18_s1': 0, 'cbam_resnet18_eccv18': 1,
        'cbam_resnext50_32x4d': 1}
    assert timm.create_model('cbam_resnet50').layer1[0].bn3.weight.abs().max() == 0
    assert timm.create_model('cbam_resnet18', zero_init_last=False).layer1[0].bn2.weight.min() == 1


@pytest.mark.parametrize('name,strides', [
    ('cbam_resnet18', {32: [2, 4, 8, 16, 32], 16: [2, 4, 8, 16, 16], 8: [2, 4, 8, 8, 8]}),
    ('cbam_resnet50', {32: [2, 4, 8, 16, 32], 16: [2, 4, 8, 16, 16], 8: [2, 4, 8, 8, 8]}),
    ('cbam_resnet50d', {32: [2, 4, 8, 16, 32], 16: [2, 4, 8, 16, 16], 8: [2, 4, 8, 8, 8]}),
    ('cbam_resnext50_32x4d', {32: [2, 4, 8, 16, 32], 16: [2, 4, 8, 16, 16], 8: [2, 4, 8, 8, 8]}),
    ('cbam_resnet50_s1', {
        32: [1, 1, 2, 4, 8], 16: [1, 1, 2, 4, 8], 8: [1, 1, 2, 4, 8], 4: [1, 1, 2, 4, 4], 2: [1, 1, 2, 2, 2]}),
])
def test_reductions_are_true(name, strides):
    for output_stride, reductions in strides.items():
        model = timm.create_model(name, features_only=True, output_stride=output_stride, device='meta')
        assert model.feature_info.reduction() == reductions
        features = model(torch.empty(1, 3, 64, 64, device='meta'))
        assert [64 // f.shape[-1] for f in features] == reductions
        assert [f.shape[1] for f in features] == model.feature_info.channels()


@pytest.mark.parametrize('out_indices', [(0,), (1, 3), (2, 3, 4), (-2, -1)])
@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'fx', 'getter', 'hook'])
def test_features_only(out_indices, feature_cls):
    model = timm.create_model('cbam_resnet18', features_only=True, out_indices=out_indices, feature_cls=feature_cls)
    features = model(torch.randn(1, 3, 64, 64))
    features = list(features.values()) if isinstance(features, dict) else features
    assert [64 // f.shape[-1] for f in features] == [(2, 4, 8, 16, 32)[i] for i in out_indices]


@pytest.mark.parametrize('name', KINDS)
def test_intermediates_and_head(name):
    model = liven(timm.create_model(name, num_classes=10, channels=(16, 16, 32, 32), cbam_args=dict(rd_ratio=1 / 4)))
    x = torch.randn(2, 3, 64, 64)
    final, intermediates = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x)) and torch.equal(final, intermediates[-1])
    assert torch.equal(model.forward_head(final), model(x))
    assert model.get_classifier() is model.fc and model.get_classifier(name_only=True) == 'fc'
    model.reset_classifier(4, 'max')
    assert model(x).shape == (2, 4)
    pruned = copy.deepcopy(model)
    pruned.prune_intermediate_layers(2, prune_head=True)
    assert torch.equal(pruned.forward_intermediates(x, intermediates_only=True)[-1], intermediates[-1])


def test_grad_checkpointing_and_groups():
    torch.manual_seed(0)
    model = liven(timm.create_model('cbam_resnet18', num_classes=10))
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*gradients, strict=True))
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=False))
    assert sum(len(names) for names in groups.values()) == len(list(model.named_parameters()))
    assert any('layer1.0.se.channel.fc1.weight' in names for names in groups.values())


def test_gate_parameters_get_gradients():
    model = liven(timm.create_model('cbam_resnet50', num_classes=10))
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    gates = {name: p.grad for name, p in model.named_parameters() if '.se.' in name}
    assert len(gates) == 3 * 16
    assert all(grad.abs().max() > 0 for grad in gates.values())


def test_cbam_args():
    model = timm.create_model('cbam_resnet18', cbam_args=dict(arrangement='parallel', rd_ratio=1 / 8, kernel_size=3))
    block = model.layer1[0].se
    assert block.parallel and block.channel.fc1.out_channels == 8 and block.spatial.conv.kernel_size == (3, 3)
    assert not any('spatial' in k for k in timm.create_model(
        'cbam_resnet18', cbam_args=dict(arrangement='channel'), device='meta').state_dict())
    # the authors' settings stay where the caller says nothing
    block = timm.create_model('cbam_resnet18_eccv18', cbam_args=dict(kernel_size=3)).layer1[0].se
    assert block.channel.fc1.bias is not None and isinstance(block.spatial.bn, nn.BatchNorm2d)
    assert block.spatial.conv.kernel_size == (3, 3)


def test_training_of_s1_starts_from_the_usual_init():
    torch.manual_seed(0)
    stem = timm.create_model('cbam_resnet18_s1').conv1
    assert stem.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)  # Kaiming normal, fan out


def test_empty_batch():
    for name in ('resnet18', 'cbam_resnet18', 'cbam_resnet18_s1'):
        assert timm.create_model(name, num_classes=10).eval()(torch.empty(0, 3, 64, 64)).shape == (0, 10)


@pytest.mark.parametrize('kwargs,error,message', [
    (dict(block_args=dict(attn_layer='se')), ValueError, "attn_layer='se', which would replace CBAM.*cbam_args"),
    (dict(output_stride=4), ValueError, r'output_stride=4 must be one of \(8, 16, 32\)'),
    (dict(cbam_args=dict(arrangement='serial')), ValueError, "Unknown arrangement 'serial'"),
    (dict(cbam_args=dict(reduction=8)), TypeError, "unexpected keyword argument 'reduction'"),
    (dict(reduction=8), TypeError, "unexpected keyword argument 'reduction'"),
])
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model('cbam_resnet18', **kwargs)


def test_bad_input():
    with pytest.raises(ValueError, match='expected 4D input'):
        timm.create_model('cbam_resnet18').eval()(torch.randn(3, 64, 64))
