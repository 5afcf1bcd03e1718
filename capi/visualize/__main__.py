"""Command line: `python -m capi.visualize KIND ENCODER IMAGE ... --output FILE.png`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from capi import pretrained
from capi.checkpoint import write_atomically
from capi.data.crops import centre_box, crop, whole
from capi.visualize.clusters import draw_clusters
from capi.visualize.curves import plot_curves
from capi.visualize.maps import WINDOW, feature_map
from capi.visualize.masks import ask, draw_masks
from capi.visualize.model import load_model
from capi.visualize.pca import draw_pca

_LONGER_SIDE = 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        _check_output(arguments.output)
        if arguments.kind == "curves":
            write_atomically(arguments.output, lambda file: plot_curves(arguments.runs, file))
        else:
            drawn = {"pca": _pca, "clusters": _clusters, "masks": _masks}[arguments.kind](arguments)
            write_atomically(arguments.output, lambda file: drawn.save(file, format="PNG"))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("interrupted: no picture was written", file=sys.stderr)  # noqa: T201
        return 130
    print(f"wrote {arguments.output}")  # noqa: T201
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m capi.visualize", description="Draws what an encoder makes of images, or the curves of runs."
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True, help="one of:")
    maps = argparse.ArgumentParser(add_help=False)
    maps.add_argument(
        "--size",
        type=_positive,
        help=f"longer side of the images in pixels; by default their own, {_LONGER_SIDE} at most",
    )
    maps.add_argument(
        "--window",
        type=_positive,
        default=WINDOW,
        help="most patches on a side that the encoder sees at a time; larger images are seen in overlapping windows "
        "(default: %(default)s)",
    )

    def add(kind: str, what: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return kinds.add_parser(kind, help=what, description=f"Draws {what}.", parents=parents)

    pca = add("pca", "feature maps, their principal components as colours", maps)
    pca.add_argument("encoder", metavar="ENCODER", help="a run folder, a checkpoint, an encoder file, or official name")
    pca.add_argument("--per-image", action="store_true", help="components of each image alone, not of all together")
    pca.add_argument("--crisp", action="store_true", help="a square for each feature, not interpolated")
    pca.add_argument(
        "--finer",
        type=_positive,
        default=1,
        metavar="N",
        help="features of cells N times smaller than a patch, of N x N passes that are shifted by parts of a patch",
    )
    clusters = add("clusters", "the prototype that each patch takes, and the patches nearest to prototypes", maps)
    clusters.add_argument(
        "--prototypes", type=_numbers, metavar="N,N", help="whose nearest patches are shown; by default the commonest 8"
    )
    clusters.add_argument("--nearest", type=_positive, default=10, metavar="N", help="patches of each (%(default)s)")
    masks = add("masks", "what the student sees of images, what it is asked, and what it answers")
    masks.add_argument("--size", type=_positive, help="side of the square crops in pixels; by default that of the run")
    masks.add_argument("--seed", type=int, default=0, help="of the masks (%(default)s)")
    masks.add_argument("--ask-all", action="store_true", help="ask for every hidden patch, not the run's share of them")
    for kind in (clusters, masks):
        kind.add_argument("encoder", metavar="RUN", help="the folder of a run with a checkpoint, or a checkpoint")
    for kind in (pca, clusters, masks):
        kind.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="files of images")
    curves = add("curves", "the metrics of one run, or of several one over the other")
    curves.add_argument("runs", metavar="RUN", nargs="+", help="the folder of a run, or its metrics.jsonl")
    for kind in (pca, clusters, masks, curves):
        kind.add_argument("--output", metavar="FILE.png", required=True, type=Path, help="the picture to write")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text}") from error


def _check_output(path: Path) -> None:
    """Before minutes of work: ValueError where the picture could not be written."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--output must end in .png, got {path}")
    if path.is_dir():
        raise ValueError(f"--output must be a file, got the folder {path}")
    if not path.parent.is_dir():
        raise ValueError(f"--output {path} cannot be written: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--output {path} cannot be written: the folder {path.parent} is not writable")


def _pca(arguments: argparse.Namespace) -> Image:
    pictures = _pictures(arguments)
    weights = pretrained.read(arguments.encoder)
    backbone = pretrained.build(weights).to(_device())
    patch_size = weights.shape.patch_size
    maps = [
        feature_map(backbone, picture, patch_size, window=arguments.window, finer=arguments.finer)
        for picture in tqdm(pictures, unit="image", disable=None)
    ]
    return draw_pca(
        pictures,
        maps,
        cell=patch_size // arguments.finer,
        names=[path.name for path in arguments.images],
        per_image=arguments.per_image,
        crisp=arguments.crisp,
        encoder=f"Encoder: {arguments.encoder}, patches of {patch_size} pixels. ",
    )


def _clusters(arguments: argparse.Namespace) -> Image:
    pictures = _pictures(arguments)
    model, config = load_model(arguments.encoder)
    patch_size = config.model.patch_size
    backbone = model.student_ema.backbone.to(_device())
    maps = [
        feature_map(backbone, picture, patch_size, window=arguments.window)
        for picture in tqdm(pictures, unit="image", disable=None)
    ]
    return draw_clusters(
        pictures,
        maps,
        model.teacher["head"].layer,
        patch_size=patch_size,
        names=[path.name for path in arguments.images],
        prototypes=arguments.prototypes,
        n_nearest=arguments.nearest,
        encoder=f"Teacher: {arguments.encoder}. ",
    )


def _masks(arguments: argparse.Namespace) -> Image:
    model, config = load_model(arguments.encoder)
    size = arguments.size or config.data.image_size
    crops = [_read(path, lambda data: crop(data, size, centre_box)) for path in arguments.images]
    pictures = torch.stack(crops)
    masking = config.masking
    if arguments.ask_all:
        masking = replace(masking, prediction_subsampling=1.0)
    answers = ask(model.to(_device()), pictures, masking, arguments.seed)
    names = [path.name for path in arguments.images]
    return draw_masks(pictures, answers, names=names, encoder=f"Student: {arguments.encoder}. ")


def _pictures(arguments: argparse.Namespace) -> list[UInt8[Tensor, "3 _ _"]]:
    def longer_side(own: int) -> int:
        return arguments.size or min(own, _LONGER_SIDE)

    return [_read(path, lambda data: whole(data, longer_side)) for path in arguments.images]


def _read(path: Path, decoded: Callable[[bytes], np.ndarray]) -> UInt8[Tensor, "3 _ _"]:
    """The pixels of a file; ValueError if it is none that can be read."""
    try:
        return torch.from_numpy(decoded(path.read_bytes()).copy()).permute(2, 0, 1)
    except Exception as error:  # whatever Pillow raises on broken data
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"{path} cannot be read as an image: {reason}") from error


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
