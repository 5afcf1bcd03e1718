"""What the kernels of Sinkhorn and of the heads share: exponentials, rows of logits, updates, sums of parts."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from capi_kernels.reference import Potentials

MOST_PROTOTYPES = 1 << 20  # A row is one block, and Triton's blocks end here.
RESCALE_EVERY = 4  # Iterations; each can move a factor of prototypes / images from the rows to the columns.
ROW_LIMIT = torch.finfo(torch.float32).max ** 0.8
LOG2_E = math.log2(math.e)
COMPILER = {"enable_fp_fusion": True}  # Every product here is summed in float32 right away.


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


def rows_config(prototypes: int) -> dict[str, int | bool]:
    """A row is one block: up to 32 elements a thread and no spills to 16384 prototypes, which is what CAPI has."""
    block = next_power_of_2(prototypes)
    warps = min(32, max(4, block // 1024))
    return {"BLOCK_PROTOTYPES": block, "EVEN": prototypes == block, "num_warps": warps, **COMPILER}


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
def updated(potential, total, eps, limit):
    # A row without any mass gains 1 / eps each time; inf would turn its zeros to NaN.
    return tl.minimum(potential / (total + eps), limit, propagate_nan=tl.PropagateNan.ALL)


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


def reduce_parts(parts: Tensor, out: Tensor, eps: float, update: bool) -> None:
    positions, n, length = parts.shape
    config = reduce_config(n, length)
    grid = (positions * triton.cdiv(length, config["BLOCK"]),)
    reduce_kernel[grid](parts, out, n, length, eps, ROW_LIMIT, UPDATE=update, **config)


def rescale_every_few(column: Tensor, iteration: int) -> Tensor | None:
    """A factor [positions, 1] that the columns hand to the rows before either overflows: only their product matters."""
    if iteration % RESCALE_EVERY < RESCALE_EVERY - 1:
        return None
    scale = column.amax(-1, keepdim=True)
    column.div_(scale)
    return scale


def merged(logits: Tensor, *others: Tensor, one_by_one: bool = False) -> Iterator[tuple[Tensor, ...]]:
    """Views [positions, ...] of logits [..., images, prototypes] and of contiguous tensors with the same leading axes.

    One of all positions where the strides of the logits let these axes be one; else, without a copy, of each index of
    the first axis the same, and so on. `one_by_one` takes them so whatever the strides.
    """
    tensors = logits, *others
    axes = logits.ndim - 2
    if axes > 1 and (one_by_one or not _is_mergeable(logits)):
        for part in zip(*tensors, strict=True):
            yield from merged(*part, one_by_one=one_by_one)
    else:
        yield tuple(x.view(math.prod(x.shape[:axes]), *x.shape[axes:]) for x in tensors)


def _is_mergeable(logits: Tensor) -> bool:
    """Whether the axes before [images, prototypes] can be viewed as one."""
    axes = [(size, stride) for size, stride in zip(logits.shape[:-2], logits.stride(), strict=False) if size != 1]
    return logits.numel() == 0 or all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(axes))
