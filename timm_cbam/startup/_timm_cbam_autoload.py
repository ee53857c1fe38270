"""Makes timm know the CBAM models in every process: imports timm_cbam right after timm.models has been imported.

timm has no plugin entry point. Python runs install() at every start (named in timm_cbam_autoload.pth, and in
timm_cbam_autoload.start for Python 3.15 and later), so this module is small, imports nothing that is not loaded
already, and leaves the work to _timm_cbam_loader. TIMM_CBAM_AUTOLOAD=0 in the environment turns it off.
"""
import sys


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == 'timm.models':
            import _timm_cbam_loader
            return _timm_cbam_loader.find_spec(self, name, path, target)


def install():
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
