"""Every snippet of the README runs, but those that CI itself is made of and those that need files of timm's"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from hub_server import HubServer

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
LINK = r'\[[^]]*\]\((.*?)\)'


def snippets(language):
    return re.findall(rf'```{language}\n(.*?)```', README, re.DOTALL)


def run(command, cwd, **env):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, 'PATH': path, 'PAGER': 'cat', **env})
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_python(tmp_path):
    """Each snippet on its own, as somebody copies it."""
    code = ''.join(f"exec({snippet!r}, {{'__name__': '__main__'}})\n" for snippet in snippets('python'))
    with HubServer() as hub:
        run([sys.executable, '-c', code], tmp_path, HF_HOME=str(tmp_path / 'hf'), **hub.env)
        assert 'model.safetensors' in hub.repos['me/my-cbam']['main']


def test_shell(tmp_path):
    blocks = snippets('bash')
    assert len(blocks) == 3
    for line in '\n'.join(blocks).splitlines():
        if line and not line.startswith('pip install'):  # that one is CI; the demo has tests of its own
            run([shutil.which('bash'), '-c', line], tmp_path)  # on Windows not WSL's


def test_figures(tmp_path):
    rows = {r.split('`')[1]: r.split('|')[2:-1] for r in README.splitlines() if r.startswith('| `cbam_')}
    for line in run(['timm-cbam', 'list'], tmp_path).splitlines()[1:]:
        name, parameters, gmacs = line.split()[:3]
        base, column = name.removesuffix('_eccv18').removesuffix('_s1'), ('_eccv18' in name) + 2 * ('_s1' in name)
        cell = rows[base][column]
        assert cell.strip() == f"{int(parameters.replace(',', '')) / 1e6:.1f} M, {gmacs}"


@pytest.mark.parametrize('repository', ['https://github.com/me/timm-cbam', None])
def test_links(repository, monkeypatch):
    """In the repository to files that there are, on a package index to their addresses in the repository."""
    local = [link for link in re.findall(LINK, README) if not link.startswith(('https:', '#'))]
    assert len(local) > 3 and all((ROOT / link).exists() for link in local)
    sections = {re.sub(r'[^a-z -]', '', title.lower()).replace(' ', '-') for title in re.findall(r'\n## (.*)', README)}
    assert sections.issuperset(link[1:] for link in re.findall(LINK, README) if link.startswith('#'))

    if repository is None:
        monkeypatch.delenv('TIMM_CBAM_REPOSITORY', raising=False)
    else:
        monkeypatch.setenv('TIMM_CBAM_REPOSITORY', repository)
    text = ProjectMetadata(str(ROOT), PluginManager()).core.readme
    if repository is None:
        assert text == README
    else:
        links = re.findall(LINK, text)
        assert all(link.startswith(('https:', '#')) for link in links)
        for link in local:
            assert any(f'{repository}/{kind}/HEAD/{link}' in links for kind in ('blob', 'raw'))
