#!/usr/bin/env python3
"""Random models and random damage, reproducible by number: case N is the same on every run

models: a network of random depth, stem, arguments, input size, dtype and memory format is built, run with fused and
    with plain operations, forward and backward, saved, loaded and run again. Fused operations may be as far from plain
    ones in float64 as plain ones in the same dtype are, times a constant; what was loaded computes the same bits.
files: a checkpoint or its folder is damaged (bits, bytes, ends, headers, shapes, names, hostile pickles), and read by
    `timm-cbam convert` or timm. It must be read, or refused by an exception that says something, with bounded memory
    and time, without running what is in it, and without leaving anything behind.

Prints the counts of what happened, and the number of each case that went wrong; exits with 1 if there was one.
"""
import argparse
import collections
import contextlib
import io
import json
import logging
import random
import resource
import shutil
import struct
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, Iterator

import timm
import torch
from timm.models import save_for_hf
from torch import nn
from tqdm import tqdm

from timm_cbam import fusion
from timm_cbam.convert import convert

_SECONDS = 20  # that a damaged file may take
_MIB = 1500  # that damaged files may add to the memory of the process


def _random_config(rng: random.Random) -> Dict[str, Any]:
    """Arguments of create_model; all of them can be written to a config.json."""
    bottleneck = rng.random() < 0.5
    model_name = f'cbam_resnet{50 if bottleneck else 18}{rng.choice(("", "", "_s1", "_eccv18"))}'
    arrangement = rng.choice(('channel_spatial',) * 3 + ('spatial_channel', 'parallel', 'channel', 'spatial'))
    cbam_args = dict(
        arrangement=arrangement, rd_ratio=rng.choice((1 / 4, 1 / 2, 1)), kernel_size=rng.choice((1, 3, 7)),
        mlp_bias=rng.random() < 0.5, spatial_norm=rng.random() < 0.3,
        channel_pooling=rng.choice(('avgmax', 'avgmax', 'avg', 'max')),
        spatial_pooling=rng.choice(('avgmax', 'avgmax', 'avg', 'max')),
        gate_layer=rng.choice(('sigmoid', 'sigmoid', 'hard_sigmoid')))
    kwargs: Dict[str, Any] = dict(
        layers=[rng.randint(1, 2) for _ in range(4)], channels=rng.sample((4, 8, 12, 20), 4), cbam_args=cbam_args,
        in_chans=rng.randint(1, 4), num_classes=rng.choice((0, 1, 10)),
        global_pool=rng.choice(('avg', 'max', 'avgmax')),
        zero_init_last=rng.random() < 0.5, drop_path_rate=rng.choice((0., 0., 0.2)), output_stride=rng.choice((8, 32)),
        avg_down=rng.random() < 0.3, act_layer=rng.choice(('relu', 'relu', 'silu')))
    if not model_name.endswith('_s1'):
        kwargs.update(stem_type=rng.choice(('', 'deep')), replace_stem_pool=rng.random() < 0.2)
    elif kwargs['output_stride'] == 32:
        kwargs['output_stride'] = rng.choice((2, 4, 8))
    if bottleneck:
        kwargs.update(cardinality=rng.choice((1, 2)), base_width=64)
    return dict(model_name=model_name, **kwargs)


def _liven(model: nn.Module, generator: torch.Generator) -> None:
    """Batch-norms and gates of a trained network; in a new one the attention does not show."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight, m.running_mean):
                t.data.copy_(torch.empty(t.shape).uniform_(-1.5, 1.5, generator=generator))
            m.running_var.copy_(torch.empty(m.running_var.shape).uniform_(0.5, 2, generator=generator))


@contextlib.contextmanager
def _plain_operations() -> Iterator[None]:
    fused, fusion.FUSED = fusion.FUSED, False
    try:
        yield
    finally:
        fusion.FUSED = fused


def _run(model: nn.Module, x: torch.Tensor, training: bool) -> torch.Tensor:
    """Output and, when training, gradients of a model, as one float64 vector."""
    torch.manual_seed(0)
    model.train(training).zero_grad()
    if not training:
        with torch.inference_mode():
            return model(x).double().flatten()
    out = model(x)
    out.square().sum().backward()
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([out.detach().double().flatten(), *grads])


def _check_model(seed: int, folder: Path) -> str:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    config = _random_config(rng)
    dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
    memory_format = rng.choice((torch.contiguous_format, torch.channels_last))
    training = dtype == torch.float64 and rng.random() < 0.7  # rounding grows without bound in so small batch-norms
    shape = (rng.randint(1 + training, 3), config['in_chans'], rng.randint(32, 70), rng.randint(32, 70))
    torch.manual_seed(seed)
    model = timm.create_model(**config)
    _liven(model, generator)
    model = model.to(dtype=dtype, memory_format=memory_format)
    x = torch.randn(shape, generator=generator).to(dtype=dtype, memory_format=memory_format)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fused = _run(model, x, training)
    model.load_state_dict(state)
    with _plain_operations():
        plain = _run(model, x, training)
        model.load_state_dict(state)
        exact = _run(model.double(), x.double(), training)
    model.load_state_dict(state)
    scale = exact.norm() + 1e-30
    error = (fused - exact).norm() / scale
    allowed = 1e-6 if training else 4 * (plain - exact).norm() / scale + 50 * torch.finfo(dtype).eps
    if not error <= allowed:
        raise AssertionError(f'fused operations are off by {error:.1e}, allowed {allowed:.1e}: {config}')
    model = model.to(dtype)
    expected = _run(model, x, False)
    save_for_hf(model, str(folder / 'model'), model_args={k: v for k, v in config.items() if k != 'model_name'})
    loaded = timm.create_model(f'local-dir:{folder / "model"}', pretrained=True).to(
        dtype=dtype, memory_format=memory_format)
    if not torch.equal(_run(loaded, x, False), expected):
        raise AssertionError(f'the loaded model computes something else: {config}')
    return f'{str(dtype)[6:]} {"train" if training else "eval"}'


class _Canary:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return eval, (f"open({str(self.file)!r}, 'w')",)


def _damage_bytes(rng: random.Random, data: bytearray, end: int) -> bytearray:
    """Damage a file, most often where its structure is: the first `end` bytes or the last."""
    how = rng.choice(('bits', 'bits', 'bytes', 'cut', 'insert', 'zeros', 'append'))
    spot = rng.choice((rng.randrange(min(end, len(data))), len(data) - 1 - rng.randrange(min(4096, len(data)))))
    if how == 'bits':
        for _ in range(rng.choice((1, 1, 5, 50))):
            data[max(0, min(len(data) - 1, spot + rng.randrange(-64, 64)))] ^= 1 << rng.randrange(8)
    elif how == 'bytes':
        data[spot:spot + 8] = rng.randbytes(8)
    elif how == 'cut':
        del data[rng.choice((spot, rng.randrange(len(data)))):]
    elif how == 'insert':
        data[spot:spot] = rng.randbytes(rng.randrange(1, 64))
    elif how == 'zeros':
        data[spot:spot + 256] = bytes(256)
    else:
        data += rng.randbytes(rng.randrange(1, 4096))
    return data


def _damage_header(rng: random.Random, data: bytearray) -> bytearray:
    """Change what the header of a safetensors file claims."""
    size = struct.unpack('<Q', data[:8])[0]
    header = json.loads(data[8:8 + size])
    name = rng.choice([k for k in header if k != '__metadata__'])
    entry = header[name]
    how = rng.randrange(6)
    if how == 0:
        entry['dtype'] = rng.choice(('F64', 'F16', 'I64', 'BOOL', 'F8_E4M3', 'X', 7))
    elif how == 1:
        entry['shape'] = rng.choice(([2 ** 40], [2 ** 63], [-1], [0], [1] * 200, [], ['x'], entry['shape'][::-1]))
    elif how == 2:
        entry['data_offsets'] = rng.choice(([0, 2 ** 50], [5, 1], [-1, 4], [0, 0]))
    elif how == 3:
        header[rng.choice(('../../../tmp/x', '/etc/passwd', 'a\x00b', '', 'fc.weight.weight', '💥'))] = header.pop(name)
    elif how == 4:
        del header[name]
    else:
        header = rng.choice(([], {}, 7, {'__metadata__': 5}, {'a': {}}))
    new = json.dumps(header).encode()
    return bytearray(struct.pack('<Q', rng.choice((len(new), len(new), 2 ** 62)))) + new + data[8 + size:]


def _damage_tensors(rng: random.Random, state: Dict[str, Any], canary: Path) -> Any:
    """A checkpoint that torch.load may read, but which is none."""
    name = rng.choice(list(state))
    value = state[name]
    how = rng.randrange(8)
    if how == 0:
        state[name] = torch.zeros(1).expand(2 ** 30, 2 ** 10)
    elif how == 1:
        state[name] = rng.choice((7, None, 'x', [1], {}, torch.zeros(0), torch.tensor(float('nan'))))
    elif how == 2:
        state[name] = value.to(rng.choice((torch.float16, torch.int8, torch.complex64, torch.bool)))
    elif how == 3:
        state[name] = value.to_sparse() if value.ndim else value[None]
    elif how == 4:
        state[rng.choice(('../x', '', 'module.' + name, 'fc.weight', 7, None))] = state.pop(name)
    elif how == 5:
        state[name] = _Canary(canary)
    elif how == 6:
        return rng.choice(([], 7, {'state_dict': 7}, {'state_dict': {'state_dict': {}}}, {'model': [state]}, value))
    else:
        state[name] = torch.nn.Parameter(value.reshape(-1)) if value.is_floating_point() else value
    return state


def _damage_config(rng: random.Random, config: Dict[str, Any]) -> Dict[str, Any]:
    values = (None, -1, 0, 2 ** 31, 1.5, '', '../../etc/passwd', [], {}, [1, 2, 3], True, 'nan', {'a': {'b': []}})
    place = config
    while True:
        key = rng.choice(list(place))
        if isinstance(place[key], dict) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        if rng.random() < 0.2:
            del place[key]
        else:
            place[rng.choice((key, key, 'unknown'))] = rng.choice(values)
        return config


def _check_file(seed: int, folder: Path, original: Path) -> str:
    rng = random.Random(seed)
    kind = rng.choice(('safetensors bytes', 'safetensors header', 'pth bytes', 'pth content', 'config'))
    canary, work, out = folder / 'canary', folder / 'work', folder / 'out' / 'model'
    work.mkdir()
    if kind == 'config':
        shutil.copytree(original, work / 'model')
        config = _damage_config(rng, json.loads((original / 'config.json').read_text()))
        text = bytearray(json.dumps(config).encode())
        text = _damage_bytes(rng, text, len(text)) if rng.random() < 0.3 else text
        (work / 'model' / 'config.json').write_bytes(text)
        read = partial(timm.create_model, f'local-dir:{work / "model"}', pretrained=True)
    else:
        file = work / ('x.safetensors' if kind.startswith('safe') else 'x.pth')
        if kind == 'pth content':
            content = _damage_tensors(rng, torch.load(original / 'x.pth', weights_only=True), canary)
            torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.8)
        else:
            data = bytearray((original / ('model.safetensors' if 'safe' in kind else 'x.pth')).read_bytes())
            file.write_bytes(_damage_header(rng, data) if 'header' in kind else _damage_bytes(rng, data, 1 << 16))
        read = partial(convert, file, out)
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            read()
        result = 'read'
    except (ValueError, RuntimeError, OSError) as e:
        result = f'refused, {type(e).__name__}'
        if not str(e):
            raise AssertionError(f'{kind}: {e!r} says nothing') from e
    except Exception as e:
        if kind != 'config':  # of config.json timm is the reader
            raise AssertionError(f'{kind}: {type(e).__name__}: {e}') from e
        result = 'refused by timm'
    seconds = time.perf_counter() - start
    if seconds > _SECONDS:
        raise AssertionError(f'{kind}: took {seconds:.0f} s')
    if canary.exists():
        raise AssertionError(f'{kind}: the code in the file was run')
    left = sorted(p.name for p in out.parent.iterdir()) if out.parent.exists() else []
    if left != (['model'] if kind != 'config' and result == 'read' else []):
        raise AssertionError(f'{kind}: left behind {left}')
    return f'{kind}: {result}'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('models', 'files'))
    parser.add_argument('--cases', type=int, default=10_000)
    parser.add_argument('--first', type=int, default=0, help='number of the first case')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    logging.disable()
    counts, failures = collections.Counter(), 0
    with TemporaryDirectory() as root:
        original = Path(root, 'original')
        model = timm.create_model('cbam_resnet18', num_classes=10)
        save_for_hf(model, str(original), safe_serialization=True)
        torch.save(model.state_dict(), original / 'x.pth')
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for seed in tqdm(range(args.first, args.first + args.cases), desc=args.what, mininterval=5):
            with TemporaryDirectory(dir=root) as folder:
                try:
                    if args.what == 'models':
                        counts[_check_model(seed, Path(folder))] += 1
                    else:
                        counts[_check_file(seed, Path(folder), original)] += 1
                except Exception as e:
                    failures += 1
                    tqdm.write(f'case {seed}: {type(e).__name__}: {e}')
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    for name, count in sorted(counts.items()):
        print(f'{count:6} {name}')
    print(f'{failures:6} wrong; memory grew by {memory:.0f} MiB at most')
    return int(failures > 0 or args.what == 'files' and memory > _MIB)


if __name__ == '__main__':
    sys.exit(main())
