"""Position-wise Sinkhorn-Knopp: assignments E_ik c_k a_i with E = exp((logits - max over images) / temperature).

    c <- c / (c S + eps), S_k = sum_i a_i E_ik        a <- a / (a R + eps), R_i = sum_k E_ik c_k

are the official code's divisions by column and row sums plus eps, gathered in one potential per column and row, with
c = exp(50) at first. The row pass of an iteration and the column pass of the next share one reading of E. Never
written: the matrix between the exponential, which goes straight to the output, and the last scaling.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import chain, repeat

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup, ReduceOp, all_reduce, get_backend_config
from torch.distributed.distributed_c10d import _resolve_process_group

from capi_kernels._autocast import register_autocast
from capi_kernels._checks import (
    check_chosen,
    check_chosen_logits,
    check_device,
    check_not_empty,
    check_positive,
    check_sinkhorn_options,
    check_tensor,
    resolve_group,
)
from capi_kernels.reference import SHIFT, Potentials

# In this file E carries exp(HEADROOM), which keeps it clear of the denormal numbers, slow on a CPU, and c its inverse.
HEADROOM = 32.0
CHUNK_BYTES = 1 << 23  # Exponentials that stay in cache between two passes.
IN_PLACE = 4  # So many times more where the output holds them: threads wait for each other less often.
SUMMED = 1024  # Terms that one product adds up: in one go 16384 would be off by more than all other rounding.


def balance(
    passes: Iterable[Iterable[tuple[Tensor, ...]]],
    column: Tensor,
    n_iterations: int,
    eps: float,
    process_group: ProcessGroup | None,
) -> Iterator[tuple[Tensor, ...]]:
    """Fill c exp(-HEADROOM) [p, 1, K] and the rows (ones at first) of all blocks; yield blocks as they get assignments.

    A pass runs over the blocks; a block starts with its exponentials [p, rows, K] and its rows [p, rows, 1]. There are
    n_iterations + 1 passes, the last of which yields, so that the caller finds the block in cache.
    """
    column.fill_(SHIFT - HEADROOM).exp_()
    row_limit = torch.finfo(column.dtype).max ** 0.8
    passes = iter(passes)
    column_sum = torch.zeros_like(column)
    for E, row, *_ in next(passes):
        _add_column_sums_(column_sum, row, E)
    for iteration in range(n_iterations):
        if process_group is not None:
            all_reduce(column_sum, ReduceOp.SUM, process_group)
        column.div_((column * column_sum).add_(eps))
        # Only column * row matters: a fixed largest column keeps both from drifting to 0 and inf in many iterations.
        scale = column.amax(-1, keepdim=True).mul_(math.exp(HEADROOM))
        column.div_(scale)
        column_sum.zero_()
        for block in next(passes):
            E, row = block[:2]
            row.mul_(scale)
            # A row without any mass gains 1 / eps each time; inf would turn its zeros to NaN.
            row.div_((row * _row_sums(E, column)).add_(eps)).clamp_(max=row_limit)
            if iteration < n_iterations - 1:
                _add_column_sums_(column_sum, row, E)
            else:
                E.mul_(column).mul_(row)
                yield block


def _add_column_sums_(column_sum: Tensor, row: Tensor, E: Tensor) -> None:
    """Adds row^T E [p, 1, K], a few rows at a time."""
    for some_rows, e in zip(row.split(SUMMED, dim=1), E.split(SUMMED, dim=1), strict=True):
        column_sum.baddbmm_(some_rows.mT, e)


def _row_sums(E: Tensor, column: Tensor) -> Tensor:
    """E column^T [p, rows, 1], a few prototypes at a time."""
    blocks = zip(*(x.split(SUMMED, dim=-1) for x in (column, E)), strict=True)
    return sum(torch.bmm(c, e.mT) for c, e in blocks).mT


def _exponential_(x: Tensor, temperature: float) -> None:
    """exp(x / temperature + HEADROOM), over x."""
    torch.add(x.new_tensor(HEADROOM), x, alpha=1 / temperature, out=x).exp_()


def exponentials(
    blocks: Iterable[tuple[Tensor, ...]], column_max: Tensor, temperature: float
) -> Iterator[tuple[Tensor, ...]]:
    """The blocks (exponentials, rows, logits, ...) with E exp(HEADROOM) computed."""
    for block in blocks:
        E, _, logits = block[:3]
        _exponential_(E.copy_(logits).sub_(column_max), temperature)
        yield block


def largest(values: list[int], process_group: ProcessGroup | None, device: torch.device) -> list[int]:
    """The largest of each value over the ranks; no rank waits for its GPU where the group reduces on CPUs as well."""
    if process_group is None:
        return values
    x = torch.tensor(values, device="cpu" if "cpu:" in get_backend_config(process_group) else device)
    all_reduce(x, ReduceOp.MAX, process_group)
    return x.tolist()


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
    buffer = out if in_place else torch.empty((min(chunk, positions), images, prototypes), dtype=dtype)
    rows = rows_per_block(chunk, images, prototypes, dtype.itemsize)
    for start in range(0, positions, chunk):
        here = slice(start, start + chunk)
        z, E = logits[here], buffer[here] if in_place else buffer[: positions - start]
        column_max, column = potentials.column_max[here].unsqueeze(1), potentials.column[here].unsqueeze(1)
        column_max.copy_(z.amax(1, keepdim=True))
        if process_group is not None:
            all_reduce(column_max, ReduceOp.MAX, process_group)
        tensors = (E, potentials.row[here].unsqueeze(2), z)
        blocks = list(zip(*(x.split(rows, dim=1) for x in tensors), strict=True))
        passes = chain([exponentials(blocks, column_max, temperature)], repeat(blocks))
        for _ in balance(passes, column, n_iterations, eps, process_group):
            pass
        if out is not None and not in_place:
            out[here].copy_(E)


def _balanced(
    logits: Tensor, n_iterations: int, eps: float, temperature: float, process_group: ProcessGroup | None, assign: bool
) -> tuple[Tensor | None, Potentials]:
    """Allocate and fill the assignments, if wanted, and the potentials."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    *slices, images, prototypes = logits.shape
    out = torch.empty(logits.shape, dtype=logits.dtype) if assign else None
    potentials = Potentials(*(torch.ones((*slices, n), dtype=dtype) for n in (prototypes, prototypes, images)))
    times = IN_PLACE if assign and logits.dtype == dtype else 1
    chunk = positions_per_chunk(images, prototypes, dtype.itemsize, process_group, times)
    tensors = (logits, out, *potentials)
    if not slices:
        tensors = (x if x is None else x.unsqueeze(0) for x in tensors)
    z, z_out, *z_potentials = tensors
    _balance_positions(z, z_out, Potentials(*z_potentials), n_iterations, eps, temperature, process_group, chunk)
    potentials.column.mul_(math.exp(HEADROOM))
    return out, potentials


OP = "capi_kernels::sinkhorn"
torch.library.define(
    OP,
    "(Tensor logits, int n_iterations, float eps, float temperature, str? process_group, bool assign)"
    " -> (Tensor assignments, Tensor column_max, Tensor column, Tensor row)",
)
ASSIGNMENTS_OP = "capi_kernels::assignments_from_potentials"
torch.library.define(
    ASSIGNMENTS_OP,
    "(Tensor logits, Tensor column_max, Tensor column, Tensor row, Tensor? rows, float temperature, ScalarType dtype)"
    " -> Tensor",
)


def without_gradient(name: str) -> None:
    """The outputs of the op `name` are constants to autograd, whatever requires a gradient."""

    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*((output,) if isinstance(output, Tensor) else output))
        ctx.n_inputs = len(inputs)

    def backward(ctx: FunctionCtx, *_: Tensor | None) -> tuple[None, ...]:
        return (None,) * ctx.n_inputs

    torch.library.register_autograd(name, backward, setup_context=setup_context)


def group_name(process_group: ProcessGroup | None) -> str | None:
    """How an op's schema can name a group."""
    return None if process_group is None else process_group.group_name


def named_group(name: str | None) -> ProcessGroup | None:
    return None if name is None else _resolve_process_group(name)


@torch.library.impl(OP, "CPU")
def _(logits, n_iterations, eps, temperature, process_group, assign):
    out, potentials = _balanced(logits, n_iterations, eps, temperature, named_group(process_group), assign)
    return logits.new_empty(0) if out is None else out, *potentials


@torch.library.impl(OP, "CUDA")
def _(logits, n_iterations, eps, temperature, process_group, assign):
    from capi_kernels.sinkhorn_triton import balanced

    with torch.cuda.device(logits.device):
        out, potentials = balanced(logits, n_iterations, eps, temperature, named_group(process_group), assign)
    return logits.new_empty(0) if out is None else out, *potentials


@torch.library.register_fake(OP)
def _(logits, n_iterations, eps, temperature, process_group, assign):
    *slices, images, prototypes = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    potentials = (logits.new_empty((*slices, n), dtype=dtype) for n in (prototypes, prototypes, images))
    return logits.new_empty(logits.shape if assign else 0), *potentials


def chosen_rows(logits: Tensor, potentials: Potentials, rows: Tensor) -> tuple[Tensor, Potentials]:
    """Logits, column_max and column [selected, prototypes] and row [selected, 1] of the rows chosen."""
    column_max, column, row = potentials
    image, position = rows // len(row), rows % len(row)
    logits = logits[position, image] if logits.ndim == 3 else logits
    return logits, Potentials(column_max[position], column[position], row[position, image].unsqueeze(1))


def assignments(logits: Tensor, potentials: Potentials, temperature: float) -> Tensor:
    """Those of logits [..., images, prototypes] with potentials of as many axes, in a new contiguous tensor."""
    column_max, column, row = potentials
    E = torch.empty(logits.shape, dtype=torch.promote_types(logits.dtype, column_max.dtype))
    torch.sub(logits, column_max, out=E)
    _exponential_(E, temperature)
    return E.mul_(column * math.exp(-HEADROOM)).mul_(row)


@torch.library.impl(ASSIGNMENTS_OP, "CPU")
def _(logits, column_max, column, row, rows, temperature, dtype):
    if rows is None:
        potentials = Potentials(column_max.unsqueeze(-2), column.unsqueeze(-2), row.unsqueeze(-1))
    else:
        logits, potentials = chosen_rows(logits, Potentials(column_max, column, row), rows)
    return assignments(logits, potentials, temperature).to(dtype)


@torch.library.impl(ASSIGNMENTS_OP, "CUDA")
def _(logits, column_max, column, row, rows, temperature, dtype):
    from capi_kernels.sinkhorn_triton import assignments

    with torch.cuda.device(logits.device):
        return assignments(logits, Potentials(column_max, column, row), rows, temperature, dtype)


@torch.library.register_fake(ASSIGNMENTS_OP)
def _(logits, column_max, column, row, rows, temperature, dtype):
    return logits.new_empty(logits.shape if rows is None else (len(rows), logits.shape[-1]), dtype=dtype)


for name in (OP, ASSIGNMENTS_OP):
    register_autocast(name)
    without_gradient(name)


def _check(logits: Tensor, n_iterations: int, eps: float, temperature: float) -> None:
    check_tensor("logits", logits, "... images prototypes")
    check_not_empty("logits", images=logits.shape[-2], prototypes=logits.shape[-1])
    check_sinkhorn_options(n_iterations, eps)
    check_positive(temperature=temperature)


@torch.no_grad()
def sinkhorn_positionwise(
    logits: Tensor,
    n_iterations: int = 3,
    eps: float = 1e-8,
    *,
    temperature: float = 1.0,
    process_group: ProcessGroup | str | None = "world",
) -> Float[Tensor, "*slices images prototypes"]:
    """Balanced soft assignment of images to prototypes, at each position apart from the others (arXiv 2502.08769).

    M = exp(logits / temperature - max over images + 50), then `n_iterations` times M <- M / (column sums + eps) and
    M <- M / (row sums + eps). A drop-in for the official `sinkhorn_knopp` that leaves its input as it is and computes
    in float32 (float64 for float64) whatever the dtype. No gradient: assignments are targets. On a CPU it takes, beyond
    the output, the potentials and at most one position of float32 (8 MB of smaller ones).

    Args:
        logits: [..., images, prototypes], any floating dtype and strides. NaN, +inf, or a prototype at -inf for every
            image make their position NaN, as in the official code; a single -inf gets no assignment.
        eps: added to every sum.
        temperature: divides the logits.
        process_group: images are spread over it: maxima and column sums are all-reduced. "world" is the default group
            where torch.distributed is initialised; None stays in this process.

    Returns:
        Assignments [..., images, prototypes] in the dtype of the logits; every row sums to 1.

    Raises:
        TypeError: logits that are not floating point, a process_group that is none, or float64 on a GPU.
        ValueError: fewer than two axes, no image or prototype, n_iterations < 1, a negative or non-finite eps, a
            temperature that is not positive and finite, on a GPU more than 1 048 576 prototypes.
    """
    _check(logits, n_iterations, eps, temperature)
    process_group = group_name(resolve_group(process_group))
    return torch.ops.capi_kernels.sinkhorn(logits, n_iterations, eps, temperature, process_group, True)[0]


@torch.no_grad()
def sinkhorn_potentials(
    logits: Tensor,
    n_iterations: int = 3,
    eps: float = 1e-8,
    *,
    temperature: float = 1.0,
    process_group: ProcessGroup | str | None = "world",
) -> Potentials:
    """What `sinkhorn_positionwise` multiplies: exp((logits - column_max) / temperature) * column * row.

    Arguments and errors are those of `sinkhorn_positionwise`.

    Returns:
        Potentials(column_max [..., prototypes], column [..., prototypes], row [..., images]) in float32 (float64 for
        float64). Only the product column * row is defined: a factor may move from one to the other.
    """
    _check(logits, n_iterations, eps, temperature)
    process_group = group_name(resolve_group(process_group))
    _, *potentials = torch.ops.capi_kernels.sinkhorn(logits, n_iterations, eps, temperature, process_group, False)
    return Potentials(*potentials)


@torch.no_grad()
def assignments_from_potentials(
    logits: Tensor, potentials: Potentials, rows: Tensor | None = None, *, temperature: float = 1.0
) -> Float[Tensor, "*rows prototypes"]:
    """Assignments exp((logits - column_max) / temperature) * column * row, of all rows or of chosen ones.

    Args:
        logits: [..., images, prototypes], any floating dtype and strides; with `rows` [positions, images, prototypes],
            or [selected, prototypes], those of the chosen rows alone, in their order.
        potentials: as from `sinkhorn_potentials` or `clustering_head`: column_max and column [..., prototypes], row
            [..., images]; with `rows` [positions, prototypes] and [positions, images].
        rows: int32 or int64 [selected], image * positions + position of the rows wanted, in any order, with repeats;
            None takes all.
        temperature: the one of the potentials.

    Returns:
        Assignments [..., images, prototypes], with `rows` [selected, prototypes], in the dtype of the logits, without
        gradient.

    Raises:
        TypeError: logits that are not floating point, rows that are not int32 or int64.
        ValueError: no prototype, logits or potentials of another shape or device, rows out of range (looked at on a
            CPU, uncompiled), a temperature that is not positive and finite.
    """
    check_tensor("logits", logits, "... images prototypes")
    check_not_empty("logits", prototypes=logits.shape[-1])
    check_positive(temperature=temperature)
    *slices, images, prototypes = logits.shape
    if rows is None:
        for name, x, last in zip(Potentials._fields, potentials, (prototypes, prototypes, images), strict=True):
            check_device(name, x, ("logits", logits))
            if tuple(x.shape) != (*slices, last):
                raise ValueError(f"{name} must have the shape {(*slices, last)}, got {tuple(x.shape)}")
    else:
        check_chosen("rows", rows, potentials, prototypes, ("logits", logits))
        check_chosen_logits("logits", logits, potentials.row, rows, prototypes)
    return torch.ops.capi_kernels.assignments_from_potentials(logits, *potentials, rows, temperature, logits.dtype)
