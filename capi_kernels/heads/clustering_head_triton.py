"""The clustering head in Triton: matrix products by cuBLAS, Sinkhorn's passes, and one pass over the rows for the rest.

    a <- a / (row sums of M + eps), t = M a        the last update of the rows, and the targets
    loss_i = sum(t) log sum exp(z) - sum(t z)      z = (logits - their maximum) / temperature
    -dz = t - softmax(z) sum(t)                    written over the logits; its scale is left to d(weight) in float32

Positions are streamed, so that of the logits [positions, images, prototypes] only a chunk exists. Never written: the
assignments or the softmax.
"""

from collections.abc import Iterator
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import ProcessGroup

from capi_kernels._capability import capability, launch_options
from capi_kernels._process_groups import in_turn, largest
from capi_kernels.heads.cross_entropy_triton import minus_gradient, soft_cross_entropy
from capi_kernels.heads.linear import StreamedLinear
from capi_kernels.reference import Potentials
from capi_kernels.sinkhorn.balance_triton import balance
from capi_kernels.sinkhorn.common_triton import (
    ROW_LIMIT,
    check_supported,
    load_row,
    log2_scale,
    new_potentials,
    reduce_parts,
    row_exponentials,
    rows_config,
    updated,
)
from capi_kernels.sinkhorn.rows_triton import balance_rows

LOGITS_BYTES = 1 << 30  # Enough positions at a time for full matrix products, few enough to matter little.


def head_rows_config(prototypes: int, dtype: torch.dtype, capability: int) -> dict[str, int | bool]:
    """The next row is loaded ahead, and the bias's gradient added up, where the registers have room for it."""
    config = rows_config(prototypes)
    ahead = config["EVEN"] and dtype.itemsize == 2
    small = config["num_warps"] < 16  # Fewer than fill the register file.
    bias = small or (ahead and capability == 90)
    late = bias or capability >= 120
    if bias and not small and dtype == torch.float16:
        ahead = False  # Whose conversions take the registers that the next row would.
    config |= {"ROWS": 32, "AHEAD": (3 if late else 2) if ahead else 0, "BIAS": bias}
    if config["num_warps"] == 4:
        config["maxnreg"] = 255  # Some assemblers would set a lower limit of their own, and spill.
    # 12.x would spill with the 64 registers a thread that 32 warps leave.
    if not ahead and not bias and capability < 120:
        config["num_warps"] = 32
    return config


@triton.jit
@no_type_check
def load_next(logits_ptr, index, last, prototypes, EVEN: tl.constexpr, BLOCK_PROTOTYPES: tl.constexpr):
    """The row after `index`; for want of one, the last once more, which must not have been written yet."""
    next_ptr = logits_ptr + tl.cast(min(index + 1, last - 1), tl.int64) * prototypes
    return load_row(next_ptr, prototypes, 1, EVEN, BLOCK_PROTOTYPES)


@triton.jit
@no_type_check
def head_rows_kernel(
    logits_ptr,
    column_max_ptr,
    column_ptr,
    row_ptr,
    loss_ptr,
    bias_parts_ptr,
    rows,
    images,
    prototypes,
    target_log2_scale,
    prediction_log2_scale,
    prediction_temperature,
    eps,
    limit,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_PROTOTYPES: tl.constexpr,
):
    """One program per ROWS rows [position, image]: potentials, losses, -d(logits), with BIAS the sum of the latter.

    AHEAD: the next row is in flight from the start of this one (1), or once its potential (2) or loss (3) is known.
    """
    offs = tl.arange(0, BLOCK_PROTOTYPES)
    mask = (offs < prototypes) | EVEN
    first = tl.program_id(0) * ROWS
    last = min(first + ROWS, rows)
    bias_sum = tl.zeros([BLOCK_PROTOTYPES], tl.float32)
    if AHEAD:
        next_ptr = logits_ptr + tl.cast(first, tl.int64) * prototypes
        next_logits = load_row(next_ptr, prototypes, 1, EVEN, BLOCK_PROTOTYPES)
    for index in range(first, last):
        row_logits_ptr = logits_ptr + tl.cast(index, tl.int64) * prototypes
        logits = next_logits if AHEAD else load_row(row_logits_ptr, prototypes, 1, EVEN, BLOCK_PROTOTYPES)
        if AHEAD == 1:
            next_logits = load_next(logits_ptr, index, last, prototypes, EVEN, BLOCK_PROTOTYPES)
        position = tl.cast(index // images, tl.int64)
        M = row_exponentials(
            logits,
            column_max_ptr,
            column_ptr,
            position * prototypes,
            prototypes,
            target_log2_scale,
            EVEN,
            BLOCK_PROTOTYPES,
        )
        row = tl.load(row_ptr + index)
        row = updated(row, row * tl.sum(M, 0), eps, limit)
        if AHEAD == 2:
            next_logits = load_next(logits_ptr, index, last, prototypes, EVEN, BLOCK_PROTOTYPES)
        loss, maximum, log2_normaliser, total = soft_cross_entropy(
            logits, M, row, prediction_log2_scale, prediction_temperature, mask
        )
        if AHEAD == 3:
            next_logits = load_next(logits_ptr, index, last, prototypes, EVEN, BLOCK_PROTOTYPES)
        minus_dlogits = minus_gradient(logits, M, row, maximum, log2_normaliser, total, prediction_log2_scale)
        minus_dlogits = minus_dlogits.to(logits_ptr.dtype.element_ty)
        tl.store(row_ptr + index, row)
        tl.store(loss_ptr + index, loss)
        tl.store(row_logits_ptr + offs, minus_dlogits, mask=mask)
        if BIAS:  # Of what the weight's gradient is made of; what rounding takes from it would take registers to keep.
            bias_sum += minus_dlogits.to(tl.float32)
    if BIAS:
        offs_part = tl.program_id(0).to(tl.int64) * prototypes + offs
        tl.store(bias_parts_ptr + offs_part, bias_sum, mask=mask)


def head_rows(
    logits: Tensor,
    potentials: Potentials,
    loss: Tensor,
    dbias: Tensor,
    target_temperature: float,
    prediction_temperature: float,
    eps: float,
) -> None:
    """Update the rows, fill `loss` [rows], write -d(logits) over contiguous logits [positions, images, prototypes].

    Its sum over the rows goes to `dbias` [prototypes].
    """
    positions, images, prototypes = logits.shape
    rows = positions * images
    assert logits.is_contiguous()
    config = head_rows_config(prototypes, logits.dtype, capability(logits.device))
    programs = triton.cdiv(rows, config["ROWS"])
    shape = 1, programs if config["BIAS"] else 0, prototypes
    bias_parts = torch.empty(shape, dtype=torch.float32, device=logits.device)
    head_rows_kernel[(programs,)](
        logits,
        *potentials,
        loss,
        bias_parts,
        rows,
        images,
        prototypes,
        log2_scale(target_temperature),
        log2_scale(prediction_temperature),
        prediction_temperature,
        eps,
        ROW_LIMIT,
        **launch_options(config),
    )
    if config["BIAS"]:
        reduce_parts(bias_parts, dbias, eps, update=False)
    else:
        torch.sum(logits.flatten(0, 1), 0, keepdim=True, dtype=torch.float32, out=dbias)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where total is float32 and added to as exactly as the product is summed."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class _Blocks:
    """The logits of all positions, a chunk at a time, and their rows; every pass computes them anew."""

    def __init__(self, linear: StreamedLinear, row: Tensor):
        self.linear, self.row = linear, row

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        positions, images, _ = self.linear.features.shape
        for start in range(0, positions, self.linear.chunk):
            logits, _ = self.linear(start)
            logits = logits.flatten(0, 1).unsqueeze(0)
            yield logits, self.row[:, start * images :][:, : logits.shape[1]]


def logits_bytes(device: torch.device) -> int:
    """What the logits of a chunk may take: a quarter of the free memory, up to LOGITS_BYTES."""
    if device.type != "cuda":
        return LOGITS_BYTES
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(LOGITS_BYTES, (torch.cuda.mem_get_info(device)[0] + cached) // 4)


def default_position_chunk(
    features: Tensor, prototypes: int, dtype: torch.dtype, process_group: ProcessGroup | None
) -> int:
    """How many positions fit, on the rank with most images in the memory of the rank with least: all have to agree."""
    # Asked anew at every call: free memory changes, and a rank that skipped the reduction would leave the others in it.
    values = [features.shape[1], -logits_bytes(features.device)]
    images, minus_bytes = largest(values, process_group, features.device)
    return max(1, -minus_bytes // (images * prototypes * dtype.itemsize))


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
    """The loss, the potentials, and the gradients of the loss in weight and bias, in float32."""
    positions, images, dim = features.shape
    prototypes, tokens, device = len(weight), positions * images, features.device
    per_position = images
    check_supported("features", dtype, prototypes)
    chunk = position_chunk or default_position_chunk(features, prototypes, dtype, process_group)
    together = not positionwise and chunk < positions
    if not positionwise and not together:  # Everything fits in a chunk: a single position of all tokens.
        features, positions, images = features.reshape(1, tokens, dim), 1, tokens
    linear = StreamedLinear(features, weight, bias, dtype, min(chunk, positions))
    potentials = new_potentials(*((1, tokens) if together else (positions, images)), prototypes, device)
    column_max, column, row = potentials
    if together:
        arguments = column_max, column, n_iterations, eps, target_temperature, process_group
        for _ in in_turn([balance_rows(_Blocks(linear, row), *arguments)], 1):
            pass

    loss = torch.empty(tokens, dtype=torch.float32, device=device)
    dweight = torch.zeros((prototypes, dim), dtype=torch.float32, device=device)
    starts = range(0, positions, linear.chunk)
    dbias = torch.empty((len(starts), prototypes), dtype=torch.float32, device=device)
    for i, start in enumerate(starts):
        logits, features_here = linear(start)
        here = slice(start * images, start * images + logits.shape[0] * images)
        if together:
            logits = logits.flatten(0, 1).unsqueeze(0)
            part = Potentials(column_max, column, row[:, here])
        else:
            part = Potentials(*(x[start : start + linear.chunk] for x in potentials))
            balance(logits, part, n_iterations, eps, target_temperature, process_group, last_row=False)
        head_rows(logits, part, loss[here], dbias[i : i + 1], target_temperature, prediction_temperature, eps)
        minus_dlogits = logits.flatten(0, 1)
        if n_scored is not None:  # The others' rows have no part in the gradients; that of the bias is summed anew.
            minus_dlogits.unflatten(0, (-1, per_position))[:, n_scored:] = 0
            torch.sum(minus_dlogits, 0, keepdim=True, dtype=torch.float32, out=dbias[i : i + 1])
        add_product_(dweight, minus_dlogits.mT, features_here.flatten(0, 1))
    loss = loss.view(-1, per_position)[:, :n_scored]
    factor = -1 / (prediction_temperature * loss.numel())
    if not positionwise:
        potentials = Potentials(*(x[0] for x in potentials))
    return loss.mean(), potentials, dweight.mul_(factor), dbias.sum(0).mul_(factor)
