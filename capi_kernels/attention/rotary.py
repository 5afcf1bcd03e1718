"""The rotary embedding of CAPI, y = x cos + rotate_half(x) sin: y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2 on the halves.

The halves have different angles (row and column), so this is no rotation, and its backward is the transpose:
dx1 = g1 c1 + g2 s2, dx2 = g2 c2 - g1 s1.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from capi_kernels import reference
from capi_kernels._checks import check_device, check_heads, check_rotary, check_shape, check_tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor, transpose: bool = False) -> Tensor:
    """Write x cos + rotate_half(x) sin, the tables broadcast, or the transpose of that map of x, to out."""
    if not x.dtype == cos.dtype == sin.dtype == out.dtype:
        wide = torch.promote_types(x.dtype, cos.dtype)
        y = out if out.dtype == wide else torch.empty(out.shape, dtype=wide, device=out.device)
        rotate(x.to(wide), cos.to(wide), sin.to(wide), out=y, transpose=transpose)
        return out if y is out else out.copy_(y)
    return turned(x, (cos, *halves(sin)), out, transpose=transpose)


def halves(x: Tensor) -> Sequence[Tensor]:
    """Of the last axis, as `chunk` gives them in twice the time."""
    half = x.shape[-1] // 2
    return x.split_with_sizes((half, half), -1)


def turned(x: Tensor, turn: Sequence[Tensor] | None, out: Tensor, *, transpose: bool = False) -> Tensor:
    """`rotate` by the cosines and both halves of the sines, all of one dtype, or a copy."""
    if turn is None:
        return out.copy_(x)
    cos, s1, s2 = turn
    torch.mul(x, cos, out=out)
    x1, x2 = halves(x)
    y1, y2 = halves(out)
    if transpose:
        y1.addcmul_(x2, s2)
        y2.addcmul_(x1, s1, value=-1)
    else:
        y1.addcmul_(x2, s1, value=-1)
        y2.addcmul_(x1, s2)
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        return rotate(x, cos, sin, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor | None) -> tuple[Tensor | None, None, None]:
        if dy is None:
            return None, None, None
        cos, sin = ctx.saved_tensors
        dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
        return rotate(dy, cos, sin, out=dx, transpose=True), None, None


def rotary_tables(
    coords: Tensor, freqs: Tensor
) -> tuple[Float[Tensor, "tokens head_dim"], Float[Tensor, "tokens head_dim"]]:
    """cos and sin of coords @ freqs, formed in float32 (float64 if coords are): angles reach 44 radians.

    Args:
        coords: [tokens, 2], row and column of each token.
        freqs: [2, head_dim], in radians per unit of coords.

    Returns:
        cos and sin, [tokens, head_dim].

    Raises:
        TypeError: coords or freqs that are no tensors of floating point.
        ValueError: other shapes, or two devices.
    """
    check_tensor("coords", coords, "tokens 2")
    check_shape("coords", coords, tokens=len(coords), coordinates=2)
    check_tensor("freqs", freqs, "2 head_dim")
    check_shape("freqs", freqs, coordinates=2, head_dim=freqs.shape[1])
    check_device("freqs", freqs, ("coords", coords))
    return reference.rotary_tables(coords, freqs)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Float[Tensor, "tokens heads head_dim"]:
    """x * cos + rotate_half(x) * sin with rotate_half(x) = (-x2, x1) on the halves of a head; gradient to x alone.

    Args:
        x: [tokens, heads, head_dim] with an even head_dim, any floating dtype and strides.
        cos, sin: float32 (float64 with float64 x) [tokens, head_dim], as from `rotary_tables`.

    Returns:
        [tokens, heads, head_dim] in the dtype of x.

    Raises:
        TypeError: x that is no tensor of floating point, tables of another dtype.
        ValueError: other shapes or devices, an odd head_dim.
    """
    check_heads("x", x, "tokens")
    check_rotary(("cos", "sin"), cos, sin, ("x", x))
    return _Rotary.apply(x, cos, sin)
