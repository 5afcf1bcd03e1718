"""P_ij = softmax_j(rope(q_i) . rope(k_j) scale) over the context that i's group reads, written out, and its gradients.

    dS = P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q

Keys fill the long side of the matrix instructions (S^T = K Q^T), queries are padded to 16. A program holds all keys of
a context; in the backward it meets the groups that read them in order: no atomics, one result. Never written to memory:
scores, their gradients, the rotated q and k. Longer contexts, and float32, whose products take no matrix unit, are left
to PyTorch's operations (`padded_weights`).
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from capi_kernels._capability import attends_as, capability
from capi_kernels.attention import configs
from capi_kernels.attention.memory_triton import (
    bounds,
    context_of,
    count_readers,
    from_head,
    heads_of,
    next_reader,
)
from capi_kernels.attention.operands_triton import Operands, heads_per_program, launchable
from capi_kernels.attention.padded_weights import (
    padded_attention_weights,
    padded_attention_weights_backward,
    padded_operands,
)
from capi_kernels.attention.rotary_triton import (
    add_product,
    halves_by_halves,
    load_rotated,
    scaled,
    store_unrotated,
    zero_halves,
)
from capi_kernels.attention.softmax_triton import gradient_of_scores, masked

ROW = 16  # Rows of P start at multiples of 16 elements: aligned for vectors, here and in the products that follow.


class Weights(NamedTuple):
    """[groups, heads, queries, keys] with contiguous rows."""

    ptr: Tensor
    stride_group: int
    stride_head: int
    stride_query: int


def weights_at(x: Tensor) -> Weights:
    return Weights(x, *x.stride()[:3])


@triton.jit
@no_type_check
def rows_of(weights, group, head):
    """A pointer to those of one group and head."""
    return weights.ptr + tl.cast(group, tl.int64) * weights.stride_group + head * weights.stride_head


@triton.jit
@no_type_check
def places(place, offs_k, stride_query):  # -> [len(offs_k), len(place)]
    return place[None, :] * stride_query + offs_k[:, None]


@triton.jit
@no_type_check
def weights_forward_kernel(
    q_heads,
    k_heads,
    weights,
    q_tables,
    k_tables,
    sequences,
    heads,
    heads_per_program,
    max_seqlen_q,
    max_seqlen_k,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (group, a few heads), which find the context's tables in the L1 cache after the first of them."""
    programs = tl.cdiv(heads, heads_per_program)
    group = tl.program_id(0) // programs
    first_head = tl.program_id(0) % programs * heads_per_program
    q_start, q_end = bounds(sequences.cu_seqlens_q, group)
    k_start, k_end = bounds(sequences.cu_seqlens_k, context_of(sequences, group))
    # Hoisting the addresses of all tiles out of these loops would spill.
    for head in tl.range(first_head, min(first_head + heads_per_program, heads), disable_licm=True):
        head = tl.cast(head, tl.int64)
        mask_k = tl.arange(0, BLOCK_K) < k_end - k_start
        k = load_rotated(from_head(k_heads, head), k_tables, k_start, mask_k, HEAD_DIM)
        for tile in tl.range(0, max_seqlen_q, BLOCK_Q, disable_licm=True):
            mask_q = tl.arange(0, BLOCK_Q) < q_end - q_start - tile
            q = load_rotated(from_head(q_heads, head), q_tables, q_start + tile, mask_q, HEAD_DIM)
            s = masked(halves_by_halves(q, k, 0), mask_k, 0)  # [BLOCK_K, BLOCK_Q]
            m = tl.maximum(tl.max(s, 0), -1e30)  # The context may be empty.
            p = tl.exp2((s - m[None, :]) * scale_log2)
            l = tl.sum(p, 0)  # noqa: E741
            p = p * tl.where(mask_q, 1 / tl.where(l > 0, l, 1.0), 0.0)[None, :]
            place = tile + tl.arange(0, BLOCK_Q)
            offs_k = tl.arange(0, BLOCK_K)
            inside = (offs_k < max_seqlen_k)[:, None] & (place < max_seqlen_q)[None, :]
            ptrs = rows_of(weights, group, head) + places(place, offs_k, weights.stride_query)
            tl.store(ptrs, p.to(weights.ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def weights_backward_kernel(
    q_heads,
    k_heads,
    weights,
    dweights,
    dq_heads,
    dk_heads,
    q_tables,
    k_tables,
    sequences,
    groups,
    heads,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (context, head): its keys stay on chip while the groups that read it pass in order."""
    context = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    q_heads = from_head(q_heads, head)
    dq_heads = from_head(dq_heads, head)
    k_start, k_end = bounds(sequences.cu_seqlens_k, context)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < k_end - k_start
    k = load_rotated(from_head(k_heads, head), k_tables, k_start, mask_k, HEAD_DIM)
    dk = zero_halves(BLOCK_K, HEAD_DIM)
    group = -1
    for _ in range(count_readers(sequences.kv_index, groups, context)):
        group = next_reader(sequences.kv_index, groups, context, group)
        q_start, q_end = bounds(sequences.cu_seqlens_q, group)
        p_ptr = rows_of(weights, group, head)
        dp_ptr = rows_of(dweights, group, head)
        for tile in tl.range(q_start, q_end, BLOCK_Q, disable_licm=True):
            mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
            inside = mask_k[:, None] & mask_q[None, :]
            place = tile - q_start + tl.arange(0, BLOCK_Q)
            # Padding has no gradient, whatever stands there.
            p = tl.load(p_ptr + places(place, offs_k, weights.stride_query), mask=inside, other=0.0)
            dp = tl.load(dp_ptr + places(place, offs_k, dweights.stride_query), mask=inside, other=0.0)
            ds = gradient_of_scores(p.to(tl.float32), dp.to(tl.float32), 0).to(p.dtype)  # [BLOCK_K, BLOCK_Q]
            q = load_rotated(q_heads, q_tables, tile, mask_q, HEAD_DIM)
            dk = add_product(dk, ds, q)
            dq = scaled(add_product(zero_halves(BLOCK_Q, HEAD_DIM), tl.trans(ds), k), scale)
            store_unrotated(dq_heads, dq, q_tables, tile, mask_q, HEAD_DIM)
    store_unrotated(from_head(dk_heads, head), scaled(dk, scale), k_tables, k_start, mask_k, HEAD_DIM)


def _operands(q: Tensor, k: Tensor, *rest) -> Operands:
    return launchable(Operands(q, k, k, *rest))  # k stands for the values, which no kernel here reads.


def _padded_operands(x: Operands) -> tuple:
    cu_seqlens, max_seqlens = (x.cu_seqlens_q, x.cu_seqlens_k), (x.max_seqlen_q, x.max_seqlen_k)
    tables, layouts = padded_operands(x.q, x.k, (x.q_cos, x.q_sin, x.k_cos, x.k_sin), cu_seqlens, max_seqlens)
    return x.q, x.k, tables, layouts, x.kv_index, x.scale


def as_rows(x: Tensor) -> Tensor:
    """x [groups, heads, queries, keys] with contiguous rows: itself, or a copy where 32-bit offsets do not reach."""
    return x if x.stride(3) == 1 and 0 <= x.stride(2) * x.shape[2] < 2**31 else x.contiguous()


def weights_forward(*operands) -> Tensor:
    """P [groups, heads, max_seqlen_q, max_seqlen_k], in memory [groups, max_seqlen_q, heads, ROW or a multiple]."""
    x = _operands(*operands)
    row = triton.cdiv(x.max_seqlen_k, ROW) * ROW
    weights = torch.empty((x.groups, x.max_seqlen_q, x.heads, row), dtype=x.q.dtype, device=x.q.device)
    weights = weights.transpose(1, 2)[..., : x.max_seqlen_k]
    config = configs.weights_forward(x.q.dtype, x.head_dim, x.max_seqlen_k, attends_as(capability(x.q.device)))
    if config is None:
        return weights.copy_(padded_attention_weights(*_padded_operands(x)))
    share = heads_per_program(x)
    weights_forward_kernel[(x.groups * x.heads // share,)](
        *(heads_of(x.q), heads_of(x.k), weights_at(weights), *x.tables, x.sequences),
        *(x.heads, share, x.max_seqlen_q, x.max_seqlen_k, x.scale_log2, x.head_dim, config.block_q, config.block_k),
        **config.options,
    )
    return weights


def weights_backward(dweights: Tensor, weights: Tensor, *operands) -> tuple[Tensor, Tensor]:
    """dq [queries, heads, head_dim] and dk [context, heads, head_dim]."""
    x = _operands(*operands)
    config = configs.weights_backward(x.q.dtype, x.head_dim, x.max_seqlen_k, attends_as(capability(x.q.device)))
    if config is None:
        return padded_attention_weights_backward(dweights, weights, *_padded_operands(x))
    dq, dk = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (x.q, x.k))
    weights_backward_kernel[(x.contexts * x.heads,)](
        *(heads_of(x.q), heads_of(x.k), weights_at(as_rows(weights)), weights_at(as_rows(dweights))),
        *(heads_of(dq), heads_of(dk), *x.tables, x.sequences),
        *(x.groups, x.heads, x.scale, x.head_dim, config.block_q, config.block_k),
        **config.options,
    )
    return dq, dk
