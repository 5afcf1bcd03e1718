"""P_ij = softmax_j(rope(q_i) . rope(k_j) scale) over the context that i's group reads, written out, and its gradients.

    dS = P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q

Keys fill the long side of the matrix instructions (S^T = K Q^T), queries are padded to 16. A program holds all keys of
a context; in the backward it meets the groups that read them in order: no atomics, one result. Never written to memory:
scores, their gradients, the rotated q and k. Longer contexts, and float32, whose products take no matrix unit, are left
to PyTorch's operations (`_padded_weights`).
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
    compile_cases,
    count_readers,
    heads_per_program,
    next_reader,
    operands,
)
from capi_kernels._capability import attends_as, capability
from capi_kernels._padded_weights import (
    padded_attention_weights,
    padded_attention_weights_backward,
    padded_operands,
)
from capi_kernels._rotary_triton import load_rotated, store_unrotated

ROW = 16  # Rows of P start at multiples of 16 elements: aligned for vectors, here and in the products that follow.


@triton.jit
@no_type_check
def places(place, offs_k, stride_query):  # -> [len(offs_k), len(place)]
    return place[None, :] * stride_query + offs_k[:, None]


@triton.jit
@no_type_check
def weights_forward_kernel(
    q_ptr,
    k_ptr,
    weights_ptr,
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
    weights_stride_group,
    weights_stride_head,
    weights_stride_query,
    heads,
    heads_per_program,
    max_seqlen_q,
    max_seqlen_k,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (group, a few heads), which find the context's tables in the L1 cache after the first of them."""
    programs = tl.cdiv(heads, heads_per_program)
    group = tl.program_id(0) // programs
    first_head = tl.program_id(0) % programs * heads_per_program
    context = group if kv_index_ptr is None else tl.load(kv_index_ptr + group)
    q_start = tl.load(cu_seqlens_q_ptr + group)
    queries = tl.load(cu_seqlens_q_ptr + group + 1) - q_start
    k_start = tl.load(cu_seqlens_k_ptr + context)
    keys = tl.load(cu_seqlens_k_ptr + context + 1) - k_start
    weights_ptr += tl.cast(group, tl.int64) * weights_stride_group
    # Hoisting the addresses of all tiles out of these loops would spill.
    for head in tl.range(first_head, min(first_head + heads_per_program, heads), disable_licm=True):
        head = tl.cast(head, tl.int64)
        k_head = k_ptr + head * k_stride_head
        mask_k = tl.arange(0, BLOCK_K) < keys
        k1, k2 = load_rotated(k_head, k_cos_ptr, k_sin_ptr, k_start, mask_k, k_stride_token, HEAD_DIM, BLOCK_HALF)
        for tile in tl.range(0, max_seqlen_q, BLOCK_Q, disable_licm=True):
            q_head = q_ptr + head * q_stride_head
            mask_q = tl.arange(0, BLOCK_Q) < queries - tile
            q1, q2 = load_rotated(
                q_head, q_cos_ptr, q_sin_ptr, q_start + tile, mask_q, q_stride_token, HEAD_DIM, BLOCK_HALF
            )
            s = tl.dot(k1, tl.trans(q1), input_precision="ieee")
            s = tl.dot(k2, tl.trans(q2), s, input_precision="ieee")  # [BLOCK_K, BLOCK_Q]
            # Padded keys score -inf; zero would still receive weight. The context may be empty.
            s = tl.where(mask_k[:, None], s, float("-inf"))
            m = tl.maximum(tl.max(s, 0), -1e30)
            p = tl.exp2((s - m[None, :]) * scale_log2)
            l = tl.sum(p, 0)  # noqa: E741
            p = p * tl.where(mask_q, 1 / tl.where(l > 0, l, 1.0), 0.0)[None, :]
            place = tile + tl.arange(0, BLOCK_Q)
            offs_k = tl.arange(0, BLOCK_K)
            inside = (offs_k < max_seqlen_k)[:, None] & (place < max_seqlen_q)[None, :]
            ptrs = weights_ptr + head * weights_stride_head + places(place, offs_k, weights_stride_query)
            tl.store(ptrs, p.to(weights_ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def weights_backward_kernel(
    q_ptr,
    k_ptr,
    weights_ptr,
    dweights_ptr,
    dq_ptr,
    dk_ptr,
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
    weights_stride_group,
    weights_stride_head,
    weights_stride_query,
    dweights_stride_group,
    dweights_stride_head,
    dweights_stride_query,
    dq_stride_token,
    dq_stride_head,
    dk_stride_token,
    dk_stride_head,
    groups,
    heads,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (context, head): its keys stay on chip while the groups that read it pass in order."""
    context = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    q_ptr += head * q_stride_head
    dq_ptr += head * dq_stride_head
    weights_ptr += head * weights_stride_head
    dweights_ptr += head * dweights_stride_head
    k_start = tl.load(cu_seqlens_k_ptr + context)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < tl.load(cu_seqlens_k_ptr + context + 1) - k_start
    k1, k2 = load_rotated(
        k_ptr + head * k_stride_head, k_cos_ptr, k_sin_ptr, k_start, mask_k, k_stride_token, HEAD_DIM, BLOCK_HALF
    )
    dk1 = tl.zeros([BLOCK_K, BLOCK_HALF], tl.float32)
    dk2 = tl.zeros([BLOCK_K, BLOCK_HALF], tl.float32)
    readers = 1 if kv_index_ptr is None else count_readers(kv_index_ptr, groups, context)
    group = context if kv_index_ptr is None else -1
    for _ in range(readers):
        if kv_index_ptr is not None:
            group = next_reader(kv_index_ptr, groups, context, group)
        q_start = tl.load(cu_seqlens_q_ptr + group)
        q_end = tl.load(cu_seqlens_q_ptr + group + 1)
        weights_group = weights_ptr + tl.cast(group, tl.int64) * weights_stride_group
        dweights_group = dweights_ptr + tl.cast(group, tl.int64) * dweights_stride_group
        for tile in tl.range(q_start, q_end, BLOCK_Q, disable_licm=True):
            mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
            inside = mask_k[:, None] & mask_q[None, :]
            place = tile - q_start + tl.arange(0, BLOCK_Q)
            # Padding has no gradient, whatever stands there.
            p = tl.load(weights_group + places(place, offs_k, weights_stride_query), mask=inside, other=0.0)
            dp = tl.load(dweights_group + places(place, offs_k, dweights_stride_query), mask=inside, other=0.0)
            p, dp = p.to(tl.float32), dp.to(tl.float32)
            ds = (p * (dp - tl.sum(p * dp, 0)[None, :])).to(k1.dtype)  # [BLOCK_K, BLOCK_Q]
            q1, q2 = load_rotated(q_ptr, q_cos_ptr, q_sin_ptr, tile, mask_q, q_stride_token, HEAD_DIM, BLOCK_HALF)
            dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
            dk2 = tl.dot(ds, q2, dk2, input_precision="ieee")
            dq1 = tl.dot(tl.trans(ds), k1, input_precision="ieee") * scale
            dq2 = tl.dot(tl.trans(ds), k2, input_precision="ieee") * scale
            store_unrotated(dq_ptr, dq1, dq2, q_cos_ptr, q_sin_ptr, tile, mask_q, dq_stride_token, HEAD_DIM, BLOCK_HALF)
    dk_ptr += head * dk_stride_head
    store_unrotated(
        dk_ptr, dk1 * scale, dk2 * scale, k_cos_ptr, k_sin_ptr, k_start, mask_k, dk_stride_token, HEAD_DIM, BLOCK_HALF
    )


def config_for(dtype: torch.dtype, head_dim: int, max_seqlen_k: int, capability: int) -> Config | None:
    """None where the keys do not fit: too many, or float32."""
    if dtype == torch.float32 or max_seqlen_k > RESIDENT_KEYS:
        return None
    # Warps that compile without spills on every target; where registers are short, no limit but that of the hardware.
    most = 255 if capability < 90 else None
    if max_seqlen_k <= 64:
        return Config(16, 64, 4 if 32 < head_dim <= 64 else 8, most)
    return Config(16, 128, 4 if head_dim <= 32 else 8, most)


def forward_config(dtype: torch.dtype, head_dim: int, max_seqlen_k: int, capability: int) -> Config | None:
    """That of the backward but for registers: 128 let two programs share a processor."""
    config = config_for(dtype, head_dim, max_seqlen_k, capability)
    if config is None:
        return None
    return config._replace(max_registers=128 if max_seqlen_k > 64 and 32 < head_dim <= 64 else None)


def _operands(
    q: Tensor,
    k: Tensor,
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
) -> Operands:
    tables = (q_cos, q_sin, k_cos, k_sin)
    # k stands for the values, which no kernel here reads.
    return operands(q, k, k, *tables, cu_seqlens_q, cu_seqlens_k, kv_index, max_seqlen_q, max_seqlen_k, scale)


def _padded_operands(x: Operands) -> tuple:
    cu_seqlens, max_seqlens = (x.cu_seqlens_q, x.cu_seqlens_k), (x.max_seqlen_q, x.max_seqlen_k)
    tables, layouts = padded_operands(x.q, x.k, (x.q_cos, x.q_sin, x.k_cos, x.k_sin), cu_seqlens, max_seqlens)
    return x.q, x.k, tables, layouts, x.kv_index, x.scale


def as_rows(x: Tensor) -> Tensor:
    """x [groups, heads, queries, keys] with contiguous rows: itself, or a copy where 32-bit offsets do not reach."""
    return x if x.stride(3) == 1 and 0 <= x.stride(2) * x.shape[2] < 2**31 else x.contiguous()


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Of [groups, heads, queries, keys]."""
    axes = ("group", "head", "query")
    return {f"{name}_stride_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate(axes)}


def cross_attention_weights_forward(q: Tensor, k: Tensor, *rest) -> Tensor:
    """P [groups, heads, max_seqlen_q, max_seqlen_k], in memory [groups, max_seqlen_q, heads, ROW or a multiple]."""
    x = _operands(q, k, *rest)
    row = triton.cdiv(x.max_seqlen_k, ROW) * ROW
    weights = torch.empty((x.groups, x.max_seqlen_q, x.heads, row), dtype=q.dtype, device=q.device)
    weights = weights.transpose(1, 2)[..., : x.max_seqlen_k]
    config = forward_config(q.dtype, x.head_dim, x.max_seqlen_k, attends_as(capability(q.device)))
    if config is None:
        return weights.copy_(padded_attention_weights(*_padded_operands(x)))
    share = heads_per_program(x)
    weights_forward_kernel[(x.groups * x.heads // share,)](
        **x.arguments(weights_forward_kernel, weights=weights),
        **_strides(weights=weights),
        heads_per_program=share,
        max_seqlen_q=x.max_seqlen_q,
        max_seqlen_k=x.max_seqlen_k,
        BLOCK_Q=config.block_q,
        BLOCK_K=config.block_k,
        **config.options,
    )
    return weights


def cross_attention_weights_backward(
    dweights: Tensor, weights: Tensor, q: Tensor, k: Tensor, *rest
) -> tuple[Tensor, Tensor]:
    """dq [queries, heads, head_dim] and dk [context, heads, head_dim]."""
    x = _operands(q, k, *rest)
    config = config_for(q.dtype, x.head_dim, x.max_seqlen_k, attends_as(capability(q.device)))
    if config is None:
        return padded_attention_weights_backward(dweights, weights, *_padded_operands(x))
    dweights, weights = as_rows(dweights), as_rows(weights)
    dq, dk = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (q, k))
    weights_backward_kernel[(x.contexts * x.heads,)](
        **x.arguments(weights_backward_kernel, weights=weights, dweights=dweights, dq=dq, dk=dk),
        **_strides(weights=weights, dweights=dweights),
        BLOCK_Q=config.block_q,
        BLOCK_K=config.block_k,
        **config.options,
    )
    return dq, dk


def _compile_cases() -> list:
    cases = []
    for dtype, head_dim, keys, indexed in product((torch.bfloat16, torch.float16), HEAD_DIMS, (64, 128), (False, True)):
        for kernel, config_of in ((weights_forward_kernel, forward_config), (weights_backward_kernel, config_for)):
            config_of = partial(config_of, dtype, head_dim, keys)
            for case in compile_cases(kernel, dtype, head_dim, config_of, indexed):
                # The rows of dP are as long as there are keys.
                case[2].update({name: "i32?" for name in case[2] if name.startswith("dweights_stride")})
                cases.append(case)
    return cases


COMPILE_CASES = _compile_cases()
