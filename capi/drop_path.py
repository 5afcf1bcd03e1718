"""Drop-path: residual branches computed for a random subset of the images, which stands for all of them.

The host draws the images of every branch; the device finds their tokens in the packed arrays.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


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


def subsets(branches: Branches, counts: Sequence[int], cu_seqlens: Int[Tensor, "images_plus_1"]) -> list[Subset]:
    """The tokens of each branch's images, of their `counts` of tokens, in a packed array with these `cu_seqlens`."""
    n_images, n_kept, device = len(counts), branches.images.shape[1], branches.images.device
    if len(set(counts)) > 1:
        return _ragged_subsets(branches, np.array(counts), cu_seqlens.long())
    # The device expands images to tokens.
    n_tokens = counts[0]
    offset = torch.arange(n_tokens, device=device)
    tokens = (branches.images.unsqueeze(-1) * n_tokens + offset).flatten(1)
    place = branches.place.unsqueeze(-1)
    place = torch.where(place < 0, -1, place * n_tokens + offset).flatten(1)
    kept_cu_seqlens = torch.arange(n_kept + 1, dtype=torch.int32, device=device) * n_tokens
    weight = n_images / n_kept
    both = zip(_aligned_rows(tokens), _aligned_rows(place), strict=True)
    return [Subset(*x, kept_cu_seqlens, weight) for x in both]


def _ragged_subsets(
    branches: Branches, counts: Int[np.ndarray, "images"], starts: Int[Tensor, "images_plus_1"]
) -> list[Subset]:
    """All branches in a few launches; the host says how many tokens each keeps, so that none is waited for."""
    n_images, n_tokens = len(counts), int(counts.sum())
    kept_tokens = counts[branches.drawn].sum(1).tolist()
    lengths = starts.diff()
    kept_lengths = lengths[branches.images]  # [branches, kept]
    kept_starts = F.pad(kept_lengths.cumsum(1), (1, 0))  # [branches, kept + 1]

    # A kept token lies as far behind the start of its image in the whole as in the subset.
    shift = (starts[branches.images] - kept_starts[:, :-1]).flatten()
    shift = shift.repeat_interleave(kept_lengths.flatten(), output_size=sum(kept_tokens)).split(kept_tokens)
    tokens = [x + torch.arange(len(x), device=x.device) for x in shift]

    image = torch.arange(n_images, device=starts.device).repeat_interleave(lengths, output_size=n_tokens)
    to_subset = kept_starts.gather(1, branches.place.clamp(min=0)) - starts[:-1]  # [branches, images]
    moved = to_subset.index_select(1, image) + torch.arange(n_tokens, device=starts.device)
    place = torch.where(branches.place.index_select(1, image) < 0, -1, moved)
    weight = n_images / branches.images.shape[1]
    rows = _aligned_rows(place), _aligned_rows(kept_starts.int())
    return [Subset(*x, weight) for x in zip(tokens, *rows, strict=True)]


def _aligned_rows(x: Int[Tensor, "rows n"]) -> list[Int[Tensor, "n"]]:
    """The rows, each from a multiple of 16 bytes on: kernels are compiled apart for such that are not."""
    n = x.shape[1]
    padding = -n % (16 // x.itemsize)
    return [row[:n] for row in (F.pad(x, (0, padding)) if padding else x).unbind()]


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


class TakeContext(torch.autograd.Function):
    """x[tokens], as many of every image, and the same read on to `row` rows an image: [images, row, dim], a view.

    What an image lacks are the first rows of the next one, and no gradient of theirs is counted.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, tokens: Tensor, place: Tensor, per_image: int, row: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(place)
        ctx.per_image, ctx.row = per_image, row
        # The last image reads some token or other.
        kept = x.index_select(0, F.pad(tokens, (0, row - per_image)) if row > per_image else tokens)
        shape = (len(tokens) // per_image, row, x.shape[1])
        return kept[: len(tokens)], kept.as_strided(shape, (per_image * x.shape[1], x.shape[1], 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dkept: Tensor, dread: Tensor) -> tuple[Tensor, None, None, None, None]:
        (place,) = ctx.saved_tensors
        dread = dread.flatten(0, 1)
        if ctx.row == ctx.per_image:
            return _placed(dkept + dread, place), None, None, None, None
        # Without the sum first, for which a compiler would copy the rows that count.
        in_rows = place + place.div(ctx.per_image, rounding_mode="floor") * (ctx.row - ctx.per_image)
        dx = dkept.index_select(0, place.clamp(min=0)) + dread.index_select(0, in_rows.clamp(min=0))
        return torch.where((place < 0).unsqueeze(1), 0, dx), None, None, None, None


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
