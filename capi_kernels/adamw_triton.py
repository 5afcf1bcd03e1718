"""AdamW, the moving average of the weights, and copies of both in another type, in one pass over many tensors.

    m <- beta1 m + (1 - beta1) g, v <- beta2 v + (1 - beta2) g^2
    p <- p - lr weight_decay p - (lr / (1 - beta1^t)) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    ema <- ema + ema_weight (p - ema)

The kernel reads the addresses of its tensors from a table. An element costs 28 bytes, 2 less where the gradient is in
half precision, 8 more with the average (apart, PyTorch's two kernels read p twice: 40), and 2 for each copy.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
CONFIG = {"TILE": TILE, "num_warps": 8}
TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
@no_type_check
def tensor_at(row_ptr, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in a column of the table, and whether there is one."""
    address = tl.load(row_ptr + COLUMN)
    ptr = address.to(tl.pointer_type(TYPE))
    return tl.multiple_of(ptr, 16) if ALIGNED else ptr, address != 0


@triton.jit
@no_type_check
def adamw_kernel(
    table_ptr,
    tiles_ptr,
    found_inf_ptr,
    corrections_ptr,
    lr,
    weight_decay,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    ema_weight,
    EMA: tl.constexpr,
    GRADIENT_TYPE: tl.constexpr,
    COPY_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per tile of a tensor. `corrections` are 1 - beta^t of both, float64; p, m, v stay where inf is found.

    ALIGNED: every address is a multiple of 16, every size one of 4.
    """
    program = tl.program_id(0).to(tl.int64)
    table_ptr += tl.load(tiles_ptr + 2 * program) * 8
    offs = tl.load(tiles_ptr + 2 * program + 1) * TILE + tl.arange(0, TILE)
    size = tl.load(table_ptr + 7)
    if ALIGNED:
        size = tl.multiple_of(size, 4)
    mask = offs < size
    p_ptr, _ = tensor_at(table_ptr, 0, tl.float32, ALIGNED)
    g_ptr, _ = tensor_at(table_ptr, 1, GRADIENT_TYPE, ALIGNED)
    m_ptr, _ = tensor_at(table_ptr, 2, tl.float32, ALIGNED)
    v_ptr, _ = tensor_at(table_ptr, 3, tl.float32, ALIGNED)
    # All that is read is on its way before the first of it is needed.
    p = tl.load(p_ptr + offs, mask=mask)
    g = tl.load(g_ptr + offs, mask=mask).to(tl.float32)
    m = tl.load(m_ptr + offs, mask=mask)
    v = tl.load(v_ptr + offs, mask=mask)
    if EMA:
        ema_ptr, _ = tensor_at(table_ptr, 4, tl.float32, ALIGNED)
        ema = tl.load(ema_ptr + offs, mask=mask)
    found_inf = tl.load(found_inf_ptr) != 0
    step_size = tl.div_rn(lr, tl.load(corrections_ptr).to(tl.float32))
    root = tl.sqrt_rn(tl.load(corrections_ptr + 1).to(tl.float32))

    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * g * g
    decayed = p - lr * weight_decay * p
    p = tl.where(found_inf, p, decayed - tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), root) + eps))
    updated = mask & (found_inf == 0)
    tl.store(p_ptr + offs, p, mask=updated)
    tl.store(m_ptr + offs, m, mask=updated)
    tl.store(v_ptr + offs, v, mask=updated)
    if EMA:
        # Of the two forms the one that is p itself at a weight of 1, and ema at 0.
        difference = p - ema
        ema = tl.where(ema_weight < 0.5, ema + ema_weight * difference, p - difference * (1 - ema_weight))
        tl.store(ema_ptr + offs, ema, mask=mask)
    if COPY_TYPE is not None:
        copy_ptr, wanted = tensor_at(table_ptr, 5, COPY_TYPE, ALIGNED)
        tl.store(copy_ptr + offs, p.to(COPY_TYPE), mask=mask & wanted)
        if EMA:
            copy_ptr, wanted = tensor_at(table_ptr, 6, COPY_TYPE, ALIGNED)
            tl.store(copy_ptr + offs, ema.to(COPY_TYPE), mask=mask & wanted)


def adamw_(
    table: Tensor,
    tiles: Tensor,
    found_inf: Tensor,
    corrections: Tensor,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    ema_weight: float | None,
    gradient_dtype: torch.dtype,
    copy_dtype: torch.dtype | None,
    aligned: bool,
) -> None:
    """Updates the tensors of `table`: a row for each of the addresses of p, g, m, v, ema and the copies of p and ema (0
    where none is wanted), and the number of elements, int64. A row of `tiles`: a tensor's row, which of its tiles. All
    are float32 but g, of `gradient_dtype`, and the copies.

    Without `ema_weight` there are no averages, without `copy_dtype` no copies.
    """
    adamw_kernel[(len(tiles),)](
        table,
        tiles,
        found_inf,
        corrections,
        lr,
        weight_decay,
        *(x for beta in betas for x in (beta, 1 - beta)),
        eps,
        0.0 if ema_weight is None else ema_weight,
        EMA=ema_weight is not None,
        GRADIENT_TYPE=TRITON_TYPES[gradient_dtype],
        COPY_TYPE=None if copy_dtype is None else TRITON_TYPES[copy_dtype],
        ALIGNED=aligned,
        **CONFIG,
    )
