"""Self-attention over packed visible tokens: o_i = sum_j softmax_j(rope(q_i) . rope(k_j) scale) v_j within an image."""

from jaxtyping import Float
from torch import Tensor

from capi_kernels._checks import check_cu_seqlens, check_heads, check_positive, check_rotary, check_shape, check_tensor
from capi_kernels._padded_attention import PaddedAttention, layout_of


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
            None embeds nothing.
        cu_seqlens: int32 [images + 1], where each image starts, then the token count; an image may be empty.
        max_seqlen: at least the tokens of the longest image.
        scale: of the scores; 1 / sqrt(head_dim) by default.

    Returns:
        [tokens, heads, head_dim], with gradients to q, k and v.

    Raises:
        TypeError: another dtype.
        ValueError: other shapes or devices, an odd head_dim under a rotary embedding, a max_seqlen that is too small, a
            scale that is not positive and finite, cu_seqlens that do not start at 0, decrease, or do not end at the
            token count (values are looked at on a CPU only).
    """
    check_heads("q", q, "tokens")
    tokens, heads, head_dim = q.shape
    for name, x in (("k", k), ("v", v)):
        check_tensor(name, x, "tokens heads head_dim", like=("q", q))
        check_shape(name, x, tokens=tokens, heads=heads, head_dim=head_dim)
    check_rotary(("cos", "sin"), cos, sin, ("q", q))
    check_cu_seqlens("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, tokens, ("q", q))
    scale = head_dim**-0.5 if scale is None else scale
    check_positive(scale=scale)
    layout = layout_of(cu_seqlens, max_seqlen, tokens)
    return PaddedAttention.apply(q, k, v, cos, sin, cos, sin, layout, layout, None, scale)
