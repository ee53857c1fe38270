"""scripts/ablation.py: what it trains, that it goes on where it was killed, and what it says of the results"""
import copy
import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import timm
import torch
from helpers import liven, script
from torch import nn

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / 'scripts' / 'ablation.py'
TINY = ['--seeds', '1', '--epochs', '3', '--tables', '1']


@pytest.fixture
def run(monkeypatch):
    def run(output, *args):
        monkeypatch.setattr(sys, 'argv', [str(SCRIPT), *args, '--output', str(output)])
        script('ablation').main()
    return run


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The table of a tiny run that nothing interrupted."""
    file = tmp_path_factory.mktemp('finished') / 'a.csv'
    subprocess.run([sys.executable, SCRIPT, *TINY, '--output', file], check=True)
    assert {p.name for p in file.parent.iterdir()} == {'a.csv', 'a.png'}
    assert file.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
    return file.read_bytes()


def test_tiny_run(finished):
    rows = list(csv.DictReader(finished.decode().splitlines()))
    assert [row['kind'] for row in rows] == [
        'no attention', 'channel avg (as in SE)', 'channel max', 'channel avg & max']
    assert rows[0]['error'] not in [row['error'] for row in rows[1:]]  # attention has had an effect


def test_half_a_line(finished, tmp_path, run):
    file = tmp_path / 'a.csv'
    file.write_bytes(finished[:-9])
    run(file, *TINY)
    assert file.read_bytes() == finished


def test_killed(finished, tmp_path, run):
    file = tmp_path / 'a.csv'
    process = subprocess.Popen([sys.executable, SCRIPT, *TINY, '--output', file])
    while not file.exists() or file.read_bytes().count(b'\n') < 3:
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert len(file.read_bytes()) < len(finished)
    run(file, *TINY)
    assert file.read_bytes() == finished


@pytest.mark.parametrize('content, args, message', [
    (None, ['--epochs', '4'], 'made with epochs=3, not 4; choose another --output'),
    (b'way,seed,epoch,accuracy\n', [], 'no table of this script; choose another --output'),
    (b'\x89PNG\xff', [], 'no table of this script; choose another --output'),
    (b'', ['--seeds', '0'], '--seeds is 0, must be 1 or more'),
    (b'', ['--epochs', '-1'], '--epochs is -1, must be 1 or more'),
])
def test_refused(finished, tmp_path, run, capsys, content, args, message):
    file = tmp_path / 'a.csv'
    content = finished if content is None else content
    file.write_bytes(content)
    with pytest.raises(SystemExit) as e:
        run(file, *TINY, *args)
    assert e.value.code == 2 and message in capsys.readouterr().err
    assert file.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == ['a.csv']


def test_output_is_csv(tmp_path, run, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / 'a.png', *TINY)
    assert 'must end in .csv' in capsys.readouterr().err and os.listdir(tmp_path) == []


def test_kinds():
    """Without attention the network is timm's ResNet; with, the kinds differ in nothing but the attention."""
    ablation = script('ablation')
    x = torch.randn(2, 1, 16, 16)
    models = {kind: ablation._create(cbam_args, 0) for kind, (cbam_args, _) in ablation._KINDS.items()}
    shared = copy.deepcopy(models['no attention'].state_dict())
    plain = timm.create_model('resnet18', num_classes=10, in_chans=1, channels=(16, 32, 64, 128))
    plain.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    plain.maxpool = nn.Identity()
    plain.load_state_dict(shared)

    logits = []
    for model in models.values():
        state_dict = model.state_dict()
        assert all(torch.equal(state_dict[k], v) for k, v in shared.items())
        assert all('.se.' in k for k in state_dict.keys() - shared.keys())
        logits.append(liven(model)(x).detach())
    assert torch.equal(liven(plain)(x), logits[0])
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(logits) for b in logits[:i])


def test_tables(tmp_path, run, capsys):
    """The results in the repository: complete, so that nothing is trained, and the printed figures are NumPy's."""
    file = tmp_path / 'a.csv'
    committed = SCRIPT.with_suffix('.csv').read_bytes()
    file.write_bytes(committed)
    run(file)
    assert file.read_bytes() == committed
    tables = capsys.readouterr().out.split('Table ')[1:]
    assert len(tables) == 3
    errors = {}
    for row in csv.DictReader(committed.decode().splitlines()):
        errors.setdefault(row['kind'], []).append(float(row['error']))
    shown = set()
    for table in tables:
        rows = [line.strip('| ').split(' | ') for line in table.splitlines() if line.startswith('|')][2:]
        choice, = (np.array(errors[kind]) for kind, _, difference, *_ in rows if difference == "the paper's choice")
        for kind, error, difference, *_ in rows:
            shown.add(kind)
            values = np.array(errors[kind])
            assert error == f'{values.mean():.2f} ± {values.std(ddof=1):.2f}'
            if difference != "the paper's choice":
                d = values - choice
                noise = scipy.stats.ttest_1samp(d, 0).pvalue >= 0.05
                expected = f'{d.mean():+.2f} ± {d.std(ddof=1) / len(d) ** 0.5:.2f}'
                assert difference == expected + ' (within noise)' * bool(noise)
    assert shown == errors.keys() and all(len(values) == 5 for values in errors.values())
