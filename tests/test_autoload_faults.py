"""The start-up hook where something is missing or goes wrong: timm is imported, and one warning says why

With stand-ins for timm and the models, which are imported in no time.
"""
import shutil
import textwrap

import pytest
from environment import PACKAGE, WARNING, Environment

import timm_cbam

TIMM = {
    '__init__.py': 'from .models import list_models',
    'version.py': '__version__ = "1.0.26"',
    'models/__init__.py': 'from ._registry import list_models, register_model',
    'models/_registry.py': '''
        _entrypoints, _pretrained = {'resnet': 1}, {'resnet'}

        def register_model(name):
            _entrypoints[name] = 1
            _pretrained.add(name)

        def list_models():
            assert _pretrained == set(_entrypoints)
            return sorted(_entrypoints)
    ''',
}
OURS = {
    'cbam_resnet.py': '''
        from timm.models import register_model
        CbamResNet = None
        register_model('cbam_resnet18')
        register_model('cbam_resnet34')
    ''',
    'layers.py': 'Cbam = ChannelAttention = SpatialAttention = None',
    'weights.py': 'convert_state_dict = None',
    'insert.py': 'add_cbam = remove_cbam = None',
    'explain.py': 'AttentionMaps = attention_maps = None',
}
MODELS = ['cbam_resnet18', 'cbam_resnet34', 'resnet']
LIST = 'import timm; print(*timm.list_models())'


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))


@pytest.fixture
def env(tmp_path):
    """The real hook, __init__.py and registration.py; the rest are stand-ins."""
    env = Environment(tmp_path / 'env', empty=True)
    env.install(package=False)
    write(env.packages / 'timm', TIMM)
    write(env.site / 'timm_cbam', OURS)
    for name in ('__init__.py', 'registration.py'):
        shutil.copy(PACKAGE / name, env.site / 'timm_cbam')
    return env


def test_nothing_is_wrong(env):
    assert env.eval(LIST).split() == MODELS
    assert env.eval(f'import timm_cbam; {LIST}').split() == MODELS
    assert env.eval(LIST, TIMM_CBAM_AUTOLOAD='0') == 'resnet'
    assert env.eval(f'import timm_cbam; {LIST}', TIMM_CBAM_AUTOLOAD='0').split() == MODELS


@pytest.mark.parametrize('source', [None, '', 'a syntax error', '\0' * 100, 'import a_module_that_is_not_there'])
def test_python_starts_without_the_module(env, source):
    """The .pth file is there, but the module that it names is missing or broken."""
    module = env.site / '_timm_cbam_autoload.py'
    module.unlink()
    if source is not None:
        module.write_text(source)
    assert env.eval(LIST) == 'resnet'


CHANGES = {  # what may happen to an installation while Python runs, before it imports timm
    'uninstalled': 'for p in site.glob("*timm_cbam*"): shutil.rmtree(p) if p.is_dir() else p.unlink()',
    'half uninstalled': 'shutil.rmtree(site / "timm_cbam")',
    'taken off sys.path': 'sys.path.remove(str(site))',
    'loader missing': 'loader.unlink()',
    'loader broken': 'loader.write_text("a syntax error")',
    'loader of zeros': 'loader.write_bytes(bytes(100))',
    'loader exits': 'loader.write_text("raise SystemExit(3)")',
    'loader of another version': 'loader.write_text("def find(): pass")',
}


@pytest.mark.parametrize('change', CHANGES)
def test_changed_while_python_runs(env, change):
    result = env.run('-c', textwrap.dedent(f'''
        import importlib.util, pathlib, shutil, sys
        site = pathlib.Path({str(env.site)!r})
        loader = site / '_timm_cbam_loader.py'
        {CHANGES[change]}
        {LIST}
        assert importlib.util.find_spec('timm.models') is timm.models.__spec__
        importlib.reload(timm.models)
        importlib.reload(timm)
    '''))
    assert result.stdout == 'resnet\n'
    assert result.stderr.count(WARNING) == 1 and 'Traceback' not in result.stderr



def test_turned_off(env):
    (env.site / '_timm_cbam_loader.py').unlink()
    assert env.eval(LIST, TIMM_CBAM_AUTOLOAD='0') == 'resnet'


@pytest.mark.parametrize('flags', [[], ['-W', 'error::RuntimeWarning']])
@pytest.mark.parametrize('stderr', ['sys.stderr.close()', 'sys.stderr = None', 'os.close(2)'])
def test_nowhere_to_say_so(env, stderr, flags):
    shutil.rmtree(env.site / 'timm_cbam')
    result = env.run(*flags, '-c', f'import os, sys; {stderr}; {LIST}', check=False)  # it ends with an error anyway
    assert result.stdout.splitlines()[-1] == 'resnet'


FINDERS = {
    'without find_spec': 'pass',
    'raises': '''
        def find_spec(self, name, path, target=None):
            if name == 'timm.models':
                raise OSError('not reachable')
    ''',
    'asks the others': '''
        asked = False

        def find_spec(self, name, path, target=None):
            if name == 'timm.models' and not self.asked:
                self.asked = True
                return importlib.util.find_spec(name)
    ''',
}


@pytest.mark.parametrize('place', [0, 1])
@pytest.mark.parametrize('finder', FINDERS)
def test_finders_of_others(env, finder, place):
    """They have the effect that they have without us."""
    body = textwrap.indent(textwrap.dedent(FINDERS[finder]), '    ')
    code = f'import importlib.util, sys\nclass Other:\n{body}\nsys.meta_path.insert({place}, Other())\n{LIST}'
    ours, theirs = (env.run('-c', code, check=False, TIMM_CBAM_AUTOLOAD=value) for value in '10')
    assert ours.returncode == theirs.returncode
    assert ours.stdout.split() == [name for name in MODELS if 'resnet\n' in theirs.stdout]
    assert ours.stderr.splitlines()[-1:] == theirs.stderr.splitlines()[-1:]


def test_timm_is_too_old(env):
    write(env.packages / 'timm', {'version.py': '__version__ = "1.0.9"'})
    reason = f'timm-cbam {timm_cbam.__version__} needs timm>=1.0.26, found 1.0.9'
    result = env.run('-c', LIST)
    assert result.stdout == 'resnet\n' and result.stderr.count(f'{WARNING}ImportError: {reason}. timm works') == 1
    for value in '01':
        result = env.run('-c', 'import timm_cbam', check=False, TIMM_CBAM_AUTOLOAD=value)
        assert result.stderr.splitlines()[-1] == f'ImportError: {reason}'


@pytest.mark.parametrize('autoload', '01')
@pytest.mark.parametrize('error,expected', [
    ('TypeError("of a later timm")',
     'ImportError timm-cbam {} does not work with timm 1.0.26 (TypeError: of a later timm)'),
    ('SystemExit(3)', 'SystemExit 3'),
    ('KeyboardInterrupt', 'KeyboardInterrupt '),
])
def test_half_registered(env, error, expected, autoload):
    """timm's tables are as before, who imports timm_cbam is told, and registers the models if it works then."""
    source = textwrap.dedent(OURS['cbam_resnet.py'])
    second = "register_model('cbam_resnet34')"
    fault = f'import __main__\nif __main__.fault:\n    raise {error}'
    write(env.site / 'timm_cbam', {'cbam_resnet.py': source.replace(second, f'{fault}\n{second}')})
    result = env.run('-c', textwrap.dedent('''
        import sys
        fault = True
        try:
            import timm
        except KeyboardInterrupt:
            timm = sys.modules['timm.models._registry']
        print(timm.list_models())
        try:
            import timm_cbam
        except BaseException as e:
            print(type(e).__name__, e)
        print(timm.list_models())
        fault = False
        import timm_cbam
        print(timm.list_models())
    '''), TIMM_CBAM_AUTOLOAD=autoload)
    expected = expected.format(timm_cbam.__version__)
    assert result.stdout.splitlines() == ["['resnet']", expected, "['resnet']", str(MODELS)]
    assert result.stderr.count(WARNING) == (autoload == '1' and error != 'KeyboardInterrupt')


@pytest.mark.parametrize('module,name', [('insert', 'add_cbam'), ('explain', 'attention_maps')])
def test_what_only_other_functions_need(env, module, name):
    """May be missing in a later timm or torchvision. The models are registered, and who asks for the rest is told."""
    write(env.site / 'timm_cbam', {f'{module}.py': 'from timm import nothing_of_the_kind'})
    assert env.eval(f'{LIST}').split() == MODELS
    for autoload in '01':
        result = env.run('-c', f'from timm_cbam import {name}', check=False, TIMM_CBAM_AUTOLOAD=autoload)
        assert "ImportError: cannot import name 'nothing_of_the_kind' from 'timm'" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize('statement', ['import timm_cbam', 'from timm_cbam import add_cbam'])
@pytest.mark.parametrize('autoload', '01')
@pytest.mark.parametrize('pause', ['before timm.models', 'in timm.models', 'after timm.models', 'in timm_cbam'])
def test_thread_with_timm_cbam_first(env, statement, autoload, pause):
    """It begins while another thread imports timm. Each has to wait for the other; both see the models."""
    name = '__init__.py' if pause == 'before timm.models' else 'models/__init__.py'
    start = 'import __main__; __main__.start()'
    lines = [TIMM[name], start] if pause in ('after timm.models', 'in timm_cbam') else [start, TIMM[name]]
    write(env.packages / 'timm', {name: '\n'.join(lines)})
    file = env.site / 'timm_cbam' / '__init__.py'
    file.write_text(f'import __main__; __main__.begin()\n{file.read_text()}')
    wait = 0.3  # until the other thread waits for this one
    models = env.eval(f'''
        import threading, time

        begun = threading.Event()

        def begin():
            begun.set()
            time.sleep({wait if pause == 'in timm_cbam' else 0})

        def list_models():
            {statement}
            {LIST}

        thread = threading.Thread(target=list_models)

        def start():
            thread.start()
            begun.wait()
            time.sleep({0 if pause == 'in timm_cbam' else wait})

        import timm
        timm_alone = timm.list_models()
        thread.join()
        print(*timm_alone)
    ''', TIMM_CBAM_AUTOLOAD=autoload).splitlines()
    assert models[0].split() == MODELS
    assert autoload == '0' or models[1].split() == MODELS
