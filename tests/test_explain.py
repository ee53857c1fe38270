import itertools
import sys
from collections import OrderedDict
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from helpers import liven, relative_error, run
from PIL import Image
from sklearn.datasets import load_sample_image
from test_layers import channel_gate, spatial_gate
from timm.utils import update_summary
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from timm_cbam import AttentionMaps, Cbam, attention_maps, fusion
from timm_cbam.cli import main
from timm_cbam.hub import save_model


def create(name='cbam_resnet18', **kwargs):
    torch.manual_seed(0)
    return liven(timm.create_model(name, **kwargs))


@pytest.fixture(params=[True, False], ids=['fused', 'plain'])
def fused(request, monkeypatch):
    """Switch the fused path on or off, and count its runs."""
    monkeypatch.setattr(fusion, 'FUSED', request.param)
    with patch.object(fusion, 'cbam_tail', wraps=fusion.cbam_tail) as tail:
        yield lambda: tail.call_count if request.param else None


REFERENCE = {
    'channel_spatial': lambda m, x: ((c := channel_gate(m.channel, x)), spatial_gate(m.spatial, x * c)),
    'spatial_channel': lambda m, x: ((s := spatial_gate(m.spatial, x)), channel_gate(m.channel, x * s))[::-1],
    'parallel': lambda m, x: (channel_gate(m.channel, x), spatial_gate(m.spatial, x)),
    'channel': lambda m, x: (channel_gate(m.channel, x), None),
    'spatial': lambda m, x: (None, spatial_gate(m.spatial, x)),
}


def reference_maps(model, x, arrangement):
    """The gates by the paper's equations, from what arrives at each layer."""
    expected = {}
    handles = []
    for name, m in model.named_modules():
        if isinstance(m, Cbam):
            handles.append(m.register_forward_pre_hook(
                lambda m, args, name=name: expected.update({name: REFERENCE[arrangement](m, args[0])})))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return {name: AttentionMaps(c if c is None else c[:, :, 0, 0], s if s is None else s[:, 0])
            for name, (c, s) in expected.items()}


@pytest.mark.parametrize('name,kwargs', [
    ('cbam_resnet18', {}),
    ('cbam_resnet18_eccv18', {}),
    ('cbam_resnet50', dict(in_chans=1, num_classes=0)),
    ('cbam_resnet18_s1', {}),
    ('cbam_resnet18', dict(features_only=True)),
    ('cbam_resnet18', dict(cbam_args=dict(channel_pooling='max', kernel_size=3, gate_layer='hard_sigmoid'))),
    *(('cbam_resnet18', dict(cbam_args=dict(arrangement=a))) for a in REFERENCE if a != 'channel_spatial'),
])
def test_maps_are_the_equations(name, kwargs, fused, monkeypatch):
    model = create(name, **kwargs).double()
    cbam_args = kwargs.get('cbam_args', {})
    if 'gate_layer' in cbam_args:
        monkeypatch.setattr(torch, 'sigmoid', F.hardsigmoid)
    x = torch.randn(2, kwargs.get('in_chans', 3), 32, 48, dtype=torch.float64)
    maps = attention_maps(model, x)
    expected = reference_maps(model, x, cbam_args.get('arrangement', 'channel_spatial'))
    assert list(maps) == list(expected) == [n for n, m in model.named_modules() if isinstance(m, Cbam)]
    for layer in expected:
        for actual, gate in zip(maps[layer], expected[layer], strict=True):
            assert (actual is None) == (gate is None)
            if gate is not None:
                torch.testing.assert_close(actual, gate, rtol=1e-9, atol=1e-9)


def test_model_stays_as_it_is(fused):
    """Output, of plain operations to the bit, also of the pass that is watched; batch-norm statistics, training flags,
    gradients, hooks."""
    model = create().train()
    model.layer1.eval()
    x = torch.randn(2, 3, 64, 64)
    logits = []
    model.fc.register_forward_hook(lambda module, args, out: logits.append(out))
    state, training = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    maps = attention_maps(model, x)
    assert len(maps) == 8 and not fused()  # what is watched runs module by module
    assert [m.training for m in model.modules()] == training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules() if m is not model.fc)
    assert not any(gate.requires_grad for gates in maps.values() for gate in gates)
    with torch.no_grad():
        model.eval()(x)
    assert torch.equal(*logits) if not fused() else relative_error(*logits) < 1e-5


def test_error_leaves_no_trace():
    model = create().train()
    with pytest.raises(RuntimeError, match='channels'):
        attention_maps(model, torch.randn(1, 4, 32, 32))
    assert all(m.training and not m._forward_hooks for m in model.modules())


@pytest.mark.parametrize('how', ['model', 'in place', 'stage', 'layer'])
def test_compiled(how):
    model = create()
    x = torch.randn(1, 3, 32, 32)
    expected = attention_maps(model, x)
    counter = CompileCounter()
    if how == 'in place':
        model.compile(backend=counter)
    elif how == 'stage':
        model.layer2 = torch.compile(model.layer2, backend=counter)
    elif how == 'layer':
        model.layer4[1].se = torch.compile(model.layer4[1].se, backend=counter)
    else:
        model = torch.compile(model, backend=counter)
    with torch.no_grad():
        before = model(x)
        compiled = counter.frame_count
        assert compiled
        maps = attention_maps(model, x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(model(x), before)
    assert counter.frame_count == compiled
    assert list(maps) == list(expected)
    for gates in zip(itertools.chain(*maps.values()), itertools.chain(*expected.values()), strict=True):
        assert torch.equal(*gates)


def test_any_network():
    cbam = Cbam(16)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), cbam, nn.Sequential(nn.ReLU(), Cbam(16, arrangement='channel')), cbam)
    x = torch.randn(2, 3, 9, 8)
    maps = attention_maps(net, x)
    assert [(k, v.channel.shape, v.spatial if v.spatial is None else v.spatial.shape) for k, v in maps.items()] == [
        ('1', (2, 16), (2, 7, 6)), ('2.1', (2, 16), None)]
    assert torch.equal(maps['1'].channel, cbam.channel.attention_map(net[:3](x)).flatten(1))  # the last of its two runs
    assert list(attention_maps(cbam, torch.randn(1, 16, 4, 4))) == ['']
    with pytest.raises(ValueError, match=r"ResNet has no Cbam layer.*timm.list_models\('cbam\*'\)"):
        attention_maps(timm.create_model('resnet18'), x)


def test_import_without_the_extra():
    assert run('''
        import sys, timm_cbam

        packages = {'matplotlib', 'pytorch_grad_cam', 'cv2'}
        print(packages & set(sys.modules))
        import matplotlib
        print(packages & set(sys.modules))
    ''') == "set()\n{'matplotlib'}\n"


@pytest.mark.parametrize('command,package', [('explain x.png', 'pytorch_grad_cam'), ('report x', 'matplotlib')])
def test_extra_is_missing(command, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(command.split()) == 1
    err = capsys.readouterr().err
    assert f"needs {package}: pip install 'timm-cbam[explain]'" in err and len(err.splitlines()) == 1


@pytest.fixture(scope='module')
def china():
    return Image.fromarray(load_sample_image('china.jpg'))


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp('models')
    labels = ['cat', 'dog, hound', '7']
    small = dict(input_size=(3, 96, 96), crop_pct=1.0, num_classes=3, label_names=labels)
    for name in ('cbam_resnet18', 'resnet18', 'resnet10t'):
        model = create(name, pretrained_cfg_overlay=small)
        nn.init.normal_(model.fc.weight)  # each class is seen somewhere
        save_model(model, folder / name, model_args={})
    gray = create('cbam_resnet18_s1', pretrained_cfg_overlay=dict(
        input_size=(1, 16, 16), mean=(0.5,), std=(0.5,), num_classes=4, pool_size=None))
    save_model(gray, folder / 'gray', model_args={})
    save_model(create('resnet10t'), folder / 'imagenet', model_args={})
    save_model(create('resnet10t', num_classes=0), folder / 'headless', model_args={})
    return {path.name: f'local-dir:{path}' for path in folder.iterdir()}


@pytest.fixture
def figures(monkeypatch):
    """Figures that are drawn, each as the list of its axes' titles."""
    from matplotlib.figure import Figure

    drawn = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, 'savefig', lambda self, *args, **kwargs: (drawn.append(self), savefig(self, *args, **kwargs)))
    return drawn


def titles(figure):
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


def test_figure(models, china, tmp_path, figures, capsys):
    china.save(tmp_path / 'china.jpg')
    output = tmp_path / 'a' / 'out.png'
    args = ['explain', str(tmp_path / 'china.jpg'), '--model', models['cbam_resnet18'], '-o', str(output)]
    for _ in range(2):  # the second replaces the first
        assert main([*args, '--compare', models['resnet18'], 'cbam_resnet18_s1', '--target', '2']) == 0
        assert capsys.readouterr().out == f'{output}\n'
    assert [p.name for p in output.parent.iterdir()] == ['out.png']
    with Image.open(output) as image:
        assert image.width > 1000 and image.height > 500

    model = timm.create_model(models['cbam_resnet18'], pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with Image.open(tmp_path / 'china.jpg') as image:
        x = transform(image)[None]
    percent = 100 * model(x).softmax(1)[0, 2]
    text = titles(figures[0])
    assert text[:2] == ['china.jpg\n640 x 427 pixels', f'cbam_resnet18\n7: {percent:.1f} %']
    assert text[2].startswith('resnet18\n7: ')
    assert text[3].startswith('cbam_resnet18_s1.untrained\nuntrained, weights are random\ngreat white shark')
    maps = attention_maps(model, x)
    shown = [ax for ax in figures[0].axes if 'spatial' in ax.get_title()]
    for i, ax in enumerate(shown, 1):
        assert ax.get_title().startswith(f'spatial gate of layer{i}.1.se\n')
        np.testing.assert_array_equal(ax.images[-1].get_array(), maps[f'layer{i}.1.se'].spatial[0])
    assert len(shown) == 4
    histograms = [ax for ax in figures[0].axes if 'channel' in ax.get_title()]
    assert [sum(bar.get_height() for bar in ax.patches) for ax in histograms] == [128, 256, 512, 1024]


def reference_grad_cam(model, x, index):
    """Grad-CAM's equations 1 and 2, at the resolution of x. (Grad-CAM is a gradient times a map, so autograd does.)"""
    features = model.forward_features(x).detach().requires_grad_()
    grad, = torch.autograd.grad(model.forward_head(features)[0, index], features)
    cam = (grad.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu().detach()
    cam = F.interpolate((cam - cam.min()) / (cam.max() - cam.min() + 1e-7), x.shape[2:], mode='bilinear')[0, 0]
    return (cam - cam.min()) / (cam.max() - cam.min() + 1e-7)


@pytest.mark.parametrize('name,target,index', [
    ('cbam_resnet18', None, None), ('cbam_resnet18', 'hound', 1), ('resnet10t', 'CAT', 0), ('resnet10t', '2', 2)])
def test_grad_cam(name, target, index, models, china, tmp_path, figures):
    """The last stage's, of the class that was asked for or the most probable one."""
    china.save(tmp_path / 'china.png')
    args = ['explain', str(tmp_path / 'china.png'), '--model', models[name], '-o', str(tmp_path / 'out')]
    assert main(args + ([] if target is None else ['--target', target])) == 0
    model = timm.create_model(models[name], pretrained=True).eval()
    x = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(china)[None]
    expected = reference_grad_cam(model, x, model(x).argmax() if index is None else index)
    ax = next(ax for ax in figures[0].axes if ax.get_title().startswith(name))
    np.testing.assert_allclose(ax.images[-1].get_array(), expected, atol=1e-3)
    assert expected.std() > 0.1


def test_class_names(models, china, tmp_path, figures):
    """ImageNet's from timm, indices where there are no names; the gates of a plain ResNet are left out."""
    china.save(tmp_path / 'china.png')
    args = ['explain', str(tmp_path / 'china.png'), '-o', str(tmp_path / 'out'), '--model']
    assert main([*args, models['imagenet'], '--target', 'tabby']) == 0
    assert [t.split(':')[0] for t in titles(figures[0])[1:]] == ['imagenet\ntabby, tabby cat']
    assert main([*args, models['gray'], '--target', '3']) == 0
    assert titles(figures[1])[1].startswith('gray\nclass 3: ')


@pytest.mark.parametrize('args,message', [
    (['--target', 'cow'], "cbam_resnet18 has no class 'cow'; choose by an index from 0 to 2, or a name such as 'cat'"),
    (['--target', '3'], "has no class '3'"),
    (['--model', 'MODELS/imagenet', '--target', 'crane'], "imagenet has classes 134, 517 of the name 'crane'"),
    (['--model', 'resnet0'], 'Unknown model (resnet0)'),
    (['--model', 'local-dir:nowhere'], 'local-dir:nowhere cannot be loaded: '),
    (['--model', 'MODELS/headless'], 'has no classifier'),
    (['--model', 'test_vit'], 'is no CNN whose last stage gives a map (B, C, H, W)'),
    (['-o', 'IMAGES/china.png'], 'china.png is one of the images and would be overwritten'),
    (['IMAGES/china.jpg'], 'would both become'),
    (['IMAGES/china.jpg', '-o', 'out.pdf'], 'out.pdf is the name of one file, but there are 2 images: name a folder'),
])
def test_bad_arguments(args, message, models, china, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules['timm_cbam.explain'], 'is_model_pretrained', lambda name: False)  # no download
    china.save(tmp_path / 'china.png')
    china.save(tmp_path / 'china.jpg')
    folder = models['imagenet'].rpartition('/')[0]
    args = [arg.replace('IMAGES', str(tmp_path)).replace('MODELS', folder) for arg in args]
    defaults = ['--model', models['cbam_resnet18']] * ('--model' not in args)
    defaults += ['-o', str(tmp_path / 'out')] * ('-o' not in args)
    assert main(['explain', str(tmp_path / 'china.png'), *args, *defaults]) == 1
    assert message in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {'china.png', 'china.jpg'}


def test_kinds_of_images(models, china, tmp_path, figures, capsys):
    """Each is read right or reported, and the others go on."""
    small = china.resize((96, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    small.save(tmp_path / 'jpeg.jpg', quality=95)
    small.save(tmp_path / 'webp.webp', lossless=True)
    small.convert('L').save(tmp_path / 'gray.png')
    small.convert('RGBA').save(tmp_path / 'rgba.png')
    small.transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'turned.png', exif=exif)
    Image.fromarray(np.asarray(small.convert('L')).astype('uint16') * 257).save(tmp_path / 'sixteen.png')
    small.convert('CMYK').save(tmp_path / 'cmyk.jpg')
    Image.new('RGB', (1, 1), 'red').save(tmp_path / 'pixel.png')
    good = [p.name for p in tmp_path.iterdir()]
    data = (tmp_path / 'gray.png').read_bytes()
    (tmp_path / 'half.png').write_bytes(data[:len(data) // 2])
    (tmp_path / 'text.png').write_text('no image')
    (tmp_path / 'empty.png').touch()
    Image.new('L', (10000, 1)).save(tmp_path / 'thread.png')
    Image.new('1', (20000, 10000)).save(tmp_path / 'bomb.png')
    bad = [p.name for p in tmp_path.iterdir() if p.name not in good] + ['missing.png']

    files = [str(tmp_path / name) for name in bad[:3] + good + bad[3:]]
    assert main(['explain', *files, '--model', models['resnet10t'], '-o', str(tmp_path / 'out')]) == 1
    err = capsys.readouterr().err
    assert {p.stem for p in (tmp_path / 'out').iterdir()} == {name.split('.')[0] for name in good}
    assert err.splitlines()[-1] == f'timm-cbam: error: {len(bad)} of {len(files)} images failed, see above'
    assert '100%' in err  # the progress bar
    for name, reason in [
            ('half', 'truncated'), ('text', 'cannot identify'), ('empty', 'cannot identify'),
            ('missing', 'No such file'), ('thread', 'is too narrow: 10000 x 1 pixels'),
            ('bomb', 'decompression bomb')]:
        assert sum(f'{name}.png: ' in line and reason in line for line in err.splitlines()) == 1

    inputs = {titles(f)[0].split('.')[0]: f.axes[0].images[0].get_array() for f in figures}
    expected = np.asarray(small)
    for name in ('webp', 'rgba', 'turned'):
        np.testing.assert_array_equal(inputs[name], expected)
    for name in ('gray', 'sixteen'):
        np.testing.assert_array_equal(inputs[name], np.asarray(small.convert('L').convert('RGB')))
    assert np.abs(inputs['jpeg'].astype(int) - expected).mean() < 5
    np.testing.assert_array_equal(inputs['pixel'], [[[255, 0, 0]]])


def test_report(tmp_path, figures, capsys):
    """summary.csv as timm writes it, of a run that was resumed and skipped a validation."""
    for epoch in range(4):
        evaluation = OrderedDict(loss=2 - epoch / 4, top1=10. * epoch, top5=20. * epoch) if epoch != 2 else None
        update_summary(
            epoch, OrderedDict(loss=3. - epoch), evaluation, tmp_path / 'summary.csv', lr=0.1 / (epoch + 1),
            write_header=epoch in (0, 3))
    assert (tmp_path / 'summary.csv').read_text().count('\n') == 6
    assert main(['report', str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'summary.png'}\n"
    assert (tmp_path / 'summary.png').read_bytes().startswith(b'\x89PNG')
    lines = {line.get_label(): line.get_xydata().tolist() for ax in figures[0].axes for line in ax.lines}
    assert lines == {
        'train_loss': [[0, 3], [1, 2], [3, 0]],
        'eval_loss': [[0, 2], [1, 1.75], [3, 1.25]],
        'eval_top1': [[0, 0], [1, 10], [3, 30]],
        'eval_top5': [[0, 0], [1, 20], [3, 60]],
        'lr': [[0, 0.1], [1, 0.05], [3, 0.025]],
    }


@pytest.mark.parametrize('text,message', [
    (None, 'No such file'), ('', 'has no epochs'), ('a,b\n1,2\n', 'has no epochs'),
    ('epoch,lr\n1,x\n', "summary.csv: could not convert string to float: 'x'"),
    ('epoch,lr\n0,1\nepoch,b,lr\n1,2,3\n', 'summary.csv: ')])
def test_report_without_epochs(text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / 'summary.csv').write_text(text)
    assert main(['report', str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'summary.png').exists()
