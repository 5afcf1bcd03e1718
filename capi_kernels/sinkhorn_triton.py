"""Position-wise Sinkhorn in Triton: each iteration reads the logits once and writes potentials alone.

    M = E c a, E = exp((logits - column_max) / temperature)
    c <- c / (column sums of M + eps), a <- a / (row sums of M + eps)

Columns form: a program holds all images of a block of prototypes, so column sums are its own; row sums leave in parts,
one per block, which the next kernel adds in a fixed order. Rows form, for images spread over processes or too many for
a block: a program holds whole rows, so row sums are its own; the column sums of the next iteration leave in parts, and
the last row sums fall to the pass that reads the rows anyway. Never written: E or M, but for the assignments.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from itertools import pairwise
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce
from triton import next_power_of_2

from capi_kernels._capability import TARGETS, capability
from capi_kernels.reference import SHIFT, Potentials

MOST_IMAGES_IN_BLOCK = 512
MOST_PROTOTYPES = 1 << 20  # A row is one block, and Triton's blocks end here.
CHUNKS_IN_FLIGHT = 4  # Of the positions: while one is all-reduced the next is computed.
RESCALE_EVERY = 4  # Iterations; each can move a factor of prototypes / images from the rows to the columns.
MOST_ROW_PROGRAMS = 512  # Where a program may take more rows for fewer.
MOST_FOLDED_PARTS = 8  # Whose reading by every program of a position costs less than a kernel that adds them up.
ROW_LIMIT = torch.finfo(torch.float32).max ** 0.8

LOG2_E = math.log2(math.e)
FIRST_COLUMN = tl.constexpr(math.exp(SHIFT))
COMPILER = {"enable_fp_fusion": True}  # Every product here is summed in float32 right away.


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


def first_sums_config(images: int, prototypes: int, itemsize: int) -> dict[str, int | bool]:
    """Twice as many lanes as 8 warps load rows of 64 at once; a thread adds up its own until the end."""
    lanes, block_prototypes = min(128 // itemsize, next_power_of_2(images)), min(64, next_power_of_2(prototypes))
    even = images % lanes == 0 and prototypes % block_prototypes == 0
    config = {"LANES": lanes, "BLOCK_PROTOTYPES": block_prototypes, "EVEN": even}
    return config | {"STAGES": 3 if itemsize == 2 else 2, "num_warps": 8, **COMPILER}


def rows_config(prototypes: int) -> dict[str, int | bool]:
    """A row is one block: up to 32 elements a thread and no spills to 16384 prototypes, which is what CAPI has."""
    block = next_power_of_2(prototypes)
    warps = min(32, max(4, block // 1024))
    return {"BLOCK_PROTOTYPES": block, "EVEN": prototypes == block, "num_warps": warps, **COMPILER}


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


def reduce_config(parts: int, length: int) -> dict[str, int]:
    blocks = {"BLOCK_PARTS": min(64, next_power_of_2(parts)), "BLOCK": min(64, next_power_of_2(length))}
    return {**blocks, "num_warps": 4, **COMPILER}


@triton.jit
@no_type_check
def exponentials(logits, column_max, log2_scale):
    # The difference first: scaled logits would lose what tells them from a large maximum.
    return tl.exp2((logits.to(tl.float32) - column_max) * log2_scale)


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
def load_row(
    logits_ptr, prototypes, stride_prototype, EVEN: tl.constexpr, BLOCK_PROTOTYPES: tl.constexpr
):  # [BLOCK_PROTOTYPES]
    """The logits of one image, -inf beyond the last prototype."""
    offs = tl.arange(0, BLOCK_PROTOTYPES)
    mask = (offs < prototypes) | EVEN
    # Past the first-level cache, which is to keep the column potentials for the next image.
    logits_ptrs = logits_ptr + offs.to(tl.int64) * stride_prototype
    return tl.load(logits_ptrs, mask=mask, other=float("-inf"), cache_modifier=".cg")


@triton.jit
@no_type_check
def row_exponentials(
    logits,
    column_max_ptr,
    column_ptr,
    offs_position,
    prototypes,
    log2_scale,
    EVEN: tl.constexpr,
    BLOCK_PROTOTYPES: tl.constexpr,
):  # [BLOCK_PROTOTYPES]
    """E c of one image, from its logits; the columns of its position start at `offs_position`."""
    offs = tl.arange(0, BLOCK_PROTOTYPES)
    mask = (offs < prototypes) | EVEN
    column_max = tl.load(column_max_ptr + offs_position + offs, mask=mask, other=0.0)
    column = tl.load(column_ptr + offs_position + offs, mask=mask, other=0.0)
    return exponentials(logits, column_max, log2_scale) * column


@triton.jit
@no_type_check
def updated(potential, total, eps, limit):
    # A row without any mass gains 1 / eps each time; inf would turn its zeros to NaN.
    return tl.minimum(potential / (total + eps), limit, propagate_nan=tl.PropagateNan.ALL)


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


@triton.jit
@no_type_check
def reduce_kernel(
    parts_ptr,
    out_ptr,
    parts,
    length,
    eps,
    limit,
    UPDATE: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (position, block): the sums of all parts, or the potentials `out` updated by them."""
    programs = tl.cdiv(length, BLOCK)
    position = (tl.program_id(0) // programs).to(tl.int64)
    offs = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    mask = offs < length
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        offs_part = start + tl.arange(0, BLOCK_PARTS)
        part_ptrs = parts_ptr + (position * parts + offs_part)[:, None] * length + offs[None, :]
        total += tl.sum(tl.load(part_ptrs, mask=(offs_part < parts)[:, None] & mask[None, :], other=0.0), 0)
    out_ptrs = out_ptr + position * length + offs
    if UPDATE:
        total = updated(tl.load(out_ptrs, mask=mask, other=1.0), total, eps, limit)
    tl.store(out_ptrs, total, mask=mask)


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


def check_supported(name: str, dtype: torch.dtype, prototypes: int) -> None:
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"on a GPU {name} must be torch.float16, torch.bfloat16 or torch.float32, got {dtype}")
    if prototypes > MOST_PROTOTYPES:
        raise ValueError(f"on a GPU there must be at most {MOST_PROTOTYPES} prototypes, got {prototypes}")


def log2_scale(temperature: float) -> float:
    return LOG2_E / temperature


def new_potentials(positions: int, images: int, prototypes: int, device: torch.device) -> Potentials:
    """Without values yet."""
    return Potentials(
        *(torch.empty((positions, n), dtype=torch.float32, device=device) for n in (prototypes, prototypes, images))
    )


def _rescale_every_few(column: Tensor, iteration: int) -> Tensor | None:
    """A factor [positions, 1] that the columns hand to the rows before either overflows: only their product matters."""
    if iteration % RESCALE_EVERY < RESCALE_EVERY - 1:
        return None
    scale = column.amax(-1, keepdim=True)
    column.div_(scale)
    return scale


def reduce_parts(parts: Tensor, out: Tensor, eps: float, update: bool) -> None:
    positions, n, length = parts.shape
    config = reduce_config(n, length)
    grid = (positions * triton.cdiv(length, config["BLOCK"]),)
    reduce_kernel[grid](parts, out, n, length, eps, ROW_LIMIT, UPDATE=update, **config)


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
            **columns_config(*shape, iteration == 0, row_sums),
        )
        if row_sums and (not folded or iteration == n_iterations - 1):
            reduce_parts(parts, row, eps, update=True)
        scale = _rescale_every_few(column, iteration)
        if scale is not None:
            row.mul_(scale).clamp_(max=ROW_LIMIT)


def first_column_sums(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Maxima over images and the sums of exp((logits - maximum) / temperature), [positions, prototypes] each."""
    positions, images, prototypes = logits.shape
    column_max, column_sum = (
        torch.empty((positions, prototypes), dtype=torch.float32, device=logits.device) for _ in range(2)
    )
    config = first_sums_config(images, prototypes, logits.itemsize)
    grid = (positions * triton.cdiv(prototypes, config["BLOCK_PROTOTYPES"]),)
    first_column_sums_kernel[grid](
        logits, column_max, column_sum, images, prototypes, *logits.stride(), log2_scale(temperature), **config
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
        **config,
    )
    if not column_sums:
        return None
    sums = torch.empty((positions, prototypes), dtype=torch.float32, device=logits.device)
    reduce_parts(parts, sums, eps, update=False)
    return sums


class _Reduction:
    """An all-reduce under way; nothing without a group."""

    def __init__(self, x: Tensor, op: ReduceOp.RedOpType, process_group: ProcessGroup | None):
        self.x = x
        self.work = None if process_group is None else all_reduce(x, op, process_group, async_op=True)

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.x


def balance_rows(
    chunks: Sequence[Iterable[tuple[Tensor, Tensor]]],
    columns: Sequence[tuple[Tensor, Tensor]],
    n_iterations: int,
    eps: float,
    temperature: float,
    process_group: ProcessGroup | None,
) -> None:
    """Fill potentials, but for the last update of the rows; each pass reads every chunk once, `n_iterations` in all.

    A chunk yields, every time, its logits [positions, images, prototypes] and rows [positions, images], in one block of
    images or several; `columns` are the chunks' column_max and column. While one is all-reduced the next is computed.
    """
    firsts, reductions = [], []
    for blocks, (column_max, column) in zip(chunks, columns, strict=True):
        column.fill_(FIRST_COLUMN.value)
        first = []
        for logits, row in blocks:
            row.fill_(1)
            first.append(first_column_sums(logits, temperature))
        column_max.copy_(reduce(torch.maximum, (block_max for block_max, _ in first)))
        firsts.append(first)
        reductions.append(_Reduction(column_max, ReduceOp.MAX, process_group))
    for chunk, (first, (column_max, column)) in enumerate(zip(firsts, columns, strict=True)):
        reductions[chunk].wait()
        sums = (total * ((block_max - column_max) / temperature).exp_() for block_max, total in first)
        reductions[chunk] = _Reduction(column * reduce(torch.add, sums), ReduceOp.SUM, process_group)
    for iteration in range(n_iterations):
        for chunk, (blocks, (column_max, column)) in enumerate(zip(chunks, columns, strict=True)):
            column.div_(reductions[chunk].wait().add_(eps))
            if iteration == n_iterations - 1:
                continue
            scale = _rescale_every_few(column, iteration)
            sums = []
            for logits, row in blocks:
                if scale is not None:
                    row.mul_(scale).clamp_(max=ROW_LIMIT)
                sums.append(row_step(logits, Potentials(column_max, column, row), eps, temperature))
            reductions[chunk] = _Reduction(reduce(torch.add, sums), ReduceOp.SUM, process_group)


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
    column_max, column, row = (x.chunk(n_chunks) for x in potentials)
    chunks = [[block] for block in zip(logits.chunk(n_chunks), row, strict=True)]
    columns = list(zip(column_max, column, strict=True))
    balance_rows(chunks, columns, n_iterations, eps, temperature, process_group)
    if last_row:
        row_step(logits, potentials, eps, temperature, column_sums=False)


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
        **rows_config(prototypes),
    )


def _merged(logits: Tensor, *others: Tensor, one_by_one: bool = False) -> Iterator[tuple[Tensor, ...]]:
    """Views [positions, ...] of logits [..., images, prototypes] and of contiguous tensors with the same leading axes.

    One of all positions where the strides of the logits let these axes be one; else, without a copy, of each index of
    the first axis the same, and so on. `one_by_one` takes them so whatever the strides.
    """
    tensors = logits, *others
    axes = logits.ndim - 2
    if axes > 1 and (one_by_one or not _is_mergeable(logits)):
        for part in zip(*tensors, strict=True):
            yield from _merged(*part, one_by_one=one_by_one)
    else:
        yield tuple(x.view(math.prod(x.shape[:axes]), *x.shape[axes:]) for x in tensors)


def _is_mergeable(logits: Tensor) -> bool:
    """Whether the axes before [images, prototypes] can be viewed as one."""
    axes = [(size, stride) for size, stride in zip(logits.shape[:-2], logits.stride(), strict=False) if size != 1]
    return logits.numel() == 0 or all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(axes))


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
    for z, column_max, column, row, *z_outs in _merged(logits, *potentials, *outs, one_by_one=one_by_one):
        z_potentials = Potentials(column_max, column, row)
        balance(z, z_potentials, n_iterations, eps, temperature, process_group, last_row=not assign)
        for z_out in z_outs:
            write_assignments(z, z_potentials, z_out, temperature, eps=eps, update_row=True)
    return out, potentials


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
    for z, z_out, *z_potentials in _merged(logits, out, *potentials):
        write_assignments(z, Potentials(*z_potentials), z_out, temperature)
    return out


STRIDE_TYPES = {"logits_stride_position": "i32", "logits_stride_image": "i32", "logits_stride_prototype": 1}
TYPES = {"images": "i32", "prototypes": "i32", "log2_scale": "fp32", "eps": "fp32", "limit": "fp32"}
TYPES |= {"column_max_ptr": "*fp32", "column_ptr": "*fp32", "row_ptr": "*fp32"}


def compile_case(name: str, kernel: Callable, types: dict, config: dict, *targets: tuple[int, ...]) -> tuple:
    """One configuration for benchmarks/compile_report.py: each parameter's type or value, in the kernel's order."""
    given = types | config
    options = {key: value for key, value in config.items() if key not in kernel.arg_names}
    return name, kernel, {parameter: given[parameter] for parameter in kernel.arg_names}, options, *targets


def by_config(configs: dict[int, dict]) -> Iterator[tuple[dict, tuple[int, ...]]]:
    """Each of the configurations once, and the targets that have it."""
    distinct = {tuple(config.items()): config for config in configs.values()}
    for config in distinct.values():
        yield config, tuple(target for target in configs if configs[target] == config)


def _compile_cases() -> list[tuple]:
    """What is launched at the sizes of the paper and at the edges of each form."""
    cases = []
    common = TYPES | STRIDE_TYPES
    for dtype in ("*bf16", "*fp16", "*fp32"):
        types, itemsize = common | {"logits_ptr": dtype}, 4 if dtype == "*fp32" else 2
        shapes = (512, 16384), (500, 16384), (256, 16384), (128, 1000), (64, 4096), (16, 1024), (1, 1)
        for images, prototypes in shapes:
            name = f"{dtype[1:]}, {images} images, {prototypes} prototypes"
            for first, row_sums in ((True, True), (False, True), (False, False)):
                configs = {
                    target: columns_config(images, prototypes, itemsize, target, first, row_sums) for target in TARGETS
                }
                step = types | {"FIRST": first, "ROW_SUMS": row_sums}
                step |= dict.fromkeys(("row_parts_ptr", "last_row_ptr", "last_row_parts_ptr"), "*fp32")
                what = f"{name}, {'first' if first else 'later'}{', row sums' if row_sums else ''}"
                for config, targets in by_config(configs):
                    cases.append(compile_case(what, column_step_kernel, step, config, targets))
        for prototypes in (16384, 16000, 4096, 1000, 1):
            name = f"{dtype[1:]}, {prototypes} prototypes"
            first = types | {"column_sum_ptr": "*fp32"}
            cases.append(
                compile_case(name, first_column_sums_kernel, first, first_sums_config(512, prototypes, itemsize))
            )
            for sums in (True, False):
                step = types | {"column_parts_ptr": "*fp32", "COLUMN_SUMS": sums}
                what = f"{name}{', column sums' if sums else ''}"
                cases.append(compile_case(what, row_step_kernel, step, row_step_config(512, prototypes, itemsize)))
            for rows, gather, update in (
                (None, True, True),
                (None, True, False),
                ("*i64", True, False),
                ("*i64", False, False),
            ):
                out = {"out_ptr": "*fp32" if rows else dtype, "out_stride_position": "i32", "out_stride_image": "i32"}
                out |= {"out_stride_prototype": 1, "positions": "i32", "rows_ptr": rows, "UPDATE_ROW": update}
                out |= {"GATHER": gather, "column_stride_position": "i32"}
                what = f"{name}{', last row sums' if update else ''}{', chosen rows' if rows else ''}"
                what += "" if gather else " given"
                cases.append(compile_case(what, assignments_kernel, types | out, rows_config(prototypes)))
    for update in (True, False):
        types = common | {"parts_ptr": "*fp32", "out_ptr": "*fp32", "parts": "i32", "length": "i32", "UPDATE": update}
        what = "row potentials" if update else "column sums"
        cases.append(compile_case(what, reduce_kernel, types, reduce_config(128, 512)))
    return cases


COMPILE_CASES = _compile_cases()
