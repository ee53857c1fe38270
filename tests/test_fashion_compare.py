"""scripts/fashion_compare.py: what it trains, that it goes on where it was stopped, and what it says of the results"""
import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import liven, script
from torch import nn

SCRIPTS = Path(__file__).parents[1] / 'scripts'
TRAININGS = {'scratch': 5, 'finetune': 3}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    images = np.random.default_rng(0).integers(0, 256, (140, 28, 28)).astype('uint8')
    np.savez(tmp_path / 'data.npz', images=images, labels=np.repeat(np.arange(10), 14).astype('uint8'))
    module = script('fashion_compare')
    monkeypatch.setitem(module._FINETUNE, 'shots', 4)
    monkeypatch.setattr(module, '_PRETRAIN_EPOCHS', 1)

    def run(study, *args):
        monkeypatch.setattr(sys, 'argv', ['fashion_compare.py', study, '--data', str(tmp_path / 'data.npz'), *args])
        module.main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize('study', TRAININGS)
def test_tiny_run_stopped_and_resumed(study, run, tmp_path):
    file = tmp_path / 'a.csv'
    arguments = '--seeds', '1', '--epochs', '2', '--output', str(file)
    table = run(study, *arguments)
    finished = file.read_text()
    rows = list(csv.DictReader(finished.splitlines()))
    assert len(rows) == TRAININGS[study] and all(len(row['accuracies'].split()) == 2 for row in rows)
    assert file.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
    file.write_text(finished[:-9])  # killed in the last line
    assert run(study, *arguments) == table and file.read_text() == finished


def test_networks():
    """From scratch they differ in nothing but the attention."""
    module = script('fashion_compare')
    plain = module._create('plain')
    x = torch.randn(2, 1, 28, 28)
    logits, parameters = [], []
    for network in module._NETWORKS:
        model = module._create(network)
        module._copy(plain.state_dict(), model)
        logits.append(liven(model)(x))
        parameters.append(sum(p.numel() for p in model.parameters()))
        for block in model.modules():
            if getattr(block, 'se', None) is not None:
                block.se = nn.Identity()
        module._copy(plain.state_dict(), model)
        torch.testing.assert_close(model.eval()(x), plain.eval()(x))
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(logits) for b in logits[:i])
    assert min(parameters) == parameters[0] and len(set(parameters)) == len(parameters)


@torch.no_grad()
def test_ways():
    """A warm start computes what the plain network does, the default initialisation does not."""
    module = script('fashion_compare')
    plain = liven(module._create('plain', num_classes=5)).eval()
    x = torch.randn(2, 1, 28, 28)
    warm, default = module._create('CBAM', num_classes=5), module._create('CBAM', num_classes=5)
    warm.load_state_dict(plain.state_dict())
    module._copy(plain.state_dict(), default)
    torch.testing.assert_close(warm.eval()(x), plain(x))
    assert (default.eval()(x) - plain(x)).abs().max() > 1e-2


@pytest.mark.parametrize('study', TRAININGS)
def test_results_in_the_repository(study, run, monkeypatch, tmp_path):
    """They are complete, so that nothing is trained, and the printed figures, which the README has, are NumPy's."""
    monkeypatch.undo()
    committed = (SCRIPTS / f'fashion_{study}.csv').read_bytes()
    file = tmp_path / 'a.csv'
    file.write_bytes(committed)
    monkeypatch.setattr(script('fashion_compare'), 'load', None)
    table = run(study, '--output', str(file))
    assert file.read_bytes() == committed and table in (SCRIPTS / 'README.md').read_text()
    accuracies = {}
    for row in csv.DictReader(committed.decode().splitlines()):
        accuracies.setdefault(row['network'], []).append([float(a) for a in row['accuracies'].split()])
    last = {network: np.array(values)[:, -1] for network, values in accuracies.items()}
    cells = [line.strip('| ').split(' | ') for line in table.splitlines()][2:]
    by_name = {name: rest for name, *rest in cells}
    for network, values in last.items():
        column = 1 if study == 'scratch' else -1
        assert by_name[network][column] == f'{values.mean():.2f} ± {values.std(ddof=1):.2f}'
    pairs = (
        [(by_name[network][2], last[network] - last['plain']) for network in last if network != 'plain']
        if study == 'scratch' else
        [(by_name[f'{way} - plain'][-1], last[way] - last['plain']) for way in last if way != 'plain'])
    for cell, d in pairs:
        noise = scipy.stats.ttest_1samp(d, 0).pvalue >= 0.05
        assert cell == f'{d.mean():+.2f} ± {d.std(ddof=1) / len(d) ** 0.5:.2f}' + ' (within noise)' * bool(noise)


@pytest.mark.parametrize('args, message', [
    (['--seeds', '0'], '--seeds is 0, must be 1 or more'), (['--epochs', '-1'], '--epochs is -1, must be 1 or more'),
    (['--output', 'a.png'], 'must end in .csv'), (['--data', 'nowhere.npz', '--output', 'OUT'], 'nowhere.npz')])
def test_refused(args, message, run, capsys, tmp_path):
    with pytest.raises(SystemExit) as e:
        run('scratch', *[str(tmp_path / 'a.csv') if a == 'OUT' else a for a in args])
    assert e.value.code == 2 and message in capsys.readouterr().err
