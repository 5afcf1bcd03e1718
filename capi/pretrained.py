"""Loads encoders for their features: the official weights, a run's, or any file that holds one.

`python -m capi.pretrained` lists the official names; `python -m capi.pretrained ENCODER ...` says what files hold.
"""

import argparse
import hashlib
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from jaxtyping import Float, Int
from torch import Tensor, nn

from capi.checkpoint import write_atomically
from capi.config import ClusteringConfig, Config, DataConfig, ModelConfig, config_of
from capi.model import Backbone
from capi.nested import load_text
from capi.weight_files import EXPORTS, EncoderWeights, check_shape, find_file, read_teacher_head, read_weights

OFFICIAL = "https://dl.fbaipublicfiles.com/capi"
OFFICIAL_WEIGHTS = {
    "capi_vitl14_lvd": "capi_vitl14_lvd.pth",
    "capi_vitl14_p205": "capi_vitl14_p205.pth",
    "capi_vitl14_in22k": "capi_vitl14_i22k.pth",
    "capi_vitl14_in1k": "capi_vitl14_in1k.pth",
}

logger = logging.getLogger(__name__)


class Prototypes(NamedTuple):
    """The teacher's clustering."""

    weight: Float[Tensor, "prototypes dim"]
    bias: Float[Tensor, " prototypes"] | None

    def logits(self, features: Float[Tensor, "*positions dim"]) -> Float[Tensor, "*positions prototypes"]:
        """weight x / |x| + bias in float32, before Sinkhorn balances a batch; all on one device."""
        return F.linear(F.normalize(features.float(), dim=-1, eps=1e-7), self.weight, self.bias)


def load(name: str | Path, config: ModelConfig | None = None, *, weights: str = "ema") -> Backbone:
    """Loads a frozen backbone in evaluation mode; call it on ImageNet-normalised images, or on bytes.

    Args:
        name: one of the official names `capi_vitl14_{lvd,p205,in22k,in1k}` (downloaded once to PyTorch's hub folder,
            where later loads check that it is the same still), a run's folder (its exported encoder, or its newest
            checkpoint), the folder of a Hugging Face repository, or a file: an exported encoder, a training checkpoint,
            or any state dict of safetensors or torch.save. No code from a file is run.
        config: the shape that the model must have; by default that of the weights. A bare state dict does not say where
            registers lie nor which layer counts: where that is not at its default, it must be said here.
        weights: of a training's two encoders the moving average ("ema"), which is the teacher, or the "student"
            itself, which checkpoints alone hold.

    Returns:
        A module that maps float [images, 3, height, width] to the global vector [images, dim], the registers
        [images, registers, dim] and the feature map [images, rows, columns, dim].

    Raises:
        ValueError: neither an official name nor a file or folder, a download that failed, a file that cannot be read
            or holds no such encoder, or weights that do not fit the configuration.
    """
    found = read(name, weights=weights)
    if config is not None:
        check_shape(config, found)
        found = replace(found, shape=replace(config, drop_path_rate=0.0))
    return build(found)


def load_prototypes(name: str | Path) -> Prototypes:
    """The teacher's prototypes, float32 on the CPU: what `clusters` needs to say which of them a patch takes.

    Args:
        name: as for `load`: a run's folder, a checkpoint, an exported encoder (beside it lies `heads.safetensors`), the
            folder of a Hugging Face repository; or `heads.safetensors` itself.

    Returns:
        weight [prototypes, dim] and bias [prototypes], which is None where the run was without.

    Raises:
        ValueError: a name that is none, a file that cannot be read, or one without prototypes, as the official files.
    """
    path = _find(name, "ema")
    head = read_teacher_head(path)
    weight, bias = head.get("layer.weight"), head.get("layer.bias")
    if weight is None:
        raise ValueError(f"{path} comes without prototypes: expected a run's folder, a checkpoint or heads.safetensors")
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = [list(x.shape) for x in (weight, bias) if x is not None]
        raise ValueError(f"the prototypes of {path} must be [prototypes, dim] and [prototypes], got {shapes}")
    # Copies: those of a file that is mapped would go with it.
    return Prototypes(weight.float().clone(), None if bias is None else bias.float().clone())


def clusters(features: Float[Tensor, "*positions dim"], prototypes: Prototypes) -> Int[Tensor, "*positions"]:
    """The prototype of the largest logit: which one the teacher is for, before Sinkhorn balances a batch.

    Args:
        features: patches as the moving average's encoder gives them: a feature map, on any device.
        prototypes: those of the same run.

    Raises:
        ValueError: features of another width than the prototypes.
    """
    on_device = Prototypes(*(None if x is None else x.to(features.device) for x in prototypes))
    dim = on_device.weight.shape[1]
    if features.shape[-1] != dim:
        raise ValueError(f"features must have the prototypes' {dim} channels, got {features.shape[-1]}")
    rows = features.flatten(0, -2).split(4096)  # logits of all take gigabytes
    return torch.cat([on_device.logits(x).argmax(-1) for x in rows]).view(features.shape[:-1])


@torch.no_grad()
def features_of(
    backbone: nn.Module, batches: Iterable, *, resize: int | tuple[int, int] | Literal["multiple"] | None = None
) -> Iterator[tuple]:
    """Features of the batches of a DataLoader, one after the other: global vectors, registers, feature maps.

    Args:
        backbone: what `load` gives, or another module that takes and gives the same, on any device, in any precision.
        batches: images [images, 3, height, width], bytes or normalised floats; or tuples of them and of whatever else
            the loader gives, such as labels.
        resize: as the backbone takes it.

    Yields:
        The three, float32 on the CPU, then whatever else the batch had: `for vectors, _, maps, labels in ...`.

    Raises:
        ValueError, TypeError: batches of something else.
    """
    device = next(backbone.parameters()).device
    for batch in batches:
        images, *others = batch if isinstance(batch, tuple | list) else (batch,)
        if not isinstance(images, Tensor) or images.ndim != 4:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"batches must begin with images [images, 3, height, width], got {got}")
        outputs = backbone(images.to(device, non_blocking=True), resize=resize)
        yield *(x.float().cpu() for x in outputs), *others


def read(name: str | Path, *, weights: str = "ema") -> EncoderWeights:
    """The weights that `load` would load; ValueError as there."""
    if str(name) in OFFICIAL_WEIGHTS and weights == "ema":
        return _read_official(OFFICIAL_WEIGHTS[str(name)])
    return read_weights(_find(name, weights), weights)


def _find(name: str | Path, weights: str) -> Path:
    """The file that a name of other than the official ones stands for."""
    if weights not in ("ema", "student"):
        raise ValueError(f"weights must be ema or student, got {weights}")
    if not isinstance(name, str | Path):
        raise ValueError(f"expected the name or the path of an encoder, got {type(name).__name__}")
    if str(name) in OFFICIAL_WEIGHTS:
        raise ValueError(f"{name} has the moving average alone: expected a run for its student or its prototypes")
    try:
        path = find_file(Path(name), weights)
        found = path.is_file() or path.is_dir()  # of a checkpoint
    except (OSError, RuntimeError) as error:  # a name too long, a home that is not known
        raise ValueError(f"{str(name)[:200]} cannot be read: {error}") from error
    if not found:
        expected = ", ".join(OFFICIAL_WEIGHTS)
        raise ValueError(
            f"expected the path of a .safetensors or .pth file or of a run folder, or one of {expected}; got {name}"
        )
    return path


def build(weights: EncoderWeights) -> Backbone:
    """A frozen backbone of its own, float32, with these weights; ValueError if some are missing, or too many."""
    with torch.device("meta"):
        backbone = Backbone(weights.shape)
    _check_tensors(weights.state, backbone.state_dict(), weights.path)
    backbone.to_empty(device="cpu").load_state_dict(weights.state)
    logger.info("%s", weights)
    return backbone.eval().requires_grad_(False)


def run_configuration(weights: EncoderWeights) -> Config | None:
    """The configuration of the run that the encoder is of; None where it is not known.

    It stands in a checkpoint, and in the `config.yaml` beside an exported encoder. ValueError if what is read is no
    configuration of this encoder.
    """
    if weights.run_config is not None:
        return config_of(weights.run_config)
    beside = weights.path.with_name("config.yaml")
    if weights.path.name not in EXPORTS or not beside.is_file():
        return None
    try:
        values = load_text(beside.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{beside} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{beside} must hold the configuration of a run, got {str(values)[:80]}")
    config = config_of(values)
    check_shape(config.model, weights)
    return config


def configuration_of(weights: EncoderWeights, image_size: int | None = None) -> Config:
    """`run_configuration`, or where it is not known, one of images of 16 patches a side.

    `image_size` takes the place of its own; ValueError if that is no multiple of the patch size, or as there.
    """
    config = run_configuration(weights)
    if config is None:
        data = DataConfig(image_size=16 * weights.shape.patch_size)
        config = Config(model=weights.shape, data=data, clustering=ClusteringConfig(n_prototypes=1))
    patch_size, image_size = config.model.patch_size, image_size or config.data.image_size
    if image_size < patch_size or image_size % patch_size:
        raise ValueError(f"the image size must be a multiple of the patch size {patch_size}, got {image_size}")
    return replace(config, data=replace(config.data, image_size=image_size))


def _check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    faults = []
    if missing := sorted(expected.keys() - state.keys()):
        faults.append(f"{len(missing)} of {len(expected)} are missing, such as {missing[0]}")
    if unknown := sorted(state.keys() - expected.keys()):
        faults.append(f"{len(unknown)} are unknown, such as {unknown[0]}")
    wrong = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    if wrong:
        shapes = [list(tensors[wrong[0]].shape) for tensors in (expected, state)]
        faults.append(f"{len(wrong)} are of another shape, such as {wrong[0]}: expected {shapes[0]}, got {shapes[1]}")
    if odd := [
        name for name, x in state.items() if not x.is_floating_point() or x.is_meta or x.layout != torch.strided
    ]:
        faults.append(f"{odd[0]} is a tensor of {state[odd[0]].dtype} on {state[odd[0]].device}, expected weights")
    if faults:
        raise ValueError(f"the weights of {path} do not make an encoder: {'; '.join(faults)}")


def _read_official(file: str) -> EncoderWeights:
    """An official file, from PyTorch's hub folder; downloaded if it is not there, and checked to be as it was at first.

    Its checksum is recorded beside it once it has been read: none is published.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    record = path.with_name(f"{file}.sha256")
    fresh = not path.exists()
    if fresh:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(f"{OFFICIAL}/{file}", str(path), progress=sys.stderr.isatty())
        except (OSError, HTTPException) as error:
            raise ValueError(
                f"{OFFICIAL}/{file} cannot be downloaded to {path}: {error}; without a network, put the file there"
            ) from error
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        expected = record.read_text().split()[0] if record.exists() else None
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise ValueError(f"{path} or its checksum in {record} cannot be read: {error}") from error
    if expected not in (None, digest):
        raise ValueError(
            f"{path} is not what it was at its first load: its SHA-256 is {digest}, {record.name} says {expected}; "
            "remove both to download it again"
        )
    try:
        weights = read_weights(path)
    except ValueError:
        if fresh:
            path.unlink()  # A connection that breaks early leaves part of a file; the next try begins anew.
        raise
    if expected is None:
        try:
            write_atomically(record, lambda part: part.write_text(f"{digest}  {file}\n"))  # as sha256sum has it
        except OSError as error:
            logger.warning("the checksum of %s is not recorded: %s", path, error)
    return weights


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m capi.pretrained", description="Says what a file of weights holds.")
    parser.add_argument(
        "encoders",
        metavar="ENCODER",
        nargs="*",
        help="a run folder, a checkpoint, a file of weights or an official name; without one these names are listed",
    )
    encoders = parser.parse_args(argv).encoders
    if not encoders:
        print("\n".join(OFFICIAL_WEIGHTS))  # noqa: T201
    try:
        for encoder in encoders:
            weights = read(encoder)
            build(weights)
            print(weights)  # noqa: T201
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
