"""Attention of short contexts, forward: o = softmax(rope(q) rope(k)^T scale) v, all keys of a head on chip.

Each key is rotated once; tiles of queries pass, and see whole rows, so that nothing is rescaled. Never written to
memory: scores, weights, the rotated q and k.
"""

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from capi_kernels.attention.configs import Config
from capi_kernels.attention.memory_triton import (
    bounds,
    context_of,
    from_head,
    heads_of,
    load_head,
    store_head,
)
from capi_kernels.attention.operands_triton import Operands, new_output
from capi_kernels.attention.packed_rotary_triton import load_rotated_head
from capi_kernels.attention.softmax_triton import masked, queries_by_keys, store_stats


@triton.jit
@no_type_check
def short_forward_kernel(
    q_heads,
    k_heads,
    v_heads,
    out_heads,
    stats_ptr,
    q_table_ptr,
    k_table_ptr,
    sequences,
    queries,
    heads,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One program per (group, head); its keys are one tile, or two, which need not come to a power of two."""
    group = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    q_start, q_end = bounds(sequences.cu_seqlens_q, group)
    k_start, k_end = bounds(sequences.cu_seqlens_k, context_of(sequences, group))
    q_heads = from_head(q_heads, head)
    k_heads = from_head(k_heads, head)
    v_heads = from_head(v_heads, head)
    out_heads = from_head(out_heads, head)
    mask_k = tl.arange(0, BLOCK_K) < k_end - k_start
    k = load_rotated_head(k_heads, k_table_ptr, k_start, mask_k, HEAD_DIM)
    v = load_head(v_heads, k_start, mask_k, HEAD_DIM)
    if TAIL > 0:
        tail = k_start + BLOCK_K
        tail_mask = tl.arange(0, TAIL) < k_end - tail
        tail_k = load_rotated_head(k_heads, k_table_ptr, tail, tail_mask, HEAD_DIM)
        tail_v = load_head(v_heads, tail, tail_mask, HEAD_DIM)
    # Hoisting the addresses of all tiles out of the loop would spill.
    for tile in tl.range(q_start, q_end, BLOCK_Q, disable_licm=True):
        mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
        q = load_rotated_head(q_heads, q_table_ptr, tile, mask_q, HEAD_DIM)
        s = masked(queries_by_keys(q, k, 1), mask_k, 1)
        m = tl.maximum(tl.max(s, 1), -1e30)  # The context may be empty.
        if TAIL > 0:
            tail_s = masked(queries_by_keys(q, tail_k, 1), tail_mask, 1)
            m = tl.maximum(m, tl.max(tail_s, 1))
        shift = (m * scale_log2)[:, None]
        p = tl.exp2(s * scale_log2 - shift)
        l = tl.sum(p, 1)  # noqa: E741
        o = tl.dot(p.to(v.dtype), v, input_precision="ieee")
        if TAIL > 0:
            tail_p = tl.exp2(tail_s * scale_log2 - shift)
            l += tl.sum(tail_p, 1)  # noqa: E741
            o = tl.dot(tail_p.to(v.dtype), tail_v, o, input_precision="ieee")
        inverse_l = 1 / tl.where(l > 0, l, 1.0)
        store_head(out_heads, o * inverse_l[:, None], tile, mask_q, HEAD_DIM)
        store_stats(stats_ptr, m, inverse_l, head, tile, mask_q, queries, heads)


@triton.jit
@no_type_check
def few_forward_kernel(
    q_heads,
    k_heads,
    v_heads,
    out_heads,
    stats_ptr,
    q_table_ptr,
    k_table_ptr,
    sequences,
    queries,
    heads,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (group, head) of at most BLOCK_Q queries: the long sides of S^T = K Q^T are keys."""
    group = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    q_start, q_end = bounds(sequences.cu_seqlens_q, group)
    k_start, k_end = bounds(sequences.cu_seqlens_k, context_of(sequences, group))
    mask_q = tl.arange(0, BLOCK_Q) < q_end - q_start
    mask_k = tl.arange(0, BLOCK_K) < k_end - k_start
    k = load_rotated_head(from_head(k_heads, head), k_table_ptr, k_start, mask_k, HEAD_DIM)
    v = load_head(from_head(v_heads, head), k_start, mask_k, HEAD_DIM)
    q = load_rotated_head(from_head(q_heads, head), q_table_ptr, q_start, mask_q, HEAD_DIM)
    s = masked(queries_by_keys(q, k, 0), mask_k, 0)  # [BLOCK_K, BLOCK_Q]
    m = tl.maximum(tl.max(s, 0), -1e30)  # The context may be empty.
    p = tl.exp2(s * scale_log2 - (m * scale_log2)[None, :])
    l = tl.sum(p, 0)  # noqa: E741
    inverse_l = 1 / tl.where(l > 0, l, 1.0)
    p = p * inverse_l[None, :]
    # o^T = V^T P: on its long side are the channels.
    o = tl.trans(tl.dot(tl.trans(v), p.to(v.dtype), input_precision="ieee"))
    store_head(from_head(out_heads, head), o, q_start, mask_q, HEAD_DIM)
    store_stats(stats_ptr, m, inverse_l, head, q_start, mask_q, queries, heads)


def short_forward(x: Operands, config: Config) -> tuple[Tensor, Tensor]:
    """o [queries, heads, head_dim] and, [2, heads, queries] in float32, m and 1 / l."""
    out, stats = new_output(x)
    tensors = heads_of(x.q), heads_of(x.k), heads_of(x.v), heads_of(out), stats, *x.packed_tables(), x.sequences
    numbers = len(x.q), x.heads, x.scale_log2, x.head_dim, config.block_q, config.block_k
    grid = (x.groups * x.heads,)
    if config.keys_first:
        few_forward_kernel[grid](*tensors, *numbers, **config.options)
    else:
        short_forward_kernel[grid](*tensors, *numbers, config.tail, **config.options)
    return out, stats
