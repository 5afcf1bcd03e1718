"""o_i = sum_j softmax_j(rope(q_i) . rope(k_j) scale) v_j over the context that i's group reads, and its gradients.

Few queries over about a hundred keys: a program holds all keys and values of a head of a context, up to 320 (128 in the
backward), whose programs own them: no atomics. Longer contexts and all in float32 pass in tiles
(`_attention_launch_triton`).
"""

import torch
from torch import Tensor

from capi_kernels._attention_launch_triton import attention_backward, attention_forward
from capi_kernels._attention_triton import as_operand, operands


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
    return attention_forward(x)


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
    attention_backward(x, as_operand(do), out, stats, dq, *dkv.unbind(1))
    return dq, dkv
