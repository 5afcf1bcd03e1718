from pathlib import Path

import setuptools

import capi
import capi_kernels


def test_an_install_holds_both_packages() -> None:
    """A folder without __init__.py imports from a checkout, but no install would contain it."""
    for package in (capi, capi_kernels):
        assert package.__doc__
        root = Path(package.__file__).parent
        assert root.name in setuptools.find_packages(root.parent)
