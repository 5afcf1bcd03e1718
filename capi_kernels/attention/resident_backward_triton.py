"""Attention of short contexts, backward, of contexts that several groups read: all keys of a head on chip.

    P = exp2((S - m) log2(e) scale) / l, dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q

Never written to memory: S, P, their gradients, the rotated q and k.
"""

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from capi_kernels.attention.configs import Config
from capi_kernels.attention.memory_triton import (
    bounds,
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
    load_rotated,
    scaled,
    store_unrotated,
    zero_halves,
)
from capi_kernels.attention.softmax_triton import gradient_of_scores, masked, queries_by_keys, stats_of


@triton.jit
@no_type_check
def resident_backward_kernel(
    q_heads,
    k_heads,
    v_heads,
    do_heads,
    stats_ptr,
    dq_heads,
    dk_heads,
    dv_heads,
    q_tables,
    k_tables,
    sequences,
    groups,
    queries,
    heads,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (context, head): its keys stay on chip while the groups that read it pass in order."""
    context = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    q_heads = from_head(q_heads, head)
    do_heads = from_head(do_heads, head)
    dq_heads = from_head(dq_heads, head)
    k_start, k_end = bounds(sequences.cu_seqlens_k, context)
    mask_k = tl.arange(0, BLOCK_K) < k_end - k_start
    k = load_rotated(from_head(k_heads, head), k_tables, k_start, mask_k, HEAD_DIM)
    v = load_head(from_head(v_heads, head), k_start, mask_k, HEAD_DIM)
    dk = zero_halves(BLOCK_K, HEAD_DIM)
    dv = tl.zeros([BLOCK_K, padded(HEAD_DIM)], tl.float32)
    group = -1
    for _ in range(count_readers(sequences.kv_index, groups, context)):
        group = next_reader(sequences.kv_index, groups, context, group)
        q_start, q_end = bounds(sequences.cu_seqlens_q, group)
        for tile in tl.range(q_start, q_end, BLOCK_Q, disable_licm=True):
            mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
            q = load_rotated(q_heads, q_tables, tile, mask_q, HEAD_DIM)
            do = load_head(do_heads, tile, mask_q, HEAD_DIM)
            m = tl.load(stats_of(stats_ptr, head, tile, mask_q, queries), mask=mask_q, other=0.0)
            s = masked(halves_by_halves(q, k, 0), mask_k, 0)  # [BLOCK_K, BLOCK_Q]
            p = tl.exp2((s - m[None, :]) * scale_log2)
            # Whole rows are here: their sums in these very bits, and neither o nor a pass before this one.
            l = tl.sum(p, 0)  # noqa: E741
            p = p / tl.where(l > 0, l, 1.0)[None, :]  # The context may be empty.
            ds = gradient_of_scores(p, queries_by_keys(do, v, 0), 0).to(v.dtype)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dk = add_product(dk, ds, q)
            dq = scaled(add_product(zero_halves(BLOCK_Q, HEAD_DIM), tl.trans(ds), k), scale)
            store_unrotated(dq_heads, dq, q_tables, tile, mask_q, HEAD_DIM)
    store_unrotated(from_head(dk_heads, head), scaled(dk, scale), k_tables, k_start, mask_k, HEAD_DIM)
    store_head(from_head(dv_heads, head), dv, k_start, mask_k, HEAD_DIM)


def resident_backward(
    x: Operands, do: Tensor, stats: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, config: Config
) -> None:
    """Write dq, dk and dv, whatever their strides."""
    read = heads_of(x.q), heads_of(x.k), heads_of(x.v), heads_of(do), stats
    resident_backward_kernel[(x.contexts * x.heads,)](
        *(*read, heads_of(dq), heads_of(dk), heads_of(dv), *x.tables, x.sequences),
        *(x.groups, len(x.q), x.heads, x.scale, x.scale_log2, x.head_dim, config.block_q, config.block_k),
        **config.options,
    )
