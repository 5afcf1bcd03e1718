"""Attention of packed groups in plain PyTorch, padded to [groups, heads, length, head_dim].

    P = softmax(rope(q) rope(k)^T scale), o = P v
    dv = P^T do, dP = do v^T, dS = P (dP - rowsum(P dP)), drope(q) = dS rope(k) scale, drope(k) = dS^T rope(q) scale

Short sequences make the explicit product faster on a CPU than PyTorch's tiled attention. The rotary embedding writes
straight into the padded layout, and the scale rides on the tables of q.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from capi_kernels._rotary import rotate, transposed


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


def _unpad(x: Tensor, layout: Layout) -> Tensor:
    x = x.flatten(0, 1)
    return x if layout.place is None else x.index_select(0, layout.place)


def _heads(x: Tensor, cos: Tensor | None, sin: Tensor | None, layout: Layout) -> Tensor:
    """Packed [tokens, heads, head_dim] to padded [groups, heads, length, head_dim], rotated."""
    x = _pad(x, layout).transpose(1, 2)
    # A copy in any case: what an op returns must be none of its operands.
    return (
        x.clone(memory_format=torch.contiguous_format) if cos is None else rotate(x, cos.unsqueeze(1), sin.unsqueeze(1))
    )


def _tokens(dx: Tensor, cos: Tensor | None, sin: Tensor | None, layout: Layout) -> Tensor:
    """The transpose of `_heads`."""
    dx = dx.transpose(1, 2)
    if cos is not None:
        dx = rotate(dx, cos.unsqueeze(2), transposed(sin).unsqueeze(2))
    return _unpad(dx.contiguous(), layout)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """Product of [groups, heads, m, n] and [groups, heads, n, p]; matmul would look for broadcasts."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _padded_tables(
    tables: Sequence[Tensor | None], layouts: tuple[Layout, Layout], scale: float
) -> list[Tensor | None]:
    """The tables of q, with the scale, and those of k."""
    q_tables = [None if table is None else _pad(table, layouts[0]) * scale for table in tables[:2]]
    return q_tables + [None if table is None else _pad(table, layouts[1]) for table in tables[2:]]


def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor | None],
    layouts: tuple[Layout, Layout],
    kv_index: Tensor | None,
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    """o, packed, and for the backward the padded q and k, rotated, v and P."""
    layout_q, layout_k = layouts
    tables = _padded_tables(tables, layouts, scale)
    q = _heads(q, *tables[:2], layout_q)
    if tables[0] is None:
        q = q * scale
    k, v, mask = _heads(k, *tables[2:], layout_k), _heads(v, None, None, layout_k), layout_k.mask
    if kv_index is not None:
        k, v, mask = (x if x is None else x.index_select(0, kv_index) for x in (k, v, mask))
    scores = _bmm(q, k.mT)
    if mask is not None:
        # A finite score: a group without keys then averages the zeros of its padding, where -inf gives NaN.
        scores.masked_fill_(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
    P = scores.softmax(-1)
    return _tokens(_bmm(P, v), None, None, layout_q), [q, k, v, P]


def padded_attention_backward(
    do: Tensor,
    saved: Sequence[Tensor],
    tables: Sequence[Tensor | None],
    layouts: tuple[Layout, Layout],
    kv_index: Tensor | None,
    scale: float,
) -> list[Tensor]:
    """dq, dk and dv, packed."""
    q, k, v, P = saved
    layout_q, layout_k = layouts
    tables = _padded_tables(tables, layouts, scale)
    do = _heads(do, None, None, layout_q)
    dv = _bmm(P.mT, do)
    dS = torch.ops.aten._softmax_backward_data(_bmm(do, v.mT), P, -1, P.dtype)
    dq = _bmm(dS, k)
    dk = _bmm(dS.mT, q)
    if kv_index is not None:
        dk, dv = (dx.new_zeros((layout_k.groups, *dx.shape[1:])).index_add_(0, kv_index, dx) for dx in (dk, dv))
    if tables[0] is None:
        dq = dq * scale
    dq = _tokens(dq, *tables[:2], layout_q)
    return [dq, _tokens(dk, *tables[2:], layout_k), _tokens(dv, None, None, layout_k)]


def padded_shapes(groups, heads, max_seqlen_q, max_seqlen_k, head_dim) -> tuple[tuple, ...]:
    """Of what `padded_attention` saves; the sizes may be symbols."""
    keys = (groups, heads, max_seqlen_k, head_dim)
    return (groups, heads, max_seqlen_q, head_dim), keys, keys, (groups, heads, max_seqlen_q, max_seqlen_k)
