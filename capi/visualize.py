"""Pictures of a run: the curves of its metrics, and feature maps as colours beside their images.

`python -m capi.visualize ENCODER IMAGE ... --output FILE.png` draws the feature maps of images of yours.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy import ndarray
from torch import Tensor

from capi import pretrained
from capi.data.crops import centre_box, crop
from capi.metrics import read_metrics
from capi.model import normalize_images

_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}


def plot_curves(metrics_jsonl: str | Path, png: str | Path) -> None:
    """Draws losses, target entropy, positional mutual information, schedules and speed of a run over its steps."""
    lines = read_metrics(metrics_jsonl)
    if not lines:
        raise ValueError(f"{metrics_jsonl} holds no line of metrics")
    with mpl.rc_context(_STYLE):
        _curves(lines).savefig(png, dpi=120, format="png")


def _curves(lines: list[dict[str, int | float | None]]) -> Figure:
    def draw(axes: Axes, key: str, label: str, **style: str) -> None:
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)

    scores = sorted({key for line in lines for key in line if key.startswith("eval_")})
    figure = Figure(figsize=(12, 9.6 if scores else 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subfigures(2, 1, height_ratios=(2, 1)) if scores else (figure, None)
    losses, entropy, information, rates, momentum, speed = upper.subplots(2, 3, sharex=True).flat
    if lower is not None:
        axes = lower.subplots()
        axes.set_title("scores of the moving average (run.evaluate_every)")
        for key in scores:
            draw(axes, key, key.removeprefix("eval_").replace("_", " "), marker="o")
        axes.set_xlabel("step")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    losses.set_title("losses (nats)")
    draw(losses, "loss", "student")
    draw(losses, "clustering_loss", "clustering")
    entropy.set_title("target entropy (nats)")
    draw(entropy, "target_entropy", "targets")
    draw(entropy, "target_entropy_floor", "floor ln(K/B)", color="0.5", linestyle="--")
    information.set_title("position-cluster information (nats)")
    draw(information, "positional_mi", "measured")
    draw(information, "positional_mi_floor", "by chance", color="0.5", linestyle="--")
    rates.set_title("learning rates")
    draw(rates, "lr", "student")
    draw(rates, "clustering_lr", "clustering")
    momentum.set_title("teacher momentum")
    draw(momentum, "momentum", "momentum")
    speed.set_title("images per second")
    draw(speed, "images_per_second", "images/s")
    for axes in (losses, entropy, information, rates, speed):
        axes.set_ylim(bottom=0)
    for axes in (losses, entropy, information, rates):
        axes.legend()
    for axes in (rates, momentum, speed):
        axes.set_xlabel("step")
    return figure


def plot_pca_maps(
    images: Shaped[Tensor, "images 3 height width"],
    feature_maps: Float[Tensor, "images rows columns dim"],
    png: str | Path,
) -> None:
    """Draws every image beside its feature map, whose first three principal components over all maps are the RGB.

    Raises:
        TypeError: the images are not uint8.
        ValueError: no image, not as many maps as images, or features that are not finite.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be torch.uint8, got {images.dtype}")
    if len(images) == 0 or len(images) != len(feature_maps):
        raise ValueError(f"expected as many images as feature maps, got {len(images)} and {len(feature_maps)}")
    feature_maps = feature_maps.detach().float().cpu()
    if not torch.isfinite(feature_maps).all():
        raise ValueError("feature_maps must be finite, got NaN or infinity")
    colours = _principal_colours(feature_maps.numpy())
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(3.8 * columns, 1.9 * rows + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, title in zip(grid[0], ("image", "features") * columns, strict=True):
        axes.set_title(title, fontsize=9, color="0.3")
    for index, (image, colour) in enumerate(zip(images.cpu().numpy(), colours, strict=True)):
        left, right = grid[index // columns, 2 * (index % columns) :][:2]
        left.imshow(image.transpose(1, 2, 0), interpolation="nearest")
        right.imshow(colour, interpolation="nearest")
    figure.savefig(png, dpi=120, format="png")


def _principal_colours(maps: Float[ndarray, "images rows columns dim"]) -> Float[ndarray, "images rows columns 3"]:
    """Projects on the first three principal components and maps the 2nd to the 98th percentile of each to [0, 1]."""
    features = maps.reshape(-1, maps.shape[-1]).astype(np.float64)
    features = features - features.mean(axis=0)
    _, _, directions = np.linalg.svd(features, full_matrices=False)
    components = np.zeros((len(features), 3))
    components[:, : min(3, len(directions))] = features @ directions[:3].T
    low, high = np.percentile(components, [2, 98], axis=0)
    spread = high - low
    # A component that does not vary is shown as mid-grey.
    flat = spread <= 1e-6 * max(1.0, float(np.abs(maps).max()))
    colours = np.where(flat, 0.5, (components - low) / np.where(flat, 1.0, spread))
    return colours.clip(0, 1).reshape(*maps.shape[:-1], 3)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m capi.visualize", description="Draws images beside an encoder's feature maps."
    )
    parser.add_argument(
        "encoder", metavar="ENCODER", help="a run folder, a checkpoint, an encoder file, or an official name"
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="files of images; their centre is shown")
    parser.add_argument("--output", metavar="FILE.png", required=True, type=Path, help="the picture to write")
    parser.add_argument(
        "--image_size",
        type=int,
        help="side of the images in pixels; by default that of the run, or 16 patches where the run is not known",
    )
    arguments = parser.parse_args(argv)
    try:
        weights = pretrained.read(arguments.encoder)
        size = pretrained.configuration_of(weights, arguments.image_size).data.image_size
        pixels = torch.from_numpy(np.stack([_centre(path, size) for path in arguments.images])).permute(0, 3, 1, 2)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        backbone = pretrained.build(weights).to(device)
        maps = [backbone(normalize_images(images.to(device)))[2] for images in pixels.split(8)]
        plot_pca_maps(pixels, torch.cat(maps), arguments.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(f"wrote {arguments.output}")  # noqa: T201
    return 0


def _centre(path: Path, size: int) -> UInt8[ndarray, "size size 3"]:
    """The centre of an image, resized to a square; ValueError if the file is none that can be read."""
    try:
        return crop(path.read_bytes(), size, centre_box)
    except Exception as error:  # whatever Pillow raises on broken data
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"{path} cannot be read as an image: {reason}") from error


if __name__ == "__main__":
    sys.exit(main())
