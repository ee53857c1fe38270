#!/usr/bin/env python3
"""Measurements of timm-cbam beside what it is compared with, in the same run

startup: milliseconds that the start-up hook adds to every start of Python. Two empty virtual environments, one of them
    with the start-up files, take turns; the numbers are medians, the difference is that of each pair's median.
speed: milliseconds of inference or of a training step. The networks take turns, two runs each in a round, of which the
    second is timed; "relative" is the median over rounds of the network's time divided by the plain ResNet's in the
    same round, so that a machine that becomes faster or slower meanwhile does not matter.
deploy: milliseconds of inference as in speed, in ONNX Runtime and OpenVINO, with batches of 1 and 8, in float32 and
    int8 (calibrated with noise, so that only its time means something).
memory: MiB that one forward pass keeps for the backward pass, counted exactly: every storage that autograd saves, once,
    without the parameters, buffers and images, which are there anyway. With --amp the bfloat16 copies of weights count.
gpu: all that is to be known of a GPU: the tests of the Triton kernels, the seconds that their check takes for each
    kind of map and what it finds, and time and peak memory of every row of GPU, as one table.
curve: a picture of the losses of 200 training steps on scikit-learn's handwritten digits, with fused operations and
    without. In float64, because in float32 rounding alone makes two such runs differ after ten steps.

The networks of speed and memory are timm's ResNet without attention ("plain"), with timm's SE and CBAM, and with CBAM
written as the article describes it, and ours module by module ("plain ops"), fused by PyTorch's operations as where no
library was built ("torch ops"), and as it is installed ("ours"). `speed --all` runs all the rows of README's table in
both memory formats. Nothing else should run on the machine: with fewer free cores than --threads, each of PyTorch's
operations waits for the scheduler.
"""
import argparse
import compileall
import itertools
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import venv
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Dict, List

import exports
import timm
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from timm_cbam import fusion
from timm_cbam.ops import check, tail_cpu

STARTUP = Path(__file__).parents[1] / 'timm_cbam' / 'startup'
WARMUP = 3  # rounds
LIBRARY = tail_cpu.LIBRARY
NETWORKS = ('plain', 'timm se', 'timm cbam', 'article', 'plain ops', 'torch ops', 'ours')
FEW_NETWORKS = ('plain', 'timm se', 'timm cbam', 'ours')  # on GPUs and in other runtimes
ALL = {  # rows of README's table
    'inference, batch 1': dict(batch=1),
    'inference, batch 8': dict(batch=8),
    'inference compiled, batch 1': dict(batch=1, compile=True),
    'inference compiled, batch 8': dict(batch=8, compile=True),
    'training step, batch 4': dict(batch=4, train=True),
    'training step compiled, batch 4': dict(batch=4, train=True, compile=True),
    'inference in bfloat16 autocast, batch 8': dict(batch=8, amp=True),
    'training step in bfloat16 autocast, batch 4': dict(batch=4, train=True, amp=True),
}
GPU = [
    dict(train=train, compile=compile_, amp=amp, batch=batch)
    for train in (False, True) for compile_ in (False, True) for amp in (True, False) for batch in (1, 32, 256)]


class ArticleCbam(nn.Module):
    """CBAM as published code writes it, the article's formulas one by one."""

    def __init__(self, channels: int, device=None, dtype=None, **kwargs) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.max_pool = nn.AdaptiveMaxPool2d(1)
        self.fc1 = nn.Conv2d(channels, channels // 16, kernel_size=1, bias=False, **dd)
        self.relu = nn.ReLU()
        self.fc2 = nn.Conv2d(channels // 16, channels, kernel_size=1, bias=False, **dd)
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False, **dd)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        avg_out = self.fc2(self.relu(self.fc1(self.avg_pool(x))))
        max_out = self.fc2(self.relu(self.fc1(self.max_pool(x))))
        x = x * self.sigmoid(avg_out + max_out)
        avg_out = torch.mean(x, dim=1, keepdim=True)
        max_out = torch.max(x, dim=1, keepdim=True)[0]
        return x * self.sigmoid(self.conv(torch.cat([avg_out, max_out], dim=1)))


def create_networks(args: argparse.Namespace) -> Dict[str, nn.Module]:
    plain, ours = f'resnet{args.depth}', f'cbam_resnet{args.depth}'
    networks = {}
    for name, model_name, block_args in (
            ('plain', plain, {}),
            ('timm se', plain, {'attn_layer': 'se'}),
            ('timm cbam', plain, {'attn_layer': 'cbam'}),
            ('article', plain, {'attn_layer': ArticleCbam}),
            ('plain ops', ours, {}),
            ('torch ops', ours, {}),
            ('ours', ours, {}),
    ):
        torch.manual_seed(0)
        model = timm.create_model(model_name, block_args=block_args)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                # a new ResNet's last batch-norms are 0, those of a trained one have both signs
                module.weight.data.uniform_(-1.5, 1.5)
        networks[name] = model.to(args.device, memory_format=memory_format(args))
    return networks


def create_images(args: argparse.Namespace) -> torch.Tensor:
    torch.manual_seed(0)
    images = torch.randn(args.batch, 3, args.size, args.size)
    return images.to(args.device, memory_format=memory_format(args))


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    return torch.channels_last if args.channels_last else torch.contiguous_format


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device, torch.bfloat16, enabled=args.amp)


def select_ops(name: str) -> None:
    fusion.FUSED = name != 'plain ops'
    tail_cpu.LIBRARY = None if name == 'torch ops' else LIBRARY


def device_name(device: str) -> str:
    if device == 'cuda':
        return torch.cuda.get_device_name()
    cpuinfo = Path('/proc/cpuinfo')
    names = re.findall(r'model name\s*: (.+)', cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor()


def report(args: argparse.Namespace, rows: List[Dict[str, Any]]) -> None:
    """Print the settings and a table of rows, append both to the file of --json."""
    settings = {key: value for key, value in vars(args).items() if key not in ('run', 'json', 'all')}
    settings.update(
        device_name=device_name(args.device),
        torch=torch.__version__,
        timm=timm.__version__,
        date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
    )
    print(', '.join(f'{key} {value}' for key, value in settings.items()))
    print(''.join(f'{key:<10}' if key == 'network' else f'{key:>12}' for key in rows[0]))
    for row in rows:
        print(''.join(f'{value:<10}' if key == 'network' else f'{value:12.3f}' for key, value in row.items()))
    if args.json:
        with args.json.open('a') as file:
            file.writelines(json.dumps({**settings, **row}) + '\n' for row in rows)


def startup(args: argparse.Namespace) -> None:
    with TemporaryDirectory() as root:
        commands = {}
        for name in ('without', 'with'):
            venv.create(Path(root, name), symlinks=True)
            site = next(Path(root, name).glob('lib/python*/site-packages'))
            if name == 'with':
                for file in STARTUP.glob('*timm_cbam*'):
                    shutil.copy(file, site)
                compileall.compile_dir(site, quiet=1)  # as pip does
            commands[name] = [str(Path(root, name, 'bin', 'python')), '-c', 'pass']
        times = {name: [] for name in commands}
        for _ in tqdm(range(args.runs), desc='startup'):
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, check=True)
                times[name].append(1000 * (time.perf_counter() - start))
    added = statistics.median(b - a for a, b in zip(times['without'], times['with'], strict=True))
    for name in times:
        print(f'{name:<8} {statistics.median(times[name]):7.2f} ms (median of {args.runs} starts)')
    print(f'hook     {added:+7.2f} ms')


def create_run(model: nn.Module, images: torch.Tensor, args: argparse.Namespace) -> Callable[[], None]:
    model.train(args.train)
    network = torch.compile(model, dynamic=False) if args.compile else model
    if not args.train:
        @torch.inference_mode()
        def infer() -> None:
            with autocast(args):
                network(images)

        return infer

    targets = torch.zeros(args.batch, dtype=torch.long, device=args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)  # too small to diverge: inf and nan are no usual numbers

    def train() -> None:
        with autocast(args):
            loss = F.cross_entropy(network(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def measure(
        runs: Dict[str, Callable[[], None]],
        args: argparse.Namespace,
        synchronize: Callable[[], None] = lambda: None,
) -> List[Dict[str, Any]]:
    """Time of each network, in turns; the first one is what the others are relative to."""
    times = {name: [] for name in runs}
    for _ in tqdm(range(WARMUP + args.runs), desc='speed'):
        for name, run in runs.items():
            select_ops(name)
            run()  # what the network before left in the caches and the heap is not this one's doing
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            times[name].append(1000 * (time.perf_counter() - start))
    first = next(iter(times.values()))
    rows = []
    for name in times:
        low, median, high = statistics.quantiles(times[name][WARMUP:], n=4, method='inclusive')
        ratios = (a / b for a, b in zip(times[name][WARMUP:], first[WARMUP:], strict=True))
        rows.append({'network': name, 'ms': median, 'iqr_ms': high - low, 'relative': statistics.median(ratios)})
    return rows


def deploy(args: argparse.Namespace) -> None:
    networks = create_networks(args)
    for batch, int8, runtime in itertools.product((1, 8), (False, True), ('onnxruntime', 'openvino')):
        settings = argparse.Namespace(**{**vars(args), 'batch': batch, 'int8': int8, 'runtime': runtime})
        images = create_images(settings)
        runs = {}
        for name in FEW_NETWORKS:
            export = (
                exports.onnx(17, int8=int8, threads=args.threads) if runtime == 'onnxruntime' else
                exports.openvino(int8=int8, threads=args.threads))
            with TemporaryDirectory() as folder:
                runs[name] = partial(export(networks[name].eval(), images, Path(folder)), images)
        report(settings, measure(runs, settings))


def speed_all(args: argparse.Namespace) -> None:
    """All rows of ALL in both formats; prints a Markdown table of the medians relative to plain."""
    table = {}
    for row, settings in ALL.items():
        for channels_last in (False, True):
            torch.compiler.reset()
            rows = speed(argparse.Namespace(**{**vars(args), **settings, 'channels_last': channels_last}))
            for measured in rows:
                table.setdefault(row, {}).setdefault(measured['network'], []).append(f"{measured['relative']:.2f}")
    print(f"| relative to plain, NCHW / channels-last | {' | '.join(NETWORKS[1:])} |")
    print('|---' * len(NETWORKS) + '|')
    for row, cells in table.items():
        print(f"| {row} | {' | '.join(' / '.join(cells.get(name, ['-'])) for name in NETWORKS[1:])} |")


def speed(args: argparse.Namespace) -> List[Dict[str, Any]]:
    args.batch = args.batch or (4 if args.train else 8)
    torch.set_num_threads(args.threads)
    synchronize = torch.cuda.synchronize if args.device == 'cuda' else lambda: None
    images = create_images(args)
    names = set(FEW_NETWORKS if args.device == 'cuda' else NETWORKS)
    if args.compile:
        names -= {'plain ops', 'torch ops'}  # the compiler gets plain operations without a library
    runs = {name: create_run(model, images, args) for name, model in create_networks(args).items() if name in names}
    rows = measure(runs, args, synchronize)
    if args.device == 'cuda':
        for row in rows:
            row['peak_mib'] = peak_mib(runs[row['network']])
    report(args, rows)
    return rows


def peak_mib(run: Callable[[], None]) -> float:
    """Of what is allocated during a run, above what is there all the time"""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def gpu(args: argparse.Namespace) -> None:
    tests = Path(__file__).parents[1] / 'tests' / 'test_triton.py'
    print(f'{device_name(args.device)}: tests')
    subprocess.run(  # their result is in the report
        [sys.executable, '-m', 'pytest', '-q', '-o', 'addopts=', '-m', 'not slow', str(tests)], check=False)

    print('\n| check of | seconds | finds |\n|---|---|---|')
    for dtype in check.DTYPES['cuda']:
        for training in (False, True):
            for format_ in (torch.contiguous_format, torch.channels_last):
                x = torch.empty(1, 2, 2, 2, device=args.device, dtype=dtype, memory_format=format_)
                start = time.perf_counter()
                found = check.implementation(x, training)
                seconds = time.perf_counter() - start
                name = 'nothing' if found is None else found.__name__.rpartition('.')[2]
                print(f'| {"training" if training else "inference"} in {dtype}, {format_} | {seconds:.2f} | {name} |')

    lines = []
    for settings in GPU:
        for channels_last in (True, False):
            torch.compiler.reset()
            rows = speed(argparse.Namespace(**{**vars(args), **settings, 'channels_last': channels_last}))
            what = [
                'training step' if settings['train'] else 'inference', 'compiled' if settings['compile'] else 'eager',
                'bfloat16' if settings['amp'] else 'float32', f'batch {settings["batch"]}',
                'channels-last' if channels_last else 'NCHW']
            cells = [f'{row["relative"]:.2f} ({row.get("peak_mib", 0):.0f} MiB)' for row in rows]
            lines.append(f'| {", ".join(what)} | {rows[0]["ms"]:.2f} ms | {" | ".join(cells)} |')
    networks = ' | '.join(row['network'] for row in rows)
    print(f'\n{device_name(args.device)}, time relative to plain and peak memory:\n')
    print(f'| | plain | {networks} |\n|---|---{"|---" * len(rows)}|\n' + '\n'.join(lines))


def kept_mib(model: nn.Module, images: torch.Tensor, args: argparse.Namespace) -> float:
    given = {tensor.untyped_storage().data_ptr() for tensor in (images, *model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, or a later tensor could have the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(args):
        model(images)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in given) / 2 ** 20


def memory(args: argparse.Namespace) -> None:
    images = create_images(args)
    rows = []
    for name, model in create_networks(args).items():
        select_ops(name)
        mib = kept_mib(model, images, args)
        rows.append({'network': name, 'MiB': mib, 'relative': mib / (rows[0]['MiB'] if rows else mib)})
    report(args, rows)


def curve(args: argparse.Namespace) -> None:
    import matplotlib.pyplot as plt
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images[:, None], dtype=torch.float64) / 16 - 0.5
    targets = torch.tensor(digits.target)
    figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
    losses = {}
    for name, color, width in (('plain ops', '#0072B2', 4), ('ours', '#E69F00', 1)):
        select_ops(name)
        torch.manual_seed(0)
        model = timm.create_model('cbam_resnet18_s1', num_classes=10, in_chans=1, channels=(16, 32, 64, 128)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        losses[name] = []
        for step in tqdm(range(args.steps), desc=name):
            batch = torch.arange(32 * step, 32 * (step + 1)) % len(images)
            loss = F.cross_entropy(model(images[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
        axes.plot(losses[name], label=name, color=color, linewidth=width)
    axes.set(xlabel='step', ylabel='cross-entropy', yscale='log', title='cbam_resnet18_s1, handwritten digits, float64')
    axes.legend()
    figure.savefig(args.output)
    difference = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    print(f'largest difference of the losses: {difference:.2g}')


def add_network_options(command: argparse.ArgumentParser) -> None:
    command.add_argument('--depth', type=int, choices=(18, 34, 50, 101, 152), default=50)
    command.add_argument('--size', type=int, default=224, help='of the images')
    command.add_argument('--channels-last', action='store_true')
    command.add_argument('--amp', action='store_true', help='autocast to bfloat16')
    command.add_argument('--json', type=Path, metavar='FILE', help='append a line of JSON for each network')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    command = commands.add_parser('startup', help='cost of the start-up hook')
    command.add_argument('--runs', type=int, default=200)
    command.set_defaults(run=startup)
    command = commands.add_parser('speed', help='time of inference or of a training step')
    add_network_options(command)
    command.add_argument('--batch', type=int, help='default 8, with --train 4')
    command.add_argument('--train', action='store_true', help='time a training step instead of inference')
    command.add_argument('--compile', action='store_true')
    command.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    command.add_argument('--threads', type=int, default=2)
    command.add_argument('--runs', type=int, default=20)
    command.add_argument('--all', action='store_true', help="all rows of README's table, in both memory formats")
    command.set_defaults(run=lambda args: speed_all(args) if args.all else speed(args))
    command = commands.add_parser('gpu', help='everything about the GPU of this machine, about an hour')
    add_network_options(command)
    command.add_argument('--runs', type=int, default=20)
    command.set_defaults(run=gpu, device='cuda', threads=2)
    command = commands.add_parser('deploy', help='time of inference in ONNX Runtime and OpenVINO')
    command.add_argument('--depth', type=int, choices=(18, 34, 50, 101, 152), default=50)
    command.add_argument('--size', type=int, default=224, help='of the images')
    command.add_argument('--threads', type=int, default=2)
    command.add_argument('--runs', type=int, default=20)
    command.add_argument('--json', type=Path, metavar='FILE', help='append a line of JSON for each network')
    command.set_defaults(run=deploy, device='cpu', channels_last=False)
    command = commands.add_parser('memory', help='memory kept for the backward pass')
    add_network_options(command)
    command.add_argument('--batch', type=int, default=2)
    command.set_defaults(run=memory, device='cpu')
    command = commands.add_parser('curve', help='losses of the same training with fused operations and without')
    command.add_argument('--steps', type=int, default=200)
    command.add_argument('-o', '--output', type=Path, default=Path('loss_curve.png'))
    command.set_defaults(run=curve)
    args = parser.parse_args()
    args.run(args)


if __name__ == '__main__':
    main()
