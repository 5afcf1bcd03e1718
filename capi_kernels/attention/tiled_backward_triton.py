"""Attention over sequences of any length, backward, tiles of queries against tiles of keys, without atomics.

    delta = rowsum(o do); dS = P (dO V^T - delta); one kernel owns tiles of dq, another tiles of dk and dv

q and k, which are read again and again, were rotated in advance. Never written to memory: S, P and their gradients.
Every sum has one order, so results repeat bit by bit.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from capi_kernels.attention.configs import Config
from capi_kernels.attention.memory_triton import (
    bounds,
    context_of,
    count_readers,
    from_head,
    heads_of,
    load_head,
    next_reader,
    padded,
    store_head,
)
from capi_kernels.attention.operands_triton import Operands
from capi_kernels.attention.rotary_triton import (
    add_product,
    halves_by_halves,
    load_halves,
    rotated,
    scaled,
    store_unrotated,
    zero_halves,
)
from capi_kernels.attention.softmax_triton import load_stats, masked, queries_by_keys, stats_of


@triton.jit
@no_type_check
def weights_of(q, k, mask_k, m, inverse_l, scale_log2, KEYS: tl.constexpr):
    """P of a tile, from what the forward left of its rows."""
    s = masked(halves_by_halves(q, k, KEYS), mask_k, KEYS)
    return tl.exp2((s - tl.expand_dims(m, KEYS)) * scale_log2) * tl.expand_dims(inverse_l, KEYS)


@triton.jit
@no_type_check
def tiled_dq_kernel(
    q_heads,
    k_heads,
    v_heads,
    out_heads,
    do_heads,
    stats_ptr,
    delta_ptr,
    dq_heads,
    q_tables,
    sequences,
    tiles,
    queries,
    heads,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (group, head, tile of queries); q and k are rotated. Leaves delta for the other kernel."""
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
    q = load_halves(from_head(q_heads, head), tile, mask_q, HEAD_DIM)
    out = load_head(from_head(out_heads, head), tile, mask_q, HEAD_DIM)
    do = load_head(from_head(do_heads, head), tile, mask_q, HEAD_DIM)
    m, inverse_l = load_stats(stats_ptr, head, tile, mask_q, queries, heads)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    dq = zero_halves(BLOCK_Q, HEAD_DIM)
    # In float32 the rounding of o would show where few keys hold the weight, and rowsum(P dP) has none of it. What
    # rowsum(o do) lacks is found on the way and added in the end, dq - (rowsum(P dP) - rowsum(o do)) P K.
    EXACT: tl.constexpr = q_heads.ptr.dtype.element_ty == tl.float32
    if EXACT:
        rest = tl.zeros([BLOCK_Q], tl.float32)
        pk = zero_halves(BLOCK_Q, HEAD_DIM)
    for key in range(k_start, k_end, BLOCK_K):
        mask_k = tl.arange(0, BLOCK_K) < k_end - key
        k = load_halves(k_heads, key, mask_k, HEAD_DIM)
        v = load_head(v_heads, key, mask_k, HEAD_DIM)
        p = weights_of(q, k, mask_k, m, inverse_l, scale_log2, 1)  # [BLOCK_Q, BLOCK_K]
        ds = (p * (queries_by_keys(do, v, 1) - delta[:, None])).to(v.dtype)
        dq = add_product(dq, ds, k)
        if EXACT:
            rest += tl.sum(ds, 1)
            pk = add_product(pk, p, k)
    if EXACT:
        dq = dq[0] - rest[:, None] * pk[0], dq[1] - rest[:, None] * pk[1]
        delta += rest
    # An address apart: the offsets of the statistics would take registers through the loop.
    tl.store(delta_ptr + head * queries + tile + tl.arange(0, BLOCK_Q), delta, mask=mask_q)
    store_unrotated(from_head(dq_heads, head), scaled(dq, scale), q_tables, tile, mask_q, HEAD_DIM)


@triton.jit
@no_type_check
def tiled_dkdv_kernel(
    q_heads,
    k_heads,
    v_heads,
    do_heads,
    stats_ptr,
    delta_ptr,
    dk_heads,
    dv_heads,
    k_tables,
    sequences,
    tiles,
    groups,
    queries,
    heads,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (context, head, tile of keys), over the groups that read the context; q and k are rotated."""
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    context = tl.program_id(0) // tiles // heads
    k_start, k_end = bounds(sequences.cu_seqlens_k, context)
    key = k_start + tl.program_id(0) % tiles * BLOCK_K
    if key >= k_end:
        return
    q_heads = from_head(q_heads, head)
    do_heads = from_head(do_heads, head)
    mask_k = tl.arange(0, BLOCK_K) < k_end - key
    k = load_halves(from_head(k_heads, head), key, mask_k, HEAD_DIM)
    v = load_head(from_head(v_heads, head), key, mask_k, HEAD_DIM)
    dk = zero_halves(BLOCK_K, HEAD_DIM)
    dv = tl.zeros([BLOCK_K, padded(HEAD_DIM)], tl.float32)
    group = -1
    for _ in range(count_readers(sequences.kv_index, groups, context)):
        group = next_reader(sequences.kv_index, groups, context, group)
        q_start, q_end = bounds(sequences.cu_seqlens_q, group)
        for tile in range(q_start, q_end, BLOCK_Q):
            mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
            q = load_halves(q_heads, tile, mask_q, HEAD_DIM)
            do = load_head(do_heads, tile, mask_q, HEAD_DIM)
            m, inverse_l = load_stats(stats_ptr, head, tile, mask_q, queries, heads)
            delta = tl.load(stats_of(delta_ptr, head, tile, mask_q, queries), mask=mask_q, other=0.0)
            p = weights_of(q, k, mask_k, m, inverse_l, scale_log2, 0)  # [BLOCK_K, BLOCK_Q]
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            ds = (p * (queries_by_keys(do, v, 0) - delta[None, :])).to(do.dtype)
            dk = add_product(dk, ds, q)
    store_unrotated(from_head(dk_heads, head), scaled(dk, scale), k_tables, key, mask_k, HEAD_DIM)
    store_head(from_head(dv_heads, head), dv, key, mask_k, HEAD_DIM)


def tiled_backward(
    x: Operands,
    do: Tensor,
    out: Tensor,
    stats: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    for_dq: Config,
    for_dkdv: Config,
) -> None:
    """Write dq, dk and dv, whatever their strides."""
    delta = torch.empty_like(stats[0])
    q_tables, k_tables = x.tables
    rows, scales = (len(x.q), x.heads), (x.scale, x.scale_log2, x.head_dim)
    q, k, v = heads_of(rotated(x.q, q_tables)), heads_of(rotated(x.k, k_tables)), heads_of(x.v)
    tiles = triton.cdiv(x.max_seqlen_q, for_dq.block_q)
    tiled_dq_kernel[(tiles * x.heads * x.groups,)](
        *(q, k, v, heads_of(out), heads_of(do), stats, delta, heads_of(dq), q_tables, x.sequences),
        *(tiles, *rows, *scales, for_dq.block_q, for_dq.block_k),
        **for_dq.options,
    )
    tiles = triton.cdiv(x.max_seqlen_k, for_dkdv.block_k)
    tiled_dkdv_kernel[(tiles * x.heads * x.contexts,)](
        *(q, k, v, heads_of(do), stats, delta, heads_of(dk), heads_of(dv), k_tables, x.sequences),
        *(tiles, x.groups, *rows, *scales, for_dkdv.block_q, for_dkdv.block_k),
        **for_dkdv.options,
    )
