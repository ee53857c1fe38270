"""timm's own test suite, from the source distribution of the installed version, on models of ours"""
import os
import re
import subprocess
import sys
import tarfile

import pytest
import timm
from hub_server import HubServer
from safetensors.torch import save as save_safetensors
from timm.models import get_arch_pretrained_cfgs

pytestmark = pytest.mark.slow

MODELS = ('cbam_resnet18', 'cbam_resnet18_eccv18', 'cbam_resnet50', 'cbam_resnet50_s1', 'cbam_resnet50d')


@pytest.fixture(scope='module')
def suite(tmp_path_factory):
    """The suite's folder. timm/ stays in the archive: in the working directory it would shadow the installed one."""
    folder = tmp_path_factory.mktemp('timm')
    subprocess.run(
        [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm', '--dest', str(folder),
         f'timm=={timm.__version__}'], check=True)
    archive, = folder.glob('timm-*.tar.gz')
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            _, _, member.name = member.name.partition('/')
            if member.name == 'pyproject.toml' or member.name.startswith('tests/'):
                tar.extract(member, folder)
    # The tests of intermediate features pick models by the name of their module.
    test_models = folder / 'tests' / 'test_models.py'
    source, found = re.subn(r'(?m)^FEAT_INTER_FILTERS = \[', "\\g<0>'cbam_resnet', ", test_models.read_text())
    assert found == 1
    test_models.write_text(source)
    return folder


@pytest.mark.parametrize('name', MODELS)
def test_timm_suite(suite, name, tmp_path):
    env = {**os.environ, 'COLUMNS': '200', 'HF_HOME': str(tmp_path)}
    env.pop('GITHUB_ACTIONS', None)  # with it timm leaves out the tests of pretrained weights
    with HubServer() as hub:
        warm = [cfg for cfg in get_arch_pretrained_cfgs(name).values() if cfg.hf_hub_id]
        for cfg in warm:
            base = timm.create_model(name.removeprefix('cbam_'), num_classes=cfg.num_classes)
            file = hub.store(save_safetensors(base.state_dict()))
            hub.repos[cfg.hf_hub_id] = {'main': {'model.safetensors': file}}
        others = [other for other in timm.list_models('cbam*') if name in other and other != name]
        result = subprocess.run(
            [sys.executable, '-m', 'pytest', '-q', '-rA', '--disable-warnings', '-p', 'no:cacheprovider',
             '-k', ' and not '.join([name, *others]), 'tests/test_models.py'],
            cwd=suite, capture_output=True, text=True, env={**env, **hub.env})
    passed = set(re.findall(rf'(?m)^PASSED \S+::(\w+)\[(?:\S*-)?{name}(?:\.\w+)?(?:-\S*)?\]', result.stdout))
    assert result.returncode == 0, result.stdout[-5000:]
    # Without default_cfgs or with another module's name some tests would vanish and nothing would fail.
    assert passed >= {
        'test_model_forward', 'test_model_backward', 'test_model_default_cfgs', 'test_model_forward_torchscript',
        'test_model_forward_features', 'test_model_forward_intermediates_features', 'test_model_forward_intermediates',
        'test_model_forward_fx', 'test_model_backward_fx'}
    if warm:
        assert passed >= {'test_model_load_pretrained', 'test_model_features_pretrained'}
    assert 'SKIPPED' not in result.stdout
