"""What stands around the weights: containers, prefixes, strays, reparametrisations"""
import argparse
import copy
import re

import numpy as np
import pytest
import timm
import torch
from reference import Network
from torch import nn
from torch.nn.utils import parametrizations, prune

from timm_cbam import convert_state_dict
from timm_cbam.files import read_checkpoint
from timm_cbam.weights import find_weights

EPOCH = dict(epoch=3, best_acc=np.float64(0.9), args=argparse.Namespace(lr=0.1), optimizer=dict(
    state={0: dict(momentum_buffer=torch.zeros(3))}, param_groups=[dict(lr=0.1, params=[0])]))
CONTAINERS = {
    'bare': lambda sd: sd,
    **{name: lambda sd, name=name: {**EPOCH, name: sd} for name in (
        'state_dict', 'model', 'net', 'network', 'model_state_dict', 'model_state', 'weights', 'params', 'module',
        'state_dict_ema', 'ema_state_dict', 'model_ema')},
    'kuangliu': lambda sd: dict(net=sd, acc=95.1, epoch=200),
    'nested': lambda sd: dict(checkpoint=dict(model=dict(state_dict=sd), epoch=3)),
    'fastai': lambda sd: dict(model=sd, opt=dict(state=[{}], hypers=[dict(lr=0.1)])),
    'lightning': lambda sd: {
        'epoch': 3, 'global_step': 99, 'pytorch-lightning_version': '2.5.0', 'state_dict': sd, 'loops': {},
        'callbacks': {'ModelCheckpoint': dict(best_model_score=torch.tensor(0.9), kth_value=torch.tensor(1.))},
        'optimizer_states': [EPOCH['optimizer']], 'lr_schedulers': [], 'hyper_parameters': dict(lr=0.1)},
}
PREFIXES = [
    '', 'module.', 'model.', 'net.', 'network.', 'backbone.', 'encoder.', 'base_encoder.', 'student.', 'timm_model.',
    '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.', 'model.module.', 'model._orig_mod.backbone.', '0.',
    'encoder_q.module.model.', '_fsdp_wrapped_module.']


@pytest.fixture(scope='module', params=['official in cbam', 'none'])
def theirs(request):
    torch.manual_seed(0)
    kwargs = dict(cbam_args=dict(mlp_bias=True, spatial_norm=True)) if 'official' in request.param else {}
    net = Network(request.param)
    ours = timm.create_model('cbam_resnet18', layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), num_classes=10, **kwargs)
    return net, ours


def expected(net, ours):
    ours.load_state_dict(net.state_dict())
    return copy.deepcopy(ours.state_dict())


def assert_loads(checkpoint, ours, state, **kwargs):
    for p in ours.parameters():
        p.data.fill_(7)
    ours.load_state_dict(convert_state_dict(checkpoint, ours, **kwargs))
    # what a plain ResNet's gates are drawn as stays as it is in the model
    assert all(torch.equal(v, state[k]) or v.unique().tolist() == [7] and '.fc1.' in k
               for k, v in ours.state_dict().items())
    if not kwargs:
        for p in ours.parameters():
            p.data.fill_(7)
        ours.load_state_dict(checkpoint)
        assert all(torch.equal(v, state[k]) or '.fc1.' in k for k, v in ours.state_dict().items())


@pytest.mark.parametrize('container', CONTAINERS)
def test_containers(container, theirs):
    state = expected(*theirs)
    for prefix in ('', 'model.backbone.'):
        state_dict = {prefix + k: v for k, v in theirs[0].state_dict().items()}
        assert_loads(CONTAINERS[container](state_dict), theirs[1], state)


@pytest.mark.parametrize('prefix', PREFIXES)
def test_prefixes(prefix, theirs):
    state = expected(*theirs)
    for container in ('bare', 'net'):
        state_dict = {prefix + k: v for k, v in theirs[0].state_dict().items()}
        assert_loads(CONTAINERS[container](state_dict), theirs[1], state)


@pytest.mark.parametrize('head', ['head.fc.', 'classifier.', 'fc.1.', 'last_linear.', 'head.'])
def test_backbone_and_head(head, theirs, caplog):
    """MMPretrain, Lightning modules, dropout before the classifier."""
    state = expected(*theirs)
    for prefix in ('backbone.', 'model.', ''):
        renamed = {k.replace('fc.', head) if k.startswith('fc.') else prefix + k: v
                   for k, v in theirs[0].state_dict().items()}
        assert_loads(renamed, theirs[1], state)
        assert f'{head}weight is taken for the weight of the classifier, fc' in caplog.text


@pytest.mark.parametrize('strays', [
    {'n_averaged': torch.tensor(5)}, {'total_ops': torch.zeros(1), 'layer1.0.conv1.total_params': torch.zeros(1)},
    {'layer1._extra_state': torch.zeros(1)}, {'criterion.weight': torch.ones(10)}, {'epoch': 3, 'name': 'resnet'},
    {'loss_fn.pos_weight': torch.ones(1)},
], ids=lambda s: next(iter(s)))
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_strays_are_dropped_and_said(prefix, strays, theirs, caplog):
    state = expected(*theirs)
    state_dict = {**strays, **{prefix + k: v for k, v in theirs[0].state_dict().items()}}
    assert_loads(state_dict, theirs[1], state)
    assert all(key in caplog.text for key in strays) and 'dropped' in caplog.text


def test_what_is_no_stray_is_named(theirs):
    net, ours = theirs
    state_dict = {f'backbone.{k}': v for k, v in net.state_dict().items()}
    for key in ('decoder.conv.weight', 'normalize.mean', 'backbone.aux.weight'):
        for load in (ours.load_state_dict, lambda state_dict: convert_state_dict(state_dict, ours)):
            with pytest.raises(RuntimeError, match=key.removeprefix('backbone.')):
                load({**state_dict, key: torch.zeros(3)})


def test_averaged_model(theirs):
    state = expected(*theirs)
    averaged = torch.optim.swa_utils.AveragedModel(theirs[0])
    assert_loads(averaged.state_dict(), theirs[1], state)


@pytest.mark.parametrize('names', [('student.', 'teacher.'), ('encoder_q.', 'encoder_k.'), ('net.', 'ema_net.module.')])
@pytest.mark.parametrize('nested', [False, True], ids=['names', 'containers'])
def test_two_networks_are_listed(names, nested, theirs):
    net, ours = theirs
    state = expected(net, ours)
    other = {k: v + 1 for k, v in net.state_dict().items()}
    parts = [{f'{name}{k}': v for k, v in values.items()} for name, values in zip(
        names, (net.state_dict(), other), strict=True)]
    checkpoint = dict(one=parts[0], two=parts[1]) if nested else {**parts[0], **parts[1]}
    full = [f'one.{names[0]}', f'two.{names[1]}'] if nested else names
    for load in (ours.load_state_dict, lambda state_dict: convert_state_dict(state_dict, ours)):
        with pytest.raises(RuntimeError, match=f'(?s)2 networks: {full[0]!r}, {full[1]!r}.*--prefix {full[0]}'):
            load(checkpoint)
    for prefix in {full[0], full[0].rstrip('.'), names[0]}:
        assert_loads(checkpoint, ours, state, prefix=prefix)
    with pytest.raises(RuntimeError, match=f"no blocks under the prefix 'nowhere.'.*{re.escape(full[0])}"):
        convert_state_dict(checkpoint, ours, prefix='nowhere.')


def test_the_one_that_fits_is_taken(theirs):
    net, ours = theirs
    state = expected(net, ours)
    other = timm.create_model('resnet18').state_dict()
    assert_loads({
        **{f'student.{k}': v for k, v in net.state_dict().items()},
        **{f'teacher.{k}': v for k, v in other.items()}}, ours, state, prefix='student')
    fitting = find_weights(dict(a=net.state_dict(), b=other), ours)
    assert torch.equal(fitting.values['conv1.weight'], net.conv1.weight)


def test_averages_are_taken_as_by_timm(theirs, tmp_path, caplog):
    """And other containers are mentioned."""
    net, ours = theirs
    state = expected(net, ours)
    noise = {k: torch.zeros_like(v) for k, v in net.state_dict().items()}
    for names in (
            ('state_dict_ema', 'state_dict'), ('model_ema', 'model'), ('state_dict', 'model'), ('model', 'other')):
        checkpoint = {names[1]: noise, names[0]: net.state_dict()}
        assert_loads(checkpoint, ours, state)
        assert f"'{names[1]}.' has weights, too" in caplog.text
        torch.save(checkpoint, tmp_path / 'a.pth')
        for p in ours.parameters():
            p.data.fill_(7)
        timm.models.load_checkpoint(ours, str(tmp_path / 'a.pth'))
        assert all(torch.equal(v, state[k]) or '.fc1.' in k for k, v in ours.state_dict().items())


REPARAMETRISED = {
    'pruned': lambda m: prune.l1_unstructured(m, 'weight', 0.5),
    'pruned channels': lambda m: prune.ln_structured(m, 'weight', 0.5, n=2, dim=0),
    'weight_norm': lambda m: nn.utils.weight_norm(m),
    'weight_norm of all': lambda m: nn.utils.weight_norm(m, dim=None),
    'weight_norm parametrization': parametrizations.weight_norm,
    'weight_norm of another dimension': lambda m: parametrizations.weight_norm(m, dim=1),
    'spectral_norm': nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings('ignore:.*weight_norm.*')
@pytest.mark.parametrize('what', REPARAMETRISED)
def test_reparametrised(what, theirs, caplog):
    net, ours = copy.deepcopy(theirs[0]).train(), theirs[1]
    for m in list(net.modules()):
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            REPARAMETRISED[what](m)
    net.eval()(torch.randn(1, 3, 32, 32))
    plain = {k: v for k, v in Network.state_dict(theirs[0]).items()}
    folded = {k: dict(net.named_modules())[k[:-7]].weight.detach() if k.endswith('.weight') else v
              for k, v in plain.items()}
    ours.load_state_dict(folded)
    assert_loads(net.state_dict(), ours, copy.deepcopy(ours.state_dict()))
    assert 'computed as there' in caplog.text
    if 'pruned' in what:
        assert (ours.conv1.weight == 0).float().mean() == 0.5


def test_other_reparametrisations_are_named(theirs):
    net, ours = copy.deepcopy(theirs[0]), theirs[1]
    parametrizations.orthogonal(net.conv1, orthogonal_map='cayley')
    with pytest.raises(RuntimeError, match='conv1.parametrizations.weight.original'):
        convert_state_dict(net.state_dict(), ours)


def test_numpy_values(theirs, tmp_path):
    state = expected(*theirs)
    arrays = {k: v.numpy() for k, v in theirs[0].state_dict().items()}
    counters = {k: int(v) if 'num_batches' in k else v for k, v in arrays.items()}
    for checkpoint in (arrays, dict(net=arrays, acc=np.float32(0.5), when=np.array(['now'])), counters):
        assert_loads(checkpoint, theirs[1], state)
        torch.save(checkpoint, tmp_path / 'a.pth')
        assert_loads(read_checkpoint(tmp_path / 'a.pth'), theirs[1], state)


def test_own_model_with_more_in_it(theirs):
    """What was attached to our own model is its own: nothing is dropped, renamed or computed."""
    ours, fresh = copy.deepcopy(theirs[1]), copy.deepcopy(theirs[1])
    for model in (ours, fresh):
        model.aux = Network('none')
        model.criterion = nn.Linear(2, 2)
        model.register_buffer('total_ops', torch.zeros(1))
        prune.l1_unstructured(model.layer1[0].conv1, 'weight', 0.5)
    for p in fresh.parameters():
        p.data.fill_(7)
    result = fresh.load_state_dict(ours.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize('head', [False, True], ids=['body', 'with classifier'])
def test_children_in_a_sequence(head, theirs, caplog):
    """As fastai cuts a network, and feature extractors do."""
    net, ours = theirs
    state = expected(net, ours)
    children = [net.conv1, net.bn1, nn.ReLU(), nn.MaxPool2d(3), net.layer1, net.layer2, net.layer3, net.layer4]
    body = nn.Sequential(nn.Sequential(*children), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.fc))
    if head:
        assert_loads(dict(model=body.state_dict(), opt=dict(hypers=[{}])), ours, state)
        assert '1.2.weight is taken for the weight of the classifier' in caplog.text
    for prefix in ('', 'backbone.'):
        found = find_weights({f'{prefix}{k}': v for k, v in body[0].state_dict().items()}, ours).values
        assert set(found) == {k for k in net.state_dict() if k[:3] != 'fc.'} or '.se.' in ''.join(found)
        assert all(torch.equal(v, state[k]) for k, v in found.items() if '.se.' not in k and '.bn2.' not in k)


def test_two_names_of_one_weight(theirs):
    net, ours = theirs
    state_dict = net.state_dict()
    state_dict['_orig_mod.bn1.weight'] = torch.zeros(64)
    with pytest.raises(RuntimeError, match='bn1.weight and _orig_mod.bn1.weight are names of one weight, bn1.weight'):
        convert_state_dict(state_dict, ours)


def test_lengths_that_do_not_go_with_directions(theirs):
    """PyTorch's own operation writes where it must not."""
    net, ours = theirs
    state_dict = dict(net.state_dict(), **{'conv1.weight_g': torch.zeros(3, 1, 1, 1)})
    state_dict['conv1.weight_v'] = state_dict.pop('conv1.weight')
    with pytest.raises(RuntimeError, match='conv1.weight_g, conv1.weight_v do not go together as weight_norm'):
        convert_state_dict(state_dict, ours)
