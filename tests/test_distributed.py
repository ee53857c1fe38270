"""scripts/distributed.py, which the README shows: two processes give the losses and weights of one"""
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

pytestmark = pytest.mark.slow

SCRIPT = str(Path(__file__).parents[1] / 'scripts' / 'distributed.py')
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', SCRIPT]
COMMANDS = {
    'ddp': [*TORCHRUN, 'ddp'],
    'fsdp2': [*TORCHRUN, 'fsdp2'],
    'accelerate': ['-m', 'accelerate.commands.launch', '--cpu', '--num_processes', '2', SCRIPT, 'accelerate'],
    'lightning': [SCRIPT, 'lightning', '--processes', '2'],
}


def train(command, file):
    """Losses and state dict."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    result = subprocess.run(
        [sys.executable, *command, '--save', str(file)], capture_output=True, text=True, env=env, cwd=file.parent)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith('[')]
    assert len(lines) == 1, result.stdout
    return json.loads(lines[0]), torch.load(file, weights_only=True)


@pytest.fixture(scope='module')
def single(tmp_path_factory):
    """What one process gives, by the options of the script."""
    @functools.cache
    def run(*options):
        losses, state_dict = train([SCRIPT, 'single', *options], tmp_path_factory.mktemp('single') / 'model.pth')
        assert len(losses) == 20 and sum(losses[-5:]) < 0.8 * sum(losses[:5])
        return losses, state_dict

    return run


def check(command, expected, file):
    losses, _ = train(command, file)
    assert losses == pytest.approx(expected[0], abs=1e-5)
    model = timm.create_model(
        'cbam_resnet18_s1', num_classes=10, in_chans=1, channels=(16, 32, 64, 128), checkpoint_path=str(file))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, expected[1][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('tool', COMMANDS)
def test_as_in_one_process(tool, single, tmp_path):
    check([*COMMANDS[tool], '--freeze-norms'], single('--freeze-norms'), tmp_path / 'model.pth')


@pytest.mark.parametrize('tool', ['ddp', 'fsdp2', 'lightning'])
def test_norms_of_shares(tool, single, tmp_path):
    """Batch-norms see a process's share of the batch. Not with accelerate, which deals out other shares."""
    check(COMMANDS[tool], single('--shares', '2'), tmp_path / 'model.pth')
