"""Where patches and registers lie in an image: (row, column), from 0 to 1."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from capi.config import ModelConfig


class Coordinates(NamedTuple):
    """Of a grid of patches."""

    patches: Float[Tensor, "positions 2"]
    edge: Float[Tensor, "registers 2"]
    """Of registers in the unit square."""
    tokens: Float[Tensor, "tokens 2"]
    """Of registers with all patches, then of these."""


def grid_coordinates(grid: tuple[int, int], config: ModelConfig, device: torch.device) -> Coordinates:
    """Of a grid of (rows, columns) patches."""
    rows, columns = (torch.linspace(0, 1, n, device=device) for n in grid)
    patches, edge = torch.cartesian_prod(rows, columns), register_coordinates(config, device)
    return Coordinates(patches, edge, with_registers(patches.unsqueeze(0), edge, config.scale_registers).squeeze(0))


def with_registers(
    coords: Float[Tensor, "images patches 2"], edge: Float[Tensor, "registers 2"], scaled: bool
) -> Float[Tensor, "images tokens 2"]:
    """Registers before the patches of their image, whose bounding box is the unit square of `edge` if so `scaled`."""
    if not scaled:
        return torch.cat([edge.expand(len(coords), -1, -1), coords], dim=1)
    low, high = coords.amin(1, keepdim=True), coords.amax(1, keepdim=True)
    return torch.cat([low + edge * (high - low), coords], dim=1)


def register_coordinates(config: ModelConfig, device: torch.device) -> Float[Tensor, "registers 2"]:
    """Points that walk the perimeter of the unit square, or zeros."""
    n = config.n_registers
    if config.register_coordinates == "zeros":
        return torch.zeros(n, 2, device=device)
    step = torch.arange(n // 4, device=device) / max(n // 4, 1)
    zero, one = torch.zeros_like(step), torch.ones_like(step)
    sides = [(step, zero), (one, step), (1 - step, one), (zero, 1 - step)]
    return torch.cat([torch.stack(side, dim=1) for side in sides])
