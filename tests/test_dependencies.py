"""pyproject.toml declares what is imported: with the package what it always needs, in extras what only commands need"""
import ast
import re
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
EXTRAS = PROJECT['optional-dependencies']
PACKAGE = [path for path in (ROOT / 'timm_cbam').rglob('*.py') if path.parent.name != 'startup']
TESTS = [*(ROOT / 'tests').glob('*.py')]
EXTRA_MODULES = dict(demo=('demo',), explain=('explain', 'pictures', 'subject'))
NOT_DECLARED = {
    'triton',  # PyTorch's own where it has CUDA; without it nothing imports tail_triton.py
    'tomli'}  # pytest's own where Python has no tomllib


packages_distributions = cache(metadata.packages_distributions)  # it takes seconds


def names(requirements):
    """Names of the distributions, normalized."""
    return {re.match(r'[\w.-]+', r)[0].lower().replace('_', '-') for r in requirements}


def imports(paths, at_once=False):
    """Names of the distributions that modules import, or only those that they need to be imported themselves."""
    found = set()
    for path in paths:
        tree = ast.parse(path.read_text())
        later = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        for node in ast.walk(tree):
            if at_once and id(node) in later:
                continue
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module)
    packages = {name.partition('.')[0] for name in found} - set(sys.stdlib_module_names) - NOT_DECLARED
    distributions = packages_distributions()
    own = {path.stem for path in paths} | {'timm_cbam', 'hatch_build'}
    return names(distributions[package][0] for package in packages - own)


def test_package():
    assert imports(PACKAGE, at_once=True) == names(PROJECT['dependencies'])


@pytest.mark.parametrize('extra', EXTRA_MODULES)
def test_extras(extra):
    """They have what is imported in functions of their modules, and in no other module of the package."""
    own = [path for path in PACKAGE if path.stem in EXTRA_MODULES[extra]]
    others = [path for path in PACKAGE if path.stem not in sum(EXTRA_MODULES.values(), ())]
    assert imports(own) - names(PROJECT['dependencies']) == names(EXTRAS[extra])
    assert imports(others) == imports(others, at_once=True)


def test_tests():
    needed = [r for r in EXTRAS['test'] if not r.startswith('timm-cbam')]
    assert imports(TESTS) <= names([*PROJECT['dependencies'], *needed, *EXTRAS['demo'], *EXTRAS['explain']])
