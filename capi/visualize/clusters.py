"""Which prototype of the teacher each patch takes, and the patches nearest to some prototypes."""

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn

from capi.visualize.maps import upsampled
from capi.visualize.sheet import Panel, bytes_of, enlargement, framed, sheet, shown

_ROWS_AT_A_TIME = 1024  # Of logits: of 16384 prototypes they take 64 MB.
_SHEET_SIDE, _CONTEXT = 80, 5  # Pixels of a panel of the contact sheet; patches on its side.

_OUTSIDE = 225  # The grey of what lies outside a picture.
_TONES = ((0.6, 0.95), (0.95, 0.75), (0.3, 0.85), (0.8, 0.55), (0.45, 0.65), (0.85, 0.95))  # Saturation and value.


@dataclass
class Nearest:
    """The patches of all pictures with the largest logits of one prototype, the nearest first."""

    prototype: int
    share: float
    """Of all patches, those that take the prototype."""
    places: list[tuple[int, int, int]]
    """(picture, row, column) of each, in patches."""


def clustering_logits(features: Float[Tensor, "patches dim"], layer: nn.Linear) -> Float[Tensor, "patches prototypes"]:
    """What the teacher's head computes of its features before the balancing: z = normalize(x) W^T + b."""
    return layer(F.normalize(features, dim=-1, eps=1e-7))


@torch.no_grad()
def clusters_of(features: Float[Tensor, "rows columns dim"], layer: nn.Linear) -> Int[Tensor, "rows columns"]:
    """The prototype of the largest logit, patch by patch."""
    rows = features.flatten(0, 1).split(_ROWS_AT_A_TIME)
    return torch.cat([clustering_logits(x, layer).argmax(-1) for x in rows]).unflatten(0, features.shape[:2])


@torch.no_grad()
def nearest_patches(
    maps: Sequence[Float[Tensor, "_ _ dim"]],
    clusters: Sequence[Int[Tensor, "_ _"]],
    layer: nn.Linear,
    prototypes: Sequence[int],
    n: int,
) -> list[Nearest]:
    """Of each prototype the `n` patches of its largest logits in `maps`, and the share of `clusters` that takes it.

    Of equal logits those of the first picture come first, then by place.
    """
    chosen = nn.Linear(layer.in_features, len(prototypes), bias=layer.bias is not None)
    chosen.weight.copy_(layer.weight[list(prototypes)])
    if layer.bias is not None:
        chosen.bias.copy_(layer.bias[list(prototypes)])
    logits = torch.cat([clustering_logits(x.flatten(0, 1), chosen) for x in maps])
    places = [(i, row, column) for i, x in enumerate(maps) for row in range(len(x)) for column in range(x.shape[1])]
    taken = torch.cat([x.flatten() for x in clusters])
    return [
        Nearest(
            prototype,
            (taken == prototype).double().mean().item(),
            [places[k] for k in logits[:, j].sort(descending=True, stable=True).indices[:n].tolist()],
        )
        for j, prototype in enumerate(prototypes)
    ]


def most_frequent(clusters: Sequence[Int[Tensor, "_ _"]], n: int) -> list[int]:
    """The `n` prototypes that most patches take, and fewer where fewer are taken; of equal ones the lower number."""
    numbers, counts = torch.cat([x.flatten() for x in clusters]).unique(return_counts=True)
    return numbers[counts.sort(descending=True, stable=True).indices[:n]].tolist()


def colours_of(clusters: Int[Tensor, "*places"]) -> Float[Tensor, "*places 3"]:
    """A colour from 0 to 1 of each prototype's number, the same in every picture; neighbours in number differ most."""
    numbers, inverse = clusters.unique(return_inverse=True)
    return torch.tensor([_colour(number) for number in numbers.tolist()])[inverse]


def _colour(number: int) -> tuple[float, float, float]:
    # Multiples of the golden ratio spread over the hues, however many there are; where they come close to each other,
    # which is after 8, 13, 21, 34 ... of them, saturation and value differ.
    hue = number * 0.6180339887 % 1
    saturation, value = _TONES[number % len(_TONES)]
    return colorsys.hsv_to_rgb(hue, saturation, value)


def draw_clusters(
    pictures: Sequence[UInt8[Tensor, "3 _ _"]],
    maps: Sequence[Float[Tensor, "_ _ dim"]],
    layer: nn.Linear,
    *,
    patch_size: int,
    names: Sequence[str],
    prototypes: Sequence[int] | None = None,
    n_nearest: int = 10,
    encoder: str = "",
) -> Image.Image:
    """Draws every picture beside its clusters, then a row of the nearest patches of each of some prototypes.

    Args:
        layer: the teacher's head, a linear layer to the prototypes.
        prototypes: their numbers; by default the eight that most patches take.

    Raises:
        ValueError: features that are not finite, or a number that is no prototype's.
    """
    maps = [x.detach().float().cpu() for x in maps]
    if not all(x.isfinite().all() for x in maps):
        raise ValueError("feature maps must be finite, got NaN or infinity")
    for number in prototypes or []:
        if not 0 <= number < layer.out_features:
            raise ValueError(f"prototypes must be from 0 to {layer.out_features - 1}, got {number}")
    clusters = [clusters_of(x, layer) for x in maps]
    groups = []
    for picture, of_picture, name in zip(pictures, clusters, names, strict=True):
        times = enlargement(picture)
        height, width = (times * side for side in picture.shape[1:])
        colours = upsampled(colours_of(of_picture), times * patch_size, height, width, crisp=True)
        n_taken = len(of_picture.unique())
        groups.append([Panel(shown(picture), name), Panel(bytes_of(colours), f"{n_taken} prototypes")])
    if prototypes is None:
        prototypes = most_frequent(clusters, 8)
    # Patches that a picture ends in were continued for the encoder: these are not shown as what is nearest.
    inside = [
        x[: picture.shape[1] // patch_size, : picture.shape[2] // patch_size]
        for x, picture in zip(maps, pictures, strict=True)
    ]
    nearest = nearest_patches(inside, clusters, layer, prototypes, n_nearest)
    contacts = [list(_contact_row(pictures, of_one, patch_size)) for of_one in nearest]
    used = len(torch.cat([x.flatten() for x in clusters]).unique())
    note = (
        f"A colour for each of the teacher's {layer.out_features} prototypes, of which {used} are taken here: of every "
        f"patch of {patch_size} x {patch_size} pixels the one with the largest logit, without training's balancing. "
        "Below, a row a prototype: the patches of all pictures nearest to it, framed, with what surrounds them."
    )
    return sheet("Clusters of patches", f"{encoder}{note}", groups, contacts)


def _contact_row(pictures: Sequence[UInt8[Tensor, "3 _ _"]], nearest: Nearest, patch_size: int) -> Iterator[Panel]:
    colour = np.array([round(255 * x) for x in _colour(nearest.prototype)], dtype=np.uint8)
    swatch = np.broadcast_to(colour, (_SHEET_SIDE, _SHEET_SIDE, 3))
    yield Panel(swatch, f"{nearest.prototype}: {100 * nearest.share:.1f} %")
    around = (_CONTEXT - 1) // 2 * patch_size
    side = _CONTEXT * patch_size
    for i, row, column in nearest.places:
        padded = np.pad(pictures[i].numpy(), [(0, 0), *[(around, around)] * 2], constant_values=_OUTSIDE)
        pixels = padded[:, row * patch_size :, column * patch_size :][:, :side, :side]
        pixels = framed(pixels.transpose(1, 2, 0), _SHEET_SIDE, 1 / _CONTEXT)
        yield Panel(pixels)
