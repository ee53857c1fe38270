"""Killed, out of space, not permitted, a Hub that fails: what was written is whole or absent, and a retry works"""
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import timm
import torch
from helpers import run
from hub_server import HubServer

from timm_cbam.hub import save_model

resource = pytest.importorskip('resource')  # limits on what a process may write, not on Windows

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


LOAD = """
    import timm, torch
    model = timm.create_model('hf-hub:me/my-cbam', pretrained=True).eval()
    print(model(torch.ones(1, 3, 32, 32)).flatten().tolist())
"""
PUSH = [sys.executable, str(Path(__file__).parents[1] / 'scripts' / 'push_to_hub.py')]


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A folder with a model, and what LOAD prints for it."""
    folder = tmp_path_factory.mktemp('saved') / 'my-cbam'
    model = timm.create_model('cbam_resnet18_s1', num_classes=10).eval()
    save_model(model, folder)
    return folder, f'{model(torch.ones(1, 3, 32, 32)).flatten().tolist()}\n'


@pytest.fixture
def hub(saved, tmp_path):
    with HubServer() as hub:
        hub.env.update(HF_HOME=str(tmp_path / 'hf'), HF_HUB_DOWNLOAD_TIMEOUT='2', HF_HUB_ETAG_TIMEOUT='2')
        hub.commit('me/my-cbam', {p.name: hub.store(p.read_bytes()) for p in saved[0].iterdir()})
        yield hub


def cached(hub):
    """Contents of the large files that the client has put where it looks for them."""
    return [p.read_bytes() for p in Path(hub.env['HF_HOME']).glob('hub/models--*/snapshots/*/*.safetensors')]


@pytest.mark.parametrize('request_,fault', [
    ('resolve', '500'), ('resolve', 'hang'), ('blob', '500'), ('blob', 'hang'), ('blob', 'cut'), ('blob', 'short')])
def test_download(hub, saved, request_, fault):
    """The client retries or gives up with an error. No weights are loaded that are not whole."""
    folder, logits = saved
    whole = (folder / 'model.safetensors').read_bytes()
    hub.faults[request_] = fault
    first = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(LOAD)], capture_output=True, text=True, env={**os.environ, **hub.env})
    assert not hub.faults
    assert first.stdout == ('' if first.returncode else logits) and cached(hub) in ([], [whole]), first.stderr
    assert run(LOAD, **hub.env) == logits and cached(hub) == [whole]


def test_download_of_other_bytes(hub, saved):
    """huggingface_hub does not compare hashes when it loads, timm neither, but its check of the cache finds it."""
    hub.faults['blob'] = 'lie'
    run(LOAD, **hub.env)
    verify = """
        from huggingface_hub import HfApi
        print([m['path'] for m in HfApi().verify_repo_checksums('me/my-cbam').mismatches])
    """
    assert run(verify, **hub.env) == "['model.safetensors']\n"
    for p in Path(hub.env['HF_HOME']).glob('hub/models--*/blobs/*'):
        p.unlink()
    assert run(LOAD, **hub.env) == saved[1] and run(verify, **hub.env) == '[]\n'


@pytest.mark.parametrize('request_', ['create_repo', 'preupload', 'lfs_batch', 'upload', 'commit'])
@pytest.mark.parametrize('fault', ['500', 'hang and kill'])
def test_push(hub, saved, tmp_path, request_, fault):
    """The Hub has the whole of the old model or of the new one."""
    folder, old = saved
    torch.manual_seed(1)
    model = timm.create_model('cbam_resnet18_s1', num_classes=10).eval()
    save_model(model, tmp_path / 'new')
    new = f'{model(torch.ones(1, 3, 32, 32)).flatten().tolist()}\n'
    command = [*PUSH, str(tmp_path / 'new'), 'me/my-cbam', '--license', 'mit']
    hub.faults[request_] = fault.split()[0]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **hub.env})
    if fault == '500':
        process.communicate()
    else:
        while hub.faults:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.kill()
        process.communicate()
    assert not hub.faults
    assert run(LOAD, **hub.env) == (new if process.returncode == 0 else old)
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **hub.env})
    assert run(LOAD, **hub.env) == new
