"""The clustering head in Triton: matrix products by cuBLAS, Sinkhorn's passes, and one pass over the rows for the rest.

    a <- a / (row sums of M + eps), t = M a        the last update of the rows, and the targets
    loss_i = sum(t) log sum exp(z) - sum(t z)      z = (logits - their maximum) / temperature
    -dz = t - softmax(z) sum(t)                    written over the logits; its scale is left to d(weight) in float32

Positions are streamed, so that of the logits [positions, images, prototypes] only a chunk exists. Never written: the
assignments, but for chosen rows, or the softmax.
"""

from collections.abc import Iterator
from itertools import product
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import ProcessGroup

from capi_kernels._capability import TARGETS, capability
from capi_kernels.clustering import StreamedLinear
from capi_kernels.reference import Potentials
from capi_kernels.sinkhorn import largest
from capi_kernels.sinkhorn_triton import (
    ROW_LIMIT,
    TYPES,
    balance,
    balance_rows,
    check_supported,
    compile_case,
    load_row,
    log2_scale,
    new_potentials,
    row_exponentials,
    rows_config,
    updated,
)

LOGITS_BYTES = 1 << 30  # Enough positions at a time for full matrix products, few enough to matter little.


def head_rows_config(prototypes: int, itemsize: int, capability: int) -> dict[str, int | bool]:
    """The next row is loaded ahead where it fits in the registers."""
    config = rows_config(prototypes)
    if config["EVEN"] and itemsize == 2:
        return {"ROWS": 8, "PREFETCH": True, **config}
    # 12.x would spill with the 64 registers a thread that 32 warps leave.
    warps = config["num_warps"] if capability >= 120 else min(32, 2 * config["num_warps"])
    return {"ROWS": 8, "PREFETCH": False, **config, "num_warps": warps}


@triton.jit
@no_type_check
def soft_cross_entropy(logits, targets, log2_scale, temperature, mask):
    """sum(t) log sum exp(z) - sum(t z) with z = (logits - maximum) / temperature, and minus its gradient in z."""
    logits = logits.to(tl.float32)
    difference = logits - tl.max(logits, 0)
    exp = tl.exp2(difference * log2_scale)
    normaliser = tl.sum(exp, 0)
    total = tl.sum(targets, 0)
    matched = tl.sum(targets * tl.where(mask, difference, 0.0), 0) / temperature
    return total * tl.log(normaliser) - matched, targets - exp * (total / normaliser)


@triton.jit
@no_type_check
def head_rows_kernel(
    logits_ptr,
    column_max_ptr,
    column_ptr,
    row_ptr,
    loss_ptr,
    targets_ptr,
    chosen_ptr,
    chosen_start_ptr,
    rows,
    images,
    prototypes,
    target_log2_scale,
    prediction_log2_scale,
    prediction_temperature,
    eps,
    limit,
    ROWS: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_PROTOTYPES: tl.constexpr,
):
    """One program per ROWS rows [position, image]: potentials, losses, -d(logits), and targets where chosen."""
    offs = tl.arange(0, BLOCK_PROTOTYPES)
    mask = (offs < prototypes) | EVEN
    first = tl.program_id(0) * ROWS
    last = min(first + ROWS, rows)
    if PREFETCH:
        next_ptr = logits_ptr + tl.cast(first, tl.int64) * prototypes
        next_logits = load_row(next_ptr, prototypes, 1, EVEN, BLOCK_PROTOTYPES)
    for index in range(first, last):
        row_logits_ptr = logits_ptr + tl.cast(index, tl.int64) * prototypes
        if PREFETCH:
            logits = next_logits
            # In flight while this row is computed; the last one, for want of a next, once more, before it is written.
            next_ptr = logits_ptr + tl.cast(min(index + 1, last - 1), tl.int64) * prototypes
            next_logits = load_row(next_ptr, prototypes, 1, EVEN, BLOCK_PROTOTYPES)
        else:
            logits = load_row(row_logits_ptr, prototypes, 1, EVEN, BLOCK_PROTOTYPES)
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
        targets = M * row
        loss, minus_dlogits = soft_cross_entropy(logits, targets, prediction_log2_scale, prediction_temperature, mask)
        tl.store(row_ptr + index, row)
        tl.store(loss_ptr + index, loss)
        tl.store(row_logits_ptr + offs, minus_dlogits.to(logits_ptr.dtype.element_ty), mask=mask)
        if targets_ptr is not None:
            # A row may be chosen several times.
            for i in range(tl.load(chosen_start_ptr + index), tl.load(chosen_start_ptr + index + 1)):
                chosen = tl.load(chosen_ptr + i)
                tl.store(targets_ptr + chosen * prototypes + offs, targets, mask=mask)


def head_rows(
    logits: Tensor,
    potentials: Potentials,
    loss: Tensor,
    targets: Tensor | None,
    chosen: Tensor | None,
    chosen_start: Tensor | None,
    target_temperature: float,
    prediction_temperature: float,
    eps: float,
) -> None:
    """Update the rows, fill `loss` [rows], write -d(logits) over contiguous logits [positions, images, prototypes].

    Row r = position * images + image goes to the rows `chosen[chosen_start[r] : chosen_start[r + 1]]` of `targets`.
    """
    positions, images, prototypes = logits.shape
    rows = positions * images
    assert logits.is_contiguous()
    config = head_rows_config(prototypes, logits.itemsize, capability(logits.device))
    head_rows_kernel[(triton.cdiv(rows, config["ROWS"]),)](
        logits,
        *potentials,
        loss,
        targets,
        chosen,
        chosen_start,
        rows,
        images,
        prototypes,
        log2_scale(target_temperature),
        log2_scale(prediction_temperature),
        prediction_temperature,
        eps,
        ROW_LIMIT,
        **config,
    )


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
    rows: Tensor | None,
    target_temperature: float,
    prediction_temperature: float,
    n_iterations: int,
    eps: float,
    positionwise: bool,
    position_chunk: int | None,
    process_group: ProcessGroup | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Potentials, Tensor, Tensor]:
    """The loss, the targets of `rows`, the potentials, and the gradients of the loss in weight and bias, in float32."""
    positions, images, dim = features.shape
    prototypes, tokens, device = len(weight), positions * images, features.device
    check_supported("features", dtype, prototypes)
    chunk = position_chunk or default_position_chunk(features, prototypes, dtype, process_group)
    targets = chosen = chosen_start = None
    if rows is not None:
        # rows count image by image, the stream position by position.
        keys, chosen = (rows % positions * images + rows // positions).sort(stable=True)
        chosen_start = torch.searchsorted(keys, torch.arange(tokens + 1, dtype=keys.dtype, device=device))
        targets = torch.empty((len(rows), prototypes), dtype=torch.float32, device=device)
    together = not positionwise and chunk < positions
    if not positionwise and not together:  # Everything fits in a chunk: a single position of all tokens.
        features, positions, images = features.reshape(1, tokens, dim), 1, tokens
    linear = StreamedLinear(features, weight, bias, dtype, min(chunk, positions))
    potentials = new_potentials(*((1, tokens) if together else (positions, images)), prototypes, device)
    column_max, column, row = potentials
    if together:
        blocks = _Blocks(linear, row)
        balance_rows([blocks], [(column_max, column)], n_iterations, eps, target_temperature, process_group)

    loss = torch.empty(tokens, dtype=torch.float32, device=device)
    dweight = torch.zeros((prototypes, dim), dtype=torch.float32, device=device)
    starts_of_chunks = range(0, positions, linear.chunk)
    dbias = torch.empty((len(starts_of_chunks), prototypes), dtype=torch.float32, device=device)
    for start, dbias_here in zip(starts_of_chunks, dbias, strict=True):
        logits, features_here = linear(start)
        here = slice(start * images, start * images + logits.shape[0] * images)
        if together:
            logits = logits.flatten(0, 1).unsqueeze(0)
            part = Potentials(column_max, column, row[:, here])
        else:
            part = Potentials(*(x[start : start + linear.chunk] for x in potentials))
            balance(logits, part, n_iterations, eps, target_temperature, process_group, last_row=False)
        starts = None if rows is None else chosen_start[here.start :]
        head_rows(logits, part, loss[here], targets, chosen, starts, target_temperature, prediction_temperature, eps)
        minus_dlogits = logits.flatten(0, 1)
        if dtype == torch.float32:
            dweight.addmm_(minus_dlogits.mT, features_here.flatten(0, 1))
        else:
            dweight += minus_dlogits.mT @ features_here.flatten(0, 1)
        torch.sum(minus_dlogits, 0, dtype=torch.float32, out=dbias_here)
    factor = -1 / (prediction_temperature * tokens)
    if not positionwise:
        potentials = Potentials(*(x[0] for x in potentials))
    return loss.mean(), targets, potentials, dweight.mul_(factor), dbias.sum(0).mul_(factor)


def _compile_cases() -> list[tuple]:
    types = TYPES | {f"{name}_ptr": "*fp32" for name in ("loss", "targets")}
    types |= {"chosen_ptr": "*i64", "chosen_start_ptr": "*i64", "prediction_temperature": "fp32"}
    types |= {"rows": "i32", "target_log2_scale": "fp32", "prediction_log2_scale": "fp32"}
    cases = []
    for dtype, prototypes in product(("bf16", "fp16", "fp32"), (16384, 16000, 4096, 1000)):
        configs = {target: head_rows_config(prototypes, 4 if dtype == "fp32" else 2, target) for target in TARGETS}
        given = f"{dtype}, {prototypes} prototypes", head_rows_kernel, types | {"logits_ptr": f"*{dtype}"}
        distinct = (configs[90], configs[120]) if configs[90] != configs[120] else (configs[90],)
        cases += [compile_case(*given, x, tuple(y for y in configs if configs[y] == x)) for x in distinct]
    return cases


COMPILE_CASES = _compile_cases()
