"""o_i = sum_j softmax_j(rope(q_i) . rope(k_j) scale) v_j over the tokens of one image, and its gradients.

Up to 128 tokens an image a program holds all keys and values of a head, forward and backward; longer images, and all in
float32, pass in tiles (`_tiled_attention_triton`). Never written to memory: scores, weights, rotated q and k of others.
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
    store_stats,
)
from capi_kernels._capability import attends_as, capability
from capi_kernels._rotary_triton import load_channels, load_rotated, store_channels
from capi_kernels._tiled_attention_triton import tiled_backward, tiled_forward


@triton.jit
@no_type_check
def resident_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    stats_ptr,
    q_cos_ptr,
    q_sin_ptr,
    cu_seqlens_q_ptr,
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
    """One program per (image, a few heads), which find the image's tables in the L1 cache after the first of them."""
    programs = tl.cdiv(heads, heads_per_program)
    image = tl.program_id(0) // programs
    first_head = tl.program_id(0) % programs * heads_per_program
    start = tl.load(cu_seqlens_q_ptr + image)
    end = tl.load(cu_seqlens_q_ptr + image + 1)
    # Hoisting the addresses of all tiles out of these loops would spill.
    for head in tl.range(first_head, min(first_head + heads_per_program, heads), disable_licm=True):
        head = tl.cast(head, tl.int64)
        k_head = k_ptr + head * k_stride_head
        mask_k = tl.arange(0, BLOCK_K) < end - start
        k1, k2 = load_rotated(k_head, q_cos_ptr, q_sin_ptr, start, mask_k, k_stride_token, HEAD_DIM, BLOCK_HALF)
        v = load_channels(v_ptr + head * v_stride_head, start, mask_k, v_stride_token, 0, HEAD_DIM, BLOCK_D)
        for tile in tl.range(start, end, BLOCK_Q, disable_licm=True):
            q_head = q_ptr + head * q_stride_head
            mask_q = tl.arange(0, BLOCK_Q) < end - tile
            q1, q2 = load_rotated(q_head, q_cos_ptr, q_sin_ptr, tile, mask_q, q_stride_token, HEAD_DIM, BLOCK_HALF)
            s = tl.dot(q1, tl.trans(k1), input_precision="ieee")
            s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee")  # [BLOCK_Q, BLOCK_K]
            # Padded keys score -inf; zero would still receive weight.
            s = tl.where(mask_k[None, :], s, float("-inf"))
            m = tl.max(s, 1)
            p = tl.exp2((s - m[:, None]) * scale_log2)
            inverse_l = 1 / tl.sum(p, 1)
            o = tl.dot(p.to(v.dtype), v, input_precision="ieee") * inverse_l[:, None]
            store_channels(out_ptr + head * out_stride_head, o, tile, mask_q, out_stride_token, 0, HEAD_DIM, BLOCK_D)
            store_stats(stats_ptr + head * queries, m, inverse_l, tile, mask_q, tl.cast(queries, tl.int64) * heads)


def forward_config(dtype: torch.dtype, head_dim: int, max_seqlen: int, capability: int) -> Config | None:
    """None where an image does not fit one tile: too many tokens, wide heads, or float32."""
    if dtype == torch.float32 or head_dim > 64 or max_seqlen > RESIDENT_KEYS:
        return None
    if max_seqlen <= 64:
        return Config(64, 64, 4)
    # 128 registers let two programs share a processor: one loads while the other computes.
    return Config(128, 128, 8, max_registers=128 if capability == 90 else None)


def resident_forward(x: Operands, config: Config) -> tuple[Tensor, Tensor]:
    out, stats = new_output(x)
    share = heads_per_program(x)
    resident_forward_kernel[(x.groups * x.heads // share,)](
        **x.arguments(resident_forward_kernel, out=out, stats=stats),
        heads_per_program=share,
        BLOCK_Q=config.block_q,
        BLOCK_K=config.block_k,
        **config.options,
    )
    return out, stats


def _operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> Operands:
    return operands(q, k, v, cos, sin, cos, sin, cu_seqlens, cu_seqlens, None, max_seqlen, max_seqlen, scale)


def visible_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o [tokens, heads, head_dim] and what the backward needs, [2, heads, tokens]."""
    x = _operands(q, k, v, cos, sin, cu_seqlens, max_seqlen, scale)
    config = forward_config(q.dtype, x.head_dim, max_seqlen, attends_as(capability(q.device)))
    return tiled_forward(x) if config is None else resident_forward(x, config)


def visible_attention_backward(
    do: Tensor,
    out: Tensor,
    stats: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """dq, dk and dv in one buffer [tokens, 3, heads, head_dim]."""
    x = _operands(q, k, v, cos, sin, cu_seqlens, max_seqlen, scale)
    dqkv = torch.empty((len(q), 3, x.heads, x.head_dim), dtype=q.dtype, device=q.device)
    dq, dk, dv = dqkv.unbind(1)
    config = backward_config(q.dtype, x.head_dim, max_seqlen, False, attends_as(capability(q.device)))
    if config is None:
        tiled_backward(x, as_operand(do), out, stats, dq, dk, dv)
    else:
        resident_backward(x, as_operand(do), stats, dq, dk, dv, config)
    return dqkv


def _compile_cases() -> list:
    cases = []
    for dtype, tokens, head_dim in product((torch.bfloat16, torch.float16), (64, 128), HEAD_DIMS):
        config_of = partial(forward_config, dtype, head_dim, tokens)
        cases += compile_cases(resident_forward_kernel, dtype, head_dim, config_of)
    return cases


COMPILE_CASES = _compile_cases()
