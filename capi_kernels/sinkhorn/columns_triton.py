"""The columns form of Sinkhorn, for images that fit in a block: an iteration reads the logits once.

    c <- c / (column sums of M + eps), a <- a / (row sums of M + eps), M = E c a

A program holds all images of a block of prototypes, so column sums are its own; row sums leave in parts, one per block,
which the next kernel adds in a fixed order. Never written: E or M.
"""

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from capi_kernels._capability import capability, launch_options
from capi_kernels.reference import SHIFT, Potentials
from capi_kernels.sinkhorn.common_triton import (
    COMPILER,
    ROW_LIMIT,
    exponentials,
    log2_scale,
    reduce_parts,
    rescale_every_few,
    updated,
)

MOST_FOLDED_PARTS = 8  # Whose reading by every program of a position costs less than a kernel that adds them up.
FIRST_COLUMN = tl.constexpr(math.exp(SHIFT))


def columns_config(
    images: int, prototypes: int, itemsize: int, capability: int, first: bool = False, row_sums: bool = True
) -> dict[str, int | bool]:
    """64 elements a thread of 16-bit logits, 32 of 32-bit ones; a multiprocessor holds 16 warps.

    Column sums cross warps / images times the block in shared memory: few images take few warps, at most 128 prototypes
    wide. Only images by the hundreds take more than 16 KiB a block, so that what is read at once stays 64 bytes wide.
    """
    block_images = next_power_of_2(images)
    block_prototypes = min(next_power_of_2(prototypes), max(32, min(128, 16384 // (block_images * itemsize))))
    large = block_images * block_prototypes >= 16384
    # More tiles spare parts of the row sums, fewer the wait for the last program.
    tiles = min(4 if large else 8, triton.cdiv(prototypes, block_prototypes))
    even = images == block_images and prototypes % (tiles * block_prototypes) == 0
    warps = max(1, block_images * block_prototypes * itemsize // 4096)
    config = {"BLOCK_IMAGES": block_images, "BLOCK_PROTOTYPES": block_prototypes, "TILES": tiles, "EVEN": even}
    # Few parts are added up by every program of the next kernel, without one in between.
    parts = triton.cdiv(prototypes, tiles * block_prototypes)
    config["PARTS"] = parts if parts <= MOST_FOLDED_PARTS else 0
    # Two tiles ahead where the programs still fit in the shared memory of a multiprocessor, three in the largest.
    roomy = itemsize == 2 and capability // 10 != 12 and capability not in (86, 89)
    middle = large and even and row_sums and not first and capability >= 90
    config |= {"STAGES": (4 if middle else 3) if roomy else 2, "num_warps": warps, **COMPILER}
    # What keeps the assembler from spilling, which it does of its own accord at times.
    tempted = (even and warps == 8) or (itemsize == 4 and warps <= 4 and capability >= 100)
    return config | {"maxnreg": 128 if capability < 100 else 160} if tempted else config


@triton.jit
@no_type_check
def column_step_kernel(
    logits_ptr,
    column_max_ptr,
    column_ptr,
    row_ptr,
    last_row_ptr,
    last_row_parts_ptr,
    row_parts_ptr,
    images,
    prototypes,
    logits_stride_position,
    logits_stride_image,
    logits_stride_prototype,
    log2_scale,
    eps,
    limit,
    FIRST: tl.constexpr,
    ROW_SUMS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_IMAGES: tl.constexpr,
    BLOCK_PROTOTYPES: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per (position, TILES blocks of prototypes): their potentials, and what they add to the row sums.

    With PARTS, the last iteration's row sums are still in parts: each program updates its position's rows, one writes
    them. With FIRST, all potentials are those before the first iteration.
    """
    programs = tl.cdiv(prototypes, BLOCK_PROTOTYPES * TILES)
    position = (tl.program_id(0) // programs).to(tl.int64)
    part = tl.program_id(0) % programs
    offs_image = tl.arange(0, BLOCK_IMAGES)
    mask_image = (offs_image < images) | EVEN
    offs_row = position * images + offs_image
    if FIRST:
        row = tl.where(mask_image, 1.0, 0.0)
        tl.store(row_ptr + offs_row, row, mask=mask_image & (part == 0))
    elif PARTS:
        row = tl.load(last_row_ptr + offs_row, mask=mask_image, other=0.0)
        total = tl.zeros([BLOCK_IMAGES], tl.float32)
        for i in tl.static_range(PARTS):
            offs_last = (position * PARTS + i) * images + offs_image
            total += tl.load(last_row_parts_ptr + offs_last, mask=mask_image, other=1.0)
        row = updated(row, total, eps, limit)
        tl.store(row_ptr + offs_row, row, mask=mask_image & (part == 0))
    else:
        row = tl.load(row_ptr + offs_row, mask=mask_image, other=0.0)
    row_sum = tl.zeros([BLOCK_IMAGES], tl.float32)
    logits_ptrs = (
        logits_ptr + position * logits_stride_position + offs_image.to(tl.int64)[:, None] * logits_stride_image
    )
    for tile in tl.range(TILES, num_stages=STAGES):
        offs_prototype = (part * TILES + tile) * BLOCK_PROTOTYPES + tl.arange(0, BLOCK_PROTOTYPES)
        mask_prototype = (offs_prototype < prototypes) | EVEN
        logits = tl.load(
            logits_ptrs + offs_prototype.to(tl.int64)[None, :] * logits_stride_prototype,
            mask=mask_image[:, None] & mask_prototype[None, :],
            other=float("-inf"),
        )  # [BLOCK_IMAGES, BLOCK_PROTOTYPES]
        offs_column = position * prototypes + offs_prototype
        if FIRST:
            column_max = tl.max(logits, 0).to(tl.float32)
            tl.store(column_max_ptr + offs_column, column_max, mask=mask_prototype)
            column = tl.full([BLOCK_PROTOTYPES], FIRST_COLUMN, tl.float32)
        else:
            column_max = tl.load(column_max_ptr + offs_column, mask=mask_prototype, other=0.0)
            column = tl.load(column_ptr + offs_column, mask=mask_prototype, other=0.0)
        # Padding only: a prototype at -inf for every image must make its position NaN, as in the reference.
        column_max = tl.where(mask_prototype, column_max, 0.0)
        E = exponentials(logits, column_max[None, :], log2_scale)
        column = column / (column * tl.sum(E * row[:, None], 0) + eps)
        tl.store(column_ptr + offs_column, column, mask=mask_prototype)
        if ROW_SUMS:
            row_sum += tl.sum(E * tl.where(mask_prototype, column, 0.0)[None, :], 1)
    if ROW_SUMS:
        offs_part = tl.program_id(0).to(tl.int64) * images + offs_image
        tl.store(row_parts_ptr + offs_part, row * row_sum, mask=mask_image)


def balance_columns(
    logits: Tensor, potentials: Potentials, n_iterations: int, eps: float, temperature: float, last_row: bool
) -> None:
    """`balance` where the images of a position fit in a block."""
    positions, images, prototypes = logits.shape
    column_max, column, row = potentials
    shape = images, prototypes, logits.itemsize, capability(logits.device)
    config = columns_config(*shape)
    n_programs = triton.cdiv(prototypes, config["BLOCK_PROTOTYPES"] * config["TILES"])
    grid = (positions * n_programs,)
    folded = config["PARTS"] > 0
    # Programs read the last rows and parts while others write the next, which therefore lie elsewhere.
    n_parts = min(n_iterations, 2) if folded else 1
    row_parts = torch.empty((n_parts, positions, n_programs, images), dtype=torch.float32, device=logits.device)
    rows = (torch.empty_like(row), row) if folded and n_iterations > 1 else (row,)
    for iteration in range(n_iterations):
        row_sums = last_row or iteration < n_iterations - 1
        # Counted from the end, so that the last are those of the potentials.
        row, previous_row = (rows[(iteration - n_iterations - i) % len(rows)] for i in range(2))
        parts, previous_parts = (row_parts[(iteration - i) % n_parts] for i in range(2))
        column_step_kernel[grid](
            logits,
            column_max,
            column,
            row,
            previous_row,
            previous_parts,
            parts,
            images,
            prototypes,
            *logits.stride(),
            log2_scale(temperature),
            eps,
            ROW_LIMIT,
            FIRST=iteration == 0,
            ROW_SUMS=row_sums,
            **launch_options(columns_config(*shape, iteration == 0, row_sums)),
        )
        if row_sums and (not folded or iteration == n_iterations - 1):
            reduce_parts(parts, row, eps, update=True)
        scale = rescale_every_few(column, iteration)
        if scale is not None:
            row.mul_(scale).clamp_(max=ROW_LIMIT)
