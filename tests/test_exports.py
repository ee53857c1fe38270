"""scripts/exports.py: errors that it measures, exporters that it skips, and that scripts/README.md has its table"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import script

SCRIPTS = Path(__file__).parents[1] / 'scripts'


def test_readme_has_all_rows():
    rows = [line.strip('| ').split(' | ') for line in (SCRIPTS / 'README.md').read_text().splitlines()]
    for exporter in script('exports')._EXPORTERS:
        assert len([row for row in rows if row[:3] == list(exporter)]) == 1


@pytest.mark.slow
@pytest.mark.parametrize('module, lines', [
    ('', ['| torch.export | ATen | float32 | ']),
    ('raise ModuleNotFoundError("No module named \'jax\'")', [
        '', "Not installed: LiteRT (ModuleNotFoundError: No module named 'jax')"]),
    ('raise ValueError("no such thing")', ['| LiteRT | .tflite | float32 | failed: ValueError: no such thing |'])])
def test_table(module, lines, tmp_path):
    (tmp_path / 'litert_torch.py').write_text(module)
    result = subprocess.run(
        [
            sys.executable, SCRIPTS / 'exports.py', '--only', 'LiteRT' if module else 'torch.export', '--models',
            'resnet18', 'cbam_resnet18', '--img-size', '32'],
        capture_output=True, text=True, check=True, env={**os.environ, 'PYTHONPATH': str(tmp_path)})
    header, _, *rows = result.stdout.splitlines()
    assert header == '| exporter | opset, format | dtype | resnet18 | cbam_resnet18 |'
    assert len(rows) == len(lines) and all(map(str.startswith, rows, lines))
    if not module:
        assert all(float(cell) < 1e-5 for cell in rows[0].strip('| ').split(' | ')[3:])
