"""Feature maps as colours: their first three principal components as red, green and blue."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from capi.visualize.maps import upsampled
from capi.visualize.sheet import Panel, bytes_of, enlargement, sheet, shown


def principal_colours(
    maps: Sequence[Float[Tensor, "_ _ dim"]],
) -> list[Float[Tensor, "_ _ 3"]]:
    """The maps on the first three principal components of all their cells together, for colours from 0 to 1.

    0 is the 2nd and 1 the 98th percentile of a component, so some cells lie outside; one that does not vary is 0.5
    everywhere. Of a component's two directions the one is taken in which its largest weight is positive: colours do
    not depend on the order of the maps, nor on how a library leaves the signs.
    """
    cells = torch.cat([x.flatten(0, 1) for x in maps]).double()
    mean = cells.mean(0)
    cells -= mean
    largest = max(float(x.abs().max()) for x in maps)
    _, axes = torch.linalg.eigh(cells.T @ cells)  # ascending
    axes = axes[:, -3:].flip(1)
    axes *= axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    components = torch.zeros(len(cells), 3, dtype=torch.float64)
    components[:, : axes.shape[1]] = cells @ axes
    low, high = (components.sort(0).values[round(share * (len(cells) - 1))] for share in (0.02, 0.98))
    flat = high - low <= 1e-6 * max(1.0, largest)
    colours = ((components - low) / (high - low).where(~flat, 1)).where(~flat, 0.5).float()
    sizes = [x.shape[0] * x.shape[1] for x in maps]
    return [part.unflatten(0, x.shape[:2]) for part, x in zip(colours.split(sizes), maps, strict=True)]


def draw_pca(
    pictures: Sequence[UInt8[Tensor, "3 _ _"]],
    maps: Sequence[Float[Tensor, "_ _ dim"]],
    *,
    cell: int,
    names: Sequence[str] | None = None,
    per_image: bool = False,
    crisp: bool = False,
    encoder: str = "",
) -> Image.Image:
    """Draws every picture beside its map, whose cells are squares of `cell` pixels.

    The components are those of all maps together, or with `per_image` of each alone.

    Raises:
        ValueError: no picture, not as many maps as pictures, or features that are not finite.
    """
    if len(pictures) == 0 or len(pictures) != len(maps):
        raise ValueError(f"expected as many images as feature maps, got {len(pictures)} and {len(maps)}")
    maps = [x.detach().float().cpu() for x in maps]
    if not all(x.isfinite().all() for x in maps):
        raise ValueError("feature maps must be finite, got NaN or infinity")
    coloured = [principal_colours([x])[0] for x in maps] if per_image else principal_colours(maps)
    groups = []
    for i, (picture, colours) in enumerate(zip(pictures, coloured, strict=True)):
        times = enlargement(picture)
        height, width = (times * side for side in picture.shape[1:])
        pixels = bytes_of(upsampled(colours, times * cell, height, width, crisp=crisp))
        name = "image" if names is None else names[i]
        groups.append([Panel(shown(picture), name), Panel(pixels, "principal components")])
    of = "of each image's own features" if per_image else "of the features of all images together"
    note = (
        f"Red, green and blue are the first three principal components {of}: where colours are alike, so are features. "
        f"One feature every {cell} x {cell} pixels, {'each a square' if crisp else 'interpolated'}."
    )
    return sheet("Features as colours", f"{encoder}{note}", groups)
