"""The student's loss in Triton: one pass over the rows reads logits and targets and writes the gradient.

    loss_i = sum(t) log sum exp(z) - sum(t z), z = (logits - their maximum) / temperature
    -dz = t - softmax(z) sum(t)

Never written: the softmax, or targets that are made of the teacher's logits and their potentials.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from capi_kernels.clustering_triton import minus_gradient, soft_cross_entropy
from capi_kernels.reference import Potentials
from capi_kernels.sinkhorn_triton import (
    TYPES,
    check_supported,
    compile_case,
    load_row,
    log2_scale,
    readable,
    row_exponentials,
    row_strides,
    rows_config,
)


def student_rows_config(prototypes: int, itemsize: int, given: bool) -> dict[str, int | bool]:
    """Half the warps for 16384 half precision logits whose targets are given: 64 elements a thread still fit."""
    config = rows_config(prototypes)
    return config | {"num_warps": 8} if given and itemsize == 2 and config["num_warps"] == 16 else config


@triton.jit
@no_type_check
def student_rows_kernel(
    logits_ptr,
    targets_ptr,
    column_max_ptr,
    column_ptr,
    row_ptr,
    rows_ptr,
    loss_ptr,
    minus_dz_ptr,
    positions,
    images,
    prototypes,
    logits_stride_row,
    logits_stride_prototype,
    targets_stride_position,
    targets_stride_image,
    targets_stride_prototype,
    column_stride_position,
    target_log2_scale,
    log2_scale,
    temperature,
    GATHER: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_PROTOTYPES: tl.constexpr,
):
    """One program per prediction; with `rows` (image * positions + position) `targets` are the teacher's logits.

    GATHER: those of all rows; otherwise those of the chosen ones, in their order.
    """
    index = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_PROTOTYPES)
    mask = (offs < prototypes) | EVEN
    logits_ptr += index * logits_stride_row
    logits = load_row(logits_ptr, prototypes, logits_stride_prototype, EVEN, BLOCK_PROTOTYPES)
    if rows_ptr is None:
        targets_ptrs = targets_ptr + index * targets_stride_image + offs.to(tl.int64) * targets_stride_prototype
        M = tl.load(targets_ptrs, mask=mask, other=0.0).to(tl.float32)
        row = 1.0
    else:
        chosen = tl.load(rows_ptr + index).to(tl.int64)
        position = chosen % positions
        image = chosen // positions
        if GATHER:
            targets_ptr += position * targets_stride_position + image * targets_stride_image
        else:
            targets_ptr += index * targets_stride_image
        offs_position = position * column_stride_position
        teacher = load_row(targets_ptr, prototypes, targets_stride_prototype, EVEN, BLOCK_PROTOTYPES)
        M = row_exponentials(
            teacher, column_max_ptr, column_ptr, offs_position, prototypes, target_log2_scale, EVEN, BLOCK_PROTOTYPES
        )
        row = tl.load(row_ptr + position * images + image)
    loss, maximum, log2_normaliser, total = soft_cross_entropy(logits, M, row, log2_scale, temperature, mask)
    minus_dz = minus_gradient(logits, M, row, maximum, log2_normaliser, total, log2_scale)
    tl.store(loss_ptr + index, loss)
    tl.store(minus_dz_ptr + index * prototypes + offs, minus_dz.to(minus_dz_ptr.dtype.element_ty), mask=mask)


def student_loss(
    logits: Tensor,
    targets: Tensor,
    potentials: Potentials | None,
    rows: Tensor | None,
    target_temperature: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The mean loss in float32, and minus the gradient of the sum of losses in z, in the dtype of the logits."""
    predicted, prototypes = logits.shape
    check_supported("logits", logits.dtype, prototypes)
    loss = torch.empty((predicted,), dtype=torch.float32, device=logits.device)
    minus_dz = torch.empty((predicted, prototypes), dtype=logits.dtype, device=logits.device)
    positions = images = column_stride = None
    if rows is not None:
        potentials, rows = readable(potentials), rows.contiguous()
        (positions, images), column_stride = potentials.row.shape, potentials.column.stride(0)
    student_rows_kernel[(predicted,)](
        logits,
        targets,
        *(potentials or (None, None, None)),
        rows,
        loss,
        minus_dz,
        positions,
        images,
        prototypes,
        *logits.stride(),
        *row_strides(targets),
        column_stride,
        log2_scale(target_temperature),
        log2_scale(temperature),
        temperature,
        GATHER=targets.ndim == 3,
        **student_rows_config(prototypes, logits.itemsize, rows is None),
    )
    return loss.mean(), minus_dz


def _compile_cases() -> list[tuple]:
    cases = []
    types = TYPES | {"positions": "i32", "target_log2_scale": "fp32", "temperature": "fp32", "loss_ptr": "*fp32"}
    types |= {f"{name}_stride_{axis}": "i32" for name in ("logits", "targets") for axis in ("row", "position", "image")}
    types |= {"logits_stride_prototype": 1, "targets_stride_prototype": 1}
    given = dict.fromkeys(("column_max_ptr", "column_ptr", "row_ptr", "rows_ptr", "positions", "images"))
    given["column_stride_position"] = None
    for dtype in ("bf16", "fp16", "fp32"):
        for prototypes in (16384, 16000, 4096, 1000):
            itemsize, name = 4 if dtype == "fp32" else 2, f"{dtype}, {prototypes} prototypes"
            config = student_rows_config(prototypes, itemsize, given=False)
            config_given = student_rows_config(prototypes, itemsize, given=True)
            types |= {"logits_ptr": f"*{dtype}", "minus_dz_ptr": f"*{dtype}"}
            stored = types | {"targets_ptr": "*fp32", "GATHER": False} | given
            made = types | {"targets_ptr": f"*{dtype}", "rows_ptr": "*i64", "column_stride_position": "i32"}
            cases.append(compile_case(f"{name}, targets given", student_rows_kernel, stored, config_given))
            for gather in (True, False):
                what = f"{name}, targets of potentials{'' if gather else ', own logits'}"
                cases.append(compile_case(what, student_rows_kernel, made | {"GATHER": gather}, config))
    return cases


COMPILE_CASES = _compile_cases()
