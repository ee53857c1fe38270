"""Registers the models with timm when it is imported: all of them, or none and an ImportError that says why"""
import re
import sys
from typing import Tuple

from timm.version import __version__ as timm_version

from . import __version__

__all__ = ['OLDEST_TIMM']

OLDEST_TIMM = '1.0.26'  # as in pyproject.toml


def _numbers(version: str) -> Tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r'\d+', version)[:3])


def _register() -> None:
    if _numbers(timm_version) < _numbers(OLDEST_TIMM):
        raise ImportError(f'timm-cbam {__version__} needs timm>={OLDEST_TIMM}, found {timm_version}')
    try:
        from timm.models import register_model

        # timm has no way to take a model out of its registry, so its tables are kept, and filled again if one fails
        registry = vars(sys.modules[register_model.__module__])
        tables = {
            name: table.copy() for name, table in registry.items()
            if isinstance(table, (dict, set)) and not name.startswith('__')}
        try:
            from . import cbam_resnet  # noqa: F401
        except BaseException:
            for name, table in tables.items():
                registry[name].clear()
                registry[name].update(table)
            raise
    except Exception as e:
        raise ImportError(
            f'timm-cbam {__version__} does not work with timm {timm_version} ({type(e).__name__}: {e})') from e


_register()
