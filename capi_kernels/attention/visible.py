"""Self-attention over packed visible tokens: o_i = sum_j softmax_j(rope(q_i) . rope(k_j) scale) v_j within an image."""

from jaxtyping import Float
from torch import Tensor

from capi_kernels._autocast import cast_inputs
from capi_kernels._checks import (
    check_cu_seqlens,
    check_heads,
    check_not_empty,
    check_positive,
    check_rotary,
    check_shape,
    check_tensor,
)
from capi_kernels.attention.operation import attention


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
    return attention(q, k, v, cos, sin, None, None, cu_seqlens, None, None, max_seqlen, max_seqlen, scale)


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
    return attention(qkv, None, None, cos, sin, None, None, cu_seqlens, None, None, max_seqlen, max_seqlen, scale)
