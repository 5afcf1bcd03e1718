"""Scores, weights and their gradients, as pieces of the attention kernels.

    S = Q K^T, P = exp2((S - m) log2(e) scale) / l, dP = dO V^T, dS = P (dP - rowsum(P dP))

Tiles of scores are [queries, keys] or [keys, queries]; KEYS is the axis of the keys, 1 or 0. m and 1 / l, the maximum
of a row and its sum, are what a forward leaves for its backward, [2, heads, queries] in float32.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def queries_by_keys(q, k, KEYS: tl.constexpr):
    """q k^T of rows of queries and rows of keys, or its transpose."""
    if KEYS == 0:
        return tl.dot(k, tl.trans(q), input_precision="ieee")
    else:
        return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
@no_type_check
def over_queries(scores, q, acc, KEYS: tl.constexpr):
    """acc + scores^T q, a row for each key."""
    return tl.dot(scores if KEYS == 0 else tl.trans(scores), q, acc, input_precision="ieee")


@triton.jit
@no_type_check
def masked(s, mask_k, KEYS: tl.constexpr):
    """Padded keys score -inf; zero would still receive weight."""
    return tl.where(tl.expand_dims(mask_k, 1 - KEYS), s, float("-inf"))


@triton.jit
@no_type_check
def gradient_of_scores(p, dp, KEYS: tl.constexpr):
    """dS of whole rows: rowsum(P dP) is of these very bits, as rowsum(o dO) of a rounded o is not."""
    return p * (dp - tl.expand_dims(tl.sum(p * dp, KEYS), KEYS))


@triton.jit
@no_type_check
def stats_of(stats_ptr, head, token, mask, queries):
    return stats_ptr + head * queries + tl.cast(token, tl.int64) + tl.arange(0, mask.shape[0])


@triton.jit
@no_type_check
def store_stats(stats_ptr, m, inverse_l, head, token, mask, queries, heads):
    ptrs = stats_of(stats_ptr, head, token, mask, queries)
    tl.store(ptrs, m, mask=mask)
    tl.store(ptrs + tl.cast(queries, tl.int64) * heads, inverse_l, mask=mask)


@triton.jit
@no_type_check
def load_stats(stats_ptr, head, token, mask, queries, heads):
    """m and 1 / l of len(mask) queries; padded ones weigh nothing."""
    ptrs = stats_of(stats_ptr, head, token, mask, queries)
    m = tl.load(ptrs, mask=mask, other=0.0)
    return m, tl.load(ptrs + tl.cast(queries, tl.int64) * heads, mask=mask, other=0.0)
