"""The test suite with the oldest and with the newest releases that pyproject.toml admits

Each in a virtual environment of its own. Run with nox (pip install nox): ``nox -f scripts/check_matrix.py``.
Arguments after ``--`` go to pytest.

Three tests are about what the oldest releases do otherwise: hub_configs/ has the tags of the newest timm, timm 1.0.26
does not load a first convolution of four channels from a folder, which `timm-cbam convert --verify` notices, and
huggingface_hub 0.30 does not go on after a download that broke off.
"""
from pathlib import Path

import nox

ROOT = Path(__file__).parents[1]
OLDEST = [
    requirement.replace('>=', '==')
    for requirement in nox.project.load_toml(ROOT / 'pyproject.toml')['project']['dependencies']]
OLDEST_DESELECT = [
    f'--deselect=tests/{test}' for test in (
        'test_hub.py::test_hub_configs_are_the_registry',
        'test_hub.py::test_download_cut_off_is_resumed',
        "test_convert.py::test_arguments_are_inferred"
        "[cbam_resnet18_s1-{'cbam_args': {'kernel_size': 3, 'rd_ratio': 0.125}, 'in_chans': 4}]")]


@nox.session(venv_backend='venv')
@nox.parametrize(
    'python,pins,deselect', [('3.10', OLDEST, OLDEST_DESELECT), ('3.13', [], [])], ids=['oldest', 'newest'])
def suite(session: nox.Session, pins: list, deselect: list) -> None:
    session.chdir(ROOT)
    session.install('-e', '.[test]', *pins)
    session.run('pip', 'list')
    session.run('pytest', *deselect, *session.posargs)
