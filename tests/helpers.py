"""What several test files share"""
import importlib
import json
import math
import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

GOLDEN = Path(__file__).parent / 'golden'

# The published implementations behind golden/, and the models of ours that compute the same.
SUFFIXES = {'seed': '_s1', 'community': '', 'official': '_eccv18', 'pytorchcv': '_eccv18'}


def script(name):
    """A module of scripts/, which import each other."""
    folder = str(Path(__file__).parents[1] / 'scripts')
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def golden_cases():
    for source, suffix in SUFFIXES.items():
        for name, case in json.loads((GOLDEN / f'{source}.json').read_text())['cases'].items():
            depth = ''.join(c for c in name if c.isdigit())
            yield source, f'cbam_resnet{depth}{suffix}', case


def golden_case(source, model_name):
    return next(case for s, name, case in golden_cases() if (s, name) == (source, model_name))


def golden_state_dict(case):
    """Fill the state dict by golden/'s rule. The published networks hold float32, so the numbers are rounded to it."""
    state_dict = {}
    for j, (key, shape) in enumerate(case['keys']):
        numel = math.prod(shape)
        s = torch.sin(0.37 * torch.arange(1, numel + 1, dtype=torch.float64) + 1.3 * (j + 1)).reshape(shape)
        if key.endswith('running_var'):
            value = 1 + 0.5 * s * s
        elif key.endswith('running_mean') or key.endswith('bias'):
            value = 0.1 * s
        elif key.endswith('num_batches_tracked'):
            value = torch.tensor(0)
        elif len(shape) == 1:
            value = 1 + 0.1 * s
        else:
            value = s / math.sqrt(numel / shape[0])
        state_dict[key] = value.float() if value.is_floating_point() else value
    return state_dict


def golden_input(case):
    shape = case['input_shape']
    return torch.cos(0.11 * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).reshape(shape)


def liven(model):
    """Give batch-norms weights and statistics. In a fresh timm ResNet the last one of every block outputs zero, so
    that nothing which comes after it, attention included, would be seen by a test."""
    generator = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor, low, high in (
                    (m.weight, 0.5, 1.5), (m.bias, -0.2, 0.2), (m.running_mean, -0.2, 0.2), (m.running_var, 0.5, 1.5)):
                tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


@contextmanager
def plain_path():
    """Blocks run module by module, as timm's do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('timm_cbam.fusion.FUSED', False)
        yield


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def _run(code, env):
    return subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, env={**os.environ, **env})


def run(code, **env):
    """Run code in a process of its own and return what it prints."""
    result = _run(code, env)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fail(code, **env):
    """Run code that has to fail in a process of its own and return what it writes to stderr."""
    result = _run(code, env)
    assert result.returncode == 1, result.stdout
    return result.stderr
