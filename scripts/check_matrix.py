"""The test suite with the oldest and with the newest releases that pyproject.toml admits

Each in a virtual environment of its own. Run with nox (pip install nox): ``nox -f scripts/check_matrix.py``.
Arguments after ``--`` go to pytest.
"""
from pathlib import Path

import nox

ROOT = Path(__file__).parents[1]
OLDEST = [
    requirement.replace('>=', '==')
    for requirement in nox.project.load_toml(ROOT / 'pyproject.toml')['project']['dependencies']]


@nox.session(venv_backend='venv')
@nox.parametrize('python,pins', [('3.10', OLDEST), ('3.13', [])], ids=['oldest', 'newest'])
def suite(session: nox.Session, pins: list) -> None:
    session.chdir(ROOT)
    session.install('-e', '.[test]', *pins)
    session.run('pip', 'list')
    session.run('pytest', *session.posargs)
