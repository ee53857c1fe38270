"""timm's own test suite, from the source distribution of the installed version, on models of ours"""
import os
import re
import subprocess
import sys
import tarfile

import pytest
import timm

pytestmark = pytest.mark.slow

MODELS = ('cbam_resnet18', 'cbam_resnet50', 'cbam_resnet50_s1')


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
def test_timm_suite(suite, name):
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-rA', '--disable-warnings', '-p', 'no:cacheprovider', '-k', name,
         'tests/test_models.py'], cwd=suite, capture_output=True, text=True, env={**os.environ, 'COLUMNS': '200'})
    passed = set(re.findall(rf'(?m)^PASSED \S+::(\w+)\[(?:\S*-)?{name}(?:\.\w+)?(?:-\S*)?\]', result.stdout))
    assert result.returncode == 0, result.stdout[-5000:]
    # Without default_cfgs or with another module's name some tests would vanish and nothing would fail.
    assert passed >= {
        'test_model_forward', 'test_model_backward', 'test_model_default_cfgs', 'test_model_forward_torchscript',
        'test_model_forward_features', 'test_model_forward_intermediates_features', 'test_model_forward_intermediates',
        'test_model_forward_fx', 'test_model_backward_fx'}
    assert 'SKIPPED' not in result.stdout
