import json
import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from helpers import liven, relative_error, run
from hub_server import HubServer
from huggingface_hub import ModelCard
from timm.models import get_arch_pretrained_cfgs, save_for_hf

from timm_cbam.hub import save_model, staged_folder

ROOT = Path(__file__).parents[1]
HUB_CONFIGS = ROOT / 'hub_configs'
PUSH_TO_HUB = ROOT / 'scripts' / 'push_to_hub.py'
MODELS = {
    'cbam_resnet18': dict(num_classes=7),
    'cbam_resnet18_s1': dict(num_classes=3, in_chans=1),
    'cbam_resnet18_eccv18': dict(num_classes=5, cbam_args=dict(kernel_size=3)),
    'cbam_resnet50': dict(num_classes=4, cbam_args=dict(
        arrangement='parallel', channel_pooling='avg', rd_ratio=0.125, gate_layer='hard_sigmoid')),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return liven(timm.create_model(request.param, **MODELS[request.param]))


@pytest.fixture
def x(model):
    return torch.randn(2, model.in_chans, 64, 64, generator=torch.Generator().manual_seed(1))


def model_args(model):
    """timm before 1.0.29 does not record the arguments of create_model."""
    return {k: v for k, v in MODELS[model.pretrained_cfg['architecture']].items() if k != 'num_classes'}


@pytest.mark.parametrize('safe_serialization', [True, False])
def test_save_for_hf_and_local_dir(model, x, tmp_path, safe_serialization):
    save_for_hf(model, str(tmp_path), model_args=model_args(model), safe_serialization=safe_serialization)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    other_head = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=9).eval()
    assert torch.equal(other_head.forward_features(x), model.forward_features(x))


def test_save_model(model, x, tmp_path):
    save_model(model, tmp_path, model_args=model_args(model))
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['num_classes'] == model.num_classes and 'num_classes' not in config.get('model_args', {})
    assert config.get('model_args', {}).get('cbam_args') == MODELS[config['architecture']].get('cbam_args')


def test_push_and_load(tmp_path):
    """timm's own functions, in one process to push and in another to load, against a Hub on loopback."""
    names = ['cbam_resnet18_eccv18', 'cbam_resnet50']
    torch.manual_seed(0)
    models = {name: liven(timm.create_model(name, **MODELS[name])) for name in names}
    args = {name: model_args(model) for name, model in models.items()}
    x = torch.randn(2, 3, 64, 64)
    torch.save(({name: model.state_dict() for name, model in models.items()}, x), tmp_path / 'models.pt')
    with HubServer() as hub:
        env = dict(hub.env, HF_HOME=str(tmp_path / 'hf'))
        run(f'''
            import timm, torch
            states, _ = torch.load({str(tmp_path / 'models.pt')!r})
            for name, args in {({name: MODELS[name] for name in names})!r}.items():
                model = timm.create_model(name, **args)
                model.load_state_dict(states[name])
                timm.models.push_to_hf_hub(model, f'me/{{name}}', model_args={args!r}[name])
        ''', **env)
        for name in names:
            assert {'config.json', 'model.safetensors', 'README.md'} <= set(hub.repos[f'me/{name}']['main'])
        run(f'''
            import timm, torch
            _, x = torch.load({str(tmp_path / 'models.pt')!r})
            models = [timm.create_model(f'hf-hub:me/{{name}}', pretrained=True).eval() for name in {names!r}]
            torch.save([model(x) for model in models], {str(tmp_path / 'logits.pt')!r})
        ''', **env)
    for logits, model in zip(torch.load(tmp_path / 'logits.pt'), models.values(), strict=True):
        assert torch.equal(logits, model(x))


def test_staged_folder(tmp_path):
    folder = tmp_path / 'new' / 'folder'
    with staged_folder(folder) as staged:
        (staged / 'config.json').write_text('1')
        assert not folder.exists()
    assert (folder / 'config.json').read_text() == '1'
    with pytest.raises(KeyboardInterrupt), staged_folder(folder) as staged:
        (staged / 'config.json').write_text('2')
        raise KeyboardInterrupt
    assert (folder / 'config.json').read_text() == '1'
    with staged_folder(folder) as staged:
        (staged / 'config.json').write_text('3')
    assert (folder / 'config.json').read_text() == '3'
    assert [p.name for p in folder.parent.iterdir()] == ['folder']
    (folder / 'thesis.txt').write_text('3')  # beside a config.json, which many projects have
    with pytest.raises(FileExistsError, match='folder exists and is no model folder; remove it or choose another'):
        with staged_folder(folder):
            pass
    assert (folder / 'thesis.txt').read_text() == '3'


def test_hub_configs_are_the_registry():
    files = {f.stem: json.loads(f.read_text()) for f in HUB_CONFIGS.glob('*.json')}
    assert set(files) == {tagged for name in timm.list_models('cbam*') for tagged in get_arch_pretrained_cfgs(name)}
    for name in timm.list_models('cbam*'):
        model = timm.create_model(name, device='meta')
        for tagged, cfg in get_arch_pretrained_cfgs(name).items():
            config = files[tagged]
            assert config['architecture'] == name and config['pretrained_cfg']['tag'] == cfg.tag
            assert config['num_classes'] == cfg.num_classes
            assert config['num_features'] == model.num_features
            assert 'num_classes' not in config.get('model_args', {})
            registered = json.loads(json.dumps(cfg.to_dict()))
            assert {k: registered.get(k) for k in config['pretrained_cfg']} == config['pretrained_cfg']


def test_hub_config_belongs_to_its_model(tmp_path):
    name = 'cbam_resnet18_s1'
    model = liven(timm.create_model(name))
    (tmp_path / 'config.json').write_text((HUB_CONFIGS / f'{name}.untrained.json').read_text())
    torch.save(model.state_dict(), tmp_path / 'pytorch_model.bin')
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), model(x))


DEFINE_LOAD = '''
    import timm, torch

    def load(repo):
        model = timm.create_model(f'hf-hub:{repo}', pretrained=True).eval()
        print(model(torch.ones(1, 3, 32, 32)).flatten().tolist())
'''
LOAD = DEFINE_LOAD + '''
    load('me/my-cbam')
'''


@pytest.fixture(scope='module')
def pushed(tmp_path_factory):
    """A Hub with two versions of a cbam_resnet18, which timm.models.push_to_hf_hub put there: their ids and logits."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp('pushed') / 'models.pt'
    models = [liven(timm.create_model('cbam_resnet18', num_classes=3)) for _ in range(2)]
    torch.save([model.state_dict() for model in models], file)
    logits = [f'{model(torch.ones(1, 3, 32, 32)).flatten().tolist()}\n' for model in models]
    with HubServer() as hub:
        run(f'''
            import timm, torch
            for state_dict in torch.load({str(file)!r}):
                model = timm.create_model('cbam_resnet18', num_classes=3)
                model.load_state_dict(state_dict)
                timm.models.push_to_hf_hub(model, 'me/my-cbam')
        ''', **hub.env)
        assert logits[0] != logits[1]
        first, second = (revision for revision in hub.repos['me/my-cbam'] if revision != 'main')
        yield hub, {first: logits[0], second: logits[1], 'main': logits[1]}


@pytest.fixture
def hub(pushed):
    hub = pushed[0]
    hub.ranges.clear()
    yield hub
    hub.private.clear()


@pytest.fixture
def logits(pushed):
    return pushed[1]


def test_revision_pin_and_offline(hub, logits, tmp_path):
    env = dict(hub.env, HF_HOME=str(tmp_path))
    first = next(iter(logits))
    both = run(DEFINE_LOAD + f'''
    load('me/my-cbam@{first}')
    load('me/my-cbam')
    ''', **env)
    assert both == logits[first] + logits['main']
    requests = len(hub.ranges)
    offline = dict(env, HF_ENDPOINT='http://127.0.0.1:9', HF_HUB_OFFLINE='1')
    assert run(LOAD, **offline) == logits['main'] and len(hub.ranges) == requests


def test_download_cut_off_is_resumed(hub, logits, tmp_path):
    hub.faults['blob'] = 'cut'
    assert run(LOAD, **hub.env, HF_HOME=str(tmp_path)) == logits['main']
    whole, rest = hub.ranges
    assert whole == '' and int(rest.removeprefix('bytes=').removesuffix('-')) > 0


def test_whole_repository(hub, tmp_path):
    """As `hf download` does it, which asks for the list of files first."""
    code = f"""
        from huggingface_hub import HfApi, snapshot_download
        print(sorted(f.path for f in HfApi().list_repo_tree('me/my-cbam')))
        snapshot_download('me/my-cbam', local_dir={str(tmp_path / 'folder')!r})
    """
    listed = run(code, **hub.env, HF_HOME=str(tmp_path / 'hf'))
    files = hub.repos['me/my-cbam']['main']
    assert listed == f'{sorted(files)}\n'
    assert all((tmp_path / 'folder' / path).read_bytes() == hub.blobs[oid] for path, oid in files.items())


def test_two_processes_at_once(hub, logits, tmp_path):
    env = {**os.environ, **hub.env, 'HF_HOME': str(tmp_path)}
    command = [sys.executable, '-c', textwrap.dedent(LOAD)]
    processes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate()[0] for p in processes] == 2 * [logits['main']]


def test_corrupted_cached_file(hub, logits, tmp_path):
    """No random weights without a word: an error, and after removing the file from the cache all is well."""
    printed = run(DEFINE_LOAD + f'''
    from pathlib import Path
    load('me/my-cbam')
    cached, = Path({str(tmp_path)!r}).glob('hub/models--me--my-cbam/snapshots/*/model.safetensors')
    blob = cached.resolve()
    blob.write_bytes(blob.read_bytes()[:1_000_000])
    try:
        load('me/my-cbam')
    except Exception as e:
        print(type(e).__name__)
    blob.unlink()
    load('me/my-cbam')
    ''', **hub.env, HF_HOME=str(tmp_path))
    assert printed == f'{logits["main"]}SafetensorError\n{logits["main"]}'


def test_refused_by_the_hub(hub, tmp_path):
    """In one process, to which the token that the environment has at the time applies."""
    before = dict(hub.repos)
    hub.private.add('me/private')
    hub.repos['me/private'] = hub.repos['me/my-cbam']
    printed = run(DEFINE_LOAD + '''
    import os
    token = os.environ['HF_TOKEN']

    def fail(function, *args, token=token):
        os.environ['HF_TOKEN'] = token
        try:
            function(*args)
        except Exception as e:
            print('wrong token' if 'Invalid credentials' in str(e) else type(e).__name__)

    fail(load, 'me/my-cbam', token='hf_wrong')
    fail(load, 'me/private', token='')
    fail(load, 'me/nothing')
    fail(load, 'me/my-cbam@v9')
    fail(timm.models.push_to_hf_hub, timm.create_model('cbam_resnet18'), 'me/other', token='hf_wrong')
    ''', **hub.env, HF_HOME=str(tmp_path))
    del hub.repos['me/private']
    assert printed.split('\n') == [
        'wrong token', 'RepositoryNotFoundError', 'RepositoryNotFoundError', 'RevisionNotFoundError', 'wrong token', '']
    assert hub.repos == before


def push(hub, *args):
    return subprocess.run(
        [sys.executable, str(PUSH_TO_HUB), *map(str, args)], capture_output=True, text=True,
        env={**os.environ, **hub.env})


def test_push_to_hub_script(hub, tmp_path):
    model = liven(timm.create_model('cbam_resnet18_s1', num_classes=3))
    save_model(model, tmp_path / 'folder')
    result = push(
        hub, tmp_path / 'folder', 'me/digits', '--license', 'mit', '--dataset', 'scikit-learn digits',
        '--metric', 'accuracy=98.5', '--metric', 'f1=98', '--description', 'Trained by hand.')
    assert result.returncode == 0, result.stderr
    assert "timm.create_model('hf-hub:me/digits', pretrained=True)" in result.stdout
    files = {path: hub.blobs[oid] for path, oid in hub.repos['me/digits']['main'].items()}
    assert set(files) == {'config.json', 'model.safetensors', 'README.md'}
    card = ModelCard(files['README.md'].decode())
    assert card.data.license == 'mit' and card.data.library_name == 'timm'
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {'accuracy': 98.5, 'f1': 98}
    for text in ('Trained by hand.', '| accuracy | 98.5 |', "create_model('hf-hub:me/digits'", 'woo2018cbam'):
        assert text in card.text
    code = LOAD.replace('me/my-cbam', 'me/digits')
    expected = f'{model(torch.ones(1, 3, 32, 32)).flatten().tolist()}\n'
    assert run(code, **hub.env, HF_HOME=str(tmp_path)) == expected


@pytest.mark.parametrize('options,message', [
    ([], 'has no config.json and no model.safetensors'),
    (['--metric', 'accuracy=1'], '--metric needs --dataset'),
])
def test_push_to_hub_script_refuses(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['push_to_hub.py', str(tmp_path), 'me/nothing', '--license', 'mit', *options])
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(str(PUSH_TO_HUB), run_name='__main__')
    assert message in f'{refused.value.code}{capsys.readouterr().err}'


@pytest.mark.slow
def test_transformers(hub, tmp_path):
    """transformers' TimmWrapper, the way that most users of the Hub take. It cannot load what timm 1.0.31 pushes, its
    own ResNets neither, because num_classes is among the model_args; what our script pushes it can."""
    model = liven(timm.create_model('cbam_resnet18', num_classes=3))
    save_for_hf(model, str(tmp_path / 'folder'), safe_serialization=True)
    assert push(hub, tmp_path / 'folder', 'me/wrapped', '--license', 'mit').returncode == 0
    code = '''
        import torch
        from transformers import AutoModelForImageClassification
        model = AutoModelForImageClassification.from_pretrained('me/wrapped').eval()
        assert type(model).__name__ == 'TimmWrapperForImageClassification'
        print(model(torch.ones(1, 3, 32, 32)).logits.flatten().tolist())
    '''
    logits = torch.tensor(json.loads(run(code, **hub.env, HF_HOME=str(tmp_path))))
    assert relative_error(logits, model(torch.ones(1, 3, 32, 32))[0]) < 1e-5
