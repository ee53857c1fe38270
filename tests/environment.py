"""A Python environment in which the plugin, timm or timm_cbam can be left out or broken

It has the installed packages but this one, and the start-up files as the wheel installs them; test_packaging.py shows
that the wheel does install these files like that.
"""
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import timm_cbam

PACKAGE = Path(timm_cbam.__file__).parent
STARTUP = Path(__file__).parents[1] / 'timm_cbam' / 'startup'
COUNT = 'import timm; print(len(timm.list_models("cbam*")))'
MODELS = '20'  # what that prints
WARNING = 'RuntimeWarning: timm-cbam could not register its models: '


class Environment:
    def __init__(self, root: Path, empty: bool = False):
        windows = sys.platform == 'win32'
        venv.create(root, symlinks=not windows)
        paths = sysconfig.get_paths('nt' if windows else 'posix_prefix', dict(base=str(root), platbase=str(root)))
        self.python = Path(paths['scripts'], 'python.exe' if windows else 'python')
        self.site = Path(paths['purelib'])
        self.packages = root / 'packages'  # the installed packages, apart, so that a test can take some away
        self.packages.mkdir()
        for entry in () if empty else Path(sysconfig.get_path('purelib')).iterdir():
            if entry.suffix != '.pth' and 'timm_cbam' not in entry.name:
                (self.packages / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
        (self.site / 'packages.pth').write_text(f'{self.packages}\n')

    def install(self, name: str = 'timm_cbam', package: bool = True):
        """Install the start-up files, and the package that they import, under a name."""
        for file in STARTUP.glob('*timm_cbam*'):
            text = file.read_text().replace('timm_cbam', name).replace('TIMM_CBAM', name.upper())
            (self.site / file.name.replace('timm_cbam', name)).write_text(text)
        if package:
            (self.site / name).symlink_to(PACKAGE, target_is_directory=True)

    def copy(self, name: str) -> Path:
        """Put a copy in the place of a package, which a test can change."""
        link = next(folder / name for folder in (self.site, self.packages) if (folder / name).is_symlink())
        package = link.resolve()
        link.unlink()
        shutil.copytree(package, link, ignore=shutil.ignore_patterns('__pycache__'))
        return link

    def run(self, *args: str, check: bool = True, **env: str) -> subprocess.CompletedProcess:
        env = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'TIMM_CBAM', 'COV'))} | env
        result = subprocess.run(
            [str(self.python), *args], capture_output=True, text=True, env=env, cwd=self.site.parent)
        assert not check or result.returncode == 0, result.stderr
        return result

    def eval(self, code: str, *flags: str, **env: str) -> str:
        """Run code that must leave nothing on standard error, return what it prints."""
        result = self.run(*flags, '-c', textwrap.dedent(code), **env)
        assert result.stderr == ''
        return result.stdout.strip()
