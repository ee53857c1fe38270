"""The start-up hook, in processes of their own: each test has a Python environment (environment.py)"""
import pkgutil
import shutil
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path

import pytest
from environment import COUNT, MODELS, STARTUP, WARNING

from timm_cbam import registration


def test_plain(env):
    assert env.eval(COUNT) == MODELS
    assert env.eval(COUNT, '-I') == MODELS


def test_module(env):
    (env.site / 'my_script.py').write_text(COUNT)
    assert env.run('-m', 'my_script').stdout == f'{MODELS}\n'


def test_models_imported_first(env):
    code = 'from timm.models import create_model; print(type(create_model("cbam_resnet18")).__name__)'
    assert env.eval(code) == 'CbamResNet'
    assert env.eval('import timm.models.resnet, timm; print(timm.is_model("cbam_resnet50"))') == 'True'


@pytest.mark.parametrize('code', ['import timm_cbam, timm', 'import timm, timm_cbam', 'import timm_cbam.layers, timm'])
def test_registers_once_in_any_order(env, code):
    """timm warns when a name is registered twice, here that would be on standard error."""
    assert env.eval(f'{code}; print(len(timm.list_models("cbam*")))') == MODELS


def test_without_site(env):
    assert env.eval('import sys; print("_timm_cbam_autoload" in sys.modules)', '-S') == 'False'


def test_startup_imports_nothing(bare):
    code = 'import sys; print(*sorted(sys.modules))'
    before = set(bare.eval(code).split())
    bare.install()
    assert set(bare.eval(code).split()) - before == {'_timm_cbam_autoload'}


def test_startup_files_agree(env):
    """Python 3.15 reads timm_cbam_autoload.start, earlier ones timm_cbam_autoload.pth."""
    start = (STARTUP / 'timm_cbam_autoload.start').read_text().strip()
    pth = (STARTUP / 'timm_cbam_autoload.pth').read_text().strip()
    module, function = start.split(':')
    comment, line = pth.splitlines()
    assert comment.startswith('# ') and line.startswith('import ')
    assert f'import {module}; {module}.{function}()' in line
    sys.path.insert(0, str(STARTUP))
    try:
        assert callable(pkgutil.resolve_name(start))
    finally:
        sys.path.remove(str(STARTUP))


def test_turned_off(env):
    assert env.eval(COUNT, TIMM_CBAM_AUTOLOAD='0') == '0'
    assert env.eval(f'import timm_cbam; {COUNT}', TIMM_CBAM_AUTOLOAD='0') == MODELS
    assert env.eval(COUNT, TIMM_CBAM_AUTOLOAD='1') == MODELS


def test_timm_missing(env):
    (env.packages / 'timm').unlink()
    assert env.eval('print(1)') == '1'
    result = env.run('-c', 'import timm', check=False)
    assert "No module named 'timm'" in result.stderr and 'autoload' not in result.stderr


@pytest.mark.parametrize('source', [
    'import a_module_that_is_not_there',
    'raise RuntimeError("two\\nlines")',
    'a syntax error',
    'raise SystemExit(3)',
    'from timm import create_model, nothing_of_the_kind',
])
def test_broken(bare, source):
    bare.install(package=False)
    (bare.site / 'timm_cbam.py').write_text(source)
    assert bare.eval('print(1)') == '1'
    result = bare.run('-c', 'import timm; timm.create_model("resnet18"); print(len(timm.list_models("cbam*")))')
    assert result.stdout == '0\n'
    assert result.stderr.count(WARNING) == 1
    assert 'TIMM_CBAM_AUTOLOAD=0' in result.stderr


def test_broken_with_warnings_as_errors(bare):
    bare.install(package=False)
    result = bare.run('-W', 'error::RuntimeWarning', '-c', COUNT)
    assert result.stdout == '0\n'
    assert result.stderr.count('timm-cbam could not register its models: ModuleNotFoundError') == 1


def test_two_plugins(env):
    env.install('other_cbam', package=False)
    (env.site / 'other_cbam').mkdir()
    (env.site / 'other_cbam' / 'registration.py').write_text(
        'from timm.models import register_model\n@register_model\ndef other_net(pretrained=False, **kwargs): pass\n')
    code = f'{COUNT}; print(timm.is_model("other_net"))'
    assert env.eval(code).split() == [MODELS, 'True']
    # whichever comes first in sys.meta_path
    assert env.eval(f'import sys; sys.meta_path[:2] = sys.meta_path[1::-1]; {code}').split() == [MODELS, 'True']


def test_reload(env):
    assert env.eval('''
        import importlib, timm, timm.models, timm_cbam
        importlib.reload(timm.models)
        importlib.reload(timm)
        importlib.reload(timm_cbam)
        print(len(timm.list_models('cbam*')), timm.create_model('cbam_resnet18', num_classes=2).num_classes)
    ''') == f'{MODELS} 2'


def test_leaves_no_trace_on_timm(env):
    assert env.eval('''
        import importlib.util, inspect, timm, timm.models
        assert 'create_model' in inspect.getsource(timm)
        assert 'create_model' in inspect.getsource(timm.models)
        assert timm.models.__loader__ is timm.models.__spec__.loader
        print(type(timm.models.__loader__).__name__, type(timm.models.resnet.__loader__).__name__)
        assert importlib.util.find_spec('timm.models') is timm.models.__spec__
    ''') == 'SourceFileLoader SourceFileLoader'


def test_threads(env):
    """Half of them begin with timm, half with timm_cbam. test_autoload_faults.py has the order of steps one by one."""
    assert env.eval('''
        import sys, threading
        sys.setswitchinterval(1e-4)
        barrier, counts = threading.Barrier(8), []

        def count(name):
            barrier.wait()
            __import__(name)
            import timm
            counts.append(len(timm.list_models('cbam*')))

        threads = [threading.Thread(target=count, args=(name,)) for name in ['timm', 'timm_cbam'] * 4]
        [t.start() for t in threads]
        [t.join() for t in threads]
        print(*counts)
    ''') == ' '.join([MODELS] * 8)


def test_spawned_workers(env):
    script = env.site.parent / 'workers.py'
    script.write_text(textwrap.dedent('''
        from torch.utils.data import DataLoader, Dataset

        class Counts(Dataset):
            def __len__(self):
                return 2

            def __getitem__(self, i):
                import timm
                return len(timm.list_models('cbam*'))

        if __name__ == '__main__':
            print([int(n) for n in DataLoader(Counts(), num_workers=2, multiprocessing_context='spawn')])
    '''))
    assert env.run(str(script)).stdout == f'[{MODELS}, {MODELS}]\n'


def test_torchrun(env):
    script = env.site.parent / 'train.py'
    script.write_text(textwrap.dedent('''
        import timm, torch
        import torch.distributed as dist

        dist.init_process_group('gloo')
        torch.manual_seed(0)
        model = torch.nn.parallel.DistributedDataParallel(timm.create_model('cbam_resnet18', num_classes=2))
        torch.manual_seed(dist.get_rank())
        model(torch.randn(2, 3, 64, 64)).sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        every = [torch.empty_like(grads) for _ in range(2)]
        dist.all_gather(every, grads)
        assert torch.equal(*every) and grads.abs().max() > 0
        if dist.get_rank() == 0:
            print('equal gradients')
        dist.destroy_process_group()
    '''))
    result = env.run('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script))
    assert result.stdout.splitlines()[-1] == 'equal gradients'  # torch 2.9's gloo says something before


def test_uninstalled(env):
    for entry in [*env.site.glob('*timm_cbam*')]:
        entry.unlink() if not entry.is_dir() or entry.is_symlink() else shutil.rmtree(entry)
    assert env.eval(COUNT) == '0'


@pytest.mark.parametrize('version,works', [
    ('1.0.25', False), ('0.9.16', False), ('1.0.26.dev0', True), ('1.0.100', True), ('1.1', True), ('2.0.0rc1', True)])
def test_versions_of_timm(version, works, monkeypatch):
    monkeypatch.setattr(registration, 'timm_version', version)
    with nullcontext() if works else pytest.raises(ImportError, match=f'needs timm>=1.0.26, found {version}$'):
        registration._register()


def test_oldest_timm_is_the_one_declared():
    pyproject = (Path(__file__).parents[1] / 'pyproject.toml').read_text()
    assert f'"timm>={registration.OLDEST_TIMM}"' in pyproject


@pytest.mark.slow
def test_half_registered(env):
    """timm's registry is as without us. test_autoload_faults.py has more that goes wrong."""
    registry = env.copy('timm') / 'models' / '_registry.py'
    place = '    _model_to_module[model_name] = module_name\n'
    source = registry.read_text()
    assert source.count(place) == 1
    fault = '    if model_name == "cbam_resnet50":\n        raise TypeError("of a later timm")\n'
    registry.write_text(source.replace(place, fault + place))
    code = textwrap.dedent('''
        from timm.models import _registry
        for name, table in sorted(vars(_registry).items()):
            if isinstance(table, (dict, set)) and not name.startswith('__'):
                print(name, *sorted(table))
    ''')
    ours, theirs = (env.run('-c', code, TIMM_CBAM_AUTOLOAD=value) for value in '10')
    assert ours.stdout == theirs.stdout != ''
    assert ours.stderr.count(f'{WARNING}ImportError: timm-cbam 0.1.0 does not work with timm ') == 1
    assert '(TypeError: of a later timm). timm works without them; ' in ours.stderr
