#!/usr/bin/env python
"""What Triton's compiler makes of the kernels of ops/tail_triton.py, for GPUs that need not be there

python scripts/kernels.py [--targets 80 90]

prints, for each target, kernel, memory format and dtype: registers of a thread, bytes that it spills, bytes of shared
memory, warps that a multiprocessor holds at that, and the widest load and store in bytes. Kernels get the arguments
that a block of ResNet-50 (256 channels, 56 x 56 pixels, 256 images) gives them.
"""
import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from timm_cbam.ops import Tail, tail_triton

TARGETS = (80, 86, 89, 90, 100, 120)
PROCESSORS = 132  # an H100's
WARPS = 4  # of a program
# Warps, and registers and bytes of shared memory, of a multiprocessor
LIMITS = {80: (64, 164), 86: (48, 100), 89: (48, 100), 90: (64, 228), 100: (64, 228), 120: (48, 100)}
REGISTERS = 65536
FORMATS = {'nchw': torch.contiguous_format, 'channels_last': torch.channels_last}
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
TYPES = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16', torch.float64: '*fp64'}
# Times that each kernel reads or writes something of a map's size
MAPS = dict(_pool_space=1, _pool_channels=1, _gate_add=3, _a=4, _b=1, _c=3, _norm_relu=2)


class Launch(NamedTuple):
    kernel: triton.runtime.JITFunction
    arguments: Dict[str, Any]


def kernels() -> Dict[str, triton.runtime.JITFunction]:
    """Those that are launched, by name"""
    return {
        name: value for name, value in vars(tail_triton).items()
        if isinstance(value, triton.runtime.JITFunction) and any(n.startswith('BLOCK_') for n in value.arg_names)}


def launches(
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        shape: Tuple[int, ...] = (256, 256, 56, 56),
        processors: int = PROCESSORS,
) -> List[Launch]:
    """What a block launches in a training step and in inference: nothing runs, maps are on meta."""
    found = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: found.append(
                Launch(self.kernel, {**dict(zip(self.kernel.arg_names, args, strict=False)), **kwargs}))

    b, c, h, w = shape
    x = torch.empty(shape, dtype=dtype, device='meta', memory_format=memory_format)
    r = max(1, c // 16)

    def small(*size: int) -> torch.Tensor:
        return torch.empty(size, device='meta', dtype=torch.promote_types(dtype, torch.float32))

    p = Tail(
        *(small(c) for _ in range(4)), small(r, c, 1, 1), None, small(c, r, 1, 1), None, small(1, 2, 7, 7),
        *(None,) * 5, training=True, eps=1e-5, bn_training=False, bn_eps=0.)
    originals = {**kernels(), '_processors': tail_triton._processors}
    try:
        for name, kernel in kernels().items():
            setattr(tail_triton, name, Recorder(kernel))
        tail_triton._processors = lambda device: processors
        tail_triton.backward(x, x, x, p, tail_triton.forward(x, x, torch.empty_like(x), p))
        tail_triton.infer(x, x, p._replace(training=False))
        tail_triton.norm_relu(x, *p[:4], p.eps, True)
    finally:
        for name, original in originals.items():
            setattr(tail_triton, name, original)
    return found


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
                seen = set()
                for launch in launches(dtype, memory_format):
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
