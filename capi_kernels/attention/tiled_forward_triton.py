"""Attention over sequences of any length, forward, a tile of keys at a time: m, l, o <- online softmax.

Keys, which are read again and again, were rotated in advance: a rotation in the loop would read 4 bytes of tables for
each of k. Never written to memory: scores and weights.

Tensors in float32 come here whatever their lengths: a whole tile of their keys takes too many registers, and products
without the matrix unit take longer than the reads that it would save.
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
    padded,
    padded_half,
    store_head,
)
from capi_kernels.attention.operands_triton import Operands, new_output
from capi_kernels.attention.packed_rotary_triton import pinned, together
from capi_kernels.attention.rotary_triton import halves_by_halves, load_halves, load_rotated, rotated
from capi_kernels.attention.softmax_triton import masked, queries_by_keys, store_stats


@triton.jit
@no_type_check
def tiled_forward_kernel(
    q_heads,
    k_heads,
    v_heads,
    out_heads,
    stats_ptr,
    q_tables,
    sequences,
    tiles,
    queries,
    heads,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per (group, head, tile of queries); q is rotated here, k was before."""
    # One product over all channels, not one for each half, where both halves together have no padding within.
    WHOLE: tl.constexpr = 2 * padded_half(HEAD_DIM) == HEAD_DIM and q_heads.ptr.dtype.element_ty != tl.float32
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    group = tl.program_id(0) // tiles // heads
    q_start, q_end = bounds(sequences.cu_seqlens_q, group)
    tile = q_start + tl.program_id(0) % tiles * BLOCK_Q
    if tile >= q_end:
        return
    k_start, k_end = bounds(sequences.cu_seqlens_k, context_of(sequences, group))
    k_heads = from_head(k_heads, head)
    v_heads = from_head(v_heads, head)
    mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
    q = load_rotated(from_head(q_heads, head), q_tables, tile, mask_q, HEAD_DIM)
    if WHOLE:
        whole_q = pinned(together(q[0], q[1]))
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)  # noqa: E741
    o = tl.zeros([BLOCK_Q, padded(HEAD_DIM)], tl.float32)
    for key in tl.range(k_start, k_end, BLOCK_K, num_stages=STAGES):
        mask_k = tl.arange(0, BLOCK_K) < k_end - key
        v = load_head(v_heads, key, mask_k, HEAD_DIM)
        if WHOLE:
            s = masked(queries_by_keys(whole_q, load_head(k_heads, key, mask_k, HEAD_DIM), 1), mask_k, 1)
            new_m = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s * scale_log2 - (new_m * scale_log2)[:, None])  # [BLOCK_Q, BLOCK_K]
        else:
            s = masked(halves_by_halves(q, load_halves(k_heads, key, mask_k, HEAD_DIM), 1), mask_k, 1)
            new_m = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2((s - new_m[:, None]) * scale_log2)
        rescale = tl.exp2((m - new_m) * scale_log2)
        l = l * rescale + tl.sum(p, 1)  # noqa: E741
        o = tl.dot(p.to(v.dtype), v, o * rescale[:, None], input_precision="ieee")
        m = new_m
    inverse_l = 1 / tl.where(l > 0, l, 1.0)  # The context may be empty.
    store_head(from_head(out_heads, head), o * inverse_l[:, None], tile, mask_q, HEAD_DIM)
    # Of an empty context m must be finite, for -inf - m to stay -inf in the backward.
    store_stats(stats_ptr, tl.maximum(m, -1e30), inverse_l, head, tile, mask_q, queries, heads)


def tiled_forward(x: Operands, config: Config) -> tuple[Tensor, Tensor]:
    """o [queries, heads, head_dim] and, [2, heads, queries] in float32, m and 1 / l."""
    out, stats = new_output(x)
    q_tables, k_tables = x.tables
    k = rotated(x.k, k_tables)
    tiles = triton.cdiv(x.max_seqlen_q, config.block_q)
    tiled_forward_kernel[(tiles * x.heads * x.groups,)](
        *(heads_of(x.q), heads_of(k), heads_of(x.v), heads_of(out), stats, q_tables, x.sequences),
        *(tiles, len(x.q), x.heads, x.scale_log2, x.head_dim, config.block_q, config.block_k, config.num_stages),
        **config.options,
    )
    return out, stats
