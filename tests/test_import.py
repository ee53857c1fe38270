"""What `import timm_cbam` gives, part of which is imported when it is asked for"""
import pytest

import timm_cbam


def test_names():
    namespace = {}
    exec('from timm_cbam import *', namespace)
    for name in timm_cbam.__all__:
        value = getattr(timm_cbam, name)
        assert value is namespace[name] and value.__name__ == name and name in dir(timm_cbam)
        assert value.__module__.startswith('timm_cbam.')


@pytest.mark.parametrize('name', ['cbam_resnet', 'explain', 'insert', 'layers', 'weights'])
def test_modules(name):
    """Also without an import of their own."""
    assert getattr(timm_cbam, name).__name__ == f'timm_cbam.{name}'


def test_no_such_name():
    with pytest.raises(AttributeError, match="^module 'timm_cbam' has no attribute 'add_cbma'$"):
        _ = timm_cbam.add_cbma
    with pytest.raises(ImportError, match="cannot import name 'add_cbma' from 'timm_cbam'"):
        from timm_cbam import add_cbma  # noqa: F401
