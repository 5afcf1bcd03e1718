"""Attention over sequences of any length, a tile of keys at a time, forward and backward without atomics.

    forward: m, l, o <- online softmax over key tiles
    backward: delta = rowsum(o do); dS = P (dO V^T - delta); one kernel owns tiles of dq, another tiles of dk and dv

Kernels that read keys again and again find them rotated in advance: a rotation in the loop would read 4 bytes of tables
for each of k. Never written to memory: S, P and their gradients. Every sum has one order, so results repeat bit by bit.

Tensors in float32 come here whatever their lengths: a whole tile of their keys takes too many registers, and products
without the matrix unit take longer than the reads that it would save.
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
    count_readers,
    load_stats,
    new_output,
    next_reader,
    store_stats,
)
from capi_kernels._capability import attends_as, capability
from capi_kernels._packed_rotary_triton import pinned, together
from capi_kernels._rotary_triton import (
    ROTATE_TOKENS,
    load_channels,
    load_rotated,
    rotate_kernel,
    rotated,
    store_channels,
    store_unrotated,
)


@triton.jit
@no_type_check
def tiled_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    stats_ptr,
    q_cos_ptr,
    q_sin_ptr,
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
    tiles,
    queries,
    heads,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per (group, head, tile of queries); q is rotated here, k was before."""
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    # One product over all channels, not one for each half, where both halves together have no padding within.
    WHOLE: tl.constexpr = HEAD_DIM == 2 * BLOCK_HALF and q_ptr.dtype.element_ty != tl.float32
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    group = tl.program_id(0) // tiles // heads
    q_end = tl.load(cu_seqlens_q_ptr + group + 1)
    tile = tl.load(cu_seqlens_q_ptr + group) + tl.program_id(0) % tiles * BLOCK_Q
    if tile >= q_end:
        return
    context = group if kv_index_ptr is None else tl.load(kv_index_ptr + group)
    k_start = tl.load(cu_seqlens_k_ptr + context)
    k_end = tl.load(cu_seqlens_k_ptr + context + 1)
    k_ptr += head * k_stride_head
    v_ptr += head * v_stride_head
    mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
    q1, q2 = load_rotated(
        q_ptr + head * q_stride_head, q_cos_ptr, q_sin_ptr, tile, mask_q, q_stride_token, HEAD_DIM, BLOCK_HALF
    )
    if WHOLE:
        q = pinned(together(q1, q2))
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)  # noqa: E741
    o = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for key in tl.range(k_start, k_end, BLOCK_K, num_stages=STAGES):
        mask_k = tl.arange(0, BLOCK_K) < k_end - key
        v = load_channels(v_ptr, key, mask_k, v_stride_token, 0, HEAD_DIM, BLOCK_D)
        # Padded keys score -inf; zero would still receive weight.
        if WHOLE:
            k = load_channels(k_ptr, key, mask_k, k_stride_token, 0, HEAD_DIM, HEAD_DIM)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_Q, BLOCK_K]
            s = tl.where(mask_k[None, :], s, float("-inf"))
            new_m = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s * scale_log2 - (new_m * scale_log2)[:, None])
        else:
            k1 = load_channels(k_ptr, key, mask_k, k_stride_token, 0, HALF, BLOCK_HALF)
            k2 = load_channels(k_ptr, key, mask_k, k_stride_token, HALF, HEAD_DIM - HALF, BLOCK_HALF)
            s = tl.dot(q1, tl.trans(k1), input_precision="ieee")
            s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee")
            s = tl.where(mask_k[None, :], s, float("-inf"))
            new_m = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2((s - new_m[:, None]) * scale_log2)
        rescale = tl.exp2((m - new_m) * scale_log2)
        l = l * rescale + tl.sum(p, 1)  # noqa: E741
        o = tl.dot(p.to(v.dtype), v, o * rescale[:, None], input_precision="ieee")
        m = new_m
    inverse_l = 1 / tl.where(l > 0, l, 1.0)  # The context may be empty.
    o = o * inverse_l[:, None]
    store_channels(out_ptr + head * out_stride_head, o, tile, mask_q, out_stride_token, 0, HEAD_DIM, BLOCK_D)
    # Of an empty context m must be finite, for -inf - m to stay -inf in the backward.
    m = tl.maximum(m, -1e30)
    store_stats(stats_ptr + head * queries, m, inverse_l, tile, mask_q, tl.cast(queries, tl.int64) * heads)


@triton.jit
@no_type_check
def tiled_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    do_ptr,
    stats_ptr,
    delta_ptr,
    dq_ptr,
    q_cos_ptr,
    q_sin_ptr,
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
    do_stride_token,
    do_stride_head,
    dq_stride_token,
    dq_stride_head,
    tiles,
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
    """One program per (group, head, tile of queries); q and k are rotated. Leaves delta for the other kernel."""
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    group = tl.program_id(0) // tiles // heads
    q_end = tl.load(cu_seqlens_q_ptr + group + 1)
    tile = tl.load(cu_seqlens_q_ptr + group) + tl.program_id(0) % tiles * BLOCK_Q
    if tile >= q_end:
        return
    context = group if kv_index_ptr is None else tl.load(kv_index_ptr + group)
    k_start = tl.load(cu_seqlens_k_ptr + context)
    k_end = tl.load(cu_seqlens_k_ptr + context + 1)
    q_ptr += head * q_stride_head
    k_ptr += head * k_stride_head
    v_ptr += head * v_stride_head
    mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
    q1 = load_channels(q_ptr, tile, mask_q, q_stride_token, 0, HALF, BLOCK_HALF)
    q2 = load_channels(q_ptr, tile, mask_q, q_stride_token, HALF, HEAD_DIM - HALF, BLOCK_HALF)
    out = load_channels(out_ptr + head * out_stride_head, tile, mask_q, out_stride_token, 0, HEAD_DIM, BLOCK_D)
    do = load_channels(do_ptr + head * do_stride_head, tile, mask_q, do_stride_token, 0, HEAD_DIM, BLOCK_D)
    m, inverse_l = load_stats(stats_ptr + head * queries, tile, mask_q, tl.cast(queries, tl.int64) * heads)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    dq1 = tl.zeros([BLOCK_Q, BLOCK_HALF], tl.float32)
    dq2 = tl.zeros([BLOCK_Q, BLOCK_HALF], tl.float32)
    # In float32 the rounding of o would show where few keys hold the weight, and rowsum(P dP) has none of it. What
    # rowsum(o do) lacks is found on the way and added in the end, dq - (rowsum(P dP) - rowsum(o do)) P K.
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    if EXACT:
        rest = tl.zeros([BLOCK_Q], tl.float32)
        pk1 = tl.zeros([BLOCK_Q, BLOCK_HALF], tl.float32)
        pk2 = tl.zeros([BLOCK_Q, BLOCK_HALF], tl.float32)
    for key in range(k_start, k_end, BLOCK_K):
        mask_k = tl.arange(0, BLOCK_K) < k_end - key
        k1 = load_channels(k_ptr, key, mask_k, k_stride_token, 0, HALF, BLOCK_HALF)
        k2 = load_channels(k_ptr, key, mask_k, k_stride_token, HALF, HEAD_DIM - HALF, BLOCK_HALF)
        v = load_channels(v_ptr, key, mask_k, v_stride_token, 0, HEAD_DIM, BLOCK_D)
        s = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee")  # [BLOCK_Q, BLOCK_K]
        s = tl.where(mask_k[None, :], s, float("-inf"))
        p = tl.exp2((s - m[:, None]) * scale_log2) * inverse_l[:, None]
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(k1.dtype)
        dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
        dq2 = tl.dot(ds, k2, dq2, input_precision="ieee")
        if EXACT:
            rest += tl.sum(ds, 1)
            pk1 = tl.dot(p, k1, pk1, input_precision="ieee")
            pk2 = tl.dot(p, k2, pk2, input_precision="ieee")
    if EXACT:
        dq1 -= rest[:, None] * pk1
        dq2 -= rest[:, None] * pk2
        delta += rest
    tl.store(delta_ptr + head * queries + tile + tl.arange(0, BLOCK_Q), delta, mask=mask_q)
    dq_ptr += head * dq_stride_head
    store_unrotated(
        dq_ptr, dq1 * scale, dq2 * scale, q_cos_ptr, q_sin_ptr, tile, mask_q, dq_stride_token, HEAD_DIM, BLOCK_HALF
    )


@triton.jit
@no_type_check
def tiled_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    stats_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
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
    do_stride_token,
    do_stride_head,
    dk_stride_token,
    dk_stride_head,
    dv_stride_token,
    dv_stride_head,
    tiles,
    groups,
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
    """One program per (context, head, tile of keys), over the groups that read the context; q and k are rotated."""
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    context = tl.program_id(0) // tiles // heads
    k_end = tl.load(cu_seqlens_k_ptr + context + 1)
    key = tl.load(cu_seqlens_k_ptr + context) + tl.program_id(0) % tiles * BLOCK_K
    if key >= k_end:
        return
    q_ptr += head * q_stride_head
    k_ptr += head * k_stride_head
    do_ptr += head * do_stride_head
    mask_k = tl.arange(0, BLOCK_K) < k_end - key
    k1 = load_channels(k_ptr, key, mask_k, k_stride_token, 0, HALF, BLOCK_HALF)
    k2 = load_channels(k_ptr, key, mask_k, k_stride_token, HALF, HEAD_DIM - HALF, BLOCK_HALF)
    v = load_channels(v_ptr + head * v_stride_head, key, mask_k, v_stride_token, 0, HEAD_DIM, BLOCK_D)
    dk1 = tl.zeros([BLOCK_K, BLOCK_HALF], tl.float32)
    dk2 = tl.zeros([BLOCK_K, BLOCK_HALF], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    readers = 1 if kv_index_ptr is None else count_readers(kv_index_ptr, groups, context)
    group = context if kv_index_ptr is None else -1
    for _ in range(readers):
        if kv_index_ptr is not None:
            group = next_reader(kv_index_ptr, groups, context, group)
        q_end = tl.load(cu_seqlens_q_ptr + group + 1)
        for tile in range(tl.load(cu_seqlens_q_ptr + group), q_end, BLOCK_Q):
            mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
            q1 = load_channels(q_ptr, tile, mask_q, q_stride_token, 0, HALF, BLOCK_HALF)
            q2 = load_channels(q_ptr, tile, mask_q, q_stride_token, HALF, HEAD_DIM - HALF, BLOCK_HALF)
            do = load_channels(do_ptr, tile, mask_q, do_stride_token, 0, HEAD_DIM, BLOCK_D)
            m, inverse_l = load_stats(stats_ptr + head * queries, tile, mask_q, tl.cast(queries, tl.int64) * heads)
            delta = tl.load(delta_ptr + head * queries + tile + tl.arange(0, BLOCK_Q), mask=mask_q, other=0.0)
            s = tl.dot(k1, tl.trans(q1), input_precision="ieee")
            s = tl.dot(k2, tl.trans(q2), s, input_precision="ieee")  # [BLOCK_K, BLOCK_Q]
            s = tl.where(mask_k[:, None], s, float("-inf"))
            p = tl.exp2((s - m[None, :]) * scale_log2) * inverse_l[None, :]
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = (p * (dp - delta[None, :])).to(q1.dtype)
            dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
            dk2 = tl.dot(ds, q2, dk2, input_precision="ieee")
    dk_ptr += head * dk_stride_head
    store_unrotated(
        dk_ptr, dk1 * scale, dk2 * scale, k_cos_ptr, k_sin_ptr, key, mask_k, dk_stride_token, HEAD_DIM, BLOCK_HALF
    )
    store_channels(dv_ptr + head * dv_stride_head, dv, key, mask_k, dv_stride_token, 0, HEAD_DIM, BLOCK_D)


def forward_config(dtype: torch.dtype, head_dim: int, max_seqlen_q: int) -> Config:
    wide = head_dim > 64
    if dtype == torch.float32:
        return Config(32, 32, 8 if wide else 4)
    if max_seqlen_q <= 16:
        return Config(16, 64, 4, num_stages=2)
    stages = 2 if wide else 3
    if max_seqlen_q <= 320:  # 272 tokens fill 5 tiles of 64, or 3 of 128.
        return Config(64, 64, 4, num_stages=stages)
    return Config(128, 64, 8, num_stages=stages)


def dq_config(dtype: torch.dtype, head_dim: int, capability: int) -> Config:
    wide = head_dim > 64
    if dtype == torch.float32:
        return Config(16, 16, 8) if wide else Config(16, 32, 4)
    return Config(64, 32 if wide else 64, 8 if wide and capability < 90 else 4, num_stages=2)


def dkdv_config(dtype: torch.dtype, head_dim: int, capability: int) -> Config:
    wide = head_dim > 64
    if dtype == torch.float32:
        return Config(32, 16, 8 if wide else 4, max_registers=168 if wide else 128)
    if wide:
        return Config(16, 32 if capability < 90 else 64, 8, num_stages=2)
    # A limit of 255 keeps the assembler from a lower one of its own, which would spill.
    if head_dim <= 32:
        return Config(32, 64, 4, max_registers=255, num_stages=2)
    if capability == 90:
        return Config(32, 64, 4, num_stages=2)
    return Config(32, 64, 8, max_registers=255 if capability >= 100 else None, num_stages=2)


def tiled_forward(x: Operands, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """o [queries, heads, head_dim] and, [2, heads, queries] in float32, m and 1 / l."""
    out, stats = new_output(x)
    config = config or forward_config(x.q.dtype, x.head_dim, x.max_seqlen_q)
    x = x._replace(k=rotated(x.k, x.k_cos, x.k_sin))
    tiles = triton.cdiv(x.max_seqlen_q, config.block_q)
    tiled_forward_kernel[(tiles * x.heads * x.groups,)](
        **x.arguments(tiled_forward_kernel, out=out, stats=stats),
        tiles=tiles,
        **config.constants(tiled_forward_kernel),
        **config.options,
    )
    return out, stats


def tiled_backward(x: Operands, do: Tensor, out: Tensor, stats: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Write dq, dk and dv, whatever their strides."""
    for_dq = dq_config(x.q.dtype, x.head_dim, attends_as(capability(x.q.device)))
    for_dkdv = dkdv_config(x.q.dtype, x.head_dim, attends_as(capability(x.q.device)))
    delta = torch.empty_like(stats[0])
    x = x._replace(q=rotated(x.q, x.q_cos, x.q_sin), k=rotated(x.k, x.k_cos, x.k_sin))
    tiles = triton.cdiv(x.max_seqlen_q, for_dq.block_q)
    tiled_dq_kernel[(tiles * x.heads * x.groups,)](
        **x.arguments(tiled_dq_kernel, do=do, out=out, stats=stats, delta=delta, dq=dq),
        tiles=tiles,
        **for_dq.constants(tiled_dq_kernel),
        **for_dq.options,
    )
    tiles = triton.cdiv(x.max_seqlen_k, for_dkdv.block_k)
    tiled_dkdv_kernel[(tiles * x.heads * x.contexts,)](
        **x.arguments(tiled_dkdv_kernel, do=do, stats=stats, delta=delta, dk=dk, dv=dv),
        tiles=tiles,
        **for_dkdv.constants(tiled_dkdv_kernel),
        **for_dkdv.options,
    )


def _compile_cases() -> list:
    cases = []
    for dtype, head_dim in product((torch.bfloat16, torch.float16, torch.float32), HEAD_DIMS):
        cases.append(compile_case(rotate_kernel, dtype, head_dim, Config(ROTATE_TOKENS, 1, 4)))
        for indexed in (False, True):
            for queries in (16, 320, 4096)[: 1 if dtype == torch.float32 else None]:
                config = forward_config(dtype, head_dim, queries)
                cases.append(compile_case(tiled_forward_kernel, dtype, head_dim, config, indexed))
            for kernel, config_of in ((tiled_dq_kernel, dq_config), (tiled_dkdv_kernel, dkdv_config)):
                cases += compile_cases(kernel, dtype, head_dim, partial(config_of, dtype, head_dim), indexed)
    return cases


COMPILE_CASES = _compile_cases()
