"""Attention of short contexts, forward: o = softmax(rope(q) rope(k)^T scale) v, all keys of a head on chip.

Each key is rotated once; tiles of queries pass, and see whole rows, so that nothing is rescaled. Never written to
memory: scores, weights, the rotated q and k.
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
    Config,
    Operands,
    compile_case,
    compile_cases,
    new_output,
    store_stats,
)
from capi_kernels._packed_rotary_triton import PACK_TOKENS, load_rotated_head, pack_kernel
from capi_kernels._rotary_triton import load_channels, store_channels

FEW = 16  # Queries that one instruction takes.


@triton.jit
@no_type_check
def short_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    stats_ptr,
    q_table_ptr,
    k_table_ptr,
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
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One program per (group, head); its keys are one tile, or two, which need not come to a power of two."""
    group = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    context = group if kv_index_ptr is None else tl.load(kv_index_ptr + group)
    q_start = tl.load(cu_seqlens_q_ptr + group)
    q_end = tl.load(cu_seqlens_q_ptr + group + 1)
    k_start = tl.load(cu_seqlens_k_ptr + context)
    k_end = tl.load(cu_seqlens_k_ptr + context + 1)
    q_ptr += head * q_stride_head
    k_ptr += head * k_stride_head
    v_ptr += head * v_stride_head
    out_ptr += head * out_stride_head
    stats_ptr += head * queries
    rows = tl.cast(queries, tl.int64) * heads
    mask_k = tl.arange(0, BLOCK_K) < k_end - k_start
    k = load_rotated_head(k_ptr, k_table_ptr, k_start, mask_k, k_stride_token, HEAD_DIM, BLOCK_HALF)
    v = load_channels(v_ptr, k_start, mask_k, v_stride_token, 0, HEAD_DIM, BLOCK_D)
    if TAIL > 0:
        tail = k_start + BLOCK_K
        tail_mask = tl.arange(0, TAIL) < k_end - tail
        tail_k = load_rotated_head(k_ptr, k_table_ptr, tail, tail_mask, k_stride_token, HEAD_DIM, BLOCK_HALF)
        tail_v = load_channels(v_ptr, tail, tail_mask, v_stride_token, 0, HEAD_DIM, BLOCK_D)
    # Hoisting the addresses of all tiles out of the loop would spill.
    for tile in tl.range(q_start, q_end, BLOCK_Q, disable_licm=True):
        mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
        q = load_rotated_head(q_ptr, q_table_ptr, tile, mask_q, q_stride_token, HEAD_DIM, BLOCK_HALF)
        # Padded keys score -inf; zero would still receive weight. The context may be empty.
        s = tl.where(mask_k[None, :], tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
        m = tl.maximum(tl.max(s, 1), -1e30)
        if TAIL > 0:
            tail_s = tl.dot(q, tl.trans(tail_k), input_precision="ieee")
            tail_s = tl.where(tail_mask[None, :], tail_s, float("-inf"))
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
        store_channels(out_ptr, o * inverse_l[:, None], tile, mask_q, out_stride_token, 0, HEAD_DIM, BLOCK_D)
        store_stats(stats_ptr, m, inverse_l, tile, mask_q, rows)


@triton.jit
@no_type_check
def few_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    stats_ptr,
    q_table_ptr,
    k_table_ptr,
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
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (group, head) of at most BLOCK_Q queries: the long sides of S^T = K Q^T are keys."""
    group = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    context = group if kv_index_ptr is None else tl.load(kv_index_ptr + group)
    q_start = tl.load(cu_seqlens_q_ptr + group)
    k_start = tl.load(cu_seqlens_k_ptr + context)
    mask_q = tl.arange(0, BLOCK_Q) < tl.load(cu_seqlens_q_ptr + group + 1) - q_start
    mask_k = tl.arange(0, BLOCK_K) < tl.load(cu_seqlens_k_ptr + context + 1) - k_start
    q_ptr += head * q_stride_head
    k_ptr += head * k_stride_head
    v_ptr += head * v_stride_head
    k = load_rotated_head(k_ptr, k_table_ptr, k_start, mask_k, k_stride_token, HEAD_DIM, BLOCK_HALF)
    v = load_channels(v_ptr, k_start, mask_k, v_stride_token, 0, HEAD_DIM, BLOCK_D)
    q = load_rotated_head(q_ptr, q_table_ptr, q_start, mask_q, q_stride_token, HEAD_DIM, BLOCK_HALF)
    # Padded keys score -inf; zero would still receive weight. The context may be empty.
    s = tl.where(mask_k[:, None], tl.dot(k, tl.trans(q), input_precision="ieee"), float("-inf"))  # [BLOCK_K, BLOCK_Q]
    m = tl.maximum(tl.max(s, 0), -1e30)
    p = tl.exp2(s * scale_log2 - (m * scale_log2)[None, :])
    l = tl.sum(p, 0)  # noqa: E741
    inverse_l = 1 / tl.where(l > 0, l, 1.0)
    p = p * inverse_l[None, :]
    # o^T = V^T P: on its long side are the channels.
    o = tl.trans(tl.dot(tl.trans(v), p.to(v.dtype), input_precision="ieee"))
    store_channels(out_ptr + head * out_stride_head, o, q_start, mask_q, out_stride_token, 0, HEAD_DIM, BLOCK_D)
    store_stats(stats_ptr + head * queries, m, inverse_l, q_start, mask_q, tl.cast(queries, tl.int64) * heads)


def short_forward_config(
    dtype: torch.dtype, head_dim: int, max_seqlen_q: int, max_seqlen_k: int, capability: int
) -> Config | None:
    """None where the keys do not fit: too many, or float32, whose products take no matrix unit."""
    wide = head_dim > 64
    if dtype == torch.float32 or max_seqlen_k > (128 if wide else 192 if capability < 90 else 320):
        return None
    if max_seqlen_q <= FEW and max_seqlen_k <= 128:
        # Eight warps: with four, an H100 has taken kernels of this kind (Triton 3.6.0) to wrong results.
        return Config(FEW, 64 if max_seqlen_k <= 64 else 128, 8, keys_first=True)
    if max_seqlen_k <= 64:
        return Config(64, 64, 8 if wide else 4)
    if wide:
        return Config(64, 128, 8)
    if max_seqlen_k <= 128:
        # 128 registers let four programs share a processor: one loads while the others compute.
        return Config(64, 128, 4, max_registers=128 if capability >= 90 else None)
    if max_seqlen_k <= 192:
        return Config(64, 128, 4, tail=64)
    # The 256 patches of a whole image, then with its class token and registers.
    tail = next(n for n in (0, 16, 64) if max_seqlen_k <= 256 + n)
    return Config(64, 256, 4 if capability == 90 else 8, tail=tail)


def short_forward(x: Operands, config: Config) -> tuple[Tensor, Tensor]:
    """o [queries, heads, head_dim] and, [2, heads, queries] in float32, m and 1 / l."""
    out, stats = new_output(x)
    kernel = few_forward_kernel if config.keys_first else short_forward_kernel
    arguments = x.arguments(kernel, out=out, stats=stats, **x.packed_tables())
    kernel[(x.groups * x.heads,)](**arguments, **config.constants(kernel), **config.options)
    return out, stats


def _compile_cases() -> list:
    cases = []
    for dtype, head_dim in product((torch.bfloat16, torch.float16), HEAD_DIMS):
        cases.append(compile_case(pack_kernel, dtype, head_dim, Config(PACK_TOKENS, 1, 4)))
        for keys, indexed in product((64, 128, 192, 256, 272, 320), (False, True)):
            config_of = partial(short_forward_config, dtype, head_dim, 128, keys)
            cases += compile_cases(short_forward_kernel, dtype, head_dim, config_of, indexed)
        for keys, indexed in product((64, 128), (False, True)):
            config_of = partial(short_forward_config, dtype, head_dim, FEW, keys)
            cases += compile_cases(few_forward_kernel, dtype, head_dim, config_of, indexed)
    return cases


COMPILE_CASES = _compile_cases()
