"""Self-attention over packed visible tokens: o_i = sum_j softmax_j(rope(q_i) . rope(k_j) scale) v_j within an image.

The ops `capi_kernels::visible_attention` and `capi_kernels::visible_attention_backward` are opaque to torch.compile and
go by these names in the policies of selective activation checkpointing: saving the first spares its recomputation.
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
    check_not_empty,
    check_positive,
    check_rotary,
    check_shape,
    check_tensor,
)

OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor cu_seqlens, SymInt max_seqlen, float scale"
OP = "capi_kernels::visible_attention"
# Saved is what the backward needs of each row. All gradients come in one buffer.
torch.library.define(OP, f"({OPERANDS}) -> (Tensor out, Tensor[] saved)")
torch.library.define(f"{OP}_backward", f"(Tensor do, Tensor out, Tensor[] saved, {OPERANDS}) -> Tensor dqkv")
register_autocast(OP, 3)


@torch.library.impl(OP, "CPU")
def _(q, k, v, cos, sin, cu_seqlens, max_seqlen, scale):
    out, logsumexp, _ = attention(q, k, v, (cos, sin) * 2, (cu_seqlens, cu_seqlens, None), scale)
    return out, [logsumexp]


@torch.library.impl(f"{OP}_backward", "CPU")
def _(do, out, saved, q, k, v, cos, sin, cu_seqlens, max_seqlen, scale):
    where = (cu_seqlens, cu_seqlens, None)
    (dqkv,) = attention_backward(do, out, *saved, q, k, v, (cos, sin) * 2, where, scale, (3,))
    return dqkv


@torch.library.impl(OP, "CUDA")
def _(*operands):
    from capi_kernels.visible_attention_triton import visible_attention_forward

    with torch.cuda.device_of(operands[0]):
        out, stats = visible_attention_forward(*operands)
    return out, [stats]


@torch.library.impl(f"{OP}_backward", "CUDA")
def _(do, out, saved, *operands):
    from capi_kernels.visible_attention_triton import visible_attention_backward

    with torch.cuda.device_of(do):
        return visible_attention_backward(do, out, *saved, *operands)


@torch.library.register_fake(OP)
def _(q, k, v, cos, sin, cu_seqlens, max_seqlen, scale):
    tokens, heads, _ = q.shape
    if q.device.type == "cpu":
        stats = q.new_empty((tokens, heads), dtype=torch.promote_types(q.dtype, torch.float32))
    else:
        stats = q.new_empty((2, heads, tokens), dtype=torch.float32)
    return q.new_empty(q.shape), [stats]


@torch.library.register_fake(f"{OP}_backward")
def _(do, out, saved, q, *_):
    tokens, heads, head_dim = q.shape
    return q.new_empty((tokens, 3, heads, head_dim))


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.max_seqlen, ctx.scale = inputs
    out, *saved = output
    if isinstance(saved[0], list):  # From the op itself.
        (saved,) = saved
    else:
        ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, out, *saved)


def _backward(ctx: FunctionCtx, do: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 8
    q, k, v, cos, sin, cu_seqlens, out, *saved = ctx.saved_tensors
    operands = (q, k, v, cos, sin, cu_seqlens, ctx.max_seqlen, ctx.scale)
    dqkv = torch.ops.capi_kernels.visible_attention_backward(do, out, saved, *operands)
    return *dqkv.unbind(1), None, None, None, None, None


torch.library.register_autograd(OP, _backward, setup_context=_setup_context)


class _VisibleAttention(torch.autograd.Function):
    """The op once more, in the form that torch.func knows."""

    @staticmethod
    def forward(q, k, v, cos, sin, cu_seqlens, max_seqlen, scale):  # Named: without gradients Dynamo counts them.
        out, saved = torch.ops.capi_kernels.visible_attention(q, k, v, cos, sin, cu_seqlens, max_seqlen, scale)
        return out, *saved

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(once_differentiable(_backward))


# PyTorch looks for it at each call.
_VisibleAttention.forward.__signature__ = signature(_VisibleAttention.forward)


class _QKVPacked(torch.autograd.Function):
    """The op on views of one tensor, whose gradient is the buffer of the backward itself: nothing is copied."""

    @staticmethod
    def forward(qkv, cos, sin, cu_seqlens, max_seqlen, scale):
        q, k, v = qkv.unbind(1)
        out, saved = torch.ops.capi_kernels.visible_attention(q, k, v, cos, sin, cu_seqlens, max_seqlen, scale)
        return out, *saved

    setup_context = staticmethod(_setup_context)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, *_):
        if do is None:
            return (None,) * 6
        qkv, cos, sin, cu_seqlens, out, *saved = ctx.saved_tensors
        operands = (*qkv.unbind(1), cos, sin, cu_seqlens, ctx.max_seqlen, ctx.scale)
        dqkv = torch.ops.capi_kernels.visible_attention_backward(do, out, saved, *operands)
        return dqkv, None, None, None, None, None


def visible_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
) -> Float[Tensor, "tokens heads head_dim"]:
    """Attention of every token to the tokens of its image, rotary embedding of q and k inside (arXiv 2502.08769).

    Args:
        q, k, v: [tokens, heads, head_dim], any one floating dtype, any strides; images follow each other.
        cos, sin: float32 (float64 with float64 q) [tokens, head_dim] as from `rotary_tables`, without gradient; None,
            None embeds nothing. On a GPU half-precision q and k of images of up to 320 tokens read them rounded to
            float16: off by at most 2^-12, a sixteenth of how far q in bfloat16 is rounded, half as far as in float16.
        cu_seqlens: int32 [images + 1], where each image starts, then the token count; an image may be empty.
        max_seqlen: at least the tokens of the longest image.
        scale: of the scores; 1 / sqrt(head_dim) by default.

    Returns:
        [tokens, heads, head_dim] in the dtype of q (under autocast, which casts q, k and v, in its dtype), with
        gradients to q, k and v.

    Raises:
        TypeError: what is no tensor, another dtype, or float64 on a GPU.
        ValueError: other shapes or devices, an odd head_dim under a rotary embedding, a max_seqlen that is too small, a
            scale that is not positive and finite, cu_seqlens that do not start at 0, decrease, or do not end at the
            token count (values are looked at on a CPU only), on a GPU a head_dim above 128.
    """
    q, k, v = cast_inputs(q, k, v)
    check_heads("q", q, "tokens")
    tokens, heads, head_dim = q.shape
    for name, x in (("k", k), ("v", v)):
        check_tensor(name, x, "tokens heads head_dim", like=("q", q))
        check_shape(name, x, tokens=tokens, heads=heads, head_dim=head_dim)
    check_rotary(("cos", "sin"), cos, sin, ("q", q))
    check_cu_seqlens("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, tokens, ("q", q))
    scale = head_dim**-0.5 if scale is None else scale
    check_positive(scale=scale)
    return _VisibleAttention.apply(q, k, v, cos, sin, cu_seqlens, max_seqlen, scale)[0]


def visible_attention_qkvpacked(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
) -> Float[Tensor, "tokens heads head_dim"]:
    """`visible_attention` of qkv[:, 0], qkv[:, 1] and qkv[:, 2], with one gradient that is written once.

    Args:
        qkv: [tokens, 3, heads, head_dim], any floating dtype and strides.
        cos, sin, cu_seqlens, max_seqlen, scale: as in `visible_attention`.

    Returns:
        [tokens, heads, head_dim], with a gradient to qkv, contiguous, that no copy assembles.

    Raises:
        TypeError, ValueError: as in `visible_attention`.
    """
    (qkv,) = cast_inputs(qkv)
    check_tensor("qkv", qkv, "tokens 3 heads head_dim")
    tokens, _, heads, head_dim = qkv.shape
    check_shape("qkv", qkv, tokens=tokens, parts=3, heads=heads, head_dim=head_dim)
    check_not_empty("qkv", heads=heads, head_dim=head_dim)
    check_rotary(("cos", "sin"), cos, sin, ("qkv", qkv[:, 0]))
    check_cu_seqlens("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, tokens, ("qkv", qkv))
    scale = head_dim**-0.5 if scale is None else scale
    check_positive(scale=scale)
    return _QKVPacked.apply(qkv, cos, sin, cu_seqlens, max_seqlen, scale)[0]
