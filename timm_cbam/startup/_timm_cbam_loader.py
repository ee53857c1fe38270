"""Loads timm.models as it would be loaded anyway, and then timm_cbam. See _timm_cbam_autoload."""
import sys
import threading

_searching: set[int] = set()  # threads inside find_spec, where the finder of another plugin may ask ours again


def find_spec(own_finder, name, path, target):
    thread = threading.get_ident()
    if thread in _searching:
        return None
    _searching.add(thread)
    try:
        for finder in tuple(sys.meta_path):
            search = getattr(finder, 'find_spec', None)  # Python, too, passes over finders without one
            spec = search(name, path, target) if search and finder is not own_finder else None
            if spec is not None:
                if hasattr(spec.loader, 'exec_module'):  # a folder without __init__.py may have none
                    spec.loader = _Loader(spec.loader, own_finder)
                return spec
    finally:
        _searching.discard(thread)


class _Loader:
    """Stands in for the loader of timm.models until the module has been executed."""

    def __init__(self, loader, finder):
        self.loader = loader
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def exec_module(self, module):
        # the real loader back in its place first, for inspect, pkgutil and importlib.resources
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        try:
            # Not timm_cbam alone: another thread may have begun with that, and be waiting for this one to end.
            import timm_cbam.registration  # noqa: F401
        except KeyboardInterrupt:
            raise
        except BaseException as e:
            self.finder.warn(e)
