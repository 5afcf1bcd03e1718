"""Masks: which patches the student sees and which it predicts, packed over the images of a batch."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from capi.config import MaskingConfig


@dataclass(frozen=True)
class Masks:
    """Visible and predicted patches of a batch; an index is image * n_tokens + position.

    Images may keep different numbers of patches: `visible_counts` and `predict_counts` say how many, on the host.
    """

    visible_indices: Int[Tensor, "visible"]
    """Ascending."""
    predict_indices: Int[Tensor, "predicted"]
    """Grouped by image, in random order within an image: what is predicted here stays aligned with its target."""
    visible_counts: tuple[int, ...]
    predict_counts: tuple[int, ...]

    def to(self, device: torch.device | str) -> "Masks":
        return replace(
            self,
            visible_indices=self.visible_indices.to(device, non_blocking=True),
            predict_indices=self.predict_indices.to(device, non_blocking=True),
        )

    def pin_memory(self) -> "Masks":
        return replace(
            self,
            visible_indices=self.visible_indices.pin_memory(),
            predict_indices=self.predict_indices.pin_memory(),
        )


def cumulative_lengths(lengths: Sequence[int]) -> Int[Tensor, "sequences_plus_1"]:
    """Where each of the packed sequences starts, and where the last one ends (int32, on the CPU)."""
    return torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)


def sample_masks(masking: MaskingConfig, grid: tuple[int, int], rngs: Sequence[np.random.Generator]) -> Masks:
    """Draws the masks of one batch, one generator an image, over a `grid` of (rows, columns) patches."""
    n_tokens = grid[0] * grid[1]
    visible, predicted = [], []
    for image, rng in enumerate(rngs):
        n_masked, n_predicted = _counts(masking, n_tokens, _draw_ratio(masking.mask_ratio, rng))
        mask = _sample_mask(masking, grid, n_masked, rng).reshape(-1)
        (masked_positions,) = mask.nonzero()
        offset = image * n_tokens
        visible.append(offset + (~mask).nonzero()[0])
        predicted.append(offset + rng.permutation(masked_positions)[:n_predicted])
    return Masks(
        visible_indices=torch.from_numpy(np.concatenate(visible)),
        predict_indices=torch.from_numpy(np.concatenate(predicted)),
        visible_counts=tuple(map(len, visible)),
        predict_counts=tuple(map(len, predicted)),
    )


def check_masking(masking: MaskingConfig, grid: tuple[int, int]) -> None:
    """Raises ValueError unless every mask that can be drawn leaves a visible and a predicted patch."""
    ratios = masking.mask_ratio if isinstance(masking.mask_ratio, tuple) else (masking.mask_ratio, masking.mask_ratio)
    if not 0 < ratios[0] <= ratios[1] < 1:
        raise ValueError(f"masking.mask_ratio must lie in (0, 1), a range ascending, got {masking.mask_ratio}")
    if not 0 < masking.prediction_subsampling <= 1:
        raise ValueError(f"masking.prediction_subsampling must lie in (0, 1], got {masking.prediction_subsampling}")
    if masking.min_aspect <= 0 or operator.gt(*_aspects(masking)):
        bounds = f"{masking.min_aspect} and {masking.max_aspect}"
        raise ValueError(f"masking.min_aspect and .max_aspect must be a positive ascending range, got {bounds}")
    n_tokens = grid[0] * grid[1]
    if _counts(masking, n_tokens, ratios[0])[1] < 1:
        raise ValueError(
            f"expected at least one predicted patch an image, got none: {n_tokens} patches, mask_ratio {ratios[0]}, "
            f"prediction_subsampling {masking.prediction_subsampling}"
        )


def _counts(masking: MaskingConfig, n_tokens: int, ratio: float) -> tuple[int, int]:
    n_masked = int(n_tokens * ratio)
    return n_masked, int(n_masked * masking.prediction_subsampling)


def _aspects(masking: MaskingConfig) -> tuple[float, float]:
    """The least and the largest aspect ratio of a block."""
    return masking.min_aspect, 1 / masking.min_aspect if masking.max_aspect is None else masking.max_aspect


def _draw_ratio(mask_ratio: float | tuple[float, float], rng: np.random.Generator) -> float:
    return rng.uniform(*mask_ratio) if isinstance(mask_ratio, tuple) else mask_ratio


def _sample_mask(
    masking: MaskingConfig, grid: tuple[int, int], n_masked: int, rng: np.random.Generator
) -> Bool[np.ndarray, "rows columns"]:
    n_tokens = grid[0] * grid[1]
    if masking.kind == "random":
        return (rng.permutation(n_tokens) < n_masked).reshape(grid)
    if masking.kind == "block":
        return _sample_block(masking, grid, n_masked, rng)
    return ~_sample_block(masking, grid, n_tokens - n_masked, rng)


def _sample_block(
    masking: MaskingConfig, grid: tuple[int, int], n_cells: int, rng: np.random.Generator
) -> Bool[np.ndarray, "rows columns"]:
    """A block of exactly `n_cells` cells, of log-uniform aspect ratio (rows / columns), in its bounds if that fits."""
    rows, columns = grid
    cells = np.zeros(grid, dtype=bool)
    if n_cells == 0:
        return cells
    narrowest, widest = math.log(n_cells / columns**2), math.log(rows**2 / (n_cells + 1e-5))
    # A long thin grid may admit no such aspect ratio: then the block takes its full height or width.
    least, largest = map(math.log, _aspects(masking))
    low = min(max(least, narrowest), widest)
    high = max(min(largest, widest), narrowest)
    aspect = math.exp(low + (high - low) * rng.random())
    height = min(math.ceil(math.sqrt(n_cells * aspect)), rows)
    width = min(math.ceil(math.sqrt(n_cells / aspect)), columns)
    top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
    cells[top : top + height, left : left + width] = True
    # The block holds at least n_cells: what is too many goes, from its last row backwards.
    cells.reshape(-1)[np.flatnonzero(cells)[n_cells:]] = False
    if masking.roll:
        cells = np.roll(cells, (rng.integers(rows), rng.integers(columns)), axis=(0, 1))
    return cells
