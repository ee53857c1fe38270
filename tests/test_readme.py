"""Every snippet of the README runs, but those that CI itself is made of and those that need files of timm's"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from hub_server import HubServer

README = (Path(__file__).parents[1] / 'README.md').read_text()


def snippets(language):
    return re.findall(rf'```{language}\n(.*?)```', README, re.DOTALL)


def run(command, cwd, **env):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, 'PATH': path, 'PAGER': 'cat', **env})
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_python(tmp_path):
    code = '\n'.join(snippets('python'))
    code += '''
assert logits.shape == (2, 10) and len(features) == 3 and y.shape == (2, 64, 56, 56)
assert model.layer1[0].se.parallel and model.layer1[0].se.channel.fc1.out_channels == 8
'''
    with HubServer() as hub:
        run([sys.executable, '-c', code], tmp_path, HF_HOME=str(tmp_path / 'hf'), **hub.env)
        assert 'model.safetensors' in hub.repos['me/my-cbam']['main']


def test_shell(tmp_path):
    blocks = snippets('bash')
    assert len(blocks) == 3
    for line in '\n'.join(blocks).splitlines():
        if line and not line.startswith('pip install'):  # that one is CI; the demo has tests of its own
            run([shutil.which('bash'), '-c', line], tmp_path)  # on Windows not WSL's


def names_in(row):
    """Pattern of the models in a table's row, which has their names in a shell's short form."""
    return re.sub(r'{(.*?)}', lambda m: f"({m[1].replace(',', '|').replace('...', '.*')})", row.split('`')[1])


def test_figures(tmp_path):
    table = run(['timm-cbam', 'list'], tmp_path)
    for line in table.splitlines()[1:]:
        name, parameters, gmacs = line.split()[:3]
        row, = (r for r in README.splitlines() if r.startswith('| `') and re.fullmatch(names_in(r), name))
        assert f"{int(parameters.replace(',', '')) / 1e6:.1f}" in row and gmacs in row
