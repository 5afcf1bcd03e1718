"""Sinkhorn on a GPU: the columns form where one process has all images and they fit in a block, else the rows form."""

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from capi_kernels._process_groups import in_turn
from capi_kernels.reference import Potentials
from capi_kernels.sinkhorn.assignments_triton import write_assignments
from capi_kernels.sinkhorn.columns_triton import balance_columns
from capi_kernels.sinkhorn.common_triton import check_supported, merged, new_potentials
from capi_kernels.sinkhorn.rows_triton import balance_rows, row_step

MOST_IMAGES_IN_BLOCK = 512
CHUNKS_IN_FLIGHT = 4  # Of the positions: while one is all-reduced the next is computed.


def balance(
    logits: Tensor,
    potentials: Potentials,
    n_iterations: int,
    eps: float,
    temperature: float,
    process_group: ProcessGroup | None,
    last_row: bool,
) -> None:
    """Fill the potentials of [positions, images, prototypes] logits; without `last_row` not the rows' last update."""
    images = logits.shape[1]
    if process_group is None and images <= MOST_IMAGES_IN_BLOCK:
        balance_columns(logits, potentials, n_iterations, eps, temperature, last_row)
        return
    n_chunks = 1 if process_group is None else CHUNKS_IN_FLIGHT
    chunks = (
        balance_rows([(z, row)], column_max, column, n_iterations, eps, temperature, process_group)
        for z, column_max, column, row in zip(*(x.chunk(n_chunks) for x in (logits, *potentials)), strict=True)
    )
    for _ in in_turn(chunks, n_chunks):
        pass
    if last_row:
        row_step(logits, potentials, eps, temperature, column_sums=False)


def balanced(
    logits: Tensor,
    n_iterations: int,
    eps: float,
    temperature: float,
    process_group: ProcessGroup | None,
    assign: bool,
) -> tuple[Tensor | None, Potentials]:
    """The assignments of [..., images, prototypes] logits, if wanted, and their potentials."""
    check_supported("logits", logits.dtype, logits.shape[-1])
    *slices, images, prototypes = logits.shape
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if assign else None
    potentials = new_potentials(math.prod(slices), images, prototypes, logits.device)
    potentials = Potentials(*(x.view(*slices, x.shape[-1]) for x in potentials))
    # Ranks must cut their reductions alike, and only the shapes, not the strides, are the same on all of them.
    one_by_one = process_group is not None
    outs = (out,) if assign else ()
    for z, column_max, column, row, *z_outs in merged(logits, *potentials, *outs, one_by_one=one_by_one):
        z_potentials = Potentials(column_max, column, row)
        balance(z, z_potentials, n_iterations, eps, temperature, process_group, last_row=not assign)
        for z_out in z_outs:
            write_assignments(z, z_potentials, z_out, temperature, eps=eps, update_row=True)
    return out, potentials
