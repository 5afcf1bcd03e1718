"""Entry points of `torch.hub.load(REPOSITORY, NAME)`: the official encoders, and `encoder` for any other."""

from pathlib import Path as _Path

from capi import pretrained as _pretrained
from capi.model import Backbone as _Backbone

dependencies = ["torch", "einops", "jaxtyping", "jsonargparse", "numpy", "safetensors", "tqdm", "yaml"]


def encoder(name: str | _Path, *, weights: str = "ema") -> _Backbone:
    """The encoder of a run's folder, a checkpoint or a file of weights, as `capi.pretrained.load` gives it."""
    return _pretrained.load(name, weights=weights)


def capi_vitl14_lvd() -> _Backbone:
    """ViT-L/14, trained on LVD-142M."""
    return _pretrained.load("capi_vitl14_lvd")


def capi_vitl14_p205() -> _Backbone:
    """ViT-L/14, trained on Places205."""
    return _pretrained.load("capi_vitl14_p205")


def capi_vitl14_in22k() -> _Backbone:
    """ViT-L/14, trained on ImageNet-22k."""
    return _pretrained.load("capi_vitl14_in22k")


def capi_vitl14_in1k() -> _Backbone:
    """ViT-L/14, trained on ImageNet-1k."""
    return _pretrained.load("capi_vitl14_in1k")
