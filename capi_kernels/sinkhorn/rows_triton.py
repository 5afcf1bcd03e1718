"""The rows form of Sinkhorn, for images spread over processes or too many for a block.

An iteration reads the logits once. A program holds whole rows, so row sums are its own; the column sums of the next
iteration leave in parts, and the last row sums fall to the pass that reads the rows anyway. Never written: E or M.
"""

import math
from collections.abc import Iterable, Iterator
from functools import reduce
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp
from triton import next_power_of_2

from capi_kernels._capability import launch_options
from capi_kernels._process_groups import reduced
from capi_kernels.reference import SHIFT, Potentials
from capi_kernels.sinkhorn.common_triton import (
    COMPILER,
    ROW_LIMIT,
    exponentials,
    load_row,
    log2_scale,
    reduce_parts,
    rescale_every_few,
    row_exponentials,
    rows_config,
    updated,
)

MOST_ROW_PROGRAMS = 512  # Where a program may take more rows for fewer.


def first_sums_config(images: int, prototypes: int, itemsize: int) -> dict[str, int | bool]:
    """Twice as many lanes as 8 warps load rows of 64 at once; a thread adds up its own until the end."""
    lanes, block_prototypes = min(128 // itemsize, next_power_of_2(images)), min(64, next_power_of_2(prototypes))
    even = images % lanes == 0 and prototypes % block_prototypes == 0
    config = {"LANES": lanes, "BLOCK_PROTOTYPES": block_prototypes, "EVEN": even}
    return config | {"STAGES": 3 if itemsize == 2 else 2, "num_warps": 8, **COMPILER}


def row_step_config(rows: int, prototypes: int, itemsize: int) -> dict[str, int | bool]:
    """The next row is loaded ahead where it fits in the registers.

    Of `rows` in all a program takes as many as leave four programs to each multiprocessor: the fewer parts the better.
    """
    config = rows_config(prototypes)
    if itemsize == 4 and config["num_warps"] == 16:
        config["num_warps"] = 8
    prefetch = config["EVEN"] and itemsize == 2
    if prefetch and config["num_warps"] == 4:
        config["maxnreg"] = 255  # Some assemblers would set a lower limit of their own, and spill.
    share = rows // MOST_ROW_PROGRAMS
    return {"ROWS": min(256, max(32, 1 << share.bit_length() >> 1)), "PREFETCH": prefetch, **config}


@triton.jit
@no_type_check
def first_column_sums_kernel(
    logits_ptr,
    column_max_ptr,
    column_sum_ptr,
    images,
    prototypes,
    logits_stride_position,
    logits_stride_image,
    logits_stride_prototype,
    log2_scale,
    EVEN: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_PROTOTYPES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per (position, block of prototypes): the maxima over all images and the sums of E, online.

    Every LANES-th image goes to the same lane; the lanes come together at the end.
    """
    programs = tl.cdiv(prototypes, BLOCK_PROTOTYPES)
    position = (tl.program_id(0) // programs).to(tl.int64)
    offs_prototype = tl.program_id(0) % programs * BLOCK_PROTOTYPES + tl.arange(0, BLOCK_PROTOTYPES)
    mask_prototype = (offs_prototype < prototypes) | EVEN
    lane_max = tl.full([LANES, BLOCK_PROTOTYPES], float("-inf"), tl.float32)
    lane_sum = tl.zeros([LANES, BLOCK_PROTOTYPES], tl.float32)
    logits_ptrs = logits_ptr + position * logits_stride_position
    logits_ptrs += offs_prototype.to(tl.int64)[None, :] * logits_stride_prototype
    for start in tl.range(0, images, LANES, num_stages=STAGES):
        offs_image = start + tl.arange(0, LANES)
        logits = tl.load(
            logits_ptrs + offs_image.to(tl.int64)[:, None] * logits_stride_image,
            mask=((offs_image < images) | EVEN)[:, None] & mask_prototype[None, :],
            other=float("-inf"),
        ).to(tl.float32)  # [LANES, BLOCK_PROTOTYPES]
        new_max = tl.maximum(lane_max, logits)
        # Images so far may all be at -inf where later ones, or those of other processes, are not.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        lane_sum *= exponentials(lane_max, base, log2_scale)
        lane_sum += exponentials(logits, base, log2_scale)
        lane_max = new_max
    column_max = tl.max(lane_max, 0)
    base = tl.where(column_max == float("-inf"), 0.0, column_max)
    column_sum = tl.sum(lane_sum * exponentials(lane_max, base[None, :], log2_scale), 0)
    offs_column = position * prototypes + offs_prototype
    tl.store(column_max_ptr + offs_column, column_max, mask=mask_prototype)
    tl.store(column_sum_ptr + offs_column, column_sum, mask=mask_prototype)


@triton.jit
@no_type_check
def row_step_kernel(
    logits_ptr,
    column_max_ptr,
    column_ptr,
    row_ptr,
    column_parts_ptr,
    images,
    prototypes,
    logits_stride_position,
    logits_stride_image,
    logits_stride_prototype,
    log2_scale,
    eps,
    limit,
    COLUMN_SUMS: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_PROTOTYPES: tl.constexpr,
):
    """One program per (position, ROWS images): their potentials, and what they add to the next column sums of M."""
    programs = tl.cdiv(images, ROWS)
    position = (tl.program_id(0) // programs).to(tl.int64)
    first = tl.program_id(0) % programs * ROWS
    last = min(first + ROWS, images)
    logits_ptr += position * logits_stride_position
    row_ptr += position * images
    column_sum = tl.zeros([BLOCK_PROTOTYPES], tl.float32)
    if PREFETCH:
        next_ptr = logits_ptr + tl.cast(first, tl.int64) * logits_stride_image
        next_logits = load_row(next_ptr, prototypes, logits_stride_prototype, EVEN, BLOCK_PROTOTYPES)
    for image in range(first, last):
        if PREFETCH:
            logits = next_logits
            # In flight while this image is computed; the last one, for want of a next, once more.
            next_ptr = logits_ptr + tl.cast(min(image + 1, last - 1), tl.int64) * logits_stride_image
            next_logits = load_row(next_ptr, prototypes, logits_stride_prototype, EVEN, BLOCK_PROTOTYPES)
        else:
            image_ptr = logits_ptr + tl.cast(image, tl.int64) * logits_stride_image
            logits = load_row(image_ptr, prototypes, logits_stride_prototype, EVEN, BLOCK_PROTOTYPES)
        E = row_exponentials(
            logits, column_max_ptr, column_ptr, position * prototypes, prototypes, log2_scale, EVEN, BLOCK_PROTOTYPES
        )
        row = tl.load(row_ptr + image)
        row = updated(row, row * tl.sum(E, 0), eps, limit)
        tl.store(row_ptr + image, row)
        column_sum += row * E
    if COLUMN_SUMS:
        offs = tl.arange(0, BLOCK_PROTOTYPES)
        offs_part = tl.program_id(0).to(tl.int64) * prototypes + offs
        tl.store(column_parts_ptr + offs_part, column_sum, mask=offs < prototypes)


def first_column_sums(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Maxima over images and the sums of exp((logits - maximum) / temperature), [positions, prototypes] each."""
    positions, images, prototypes = logits.shape
    column_max, column_sum = (
        torch.empty((positions, prototypes), dtype=torch.float32, device=logits.device) for _ in range(2)
    )
    config = first_sums_config(images, prototypes, logits.itemsize)
    grid = (positions * triton.cdiv(prototypes, config["BLOCK_PROTOTYPES"]),)
    first_column_sums_kernel[grid](
        logits,
        column_max,
        column_sum,
        images,
        prototypes,
        *logits.stride(),
        log2_scale(temperature),
        **launch_options(config),
    )
    return column_max, column_sum


def row_step(
    logits: Tensor, potentials: Potentials, eps: float, temperature: float, column_sums: bool = True
) -> Tensor | None:
    """Update the rows in place; the column sums of M with them, [positions, prototypes]."""
    positions, images, prototypes = logits.shape
    config = row_step_config(positions * images, prototypes, logits.itemsize)
    n = triton.cdiv(images, config["ROWS"])
    parts = torch.empty((positions, n, prototypes), dtype=torch.float32, device=logits.device) if column_sums else None
    row_step_kernel[(positions * n,)](
        logits,
        *potentials,
        parts,
        images,
        prototypes,
        *logits.stride(),
        log2_scale(temperature),
        eps,
        ROW_LIMIT,
        COLUMN_SUMS=column_sums,
        **launch_options(config),
    )
    if not column_sums:
        return None
    sums = torch.empty((positions, prototypes), dtype=torch.float32, device=logits.device)
    reduce_parts(parts, sums, eps, update=False)
    return sums


def balance_rows(
    blocks: Iterable[tuple[Tensor, Tensor]],
    column_max: Tensor,
    column: Tensor,
    n_iterations: int,
    eps: float,
    temperature: float,
    process_group: ProcessGroup | None,
) -> Iterator[None]:
    """Fill the potentials, but for the last update of the rows, in `n_iterations` passes; yield at every reduction.

    `blocks` gives, in every pass, logits [positions, images, prototypes] and rows [positions, images], in one block of
    images or several.
    """
    column.fill_(math.exp(SHIFT))
    first = []
    for logits, row in blocks:
        row.fill_(1)
        first.append(first_column_sums(logits, temperature))
    column_max.copy_(reduce(torch.maximum, (block_max for block_max, _ in first)))
    yield from reduced(column_max, ReduceOp.MAX, process_group)
    sums = (total * ((block_max - column_max) / temperature).exp_() for block_max, total in first)
    column_sum = column * reduce(torch.add, sums)
    for iteration in range(n_iterations):
        yield from reduced(column_sum, ReduceOp.SUM, process_group)
        column.div_(column_sum.add_(eps))
        if iteration == n_iterations - 1:
            return
        scale = rescale_every_few(column, iteration)
        sums = []
        for logits, row in blocks:
            if scale is not None:
                row.mul_(scale).clamp_(max=ROW_LIMIT)
            sums.append(row_step(logits, Potentials(column_max, column, row), eps, temperature))
        column_sum = reduce(torch.add, sums)
