"""ops/native.py: which library of native loops it loads, and what it says where there is none

Where the checkout was installed without a C++ compiler, there is none for any level.
"""
import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import run

from timm_cbam import __version__, fusion
from timm_cbam.cli import main
from timm_cbam.ops import native

OPS = Path(native.__file__).parent


@pytest.fixture
def load(monkeypatch, tmp_path):
    """load() as in a fresh process, of an installation whose libraries are files in tmp_path."""
    monkeypatch.delenv('TIMM_CBAM_NATIVE', raising=False)
    monkeypatch.setattr(native, '__file__', str(tmp_path / 'native.py'))
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX2')
    return native.load.__wrapped__


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A library that loads, made up, so that no compiler is needed; the same object stands for PyTorch's."""
    (tmp_path / '_tail_cpu_avx2.so').touch()
    calls = []
    library = SimpleNamespace(
        cbam_abi=lambda: native._ABI, cbam_init=lambda pointer: calls.append(pointer.value),
        torch_parallel_for=ctypes.CFUNCTYPE(None)(1234), calls=calls)
    monkeypatch.setattr(native.ctypes, 'CDLL', lambda path: library)
    return library


@pytest.mark.parametrize('capability', ['default', 'avx2', 'avx512'])
def test_library_is_for_what_pytorch_picked(capability):
    code = '''
        import torch
        from timm_cbam.ops import native
        print(torch.backends.cpu.get_cpu_capability().lower(), *native.load())
    '''
    level, library, which = run(code, ATEN_CPU_CAPABILITY=capability, TIMM_CBAM_NATIVE='1').split(maxsplit=2)
    level = level if level in ('avx2', 'avx512') else 'default'
    if (OPS / f'_tail_cpu_{level}.so').exists():
        assert library != 'None' and which.split()[-1] == level
    else:
        assert library == 'None' and which.startswith(f'_tail_cpu_{level}.so was not built')


@pytest.mark.parametrize('capability', ['DEFAULT', 'NO AVX', 'NEON', 'SVE256', 'AVX2', 'AVX512'])
def test_library_of_every_level(capability, load, library, monkeypatch, tmp_path):
    (tmp_path / '_tail_cpu_default.so').touch()
    (tmp_path / '_tail_cpu_avx512.so').touch()
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    assert load() == (library, capability.lower() if capability in ('AVX2', 'AVX512') else 'default')


def test_library_gets_the_threads_of_pytorch(load, library):
    assert load() == (library, 'avx2')
    assert library.calls == [1234]


def test_switched_off(load, library, monkeypatch):
    monkeypatch.setenv('TIMM_CBAM_NATIVE', '0')
    assert load() == (None, 'TIMM_CBAM_NATIVE=0')
    assert not library.calls


def test_not_built(load):
    expected = '_tail_cpu_avx2.so was not built: reinstall timm-cbam with a C++ compiler, on Linux or macOS'
    assert load() == (None, expected)


def test_pytorch_without_threads_for_others(load, library):
    del library.torch_parallel_for
    expected = f'torch {torch.__version__} has no torch_parallel_for, 2.10 and later have'
    assert load() == (None, expected)
    assert not library.calls


def test_no_library(load, tmp_path):
    """What a build that was cut off could have left, or one for another processor."""
    (tmp_path / '_tail_cpu_avx2.so').write_bytes(b'not a library')
    library, why = load()
    assert library is None and why.startswith('_tail_cpu_avx2.so does not load: ')


@pytest.mark.parametrize('missing', ['cbam_abi', 'cbam_init'])
def test_library_without_our_functions(missing, load, library):
    delattr(library, missing)
    found, why = load()
    assert found is None and missing in why


def test_library_of_another_version(load, library):
    library.cbam_abi = lambda: native._ABI + 1
    found, why = load()
    assert found is None and why.startswith('_tail_cpu_avx2.so is of another version of timm-cbam')
    assert not library.calls


@pytest.mark.parametrize('fused, library, which, expected', [
    (True, object(), 'avx2', 'native loops (avx2)'),
    (True, None, 'no reason', 'PyTorch operations (no reason)'),
    (False, object(), 'avx2', 'module by module (TIMM_CBAM_FUSED=0)')])
def test_version_says_what_runs(fused, library, which, expected, monkeypatch, capsys):
    monkeypatch.setattr(native, 'load', lambda: (library, which))
    monkeypatch.setattr(fusion, 'FUSED', fused)
    with pytest.raises(SystemExit) as e:
        main(['--version'])
    assert e.value.code == 0
    assert capsys.readouterr().out == f'timm-cbam {__version__}\nCPU: {expected}\n'
