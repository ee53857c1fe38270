"""Imports timm_cbam right after timm.models, in every process, so that timm knows the CBAM models.

timm has no plugin entry point. Python runs `install` at start-up (from timm_cbam_autoload.pth, from Python 3.15 on from
timm_cbam_autoload.start), which must be quick, silent and never fail: this module imports nothing at its top but what
every interpreter already holds, and the finder does nothing until somebody imports timm.models.

Turn it off with the environment variable TIMM_CBAM_AUTOLOAD=0.
"""
import sys
from _thread import get_ident


class _Finder:
    def __init__(self):
        self.searching = set()  # threads on their way through find_spec, where another plugin's finder may ask us again

    def find_spec(self, name, path=None, target=None):
        if name != 'timm.models' or get_ident() in self.searching:
            return None
        import os
        if os.environ.get('TIMM_CBAM_AUTOLOAD') == '0':
            return None
        self.searching.add(get_ident())
        try:
            for finder in sys.meta_path:
                spec = finder is not self and finder.find_spec(name, path, target)
                if spec:
                    if hasattr(spec.loader, 'exec_module'):  # a namespace package of Python 3.10 has none
                        spec.loader = _Loader(spec.loader)
                    return spec
        finally:
            self.searching.discard(get_ident())


class _Loader:
    """Stands in for timm.models' own loader until the module has been executed."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def exec_module(self, module):
        # put the real loader back first: inspect, pkgutil and importlib.resources shall see what they know
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        try:
            import timm_cbam  # noqa: F401
        except KeyboardInterrupt:
            raise
        except BaseException as e:
            message = (
                f'timm-cbam could not register its models: {type(e).__name__}: {e}. timm works without them; '
                f'reinstall or uninstall timm-cbam, or set TIMM_CBAM_AUTOLOAD=0 to silence this.')
            import warnings
            try:
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            except Warning:  # under -W error
                print(message, file=sys.stderr)


def install():
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
