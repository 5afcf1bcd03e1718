"""Attention of packed groups in plain PyTorch, padded to [groups, heads, length, head_dim].

    P = softmax(rope(q) rope(k)^T scale), o = P v
    dv = P^T do, dP = do v^T, dS = P (dP - rowsum(P dP)), drope(q) = dS rope(k) scale, drope(k) = dS^T rope(q) scale

Short sequences make the explicit product faster on a CPU than PyTorch's tiled attention. The rotary embedding writes
straight into the padded layout, its transpose into the buffer of the gradients; the scale is a factor of the products.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from capi_kernels._rotary import rotate


class Layout(NamedTuple):
    """Where the packed tokens of `groups` groups lie in [groups, length]."""

    groups: int
    length: int
    place: Tensor | None  # int64 [tokens]: flat place of each token; None where every group is full
    mask: Tensor | None  # [groups, length]: which places hold a token


def layout_of(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> Layout:
    """The layout of packed tokens, without waiting for the device."""
    groups = len(cu_seqlens) - 1
    if tokens == groups * max_seqlen:
        return Layout(groups, max_seqlen, None, None)
    lengths = cu_seqlens.diff()
    shift = torch.arange(groups, device=cu_seqlens.device) * max_seqlen - cu_seqlens[:-1]
    place = torch.arange(tokens, device=cu_seqlens.device) + shift.repeat_interleave(lengths, output_size=tokens)
    return Layout(groups, max_seqlen, place, torch.arange(max_seqlen, device=cu_seqlens.device) < lengths.unsqueeze(1))


def _pad(x: Tensor, layout: Layout) -> Tensor:
    """[tokens, ...] to [groups, length, ...], zeros where there is no token."""
    if layout.place is not None:
        x = x.new_zeros((layout.groups * layout.length, *x.shape[1:])).index_copy_(0, layout.place, x)
    return x.unflatten(0, (layout.groups, layout.length))


def unpad(x: Tensor, layout: Layout) -> Tensor:
    """[groups, length, ...] to [tokens, ...], of padding nothing; a view where there is none."""
    x = x.flatten(0, 1)
    return x if layout.place is None else x.index_select(0, layout.place)


def pad_tables(tables: Sequence[Tensor | None], layout: Layout) -> tuple[Tensor | None, ...]:
    return tuple(None if table is None else _pad(table, layout) for table in tables)


def _heads(x: Tensor, cos: Tensor | None, sin: Tensor | None, layout: Layout) -> Tensor:
    """Packed [tokens, heads, head_dim] to padded [groups, heads, length, head_dim], rotated."""
    x = _pad(x, layout).transpose(1, 2)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # A copy in any case: what an op returns must be none of its operands.
    return out.copy_(x) if cos is None else rotate(x, cos.unsqueeze(1), sin.unsqueeze(1), out=out)


def _write(dx: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor) -> None:
    """The transpose of `_heads`, written to padded [groups, length, heads, head_dim]."""
    dx = dx.transpose(1, 2)
    if cos is None:
        out.copy_(dx)
    else:
        rotate(dx, cos.unsqueeze(2), sin.unsqueeze(2), out=out, transpose=True)


def _bmm(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Scaled product of [groups, heads, m, n] and [groups, heads, n, p]; matmul would look for broadcasts."""
    out = torch.empty((*a.shape[:3], b.shape[3]), dtype=a.dtype, device=a.device)
    out.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1), beta=0, alpha=scale)
    return out


def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor | None],
    layouts: tuple[Layout, Layout],
    kv_index: Tensor | None,
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    """o, packed, and for the backward the padded q and k, rotated, v and P; the tables are padded."""
    layout_q, layout_k = layouts
    q = _heads(q, *tables[:2], layout_q)
    k, v, mask = _heads(k, *tables[2:], layout_k), _heads(v, None, None, layout_k), layout_k.mask
    if kv_index is not None:
        k, v, mask = (x if x is None else x.index_select(0, kv_index) for x in (k, v, mask))
    scores = _bmm(q, k.mT, scale)
    if mask is not None:
        # A finite score: a group without keys then averages the zeros of its padding, where -inf gives NaN.
        scores.masked_fill_(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
    P = torch.softmax(scores, -1)
    out = torch.empty((layout_q.groups, layout_q.length, *q.shape[1::2]), dtype=q.dtype, device=q.device)
    _write(_bmm(P, v), None, None, out)
    return unpad(out, layout_q), [q, k, v, P]


def padded_attention_backward(
    do: Tensor,
    saved: Sequence[Tensor],
    tables: Sequence[Tensor | None],
    layouts: tuple[Layout, Layout],
    kv_index: Tensor | None,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write dq, dk and dv, padded [groups, length, heads, head_dim], whatever their strides; the tables are padded."""
    q, k, v, P = saved
    layout_q, layout_k = layouts
    do = _heads(do, None, None, layout_q)
    dS = torch.ops.aten._softmax_backward_data(_bmm(do, v.mT), P, -1, P.dtype)
    _write(_bmm(dS, k, scale), *tables[:2], dq)
    for dx, product, dx_tables in ((dk, _bmm(dS.mT, q, scale), tables[2:]), (dv, _bmm(P.mT, do), (None, None))):
        if kv_index is not None:
            product = product.new_zeros((layout_k.groups, *product.shape[1:])).index_add_(0, kv_index, product)
        _write(product, *dx_tables, dx)


def padded_shapes(groups, heads, max_seqlen_q, max_seqlen_k, head_dim) -> tuple[tuple, ...]:
    """Of what `padded_attention` saves; the sizes may be symbols."""
    keys = (groups, heads, max_seqlen_k, head_dim)
    return (groups, heads, max_seqlen_q, head_dim), keys, keys, (groups, heads, max_seqlen_q, max_seqlen_k)
