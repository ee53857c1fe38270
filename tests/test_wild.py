"""2,000 files as they may lie on somebody's disk: right logits, or a refusal that names the cause"""
import collections
import gzip
import random
import re

import numpy as np
import pytest
import timm
import torch
from helpers import relative_error
from reference import ATTENTION, Network
from safetensors.torch import save_file
from test_layouts import CBAM_ARGS, CHANNELS, REFUSED
from test_unwrap import CONTAINERS, PREFIXES, REPARAMETRISED
from torch import nn

from timm_cbam import convert_state_dict
from timm_cbam.files import read_checkpoint

pytestmark = pytest.mark.slow

IMAGES = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1)).double()
STRAYS = [{}, {}, {'n_averaged': torch.tensor(3)}, {'criterion.weight': torch.ones(3)}, {'epoch': 3},
          {'layer1.total_ops': torch.zeros(1)}, {'fc._extra_state': torch.zeros(1)}]
HEADS = ['fc', 'fc', 'head.fc', 'classifier', 'fc.1', 'last_linear']


def as_zip(checkpoint, file):
    torch.save(checkpoint, file)


def as_legacy(checkpoint, file):
    torch.save(checkpoint, file, _use_new_zipfile_serialization=False)


def as_numpy(checkpoint, file):
    def convert(value):
        if isinstance(value, dict):
            return {k: convert(v) for k, v in value.items()}
        return value.float().numpy() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    torch.save(convert(checkpoint), file)


def as_safetensors(checkpoint, file):
    save_file({k: v.contiguous().clone() for k, v in checkpoint.items() if isinstance(v, torch.Tensor)}, file)


# How a file is written, whether it can hold containers, and what is said if it is refused
FORMATS = {
    'zip': (as_zip, True, None), 'legacy': (as_legacy, True, None), 'numpy': (as_numpy, True, None),
    'safetensors': (as_safetensors, False, None),
    'gzip': (lambda c, f: (as_zip(c, f), f.write_bytes(gzip.compress(f.read_bytes(), 1))), True, 'gzip'),
    'npz': (lambda c, f: np.savez(f.open('wb'), **{k: np.zeros(1) for k in c}), False, 'NumPy arrays'),
    'cut off': (lambda c, f: (as_zip(c, f), f.write_bytes(f.read_bytes()[:-999])), True, 'cut off'),
}


def choose(rng):
    """A file: how it is made, what is expected of our model, and the cause if it is refused."""
    attention, refusal = rng.choice(sorted(ATTENTION)), None
    theirs = Network(attention, small=rng.random() < 0.3, bottleneck=rng.random() < 0.3, layers=(1, 1, 1, 1))
    dtype = rng.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64])
    if dtype in (torch.float32, torch.float64) and rng.random() < 0.15:  # what they compute depends on the precision
        what = rng.choice([name for name in REPARAMETRISED if name != 'spectral_norm'])
        for m in list(theirs.modules()):
            if isinstance(m, nn.Conv2d):
                REPARAMETRISED[what](m)
    state_dict = {
        k: v.to(dtype) if v.is_floating_point() else v for k, v in theirs.state_dict().items()}
    kwargs = {}
    if rng.random() < 0.1:
        keys, refusal = REFUSED[rng.choice(sorted(REFUSED))]
        if attention != 'none':
            refusal = f'{refusal}|{re.escape(keys[0])}'
        state_dict.update({key: torch.zeros(1, 1, 1, 1) for key in keys})
    head, prefix = rng.choice(HEADS), rng.choice(PREFIXES)
    state_dict = {
        k.replace('fc.', f'{head}.', 1) if k.startswith('fc.') else prefix + k: v for k, v in state_dict.items()}
    if head == 'fc' and rng.random() < 0.8:
        state_dict = {prefix + k if k.startswith('fc.') else k: v for k, v in state_dict.items()}
    state_dict = {**rng.choice(STRAYS), **state_dict}
    if rng.random() < 0.1:
        two = {f'teacher.{k}': v for k, v in state_dict.items()}
        other = {f'student.{k}': torch.zeros_like(v) if isinstance(v, torch.Tensor) else v
                 for k, v in state_dict.items()}
        state_dict = {**two, **other}
        if rng.random() < 0.5:
            kwargs['prefix'] = f'teacher.{prefix}'
            if head != 'fc' or f'teacher.{prefix}fc.weight' not in state_dict:
                kwargs['headless'] = True
        else:
            refusal = 'networks'
    name = rng.choice(sorted(FORMATS))
    write, nested, cause = FORMATS[name]
    checkpoint = CONTAINERS[rng.choice(sorted(CONTAINERS))](state_dict) if nested and rng.random() < 0.7 else state_dict
    if name == 'numpy' and dtype == torch.float64:
        dtype = torch.float32
    return theirs, attention, dtype, checkpoint, write, cause or refusal, kwargs


@pytest.mark.filterwarnings('ignore')
def test_files(tmp_path):
    counts = collections.Counter()
    models = {}
    for seed in range(2000):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        theirs, attention, dtype, checkpoint, write, cause, kwargs = choose(rng)
        headless = kwargs.pop('headless', False)
        file = tmp_path / f'{seed}{rng.choice([".pth", ".safetensors", ".bin", ".ckpt", ""])}'
        write(checkpoint, file)
        small, bottleneck = theirs.small, hasattr(theirs.layer1[0], 'conv3')
        key = attention, small, bottleneck
        if key not in models:
            models[key] = timm.create_model(
                f'cbam_resnet{50 if bottleneck else 18}{"_s1" if small else ""}', layers=(1, 1, 1, 1),
                channels=CHANNELS, num_classes=10, cbam_args=CBAM_ARGS.get(attention, {}), dtype=torch.float64).eval()
        ours = models[key]
        for p in ours.parameters():
            p.data.fill_(0.01)
        try:
            ours.load_state_dict(convert_state_dict(read_checkpoint(file), ours, **kwargs), strict=not headless)
        except (RuntimeError, ValueError) as e:
            assert cause and re.search(cause, str(e), re.DOTALL), (seed, cause, e)
            counts['refused'] += 1
        else:
            assert not cause, (seed, cause)
            reference = theirs.to(dtype).double()
            tolerance = 1e-4 if attention == 'elbuco1' else 1e-5
            mine = ours.forward_features(IMAGES)
            x = reference.bn1(reference.conv1(IMAGES)).relu()
            x = x if small else nn.functional.max_pool2d(x, 3, 2, 1)
            expected = reference.layer4(reference.layer3(reference.layer2(reference.layer1(x))))
            assert relative_error(mine, expected) < tolerance, seed
            if not headless:
                assert relative_error(ours(IMAGES), reference(IMAGES)) < tolerance, seed
            counts['loaded'] += 1
        file.unlink()
    print(counts)
    assert counts['loaded'] > 900 and counts['refused'] > 500  # 975 and 1025
