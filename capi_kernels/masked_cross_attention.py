"""Attention of packed queries to packed context: o_i = sum_j softmax_j(rope(q_i) . rope(k_j) scale) v_j.

The j are the tokens of the context that the group of query i reads. The ops `capi_kernels::masked_cross_attention` and
`capi_kernels::masked_cross_attention_backward` are opaque to torch.compile and go by these names in the policies of
selective activation checkpointing: saving the first spares its recomputation.
"""

from inspect import signature

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from capi_kernels._attention_cpu import attention, attention_backward
from capi_kernels._autocast import cast_inputs, register_autocast
from capi_kernels._checks import (
    check_cu_seqlens,
    check_heads,
    check_index,
    check_positive,
    check_rotary,
    check_shape,
    check_tensor,
)

OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_cos, Tensor? q_sin, Tensor? k_cos, Tensor? k_sin, Tensor cu_seqlens_q,"
    " Tensor cu_seqlens_k, Tensor? kv_index, SymInt max_seqlen_q, SymInt max_seqlen_k, float scale"
)
OP = "capi_kernels::masked_cross_attention"
# Saved is what the backward needs of each row and, on a CPU, the rotated k, many times the queries, in float32 or
# wider. dk and dv come in one buffer.
torch.library.define(OP, f"({OPERANDS}) -> (Tensor out, Tensor[] saved)")
torch.library.define(
    f"{OP}_backward", f"(Tensor do, Tensor out, Tensor[] saved, {OPERANDS}) -> (Tensor dq, Tensor dkv)"
)
register_autocast(OP, 3)


def keeps_rotated(k: Tensor, cos: Tensor | None) -> bool:
    """Whether a CPU keeps k as it rotated it."""
    return cos is not None and torch.promote_types(k.dtype, torch.float32) == k.dtype


@torch.library.impl(OP, "CPU")
def _(q, k, v, *operands):
    *tables, cu_seqlens_q, cu_seqlens_k, kv_index, _, _, scale = operands
    out, logsumexp, rotated = attention(q, k, v, tables, (cu_seqlens_q, cu_seqlens_k, kv_index), scale)
    return out, [logsumexp, rotated] if keeps_rotated(k, tables[2]) else [logsumexp]


@torch.library.impl(f"{OP}_backward", "CPU")
def _(do, out, saved, q, k, v, *operands):
    *tables, cu_seqlens_q, cu_seqlens_k, kv_index, _, _, scale = operands
    where = (cu_seqlens_q, cu_seqlens_k, kv_index)
    logsumexp, *rotated = saved
    dq, dkv = attention_backward(do, out, logsumexp, q, k, v, tables, where, scale, (1, 2), *rotated)
    return dq.squeeze(1), dkv


@torch.library.impl(OP, "CUDA")
def _(*operands):
    from capi_kernels.masked_cross_attention_triton import masked_cross_attention_forward

    with torch.cuda.device_of(operands[0]):
        out, stats = masked_cross_attention_forward(*operands)
    return out, [stats]


@torch.library.impl(f"{OP}_backward", "CUDA")
def _(do, out, saved, *operands):
    from capi_kernels.masked_cross_attention_triton import masked_cross_attention_backward

    with torch.cuda.device_of(do):
        return masked_cross_attention_backward(do, out, *saved, *operands)


@torch.library.register_fake(OP)
def _(q, k, v, q_cos, q_sin, k_cos, k_sin, cu_seqlens_q, cu_seqlens_k, kv_index, max_seqlen_q, max_seqlen_k, scale):
    queries, heads, _ = q.shape
    if q.device.type == "cpu":
        saved = [q.new_empty((queries, heads), dtype=torch.promote_types(q.dtype, torch.float32))]
        saved += [k.new_empty(k.shape)] if keeps_rotated(k, k_cos) else []
    else:
        saved = [q.new_empty((2, heads, queries), dtype=torch.float32)]
    return q.new_empty(q.shape), saved


@torch.library.register_fake(f"{OP}_backward")
def _(do, out, saved, q, k, *_):
    context, heads, head_dim = k.shape
    return q.new_empty(q.shape), k.new_empty((context, 2, heads, head_dim))


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
    *tensors, max_seqlen_q, max_seqlen_k, scale = inputs
    ctx.options = max_seqlen_q, max_seqlen_k, scale
    out, *saved = output
    if isinstance(saved[0], list):  # From the op itself.
        (saved,) = saved
    else:
        ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, out, *saved)


def _backward(ctx: FunctionCtx, do: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 13
    everything = ctx.saved_tensors  # May be asked for only once.
    *tensors, out = everything[:11]
    saved = everything[11:]
    dq, dkv = torch.ops.capi_kernels.masked_cross_attention_backward(do, out, saved, *tensors, *ctx.options)
    return dq, *dkv.unbind(1), *[None] * 10


torch.library.register_autograd(OP, _backward, setup_context=_setup_context)


class _MaskedCrossAttention(torch.autograd.Function):
    """The op once more, in the form that torch.func knows."""

    @staticmethod
    def forward(  # Named: without gradients Dynamo counts them.
        q, k, v, q_cos, q_sin, k_cos, k_sin, cu_seqlens_q, cu_seqlens_k, kv_index, max_seqlen_q, max_seqlen_k, scale
    ):
        tables, where = (q_cos, q_sin, k_cos, k_sin), (cu_seqlens_q, cu_seqlens_k, kv_index)
        operands = (*tables, *where, max_seqlen_q, max_seqlen_k, scale)
        out, saved = torch.ops.capi_kernels.masked_cross_attention(q, k, v, *operands)
        return out, *saved

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(once_differentiable(_backward))


# PyTorch looks for it at each call.
_MaskedCrossAttention.forward.__signature__ = signature(_MaskedCrossAttention.forward)


class _KVPacked(torch.autograd.Function):
    """The op on views of one tensor, whose gradient is the buffer of the backward itself: nothing is copied."""

    @staticmethod
    def forward(
        q, kv, q_cos, q_sin, k_cos, k_sin, cu_seqlens_q, cu_seqlens_k, kv_index, max_seqlen_q, max_seqlen_k, scale
    ):
        tables, where = (q_cos, q_sin, k_cos, k_sin), (cu_seqlens_q, cu_seqlens_k, kv_index)
        operands = (*tables, *where, max_seqlen_q, max_seqlen_k, scale)
        out, saved = torch.ops.capi_kernels.masked_cross_attention(q, *kv.unbind(1), *operands)
        return out, *saved

    setup_context = staticmethod(_setup_context)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, *_):
        if do is None:
            return (None,) * 12
        everything = ctx.saved_tensors
        q, kv, *tensors, out = everything[:10]
        operands = (q, *kv.unbind(1), *tensors, *ctx.options)
        grads = torch.ops.capi_kernels.masked_cross_attention_backward(do, out, everything[10:], *operands)
        return *grads, *[None] * 10


def check_operands(
    q: Tensor,
    k: Tensor,
    tables: tuple[Tensor | None, ...],
    where: tuple[Tensor, Tensor, Tensor | None],
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> None:
    """What every attention from groups to contexts asks of its operands but q, k and v; where: cu_seqlens, kv_index."""
    q_cos, q_sin, k_cos, k_sin = tables
    cu_seqlens_q, cu_seqlens_k, kv_index = where
    check_rotary(("q_cos", "q_sin"), q_cos, q_sin, ("q", q))
    check_rotary(("k_cos", "k_sin"), k_cos, k_sin, ("k", k))
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "max_seqlen_q", max_seqlen_q, q.shape[0], ("q", q))
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", max_seqlen_k, k.shape[0], ("k", k))
    groups, contexts = len(cu_seqlens_q) - 1, len(cu_seqlens_k) - 1
    if kv_index is not None:
        check_index("kv_index", kv_index, contexts, ("q", q))
        check_shape("kv_index", kv_index, groups=groups)
    elif groups != contexts:
        raise ValueError(f"without kv_index every group needs a context: got {groups} groups and {contexts} contexts")
    check_positive(scale=scale)


def masked_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
) -> Float[Tensor, "queries heads head_dim"]:
    """Attention of every query to the context of its group, rotary embedding inside; queries never see each other.

    The predictor of arXiv 2502.08769: queries are mask tokens, a group is an image, its context the encoder's output.

    Args:
        q: [queries, heads, head_dim], any floating dtype and strides; groups follow each other.
        k, v: [context, heads, head_dim] of the dtype of q; contexts follow each other.
        q_cos, q_sin, k_cos, k_sin: float32 (float64 with float64 q) [queries or context, head_dim] as from
            `rotary_tables`, without gradient; None, None embeds nothing. On a GPU half-precision q and k with contexts
            of up to 320 tokens read them rounded to float16: off by at most 2^-12, a sixteenth of how far q in
            bfloat16 is rounded, half as far as in float16.
        cu_seqlens_q, cu_seqlens_k: int32 [groups + 1] and [contexts + 1], where each group and context starts, then the
            token count; a group or context may be empty, and the output of queries without context is zero.
        max_seqlen_q, max_seqlen_k: at least the tokens of the longest group and context.
        kv_index: int32 or int64 [groups], the context of each group; several groups may read one. By default group g
            reads context g.
        scale: of the scores; 1 / sqrt(head_dim) by default.

    Returns:
        [queries, heads, head_dim] in the dtype of q (under autocast, which casts q, k and v, in its dtype), with
        gradients to q, k and v (zero in contexts that nobody reads).

    Raises:
        TypeError: what is no tensor, another dtype, or float64 on a GPU.
        ValueError: other shapes or devices, an odd head_dim under a rotary embedding, a maximum that is too small, a
            scale that is not positive and finite, groups and contexts that differ in number without kv_index,
            cu_seqlens that do not start at 0, decrease, or do not end at the token count, kv_index out of range (values
            are looked at on a CPU only), on a GPU a head_dim above 128.
    """
    q, k, v = cast_inputs(q, k, v)
    check_heads("q", q, "queries")
    check_tensor("k", k, "context heads head_dim", like=("q", q))
    context, (_, heads, head_dim) = k.shape[0], q.shape
    check_shape("k", k, context=context, heads=heads, head_dim=head_dim)
    check_tensor("v", v, "context heads head_dim", like=("q", q))
    check_shape("v", v, context=context, heads=heads, head_dim=head_dim)
    tables, where = (q_cos, q_sin, k_cos, k_sin), (cu_seqlens_q, cu_seqlens_k, kv_index)
    scale = head_dim**-0.5 if scale is None else scale
    check_operands(q, k, tables, where, max_seqlen_q, max_seqlen_k, scale)
    return _MaskedCrossAttention.apply(q, k, v, *tables, *where, max_seqlen_q, max_seqlen_k, scale)[0]


def masked_cross_attention_kvpacked(
    q: Tensor,
    kv: Tensor,
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
) -> Float[Tensor, "queries heads head_dim"]:
    """`masked_cross_attention` with kv[:, 0] as k and kv[:, 1] as v, whose one gradient is written once.

    Args:
        q: [queries, heads, head_dim], any floating dtype and strides.
        kv: [context, 2, heads, head_dim] of the dtype of q, any strides.
        q_cos, q_sin, k_cos, k_sin, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, kv_index, scale: as in
            `masked_cross_attention`.

    Returns:
        [queries, heads, head_dim], with gradients to q and kv, that of kv contiguous: no copy assembles it.

    Raises:
        TypeError, ValueError: as in `masked_cross_attention`.
    """
    q, kv = cast_inputs(q, kv)
    check_heads("q", q, "queries")
    check_tensor("kv", kv, "context 2 heads head_dim", like=("q", q))
    _, heads, head_dim = q.shape
    check_shape("kv", kv, context=kv.shape[0], parts=2, heads=heads, head_dim=head_dim)
    tables, where = (q_cos, q_sin, k_cos, k_sin), (cu_seqlens_q, cu_seqlens_k, kv_index)
    scale = head_dim**-0.5 if scale is None else scale
    check_operands(q, kv[:, 0], tables, where, max_seqlen_q, max_seqlen_k, scale)
    return _KVPacked.apply(q, kv, *tables, *where, max_seqlen_q, max_seqlen_k, scale)[0]
