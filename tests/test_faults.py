"""Killed, out of space, not permitted: what is on disk afterwards is whole or absent, and a retry works"""
import resource
import subprocess
import sys
import time

import pytest
import timm
import torch

pytestmark = pytest.mark.slow

COMMANDS = {  # arguments behind `timm-cbam`, with the place of what they write
    'convert': ['convert', 'resnet18.pth', '{dst}'],
    'demo': ['demo', '--epochs', '1', '--output', '{dst}'],
}


def start(command, folder, dst='dst', **kwargs):
    if not (folder / 'resnet18.pth').exists():
        torch.save(timm.create_model('resnet18', num_classes=10).state_dict(), folder / 'resnet18.pth')
    args = [arg.format(dst=dst) for arg in COMMANDS[command]]
    return subprocess.Popen(
        [sys.executable, '-m', 'timm_cbam.cli', *args], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, **kwargs)


def check_whole(folder):
    assert {'config.json', 'model.safetensors'} <= {p.name for p in folder.iterdir()}
    assert timm.create_model(f'local-dir:{folder}', pretrained=True).num_classes == 10


@pytest.mark.parametrize('command', COMMANDS)
def test_killed(command, tmp_path):
    begin = time.monotonic()
    start(command, tmp_path).communicate()
    seconds = time.monotonic() - begin
    check_whole(tmp_path / 'dst')
    killed = 0
    for i, part in enumerate((0.3, 0.6, 0.9)):
        process = start(command, tmp_path, f'dst{i}')
        try:
            process.communicate(timeout=part * seconds)
        except subprocess.TimeoutExpired:
            process.kill()  # SIGKILL
            process.communicate()
            killed += 1
        if (tmp_path / f'dst{i}').exists():
            check_whole(tmp_path / f'dst{i}')
    assert killed
    _, error = start(command, tmp_path, 'dst0').communicate()
    assert (tmp_path / 'dst0').exists(), error
    check_whole(tmp_path / 'dst0')


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('limit', [100, 1 << 20])
def test_no_space(command, limit, tmp_path):
    """Files cannot grow beyond a limit, as on a disk that is full."""
    start('convert', tmp_path).communicate()  # makes the checkpoint, and what Python caches
    before = sorted(p.name for p in tmp_path.iterdir())
    process = start(
        command, tmp_path, 'none', preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, error = process.communicate()
    assert process.returncode == 1 and 'timm-cbam: error: ' in error and 'Traceback' not in error, error
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize('command', COMMANDS)
def test_no_permission(command, tmp_path):
    process = start(command, tmp_path, '/proc/nowhere/dst')  # not even root may write there
    _, error = process.communicate()
    assert process.returncode == 1 and 'timm-cbam: error: ' in error and 'Traceback' not in error, error
