"""The weights of packed groups in plain PyTorch, padded to [groups, heads, queries, keys], in float32 or wider.

    P = softmax(rope(q) rope(k)^T scale); dS = P (dP - rowsum(P dP)), drope(q) = dS rope(k) scale,
    drope(k) = dS^T rope(q) scale

Nothing waits for the device: a GPU takes it for what its kernels do not do. P is rounded to the type of q at the end.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from capi_kernels.attention.rotary import rotate


class Layout(NamedTuple):
    """Where the packed tokens of `groups` groups lie in [groups, length]."""

    groups: int
    length: int
    place: Tensor | None  # int64 [tokens]: flat place of each token; None where every group is full
    mask: Tensor | None  # [groups, length]: which places hold a token


def _layout_of(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> Layout:
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


def _pad_tables(tables: Sequence[Tensor | None], layout: Layout) -> tuple[Tensor | None, ...]:
    return tuple(None if table is None else _pad(table, layout) for table in tables)


def _heads(x: Tensor, cos: Tensor | None, sin: Tensor | None, layout: Layout) -> Tensor:
    """Packed [tokens, heads, head_dim] to padded [groups, heads, length, head_dim], wide and rotated."""
    x = _pad(x, layout).transpose(1, 2)
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return out.copy_(x) if cos is None else rotate(x, cos.unsqueeze(1), sin.unsqueeze(1), out=out)


def _packed(dx: Tensor, cos: Tensor | None, sin: Tensor | None, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The transpose of `_heads`."""
    dx = dx.transpose(1, 2)
    out = torch.empty(dx.shape, dtype=dtype, device=dx.device)
    if cos is None:
        out.copy_(dx)
    else:
        rotate(dx, cos.unsqueeze(2), sin.unsqueeze(2), out=out, transpose=True)
    out = out.flatten(0, 1)
    return out if layout.place is None else out.index_select(0, layout.place)


def _bmm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Scaled product of [groups, heads, m, n] and [groups, heads, n, p]; matmul would look for broadcasts."""
    # In place, which autocast leaves alone: it may be on in a backward.
    out = torch.empty((*a.shape[:3], b.shape[3]), dtype=a.dtype, device=a.device)
    out.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1), beta=0, alpha=scale)
    return out


def padded_operands(
    q: Tensor, k: Tensor, tables: Sequence[Tensor | None], cu_seqlens: Sequence[Tensor], max_seqlens: Sequence[int]
) -> tuple[tuple[Tensor | None, ...], tuple[Layout, Layout]]:
    """The tables of queries and context, padded, and the layouts of both."""
    layouts = _layout_of(cu_seqlens[0], max_seqlens[0], len(q)), _layout_of(cu_seqlens[1], max_seqlens[1], len(k))
    return _pad_tables(tables[:2], layouts[0]) + _pad_tables(tables[2:], layouts[1]), layouts


def _read(x: Tensor, kv_index: Tensor | None) -> Tensor:
    """Of each group the context that it reads."""
    return x if kv_index is None else x.index_select(0, kv_index)


def _unread(dx: Tensor, kv_index: Tensor | None, contexts: int) -> Tensor:
    """The transpose of `_read`: groups that read one context add up in their order."""
    return dx if kv_index is None else dx.new_zeros((contexts, *dx.shape[1:])).index_add_(0, kv_index, dx)


def _padding(layouts: tuple[Layout, Layout], kv_index: Tensor | None) -> Tensor | None:
    """Where a query or a key is padding, [groups, 1, queries, keys] or broadcast to that; None where none is."""
    mask_q, mask_k = layouts[0].mask, layouts[1].mask
    masks = [] if mask_q is None else [~mask_q[:, None, :, None]]
    masks += [] if mask_k is None else [~_read(mask_k, kv_index)[:, None, None, :]]
    return masks[0] | masks[-1] if masks else None


def padded_attention_weights(
    q: Tensor,
    k: Tensor,
    tables: Sequence[Tensor | None],
    layouts: tuple[Layout, Layout],
    kv_index: Tensor | None,
    scale: float,
) -> Tensor:
    """P [groups, heads, queries, keys], zero where either is padding; the tables are padded."""
    q_, k_ = _heads(q, *tables[:2], layouts[0]), _read(_heads(k, *tables[2:], layouts[1]), kv_index)
    scores = _bmm(q_, k_.mT, scale)
    if layouts[1].mask is not None:
        # A finite score: a group without keys then averages the zeros of its padding, where -inf gives NaN.
        mask = _read(layouts[1].mask, kv_index)
        scores.masked_fill_(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
    P = torch.softmax(scores, -1).to(q.dtype)
    padding = _padding(layouts, kv_index)
    return P if padding is None else P.masked_fill_(padding, 0)


def padded_attention_weights_backward(
    dP: Tensor,
    P: Tensor,
    q: Tensor,
    k: Tensor,
    tables: Sequence[Tensor | None],
    layouts: tuple[Layout, Layout],
    kv_index: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """dq and dk, packed; the tables are padded."""
    padding = _padding(layouts, kv_index)
    if padding is not None:
        dP = dP.masked_fill(padding, 0)  # Whatever stands there.
    q_, k_ = _heads(q, *tables[:2], layouts[0]), _read(_heads(k, *tables[2:], layouts[1]), kv_index)
    dS = torch.ops.aten._softmax_backward_data(dP.to(q_.dtype), P.to(q_.dtype), -1, q_.dtype)
    dq, dk = _bmm(dS, k_, scale), _unread(_bmm(dS.mT, q_, scale), kv_index, layouts[1].groups)
    return _packed(dq, *tables[:2], layouts[0], q.dtype), _packed(dk, *tables[2:], layouts[1], k.dtype)
