"""The weights of attention from packed queries to packed context: P_ij = softmax_j(rope(q_i) . rope(k_j) scale).

Values carry no rotary embedding, so that their projection can follow the weighted sum, head by head:
o = P v = P (X W_v^T) = (P X) W_v^T. With few queries this is the cheaper order: for 8 queries over 106 keys of 1024
channels 23 GFLOP a layer and 512 images in place of 114; the two are even at about 41 queries. P X is a plain batched
product of [heads queries, keys] and [keys, channels]; this op gives the P. Its name in the policies of selective
activation checkpointing is `capi_kernels::cross_attention_weights`.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from capi_kernels._autocast import cast_inputs, register_autocast
from capi_kernels._autograd import apply_of
from capi_kernels._checks import check_heads, check_shape, check_tensor
from capi_kernels.attention.masked_cross import check_operands
from capi_kernels.attention.padded_weights import (
    padded_attention_weights,
    padded_attention_weights_backward,
    padded_operands,
)

OPERANDS = (
    "Tensor q, Tensor k, Tensor? q_cos, Tensor? q_sin, Tensor? k_cos, Tensor? k_sin, Tensor cu_seqlens_q,"
    " Tensor cu_seqlens_k, Tensor? kv_index, SymInt max_seqlen_q, SymInt max_seqlen_k, float scale"
)
OP = "capi_kernels::cross_attention_weights"
torch.library.define(OP, f"({OPERANDS}) -> Tensor weights")
torch.library.define(f"{OP}_backward", f"(Tensor dweights, Tensor weights, {OPERANDS}) -> (Tensor dq, Tensor dk)")
register_autocast(OP, 2)


@torch.library.impl(OP, "CPU")
def _(q, k, *operands):
    *tables, cu_seqlens_q, cu_seqlens_k, kv_index, max_seqlen_q, max_seqlen_k, scale = operands
    where = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return padded_attention_weights(q, k, *padded_operands(q, k, tables, *where), kv_index, scale)


@torch.library.impl(f"{OP}_backward", "CPU")
def _(dweights, weights, q, k, *operands):
    *tables, cu_seqlens_q, cu_seqlens_k, kv_index, max_seqlen_q, max_seqlen_k, scale = operands
    where = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    padded = padded_operands(q, k, tables, *where)
    return padded_attention_weights_backward(dweights, weights, q, k, *padded, kv_index, scale)


@torch.library.impl(OP, "CUDA")
def _(*operands):
    from capi_kernels.attention.weights_triton import weights_forward

    with torch.cuda.device_of(operands[0]):
        return weights_forward(*operands)


@torch.library.impl(f"{OP}_backward", "CUDA")
def _(dweights, *operands):
    from capi_kernels.attention.weights_triton import weights_backward

    with torch.cuda.device_of(dweights):
        return weights_backward(dweights, *operands)


@torch.library.register_fake(OP)
def _(q, k, q_cos, q_sin, k_cos, k_sin, cu_seqlens_q, cu_seqlens_k, kv_index, max_seqlen_q, max_seqlen_k, scale):
    groups, heads = cu_seqlens_q.shape[0] - 1, q.shape[1]  # len would fix the number.
    shape = (groups, heads, max_seqlen_q, max_seqlen_k)
    if q.device.type == "cpu":
        return q.new_empty(shape)
    row = (max_seqlen_k + 15) // 16 * 16
    return q.new_empty_strided(shape, (max_seqlen_q * heads * row, row, heads * row, 1))


@torch.library.register_fake(f"{OP}_backward")
def _(dweights, weights, q, k, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    *tensors, max_seqlen_q, max_seqlen_k, scale = inputs
    ctx.options = max_seqlen_q, max_seqlen_k, scale
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output, *tensors)


def _backward(ctx: FunctionCtx, dweights: Tensor | None) -> tuple[Tensor | None, ...]:
    if dweights is None:
        return (None,) * 12
    grads = torch.ops.capi_kernels.cross_attention_weights_backward(dweights, *ctx.saved_tensors, *ctx.options)
    return *grads, *[None] * 10


torch.library.register_autograd(OP, _backward, setup_context=_setup_context)


class _CrossAttentionWeights(torch.autograd.Function):
    """The op once more, in the form that torch.func knows."""

    @staticmethod
    def forward(  # Named: without gradients Dynamo counts them.
        q, k, q_cos, q_sin, k_cos, k_sin, cu_seqlens_q, cu_seqlens_k, kv_index, max_seqlen_q, max_seqlen_k, scale
    ):
        tables, where = (q_cos, q_sin, k_cos, k_sin), (cu_seqlens_q, cu_seqlens_k, kv_index)
        return torch.ops.capi_kernels.cross_attention_weights(q, k, *tables, *where, max_seqlen_q, max_seqlen_k, scale)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(once_differentiable(_backward))


_apply = apply_of(_CrossAttentionWeights)


def cross_attention_weights(
    q: Tensor,
    k: Tensor,
    q_cos: Tensor | None,
    q_sin: Tensor | None,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    kv_index: Tensor | None = None,
    scale: float | None = None,
) -> Float[Tensor, "groups heads max_seqlen_q max_seqlen_k"]:
    """The weight of every token of a context for every query of a group that reads it, rotary embedding inside.

    Those of `masked_cross_attention` (the predictor of arXiv 2502.08769), for a caller that takes the weighted sum.
    A product with [contexts, max_seqlen_k, channels] may pad that with anything finite.

    Args:
        q: [queries, heads, head_dim], any floating dtype and strides; groups follow each other.
        k: [context, heads, head_dim] of the dtype of q, any strides; contexts follow each other.
        q_cos, q_sin, k_cos, k_sin: float32 (float64 with float64 q) [queries or context, head_dim] as from
            `rotary_tables`, without gradient; None, None embeds nothing.
        cu_seqlens_q, cu_seqlens_k: int32 [groups + 1] and [contexts + 1], where each group and context starts, then the
            token count; a group or context may be empty.
        max_seqlen_q, max_seqlen_k: at least the tokens of the longest group and context.
        kv_index: int32 or int64 [groups], the context of each group; several groups may read one. By default group g
            reads context g.
        scale: of the scores; 1 / sqrt(head_dim) by default.

    Returns:
        [groups, heads, max_seqlen_q, max_seqlen_k] in the dtype of q (under autocast, which casts q and k, in its
        dtype), zero where a query or a key is padding. Gradients reach q and k (zero in contexts that nobody reads);
        what the gradient of the weights holds at padding is not read. On a GPU the heads of a query stand together in
        memory, so that weighted sums of all channels do, in rows that start at multiples of 16 elements, and Triton
        kernels serve float16 and bfloat16 up to 128 keys a context; other cases are PyTorch's operations.

    Raises:
        TypeError: what is no tensor, or another dtype.
        ValueError: other shapes or devices, an odd head_dim under a rotary embedding, a maximum that is too small, a
            scale that is not positive and finite, groups and contexts that differ in number without kv_index,
            cu_seqlens that do not start at 0, decrease, or do not end at the token count, kv_index out of range (values
            are looked at on a CPU only); on a GPU a head_dim above 128.
    """
    q, k = cast_inputs(q, k)
    check_heads("q", q, "queries")
    _, heads, head_dim = q.shape
    check_tensor("k", k, "context heads head_dim", like=("q", q))
    check_shape("k", k, context=k.shape[0], heads=heads, head_dim=head_dim)
    tables, where = (q_cos, q_sin, k_cos, k_sin), (cu_seqlens_q, cu_seqlens_k, kv_index)
    scale = head_dim**-0.5 if scale is None else scale
    check_operands(q, k, tables, where, max_seqlen_q, max_seqlen_k, scale)
    return _apply(q, k, *tables, *where, max_seqlen_q, max_seqlen_k, scale)
