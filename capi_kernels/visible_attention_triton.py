"""o_i = sum_j softmax_j(rope(q_i) . rope(k_j) scale) v_j over the tokens of one image, and its gradients.

Up to 320 tokens an image (128 in the backward) a program holds all keys and values of a head; longer images, and all in
float32, pass in tiles (`_attention_launch_triton`).
"""

import torch
from torch import Tensor

from capi_kernels._attention_launch_triton import attention_backward, attention_forward
from capi_kernels._attention_triton import Operands, as_operand, operands


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
    return attention_forward(_operands(q, k, v, cos, sin, cu_seqlens, max_seqlen, scale))


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
    attention_backward(x, as_operand(do), out, stats, *dqkv.unbind(1))
    return dqkv
