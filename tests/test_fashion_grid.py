"""scripts/fashion_grid.py: that it goes on where it was stopped, and what it draws"""
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import script
from PIL import Image
from safetensors.torch import load_file
from torch import nn

SCRIPT = Path(__file__).parents[1] / 'scripts' / 'fashion_grid.py'
NETWORKS = ['ResNet-18', 'ResNet-18 + SE', 'ResNet-18 + CBAM']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A file as Fashion-MNIST's, of which classes are told by where it is bright."""
    images = np.random.default_rng(0).integers(0, 100, (210, 28, 28)).astype('uint8')
    labels = np.repeat(np.arange(10), 21).astype('uint8')
    for image, label in zip(images, labels, strict=True):
        image[14 * (label % 2):][:14, 5 * (label // 2):][:, :6] = 255
    file = tmp_path_factory.mktemp('data') / 'data.npz'
    np.savez(file, images=images, labels=labels)
    return file


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    monkeypatch.setitem(script('fashion_grid')._SETTINGS, 'batch_size', 10)

    def run(*args):
        monkeypatch.setattr(sys, 'argv', [
            str(SCRIPT), '--data', str(data), '--work', str(tmp_path / 'work'), '--output', str(tmp_path / 'grid.png'),
            '--images', '120', '--epochs', '4', *args])
        script('fashion_grid').main()

    return run


def test_networks():
    """They differ in nothing but the attention."""
    plain, se, cbam = (script('fashion_grid')._create(name)[0].eval() for name in NETWORKS)
    shared = plain.state_dict()
    for model in (se, cbam):
        assert {k: v.shape for k, v in model.state_dict().items() if '.se.' not in k} == {
            k: v.shape for k, v in shared.items()}
        for block in model.modules():
            if getattr(block, 'se', None) is not None:
                block.se = nn.Identity()
        model.load_state_dict(shared, strict=False)
    x = torch.randn(2, 1, 28, 28)
    features = [model.forward_features(x) for model in (plain, se, cbam)]
    assert features[0].shape == (2, 128, 7, 7)
    for other in features[1:]:
        torch.testing.assert_close(other, features[0])


def test_data(data):
    fashion = script('fashion')
    train, test = fashion.load(str(data))
    assert torch.equal(test[1], torch.arange(10).repeat_interleave(3)) and len(train[1]) == 180
    with np.load(data) as arrays:
        np.testing.assert_array_equal(test[0][:3], arrays['images'][18:21])
    _, labels = fashion.first(train, 5)
    assert labels.bincount().tolist() == [5] * 10


@pytest.mark.slow
def test_stopped_and_resumed(run, tmp_path, monkeypatch, capsys):
    run()
    out = capsys.readouterr().out
    assert 'trained on 120 images, 4 epochs; held-out images: 30' in out
    assert out.splitlines()[-1] == str(tmp_path / 'grid.png')
    work = tmp_path / 'work'
    with Image.open(tmp_path / 'grid.png') as image:
        assert image.width == 1600
    finished = {name: load_file(work / name / 'model.safetensors') for name in NETWORKS}

    for folder in (*NETWORKS, 'images'):
        for file in (work / folder).iterdir():
            file.unlink()
    (work / 'ResNet-18 + CBAM.pt').unlink()
    save, saved = torch.save, []

    def interrupted(checkpoint, file):
        save(checkpoint, file)
        saved.append(file)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(torch, 'save', save)
    assert torch.load(work / 'ResNet-18 + CBAM.pt', weights_only=True)['epoch'] == 2  # the third was not finished
    run()
    for name, state_dict in finished.items():
        again = load_file(work / name / 'model.safetensors')
        assert all(torch.equal(again[k], v) for k, v in state_dict.items())
    model = timm.create_model(f"local-dir:{work / 'ResNet-18 + CBAM'}", pretrained=True)
    assert model.layer1[0].se.channel.fc1.in_channels == 16

    with pytest.raises(SystemExit):
        run('--epochs', '7')
    assert 'choose another --work, or remove it' in capsys.readouterr().err


@pytest.mark.parametrize('args,message', [
    (['--images', '9'], '--images is 9, must be 10 or more'), (['--epochs', '0'], '--epochs is 0, must be 1 or more'),
    (['--data', 'nowhere.npz'], '--data nowhere.npz cannot be read: '),
    (['--output', 'grid.bmp'], '--output grid.bmp must end in .png, .jpg')])
def test_refused(args, message, run, capsys):
    with pytest.raises(SystemExit):
        run(*args)
    assert message in capsys.readouterr().err
