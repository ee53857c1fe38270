import json
import os
import re
import signal
import subprocess
import sys

import pytest
import timm
import torch

from timm_cbam.cli import main

FILES = {'config.json', 'model.safetensors', 'demo.png'}


def accuracies(text):
    return [float(a) for a in re.findall(r'epoch \d+/\d+: ([\d.]+) % of the held-out digits right', text)]


def test_one_epoch(tmp_path, capsys):
    """Everything but the accuracy; also that a second run replaces the first, and that the seed decides."""
    weights = []
    name = 'cbam_resnet18'  # on images of 16 pixels its stem makes it much faster than the default
    for seed in (1, 1, 2):
        args = ['--epochs', '1', '--model', name, '--seed', str(seed), '--output', str(tmp_path / 'out')]
        assert main(['demo', *args]) == 0
        assert {p.name for p in (tmp_path / 'out').iterdir()} == FILES
        weights.append((tmp_path / 'out' / 'model.safetensors').read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert [p.name for p in tmp_path.iterdir()] == ['out']
    assert (tmp_path / 'out' / 'demo.png').read_bytes().startswith(b'\x89PNG')

    out, err = capsys.readouterr()
    assert len(accuracies(out)) == 3 and 'the same after reloading' in out
    assert 'loss=' in err and 'acc=' in err  # the progress bar
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert model(torch.randn(1, 1, 16, 16)).shape == (1, 10)
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['architecture'] == name
    assert config['pretrained_cfg']['label_names'] == [str(i) for i in range(10)]


@pytest.mark.slow
def test_reads_digits(tmp_path, capsys):
    assert main(['demo', '--output', str(tmp_path / 'out')]) == 0
    assert accuracies(capsys.readouterr().out)[-1] >= 97


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no SIGINT that a process can send')
def test_interrupted(tmp_path):
    process = subprocess.Popen(
        [sys.executable, '-m', 'timm_cbam.cli', 'demo', '--epochs', '50', '--output', 'out'], cwd=tmp_path,
        stderr=subprocess.PIPE, env={**os.environ, 'PYTHONUNBUFFERED': '1'})
    while b'epoch' not in process.stderr.read1():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert b'interrupted' in process.stderr.read()
    assert process.wait() == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('args,message', [
    (['--epochs', '0'], 'argument --epochs: 0 is less than 1'),
    (['--device', 'toaster'], "argument --device: 'toaster' is no device of this machine, try cpu"),
    (['--model', 'resnet18'], "argument --model: 'resnet18' is none of cbam_resnet18, "),
    (['--seed', 'x'], "argument --seed: invalid int value: 'x'"),
])
def test_bad_arguments(args, message, capsys):
    with pytest.raises(SystemExit) as e:
        main(['demo', *args])
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_output_in_the_way(tmp_path, capsys):
    (tmp_path / 'thesis.txt').write_text('years of work')
    assert main(['demo', '--output', str(tmp_path)]) == 1
    assert 'is no model folder; remove it or choose another' in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.txt']
