"""Sinkhorn on a CPU: a few positions at a time, whose exponentials stay in cache between the passes.

The row pass of an iteration and the column pass of the next share one reading of E. Never written: the matrix between
the exponential, which goes straight to the output, and the last scaling.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle, repeat

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from capi_kernels._process_groups import in_turn, largest, reduced
from capi_kernels.reference import SHIFT, Potentials

# In this file E carries exp(HEADROOM), which keeps it clear of the denormal numbers, slow on a CPU, and c its inverse.
HEADROOM = 32.0
CHUNK_BYTES = 1 << 23  # Exponentials that stay in cache between two passes.
CHUNKS_IN_FLIGHT = 2  # Over a group: while one is all-reduced the other is computed.
IN_PLACE = 4  # So many times more where the output holds them: threads wait for each other less often.
SUMMED = 1024  # Terms that one product adds up: in one go 16384 would be off by more than all other rounding.

Block = tuple[Tensor, ...]  # Exponentials E [p, rows, K], rows [p, rows, 1], and what their owner keeps beside them.


def balance(
    blocks_of_pass: Callable[[int], Iterable[Block]],
    column: Tensor,
    n_iterations: int,
    eps: float,
    process_group: ProcessGroup | None,
) -> Iterator[Block | None]:
    """Fill c exp(-HEADROOM) [p, 1, K] and the rows (ones at first) of all blocks; yield blocks as they get assignments.

    `blocks_of_pass` gives the blocks of each of n_iterations + 1 passes, with exponentials from the first on. The last
    pass yields, so that the caller finds the block in cache. Yields None at every reduction, as `in_turn` expects.
    """
    column.fill_(SHIFT - HEADROOM).exp_()
    row_limit = torch.finfo(column.dtype).max ** 0.8
    column_sum, eps_ = torch.empty_like(column), column.new_tensor(eps)
    beta = 0  # The first sums overwrite those of the iteration before.
    for E, row, *_ in blocks_of_pass(0):
        beta = _add_column_sums_(column_sum, row, E, beta)
    for iteration in range(1, n_iterations + 1):
        yield from reduced(column_sum, ReduceOp.SUM, process_group)
        column.div_(torch.addcmul(eps_, column, column_sum, out=column_sum))
        # Only column * row matters: a fixed largest column keeps both from drifting to 0 and inf in many iterations.
        scale = column.amax(-1, keepdim=True).mul_(math.exp(HEADROOM))
        column.div_(scale)
        beta = 0
        for block in blocks_of_pass(iteration):
            E, row = block[:2]
            row.mul_(scale)
            # A row without any mass gains 1 / eps each time; inf would turn its zeros to NaN.
            row.div_((row * _row_sums(E, column)).add_(eps)).clamp_(max=row_limit)
            if iteration < n_iterations:
                beta = _add_column_sums_(column_sum, row, E, beta)
            else:
                E.mul_(column).mul_(row)
                yield block


def _add_column_sums_(column_sum: Tensor, row: Tensor, E: Tensor, beta: int) -> int:
    """Adds row^T E [p, 1, K], a few rows at a time, to beta times what is there; returns the next beta, 1."""
    for some_rows, e in zip(row.split(SUMMED, dim=1), E.split(SUMMED, dim=1), strict=True):
        column_sum.baddbmm_(some_rows.mT, e, beta=beta)
        beta = 1
    return beta


def _row_sums(E: Tensor, column: Tensor) -> Tensor:
    """E column^T [p, rows, 1], a few prototypes at a time."""
    blocks = zip(*(x.split(SUMMED, dim=-1) for x in (column, E)), strict=True)
    return sum(torch.bmm(c, e.mT) for c, e in blocks).mT


def _exponential_(x: Tensor, temperature: float) -> None:
    """exp(x / temperature + HEADROOM), over x."""
    torch.add(x.new_tensor(HEADROOM), x, alpha=1 / temperature, out=x).exp_()


def exponentials(blocks: Iterable[Block], column_max: Tensor, temperature: float) -> Iterator[Block]:
    """The blocks (exponentials, rows, logits, ...) with E exp(HEADROOM) computed."""
    for block in blocks:
        E, _, logits = block[:3]
        # Operands of two dtypes would be converted through a copy of their own.
        torch.sub(logits if logits.dtype == E.dtype else E.copy_(logits), column_max, out=E)
        _exponential_(E, temperature)
        yield block


def balance_chunk(
    E: Tensor,
    logits: Tensor,
    potentials: Potentials,
    n_iterations: int,
    eps: float,
    temperature: float,
    process_group: ProcessGroup | None,
    rows: int,
    *others: Tensor,
) -> Iterator[Block | None]:
    """Fill the potentials of [p, images, K] logits; yield blocks of `rows` images, E now the assignments, and None.

    A block is (E, rows, logits, *others), where E is a buffer for the exponentials and others are [p, images, ...].
    """
    column_max, column, row = potentials.column_max.unsqueeze(1), potentials.column.unsqueeze(1), potentials.row
    column_max.copy_(logits.amax(1, keepdim=True))
    yield from reduced(column_max, ReduceOp.MAX, process_group)
    blocks = list(zip(*(x.split(rows, dim=1) for x in (E, row.unsqueeze(2), logits, *others)), strict=True))

    def blocks_of_pass(number: int) -> Iterable[Block]:
        return exponentials(blocks, column_max, temperature) if number == 0 else blocks

    yield from balance(blocks_of_pass, column, n_iterations, eps, process_group)


def chunks_in_flight(positions: int, chunk: int, process_group: ProcessGroup | None) -> int:
    """How many chunks are balanced by turns; alone, there is nothing to wait for."""
    return 1 if process_group is None else min(CHUNKS_IN_FLIGHT, -(-positions // chunk))


def positions_per_chunk(
    images: int, prototypes: int, itemsize: int, process_group: ProcessGroup | None, times: int = 1
) -> int:
    """How many positions fit in `times` CHUNK_BYTES on the rank with most images: ranks must cut reductions alike."""
    (images,) = largest([images], process_group, torch.device("cpu"))
    return max(1, times * CHUNK_BYTES // (images * prototypes * itemsize))


def rows_per_block(positions: int, images: int, prototypes: int, itemsize: int) -> int:
    """All images of a chunk of several positions; of a single position, what fits in CHUNK_BYTES."""
    return images if positions > 1 else max(1, min(images, CHUNK_BYTES // (prototypes * itemsize)))


def _balance_positions(
    logits: Tensor,
    out: Tensor | None,
    potentials: Potentials,
    n_iterations: int,
    eps: float,
    temperature: float,
    process_group: ProcessGroup | None,
    chunk: int,
) -> None:
    """Fill the potentials of [..., positions, images, prototypes] logits, and `out`, if any, with their assignments."""
    if logits.ndim > 3:  # Leading axes one by one: flattening them could copy the logits.
        outs = repeat(None) if out is None else out
        for part, part_out, *part_potentials in zip(logits, outs, *potentials, strict=False):
            part_potentials = Potentials(*part_potentials)
            _balance_positions(part, part_out, part_potentials, n_iterations, eps, temperature, process_group, chunk)
        return
    positions, images, prototypes = logits.shape
    dtype = potentials.row.dtype
    in_place = out is not None and out.dtype == dtype
    in_flight = chunks_in_flight(positions, chunk, process_group)
    shape = (in_flight, min(chunk, positions), images, prototypes)
    buffers = out.split(chunk) if in_place else cycle(torch.empty(shape, dtype=dtype))
    rows = rows_per_block(chunk, images, prototypes, dtype.itemsize)

    def balanced_from(start: int, buffer: Tensor) -> Iterator[None]:
        here = slice(start, start + chunk)
        E, part = buffer[: positions - start], Potentials(*(x[here] for x in potentials))
        for block in balance_chunk(E, logits[here], part, n_iterations, eps, temperature, process_group, rows):
            if block is None:
                yield
        if out is not None and not in_place:
            out[here].copy_(E)

    for _ in in_turn(map(balanced_from, range(0, positions, chunk), buffers), in_flight):
        pass


def balanced(
    logits: Tensor, n_iterations: int, eps: float, temperature: float, process_group: ProcessGroup | None, assign: bool
) -> tuple[Tensor | None, Potentials]:
    """Allocate and fill the assignments, if wanted, and the potentials."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    *slices, images, prototypes = logits.shape
    out = torch.empty(logits.shape, dtype=logits.dtype) if assign else None
    column_max, column = (torch.empty((*slices, prototypes), dtype=dtype) for _ in range(2))
    potentials = Potentials(column_max, column, torch.ones((*slices, images), dtype=dtype))
    times = IN_PLACE if assign and logits.dtype == dtype else 1
    chunk = positions_per_chunk(images, prototypes, dtype.itemsize, process_group, times)
    tensors = (logits, out, *potentials)
    if not slices:
        tensors = (x if x is None else x.unsqueeze(0) for x in tensors)
    z, z_out, *z_potentials = tensors
    _balance_positions(z, z_out, Potentials(*z_potentials), n_iterations, eps, temperature, process_group, chunk)
    potentials.column.mul_(math.exp(HEADROOM))
    return out, potentials


def assignments(logits: Tensor, potentials: Potentials, rows: Tensor | None, temperature: float) -> Tensor:
    """Those of all rows of logits [..., images, prototypes], or of chosen ones, given with all or by themselves."""
    column_max, column, row = potentials
    if rows is None:
        column_max, column, row = column_max.unsqueeze(-2), column.unsqueeze(-2), row.unsqueeze(-1)
    else:
        image, position = rows // len(row), rows % len(row)
        column_max, column, row = column_max[position], column[position], row[position, image].unsqueeze(1)
        logits = logits[position, image] if logits.ndim == 3 else logits
    E = torch.empty(logits.shape, dtype=torch.promote_types(logits.dtype, column_max.dtype))
    torch.sub(logits, column_max, out=E)
    _exponential_(E, temperature)
    return E.mul_(column).mul_(row * math.exp(-HEADROOM))
