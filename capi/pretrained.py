"""Loads encoders for their features: the official weights, official checkpoints on disk, or a run's own export."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from capi.config import ModelConfig
from capi.model import Backbone

OFFICIAL = "https://dl.fbaipublicfiles.com/capi"
OFFICIAL_WEIGHTS = {
    "capi_vitl14_lvd": "capi_vitl14_lvd.pth",
    "capi_vitl14_p205": "capi_vitl14_p205.pth",
    "capi_vitl14_in22k": "capi_vitl14_i22k.pth",
    "capi_vitl14_in1k": "capi_vitl14_in1k.pth",
}


def load(name: str | Path, config: ModelConfig | None = None) -> Backbone:
    """Loads a frozen backbone in evaluation mode; call it on ImageNet-normalised images.

    Args:
        name: one of the official names `capi_vitl14_{lvd,p205,in22k,in1k}` (downloaded once to PyTorch's hub folder),
            the path of an `encoder.safetensors` of a run, or the path of an official `.pth` file.
        config: the shape of a `.pth` file's model; the paper's ViT-L/14 by default. An `encoder.safetensors` brings
            its own.

    Returns:
        A module that maps float [images, 3, height, width] to the global vector [images, dim], the registers
        [images, registers, dim] and the feature map [images, rows, columns, dim].

    Raises:
        ValueError: neither an official name nor a file, or weights that do not fit the configuration.
    """
    if str(name) in OFFICIAL_WEIGHTS:
        url = f"{OFFICIAL}/{OFFICIAL_WEIGHTS[str(name)]}"
        return _build(torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True), config, str(name))
    path = Path(name)
    if not path.is_file():
        expected = ", ".join(OFFICIAL_WEIGHTS)
        raise ValueError(f"expected the path of a .safetensors or .pth file, or one of {expected}; got {name}")
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if config is None and "config" in metadata:
                config = ModelConfig(**json.loads(metadata["config"]))
            return _build({key: file.get_tensor(key) for key in file.keys()}, config, str(name))  # noqa: SIM118
    return _build(torch.load(path, map_location="cpu", weights_only=True), config, str(name))


def _build(state: dict[str, torch.Tensor], config: ModelConfig | None, name: str) -> Backbone:
    prefix = "backbone."
    state = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    backbone = Backbone(replace(config or ModelConfig(), drop_path_rate=0.0))
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights of {name} do not fit the model configuration: {error}") from error
    return backbone.eval().requires_grad_(False)
