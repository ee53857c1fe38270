import re

import pytest
import timm
import torch
from helpers import golden_case, golden_input, golden_state_dict, liven, relative_error

from timm_cbam import convert_state_dict

# a case of each layout, by the model of ours that it fits
CASES = [
    ('seed', 'cbam_resnet18_s1'),
    ('seed', 'cbam_resnet50_s1'),
    ('community', 'cbam_resnet50'),
    ('official', 'cbam_resnet50_eccv18'),
    ('pytorchcv', 'cbam_resnet50_eccv18'),
]


def expected_logits(case):
    return torch.tensor(case['logits'], dtype=torch.float64)


@pytest.fixture(scope='module', params=CASES, ids=lambda c: '-'.join(c))
def published(request, tmp_path_factory):
    """Model name, case, and a checkpoint file as the published implementations write it."""
    source, name = request.param
    case = golden_case(source, name)
    state_dict = golden_state_dict(case)
    file = tmp_path_factory.mktemp('published') / 'checkpoint.pth'
    if source == 'official':
        state_dict = {'epoch': 90, 'arch': 'resnet50', 'state_dict': {f'module.{k}': v for k, v in state_dict.items()}}
    torch.save(state_dict, file)
    return name, case, file


def test_load_as_function(published):
    name, case, file = published
    model = timm.create_model(name, dtype=torch.float64).eval()
    state_dict = convert_state_dict(torch.load(file, weights_only=True), model)
    assert set(state_dict) == set(model.state_dict())
    model.load_state_dict(state_dict)
    assert relative_error(model(golden_input(case)), expected_logits(case)) < 1e-9


def test_load_as_pretrained_file(published):
    name, case, file = published
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), dtype=torch.float64).eval()
    assert relative_error(model(golden_input(case)), expected_logits(case)) < 1e-9


def test_load_as_checkpoint_path(published):
    name, case, file = published
    model = timm.create_model(name, checkpoint_path=str(file), dtype=torch.float64).eval()
    assert relative_error(model(golden_input(case)), expected_logits(case)) < 1e-9


def test_other_head_and_input(published):
    """What has to be new is new, everything else is loaded: timm loads non-strictly here and would not say."""
    name, case, file = published
    overlay = dict(file=str(file))
    whole = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    part = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=1)
    for key, value in part.state_dict().items():
        if key == 'conv1.weight':
            torch.testing.assert_close(value, whole[key].sum(1, keepdim=True))
        elif not key.startswith('fc.'):
            assert torch.equal(value, whole[key]), key
    features = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    for key, value in features.state_dict().items():
        assert torch.equal(value, whole[key.replace('layer1_', 'layer1.')]), key


def test_timm_attn_layer_cbam():
    theirs = liven(timm.create_model('resnet18', block_args=dict(attn_layer='cbam'), num_classes=10))
    ours = timm.create_model('cbam_resnet18', cbam_args=dict(spatial_norm=True), num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert relative_error(ours(x), theirs(x)) < 1e-5


def test_own_layout_round_trip():
    torch.manual_seed(0)
    a, b = (timm.create_model('cbam_resnet18', num_classes=3) for _ in range(2))
    b.load_state_dict({f'module.{k}': v for k, v in a.state_dict().items()})  # as DistributedDataParallel saves it
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert b.load_state_dict({}, strict=False).missing_keys == [k for k in b.state_dict() if 'num_batches' not in k]


def test_checkpoint_without_batch_counters():
    """PyTorch before 0.4.1, with which the authors' files were made, did not save them."""
    case = golden_case('official', 'cbam_resnet18_eccv18')
    state_dict = {k: v for k, v in golden_state_dict(case).items() if not k.endswith('num_batches_tracked')}
    model = timm.create_model('cbam_resnet18_eccv18', dtype=torch.float64).eval()
    model.load_state_dict(convert_state_dict(state_dict, model))
    assert relative_error(model(golden_input(case)), expected_logits(case)) < 1e-9


@pytest.mark.parametrize('load', [
    lambda model, state_dict: model.load_state_dict(state_dict),
    lambda model, state_dict: convert_state_dict(state_dict, model),
    lambda model, state_dict: timm.create_model(
        'cbam_resnet18', pretrained=True, pretrained_cfg_overlay=dict(state_dict=dict(state_dict)), num_classes=3),
], ids=['load_state_dict', 'convert_state_dict', 'pretrained'])
@pytest.mark.parametrize('other,message', [
    (lambda: timm.create_model('resnet34').state_dict(), 'looks like a plain ResNet, of another depth'),
    (lambda: timm.create_model('cbam_resnet34').state_dict(), "this package's layout, of another depth"),
    (lambda: timm.create_model('cbam_resnet18_eccv18').state_dict(), "this package's layout.*cbam_args"),
    (lambda: timm.create_model('mobilenetv3_small_050').state_dict(), 'no layout of a CBAM-ResNet.*conv_stem'),
    (lambda: golden_state_dict(golden_case('pytorchcv', 'cbam_resnet18_eccv18')), 'layout of pytorchcv.*_eccv18'),
    (lambda: golden_state_dict(golden_case('official', 'cbam_resnet18_eccv18')), 'layout of Jongchan.*_eccv18'),
    (lambda: {k: v for k, v in timm.create_model('cbam_resnet18').state_dict().items() if 'se.spatial' not in k},
     'layer1.0.se.spatial.conv.weight'),
], ids=['plain', 'depth', 'variant', 'foreign', 'pytorchcv', 'official', 'damaged'])
def test_wrong_state_dict(load, other, message):
    with pytest.raises(RuntimeError, match=f'(?is){message}') as e:
        load(timm.create_model('cbam_resnet18'), other())
    assert re.search('(?i)(missing|left over|unexpected).*(layer|stage)', str(e.value))
