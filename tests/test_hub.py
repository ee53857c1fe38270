import json
from pathlib import Path

import pytest
import timm
import torch
from helpers import liven, run
from hub_server import HubServer
from timm.models import save_for_hf

from timm_cbam.hub import save_model, staged_folder

HUB_CONFIGS = Path(__file__).parents[1] / 'hub_configs'
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


@pytest.mark.parametrize('model', ['cbam_resnet18_eccv18', 'cbam_resnet50'], indirect=True)
def test_push_and_load(model, x, tmp_path):
    """timm's own functions, in one process to push and in another to load, against a Hub on loopback."""
    args = MODELS[model.pretrained_cfg['architecture']]
    torch.save((model.state_dict(), x), tmp_path / 'model.pt')
    with HubServer() as hub:
        env = dict(hub.env, HF_HOME=str(tmp_path / 'hf'))
        run(f'''
            import timm, torch
            model = timm.create_model({model.pretrained_cfg['architecture']!r}, **{args!r})
            model.load_state_dict(torch.load({str(tmp_path / 'model.pt')!r})[0])
            timm.models.push_to_hf_hub(model, 'me/my-cbam', model_args={model_args(model)!r})
        ''', **env)
        assert {'config.json', 'model.safetensors', 'README.md'} <= set(hub.repos['me/my-cbam']['main'])
        run(f'''
            import timm, torch
            x = torch.load({str(tmp_path / 'model.pt')!r})[1]
            model = timm.create_model('hf-hub:me/my-cbam', pretrained=True).eval()
            torch.save(model(x), {str(tmp_path / 'logits.pt')!r})
        ''', **env)
    assert torch.equal(torch.load(tmp_path / 'logits.pt'), model(x))


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
    assert set(files) == set(timm.list_models('cbam*'))
    for name, config in files.items():
        model = timm.create_model(name, device='meta')
        assert config['architecture'] == name
        assert config['num_classes'] == model.num_classes
        assert config['num_features'] == model.num_features
        assert 'num_classes' not in config.get('model_args', {})
        registered = json.loads(json.dumps(model.pretrained_cfg))
        assert {k: registered.get(k) for k in config['pretrained_cfg']} == config['pretrained_cfg']


def test_hub_config_belongs_to_its_model(tmp_path):
    name = 'cbam_resnet18_s1'
    model = liven(timm.create_model(name))
    (tmp_path / 'config.json').write_text((HUB_CONFIGS / f'{name}.json').read_text())
    torch.save(model.state_dict(), tmp_path / 'pytorch_model.bin')
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), model(x))


def test_unknown_repository(tmp_path):
    with HubServer() as hub:
        error = run('''
            import timm
            try:
                timm.create_model('hf-hub:me/nothing', pretrained=True)
            except Exception as e:
                print(type(e).__name__)
        ''', **hub.env, HF_HOME=str(tmp_path))
    assert error == 'RepositoryNotFoundError\n'
