"""o_i = sum_j softmax_j(rope(q_i) . rope(k_j) scale) v_j over the context that i's group reads, and its gradients.

A few queries over about a hundred keys: keys fill the long side of the matrix instructions (S^T = K Q^T), queries are
padded to 16 and not to a tile of 64 or 128. Up to 128 keys a program holds them all, forward and backward, and writes
neither scores nor weights nor rotated q and k; longer contexts, and float32, pass in tiles (`_tiled_attention_triton`).
In the backward one program owns the keys of a context and meets the groups that read it in order: no atomics.
"""

from functools import partial
from itertools import product
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from capi_kernels._attention_triton import (
    HEAD_DIMS,
    RESIDENT_KEYS,
    Config,
    Operands,
    as_operand,
    backward_config,
    compile_cases,
    heads_per_program,
    new_output,
    operands,
    resident_backward,
    resident_backward_kernel,
    store_stats,
)
from capi_kernels._capability import attends_as, capability
from capi_kernels._rotary_triton import load_channels, load_rotated, store_channels
from capi_kernels._tiled_attention_triton import tiled_backward, tiled_forward


@triton.jit
@no_type_check
def keys_first_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    stats_ptr,
    q_cos_ptr,
    q_sin_ptr,
    k_cos_ptr,
    k_sin_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    kv_index_ptr,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    out_stride_token,
    out_stride_head,
    queries,
    heads,
    heads_per_program,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (group, a few heads), which find the context's tables in the L1 cache after the first of them."""
    programs = tl.cdiv(heads, heads_per_program)
    group = tl.program_id(0) // programs
    first_head = tl.program_id(0) % programs * heads_per_program
    context = group if kv_index_ptr is None else tl.load(kv_index_ptr + group)
    q_start = tl.load(cu_seqlens_q_ptr + group)
    q_end = tl.load(cu_seqlens_q_ptr + group + 1)
    k_start = tl.load(cu_seqlens_k_ptr + context)
    k_end = tl.load(cu_seqlens_k_ptr + context + 1)
    # Hoisting the addresses of all tiles out of these loops would spill.
    for head in tl.range(first_head, min(first_head + heads_per_program, heads), disable_licm=True):
        head = tl.cast(head, tl.int64)
        k_head = k_ptr + head * k_stride_head
        mask_k = tl.arange(0, BLOCK_K) < k_end - k_start
        k1, k2 = load_rotated(k_head, k_cos_ptr, k_sin_ptr, k_start, mask_k, k_stride_token, HEAD_DIM, BLOCK_HALF)
        v = load_channels(v_ptr + head * v_stride_head, k_start, mask_k, v_stride_token, 0, HEAD_DIM, BLOCK_D)
        for tile in tl.range(q_start, q_end, BLOCK_Q, disable_licm=True):
            q_head = q_ptr + head * q_stride_head
            mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
            q1, q2 = load_rotated(q_head, q_cos_ptr, q_sin_ptr, tile, mask_q, q_stride_token, HEAD_DIM, BLOCK_HALF)
            s = tl.dot(k1, tl.trans(q1), input_precision="ieee")
            s = tl.dot(k2, tl.trans(q2), s, input_precision="ieee")  # [BLOCK_K, BLOCK_Q]
            # Padded keys score -inf; zero would still receive weight. The context may be empty.
            s = tl.where(mask_k[:, None], s, float("-inf"))
            m = tl.maximum(tl.max(s, 0), -1e30)
            p = tl.exp2((s - m[None, :]) * scale_log2)
            l = tl.sum(p, 0)  # noqa: E741
            inverse_l = 1 / tl.where(l > 0, l, 1.0)
            p = p * inverse_l[None, :]
            o = tl.dot(tl.trans(p.to(v.dtype)), v, input_precision="ieee")
            store_channels(out_ptr + head * out_stride_head, o, tile, mask_q, out_stride_token, 0, HEAD_DIM, BLOCK_D)
            store_stats(stats_ptr + head * queries, m, inverse_l, tile, mask_q, tl.cast(queries, tl.int64) * heads)


def forward_config(
    dtype: torch.dtype, head_dim: int, max_seqlen_q: int, max_seqlen_k: int, capability: int
) -> Config | None:
    """None where a context does not fit one tile: too many tokens, float32, or wide heads on the newest GPUs."""
    wide = head_dim > 64
    if dtype == torch.float32 or max_seqlen_k > RESIDENT_KEYS or (wide and capability >= 100):
        return None
    block_q = 16 if max_seqlen_q <= 16 else 32
    if max_seqlen_k <= 64:
        return Config(block_q, 64, 8 if wide else 4, max_registers=128 if head_dim <= 32 else None)
    if wide:
        return Config(block_q, 128, 8)
    # Two programs share a processor: one loads while the other computes. 128 registers a thread let twice the threads
    # do so, but an H100 would spill with few queries.
    few = block_q == 16 and capability == 90
    return Config(block_q, 128, 4 if few else 8, max_registers=None if few else 128)


def keys_first_forward(x: Operands, config: Config) -> tuple[Tensor, Tensor]:
    out, stats = new_output(x)
    share = heads_per_program(x)
    keys_first_forward_kernel[(x.groups * x.heads // share,)](
        **x.arguments(keys_first_forward_kernel, out=out, stats=stats),
        heads_per_program=share,
        BLOCK_Q=config.block_q,
        BLOCK_K=config.block_k,
        **config.options,
    )
    return out, stats


def masked_cross_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_cos: Tensor | None,
    q_sin: Tensor | None,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    kv_index: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o [queries, heads, head_dim] and what the backward needs, [2, heads, queries]."""
    tables = (q_cos, q_sin, k_cos, k_sin)
    x = operands(q, k, v, *tables, cu_seqlens_q, cu_seqlens_k, kv_index, max_seqlen_q, max_seqlen_k, scale)
    config = forward_config(q.dtype, x.head_dim, max_seqlen_q, max_seqlen_k, attends_as(capability(q.device)))
    return tiled_forward(x) if config is None else keys_first_forward(x, config)


def masked_cross_attention_backward(
    do: Tensor,
    out: Tensor,
    stats: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_cos: Tensor | None,
    q_sin: Tensor | None,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    kv_index: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """dq [queries, heads, head_dim]; dk and dv in one buffer [context, 2, heads, head_dim]."""
    tables = (q_cos, q_sin, k_cos, k_sin)
    x = operands(q, k, v, *tables, cu_seqlens_q, cu_seqlens_k, kv_index, max_seqlen_q, max_seqlen_k, scale)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dkv = torch.empty((len(k), 2, x.heads, x.head_dim), dtype=q.dtype, device=q.device)
    dk, dv = dkv.unbind(1)
    config = backward_config(q.dtype, x.head_dim, max_seqlen_k, kv_index is not None, attends_as(capability(q.device)))
    if config is None:
        tiled_backward(x, as_operand(do), out, stats, dq, dk, dv)
    else:
        resident_backward(x, as_operand(do), stats, dq, dk, dv, config)
    return dq, dkv


def _compile_cases() -> list:
    cases = []
    for dtype, head_dim, context, indexed in product(
        (torch.bfloat16, torch.float16), HEAD_DIMS, (64, 128), (False, True)
    ):
        for queries in (16, 128):
            config_of = partial(forward_config, dtype, head_dim, queries, context)
            cases += compile_cases(keys_first_forward_kernel, dtype, head_dim, config_of, indexed)
        config_of = partial(backward_config, dtype, head_dim, context, indexed)
        cases += compile_cases(resident_backward_kernel, dtype, head_dim, config_of, indexed)
    return cases


COMPILE_CASES = _compile_cases()
