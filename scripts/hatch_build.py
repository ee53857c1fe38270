"""Build hooks of pyproject.toml

BuildHook compiles timm_cbam/ops/tail_cpu.cpp, one library for each SIMD level of PyTorch's. A wheel gets the libraries,
an editable install has them beside the source. Where they cannot be built, the install goes on without them:
timm_cbam/ops/native.py says so, and PyTorch's operations do the work.

MetadataHook makes of the README what a package index shows, where links into the repository have to be absolute:
$TIMM_CBAM_REPOSITORY is its address, which workflows/wheels.yml knows.
"""
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.builders.macos import process_macos_plat_tag
from hatchling.metadata.plugin.interface import MetadataHookInterface
from packaging.tags import platform_tags

# No -ffast-math: NaN, infinities and each rounding are as in PyTorch. What is here lets loops be vectorized.
FLAGS = (
    '-O3', '-std=c++17', '-fPIC', '-shared', '-fvisibility=hidden', '-fopenmp-simd', '-ffp-contract=off',
    '-fno-math-errno', '-fno-trapping-math')

# The names that torch.backends.cpu.get_cpu_capability() gives, in lower case, and what these levels mean there.
X86_64: Dict[str, Tuple[str, ...]] = {
    'default': (),
    'avx2': ('-mavx2', '-mfma'),
    'avx512': ('-mavx512f', '-mavx512bw', '-mavx512dq', '-mavx512vl', '-mfma', '-mprefer-vector-width=512'),
}
ARM64: Dict[str, Tuple[str, ...]] = {'default': ()}
LEVELS = {'x86_64': X86_64, 'aarch64': ARM64, 'arm64': ARM64}


def find_compiler() -> List[str]:
    if os.environ.get('CXX'):
        return shlex.split(os.environ['CXX'])
    for name in ('c++', 'g++', 'clang++'):
        if shutil.which(name):
            return [name]
    raise RuntimeError('no C++ compiler found: $CXX, c++, g++, clang++')


def compile_library(source: Path, target: Path, flags: Sequence[str] = ()) -> None:
    """Compile source into target, which other processes see whole or not at all."""
    temporary = target.with_name(f'{target.stem}.{os.getpid()}.so')
    command = [*find_compiler(), *FLAGS, *flags, str(source), '-o', str(temporary)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        temporary.unlink(missing_ok=True)
        errors = [line for line in result.stderr.splitlines() if 'error' in line]
        raise RuntimeError(f'{command[0]} failed: {errors[0] if errors else f"exit status {result.returncode}"}')
    temporary.replace(target)


def remove_libraries(folder: Path) -> None:
    for library in folder.glob('_tail_cpu_*.so'):
        library.unlink()


def build_libraries(source: Path, folder: Path) -> List[Path]:
    """Compile source for all levels into folder, which has all of them afterwards, or none."""
    remove_libraries(folder)
    if os.environ.get('TIMM_CBAM_NATIVE') == '0':
        raise RuntimeError('TIMM_CBAM_NATIVE=0')
    levels = LEVELS.get(platform.machine(), {}) if sys.platform in ('linux', 'darwin') else {}
    if not levels:
        raise RuntimeError(f'there are none for {sys.platform} on {platform.machine()}')
    libraries = [folder / f'_tail_cpu_{level}.so' for level in levels]
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(compile_library, [source] * len(levels), libraries, levels.values()))
    except BaseException:
        remove_libraries(folder)
        raise
    return libraries


def platform_tag() -> str:
    """Of a wheel with libraries that were built here, for auditwheel and delocate to refine."""
    tag = next(tag for tag in platform_tags() if tag.startswith(('linux_', 'macosx_')))
    # the compiler and hatchling's own tags follow MACOSX_DEPLOYMENT_TARGET
    return process_macos_plat_tag(tag, compat=False) if sys.platform == 'darwin' else tag


def absolute_links(markdown: str, repository: str) -> str:
    """Links and images of the repository's files by their addresses there."""
    def replace(match: 're.Match[str]') -> str:
        image, text, path = match.groups()
        return f"{image}[{text}]({repository}/{'raw' if image else 'blob'}/HEAD/{path})"

    return re.sub(r'(!?)\[([^]]*)\]\((?!https?:|#)([^)]+)\)', replace, markdown)


class MetadataHook(MetadataHookInterface):
    def update(self, metadata: Dict[str, Any]) -> None:
        text, repository = Path(self.root, 'README.md').read_text('utf-8'), os.environ.get('TIMM_CBAM_REPOSITORY')
        metadata['readme'] = {
            'content-type': 'text/markdown', 'text': absolute_links(text, repository) if repository else text}


class BuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: Dict[str, Any]) -> None:
        ops = Path(self.root, 'timm_cbam', 'ops')
        self.temporary = tempfile.TemporaryDirectory()
        folder = ops if version == 'editable' else Path(self.temporary.name)
        try:
            libraries = build_libraries(ops / 'tail_cpu.cpp', folder)
        except (OSError, RuntimeError) as e:
            self.app.display_warning(f'timm-cbam is built without native loops for CPU ({e})')
            return
        if version != 'editable':
            build_data['force_include'].update({str(path): f'timm_cbam/ops/{path.name}' for path in libraries})
            build_data['pure_python'] = False
            build_data['tag'] = f'py3-none-{platform_tag()}'

    def finalize(self, version: str, build_data: Dict[str, Any], artifact_path: str) -> None:
        self.temporary.cleanup()
