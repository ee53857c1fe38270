"""Install as a user does, into a new virtual environment; uninstall; look"""
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from environment import COUNT, MODELS, Environment
from helpers import script

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STARTUP = {'_timm_cbam_autoload.py', '_timm_cbam_loader.py', 'timm_cbam_autoload.pth', 'timm_cbam_autoload.start'}

COMPILERS = [name for name in ('c++', 'g++', 'clang++') if shutil.which(name)]
LEVELS = ['default', 'avx2', 'avx512'] if platform.machine() == 'x86_64' else ['default']
LIBRARIES = {f'_tail_cpu_{level}.so' for level in LEVELS} if COMPILERS else set()
# What the environment of a build can say, and the reason that the build then gives.
WITHOUT_COMPILER = [
    ({'CXX': '/bin/false'}, '/bin/false failed: exit status 1'),
    ({'CXX': 'no-such-compiler'}, "[Errno 2] No such file or directory: 'no-such-compiler'"),
    ({'PATH': '/nowhere'}, 'no C++ compiler found: $CXX, c++, g++, clang++'),
    ({'TIMM_CBAM_NATIVE': '0'}, 'TIMM_CBAM_NATIVE=0')]


def build_env(**env: str):
    """The environment of a build, in which nothing is said of compilers but what the test says."""
    return {k: v for k, v in os.environ.items() if k not in ('CXX', 'TIMM_CBAM_NATIVE')} | env


def pip(env: Environment, *args: str, **variables: str):
    """pip of the test's own Python, for the environment: one without pip is made in no time."""
    command = [sys.executable, '-m', 'pip', '--python', str(env.python), *args]
    subprocess.run(command, check=True, env=build_env(**variables))


def hatchling(root: Path, target: str, folder: Path, **variables: str):
    """Build a wheel or an sdist of root into folder, return its path and what is written beside."""
    command = [sys.executable, '-m', 'hatchling', 'build', '-t', target, '-d', str(folder)]
    result = subprocess.run(command, check=True, cwd=root, env=build_env(**variables), capture_output=True, text=True)
    return next(folder.iterdir()), result.stderr


def libraries(folder: Path):
    return {p.name for p in (folder / 'timm_cbam' / 'ops').glob('*.so*')}


def reason(env: Environment):
    """Why there are no native loops."""
    second = env.run('-m', 'timm_cbam.cli', '--version').stdout.splitlines()[1]
    assert second.startswith('CPU: PyTorch operations (')
    return second.partition('(')[2]


@pytest.fixture
def checkout(tmp_path):
    """A copy, whose libraries may come and go."""
    ignore = shutil.ignore_patterns('.*', '__pycache__', '*.so', 'build', 'dist', 'timm-cbam-demo')
    shutil.copytree(ROOT, tmp_path / 'checkout', ignore=ignore)
    shutil.copy(ROOT / '.gitignore', tmp_path / 'checkout')
    return tmp_path / 'checkout'


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    command = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '-w', str(folder), str(ROOT)]
    subprocess.run(command, check=True, env=build_env())
    return next(folder.glob('*.whl'))


def test_wheel_has_what_it_should(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tag = f'py3-none-linux_{platform.machine()}' if LIBRARIES else 'py3-none-any'
    assert wheel.name.endswith(f'-{tag}.whl')
    assert {n for n in names if '/' not in n} == STARTUP
    startup = ROOT / 'timm_cbam' / 'startup'
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / 'timm_cbam').rglob('*.py') if p.parent != startup}
    info = f"{wheel.name.split('-py3')[0]}.dist-info"
    metadata = {f'{info}/{name}' for name in ('METADATA', 'WHEEL', 'RECORD', 'entry_points.txt', 'licenses/LICENSE')}
    native = {f'timm_cbam/ops/{name}' for name in LIBRARIES}
    assert set(names) == STARTUP | modules | native | metadata | {'timm_cbam/py.typed'}
    assert f'Tag: {tag}\n' in zipfile.ZipFile(wheel).read(f'{info}/WHEEL').decode()


def test_sdist_has_what_it_should(tmp_path):
    """All that this folder has but what was made in it, and the metadata."""
    path, _ = hatchling(ROOT, 'sdist', tmp_path)
    with tarfile.open(path) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    folders = ('timm_cbam', 'tests', 'hub_configs', 'scripts', '.github')
    files = {
        str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).rglob('*')
        if p.is_file() and p.suffix != '.so' and '__pycache__' not in p.parts and '.nox' not in p.parts}
    assert names == files | {'pyproject.toml', 'README.md', 'LICENSE', '.gitignore', 'PKG-INFO'}


def test_sdist_builds_the_same_wheel(wheel, tmp_path):
    path, _ = hatchling(ROOT, 'sdist', tmp_path / 'sdist')
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path)
    again, _ = hatchling(next(tmp_path.glob('timm_cbam-*')), 'wheel', tmp_path / 'wheel')
    assert again.name == wheel.name
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize('variables, why', WITHOUT_COMPILER)
def test_wheel_without_compiler(variables, why, checkout, tmp_path):
    """Also where the checkout holds libraries of its editable install, which a wheel leaves alone and does not take."""
    library = checkout / 'timm_cbam' / 'ops' / '_tail_cpu_default.so'
    library.touch()
    path, said = hatchling(checkout, 'wheel', tmp_path / 'wheel', **variables)
    assert f'timm-cbam is built without native loops for CPU ({why})' in said.splitlines()
    assert path.name.endswith('-py3-none-any.whl')
    assert not [name for name in zipfile.ZipFile(path).namelist() if '.so' in name]
    assert library.exists()


@pytest.mark.skipif(not COMPILERS, reason='it compiles, which needs a C++ compiler')
def test_all_levels_or_none(monkeypatch, tmp_path):
    """The last level fails; what the others gave goes, and so does what was there before."""
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.delenv('TIMM_CBAM_NATIVE', raising=False)
    build_libraries = script('hatch_build').build_libraries

    source, folder = tmp_path / 'tail_cpu.cpp', tmp_path / 'ops'
    folder.mkdir()
    (folder / '_tail_cpu_default.so').touch()
    source.write_text('#if defined(__AVX512F__) || !defined(__x86_64__)\n#error for the test\n#endif\n')
    with pytest.raises(RuntimeError, match=r' failed: .*#error for the test$'):
        build_libraries(source, folder)
    assert list(folder.iterdir()) == []

    source.write_text('')
    assert {p.name for p in build_libraries(source, folder)} == LIBRARIES == {p.name for p in folder.iterdir()}


@pytest.mark.parametrize('platform_name, tags, variables, expected', [
    ('linux', ['manylinux_2_39_x86_64', 'manylinux2014_x86_64', 'linux_x86_64'], {}, 'linux_x86_64'),
    ('darwin', ['macosx_15_0_arm64', 'macosx_14_0_arm64'], {}, 'macosx_15_0_arm64'),
    ('darwin', ['macosx_15_0_arm64'], {'MACOSX_DEPLOYMENT_TARGET': '11.0'}, 'macosx_11_0_arm64'),
    ('darwin', ['macosx_15_0_arm64'], {'MACOSX_DEPLOYMENT_TARGET': '12.3', 'ARCHFLAGS': '-arch arm64'},
     'macosx_12_0_arm64')])
def test_platform_tag(platform_name, tags, variables, expected, monkeypatch):
    """A wheel for macOS says the oldest version that its libraries were compiled for, which cibuildwheel sets."""
    hatch_build = script('hatch_build')

    monkeypatch.setattr(sys, 'platform', platform_name)
    monkeypatch.setattr(platform, 'machine', lambda: 'arm64')
    monkeypatch.setattr(hatch_build, 'platform_tags', lambda: iter(tags))
    for name in ('MACOSX_DEPLOYMENT_TARGET', 'ARCHFLAGS'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hatch_build.platform_tag() == expected


@pytest.mark.parametrize('variables', [variables for variables, _ in WITHOUT_COMPILER[::3]])
def test_editable_without_compiler(variables, checkout, tmp_path):
    """Installed again without a compiler, nothing of the former install is left."""
    env = Environment(tmp_path / 'env')
    pip(env, 'install', '--quiet', '--no-deps', '-e', str(checkout))
    assert libraries(checkout) == LIBRARIES
    pip(env, 'install', '--quiet', '--no-deps', '-e', str(checkout), **variables)
    assert libraries(checkout) == set()
    assert reason(env).startswith('_tail_cpu_')
    assert env.eval(COUNT) == MODELS


def test_directory_without_compiler(checkout, tmp_path):
    env = Environment(tmp_path / 'env')
    pip(env, 'install', '--quiet', '--no-deps', str(checkout), CXX='/bin/false')
    assert libraries(env.site) == libraries(checkout) == set()
    assert 'was not built: reinstall timm-cbam with a C++ compiler' in reason(env)
    assert env.eval(COUNT) == MODELS


@pytest.mark.parametrize('how', ['wheel', 'directory', 'editable'])
def test_install_run_uninstall(how, wheel, checkout, tmp_path):
    env = Environment(tmp_path / 'env')
    before = {p.name for p in env.site.iterdir()}
    source = {'wheel': [str(wheel)], 'directory': [str(ROOT)], 'editable': ['-e', str(checkout)]}[how]
    pip(env, 'install', '--quiet', '--no-deps', *source)
    assert STARTUP <= {p.name for p in env.site.iterdir()}
    assert env.eval(COUNT) == MODELS
    expected = checkout if how == 'editable' else env.site
    assert env.eval('import timm_cbam; print(timm_cbam.__file__)') == str(expected / 'timm_cbam' / '__init__.py')
    assert env.run('-m', 'timm_cbam.cli', '--version', check=False).returncode == 0
    version = subprocess.run([env.python.parent / 'timm-cbam', '--version'], capture_output=True, text=True, check=True)
    assert version.stdout.startswith('timm-cbam 0.')
    assert libraries(expected) == LIBRARIES
    assert ('CPU: native loops' in version.stdout) == bool(LIBRARIES)

    pip(env, 'uninstall', '--quiet', '--yes', 'timm-cbam')
    assert {p.name for p in env.site.iterdir()} - {'__pycache__'} == before - {'__pycache__'}
    assert not [p for p in env.site.rglob('*timm_cbam*')]
    assert env.eval('import json; print(1)') == '1'
    assert env.eval(COUNT) == '0'
