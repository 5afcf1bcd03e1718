"""Feature maps of pictures of any size: in one pass, or in overlapping windows; as fine as the patches, or finer."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from capi.model import normalize_images

WINDOW = 48
"""Most patches on a side that the encoder sees at a time, unless a caller says otherwise."""
_PATCHES_AT_A_TIME = 4096  # They bound what a pass over many small windows takes.


@torch.no_grad()
def feature_map(
    backbone: nn.Module,
    picture: UInt8[Tensor, "3 height width"],
    patch_size: int,
    *,
    window: int = WINDOW,
    finer: int = 1,
) -> Float[Tensor, "rows columns dim"]:
    """Features of cells of patch_size / finer pixels, row by row from the top left corner, float32 on the CPU.

    A picture whose sides are no multiples of the patch is continued by its mirror image to the right and below; there
    are cells for all of it. Of at most `window` patches a side it is seen whole, and with `finer` 1 the map is the
    encoder's own, bit for bit. A larger picture is seen in windows that overlap by a half at least, whose features fade
    into each other. With `finer` n the picture is seen n x n times, each time shifted by a part of a patch, and a cell
    has the mean of the patches that cover it.

    Raises:
        ValueError: `finer` does not divide the patch size, or `window` is not positive.
    """
    if finer < 1 or patch_size % finer:
        raise ValueError(f"finer must divide the patch size {patch_size}, got {finer}")
    if window < 1:
        raise ValueError(f"window must be at least 1 patch, got {window}")
    height, width = (-(-side // patch_size) for side in picture.shape[1:])  # in patches
    cell, before = patch_size // finer, finer // 2
    padded = np.pad(
        picture.numpy(),
        [(0, 0)]
        + [
            (before * cell, patches * patch_size - side + (finer - 1 - before) * cell)
            for patches, side in zip((height, width), picture.shape[1:], strict=True)
        ],
        mode="symmetric",
    )
    padded = torch.from_numpy(padded)
    tops, row_weights = _windows(height, window)
    lefts, column_weights = _windows(width, window)
    weights = (row_weights[:, None] * column_weights).repeat_interleave(finer, 0).repeat_interleave(finer, 1)[..., None]
    rows, columns = len(row_weights) * patch_size, len(column_weights) * patch_size
    # Where a window begins in cells of the padded picture.
    corners = [
        (top * finer + down, left * finer + right)
        for top in tops
        for left in lefts
        for down in range(finer)
        for right in range(finer)
    ]
    device = next(backbone.parameters()).device
    total, total_weights = None, torch.zeros(height * finer, width * finer, 1)
    batch_size = max(1, _PATCHES_AT_A_TIME // (len(row_weights) * len(column_weights)))
    for some in _batches(corners, batch_size):
        pixels = torch.stack([padded[:, y * cell :, x * cell :][:, :rows, :columns] for y, x in some])
        features = backbone(normalize_images(pixels.to(device)))[2].float().cpu()
        if total is None:
            total = torch.zeros(*total_weights.shape[:2], features.shape[-1])
        for (y, x), of_patches in zip(some, features, strict=True):
            of_cells = of_patches.repeat_interleave(finer, 0).repeat_interleave(finer, 1)
            # What lies in the margin is of no cell.
            y, x = y - before, x - before
            inside = np.s_[max(0, -y) : total.shape[0] - y, max(0, -x) : total.shape[1] - x]
            there = np.s_[max(0, y) : y + len(of_cells), max(0, x) : x + of_cells.shape[1]]
            total[there] += (of_cells * weights)[inside]
            total_weights[there] += weights[inside]
    return total / total_weights


def _windows(patches: int, window: int) -> tuple[list[int], Float[Tensor, "size"]]:
    """Where the windows along a side begin, and how much each of their patches counts."""
    if patches <= window:
        return [0], torch.ones(patches)
    n = -(-(patches - window) // max(1, window // 2)) + 1
    ascending = torch.arange(window)
    return np.linspace(0, patches - window, n).round().astype(int).tolist(), torch.minimum(
        ascending + 1, window - ascending
    ).float()


def _batches(items: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def upsampled(
    cells: Float[Tensor, "rows columns channels"], cell: int, height: int, width: int, *, crisp: bool
) -> Float[Tensor, "height width channels"]:
    """One value a pixel of the picture that the cells lie on: bicubic between their centres, or each cell a square."""
    planes = cells.permute(2, 0, 1)[None]
    mode = {"mode": "nearest"} if crisp else {"mode": "bicubic", "align_corners": False}
    return F.interpolate(planes, scale_factor=cell, **mode)[0, :, :height, :width].permute(1, 2, 0)
