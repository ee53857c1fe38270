#!/usr/bin/env python
"""What Triton's compiler makes of the kernels of ops/tail_triton.py, for GPUs that need not be there

python scripts/kernels.py [--targets 80 90]

prints, for each target, kernel, memory format and dtype: registers of a thread, bytes that it spills, bytes of shared
memory, warps that a multiprocessor holds at that, and the widest load and store in bytes. Kernels get the arguments
that a block of ResNet-50 gives them.
"""
import argparse
import re
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from timm_cbam.ops import Tail, tail_triton

SHAPE = (256, 256, 56, 56)
TARGETS = (80, 86, 89, 90, 100, 120)
PROCESSORS = 132  # an H100's
WARPS = 4  # of a program
# Warps, and registers and bytes of shared memory, of a multiprocessor
LIMITS = {80: (64, 164), 86: (48, 100), 89: (48, 100), 90: (64, 228), 100: (64, 228), 120: (48, 100)}
REGISTERS = 65536
FORMATS = {'nchw': torch.contiguous_format, 'channels_last': torch.channels_last}
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
TYPES = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16', torch.float64: '*fp64'}


class Launch(NamedTuple):
    kernel: triton.runtime.JITFunction
    arguments: Dict[str, Any]


def kernels() -> Dict[str, triton.runtime.JITFunction]:
    """Those that are launched, by name"""
    return {
        name: value for name, value in vars(tail_triton).items()
        if isinstance(value, triton.runtime.JITFunction) and any(n.startswith('BLOCK_') for n in value.arg_names)}


@contextmanager
def recorded(processors: int = PROCESSORS) -> Iterator[List[Launch]]:
    """In this context kernels are not launched, but put into a list; as on a GPU with that many multiprocessors."""
    found: List[Launch] = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: found.append(
                Launch(self.kernel, {**dict(zip(self.kernel.arg_names, args, strict=False)), **kwargs}))

    replacements = {name: Recorder(kernel) for name, kernel in kernels().items()}
    with patch.multiple(tail_triton, **replacements, _processors=lambda device: processors):
        yield found


def _maps(shape: Tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, count: int) -> Iterator:
    return (torch.empty(shape, dtype=dtype, device='meta', memory_format=memory_format) for _ in range(count))


def _small(dtype: torch.dtype, *size: int) -> torch.Tensor:
    return torch.empty(size, device='meta', dtype=torch.promote_types(dtype, torch.float32))


def run_tail(
        shape: Tuple[int, ...],
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        training: bool,
) -> None:
    """A training step or inference of a block's tail on meta, where nothing is computed."""
    x, out = _maps(shape, dtype, memory_format, 2)
    c, r = shape[1], max(1, shape[1] // 16)
    sizes = (c,), (c,), (c,), (c,), (r, c, 1, 1), None, (c, r, 1, 1), None, (1, 2, 7, 7)
    p = Tail(
        *(None if size is None else _small(dtype, *size) for size in sizes), *(None,) * 5, training=training, eps=1e-5,
        bn_training=False, bn_eps=0.)
    if training:
        tail_triton.backward(x, x, out, p, tail_triton.forward(x, x, out, p))
    else:
        tail_triton.infer(x, x, p)


def run_norm(shape: Tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Batch-norm and ReLU of another of the block's layers, in inference"""
    x, = _maps(shape, dtype, memory_format, 1)
    tail_triton.norm_relu(x, *(_small(dtype, shape[1]) for _ in range(4)), 1e-5, True)


def build(launch: Launch, capability: int) -> CompiledKernel:
    """As Triton's launcher would ask for it"""
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        is_tensor = isinstance(value, torch.Tensor)
        is_one = not is_tensor and value == 1 and not param.do_not_specialize
        if param.is_constexpr or value is None or is_one:
            signature[param.name] = 'constexpr'
            constants[param.name] = value
            continue
        signature[param.name] = TYPES[value.dtype] if is_tensor else 'i32'
        if is_tensor or value % 16 == 0 and not param.do_not_specialize:
            attributes[i,] = [['tt.divisibility', 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, GPUTarget('cuda', capability, 32), dict(num_warps=WARPS))


def properties(compiled: CompiledKernel, capability: int) -> Dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, 'kernel.cubin')
        cubin.write_bytes(compiled.asm['cubin'])
        tool = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
        usage = subprocess.run([tool, '-res-usage', cubin], check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf'{name}:(\d+)', usage)[1]) for name in ('REG', 'STACK'))
    shared = compiled.metadata.shared
    warps, kilobytes = LIMITS[capability]
    programs = min(
        warps // WARPS, REGISTERS // (-(-registers // 8) * 8 * 32 * WARPS),
        kilobytes * 1024 // (shared + 1024))  # a kilobyte is the system's
    return dict(
        registers=registers, spilled=stack, shared=shared, warps=programs * WARPS,
        **{name: max(
            (int(n or 1) * int(bits) // 8 for n, bits in re.findall(
                rf'{op}\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)', compiled.asm['ptx'])), default=0)
           for name, op in (('load', 'ld'), ('store', 'st'))})


def table(targets: Tuple[int, ...]) -> Iterator[Dict[str, Any]]:
    for capability in targets:
        for format_name, memory_format in FORMATS.items():
            for dtype_name, dtype in DTYPES.items():
                with recorded() as launches:
                    run_tail(SHAPE, dtype, memory_format, True)  # the kernels of inference are among these
                    run_norm(SHAPE, dtype, memory_format)
                seen = set()
                for launch in launches:
                    name = launch.kernel.__name__
                    if name not in seen:
                        seen.add(name)
                        yield dict(
                            target=f'sm_{capability}', kernel=name, format=format_name, dtype=dtype_name,
                            **properties(build(launch, capability), capability))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--targets', type=int, nargs='+', choices=TARGETS, default=TARGETS, help='compute capabilities')
    args = parser.parse_args()
    for i, row in enumerate(table(args.targets)):
        if i == 0:
            print(f'| {" | ".join(row)} |\n{"|---" * len(row)}|')
        print(f'| {" | ".join(map(str, row.values()))} |', flush=True)


if __name__ == '__main__':
    main()
