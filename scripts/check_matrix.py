"""The test suite with the oldest and with the newest releases that pyproject.toml admits

Each in a virtual environment of its own. Run with nox (pip install nox): ``nox -f scripts/check_matrix.py``.
Arguments after ``--`` go to pytest.

Two tests are about what the oldest releases do otherwise: hub_configs/ has the tags of the newest timm, and
huggingface_hub 0.30 does not go on after a download that broke off.
"""
from pathlib import Path

import nox

ROOT = Path(__file__).parents[1]
OLDEST = [
    requirement.replace('>=', '==')
    for requirement in nox.project.load_toml(ROOT / 'pyproject.toml')['project']['dependencies']]
OLDEST_DESELECT = [
    f'--deselect=tests/test_hub.py::{test}'
    for test in ('test_hub_configs_are_the_registry', 'test_download_cut_off_is_resumed')]


@nox.session(venv_backend='venv')
@nox.parametrize(
    'python,pins,deselect', [('3.10', OLDEST, OLDEST_DESELECT), ('3.13', [], [])], ids=['oldest', 'newest'])
def suite(session: nox.Session, pins: list, deselect: list) -> None:
    session.chdir(ROOT)
    session.install('-e', '.[test]', *pins)
    session.run('pip', 'list')
    session.run('pytest', *deselect, *session.posargs)
