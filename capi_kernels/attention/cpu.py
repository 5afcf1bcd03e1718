"""Attention of packed groups on a CPU, whatever their type in float32 or wider: groups of one size together.

    P = softmax(rope(q) rope(k)^T scale), o = P v
    dv = P^T do, dS = P (do v^T - rowsum(P do v^T)), drope(q) = dS rope(k) scale, drope(k) = dS^T rope(q) scale

Nothing is padded. The forward is PyTorch's tiled attention, which keeps no weights. Below `LONG` keys the backward
forms a cache full of weights at a time, exact where a row has all its weight on one key; for longer contexts PyTorch's
is faster.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

from capi_kernels.attention.cpu_whole import (
    Rotated,
    Tables,
    gradient_buffers,
    images,
    packed,
    small_backward,
    tiled,
    tiled_backward,
    whole_forward,
)
from capi_kernels.attention.rotary import rotate

LONG = 256  # Keys from which the tiled backward is the faster one.
CACHED = 2**18  # Weights formed at a time in the other: a MiB.
SMALL = 2**20  # So many form all at once, with less around them.
TOGETHER = 2**18  # Channels of queries and keys taken at a time: copies of no more are alive.

aten = torch.ops.aten
NONE = (None, None)


class Block(NamedTuple):
    """Some heads of groups that have as many queries and as many keys, and which packed tokens these are."""

    groups: int
    length: int  # keys of each group
    queries: slice | Tensor
    keys: slice | Tensor
    heads: slice

    def part(self, x: Tensor, tokens: slice | Tensor) -> Tensor:
        """Of packed [tokens, heads, head_dim] or tables [tokens, head_dim] its [groups, heads or 1, length, head_dim].

        A view where the tokens are a slice.
        """
        return images(x[tokens, self.heads] if x.ndim == 3 else x[tokens], self.groups)

    def tables(self, tables: Tables, tokens: slice | Tensor) -> Tables:
        return [None if x is None else self.part(x, tokens) for x in tables]


def _tokens(starts: Sequence[int], length: int) -> slice | Tensor:
    """Those of the sequences of one length that start there: a slice where they follow each other."""
    if all(later - start == length for start, later in pairwise(starts)):
        return slice(starts[0], starts[-1] + length)
    return (torch.tensor(starts).unsqueeze(1) + torch.arange(length)).flatten()


Sizes = dict[tuple[int, int], list[tuple[int, int]]]


def _sizes(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, kv_index: Tensor | None) -> Sizes:
    """Where the queries and the keys of each group start, by their numbers; of groups that have some of both."""
    places_q = list(pairwise(cu_seqlens_q.tolist()))
    places_k = places_q if cu_seqlens_k is cu_seqlens_q else list(pairwise(cu_seqlens_k.tolist()))
    if kv_index is not None:
        places_k = [places_k[context] for context in kv_index.tolist()]
    sizes = defaultdict(list)
    for (start_q, end_q), (start_k, end_k) in zip(places_q, places_k, strict=True):
        if end_q > start_q and end_k > start_k:
            sizes[end_q - start_q, end_k - start_k].append((start_q, start_k))
    return sizes


def _together(tokens: int, head_dim: int, dtype: torch.dtype | None = None) -> int:
    """How many heads of groups of so many queries and keys are taken at a time; of the backward if there is a dtype."""
    # PyTorch's backward gives a thread whole heads.
    least = torch.get_num_threads() if dtype is not None and _is_wide(dtype) else 1
    return max(least, TOGETHER // (tokens * head_dim))


def _blocks(sizes: Sizes, heads: int, head_dim: int, dtype: torch.dtype | None = None) -> Iterator[Block]:
    """All heads of all groups, a few of one size at a time."""
    for (queries, keys), starts in sizes.items():
        together = _together(queries + keys, head_dim, dtype)
        for group in range(0, len(starts), max(1, together // heads)):
            starts_q, starts_k = zip(*starts[group : group + max(1, together // heads)], strict=True)
            tokens = len(starts_q), keys, _tokens(starts_q, queries), _tokens(starts_k, keys)
            for head in range(0, heads, together):
                yield Block(*tokens, slice(head, head + together))


def _is_wide(dtype: torch.dtype) -> bool:
    return torch.promote_types(dtype, torch.float32) == dtype


def _wide(x: Tensor, tables: Tables, *, transpose: bool = False) -> Tensor:
    """[..., head_dim] in float32 or wider, rotated or rotated back; x itself where nothing is to do."""
    if tables[0] is None and _is_wide(x.dtype) and x.stride(-1) == 1:
        return x
    return _copy(x, tables, transpose=transpose)


def _copy(x: Tensor, tables: Tables, *, transpose: bool = False) -> Tensor:
    """The same, always new and contiguous."""
    return _put(torch.empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32)), x, tables, transpose=transpose)


def _put(out: Tensor, x: Tensor, tables: Tables, *, transpose: bool = False) -> Tensor:
    """x goes to out, rotated or rotated back."""
    return out.copy_(x) if tables[0] is None else rotate(x, *tables, out=out, transpose=transpose)


def _rotated(x: Tensor, tables: Tables, transpose: bool = False) -> Tensor:
    """`_wide` of packed [tokens, heads, head_dim] and tables [tokens, head_dim]."""
    return _wide(x, [None if table is None else table.unsqueeze(1) for table in tables], transpose=transpose)


def _is_ragged(sizes: Sizes, where: tuple[Tensor, Tensor, Tensor | None]) -> bool:
    """Whether blocks may be small, or share or leave out tokens: then the rotation comes before and after them."""
    cu_seqlens_q, _, kv_index = where
    return kv_index is not None or len(sizes) > 1 or sum(map(len, sizes.values())) < len(cu_seqlens_q) - 1


def kept(dtype: torch.dtype, tables: Tables, max_seqlen_k: int) -> tuple[bool, bool]:
    """Whether the backward gets q and k as the forward rotated them; of few keys q is rotated as fast as copied."""
    q_cos, _, k_cos, _ = tables
    return _is_wide(dtype) and q_cos is not None and max_seqlen_k >= LONG, _is_wide(dtype) and k_cos is not None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tables,
    where: tuple[Tensor, Tensor, Tensor | None],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, [tokens, heads] the logarithm of each row's sum, and q and k, rotated if they are in float32 or wider.

    where: cu_seqlens of both sides and kv_index.
    """
    sizes, dtype = _sizes(*where), q.dtype
    ragged = _is_ragged(sizes, where)
    if _is_wide(dtype) and not ragged:
        return whole_forward(q, k, v, tables, len(where[0]) - 1, scale)
    if ragged:
        q, k, tables = _rotated(q, tables[:2]), _rotated(k, tables[2:]), NONE * 2
    new = torch.zeros if ragged else torch.empty
    out, logsumexp = new(q.shape, dtype=dtype), new(q.shape[:2], dtype=torch.promote_types(dtype, torch.float32))
    for block in _blocks(sizes, *q.shape[1:]):
        places = (q, tables[:2], block.queries), (k, tables[2:], block.keys), (v, NONE, block.keys)
        operands = [_wide(block.part(x, tokens), block.tables(tables, tokens)) for x, tables, tokens in places]
        o, l = tiled(*operands, scale)  # noqa: E741
        out[block.queries, block.heads] = packed(o).to(dtype)
        logsumexp[block.queries, block.heads] = l.transpose(1, 2).flatten(0, 1)
        del operands, o  # Before the next block makes its own.
    return out, logsumexp, q, k


def _backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, dk: Tensor, scale: float) -> None:
    """dq, dk and dv of contiguous [groups, heads, length, head_dim], from weights that are formed once more.

    They take the places of do, dk, which may be k, and v.
    """
    do, q, k, v, dk = (x.flatten(0, 1) for x in (do, q, k, v, dk))
    (pairs, queries, _), keys = q.shape, k.shape[1]
    rows = min(queries, max(32, CACHED // keys))
    turns = -(-pairs // max(1, CACHED // (rows * keys)))
    if turns == 1 and rows == queries:
        _rows_backward(do, q, k, v, dk, v, 0, scale)
        return
    for do_, q_, k_, v_, dk_ in zip(*(x.tensor_split(turns) for x in (do, q, k, v, dk)), strict=True):
        if rows == queries:
            _rows_backward(do_, q_, k_, v_, dk_, v_, 0, scale)
            continue
        dks, dvs = torch.zeros_like(k_), torch.zeros_like(v_)
        for rows_ in zip(do_.split(rows, 1), q_.split(rows, 1), strict=True):
            _rows_backward(*rows_, k_, v_, dks, dvs, 1, scale)
        dk_.copy_(dks)
        v_.copy_(dvs)


def _rows_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor, kept: int, scale: float
) -> None:
    """Of [pairs, length, head_dim]: dq in the place of do, dk and dv on top of what they hold if that is `kept`."""
    # In place, which autocast leaves alone: it may be on in a backward.
    dS, P = torch.empty((2, *q.shape[:2], k.shape[1]), dtype=q.dtype)
    aten._softmax.out(dS.baddbmm_(q, k.mT, beta=0, alpha=scale), -1, False, out=P)
    dS.baddbmm_(do, v.mT, beta=0)
    aten._softmax_backward_data.out(dS, P, -1, P.dtype, grad_input=dS)
    dv.baddbmm_(P.mT, do, beta=kept)
    do.baddbmm_(dS, k, beta=0, alpha=scale)
    dk.baddbmm_(dS.mT, q, beta=kept, alpha=scale)


def _is_tiled(keys: int, dtype: torch.dtype) -> bool:
    """Whether the backward of so many keys is PyTorch's: a rounded output would cost it its accuracy."""
    return keys >= LONG and _is_wide(dtype)


def _grads(views: Sequence[Tensor], q_tables: Tables, k_tables: Tables, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, not rotated back, of do, q, k and v [groups, heads, length, head_dim].

    For PyTorch's backward the output and the logarithms of the sums, of head_dim 1, follow them.
    """
    do, q, k, v, *saved = views
    if saved:
        out, logsumexp = saved
        operands = _wide(do, NONE), _wide(q, q_tables), _wide(k, k_tables), _wide(v, NONE), _wide(out, NONE)
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(*operands, logsumexp.squeeze(3), 0.0, False, scale=scale)
    dq, q, dv = _copy(do, NONE), _copy(q, q_tables), _copy(v, NONE)
    if k_tables[0] is None and k.is_contiguous() and _is_wide(k.dtype):
        dk = torch.empty(k.shape, dtype=k.dtype)
    else:
        k = dk = _copy(k, k_tables)
    _backward(dq, q, k, dv, dk, scale)
    return dq, dk, dv


def attention_backward(
    do: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tables,
    where: tuple[Tensor, Tensor, Tensor | None],
    scale: float,
    parts: Sequence[int],
    rotated: Rotated,
) -> list[Tensor]:
    """dq, dk and dv in buffers of 3 parts, of 1 and 2, or of 1 each: [tokens, parts, heads, head_dim], no axis of 1.

    rotated: q and k as the forward left them, where it kept them.
    """
    sizes, groups = _sizes(*where), len(where[0]) - 1
    if _is_ragged(sizes, where):
        return _ragged_backward(do, out, logsumexp, q, k, v, tables, sizes, scale, parts, rotated)
    ((queries, keys),) = sizes
    heads, head_dim = q.shape[1:]
    if _is_tiled(keys, q.dtype):
        return tiled_backward(do, out, logsumexp, q, k, v, tables, groups, scale, parts, rotated)
    if _is_wide(q.dtype) and groups * heads * queries * keys <= SMALL:
        return small_backward(do, q, k, v, tables, groups, scale, parts, rotated)
    views = [images(x, groups) for x in (do, q, k, v)]
    turns = [[x if x is None else images(x, groups) for x in of] for of in (tables[:2], tables[2:])]
    to_do = [of if x is None else NONE for of, x in zip(turns, rotated, strict=True)]
    if rotated[0] is not None:
        views[1] = images(rotated[0], groups)
    if rotated[1] is not None:
        views[2] = rotated[1].view(views[2].shape)
    together = _together(queries + keys, head_dim)
    step = max(1, together // heads)
    buffers = None
    for group, head in product(range(0, groups, step), range(0, heads, together)):
        at = slice(group, group + step), slice(head, head + together)
        q_tables, k_tables, *left = (of if of[0] is None else [x[at[0]] for x in of] for of in (*turns, *to_do))
        results = _grads([x[at] for x in views], *left, scale)
        if buffers is None:  # Only now, when the first results have set their memory free.
            buffers, grads = gradient_buffers(q, k, parts)
            grads = [images(x, groups) for x in grads]
        for grad, x, rotation in zip(grads, results, (q_tables, k_tables, NONE), strict=True):
            _put(grad[at], x, rotation, transpose=True)
        del results, x  # Before the next make their own.
    return buffers


def _ragged_backward(
    do: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tables,
    sizes: Sizes,
    scale: float,
    parts: Sequence[int],
    rotated: Rotated,
) -> list[Tensor]:
    """`attention_backward` where groups have several sizes, share contexts or are empty."""
    q_, k_ = rotated
    q_ = _rotated(q, tables[:2]) if q_ is None else q_
    k_ = _rotated(k, tables[2:]) if k_ is None else k_
    # Groups that share a context add up in float32 or wider.
    sums = [torch.zeros(x.shape, dtype=logsumexp.dtype) for x in (q, k, v)]
    for block in _blocks(sizes, *q.shape[1:], q.dtype):
        places = [(do, block.queries), (q_, block.queries), (k_, block.keys), (v, block.keys)]
        if _is_tiled(block.length, q.dtype):
            places += [(out, block.queries), (logsumexp.unsqueeze(2), block.queries)]
        views = [block.part(*place) for place in places]
        results = _grads(views, NONE, NONE, scale)
        for total, x, (_, at) in zip(sums, results, places[1:4], strict=True):
            if isinstance(at, Tensor):
                total[:, block.heads].index_add_(0, at, x.transpose(1, 2).flatten(0, 1))
            else:
                block.part(total, at).add_(x)
        del views, results, x  # Before the next block makes its own.
    buffers, grads = gradient_buffers(q, k, parts)
    for grad, x, rotation in zip(grads, sums, (tables[:2], tables[2:], NONE), strict=True):
        grad.copy_(_rotated(x, rotation, transpose=True))
    return buffers
