"""The soft cross-entropy of both heads, row by row.

loss = sum(t) log sum exp(z) - sum(t z), z = (logits - their maximum) / temperature
-dz = t - softmax(z) sum(t)
"""

import math
from typing import no_type_check

import triton
import triton.language as tl

LN_2 = tl.constexpr(math.log(2))


@triton.jit
@no_type_check
def soft_cross_entropy(logits, M, row, log2_scale, temperature, mask):
    """sum(t) log sum exp(z) - sum(t z) with t = M row, z = (logits - maximum) / temperature; what its gradient needs.

    Whatever takes a few instructions is computed anew rather than kept: a row runs out of registers.
    """
    maximum = tl.max(logits, 0).to(tl.float32)
    matched = tl.sum(M * tl.where(mask, logits.to(tl.float32) - maximum, 0.0), 0) * row / temperature
    log2_normaliser = tl.log2(tl.sum(tl.exp2((logits.to(tl.float32) - maximum) * log2_scale), 0))
    total = tl.sum(M, 0) * row
    return total * (log2_normaliser * LN_2) - matched, maximum, log2_normaliser, total


@triton.jit
@no_type_check
def minus_gradient(logits, M, row, maximum, log2_normaliser, total, log2_scale):
    """t - softmax(z) sum(t)."""
    return M * row - tl.exp2((logits.to(tl.float32) - maximum) * log2_scale - log2_normaliser) * total
