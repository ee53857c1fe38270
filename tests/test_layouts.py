"""Weights of other code, by reference networks with its names: equal logits, or a refusal that says why"""
import copy
import logging
import re

import pytest
import timm
import torch
from helpers import relative_error
from reference import ATTENTION, Network

from timm_cbam import convert_state_dict
from timm_cbam.cli import main
from timm_cbam.weights import LAYOUTS, find_weights, from_native_layout

CHANNELS = (16, 32, 64, 128)
# Arguments of our model for each kind of attention; channels are few, so that ratios are those of the reference
CBAM_ARGS = {
    'community_fc1 in attention, biases': dict(rd_ratio=1 / 8, mlp_bias=True, kernel_size=3),
    'channelattention': dict(rd_ratio=1 / 8),
    **dict.fromkeys(
        [f'official in {at}' for at in ('cbam', 'cbam_module', 'attention', 'att')],
        dict(mlp_bias=True, spatial_norm=True)),
    'elbuco1': dict(rd_ratio=1 / 2, mlp_bias=True, spatial_norm=True, kernel_size=3),
}
IMAGES = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1)).double()


def create(attention, small=False, bottleneck=False, **kwargs):
    name = f'cbam_resnet{50 if bottleneck else 18}{"_s1" if small else ""}'
    kwargs = {'num_classes': 10, **kwargs}
    return timm.create_model(
        name, layers=(1, 1, 1, 1), channels=CHANNELS, cbam_args=CBAM_ARGS.get(attention, {}), **kwargs).eval()


def assert_same(ours, theirs):
    expected = copy.deepcopy(theirs).double()(IMAGES)
    assert expected.std() > 1e-3
    assert relative_error(copy.deepcopy(ours).double()(IMAGES), expected) < 1e-9


TRUNKS = [
    {}, dict(bottleneck=True), dict(small=True, shortcut='shortcut', head='linear'),
    dict(small=True, bottleneck=True, head='classifier')]


# test_wild.py has more of their products
@pytest.mark.parametrize('attention,trunk', [
    *((attention, {}) for attention in ATTENTION),
    *((attention, trunk) for attention in ('none', 'elbuco1', 'community_fc1') for trunk in TRUNKS[1:])], ids=str)
def test_equal_logits(attention, trunk, caplog):
    theirs = Network(attention, **trunk)
    small, bottleneck = trunk.get('small', False), trunk.get('bottleneck', False)
    ours = create(attention, small, bottleneck)
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs)
    assert ('is taken for the weight of the classifier' in caplog.text) == (
        theirs.head == 'classifier' or (theirs.head == 'linear' and attention != 'elbuco1'))
    fresh = create(attention, small, bottleneck)
    fresh.load_state_dict(convert_state_dict(theirs.state_dict(), fresh))
    assert all(torch.equal(v, ours.state_dict()[k]) or '.fc1.' in k for k, v in fresh.state_dict().items())


def test_references_see_their_attention():
    """Else equal logits would say nothing about it."""
    for attention in ATTENTION:
        theirs = Network(attention)
        gates = [m for m in theirs.modules() if type(m).__name__ in ('Gate', 'SpatialGate')]
        assert len(gates) == (0 if attention == 'none' else 8)
        expected = theirs(IMAGES[:1].float())
        for gate in gates[:2]:
            changed = copy.deepcopy(theirs)
            same = dict(changed.named_modules())[next(n for n, m in theirs.named_modules() if m is gate)]
            for p in same.parameters():
                p.data.zero_()
            assert relative_error(changed(IMAGES[:1].float()), expected) > 1e-5, attention


@pytest.mark.parametrize('key,attention', [
    ('community', 'community'), ('community_fc1', 'community_fc1'), ('channelattention', 'channelattention'),
    ('official', 'official in cbam')])
def test_and_back(key, attention):
    theirs = Network(attention).state_dict()
    ours = create(attention)
    ours.load_state_dict(theirs)
    back = from_native_layout(ours.state_dict(), LAYOUTS[key])
    assert set(back) == set(theirs) and all(torch.equal(v, theirs[k]) for k, v in back.items())


# Keys as the code has them that no model here computes, and what the refusal says
REFUSED = {
    'peachypie98': (
        ['layer1.0.cbam.cam.linear_max.0.weight', 'layer1.0.cbam.cam.linear_avg.0.weight',
         'layer1.0.cbam.sam.conv.weight'], 'looks like Peachypie98/CBAM.*adds the input of the attention'),
    'ultralytics': (
        ['layer1.0.cbam.channel_attention.fc.weight', 'layer1.0.cbam.channel_attention.fc.bias',
         'layer1.0.cbam.spatial_attention.cv1.weight'], "looks like Ultralytics' CBAM.*one C x C convolution"),
    'ugenteraan': (
        ['layer1.0.cbam.channel_attention.shared_mlp.1.weight', 'layer1.0.identity_connection.0.weight',
         'layer1.0.cbam.spatial_attention.spatial_attention.0.weight'], 'stride in their first 1x1 convolution'),
    'network': (['ca.fc1.weight', 'ca.fc2.weight', 'sa.conv1.weight', 'ca1.fc1.weight', 'sa1.conv1.weight'],
                'attention between its stages.*here in every block'),
    'network, and in blocks': (
        ['ca.fc.0.weight', 'sa.conv1.weight', 'layer1.0.ca.fc.0.weight', 'layer1.0.sa.conv1.weight'],
        'attention between its stages'),
    'se': (['layer1.0.se.fc1.weight', 'layer1.0.se.fc2.weight'], 'looks like an SE-ResNet'),
    'unknown': (['layer1.0.gate.weight'], r'attention of a layout that is not known: \S*layer1.0.gate.weight'),
}


@pytest.mark.parametrize('prefix', ['', 'module.', 'backbone.'])
@pytest.mark.parametrize('name', REFUSED)
def test_refused_by_name_and_reason(name, prefix, caplog):
    keys, message = REFUSED[name]
    theirs = dict(Network('none').state_dict(), **{key: torch.zeros(1, 1, 1, 1) for key in keys})
    theirs = {prefix + k: v for k, v in theirs.items()}
    ours = create('none')
    for load in (ours.load_state_dict, lambda state_dict: convert_state_dict(state_dict, ours)):
        with pytest.raises(RuntimeError, match=f'(?s){message}'):
            load(theirs)
    with pytest.raises(RuntimeError, match=re.escape(prefix + keys[0])):  # as the file names it
        convert_state_dict(theirs, ours)
    caplog.clear()
    result = ours.load_state_dict(theirs, strict=False)
    assert result.missing_keys and re.search(message, caplog.text)


@pytest.mark.parametrize('order,flipped', [(None, True), ('max-avg', True), ('avg-max', False)])
def test_order_of_the_poolings(order, flipped, tmp_path, capsys):
    theirs = Network('official in cbam', layers=(2, 2, 2, 2), channels=(64, 128, 256, 512))
    torch.save(theirs.state_dict(), tmp_path / 'a.pth')
    options = ['--spatial-order', order] if order else []
    assert main(['convert', str(tmp_path / 'a.pth'), str(tmp_path / 'b'), '--verify', *options]) == 0
    ours = timm.create_model(f'local-dir:{tmp_path}/b', pretrained=True)
    expected = theirs.layer1[0].cbam.SpatialGate.spatial.conv.weight
    assert torch.equal(ours.layer1[0].se.spatial.conv.weight, expected.flip(1) if flipped else expected)
    out = capsys.readouterr().out
    assert ('the maximum before the average (--spatial-order says otherwise)' in out) == (order is None)


def test_convert_says_what_is_assumed(tmp_path, capsys):
    for attention, bottleneck, said in (
            ('community_fc1', False, ['the average before the maximum']),
            ('none', True, ['blocks stride in their 3x3 convolution'])):
        theirs = Network(
            attention, layers=(3, 4, 6, 3) if bottleneck else (2, 2, 2, 2), channels=(64, 128, 256, 512),
            bottleneck=bottleneck, head='classifier')
        torch.save(theirs.state_dict(), tmp_path / 'a.pth')
        assert main(['convert', str(tmp_path / 'a.pth'), str(tmp_path / 'b')]) == 0
        out = capsys.readouterr().out
        assert 'classifier.weight is taken for the weight of the classifier, fc' in out
        assert all(f'assumed, because names cannot show it: {part}' in out.replace('the spatial attention has ', '')
                   for part in said) and out.count('assumed, because') == len(said)


def test_nothing_is_said_of_what_is_ours(caplog):
    caplog.set_level(logging.WARNING)
    model = create('none')
    model.load_state_dict(model.state_dict())
    assert not caplog.records and find_weights(model.state_dict()).weights.notes == []


@pytest.mark.parametrize('attention,kwargs,name,to', [
    ('elbuco1', dict(small=True, shortcut='shortcut', head='linear'), 'cbam_resnet18_s1', None),
    ('community_fc1 in cbam', {}, 'cbam_resnet18', 'community_fc1'),
    ('official in att', dict(small=True), 'cbam_resnet18_s1', None),
], ids=lambda v: v if isinstance(v, str) else '')
def test_convert_and_verify(attention, kwargs, name, to, tmp_path, capsys):
    theirs = Network(attention, layers=(2, 2, 2, 2), channels=(64, 128, 256, 512), **kwargs)
    torch.save(dict(net=theirs.state_dict(), acc=95.1, epoch=200), tmp_path / 'ckpt.pth')
    assert main(['convert', str(tmp_path / 'ckpt.pth'), str(tmp_path / 'b'), '--verify']) == 0
    ours = timm.create_model(f'local-dir:{tmp_path}/b', pretrained=True, dtype=torch.float64).eval()
    assert ours.pretrained_cfg['architecture'] == name
    assert_same(ours, theirs)
    if to:
        back = tmp_path / 'back.pth'
        assert main(['convert', str(tmp_path / 'ckpt.pth'), str(back), '--verify', '--to', to]) == 0
        loaded = {k.replace('.ca.', '.cbam.ca.').replace('.sa.', '.cbam.sa.'): v for k, v in torch.load(back).items()}
        theirs.load_state_dict(loaded)
