"""tail_cpu.cpp reads and writes what is its own: test_tail.py's operator against builds with GCC's sanitizers

The tests run in a process of their own with a copy of the package that holds the library in question. For
ThreadSanitizer, which does not know of OpenMP's barriers, threads of ours take the place of PyTorch's.
"""
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import script

from timm_cbam.ops import native

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    sys.platform != 'linux' or not shutil.which('g++') or native.load()[0] is None,
    reason='the sanitizers, and how they are preloaded, are those of GCC on Linux; they watch the native loops')]

TESTS = Path(__file__).parent
PACKAGE = Path(native.__file__).parents[1]
FORWARD = 'EXPORT int64_t cbam_forward(const Args* a) {'
CALL = '(*static_cast<std::remove_reference_t<F>*>(context))(begin, end);'
BROKEN = {  # what is found, where, and what to write there
    'heap-buffer-overflow': (FORWARD, '''
        const i64 size = a->b * a->c * a->h * a->w * (a->dtype == 0 ? 4 : a->dtype == 1 ? 8 : 2);
        volatile char behind = static_cast<const char*>(a->x)[size];
        (void)behind;'''),
    'signed integer overflow': (FORWARD, 'volatile i64 most = std::numeric_limits<i64>::max(); most = most + a->b;'),
    'data race': (CALL, 'static i64 calls; calls++;'),
}
THREADS = '''
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

thread_local bool inside;

extern "C" __attribute__((visibility("default"))) int32_t parallel_for(
        int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
    const int64_t size = (end - begin + 3) / 4;  // four threads, however small the pieces
    if (inside || size <= 0) {
        if (end > begin) body(begin, end, context);
        return 0;
    }
    std::vector<std::thread> threads;
    for (int64_t from = begin; from < end; from += size)
        threads.emplace_back([=] { inside = true; body(from, std::min(end, from + size), context); });
    for (auto& thread : threads) thread.join();
    return 0;
}
'''
PLUGIN = '''
import ctypes
from pathlib import Path
from timm_cbam.ops import native

library = ctypes.CDLL(str(Path(__file__).with_name('threads.so')))
native.load()[0].cbam_init(ctypes.cast(library.parallel_for, ctypes.c_void_p))
'''


def check(folder, flags, runtime, broken=None, threads=False, **env):
    """Run the tests by a library that is built so, or that a place of it is broken."""
    hatch_build = script('hatch_build')
    shutil.copytree(PACKAGE, folder / 'timm_cbam', ignore=shutil.ignore_patterns('*.so', '__pycache__'))
    source = folder / 'timm_cbam' / 'ops' / 'tail_cpu.cpp'
    if broken:
        place, code = BROKEN[broken]
        text = source.read_text()
        assert text.count(place) == 1
        source.write_text(text.replace(place, code + place if place == CALL else place + code))
    level = native.load()[1]
    flags = [*hatch_build.LEVELS[platform.machine()][level], '-O1', '-g', *flags]
    hatch_build.compile_library(source, source.with_name(f'_tail_cpu_{level}.so'), flags)
    in_models = ' and not '.join(('', 'model', 'trains', 'checkpointing', 'depth', 'features', 'empty', 'accurate'))
    arguments = ['-k', 'native and arguments_are_left_alone' if broken else f'native{in_models}']
    if threads:
        (folder / 'threads.cpp').write_text(THREADS)
        (folder / 'plugin.py').write_text(PLUGIN)
        hatch_build.compile_library(folder / 'threads.cpp', folder / 'threads.so', flags)
        arguments += ['-p', 'plugin']
    libraries = [
        subprocess.run(['g++', f'-print-file-name={name}'], capture_output=True, text=True, check=True).stdout.strip()
        for name in (runtime, 'libstdc++.so')]
    return subprocess.run(
        [
            sys.executable, '-m', 'pytest', '-q', '-x', '-s', '-n0', '-p', 'no:cacheprovider',
            str(TESTS / 'test_tail.py'), *arguments],
        cwd=folder, capture_output=True, text=True, env={
            **os.environ, 'PYTHONPATH': str(folder), 'LD_PRELOAD': ' '.join(libraries), 'OMP_NUM_THREADS': '2', **env})


ADDRESS = dict(
    flags=['-fsanitize=address,undefined', '-fno-sanitize-recover=undefined'], runtime='libasan.so',
    ASAN_OPTIONS='detect_leaks=0', UBSAN_OPTIONS='print_stacktrace=1')
THREAD = dict(
    flags=['-fsanitize=thread'], runtime='libtsan.so', threads=True,
    TSAN_OPTIONS='ignore_noninstrumented_modules=1 halt_on_error=1 report_signal_unsafe=0')


@pytest.mark.parametrize('kind', [ADDRESS, THREAD], ids=['address and undefined behaviour', 'threads'])
def test_nothing_is_found(kind, tmp_path):
    result = check(tmp_path, **kind)
    assert result.returncode == 0 and 'passed' in result.stdout, result.stdout[-4000:] + result.stderr[-6000:]


@pytest.mark.parametrize('broken', list(BROKEN))
def test_what_is_broken_is_found(broken, tmp_path):
    result = check(tmp_path, broken=broken, **(THREAD if broken == 'data race' else ADDRESS))
    assert result.returncode != 0 and broken in result.stdout + result.stderr, result.stdout + result.stderr
