#!/usr/bin/env python3
"""Measurements of timm-cbam beside what it is compared with, in the same run

startup: milliseconds that the start-up hook adds to every start of Python. Two empty virtual environments, one of them
    with the start-up files, take turns; the numbers are medians, the difference is that of each pair's median.
"""
import argparse
import compileall
import shutil
import statistics
import subprocess
import time
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

STARTUP = Path(__file__).parents[1] / 'timm_cbam' / 'startup'


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    command = commands.add_parser('startup', help='cost of the start-up hook')
    command.add_argument('--runs', type=int, default=200)
    command.set_defaults(run=startup)
    args = parser.parse_args()
    args.run(args)


if __name__ == '__main__':
    main()
