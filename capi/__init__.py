"""Trains CAPI encoders and loads them for their features."""

from capi_kernels import __version__

__all__ = ["__version__"]
