"""Loads timm.models as it would be loaded anyway, and then timm_cbam. See _timm_cbam_autoload."""
import os
import sys
import threading
import warnings

_searching: set[int] = set()  # threads inside find_spec, where the finder of another plugin may ask ours again


def find_spec(own_finder, name, path, target):
    thread = threading.get_ident()
    if thread in _searching or os.environ.get('TIMM_CBAM_AUTOLOAD') == '0':
        return None
    _searching.add(thread)
    try:
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not own_finder else None
            if spec is not None:
                if hasattr(spec.loader, 'exec_module'):  # a folder without __init__.py may have none
                    spec.loader = _Loader(spec.loader)
                return spec
    finally:
        _searching.discard(thread)


class _Loader:
    """Stands in for the loader of timm.models until the module has been executed."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def exec_module(self, module):
        # the real loader back in its place first, for inspect, pkgutil and importlib.resources
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        try:
            import timm_cbam  # noqa: F401
        except KeyboardInterrupt:
            raise
        except BaseException as e:  # SystemExit included: whatever is wrong with us, timm has to work
            message = (
                f'timm-cbam could not register its models: {type(e).__name__}: {e}. timm works without them; '
                f'reinstall or uninstall timm-cbam, or set TIMM_CBAM_AUTOLOAD=0 to silence this.')
            try:
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            except RuntimeWarning:  # python -W error
                print(message, file=sys.stderr)
