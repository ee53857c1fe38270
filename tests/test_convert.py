import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile

import pytest
import timm
import torch
import torchvision
from helpers import SUFFIXES, golden_case, golden_cases, golden_input, golden_state_dict, liven, relative_error
from pytorchcv.model_provider import get_model
from safetensors.torch import save_file

import timm_cbam.convert
from timm_cbam.cli import main
from timm_cbam.weights import find_weights


def published(source):
    """Name of our model, case, and the checkpoint as the published code writes it, with training dict and prefix."""
    name = f'cbam_resnet18{SUFFIXES[source]}'
    case = golden_case(source, name)
    checkpoint = golden_state_dict(case)
    if source == 'official':
        checkpoint = {
            'epoch': 90, 'arch': 'resnet18', 'best_prec1': torch.tensor(70.7),
            'state_dict': {f'module.{k}': v for k, v in checkpoint.items()}, 'optimizer': {'state': {}}}
    return name, case, checkpoint


def load(folder, **kwargs):
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()


@pytest.mark.parametrize('source', SUFFIXES)
def test_published_checkpoint(source, tmp_path, capsys):
    name, case, checkpoint = published(source)
    src, dst = tmp_path / 'checkpoint.pth', tmp_path / 'new' / 'folder'
    torch.save(checkpoint, src)
    assert main(['convert', str(src), str(dst), '--verify']) == 0
    model = load(dst, dtype=torch.float64)
    expected = torch.tensor(case['logits'], dtype=torch.float64)
    assert relative_error(model(golden_input(case)), expected) < 1e-9
    config = json.loads((dst / 'config.json').read_text())
    assert config['architecture'] == name and config['num_classes'] == expected.shape[1]
    assert 'num_classes' not in config.get('model_args', {})
    cfg = config['pretrained_cfg']
    assert cfg['tag'] == 'converted' and not {'license', 'paper_ids', 'origin_url'} & set(cfg)
    assert cfg['crop_pct'] == (1.0 if source == 'seed' else 0.875)
    assert {p.name for p in dst.iterdir()} == {'config.json', 'model.safetensors', 'README.md'}
    card = (dst / 'README.md').read_text()
    assert f'`{name}`' in card and f'local-dir:{dst}' in card and 'woo2018cbam' in card
    out, err = capsys.readouterr()
    assert f"timm.create_model('local-dir:{dst}', pretrained=True)" in out and name in out
    assert 'largest difference of 1000 logits' in out and 'verify' in err


@pytest.mark.parametrize('source,name', [
    (source, name) for source, name, _ in golden_cases() if not name.startswith('cbam_resnet18')])
def test_depth_and_stem_are_inferred(source, name):
    case = golden_case(source, name)
    shapes = find_weights({k: torch.empty(shape, device='meta') for k, shape in case['keys']}).values
    assert timm_cbam.convert._infer_model(shapes, None) == (name, {})


@pytest.mark.parametrize('base', [
    'resnet50d', 'resnext50_32x4d', 'resnext101_32x4d', 'resnext101_32x8d', 'wide_resnet50_2'])
def test_width_groups_and_deep_stem_are_inferred(base):
    for name, kwargs in ((base, {}), (f'cbam_{base}', {}), (f'cbam_{base}', dict(cbam_args=dict(mlp_bias=True)))):
        shapes = timm.create_model(name, in_chans=4, device='meta', **kwargs).state_dict()
        assert timm_cbam.convert._infer_model(shapes, None) == (f'cbam_{base}', dict(kwargs, in_chans=4))


def test_file_formats(tmp_path):
    model = liven(timm.create_model('cbam_resnet18', num_classes=3))
    x = torch.randn(1, 3, 64, 64)
    state_dict = model.state_dict()
    files = {n: tmp_path / n for n in ('a.pth', 'b.pth.tar', 'c.bin', 'd.safetensors', 'e.pth')}
    torch.save(state_dict, files['a.pth'])
    noise = {k: torch.zeros_like(v) for k, v in state_dict.items()}
    torch.save({'epoch': 3, 'state_dict': noise, 'state_dict_ema': state_dict}, files['b.pth.tar'])  # as train.py's
    torch.save({'model': {f'module.{k}': v for k, v in state_dict.items()}}, files['c.bin'])
    save_file(state_dict, files['d.safetensors'])
    save_legacy(state_dict, files['e.pth'])
    for name, file in files.items():
        timm_cbam.convert.convert(file, tmp_path / f'{name}-folder')
        assert torch.equal(load(tmp_path / f'{name}-folder')(x), model(x)), name


@pytest.mark.parametrize('create,base', [
    (lambda: torchvision.models.resnet18(), 'resnet18'),
    (lambda: timm.create_model('resnet18', num_classes=7, in_chans=1), 'resnet18'),
    (lambda: timm.create_model('resnet50d', num_classes=7, in_chans=1), 'resnet50d'),
    pytest.param(
        lambda: torchvision.models.resnext50_32x4d(num_classes=7), 'resnext50_32x4d', marks=pytest.mark.slow),
], ids=['torchvision', 'timm', 'deep stem', 'groups'])
def test_plain_resnet(create, base, tmp_path):
    theirs = liven(create())
    torch.save(theirs.state_dict(), tmp_path / 'plain.pth')
    for name in ('a', 'b'):  # the gates, which are drawn, are the same every time
        timm_cbam.convert.convert(tmp_path / 'plain.pth', tmp_path / name, verify=True)
    ours = load(tmp_path / 'a')
    x = torch.randn(2, ours.in_chans, 65, 65)
    assert ours.pretrained_cfg['architecture'] == f'cbam_{base}' and torch.equal(ours(x), theirs(x))
    assert (tmp_path / 'a' / 'model.safetensors').read_bytes() == (tmp_path / 'b' / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('name,kwargs', [
    ('cbam_resnet18_s1', dict(cbam_args=dict(kernel_size=3, rd_ratio=1 / 8), in_chans=4)),
    ('cbam_resnet18', dict(cbam_args=dict(mlp_bias=True), num_classes=0)),
    ('cbam_resnet18', dict(cbam_args=dict(rd_channels=8, arrangement='channel'))),
    ('cbam_resnet18_eccv18', dict(cbam_args=dict(arrangement='spatial', spatial_norm=False))),
    ('cbam_resnet18', dict(dtype=torch.float16)),
], ids=str)
def test_arguments_are_inferred(name, kwargs, tmp_path):
    torch.manual_seed(0)
    model = liven(timm.create_model(name, **kwargs))
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    timm_cbam.convert.convert(tmp_path / 'model.pth', tmp_path / 'folder', verify=True)
    again = load(tmp_path / 'folder')
    x = torch.randn(2, model.in_chans, 64, 64)
    assert torch.equal(again(x), model.float()(x)) and again.num_classes == model.num_classes


def test_timm_attn_layer_cbam(tmp_path):
    theirs = liven(timm.create_model('resnet18', block_args=dict(attn_layer='cbam'), num_classes=5))
    torch.save(theirs.state_dict(), tmp_path / 'model.pth')
    timm_cbam.convert.convert(tmp_path / 'model.pth', tmp_path / 'folder', verify=True)
    x = torch.randn(2, 3, 64, 64)
    assert relative_error(load(tmp_path / 'folder')(x), theirs(x)) < 1e-5


def without(*keys):
    state_dict = timm.create_model('cbam_resnet18').state_dict()
    return {k: v for k, v in state_dict.items() if not k.startswith(keys)}


@pytest.mark.parametrize('create,options,message', [
    (lambda: timm.create_model('seresnet18').state_dict(), [], 'looks like an SE-ResNet.*Left over: .*se.fc1'),
    (lambda: timm.create_model('mobilenetv3_small_050').state_dict(), [], 'no layout of a CBAM-ResNet.*conv_stem'),
    (lambda: without('layer3.1.se.channel.fc2'), [], 'closest to cbam_resnet18.*Missing: layer3.1.se.channel.fc2'),
    (lambda: without('layer4.1.'), [], 'comes closest to cbam_resnet18.*Missing: layer4.1.conv1.weight'),
    (lambda: dict(without(), thing=torch.zeros(1)), [], 'Missing: none.*Left over: thing'),
    (lambda: dict(without(), **{'fc.bias': torch.zeros(3)}), [], 'size mismatch for fc.bias'),
    (lambda: dict(without(), **{'conv1.weight': torch.zeros(3)}), [], r'conv1.weight has shape \(3,\)'),
    (lambda: dict(without(), **{'layer1.0.se.channel.fc1.weight': torch.zeros(4, 0, 1, 1)}), [],
     r'layer1.0.se.channel.fc1.weight has shape \(4, 0, 1, 1\)'),
    (lambda: timm.create_model('resnext50_32x4d', cardinality=16, base_width=8).state_dict(), [],
     'closest to cbam_resnext50_32x4d.*mismatch for layer1.0.conv2.weight.*plain ResNet, of another depth, width'),
    (lambda: timm.create_model('resnet14t').state_dict(), [], 'looks like a plain ResNet, of another depth.*Missing: '),
    (without, ['--model', 'cbam_resnet34'], 'comes closest to cbam_resnet34.*of another depth'),
    (lambda: timm.create_model('cbam_resnet18', cbam_args=dict(spatial_pooling='max')).state_dict(), [],
     'average or the maximum, which does not show'),
    (lambda: [torch.zeros(1)], [], 'cannot be read as weights'),
    (lambda: {'conv1.weight': torch.zeros(1, 1).expand(1 << 40, 1 << 20)}, [], 'claims shape'),
    (lambda: {'conv1.weight': torch.zeros(3, 3).to_sparse()}, [], 'conv1.weight claims shape'),
    (without, ['--to', 'official'], 'no network like this one, cbam_resnet18.*cbam_resnet101_eccv18'),
], ids=lambda v: v if isinstance(v, str) else '')
def test_refused(create, options, message, tmp_path, capsys):
    src = tmp_path / 'checkpoint.pth'
    torch.save(create(), src)
    assert main(['convert', str(src), str(tmp_path / 'sub' / 'dst'), *options]) == 1
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
    assert os.listdir(tmp_path) == ['checkpoint.pth']


class Hostile:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def zip_bomb():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', b'0' * (1 << 28))
    return buffer.getvalue()


def save_legacy(state_dict, file):
    torch.save(state_dict, file, _use_new_zipfile_serialization=False)  # as PyTorch before 1.6


def saved(save, suffix):
    def content(tmp_path):
        save({'fc.weight': torch.randn(100, 100)}, tmp_path / f'whole{suffix}')
        whole = (tmp_path / f'whole{suffix}').read_bytes()
        (tmp_path / f'whole{suffix}').unlink()
        return whole
    return content


@pytest.mark.parametrize('suffix,content', [
    ('.pth', lambda _: pickle.dumps({'state_dict': {'conv1.weight': Hostile()}})),
    ('.pth', lambda path: saved(lambda d, f: torch.save({**d, 'x': Hostile()}, f), '.pth')(path)),
    ('.pth', lambda _: zip_bomb()),
    ('.pth', lambda _: zip_bomb()[:-40] + bytes(18) + zip_bomb()[-22:]),
    ('.pth', lambda _: b''),
    ('.bin', lambda _: b'version https://git-lfs.github.com/spec/v1\n'),
    ('.pth', lambda path: saved(torch.save, '.pth')(path)[:20000]),
    ('.pth', lambda path: saved(save_legacy, '.pth')(path)[:99]),
    ('.safetensors', lambda path: saved(save_file, '.safetensors')(path)[:20000]),
    ('.safetensors', lambda _: struct.pack('<Q', 1 << 62) + b'{}'),
    ('.safetensors', lambda _: struct.pack('<Q', 99_000_000) + b' ' * 100),
], ids=['pickle', 'hostile zip', 'bomb', 'damaged directory', 'empty', 'pointer', 'truncated', 'truncated legacy',
        'truncated safetensors', 'huge header', 'long header'])
def test_damaged_or_hostile_file(suffix, content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    src = tmp_path / f'checkpoint{suffix}'
    src.write_bytes(content(tmp_path))
    assert main(['convert', str(src), str(tmp_path / 'dst')]) == 1
    error = capsys.readouterr().err
    reasons = 'cannot be read as weights', 'holds no weights that can be read', 'holds more than weights'
    assert any(f'timm-cbam: error: {src} {reason}' in error for reason in reasons)
    assert os.listdir(tmp_path) == [src.name]  # and no folder 'executed'


def test_what_is_in_the_way_stays(tmp_path, capsys):
    torch.save(without(), tmp_path / 'a.pth')
    (tmp_path / 'thesis').mkdir()
    (tmp_path / 'thesis' / 'text').write_text('mine')
    assert main(['convert', str(tmp_path / 'a.pth'), str(tmp_path / 'thesis')]) == 1
    assert 'thesis exists and is no model folder' in capsys.readouterr().err
    assert main(['convert', str(tmp_path / 'a.pth'), str(tmp_path / 'a.pth'), '--to', 'community']) == 1
    assert 'a.pth exists' in capsys.readouterr().err
    assert main(['convert', str(tmp_path / 'nothing.pth'), str(tmp_path / 'b')]) == 1
    assert 'nothing.pth is no file' in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ['a.pth', 'thesis']


def test_interrupted_while_writing(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    torch.save(without(), tmp_path / 'a.pth')
    monkeypatch.setattr(timm_cbam.convert, 'save_model', interrupt)
    assert main(['convert', str(tmp_path / 'a.pth'), str(tmp_path / 'dst')]) == 130
    assert os.listdir(tmp_path) == ['a.pth']


def test_wrong_conversion_is_found(tmp_path, monkeypatch, capsys):
    fit_weights = timm_cbam.convert.fit_weights

    def wrong(found, model):
        state_dict = dict(fit_weights(found, model))
        state_dict['fc.weight'] = state_dict['fc.weight'] * (1 + 1e-6)
        return state_dict

    torch.save(without(), tmp_path / 'a.pth')
    monkeypatch.setattr(timm_cbam.convert, 'fit_weights', wrong)
    assert main(['convert', str(tmp_path / 'a.pth'), str(tmp_path / 'dst'), '--verify']) == 1
    assert 'dst does not compute what' in capsys.readouterr().err
    assert os.listdir(tmp_path) == ['a.pth']


@pytest.mark.parametrize('source', SUFFIXES)
def test_and_back(source, tmp_path):
    """From the published checkpoint to a folder, from there back: the published checkpoint again, bit for bit."""
    _, _, checkpoint = published(source)
    torch.save(checkpoint, tmp_path / 'a.pth')
    to = 'article' if source == 'seed' else source
    assert main(['convert', str(tmp_path / 'a.pth'), str(tmp_path / 'folder')]) == 0
    back = tmp_path / 'back.pth'
    assert main(['convert', str(tmp_path / 'folder' / 'model.safetensors'), str(back), '--to', to, '--verify']) == 0
    result = torch.load(back, weights_only=True)
    if source == 'official':
        assert result['arch'] == checkpoint['arch'] and {'epoch', 'best_prec1'} <= set(result)
        checkpoint, result = checkpoint['state_dict'], result['state_dict']
    assert set(result) == set(checkpoint)
    assert all(torch.equal(v, checkpoint[k]) for k, v in result.items())
    if source == 'pytorchcv':
        get_model('cbam_resnet18').load_state_dict(result)


def test_plain_resnet_to_other_code(tmp_path):
    """Who must go back gets the warm start there, too: pytorchcv's network computes what the plain ResNet does."""
    theirs = liven(timm.create_model('resnet18'))
    torch.save(theirs.state_dict(), tmp_path / 'a.pth')
    options = ['--model', 'cbam_resnet18_eccv18', '--to', 'pytorchcv', '--verify']
    assert main(['convert', str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth'), *options]) == 0
    net = get_model('cbam_resnet18').eval()
    net.load_state_dict(torch.load(tmp_path / 'b.pth', weights_only=True))
    x = torch.randn(1, 3, 224, 224)
    assert relative_error(net(x), theirs(x)) < 1e-5


def test_command(tmp_path):
    torch.save(without(), tmp_path / 'a.pth')
    command = [sys.executable, '-m', 'timm_cbam.cli', 'convert', 'a.pth', 'b']
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "timm.create_model('local-dir:b', pretrained=True)" in result.stdout and 'a.pth' in result.stderr
