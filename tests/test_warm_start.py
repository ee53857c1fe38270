"""The weights of a plain ResNet are not lost: the CBAM-ResNet computes the same, bit for bit, and then learns"""
import copy
import functools
import http.server
import threading
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from helpers import liven, run
from hub_server import HubServer
from safetensors.torch import save as save_safetensors
from safetensors.torch import save_file
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from torch.nn import functional as F

from timm_cbam import CbamResNet, convert_state_dict
from timm_cbam.ops import native


def images(size=64, chans=3, dtype=torch.float32):
    return torch.randn(2, chans, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def plain(name='resnet18', **kwargs):
    torch.manual_seed(0)
    return liven(timm.create_model(name, **kwargs))


def warm(state_dict, name='cbam_resnet18', **kwargs):
    overlay = dict(state_dict={k: v.clone() for k, v in state_dict.items()})
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@pytest.mark.parametrize('base', [
    'resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'resnet50d', 'resnext50_32x4d', 'resnext101_32x4d',
    'resnext101_32x8d', 'wide_resnet50_2',
])
def test_tags_are_those_of_timm(base):
    ours = get_arch_pretrained_cfgs(f'cbam_{base}')
    theirs = {name: cfg for name, cfg in get_arch_pretrained_cfgs(base).items() if cfg.tag != 'untrained'}
    assert set(ours) == {f'cbam_{base}.warm_{cfg.tag}' for cfg in theirs.values()} and len(ours) >= 3
    for cfg in theirs.values():
        expected = dict(cfg.to_dict(), architecture=f'cbam_{base}', tag=f'warm_{cfg.tag}')
        assert ours[f'cbam_{base}.warm_{cfg.tag}'].to_dict() == expected
    assert get_pretrained_cfg(f'cbam_{base}').tag == f'warm_{get_pretrained_cfg(base).tag}'


@pytest.mark.parametrize('name', ['cbam_resnet50', 'cbam_resnet50d', 'cbam_resnext50_32x4d', 'cbam_wide_resnet50_2'])
def test_cfg_names_the_first_convolution(name):
    """timm adapts the layer of that name to other in_chans."""
    conv = timm.create_model(name, device='meta').get_submodule(get_pretrained_cfg(name).first_conv)
    assert isinstance(conv, torch.nn.Conv2d) and conv.in_channels == 3


@pytest.mark.parametrize('channels_last', [False, True], ids=['nchw', 'channels_last'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize('base', ['resnet18', 'resnet50', 'resnet50d'] + [
    pytest.param(base, marks=pytest.mark.slow) for base in (
        'resnet34', 'resnet101', 'resnet152', 'resnext50_32x4d', 'resnext101_32x4d', 'resnext101_32x8d',
        'wide_resnet50_2')])
def test_bitwise_equal(base, dtype, channels_last):
    theirs = plain(base)
    ours = warm(theirs.state_dict(), f'cbam_{base}')
    assert_bitwise_equal(ours, theirs, images(), dtype, channels_last)


def assert_bitwise_equal(ours, theirs, x, dtype, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = x.to(dtype=dtype, memory_format=memory_format)
    for model in (theirs, ours):
        model.to(dtype=dtype, memory_format=memory_format)
    for training in (False, True):
        with torch.no_grad():
            assert torch.equal(ours.train(training)(x), theirs.train(training)(x))
        assert torch.equal(ours(x), theirs(x))
    assert theirs(x).std() > 0


# What a processor has to have for a SIMD level of PyTorch's.
LEVELS = {'default': (), 'avx2': ('avx2', 'fma'), 'avx512': ('avx512f', 'avx512bw', 'avx512dq', 'avx512vl', 'fma')}


@pytest.mark.parametrize('level', list(LEVELS))
def test_bitwise_equal_at_every_simd_level(level):
    """By native loops where they were built, and by PyTorch's operations."""
    cpu = Path('/proc/cpuinfo')
    missing = set(LEVELS[level]) - set(cpu.read_text().split() if cpu.exists() else ())
    if missing:
        pytest.skip(f'this processor has no {missing}')
    printed = run(f'''
        import copy, itertools, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch
        from test_warm_start import assert_bitwise_equal, images, plain, warm
        from timm_cbam.ops import tail_cpu
        print(torch.backends.cpu.get_cpu_capability().lower(), tail_cpu.LIBRARY is not None)
        library, dtypes = tail_cpu.LIBRARY, (torch.float32, torch.bfloat16, torch.float64)
        for base in ('resnet18', 'resnet50'):
            theirs = plain(base, layers=(2, 1, 1, 1))
            ours = warm(theirs.state_dict(), f'cbam_{{base}}', layers=(2, 1, 1, 1))
            for tail_cpu.LIBRARY in {{library, None}}:
                for dtype, channels_last in itertools.product(dtypes, (False, True)):
                    assert_bitwise_equal(copy.deepcopy(ours), copy.deepcopy(theirs), images(32), dtype, channels_last)
    ''', ATEN_CPU_CAPABILITY=level, TIMM_CBAM_NATIVE='1')
    found, by_library = printed.split()
    assert found == level or not LEVELS[level]
    file = Path(native.__file__).with_name(f'_tail_cpu_{level}.so')
    assert by_library == str(file.exists() and native.load()[0] is not None)


@pytest.mark.parametrize('kwargs', [
    dict(in_chans=1), dict(in_chans=4), dict(output_stride=8), dict(features_only=True), dict(num_classes=3),
    dict(num_classes=0), dict(features_only=True, in_chans=1, out_indices=(1, 4)),
], ids=str)
def test_bitwise_equal_adapted(kwargs):
    theirs = warm(plain().state_dict(), 'resnet18', **kwargs)
    ours = warm(plain().state_dict(), 'cbam_resnet18', **kwargs)
    x = images(chans=kwargs.get('in_chans', 3))
    if 'features_only' in kwargs:
        assert all(torch.equal(a, b) for a, b in zip(ours(x), theirs(x), strict=True))
    else:
        assert torch.equal(ours.forward_features(x), theirs.forward_features(x))
    gates = [v for k, v in ours.state_dict().items() if k.endswith(('se.channel.fc2.weight', 'se.spatial.conv.weight'))]
    assert len(gates) == 16 and not any(v.any() for v in gates)


@pytest.mark.parametrize('cbam_args', [
    dict(spatial_norm=True), dict(mlp_bias=True), dict(mlp_bias=True, spatial_norm=True), dict(kernel_size=3),
    dict(rd_ratio=0.125), dict(channel_pooling='max'), dict(spatial_pooling='avg'), dict(gate_layer='hard_sigmoid'),
    *(dict(arrangement=a, spatial_norm=n)
      for a in ('spatial_channel', 'parallel', 'channel', 'spatial') for n in (False, True)),
], ids=str)
def test_bitwise_equal_and_learns_for_every_variant(cbam_args):
    theirs = plain()
    ours = warm(theirs.state_dict(), cbam_args=cbam_args)
    x = images()
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.train()(x), theirs.train()(x))
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.01)
    gates = {k: v for k, v in ours.named_parameters() if '.se.' in k}
    before = {k: v.detach().clone() for k, v in gates.items()}
    F.cross_entropy(ours(x), torch.tensor([1, 2])).backward()
    optimizer.step()
    last = ('.channel.fc2.', '.spatial.bn.' if cbam_args.get('spatial_norm') else '.spatial.conv.')
    for key, value in gates.items():
        if any(layer in key for layer in last):
            assert not torch.equal(value, before[key]), key
    # what stands before a layer of zeros has no gradient until that layer has moved
    optimizer.zero_grad()
    F.cross_entropy(ours(x), torch.tensor([1, 2])).backward()
    assert all(value.grad.any() for value in gates.values())


@pytest.mark.parametrize('load', [
    lambda file: timm.create_model('cbam_resnet18', checkpoint_path=file),  # train.py --initial-checkpoint
    lambda file: timm.create_model(  # train.py --pretrained-path
        'cbam_resnet18', pretrained=True, pretrained_cfg_overlay=dict(file=file)),
], ids=['checkpoint_path', 'pretrained_path'])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_from_file_of_torchvision(load, suffix, tmp_path):
    torch.manual_seed(0)
    theirs = liven(torchvision.models.resnet18())
    file = str(tmp_path / f'resnet18{suffix}')
    (save_file if suffix == '.safetensors' else torch.save)(theirs.state_dict(), file)
    assert torch.equal(load(file).eval()(images()), theirs(images()))


@pytest.mark.parametrize('strict', [True, False])
def test_load_state_dict(strict):
    theirs, ours = plain(), timm.create_model('cbam_resnet18').eval()
    ours.load_state_dict(theirs.state_dict(), strict=strict)
    assert torch.equal(ours(images()), theirs(images()))


@pytest.mark.parametrize('name,kwargs,message', [
    ('cbam_resnet18', dict(cbam_args=dict(gate_layer='tanh')), 'gate_layer Tanh is 0 at zero.*hard_sigmoid'),
    ('cbam_resnet18', dict(norm_layer=functools.partial(torch.nn.BatchNorm2d, affine=False), zero_init_last=False),
     'layer1.0.bn2 has no weight.*norm_layer'),
    ('cbam_resnet18_s1', {}, "stem is a 7x7 convolution, the model has a 3x3.*without '_s1'"),
])
def test_impossible(name, kwargs, message):
    model = timm.create_model(name, **kwargs)
    with pytest.raises(RuntimeError, match=f'(?s){message}'):
        model.load_state_dict(plain().state_dict())


def test_no_weights_for_small_stem():
    with pytest.raises(RuntimeError, match='No pretrained weights exist for cbam_resnet18_s1. Use `pretrained=False`'):
        timm.create_model('cbam_resnet18_s1', pretrained=True)


def test_default_tag_from_hub(tmp_path):
    """`pretrained=True`, nothing else, against a Hub on loopback that holds timm's repository."""
    theirs = plain('resnet18')
    with HubServer() as hub:
        file = hub.store(save_safetensors({k: v.contiguous() for k, v in theirs.state_dict().items()}))
        hub.repos['timm/resnet18.a1_in1k'] = {'main': {'model.safetensors': file}}
        torch.save(images(), tmp_path / 'x.pt')
        run(f'''
            import timm, torch
            model = timm.create_model('cbam_resnet18', pretrained=True).eval()
            torch.save(model(torch.load({str(tmp_path / 'x.pt')!r})), {str(tmp_path / 'logits.pt')!r})
        ''', **hub.env, HF_HOME=str(tmp_path / 'hf'))
    assert torch.equal(torch.load(tmp_path / 'logits.pt'), theirs(images()))


@pytest.fixture(scope='module')
def pytorchcv_release(tmp_path_factory):
    """pytorchcv's own network, and the url of its weights in the form that its releases have."""
    from pytorchcv.model_provider import get_model

    folder = tmp_path_factory.mktemp('release')
    torch.manual_seed(0)
    network = liven(get_model('cbam_resnet50'))
    torch.save(network.state_dict(), folder / 'cbam_resnet50-0505-d8cf8488.pth')
    archive = folder / 'cbam_resnet50-0505-d8cf8488.pth.zip'
    with zipfile.ZipFile(archive, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        z.write(folder / 'cbam_resnet50-0505-d8cf8488.pth', 'cbam_resnet50-0505-d8cf8488.pth')

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield network, f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('tag', ['osmr_in1k', 'eccv18_in1k'])
def test_trained_weights_are_registered(tag):
    cfg = get_pretrained_cfg(f'cbam_resnet50_eccv18.{tag}')
    assert cfg.url.startswith('https://github.com/osmr/imgclsmob/releases/download/v0.0.') and cfg.license == 'mit'
    assert get_pretrained_cfg('cbam_resnet50_eccv18').tag == 'osmr_in1k'


def test_trained_weights_by_url(pytorchcv_release, tmp_path, monkeypatch):
    network, address = pytorchcv_release
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    file = get_pretrained_cfg('cbam_resnet50_eccv18').url.rsplit('/')[-1]
    create = functools.partial(
        timm.create_model, 'cbam_resnet50_eccv18', pretrained=True, pretrained_cfg_overlay=dict(url=address + file))
    ours = create().eval()
    x = images(224)
    torch.testing.assert_close(ours(x), network(x), rtol=1e-4, atol=1e-4 * network(x).abs().max().item())
    whole = ours.state_dict()
    for kwargs in (dict(num_classes=5), dict(in_chans=1), dict(features_only=True)):
        part = create(**kwargs).state_dict()
        assert sum('.se.' in k for k in part) == sum('.se.' in k for k in whole) > 0
        for key, value in part.items():
            if '.se.' in key or '.bn' in key:
                assert torch.equal(value, whole[key.replace('layer1_', 'layer1.')]), key


def test_eccv18_classifier_starts_as_in_the_authors_code():
    torch.manual_seed(0)
    fc = timm.create_model('cbam_resnet18_eccv18').fc
    assert not fc.bias.any() and abs(fc.weight.std().item() / (2 / 512) ** 0.5 - 1) < 0.01


def gates_of(model):
    return {k: v for k, v in model.state_dict().items() if '.se.' in k}


@pytest.fixture
def trained():
    """A model whose attention has learned something."""
    torch.manual_seed(3)
    model = timm.create_model('cbam_resnet18')
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


class Nested(torch.nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone(x)


# How a model is wrapped, and what the names of its weights are.
WRAPPERS = {
    'DataParallel': (torch.nn.DataParallel, 'module.{}'),
    'compiled': (lambda m: torch.compile(m, backend='eager'), '_orig_mod.{}'),
    'compiled DataParallel': (
        lambda m: torch.compile(torch.nn.DataParallel(m), backend='eager'), '_orig_mod.module.{}'),
    'nested': (Nested, 'backbone.{}'),
    'nested twice': (lambda m: Nested(torch.nn.DataParallel(Nested(m))), 'backbone.module.backbone.{}'),
    'Sequential': (lambda m: torch.nn.Sequential(m, torch.nn.Identity()), '0.{}'),
    'copied': (copy.deepcopy, '{}'),
}


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_at_any_depth(wrapper):
    wrap, name = WRAPPERS[wrapper]
    theirs, ours = plain(), timm.create_model('cbam_resnet18')
    wrapped = wrap(ours)
    result = wrapped.load_state_dict({name.format(k): v for k, v in theirs.state_dict().items()})
    assert not result.missing_keys and not result.unexpected_keys
    ours = next(m for m in wrapped.modules() if isinstance(m, CbamResNet)).eval()
    assert torch.equal(ours(images(32)), theirs(images(32)))


def test_at_any_depth_and_once_only(trained):
    """A model's own weights come back as they are, from wherever they are loaded."""
    for wrap, _ in WRAPPERS.values():
        wrapped = wrap(timm.create_model('cbam_resnet18'))
        wrapped.load_state_dict(wrap(trained).state_dict())
        pairs = zip(wrapped.state_dict().values(), trained.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize('kwargs', [
    {}, dict(feature_cls='dict'), dict(feature_cls='hook'), dict(out_indices=(1, 2), in_chans=1),
], ids=str)
def test_features_from_checkpoint_without_classifier(kwargs, tmp_path):
    """timm's own resnet18 takes such a file, and one with a classifier neither takes."""
    theirs = plain(in_chans=kwargs.get('in_chans', 3))
    whole = theirs.state_dict()
    last = max(kwargs.get('out_indices', (4,)))
    part = {k: v for k, v in whole.items() if not k.startswith(('fc.', *(f'layer{i}.' for i in range(last + 1, 5))))}
    if kwargs.get('feature_cls') == 'hook':
        part = {f'body.{k}': v for k, v in part.items()}
    torch.save(part, tmp_path / 'part.pth')
    torch.save(whole, tmp_path / 'whole.pth')
    ours, timms = (
        timm.create_model(name, features_only=True, checkpoint_path=tmp_path / 'part.pth', **kwargs).eval()
        for name in ('cbam_resnet18', 'resnet18'))
    x = images(chans=kwargs.get('in_chans', 3))
    features = [list(out.values()) if isinstance(out, dict) else out for out in (ours(x), timms(x))]
    assert all(torch.equal(a, b) for a, b in zip(*features, strict=True))
    for name in ('cbam_resnet18', 'resnet18'):
        with pytest.raises(RuntimeError, match='Unexpected key.*fc.weight'):
            timm.create_model(name, features_only=True, checkpoint_path=tmp_path / 'whole.pth', **kwargs)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize('kwargs', [{}, dict(cbam_args=dict(spatial_norm=True, mlp_bias=True))], ids=str)
def test_assigned_to_a_model_without_weights(kwargs, dtype):
    theirs = plain().to(dtype)
    with torch.device('meta'):
        ours = timm.create_model('cbam_resnet18', **kwargs)
        ours.load_state_dict(theirs.state_dict(), assign=True)
    tensors = ours.state_dict().values()
    assert {t.device.type for t in tensors} == {'cpu'}
    assert {t.dtype for t in tensors if t.is_floating_point()} == {dtype}
    assert torch.equal(ours.eval()(images().to(dtype)), theirs(images().to(dtype)))
    assert all(v.any() for k, v in gates_of(ours).items() if k.endswith('channel.fc1.weight'))


def test_assigned_in_another_dtype(trained):
    theirs = plain().bfloat16()
    trained.load_state_dict(theirs.state_dict(), assign=True)
    assert torch.equal(trained(images().bfloat16()), theirs(images().bfloat16()))


def test_part_of_a_plain_resnet(trained):
    """Attention starts where the weights of the block are, other blocks keep what they have learned."""
    before, theirs = copy.deepcopy(trained.state_dict()), plain().state_dict()
    part = {k: v for k, v in theirs.items() if k.startswith('layer2.')}
    result = trained.load_state_dict(part, strict=False)
    assert set(result.missing_keys) == {k for k in before if not k.startswith('layer2.') and 'num_batches' not in k}
    for key, value in trained.state_dict().items():
        if not key.startswith('layer2.'):
            assert torch.equal(value, before[key]), key
        elif key.endswith(('.fc2.weight', '.spatial.conv.weight')):
            assert not value.any(), key
        elif '.se.' not in key:
            assert torch.equal(value, theirs[key] * (4 if '.bn2.' in key and key.endswith(('weight', 'bias')) else 1))
    with pytest.raises(RuntimeError, match='Missing key.*layer1.0.se.channel.fc1.weight'):
        trained.load_state_dict(part)


@pytest.mark.parametrize('chosen', [
    lambda k: '.bn' in k or k.startswith('bn1'),  # statistics of another domain
    lambda k: 'bn' not in k,
    lambda k: '.conv' in k,
    lambda k: k.startswith(('conv1', 'bn1', 'fc')),
], ids=['norms', 'no norms', 'convolutions', 'stem and head'])
def test_part_without_whole_branches_is_loaded_as_it_is(chosen, trained):
    before, theirs = copy.deepcopy(trained.state_dict()), plain().state_dict()
    trained.load_state_dict({k: v for k, v in theirs.items() if chosen(k)}, strict=False)
    for key, value in trained.state_dict().items():
        assert torch.equal(value, theirs[key] if key in theirs and chosen(key) else before[key]), key


@pytest.mark.parametrize('left_out', [
    'layer3.1.se.', 'layer1.0.se.channel.', 'layer4.1.se.spatial.conv.weight', 'layer1.', 'fc.',
])
def test_part_of_a_cbam_resnet_is_loaded_as_it_is(left_out, trained):
    model = timm.create_model('cbam_resnet18')
    before = copy.deepcopy(model.state_dict())
    part = {k: v for k, v in trained.state_dict().items() if not k.startswith(left_out)}
    result = model.load_state_dict(part, strict=False)
    assert result.missing_keys == [k for k in before if k.startswith(left_out) and 'num_batches' not in k]
    assert all(torch.equal(v, part.get(k, before[k])) for k, v in model.state_dict().items())


@pytest.mark.parametrize('key,named', [
    ('layer1.0.cbam.gate.weight', 'attention of a layout that is not known: layer1.0.cbam.gate.weight'),
    ('layer4.1.attn.conv.weight', 'attention of a layout that is not known: layer4.1.attn.conv.weight'),
    ('layer2.0.se.conv.weight', 'attention of a layout that is not known: layer2.0.se.conv.weight'),
    ('gate1.conv.weight', 'more in it than a ResNet has: gate1.conv.weight'),
])
def test_unknown_attention_is_not_dropped(key, named, trained, caplog):
    theirs = dict(plain().state_dict(), **{key: torch.zeros(1)})
    before = copy.deepcopy(gates_of(trained))
    result = trained.load_state_dict(theirs, strict=False)
    assert result.unexpected_keys == [key] and set(before) <= set(result.missing_keys)
    assert all(torch.equal(v, before[k]) for k, v in gates_of(trained).items())
    assert named in caplog.text and 'The attention of the model stays as it is' in caplog.text
    for load in (trained.load_state_dict, lambda state_dict: convert_state_dict(state_dict, trained)):
        with pytest.raises(RuntimeError, match=named):
            load(theirs)


@pytest.mark.parametrize(
    'head', [['projector.0'], ['fc.0', 'fc.2'], ['1.2', '1.4', '1.8'], ['heads.a', 'heads.b']], ids=str)
def test_body_of_a_resnet_with_another_head(head, trained):
    theirs, before = plain(), copy.deepcopy(trained.fc)
    state_dict = {k: v for k, v in theirs.state_dict().items() if not k.startswith('fc.')}
    state_dict.update({f'{name}.{k}': v for name in head for k, v in theirs.fc.state_dict().items()})
    result = trained.load_state_dict(state_dict, strict=False)
    assert result.missing_keys == ['fc.weight', 'fc.bias'] and torch.equal(trained.fc.weight, before.weight)
    assert result.unexpected_keys == [f'{name}.{k}' for name in head for k in ('weight', 'bias')]
    assert torch.equal(trained.forward_features(images()), theirs.forward_features(images()))
    with pytest.raises(RuntimeError, match=f'differs in its head: it has {head[0]}.weight'):
        trained.load_state_dict(state_dict)
