"""Makes timm know the CBAM models in every process: imports timm_cbam right after timm.models has been imported.

timm has no plugin entry point. Python runs install() at every start (named in timm_cbam_autoload.pth, and in
timm_cbam_autoload.start for Python 3.15 and later), so this module is small, imports nothing that is not loaded
already, and leaves the work to _timm_cbam_loader. TIMM_CBAM_AUTOLOAD=0 in the environment turns it off.
"""
import os
import sys


class Finder:
    warned = False

    def find_spec(self, name, path=None, target=None):
        if name != 'timm.models' or os.environ.get('TIMM_CBAM_AUTOLOAD') == '0':
            return None
        try:
            import _timm_cbam_loader  # gone if timm-cbam was uninstalled, or sys.path changed, since Python started
            return _timm_cbam_loader.find_spec(self, name, path, target)
        except KeyboardInterrupt:
            raise
        except BaseException as e:  # SystemExit included: whatever is wrong with us, timm has to work
            self.warn(e)

    def warn(self, error):
        """Say why there are no models, once."""
        if self.warned:
            return
        self.warned = True
        message = (
            f'timm-cbam could not register its models: {type(error).__name__}: {error}. timm works without them; '
            f'reinstall or uninstall timm-cbam, or set TIMM_CBAM_AUTOLOAD=0 to silence this.')
        try:
            import warnings
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        except Exception:  # python -W error
            try:
                print(message, file=sys.stderr)
            except Exception:  # closed, as of daemons
                pass


def install():
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
