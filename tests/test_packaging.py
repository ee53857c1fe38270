"""Install as a user does, into a new virtual environment; uninstall; look"""
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from environment import COUNT, MODELS, Environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STARTUP = {'_timm_cbam_autoload.py', '_timm_cbam_loader.py', 'timm_cbam_autoload.pth', 'timm_cbam_autoload.start'}


def pip(env: Environment, *args: str):
    """pip of the test's own Python, for the environment: one without pip is made in no time."""
    subprocess.run([sys.executable, '-m', 'pip', '--python', str(env.python), *args], check=True)


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    command = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '-w', str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    return next(folder.glob('*.whl'))


def test_wheel_has_what_it_should(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n for n in names if '/' not in n} == STARTUP
    startup = ROOT / 'timm_cbam' / 'startup'
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / 'timm_cbam').rglob('*.py') if p.parent != startup}
    info = f"{wheel.name.split('-py3')[0]}.dist-info"
    metadata = {f'{info}/{name}' for name in ('METADATA', 'WHEEL', 'RECORD', 'entry_points.txt', 'licenses/LICENSE')}
    assert set(names) == STARTUP | modules | metadata | {'timm_cbam/py.typed'}


def test_sdist_has_what_it_should(tmp_path):
    """All that this folder has but what was made in it, and the metadata."""
    command = [sys.executable, '-m', 'hatchling', 'build', '-t', 'sdist', '-d', str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT)
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    folders = ('timm_cbam', 'tests', 'hub_configs', 'scripts')
    files = {
        str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).rglob('*')
        if p.is_file() and '__pycache__' not in p.parts and '.nox' not in p.parts}
    assert names == files | {'pyproject.toml', 'README.md', 'LICENSE', '.gitignore', 'PKG-INFO'}


@pytest.mark.parametrize('how', ['wheel', 'directory', 'editable'])
def test_install_run_uninstall(how, wheel, tmp_path):
    env = Environment(tmp_path / 'env')
    before = {p.name for p in env.site.iterdir()}
    source = {'wheel': [str(wheel)], 'directory': [str(ROOT)], 'editable': ['-e', str(ROOT)]}[how]
    pip(env, 'install', '--quiet', '--no-deps', *source)
    assert STARTUP <= {p.name for p in env.site.iterdir()}
    assert env.eval(COUNT) == MODELS
    expected = ROOT if how == 'editable' else env.site
    assert env.eval('import timm_cbam; print(timm_cbam.__file__)') == str(expected / 'timm_cbam' / '__init__.py')
    assert env.run('-m', 'timm_cbam.cli', '--version', check=False).returncode == 0
    version = subprocess.run([env.python.parent / 'timm-cbam', '--version'], capture_output=True, text=True, check=True)
    assert version.stdout.startswith('timm-cbam 0.')

    pip(env, 'uninstall', '--quiet', '--yes', 'timm-cbam')
    assert {p.name for p in env.site.iterdir()} - {'__pycache__'} == before - {'__pycache__'}
    assert not [p for p in env.site.rglob('*timm_cbam*')]
    assert env.eval('import json; print(1)') == '1'
    assert env.eval(COUNT) == '0'
