import io
import itertools
import os
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
    narrow = dict(channels=[16, 32, 64, 128])
    for name in ('cbam_resnet18', 'resnet18', 'resnet10t'):
        model = create(name, pretrained_cfg_overlay=small, **narrow)
        nn.init.normal_(model.fc.weight)  # each class is seen somewhere
        save_model(model, folder / name, model_args=narrow)
    gray = create('cbam_resnet18_s1', pretrained_cfg_overlay=dict(
        input_size=(1, 16, 16), mean=(0.5,), std=(0.5,), num_classes=4, pool_size=None), **narrow)
    save_model(gray, folder / 'gray', model_args=narrow)
    save_model(create('resnet10t'), folder / 'imagenet', model_args={})
    save_model(create('resnet10t', num_classes=0), folder / 'headless', model_args={})
    for name, kwargs in dict(wide=dict(input_size=(3, 300, 400)), pixel=dict(input_size=(3, 32, 32))).items():
        model = create('cbam_resnet18', pretrained_cfg_overlay=dict(small, pool_size=None, **kwargs), **narrow)
        # the first class is certain for positive reasons, the others have none
        nn.init.zeros_(model.fc.weight)
        model.fc.weight.data[0] = 0.01
        model.fc.bias.data[:] = torch.tensor([20., 0., 0.])
        save_model(model, folder / name, model_args=narrow)
    model.fc.bias.data[0] = torch.nan
    save_model(model, folder / 'nan', model_args=narrow)
    return {path.name: f'local-dir:{path}' for path in folder.iterdir()}


@pytest.fixture
def figures(monkeypatch):
    """Figures that are drawn."""
    from matplotlib.figure import Figure

    drawn = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, 'savefig', lambda self, *args, **kwargs: (drawn.append(self), savefig(self, *args, **kwargs)))
    return drawn


@pytest.fixture
def quick(monkeypatch):
    """Pictures of few pixels."""
    monkeypatch.setattr(sys.modules['timm_cbam.pictures'], '_DPI', 30)


def titles(figure):
    return [ax.get_title().replace('\n', ' ') for ax in figure.axes if ax.get_title()]


def panels(figure):
    """Image and, where there is one, the map over it, by the words above."""
    return {
        ax.get_title().replace('\n', ' '): [np.asarray(image.get_array()) for image in ax.images]
        for ax in figure.axes if ax.images}


def bars(figure):
    """Limits of the colour bars, and the limits of all maps."""
    colorbars = [ax._colorbar for ax in figure.axes if hasattr(ax, '_colorbar')]
    maps = [ax.images[1] for ax in figure.axes if ax.images[1:]]
    return [bar.mappable.get_clim() for bar in colorbars], [image.get_clim() for image in maps]


def seen(model, image):
    """The model's input for an image, and its colours."""
    config = timm.data.resolve_model_data_config(model)
    x = timm.data.create_transform(**config)(image)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
    return x[None], (x * std + mean).permute(1, 2, 0)


def test_figure(models, china, tmp_path, figures, capsys):
    china.save(tmp_path / 'china.jpg')
    output = tmp_path / 'a' / 'out.png'
    args = ['explain', str(tmp_path / 'china.jpg'), '--model', models['cbam_resnet18'], '-o', str(output)]
    for _ in range(2):  # the second replaces the first
        assert main([*args, '--compare', models['resnet18'], 'cbam_resnet18_s1', '--target', '2']) == 0
        assert capsys.readouterr().out == f'{output}\n'
    assert [p.name for p in output.parent.iterdir()] == ['out.png']
    with Image.open(output) as image:
        assert image.width == 1600

    model = timm.create_model(models['cbam_resnet18'], pretrained=True).eval()
    with Image.open(tmp_path / 'china.jpg') as image:
        x, colors = seen(model, image)
    percent = 100 * model(x).softmax(1)[0, 2]
    text = titles(figures[0])
    assert text[:2] == ['china.jpg 640 x 427 pixels seen at 96 x 96', f'cbam_resnet18 7 {percent:.1f} %']
    assert text[2].startswith('resnet18 7 ')
    assert text[3].startswith('cbam_resnet18_s1. untrained untrained, weights are random great white shark')
    shown = panels(figures[0])
    np.testing.assert_allclose(shown[text[0]][0], colors, atol=1e-6)
    np.testing.assert_allclose(shown[text[1]][0], colors, atol=1e-6)
    assert len(shown[text[0]]) == 1 and shown[text[3]][0].shape == (32, 32, 3)
    maps = attention_maps(model, x)
    for i in range(1, 5):
        gate = maps[f'layer{i}.1.se'].spatial[0]
        _, values = shown[f'layer{i}.1.se {gate.shape[0]} x {gate.shape[1]}']
        np.testing.assert_array_equal(values, gate)
    assert len(shown) == 8 and bars(figures[0]) == ([(0, 1)] * 2, [(0, 1)] * 7)
    histograms = [ax for ax in figures[0].axes if ax.patches and ax.get_title()]
    assert [ax.get_title() for ax in histograms] == [f'layer{i}, 2 layers' for i in range(1, 5)]
    for i, ax in enumerate(histograms, 1):
        gates = torch.cat([maps[f'layer{i}.{j}.se'].channel[0] for j in range(2)])
        expected, _ = np.histogram(gates, bins=25, range=(0, 1))
        np.testing.assert_allclose([bar.get_height() for bar in ax.patches], 100 * expected / len(gates))
        assert ax.get_xlim() == (0, 1) and ax.get_ylim() == histograms[0].get_ylim()


def test_gates_beyond_a_sigmoids(models, china, tmp_path, figures):
    """One scale for all, that has all of them."""
    model = create('cbam_resnet18', cbam_args=dict(gate_layer='relu'), pretrained_cfg_overlay=dict(
        input_size=(3, 64, 64), num_classes=3))
    save_model(model, tmp_path / 'relu', model_args=dict(cbam_args=dict(gate_layer='relu')))
    china.save(tmp_path / 'china.png')
    assert main(['explain', str(tmp_path / 'china.png'), '--model', f'local-dir:{tmp_path}/relu', '-o',
                 str(tmp_path / 'out.png')]) == 0
    maps = attention_maps(model, seen(model, china)[0])
    largest = max(gate.max().item() for i in range(1, 5) for gate in maps[f'layer{i}.1.se'])
    limits, _ = bars(figures[0])
    assert limits[0] == (0, 1) and limits[1][1] >= max(1, largest)
    histograms = [ax for ax in figures[0].axes if ax.patches and ax.get_title()]
    for ax in histograms:
        assert sum(bar.get_height() for bar in ax.patches) == pytest.approx(100)
        assert ax.get_xlim() == limits[1]


def test_no_gates(models, china, tmp_path, figures):
    china.save(tmp_path / 'china.png')
    args = ['explain', str(tmp_path / 'china.png'), '--model', models['gray'], '-o', str(tmp_path / 'out')]
    assert main([*args, '--no-gates']) == 0
    assert len(panels(figures[0])) == 2 and len(figures[0].axes) == 3


def reference_grad_cam(model, x, index):
    """Grad-CAM's equations 1 and 2 relative to its maximum. (A gradient times a map, so autograd does.)"""
    features = model.forward_features(x).detach().requires_grad_()
    grad, = torch.autograd.grad(model.forward_head(features)[0, index], features)
    cam = (grad.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu().detach()
    return F.interpolate(cam / cam.max().clamp(min=1e-9), x.shape[2:], mode='bilinear')[0, 0]


@pytest.mark.parametrize('name,target,index', [
    ('cbam_resnet18', None, None), ('cbam_resnet18', 'hound', 1), ('resnet10t', 'CAT', 0), ('resnet10t', '2', 2)])
def test_grad_cam(name, target, index, models, china, tmp_path, figures, quick):
    """The last stage's, of the class that was asked for or the most probable one."""
    china.save(tmp_path / 'china.png')
    args = ['explain', str(tmp_path / 'china.png'), '--model', models[name], '-o', str(tmp_path / 'out')]
    assert main(args + ([] if target is None else ['--target', target])) == 0
    model = timm.create_model(models[name], pretrained=True).eval()
    x, _ = seen(model, china)
    expected = reference_grad_cam(model, x, model(x).argmax() if index is None else index)
    cam = next(shown[1] for title, shown in panels(figures[0]).items() if title.startswith(name))
    np.testing.assert_allclose(cam, expected, atol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize('target,text,value', [
    ('cat', 'pixel cat > 99.9 %', 1), ('7', 'pixel 7 < 0.1 % no positive evidence', 0)])
def test_extremes(target, text, value, models, china, tmp_path, figures, quick):
    """A last map of one pixel; a class that nothing speaks for; probabilities that would be rounded to 0 and 1."""
    china.save(tmp_path / 'china.png')
    args = ['explain', str(tmp_path / 'china.png'), '--model', models['pixel'], '-o', str(tmp_path / 'out')]
    assert main([*args, '--target', target]) == 0
    np.testing.assert_array_equal(panels(figures[0])[text][1], np.full((32, 32), value))


def test_class_names(models, china, tmp_path, figures, quick):
    """ImageNet's from timm, indices where there are no names; the gates of a plain ResNet are left out."""
    china.save(tmp_path / 'china.png')
    args = ['explain', str(tmp_path / 'china.png'), '-o', str(tmp_path / 'out'), '--model']
    assert main([*args, models['imagenet'], '--target', 'tabby']) == 0
    assert titles(figures[0])[1].startswith('imagenet tabby 0.') and len(titles(figures[0])) == 2
    assert main([*args, models['gray'], '--target', '3']) == 0
    assert titles(figures[1])[1].startswith('gray class 3 ')


def words(figure):
    return [text for text in figure.findobj(lambda artist: hasattr(artist, 'get_fontsize')) if text.get_text()]


@pytest.mark.parametrize('name,compare,args,lines', [
    ('cbam_resnet18', [], [], 2), ('wide', ['wide', 'cbam_resnet18'], [], 2), ('pixel', [], [], 2),
    ('cbam_resnet18', ['resnet18', 'gray', 'wide', 'pixel', 'resnet10t', 'imagenet'], [], 3),
    ('wide', [], ['--no-gates'], 1), ('wide', ['resnet10t'] * 3, ['--grid'], 2), ('gray', ['pixel'], ['--grid'], 2)])
def test_layout(name, compare, args, lines, models, china, tmp_path, figures):
    """Everything is inside, nothing covers anything else, no space is empty, and letters can be read when the figure is
    800 pixels wide."""
    china.save(tmp_path / 'a.png')
    china.crop((0, 0, 200, 400)).save(tmp_path / 'b.png')
    images = [str(tmp_path / 'a.png'), *([str(tmp_path / 'b.png')] if args == ['--grid'] else [])]
    output = tmp_path / 'out.png'
    command = ['explain', *images, '--model', models[name], '-o', str(output), *args]
    assert main([*command, *(['--compare', *(models[other] for other in compare)] if compare else [])]) == 0
    figure, = figures
    figure.dpi = 200  # as it was saved
    boxes = [
        artist.get_tightbbox() for artist in [*figure.axes, *figure.texts]
        if not hasattr(artist, 'get_text') or artist.get_text()]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        for other in boxes[:i]:
            width = min(box.x1, other.x1) - max(box.x0, other.x0)
            height = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert width <= 1 or height <= 1
    assert min(text.get_fontsize() for text in words(figure)) / 72 * 800 / figure.get_figwidth() >= 11
    rows = {round(ax.get_position().y1, 3) for ax in figure.axes if ax.images}
    assert len(rows) == lines
    with Image.open(output) as image:
        ink = np.asarray(image.convert('L')) < 250
    assert image.height < 1.4 * image.width
    empty = ''.join('.' if row.any() else ' ' for row in ink)
    assert max(map(len, empty.split('.'))) < 40  # 0.2 inches
    columns = np.flatnonzero(ink.any(0))
    assert columns[0] < 150 and columns[-1] > 1450


@pytest.mark.parametrize('images,compare', [(2, 2), (10, 1)])
def test_grid(images, compare, models, china, tmp_path, figures, capsys, quick):
    """Images by models, the baseline first, without gates; what fails is left out."""
    names = [f'image {i}' for i in range(images)]
    for i, name in enumerate(names):
        china.rotate(10 * i).save(tmp_path / f'{name}.png')
    (tmp_path / 'broken.png').touch()
    files = [str(tmp_path / f'{name}.png') for name in [*names[:1], 'broken', *names[1:]]]
    order = ['resnet18', 'resnet10t', 'cbam_resnet18'][-1 - compare:]
    output = tmp_path / 'out'
    args = ['--model', models['cbam_resnet18'], '--compare', *(models[name] for name in order[:-1])]
    assert main(['explain', *files, *args, '--grid', '-o', str(output), '--target', 'cat']) == 1
    out, err = capsys.readouterr()
    assert out == f'{output}/grid.png\n' and [p.name for p in output.iterdir()] == ['grid.png']
    assert sum('broken.png: cannot be read as an image' in line for line in err.splitlines()) == 1
    assert err.splitlines()[-1] == f'timm-cbam: error: 1 of {images + 1} images failed, see above'

    figure, = figures
    axes = [ax for ax in figure.axes if ax.images]
    assert len(axes) == images * (2 + compare)
    rows = {}
    for ax in axes:
        rows.setdefault(round(ax.get_position().y1, 3), []).append(ax)
    rows = [sorted(row, key=lambda ax: ax.get_position().x0) for _, row in sorted(rows.items(), reverse=True)]
    if images < 2 + compare:  # an image in each row
        by_image = rows
        labels = [t.get_text().replace('\n', ' ') for t in figure.texts][1:-1]
        assert labels == names
    else:
        height = 2 + compare
        by_image = [
            list(column) for i in range(0, len(rows), height) for column in zip(*rows[i:i + height], strict=True)]
        assert [column[0].get_title() for column in by_image] == names
        labels = [t.get_text().replace('\n', '') for t in figure.texts if t.get_text()]
        assert labels == [*order] * (len(rows) // height) + ['Grad-CAM, relative to its own maximum']
    loaded = [timm.create_model(models[name], pretrained=True).eval() for name in order]
    for i, (ax, *explained) in enumerate(by_image):
        for ax, model in zip(explained, loaded, strict=True):
            x, colors = seen(model, china.rotate(10 * i))
            np.testing.assert_allclose(ax.images[0].get_array(), colors, atol=1e-6)
            cam = reference_grad_cam(model, x, 0)
            np.testing.assert_allclose(ax.images[1].get_array(), cam, atol=1e-5)
            percent = 100 * model(x).softmax(1)[0, 0]
            expected = ['cat', '< 0.1 %' if percent < 0.1 else '> 99.9 %' if percent > 99.9 else f'{percent:.1f} %']
            expected += [] if cam.any() else ['no positive evidence']
            assert ax.get_title().replace('\n', ' ').endswith(' '.join(expected))
    assert bars(figure)[0] == [(0, 1)]


@pytest.mark.parametrize('args,message', [
    (['--target', 'cow'], "cbam_resnet18 has no class 'cow'; choose by an index from 0 to 2, or a name such as 'cat'"),
    (['--target', '3'], "has no class '3'"),
    (['--model', 'MODELS/imagenet', '--target', 'crane'], "imagenet has classes 134, 517 of the name 'crane'"),
    (['--model', 'resnet0'], 'Unknown model (resnet0)'),
    (['--model', 'local-dir:nowhere'], 'local-dir:nowhere cannot be loaded: '),
    (['--model', 'MODELS/headless'], 'has no classifier'),
    (['--model', 'test_vit'], 'is no CNN whose last stage gives a map (B, C, H, W)'),
    (['-o', 'IMAGES/china.png'], 'china.png is one of the images and would be overwritten'),
    (['-o', 'IMAGES'], 'china.png is one of the images and would be overwritten'),
    (['--grid', '-o', 'IMAGES/china.png'], 'china.png is one of the images and would be overwritten'),
    (['IMAGES/../IMAGES_NAME/china.png'], 'china.png is there 2 times: name each image once'),
    (['IMAGES/china.jpg', '-o', 'out.pdf'], 'out.pdf is the name of one file, but there are 2 images: name a folder'),
    (['-o', 'IMAGES/file'], 'file is a file, choose a folder, or a name that ends in .png, .jpg'),
    *((['-o', name], f'{name} cannot be written, choose a name that ends in .png, .jpg, .jpeg, .webp, .tif, .tiff, '
        f'.pdf, .svg, or {name}/ for a folder') for name in (
        'out.bmp', 'out.gif', 'out.eps', 'out.raw', 'out.png.gz', 'run.1')),
])
def test_bad_arguments(args, message, models, china, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules['timm_cbam.subject'], 'is_model_pretrained', lambda name: False)  # no download
    monkeypatch.chdir(tmp_path)
    china.save(tmp_path / 'china.png')
    china.save(tmp_path / 'china.jpg')
    (tmp_path / 'file').touch()
    folder = models['imagenet'].rpartition('/')[0]
    replace = {'IMAGES_NAME': tmp_path.name, 'IMAGES': str(tmp_path), 'MODELS': folder}
    for name, value in replace.items():
        args = [arg.replace(name, value) for arg in args]
    defaults = ['--model', models['cbam_resnet18']] * ('--model' not in args)
    defaults += ['-o', str(tmp_path / 'out')] * ('-o' not in args)
    assert main(['explain', str(tmp_path / 'china.png'), *args, *defaults]) == 1
    assert message in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {'china.png', 'china.jpg', 'file'}


@pytest.mark.parametrize('name,start', [
    ('a.png', b'\x89PNG'), ('a.JPG', b'\xff\xd8'), ('a.jpeg', b'\xff\xd8'), ('a.webp', b'RIFF'), ('a.tif', b'II*'),
    ('a.tiff', b'II*'), ('a.pdf', b'%PDF'), ('a.svg', b'<?xml'), ('run.1/china.png', b'\x89PNG'),
    ('old.2/china.png', b'\x89PNG')])
def test_outputs(name, start, models, china, tmp_path, capsys, quick):
    china.save(tmp_path / 'china.png')
    (tmp_path / 'old.2').mkdir()
    output = str(tmp_path / name)
    if '/' in name:
        output = output.removesuffix('china.png').removesuffix('/' if 'old' in name else '')
    assert main(['explain', str(tmp_path / 'china.png'), '--model', models['gray'], '-o', output]) == 0
    assert capsys.readouterr().out == f'{tmp_path / name}\n'
    assert (tmp_path / name).read_bytes().startswith(start)


def test_kinds_of_images(models, china, tmp_path, figures, capsys, recwarn, quick):
    """Each is read right or reported, and the others go on."""
    small = china.resize((96, 96))
    gray = small.convert('L')
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    small.save(tmp_path / 'jpeg.jpg', quality=95)
    small.save(tmp_path / 'webp.webp', lossless=True)
    gray.save(tmp_path / 'gray.png')
    small.convert('RGBA').save(tmp_path / 'rgba.png')
    small.quantize(16).save(tmp_path / 'palette.png', transparency=bytes(range(16)))
    small.transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'turned.png', exif=exif)
    for name, dtype, factor in [
            ('sixteen.png', 'uint16', 257), ('integers.tif', 'int32', 257), ('float.tif', 'float32', 1 / 255),
            ('float255.tif', 'float32', 1), ('integers8.tif', 'int32', 1)]:
        Image.fromarray((np.asarray(gray, dtype=float) * factor).astype(dtype)).save(tmp_path / name)
    small.convert('CMYK').save(tmp_path / 'cmyk.jpg')
    Image.new('RGB', (1, 1), 'red').save(tmp_path / 'dot.png')
    good = [p.name for p in tmp_path.iterdir()]
    data = (tmp_path / 'gray.png').read_bytes()
    (tmp_path / 'half.png').write_bytes(data[:len(data) // 2])
    (tmp_path / 'text.png').write_text('no image')
    (tmp_path / 'empty.png').touch()
    Image.new('L', (10000, 1)).save(tmp_path / 'thread.png')
    Image.new('1', (20000, 10000)).save(tmp_path / 'bomb.png')
    for name, value in dict(nan=np.nan, physical=1e4, overshoot=1.02, negative=-1).items():
        Image.fromarray(np.full((9, 9), value, 'float32')).save(tmp_path / f'{name}.tif')
    Image.fromarray(np.full((9, 9), 70000, 'int32')).save(tmp_path / 'deep.tif')
    reasons = {
        'half.png': 'truncated', 'text.png': 'cannot identify', 'empty.png': 'cannot identify',
        'missing.png': 'No such file', 'thread.png': 'is too narrow: 10000 x 1 pixels',
        'bomb.png': 'is too large, make it smaller (Image size (200000000 pixels) exceeds limit',
        'nan.tif': 'has pixels from nan to nan',
        'physical.tif': 'has pixels from 10000 to 10000, what can be shown are 0 to 255: scale them',
        'overshoot.tif': 'has pixels from 1.02 to 1.02, what can be shown are 0 to 1: scale them',
        'negative.tif': 'has pixels from -1 to -1', 'deep.tif': 'are 0 to 65535: scale them'}
    assert {p.name for p in tmp_path.iterdir()} == {*good, *reasons} - {'missing.png'}

    files = [str(tmp_path / name) for name in [*list(reasons)[:3], *good, *list(reasons)[3:]]]
    args = ['--model', models['resnet10t'], '-o', str(tmp_path / 'out'), '--target', 'hound']
    assert main(['explain', *files, *args]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{tmp_path / 'out'}/{name.split('.')[0]}.png" for name in good]
    assert {p.stem for p in (tmp_path / 'out').iterdir()} == {name.split('.')[0] for name in good}
    assert err.splitlines()[-1] == f'timm-cbam: error: {len(reasons)} of {len(files)} images failed, see above'
    assert '100%' in err  # the progress bar
    for name, reason in reasons.items():
        assert sum(f'{name}: ' in line and reason in line for line in err.splitlines()) == 1
    assert 'Warning' not in err and not recwarn

    inputs, texts = {}, {}
    for figure in figures:
        name, explained = titles(figure)
        inputs[name.split('.')[0]] = (255 * figure.axes[0].images[0].get_array()).round()
        texts[name.split('.')[0]] = explained
    expected = np.asarray(small)
    for name in ('webp', 'rgba', 'turned'):
        np.testing.assert_array_equal(inputs[name], expected)
    for name in ('gray', 'sixteen', 'integers', 'integers8', 'float', 'float255'):
        np.testing.assert_array_equal(inputs[name], np.asarray(gray.convert('RGB')))
        assert texts[name] == texts['gray']
    for name in ('jpeg', 'cmyk'):
        assert np.abs(inputs[name] - expected).mean() < 5
    np.testing.assert_array_equal(inputs['dot'], np.broadcast_to([255, 0, 0], (96, 96, 3)))


def test_large_image(models, china, tmp_path, monkeypatch, recwarn, quick):
    """One that Pillow would warn of."""
    china.resize((96, 96)).save(tmp_path / 'china.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 5000)
    assert main(['explain', str(tmp_path / 'china.png'), '--model', models['gray'], '-o', str(tmp_path / 'out')]) == 0
    assert not recwarn


def test_printed_when_finished(models, china, tmp_path, monkeypatch, capsys, quick):
    """And the lines of images that fail, one each."""
    module = sys.modules['timm_cbam.explain']
    read_image = module.read_image
    printed = []

    def read(path):
        printed.append(capsys.readouterr())
        if path.endswith('b.png'):
            raise ValueError('two\nlines')
        return read_image(path)

    monkeypatch.setattr(module, 'read_image', read)
    files = [str(tmp_path / f'{name}.png') for name in 'abc']
    for file in files:
        china.save(file)
    assert main(['explain', *files, '--model', models['gray'], '-o', str(tmp_path / 'out')]) == 1
    printed.append(capsys.readouterr())
    assert [out for out, _ in printed] == ['', f'{tmp_path}/out/a.png\n', '', f'{tmp_path}/out/c.png\n']
    assert f'{files[1]}: two lines\n' in printed[2].err


@pytest.mark.parametrize('images,pictures', [
    (['x.png', 'y.png'], ['x', 'y']),
    (['x.png', 'x.jpg', 'y.png'], ['x.png', 'x.jpg', 'y']),
    (['a/x.png', 'b/x.png'], ['a-x.png', 'b-x.png']),
    (['a/x.png', 'a/x.jpg', 'b/x.png', 'b/X.gif', 'x.jpg.png'], [
        'a-x.png', 'a-x.jpg', 'b-x.png', 'X.gif', 'FOLDER-x.jpg.png']),
])
def test_images_of_one_stem(images, pictures, models, china, tmp_path, quick):
    for image in images:
        (tmp_path / image).parent.mkdir(exist_ok=True)
        china.resize((96, 96)).save(tmp_path / image)
    command = ['explain', *(str(tmp_path / image) for image in images), '--model', models['gray'], '--no-gates']
    assert main([*command, '-o', str(tmp_path / 'out')]) == 0
    expected = {f'{name}.png'.replace('FOLDER', tmp_path.name) for name in pictures}
    assert {p.name for p in (tmp_path / 'out').iterdir()} == expected


def test_models_of_one_name(models, china, tmp_path, figures, quick):
    """However deep they lie: a picture has place for some letters only."""
    deep = tmp_path / ('deep' * 50)
    for folder in 'ab':
        save_model(create('resnet10t', num_classes=3), deep / folder / 'run' / 'best', model_args={})
    china.save(tmp_path / 'china.png')
    names = [f'local-dir:{deep}/{folder}/run/best' for folder in 'ab']
    assert main(['explain', str(tmp_path / 'china.png'), '--model', names[0], '--compare', names[1], '-o',
                 str(tmp_path / 'out.png')]) == 0
    for folder, title in zip('ab', titles(figures[0])[1:], strict=True):
        assert title.replace(' ', '').startswith(f'{folder}/run/best')


@pytest.mark.parametrize('name', [
    '写真.png', 'собака.png', 'كلب.png', 'กขค.png', 'a$b$\\c.png', '🐈.png', 'two\nlines.png',
    os.fsdecode(b'caf\xe9.png'),
    'a' * 240 + '.png'])
def test_names_of_images(name, models, china, tmp_path, capsys, recwarn, quick):
    china.save(tmp_path / name)
    args = ['--model', models['gray'], '--no-gates', '-o', str(tmp_path / 'out.png')]
    assert main(['explain', str(tmp_path / name), *args]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'out.png'}\n" and not err and not recwarn


def test_matplotlibrc(models, china, tmp_path):
    """What the user's says does not matter."""
    from matplotlib import rc_context

    china.save(tmp_path / 'china.png')
    args = ['explain', str(tmp_path / 'china.png'), '--model', models['gray'], '-o']
    assert main([*args, str(tmp_path / 'default.png')]) == 0
    with rc_context({'savefig.bbox': 'tight', 'figure.autolayout': True, 'text.usetex': True, 'font.size': 30}):
        assert main([*args, str(tmp_path / 'other.png')]) == 0
    with Image.open(tmp_path / 'default.png') as default, Image.open(tmp_path / 'other.png') as other:
        np.testing.assert_array_equal(default, other)


def test_ascii(models, china, tmp_path, monkeypatch, quick):
    """Paths are printed where the terminal does not have their letters, too."""
    out = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    monkeypatch.setattr(sys, 'stdout', out)
    files = [str(tmp_path / '写真.png'), str(tmp_path / 'dog.png')]
    for file in files:
        china.save(file)
    assert main(['explain', *files, '--model', models['gray'], '-o', str(tmp_path / 'out')]) == 0
    folder = tmp_path / 'out'
    assert out.buffer.getvalue().decode() == f'{folder}/\\u5199\\u771f.png\n{folder}/dog.png\n'
    assert {p.name for p in folder.iterdir()} == {'写真.png', 'dog.png'}


def test_nan(models, china, tmp_path, capsys):
    china.save(tmp_path / 'china.png')
    command = ['explain', str(tmp_path / 'china.png'), '--model', models['nan'], '-o', str(tmp_path / 'out')]
    assert main(command) == 1
    assert 'china.png: nan gives NaN or infinities for it\n' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


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
