"""The command as a whole, `list`, and models that it cannot get; the other commands have files of their own"""
import huggingface_hub
import pytest
import timm

from timm_cbam import subject
from timm_cbam.cli import main


def test_no_command(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith('usage: timm-cbam ') and all(f'\n    {name} ' in out for name in ('list', 'demo', 'convert'))


def test_list(capsys):
    """Multiply-adds beside torchinfo's, which counts each module's; the default weights, as timm has them."""
    import torchinfo

    assert main(['list']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    rows = {row[0]: row[1:] for row in map(str.split, lines[1:])}
    assert list(rows) == timm.list_models('cbam*')
    for name in ('cbam_resnet18', 'cbam_resnet50_s1', 'cbam_resnet152_eccv18'):
        model = timm.create_model(name, device='meta')
        info = torchinfo.summary(model, (1, *model.pretrained_cfg['input_size']), device='meta', verbose=0)
        assert rows[name][0] == f'{info.total_params:,}'
        assert float(rows[name][1]) == pytest.approx(info.total_mult_adds / 1e9, abs=0.02)
        assert rows[name][2] == 'x'.join(map(str, model.pretrained_cfg['input_size']))
    for name, (_, _, _, *weights) in rows.items():
        number = len(timm.list_pretrained(f'{name}.*'))
        more = ['and', str(number - 1), 'more'] if number > 1 else []
        assert weights == [timm.get_pretrained_cfg(name).tag if number else 'none', *more]


@pytest.mark.parametrize('name', timm.list_models('cbam*'))
def test_list_weights(name, capsys):
    """Names that can be given to create_model, the default first."""
    assert main(['list', name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    names = [line.split()[0] for line in lines if line.startswith(f'{name}.')]
    assert sorted(names) == sorted(timm.list_pretrained(f'{name}.*'))
    if names:
        assert timm.get_pretrained_cfg(names[0]) == timm.get_pretrained_cfg(name)
    else:
        assert lines == [f'{name} has no pretrained weights.']


@pytest.mark.parametrize('command', ['list', 'demo', 'convert', 'explain', 'report'])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as e:
        main([command, '--help'])
    assert e.value.code == 0
    assert 'None' not in capsys.readouterr().out  # Python's, as a default


@pytest.mark.parametrize('option', ['--model', '--compare'])
def test_folder_for_a_model(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'my-cbam').mkdir()
    model = [] if option == '--model' else ['--model', 'cbam_resnet18_s1']
    assert main(['explain', 'cat.jpg', *model, option, 'my-cbam']) == 1
    error = 'timm-cbam: error: Unknown model (my-cbam), for the folder of this name use local-dir:my-cbam\n'
    assert capsys.readouterr().err == error


@pytest.mark.parametrize('model,reason', [
    ('cbam_resnet18', 'cannot find the requested files in the local cache'),  # from the Hub
    ('hf-hub:me/my-cbam', 'cannot find the requested files in the local cache'),
    ('cbam_resnet50_eccv18', 'urlopen error'),  # from another URL
])
def test_offline(model, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')  # where nobody listens
    assert main(['explain', 'cat.jpg', '--model', model, '-o', str(tmp_path / 'out')]) == 1
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith(f'timm-cbam: error: {model} cannot be loaded: ') and reason in error
    assert 'The weights had to be downloaded. ' in error and error.endswith(': local-dir:FOLDER')


def error_of(module, name, base=Exception):
    return type(name, (base,), {'__module__': module})('reason')


@pytest.mark.parametrize('error,is_download', [
    (error_of('httpx2', 'ProxyError'), True),
    (error_of('httpx', 'ProxyError'), True),
    (error_of('requests.exceptions', 'ReadTimeout', OSError), True),
    (ConnectionResetError('reason'), True),
    (FileNotFoundError('reason'), False),
    (RuntimeError('reason'), False),
])
def test_errors_of_models(error, is_download, monkeypatch, capsys):
    """Only those of a download are told so."""
    def create_model(*args, **kwargs):
        raise error

    monkeypatch.setattr(subject, 'create_model', create_model)
    assert main(['explain', 'cat.jpg', '--model', 'cbam_resnet18']) == 1
    message, = capsys.readouterr().err.splitlines()
    assert 'reason' in message and ('local-dir:FOLDER' in message) == is_download
