"""The native loops of tail_cpu.cpp, where scripts/hatch_build.py has built them"""
import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Optional, Tuple

import torch

_ABI = 2  # what cbam_abi() returns; both go up whenever the signature of an exported function changes
_LEVELS = ('avx2', 'avx512')  # PyTorch has more, for processors where one library does


@cache
def load() -> Tuple[Optional[ctypes.CDLL], str]:
    """The library and the SIMD level that it is for, or None and the reason why there is none."""
    if os.environ.get('TIMM_CBAM_NATIVE') == '0':
        return None, 'TIMM_CBAM_NATIVE=0'

    level = torch.backends.cpu.get_cpu_capability().lower()
    file = Path(__file__).with_name(f'_tail_cpu_{level if level in _LEVELS else "default"}.so')
    if not file.exists():
        return None, f'{file.name} was not built: reinstall timm-cbam with a C++ compiler, on Linux or macOS'

    try:
        parallel_for = ctypes.CDLL(torch._C.__file__).torch_parallel_for  # libtorch_cpu's, which torch._C depends on
    except (AttributeError, OSError):
        return None, f'torch {torch.__version__} has no torch_parallel_for, 2.10 and later have'

    try:
        library = ctypes.CDLL(str(file))
        library.cbam_abi.restype = ctypes.c_int64
        abi = library.cbam_abi()
        if abi == _ABI:
            library.cbam_init(ctypes.cast(parallel_for, ctypes.c_void_p))
    except (AttributeError, OSError) as e:
        return None, f'{file.name} does not load: {e}'
    if abi != _ABI:
        return None, f'{file.name} is of another version of timm-cbam, {abi} instead of {_ABI}: reinstall it'
    return library, file.stem.rpartition('_')[2]
