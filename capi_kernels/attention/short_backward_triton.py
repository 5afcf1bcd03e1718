"""Attention of short contexts, backward, of groups that have contexts of their own: all keys of a head on chip.

    dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q

Rows are whole: rowsum(P dP) is of these very bits. rowsum(o dO) is not, once o is rounded, and of a row whose weight is
on one key little else would be left. Never written to memory: S, P, their gradients, the rotated q and k.
"""

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from capi_kernels.attention.configs import Config
from capi_kernels.attention.memory_triton import bounds, from_head, heads_of, load_head, padded, padded_half, store_head
from capi_kernels.attention.operands_triton import Operands, heads_per_program
from capi_kernels.attention.packed_rotary_triton import (
    load_rotated_by,
    load_rotated_head,
    load_words,
    store_gradient,
    store_rotated_gradient,
)
from capi_kernels.attention.softmax_triton import (
    gradient_of_scores,
    load_stats,
    masked,
    over_queries,
    queries_by_keys,
)


@triton.jit
@no_type_check
def weights_of(q, k, mask_k, m, inverse_l, scale_log2, KEYS: tl.constexpr):
    """P, from what the forward left of its rows."""
    s = masked(queries_by_keys(q, k, KEYS), mask_k, KEYS)
    # One instruction less a score than a product with 1 / l. Padded rows have no gradient.
    shift = m * scale_log2 - tl.log2(tl.maximum(inverse_l, 1e-30))
    return tl.exp2(s * scale_log2 - tl.expand_dims(shift, KEYS))


@triton.jit
@no_type_check
def one_tile_backward_kernel(
    q_heads,
    k_heads,
    v_heads,
    do_heads,
    stats_ptr,
    dq_heads,
    dk_heads,
    dv_heads,
    q_table_ptr,
    k_table_ptr,
    sequences,
    queries,
    heads,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
    SELF: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """One program per (group, HEADS heads), all its queries and keys in one tile each.

    SELF: queries lie where keys do, with the same table, which is read once for both. KEYS_FIRST: scores are
    [keys, queries], for few queries.
    """
    ROTARY_Q: tl.constexpr = q_table_ptr is not None
    ROTARY_K: tl.constexpr = k_table_ptr is not None
    KEYS: tl.constexpr = 0 if KEYS_FIRST else 1
    programs = heads // HEADS
    group = tl.program_id(0) // programs
    first_head = tl.program_id(0) % programs * HEADS
    q_start, q_end = bounds(sequences.cu_seqlens_q, group)
    k_start, k_end = bounds(sequences.cu_seqlens_k, group)
    mask_q = tl.arange(0, BLOCK_Q) < q_end - q_start
    mask_k = mask_q if SELF else tl.arange(0, BLOCK_K) < k_end - k_start
    # Of several heads the next one's loads are under way while this one's products run.
    for head in tl.range(first_head, first_head + HEADS, num_stages=STAGES, disable_licm=True):
        head = tl.cast(head, tl.int64)
        words = load_words(q_table_ptr, q_start, mask_q, HEAD_DIM)
        q = load_rotated_by(from_head(q_heads, head), q_start, mask_q, words, ROTARY_Q, HEAD_DIM)
        if not SELF:
            words = load_words(k_table_ptr, k_start, mask_k, HEAD_DIM)
        k = load_rotated_by(from_head(k_heads, head), k_start, mask_k, words, ROTARY_K, HEAD_DIM)
        v = load_head(from_head(v_heads, head), k_start, mask_k, HEAD_DIM)
        do = load_head(from_head(do_heads, head), q_start, mask_q, HEAD_DIM)
        m, inverse_l = load_stats(stats_ptr, head, q_start, mask_q, queries, heads)
        p = weights_of(q, k, mask_k, m, inverse_l, scale_log2, KEYS)
        dv = over_queries(p.to(do.dtype), do, None, KEYS)
        store_head(from_head(dv_heads, head), dv, k_start, mask_k, HEAD_DIM)
        ds = gradient_of_scores(p, queries_by_keys(do, v, KEYS), KEYS).to(k.dtype)
        dk = over_queries(ds, q, None, KEYS)
        if KEYS_FIRST:
            dq = tl.trans(tl.dot(tl.trans(k), ds, input_precision="ieee"))
        else:
            dq = tl.dot(ds, k, input_precision="ieee")
        # Read again: words that waited since the rotation would take the registers of two tiles.
        words = load_words(k_table_ptr, k_start, mask_k, HEAD_DIM)
        store_gradient(from_head(dk_heads, head), dk * scale, k_start, mask_k, words, ROTARY_K, HEAD_DIM)
        if not SELF:
            words = load_words(q_table_ptr, q_start, mask_q, HEAD_DIM)
        store_gradient(from_head(dq_heads, head), dq * scale, q_start, mask_q, words, ROTARY_Q, HEAD_DIM)


@triton.jit
@no_type_check
def by_queries_backward_kernel(
    q_heads,
    k_heads,
    v_heads,
    do_heads,
    stats_ptr,
    dq_heads,
    dk_heads,
    dv_heads,
    q_table_ptr,
    k_table_ptr,
    sequences,
    queries,
    heads,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (group, head): its keys, in one tile, meet the tiles of its queries in order."""
    group = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    q_start, q_end = bounds(sequences.cu_seqlens_q, group)
    k_start, k_end = bounds(sequences.cu_seqlens_k, group)
    mask_k = tl.arange(0, BLOCK_K) < k_end - k_start
    q_heads = from_head(q_heads, head)
    do_heads = from_head(do_heads, head)
    dq_heads = from_head(dq_heads, head)
    k = load_rotated_head(from_head(k_heads, head), k_table_ptr, k_start, mask_k, HEAD_DIM)
    v = load_head(from_head(v_heads, head), k_start, mask_k, HEAD_DIM)
    dk = tl.zeros([BLOCK_K, 2 * padded_half(HEAD_DIM)], tl.float32)
    dv = tl.zeros([BLOCK_K, padded(HEAD_DIM)], tl.float32)
    for tile in tl.range(q_start, q_end, BLOCK_Q, disable_licm=True):
        mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
        q = load_rotated_head(q_heads, q_table_ptr, tile, mask_q, HEAD_DIM)
        do = load_head(do_heads, tile, mask_q, HEAD_DIM)
        m, inverse_l = load_stats(stats_ptr, head, tile, mask_q, queries, heads)
        p = weights_of(q, k, mask_k, m, inverse_l, scale_log2, 1)  # [BLOCK_Q, BLOCK_K]
        dv = over_queries(p.to(do.dtype), do, dv, 1)
        ds = gradient_of_scores(p, queries_by_keys(do, v, 1), 1).to(k.dtype)
        dk = over_queries(ds, q, dk, 1)
        dq = tl.dot(ds, k, input_precision="ieee") * scale
        store_rotated_gradient(dq_heads, dq, q_table_ptr, tile, mask_q, HEAD_DIM)
    store_head(from_head(dv_heads, head), dv, k_start, mask_k, HEAD_DIM)
    store_rotated_gradient(from_head(dk_heads, head), dk * scale, k_table_ptr, k_start, mask_k, HEAD_DIM)


def short_backward(x: Operands, do: Tensor, stats: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, config: Config) -> None:
    """Write dq, dk and dv, whatever their strides."""
    read = heads_of(x.q), heads_of(x.k), heads_of(x.v), heads_of(do), stats
    tensors = *read, heads_of(dq), heads_of(dk), heads_of(dv), *x.packed_tables(), x.sequences
    numbers = len(x.q), x.heads, x.scale, x.scale_log2, x.head_dim, config.block_q, config.block_k
    if x.max_seqlen_q > config.block_q:
        by_queries_backward_kernel[(x.groups * x.heads,)](*tensors, *numbers, **config.options)
        return
    own = x.own and config.block_q == config.block_k
    # With tables of their own for queries and keys, two heads would not fit.
    heads = min(config.heads, heads_per_program(x)) if own else 1
    config = config._replace(heads=heads, num_stages=config.num_stages if heads > 1 else 1)
    mode = heads, config.num_stages, own, config.keys_first
    one_tile_backward_kernel[(x.groups * (x.heads // heads),)](*tensors, *numbers, *mode, **config.options)
