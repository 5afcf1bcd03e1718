"""Assignments E c a written from their potentials, of all rows or of chosen ones, a program a row."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from capi_kernels._capability import launch_options
from capi_kernels.reference import Potentials
from capi_kernels.sinkhorn.common_triton import (
    ROW_LIMIT,
    check_supported,
    load_row,
    log2_scale,
    merged,
    row_exponentials,
    rows_config,
    updated,
)


@triton.jit
@no_type_check
def assignments_kernel(
    logits_ptr,
    column_max_ptr,
    column_ptr,
    row_ptr,
    rows_ptr,
    out_ptr,
    positions,
    images,
    prototypes,
    logits_stride_position,
    logits_stride_image,
    logits_stride_prototype,
    column_stride_position,
    out_stride_position,
    out_stride_image,
    out_stride_prototype,
    log2_scale,
    eps,
    limit,
    UPDATE_ROW: tl.constexpr,
    GATHER: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_PROTOTYPES: tl.constexpr,
):
    """One program per row: of all rows, or of those in `rows`, image * positions + position each.

    GATHER: the logits are those of all rows; otherwise those of the chosen ones, in their order.
    """
    index = tl.program_id(0).to(tl.int64)
    if rows_ptr is None:
        position = (tl.program_id(0) // images).to(tl.int64)
        image = (tl.program_id(0) % images).to(tl.int64)
        out_ptr += position * out_stride_position + image * out_stride_image
    else:
        chosen = tl.load(rows_ptr + index).to(tl.int64)
        position = chosen % positions
        image = chosen // positions
        out_ptr += index * out_stride_image
    if GATHER:
        logits_ptr += position * logits_stride_position + image * logits_stride_image
    else:
        logits_ptr += index * logits_stride_image
    logits = load_row(logits_ptr, prototypes, logits_stride_prototype, EVEN, BLOCK_PROTOTYPES)
    offs_position = position * column_stride_position
    M = row_exponentials(
        logits, column_max_ptr, column_ptr, offs_position, prototypes, log2_scale, EVEN, BLOCK_PROTOTYPES
    )
    row = tl.load(row_ptr + position * images + image)
    if UPDATE_ROW:
        row = updated(row, row * tl.sum(M, 0), eps, limit)
        tl.store(row_ptr + position * images + image, row)
    offs = tl.arange(0, BLOCK_PROTOTYPES)
    out = (M * row).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs.to(tl.int64) * out_stride_prototype, out, mask=offs < prototypes)


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of the axes [positions, images, prototypes]; rows without positions lie along the images."""
    return x.stride() if x.ndim == 3 else (0, *x.stride())


def readable(potentials: Potentials) -> Potentials:
    """In float32, contiguous but for columns that all positions share: these stay one, with stride 0."""
    column_max, column, row = (x.float() for x in potentials)
    positions = len(row)
    if column_max.stride(0) == column.stride(0) == 0 and positions > 0:
        column_max, column = (x[:1].contiguous().expand(positions, -1) for x in (column_max, column))
    else:
        column_max, column = column_max.contiguous(), column.contiguous()
    return Potentials(column_max, column, row.contiguous())


def write_assignments(
    logits: Tensor,
    potentials: Potentials,
    out: Tensor,
    temperature: float,
    *,
    rows: Tensor | None = None,
    eps: float = 0.0,
    update_row: bool = False,
) -> None:
    """Write assignments of all rows to `out` [positions, images, prototypes], after the rows' last update if it is due.

    With `rows` (image * positions + position), of these alone, to `out` [selected, prototypes]; the logits then are
    those of all rows or [selected, prototypes] too.
    """
    (positions, images), prototypes = potentials.row.shape, logits.shape[-1]
    assert rows is None or not update_row, "a row chosen twice would be updated twice"
    assignments_kernel[(out.numel() // prototypes,)](
        logits,
        *potentials,
        rows,
        out,
        positions,
        images,
        prototypes,
        *row_strides(logits),
        potentials.column.stride(0),
        *row_strides(out),
        log2_scale(temperature),
        eps,
        ROW_LIMIT,
        UPDATE_ROW=update_row,
        GATHER=logits.ndim == 3,
        **launch_options(rows_config(prototypes)),
    )


def assignments(
    logits: Tensor, potentials: Potentials, rows: Tensor | None, temperature: float, dtype: torch.dtype
) -> Tensor:
    """Those of all rows of logits [..., images, prototypes], or of chosen ones, given with all or by themselves."""
    check_supported("logits", logits.dtype, logits.shape[-1])
    if rows is not None:
        out = torch.empty((len(rows), logits.shape[-1]), dtype=dtype, device=logits.device)
        write_assignments(logits, readable(potentials), out, temperature, rows=rows.contiguous())
        return out
    out = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    potentials = (x.float().contiguous() for x in potentials)
    for z, z_out, *z_potentials in merged(logits, out, *potentials):
        write_assignments(z, Potentials(*z_potentials), z_out, temperature)
    return out
