"""The clustering head on a CPU: logits, assignment, loss and gradients of a few positions at a time."""

import math
from collections.abc import Iterable, Iterator
from itertools import cycle

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from capi_kernels._process_groups import in_turn, reduced
from capi_kernels.heads.cross_entropy_cpu import SoftCrossEntropy
from capi_kernels.heads.linear import StreamedLinear
from capi_kernels.reference import Potentials
from capi_kernels.sinkhorn.cpu import (
    HEADROOM,
    Block,
    balance,
    balance_chunk,
    chunks_in_flight,
    exponentials,
    positions_per_chunk,
    rows_per_block,
)


def clustering_head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_temperature: float,
    prediction_temperature: float,
    n_iterations: int,
    eps: float,
    positionwise: bool,
    position_chunk: int | None,
    process_group: ProcessGroup | None,
    dtype: torch.dtype,
    n_scored: int | None = None,
) -> tuple[Tensor, Potentials, Tensor, Tensor]:
    """The loss, the potentials, and the gradients of the loss in weight and bias."""
    positions, images, dim = features.shape
    prototypes, tokens = len(weight), positions * images
    scored = None if n_scored is None else (torch.arange(images) < n_scored).repeat(positions)
    wide = torch.promote_types(dtype, torch.float32)
    chunk = position_chunk or positions
    if position_chunk is None and positionwise:
        chunk = positions_per_chunk(images, prototypes, wide.itemsize, process_group)
    chunk = min(positions, chunk)
    balance_positions, in_flight = _apart, chunks_in_flight(positions, chunk, process_group)
    if not positionwise and chunk < positions:
        balance_positions, in_flight = _together, 1
    elif not positionwise:  # Everything in a chunk: a single position of all tokens.
        features, chunk = features.reshape(1, tokens, dim), 1

    slices = positions if positionwise else 1
    column_max, column = (features.new_empty((slices, prototypes), dtype=wide) for _ in range(2))
    potentials = Potentials(column_max, column, features.new_ones((slices, tokens // slices), dtype=wide))
    linear = StreamedLinear(features, weight, bias, dtype, chunk, in_flight)
    buffers = features.new_empty((in_flight, chunk, features.shape[1], prototypes), dtype=wide)
    cross_entropy = SoftCrossEntropy(chunk * features.shape[1], prototypes, wide, prediction_temperature)
    loss = features.new_zeros((), dtype=torch.float64)
    n_tokens = positions * (images if n_scored is None else n_scored)
    factor = -1 / (prediction_temperature * n_tokens)
    beta = 0  # Nothing is read of the gradient that the first product overwrites.
    dweight = (weight.new_empty if dtype == wide else weight.new_zeros)(weight.shape, dtype=wide)
    dbias = weight.new_zeros(prototypes, dtype=wide)
    chunks = balance_positions(linear, buffers, potentials, target_temperature, n_iterations, eps, process_group)
    for block in in_turn(chunks, in_flight):
        t, _, logits, f = (x.flatten(0, 1) for x in block)
        if scored is not None:  # Blocks come in the order of the tokens.
            here, scored = scored.split([len(t), len(scored) - len(t)])
            t, logits, f = (x[here] for x in (t, logits, f))
        minus_dlogits = logits if dtype == wide else torch.empty_like(t)
        for some_rows in zip(*(x.split(cross_entropy.rows) for x in (t, logits, minus_dlogits)), strict=True):
            loss += cross_entropy(*some_rows)
        if dtype == wide:
            dweight.addmm_(minus_dlogits.mT, f, beta=beta, alpha=factor)
            beta = 1
        else:  # Scaled in float32: float16 would lose the small.
            dweight.add_(torch.mm(minus_dlogits.to(dtype).mT, f), alpha=factor)
        dbias += minus_dlogits.sum(0)
    potentials.column.mul_(math.exp(HEADROOM))
    if not positionwise:
        potentials = Potentials(*(x[0] for x in potentials))
    return (loss / n_tokens).to(wide), potentials, dweight, dbias.mul_(factor)


def _apart(
    linear: StreamedLinear,
    buffers: Tensor,
    potentials: Potentials,
    temperature: float,
    n_iterations: int,
    eps: float,
    process_group: ProcessGroup | None,
) -> Iterator[Iterator[Block | None]]:
    """Balance every position apart, chunk by chunk; those yield blocks (assignments, rows, logits, features)."""
    positions, images = potentials.row.shape
    rows = rows_per_block(linear.chunk, images, buffers.shape[-1], buffers.itemsize)

    def balanced_from(start: int, buffer: Tensor) -> Iterator[Block | None]:
        part = Potentials(*(x[start : start + linear.chunk] for x in potentials))
        logits, features = linear(start)
        E = buffer[: len(logits)]
        yield from balance_chunk(E, logits, part, n_iterations, eps, temperature, process_group, rows, features)

    return map(balanced_from, range(0, positions, linear.chunk), cycle(buffers))


def _together(
    linear: StreamedLinear,
    buffers: Tensor,
    potentials: Potentials,
    temperature: float,
    n_iterations: int,
    eps: float,
    process_group: ProcessGroup | None,
) -> Iterator[Iterator[Block | None]]:
    """Balance all positions as one: every pass computes the logits anew, chunk by chunk. Yields the same blocks."""
    (buffer,) = buffers
    images = buffer.shape[1]
    column_max, column, row = potentials
    column_max, column, row = column_max.unsqueeze(1), column.unsqueeze(1), row.unsqueeze(2)

    def blocks() -> Iterator[Block]:
        for start in range(0, len(linear.features), linear.chunk):
            tensors = (buffer[: len(linear.features) - start], *linear(start))
            E, logits, features = (x.flatten(0, 1).unsqueeze(0) for x in tensors)
            yield E, row[:, start * images :][:, : E.shape[1]], logits, features

    def blocks_of_pass(number: int) -> Iterable[Block]:
        return exponentials(blocks(), column_max, temperature)

    def balanced() -> Iterator[Block | None]:
        column_max.fill_(-torch.inf)
        for _, _, logits, _ in blocks():
            torch.maximum(column_max, logits.amax(1, keepdim=True).to(column_max.dtype), out=column_max)
        yield from reduced(column_max, ReduceOp.MAX, process_group)
        yield from balance(blocks_of_pass, column, n_iterations, eps, process_group)

    yield balanced()
