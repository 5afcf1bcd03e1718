"""Attention of short contexts, backward, of groups that have contexts of their own: all keys of a head on chip.

    dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q

Rows are whole: rowsum(P dP) is of these very bits. rowsum(o dO) is not, once o is rounded, and of a row whose weight is
on one key little else would be left. Never written to memory: S, P, their gradients, the rotated q and k.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from capi_kernels._attention_triton import (
    HEAD_DIMS,
    Config,
    Operands,
    compile_cases,
    heads_per_program,
    load_stats,
)
from capi_kernels._packed_rotary_triton import (
    load_head,
    load_rotated_head,
    load_words,
    store_gradient,
    store_rotated_gradient,
)
from capi_kernels._rotary_triton import load_channels, store_channels


@triton.jit
@no_type_check
def weights_of(s, m, inverse_l, scale_log2, AXIS: tl.constexpr):
    """P of scores, from what the forward left of their rows, which lie along the other axis than AXIS."""
    # One instruction less a score than a product with 1 / l. Padded rows have no gradient.
    shift = m * scale_log2 - tl.log2(tl.maximum(inverse_l, 1e-30))
    return tl.exp2(s * scale_log2 - tl.expand_dims(shift, AXIS))


@triton.jit
@no_type_check
def one_tile_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    stats_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    q_table_ptr,
    k_table_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    do_stride_token,
    do_stride_head,
    dq_stride_token,
    dq_stride_head,
    dk_stride_token,
    dk_stride_head,
    dv_stride_token,
    dv_stride_head,
    queries,
    heads,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
    programs = heads // HEADS
    group = tl.program_id(0) // programs
    first_head = tl.program_id(0) % programs * HEADS
    q_start = tl.load(cu_seqlens_q_ptr + group)
    k_start = tl.load(cu_seqlens_k_ptr + group)
    mask_q = tl.arange(0, BLOCK_Q) < tl.load(cu_seqlens_q_ptr + group + 1) - q_start
    mask_k = mask_q if SELF else tl.arange(0, BLOCK_K) < tl.load(cu_seqlens_k_ptr + group + 1) - k_start
    rows = tl.cast(queries, tl.int64) * heads
    # Of several heads the next one's loads are under way while this one's products run.
    for head in tl.range(first_head, first_head + HEADS, num_stages=STAGES, disable_licm=True):
        head = tl.cast(head, tl.int64)
        word1, word2 = load_words(q_table_ptr, q_start, mask_q, HEAD_DIM, BLOCK_HALF)
        q_head = q_ptr + head * q_stride_head
        k_head = k_ptr + head * k_stride_head
        q = load_head(q_head, q_start, mask_q, q_stride_token, word1, word2, ROTARY_Q, HEAD_DIM, BLOCK_HALF)
        if not SELF:
            word1, word2 = load_words(k_table_ptr, k_start, mask_k, HEAD_DIM, BLOCK_HALF)
        k = load_head(k_head, k_start, mask_k, k_stride_token, word1, word2, ROTARY_K, HEAD_DIM, BLOCK_HALF)
        v = load_channels(v_ptr + head * v_stride_head, k_start, mask_k, v_stride_token, 0, HEAD_DIM, BLOCK_D)
        do = load_channels(do_ptr + head * do_stride_head, q_start, mask_q, do_stride_token, 0, HEAD_DIM, BLOCK_D)
        m, inverse_l = load_stats(stats_ptr + head * queries, q_start, mask_q, rows)
        dv_head = dv_ptr + head * dv_stride_head
        if KEYS_FIRST:
            s = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_K, BLOCK_Q]
            p = weights_of(tl.where(mask_k[:, None], s, float("-inf")), m, inverse_l, scale_log2, 0)
            dv = tl.dot(p.to(do.dtype), do, input_precision="ieee")
            store_channels(dv_head, dv, k_start, mask_k, dv_stride_token, 0, HEAD_DIM, BLOCK_D)
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = (p * (dp - tl.sum(p * dp, 0)[None, :])).to(k.dtype)
            dk = tl.dot(ds, q, input_precision="ieee")
            dq = tl.trans(tl.dot(tl.trans(k), ds, input_precision="ieee"))
        else:
            s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_Q, BLOCK_K]
            p = weights_of(tl.where(mask_k[None, :], s, float("-inf")), m, inverse_l, scale_log2, 1)
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="ieee")
            store_channels(dv_head, dv, k_start, mask_k, dv_stride_token, 0, HEAD_DIM, BLOCK_D)
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(k.dtype)
            dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
            dq = tl.dot(ds, k, input_precision="ieee")
        dk_head = dk_ptr + head * dk_stride_head
        dq_head = dq_ptr + head * dq_stride_head
        # Read again: words that waited since the rotation would take the registers of two tiles.
        word1, word2 = load_words(k_table_ptr, k_start, mask_k, HEAD_DIM, BLOCK_HALF)
        store_gradient(
            dk_head, dk * scale, k_start, mask_k, dk_stride_token, word1, word2, ROTARY_K, HEAD_DIM, BLOCK_HALF
        )
        if not SELF:
            word1, word2 = load_words(q_table_ptr, q_start, mask_q, HEAD_DIM, BLOCK_HALF)
        store_gradient(
            dq_head, dq * scale, q_start, mask_q, dq_stride_token, word1, word2, ROTARY_Q, HEAD_DIM, BLOCK_HALF
        )


@triton.jit
@no_type_check
def by_queries_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    stats_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    q_table_ptr,
    k_table_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    do_stride_token,
    do_stride_head,
    dq_stride_token,
    dq_stride_head,
    dk_stride_token,
    dk_stride_head,
    dv_stride_token,
    dv_stride_head,
    queries,
    heads,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (group, head): its keys, in one tile, meet the tiles of its queries in order."""
    group = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    q_start = tl.load(cu_seqlens_q_ptr + group)
    q_end = tl.load(cu_seqlens_q_ptr + group + 1)
    k_start = tl.load(cu_seqlens_k_ptr + group)
    mask_k = tl.arange(0, BLOCK_K) < tl.load(cu_seqlens_k_ptr + group + 1) - k_start
    q_ptr += head * q_stride_head
    k_ptr += head * k_stride_head
    do_ptr += head * do_stride_head
    dq_ptr += head * dq_stride_head
    stats_ptr += head * queries
    rows = tl.cast(queries, tl.int64) * heads
    k = load_rotated_head(k_ptr, k_table_ptr, k_start, mask_k, k_stride_token, HEAD_DIM, BLOCK_HALF)
    v = load_channels(v_ptr + head * v_stride_head, k_start, mask_k, v_stride_token, 0, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_K, 2 * BLOCK_HALF], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for tile in tl.range(q_start, q_end, BLOCK_Q, disable_licm=True):
        mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
        q = load_rotated_head(q_ptr, q_table_ptr, tile, mask_q, q_stride_token, HEAD_DIM, BLOCK_HALF)
        do = load_channels(do_ptr, tile, mask_q, do_stride_token, 0, HEAD_DIM, BLOCK_D)
        m, inverse_l = load_stats(stats_ptr, tile, mask_q, rows)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_Q, BLOCK_K]
        p = weights_of(tl.where(mask_k[None, :], s, float("-inf")), m, inverse_l, scale_log2, 1)
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision="ieee")
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(k.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee")
        dq = tl.dot(ds, k, input_precision="ieee") * scale
        store_rotated_gradient(dq_ptr, dq, q_table_ptr, tile, mask_q, dq_stride_token, HEAD_DIM, BLOCK_HALF)
    store_channels(dv_ptr + head * dv_stride_head, dv, k_start, mask_k, dv_stride_token, 0, HEAD_DIM, BLOCK_D)
    dk_ptr += head * dk_stride_head
    store_rotated_gradient(dk_ptr, dk * scale, k_table_ptr, k_start, mask_k, dk_stride_token, HEAD_DIM, BLOCK_HALF)


def short_backward_config(
    dtype: torch.dtype, head_dim: int, max_seqlen_q: int, max_seqlen_k: int, has_index: bool, capability: int
) -> Config | None:
    """None where this is not the kernel: contexts that several groups read, keys that do not fit, or float32."""
    if dtype == torch.float32 or has_index or head_dim > 64 or max_seqlen_k > 128:
        return None
    block_k = 64 if max_seqlen_k <= 64 else 128
    if max_seqlen_q <= 16:
        # 128 registers let two programs share a processor: one loads while the other computes.
        return Config(16, block_k, 8, max_registers=128, keys_first=True)
    if block_k == 64:
        return Config(64, 64, 8)
    if capability < 90:
        return Config(128, 128, 8) if head_dim <= 32 and max_seqlen_q <= 128 else None
    if max_seqlen_q > 128 or capability != 90:
        return Config(128, 128, 8)
    # One program fills a processor: it loads the tiles of the next head while it computes, in 225 of an H100's 227 KiB.
    return Config(128, 128, 8, num_stages=2, heads=4)


def short_backward(x: Operands, do: Tensor, stats: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, config: Config) -> None:
    """Write dq, dk and dv, whatever their strides."""
    one_tile = x.max_seqlen_q <= config.block_q
    kernel = one_tile_backward_kernel if one_tile else by_queries_backward_kernel
    own = one_tile and x.own and config.block_q == config.block_k
    # With tables of their own for queries and keys, two heads would not fit.
    heads = min(config.heads, heads_per_program(x)) if own else 1
    config = config._replace(heads=heads, num_stages=config.num_stages if heads > 1 else 1)
    arguments = x.arguments(kernel, do=do, stats=stats, dq=dq, dk=dk, dv=dv, **x.packed_tables())
    mode = {"SELF": own} if one_tile else {}
    kernel[(x.groups * (x.heads // heads),)](**arguments, **config.constants(kernel), **mode, **config.options)


def _compile_cases() -> list:
    cases = []

    def case_of(config_of: Callable, heads: int, capability: int) -> Config | None:
        config = config_of(False, capability)
        if config is None or heads > config.heads:
            return None
        return config._replace(heads=heads, num_stages=config.num_stages if heads > 1 else 1)

    for dtype, head_dim, keys in product((torch.bfloat16, torch.float16), HEAD_DIMS, (64, 128)):
        config_of = partial(short_backward_config, dtype, head_dim, 1024, keys, False)
        cases += compile_cases(by_queries_backward_kernel, dtype, head_dim, config_of)
        for queries, own in ((16, False), (keys, False), (keys, True)):
            for heads in (1, 2, 3, 4) if own else (1,):
                config_of = partial(case_of, partial(short_backward_config, dtype, head_dim, queries, keys), heads)
                cases += compile_cases(one_tile_backward_kernel, dtype, head_dim, config_of, SELF=own)
    return cases


COMPILE_CASES = _compile_cases()
