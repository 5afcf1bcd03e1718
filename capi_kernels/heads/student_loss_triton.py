"""The student's loss in Triton: one pass over the rows reads logits and targets and writes the gradient.

    loss_i = sum(t) log sum exp(z) - sum(t z), z = (logits - their maximum) / temperature
    dlogits = scale (t - softmax(z) sum(t))

Never written: the softmax.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from capi_kernels._capability import launch_options
from capi_kernels.heads.cross_entropy_triton import LN_2, minus_gradient, soft_cross_entropy
from capi_kernels.sinkhorn.common_triton import check_supported, load_row, log2_scale, rows_config

LEAST_NORMAL = tl.constexpr(torch.finfo(torch.float32).tiny)


def student_rows_config(prototypes: int, itemsize: int) -> dict[str, int | bool]:
    """Half the warps for 16384 half precision logits: 64 elements a thread still fit."""
    config = rows_config(prototypes)
    return config | {"num_warps": 8} if itemsize == 2 and config["num_warps"] == 16 else config


@triton.jit
@no_type_check
def student_rows_kernel(
    logits_ptr,
    targets_ptr,
    loss_ptr,
    gradient_ptr,
    entropy_ptr,
    most_likely_ptr,
    prototypes,
    logits_stride_row,
    logits_stride_prototype,
    targets_stride_row,
    targets_stride_prototype,
    log2_scale,
    temperature,
    scale,
    EVEN: tl.constexpr,
    BLOCK_PROTOTYPES: tl.constexpr,
):
    """One program per prediction. Without `entropy` nothing is said of the targets."""
    index = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_PROTOTYPES)
    mask = (offs < prototypes) | EVEN
    logits_ptr += index * logits_stride_row
    logits = load_row(logits_ptr, prototypes, logits_stride_prototype, EVEN, BLOCK_PROTOTYPES)
    targets_ptrs = targets_ptr + index * targets_stride_row + offs.to(tl.int64) * targets_stride_prototype
    targets = tl.load(targets_ptrs, mask=mask, other=0.0).to(tl.float32)
    if entropy_ptr is not None:
        # Smaller ones have a logarithm of -inf for a GPU, and add nothing.
        bits = targets * tl.log2(tl.where(tl.abs(targets) < LEAST_NORMAL, 1.0, targets))
        tl.store(entropy_ptr + index, -tl.sum(bits, 0) * LN_2)
        most_likely = tl.argmax(tl.where(mask, targets, float("-inf")), 0, tie_break_left=True)
        tl.store(most_likely_ptr + index, most_likely.to(tl.int64))
    loss, maximum, log2_normaliser, total = soft_cross_entropy(logits, targets, 1.0, log2_scale, temperature, mask)
    minus_dz = minus_gradient(logits, targets, 1.0, maximum, log2_normaliser, total, log2_scale)
    tl.store(loss_ptr + index, loss)
    gradient = (scale * minus_dz).to(gradient_ptr.dtype.element_ty)
    tl.store(gradient_ptr + index * prototypes + offs, gradient, mask=mask)


def student_loss(
    logits: Tensor, targets: Tensor, temperature: float, scale: float, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean loss in float32, scale (t - softmax(z) sum(t)) in the dtype of the logits, and the targets' statistics.

    These are their mean entropy and their most likely prototypes, or empty.
    """
    predicted, prototypes = logits.shape
    check_supported("logits", logits.dtype, prototypes)
    device = logits.device
    loss = torch.empty((predicted,), dtype=torch.float32, device=device)
    gradient = torch.empty((predicted, prototypes), dtype=logits.dtype, device=device)
    entropy = torch.empty((predicted if statistics else 0,), dtype=torch.float32, device=device)
    most_likely = torch.empty((predicted if statistics else 0,), dtype=torch.int64, device=device)
    student_rows_kernel[(predicted,)](
        logits,
        targets,
        loss,
        gradient,
        entropy if statistics else None,
        most_likely if statistics else None,
        prototypes,
        *logits.stride(),
        *targets.stride(),
        log2_scale(temperature),
        temperature,
        scale,
        **launch_options(student_rows_config(prototypes, logits.itemsize)),
    )
    return loss.mean(), gradient, entropy.mean() if statistics else entropy, most_likely
