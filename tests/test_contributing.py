"""CONTRIBUTING.md is true: modules import what its map says, and its list of tests is complete"""
import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'timm_cbam'
CONTRIBUTING = (ROOT / '.github' / 'CONTRIBUTING.md').read_text(encoding='utf-8')


def module_name(path):
    return '.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts[1:]).removesuffix('.__init__')


def imports(file):
    """Modules of the package that a file imports, in functions too. They are relative."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and node.level:
            source = file.parents[node.level - 1].joinpath(*(node.module or '').split('.'))
            modules = [(source / a.name).with_suffix('.py') for a in node.names]
            found |= {module_name(m if m.exists() else source) for m in modules}
    return found - {''}  # the package itself, for its version


def test_map():
    rows = re.findall(r'^\| (`.*`) \| .* \| (.*)\|$', CONTRIBUTING.partition('## Map')[2], re.MULTILINE)
    said = {name: set(re.findall('`(.*?)`', right)) for left, right in rows for name in re.findall('`(.*?)`', left)}
    files = {module_name(file): file for file in PACKAGE.rglob('*.py') if file != PACKAGE / '__init__.py'}
    assert said == {name: imports(file) for name, file in files.items()}


def test_list_of_tests():
    listed = re.findall('`(test_.*?)`', CONTRIBUTING.partition('## Tests')[2].partition('## Map')[0])
    assert sorted(listed) == sorted(file.stem for file in (ROOT / 'tests').glob('test_*.py'))
