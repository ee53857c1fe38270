"""The start-up hook where Python, timm or this package is not as it should be: silent at start, and timm works"""
import os
import shutil
import subprocess
import textwrap
import zipapp
import zipfile
from pathlib import Path

import pytest
from environment import COUNT, MODELS, PACKAGE, STARTUP

pytestmark = pytest.mark.slow


def zip_folder(folder: Path, file: Path, name: str):
    with zipfile.ZipFile(file, 'w') as archive:
        for path in folder.rglob('*'):
            if path.is_file() and '__pycache__' not in path.parts:
                archive.write(path, Path(name, path.relative_to(folder)))


@pytest.mark.parametrize('flags', [
    '-OO', '-B', '-E', '-X dev', '-X importtime', '-m cProfile -o /dev/null', '-m trace --count -C /dev/null',
    '-m coverage run --data-file /dev/null', '-m debugpy --listen 127.0.0.1:0'])
def test_flags(env, flags, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(COUNT)
    result = env.run(*flags.split(), str(script))
    assert result.stdout.splitlines()[0] == MODELS
    assert 'timm-cbam' not in result.stderr and 'Traceback' not in result.stderr


@pytest.mark.parametrize('action', ['error', 'error::ImportWarning', 'error::ResourceWarning'])
def test_warnings_as_errors_change_nothing(env, action):
    """What timm and torch warn of may stop their import, with us as without."""
    code = 'import timm; print(timm.create_model("resnet18").num_classes)'
    ours = env.run('-W', action, '-c', code, check=False)
    theirs = env.run('-W', action, '-c', code, check=False, TIMM_CBAM_AUTOLOAD='0')
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    assert env.run('-W', action, '-c', 'pass').stderr == ''


def test_user_who_may_not_write(env, tmp_path):
    """A read-only site-packages: no bytecode can be written."""
    frozen = [p for p in (env.site, PACKAGE) for p in [p, *p.rglob('*')] if p.is_dir()]
    assert env.eval(COUNT, PYTHONPYCACHEPREFIX='/proc/nowhere') == MODELS  # where not even root may write
    modes = {p: p.stat().st_mode for p in frozen}
    try:
        for p in frozen:
            p.chmod(0o555)
        assert env.eval(COUNT) == MODELS
    finally:
        for p, mode in modes.items():
            p.chmod(mode)


def test_package_in_a_zip(bare, tmp_path):
    bare.install(package=False)
    zip_folder(PACKAGE, tmp_path / 'lib.zip', 'timm_cbam')
    assert bare.eval(COUNT, PYTHONPATH=str(tmp_path / 'lib.zip')) == MODELS


def test_two_copies(env, tmp_path):
    """A second version in PYTHONPATH, with start-up files of its own: the first in the path is taken, once."""
    shutil.copytree(PACKAGE, tmp_path / 'timm_cbam')
    for file in STARTUP.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    code = f'{COUNT}; import sys, timm_cbam; print(timm_cbam.__file__, len(sys.meta_path))'
    models, file, finders = env.eval(code, PYTHONPATH=str(tmp_path)).split()
    assert models == MODELS
    assert file == str(tmp_path / 'timm_cbam' / '__init__.py')
    assert finders == env.eval(code).split()[-1]


def test_another_timm_in_the_way(env, tmp_path):
    (tmp_path / 'timm.py').write_text('name = "mine"')
    assert env.eval('import timm; print(timm.name)', PYTHONPATH=str(tmp_path)) == 'mine'
    (tmp_path / 'timm.py').unlink()
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm' / '__init__.py').write_text('')
    (tmp_path / 'timm' / 'models.py').write_text('name = "mine"')
    result = env.run('-c', 'import timm.models; print(timm.models.name)', PYTHONPATH=str(tmp_path))
    assert result.stdout == 'mine\n'
    assert result.stderr.count('timm-cbam could not register its models') == 1


@pytest.mark.parametrize('damage', ['no models', 'empty models', 'models fails', 'models is a file of zeros'])
def test_half_installed_timm(env, damage):
    models = env.copy('timm') / 'models'
    if damage == 'no models':
        shutil.rmtree(models)
    elif damage == 'empty models':
        shutil.rmtree(models)
        models.mkdir()
    elif damage == 'models fails':
        (models / '__init__.py').write_text('raise ImportError("half installed")')
    else:
        (models / '__init__.py').write_bytes(bytes(100))
    assert env.eval('print(1)') == '1'
    ours = env.run('-c', 'import timm', check=False)
    theirs = env.run('-c', 'import timm', check=False, TIMM_CBAM_AUTOLOAD='0')
    assert ours.returncode == theirs.returncode == 1
    assert ours.stderr.splitlines()[-1] == theirs.stderr.splitlines()[-1]


@pytest.mark.parametrize('name', ['Exception', 'GeneratorExit', 'MemoryError', 'RecursionError', 'AssertionError',
                                  'UnicodeError', 'StopIteration', 'OSError', 'ImportError', 'Warning', 'SystemExit'])
def test_exceptions_of_each_kind(bare, name):
    bare.install(package=False)
    (bare.site / 'timm_cbam.py').write_text(f'raise {name}("of this kind")')
    assert bare.eval('print(1)') == '1'
    result = bare.run('-c', 'import timm; print(timm.create_model("resnet18").num_classes)')
    assert result.stdout == '1000\n'
    assert result.stderr.count(f'timm-cbam could not register its models: {name}: of this kind') == 1


@pytest.mark.parametrize('method', ['fork', 'spawn', 'forkserver'])
@pytest.mark.parametrize('first', ['', 'import timm'])
def test_child_processes(env, method, first, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(textwrap.dedent(f'''
        {first}
        import multiprocessing

        def count(_):
            import timm
            return len(timm.list_models('cbam*'))

        if __name__ == '__main__':
            with multiprocessing.get_context({method!r}).Pool(2) as pool:
                print(pool.map(count, range(2)))
    '''))
    assert env.run(str(script)).stdout == f'[{MODELS}, {MODELS}]\n'


def test_zipapp_that_bundles_timm(env, tmp_path):
    timm = (env.packages / 'timm').resolve()
    (env.packages / 'timm').unlink()
    source = tmp_path / 'app'
    shutil.copytree(timm, source / 'timm', ignore=shutil.ignore_patterns('__pycache__'))
    (source / '__main__.py').write_text(f'{COUNT}\nprint(timm.__file__)')
    zipapp.create_archive(source, tmp_path / 'app.pyz')
    models, file = env.run(str(tmp_path / 'app.pyz')).stdout.split()
    assert models == MODELS and 'app.pyz' in file


def test_debugger_attached(env, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(COUNT)
    result = subprocess.run(
        [str(env.python), '-m', 'pdb', '-c', 'continue', str(script)], input='quit\n', capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith('PYTHON')})
    assert f'{MODELS}\n' in result.stdout and 'Error' not in result.stdout, result.stdout + result.stderr
