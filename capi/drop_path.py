"""Drop-path: residual branches computed for a random subset of the images, which stands for all of them.

The host draws the images of every branch; the device finds their tokens in the packed arrays.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from capi.masking import cumulative_lengths


class Subset(NamedTuple):
    """The images that a residual branch is computed for, as tokens of a packed array."""

    tokens: Int[Tensor, "kept"]
    """Their places in the whole."""
    place: Int[Tensor, "tokens"]
    """The place of each token of the whole in the subset, -1 where it is left out."""
    cu_seqlens: Int[Tensor, "kept_images_plus_1"]
    weight: float
    """Makes up for the images left out."""


class Branches(NamedTuple):
    """The images that residual branches are computed for, and, on the device, the place of every image among them."""

    drawn: Int[np.ndarray, "branches kept"]
    images: Int[Tensor, "branches kept"]
    place: Int[Tensor, "branches images"]
    """-1 where the image is left out."""

    def part(self, some: slice) -> "Branches":
        return Branches(self.drawn[some], self.images[some], self.place[some])


class DropPath(NamedTuple):
    """The branches of both transformers: in each as many of attentions, then as many of MLPs, as it has blocks."""

    encoder: Branches
    predictor: Branches


def draw(
    rate: float, depths: tuple[int, int], n_images: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, "_ kept"], Int[np.ndarray, "_ kept"]]:
    """Draws which images each branch of an encoder and a predictor of these depths is computed for."""
    n_kept = max(int(n_images * (1 - rate)), 1)
    encoder, predictor = (np.stack([rng.permutation(n_images)[:n_kept] for _ in range(2 * depth)]) for depth in depths)
    return encoder, predictor


def send(drawn: Sequence[tuple[np.ndarray, np.ndarray]], n_images: Sequence[int], device: torch.device) -> Tensor:
    """What was drawn for micro-batches of so many images, in one transfer, for `received`."""
    parts = []
    for of_batch, n in zip(drawn, n_images, strict=True):
        for images in of_batch:
            place = np.full((len(images), n), -1)
            np.put_along_axis(place, images, np.arange(images.shape[1])[None], axis=1)
            parts += [images.ravel(), place.ravel()]
    return sent(torch.from_numpy(np.concatenate(parts)), device)


def received(
    buffer: Int[Tensor, "_"], drawn: Sequence[tuple[np.ndarray, np.ndarray]], n_images: Sequence[int]
) -> list[DropPath]:
    """The branches of each micro-batch, as views of what `send` made."""
    shapes = [
        (len(images), width)
        for of_batch, n in zip(drawn, n_images, strict=True)
        for images in of_batch
        for width in (images.shape[1], n)
    ]
    views = [part.view(shape) for part, shape in zip(buffer.split([a * b for a, b in shapes]), shapes, strict=True)]
    result = []
    for i, (encoder, predictor) in enumerate(drawn):
        here = views[4 * i : 4 * i + 4]
        result.append(DropPath(Branches(encoder, *here[:2]), Branches(predictor, *here[2:])))
    return result


def subsets(branches: Branches, counts: Sequence[int]) -> list[Subset]:
    """The tokens of each branch's images, whatever their `counts` of tokens."""
    n_images, n_kept, device = len(counts), branches.images.shape[1], branches.images.device
    weight = n_images / n_kept
    if len(set(counts)) > 1:
        starts = np.concatenate([[0], np.cumsum(counts)])
        result = []
        for kept in branches.drawn:
            tokens = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in kept])
            place = np.full(starts[-1], -1)
            place[tokens] = np.arange(len(tokens))
            cu_seqlens = cumulative_lengths([counts[i] for i in kept])
            parts = (torch.from_numpy(tokens), torch.from_numpy(place), cu_seqlens)
            result.append(Subset(*(sent(x, device) for x in parts), weight))
        return result
    # The device expands images to tokens.
    n_tokens = counts[0]
    offset = torch.arange(n_tokens, device=device)
    tokens = (branches.images.unsqueeze(-1) * n_tokens + offset).flatten(1)
    place = branches.place.unsqueeze(-1)
    place = torch.where(place < 0, -1, place * n_tokens + offset).flatten(1)
    cu_seqlens = torch.arange(n_kept + 1, dtype=torch.int32, device=device) * n_tokens
    return [Subset(*both, cu_seqlens, weight) for both in zip(tokens.unbind(), place.unbind(), strict=True)]


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on the device; from pinned memory, since a copy from any other waits for the GPU."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


class TakeRows(torch.autograd.Function):
    """x[tokens]; since no token is taken twice, the gradient is read rather than scattered: in one order, and fused."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, tokens: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return _placed(dy, place), None, None


class AddRows(torch.autograd.Function):
    """x, and on its rows `tokens` weight * y more."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, y: Tensor, tokens: Tensor, place: Tensor, weight: float) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight = weight
        return torch.add(x, _placed(y, place), alpha=weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (tokens,) = ctx.saved_tensors
        return dout, dout.index_select(0, tokens) * ctx.weight, None, None, None


def _placed(x: Tensor, place: Tensor) -> Tensor:
    """Rows of x where they belong, zeros where none does."""
    return torch.where((place < 0).unsqueeze(1), 0, x.index_select(0, place.clamp(min=0)))
