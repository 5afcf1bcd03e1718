"""Attention of packed groups on a CPU, whatever their type in float32 or wider: groups of one size together.

    P = softmax(rope(q) rope(k)^T scale), o = P v
    dv = P^T do, dS = P (do v^T - rowsum(P do v^T)), drope(q) = dS rope(k) scale, drope(k) = dS^T rope(q) scale

Nothing is padded. The forward is PyTorch's tiled attention, which keeps no weights. Below `LONG` keys the backward
forms a cache full of weights at a time, exact where a row has all its weight on one key; for longer contexts PyTorch's
is faster.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from capi_kernels._rotary import rotate

LONG = 256  # Keys from which the tiled backward is the faster one.
CACHED = 2**17  # Weights formed at a time in the other: half a MiB.
TOGETHER = 2**18  # Channels of queries and keys taken at a time: copies of no more are alive.


class Block(NamedTuple):
    """Some heads of groups that have as many queries and as many keys, and which packed tokens these are."""

    groups: int
    queries: slice | Tensor
    keys: slice | Tensor
    heads: slice


def _tokens(starts: list[int], length: int) -> slice | Tensor:
    """Those of the sequences of one length that start there: a slice where they follow each other."""
    if starts == list(range(starts[0], starts[0] + length * len(starts), length)):
        return slice(starts[0], starts[0] + length * len(starts))
    return (torch.tensor(starts).unsqueeze(1) + torch.arange(length)).flatten()


Sizes = dict[tuple[int, int], list[tuple[int, int]]]


def _sizes(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, kv_index: Tensor | None) -> Sizes:
    """Where the queries and the keys of each group start, by their numbers; of groups that have some of both."""
    places_q, places_k = (list(pairwise(cu_seqlens.tolist())) for cu_seqlens in (cu_seqlens_q, cu_seqlens_k))
    if kv_index is not None:
        places_k = [places_k[context] for context in kv_index.tolist()]
    sizes = defaultdict(list)
    for (start_q, end_q), (start_k, end_k) in zip(places_q, places_k, strict=True):
        if end_q > start_q and end_k > start_k:
            sizes[end_q - start_q, end_k - start_k].append((start_q, start_k))
    return sizes


def _blocks(sizes: Sizes, heads: int, head_dim: int, heads_at_least: int = 1) -> Iterator[Block]:
    """All heads of all groups, a few of one size at a time."""
    for (queries, keys), starts in sizes.items():
        together = max(heads_at_least, TOGETHER // ((queries + keys) * head_dim))
        for group in range(0, len(starts), max(1, together // heads)):
            starts_q, starts_k = zip(*starts[group : group + max(1, together // heads)], strict=True)
            tokens = len(starts_q), _tokens(list(starts_q), queries), _tokens(list(starts_k), keys)
            for head in range(0, heads, together):
                yield Block(*tokens, slice(head, head + together))


def _rotated(x: Tensor, tables: Sequence[Tensor | None], transpose: bool = False) -> Tensor:
    """Packed [tokens, heads, head_dim], wide, and rotated or rotated back."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if tables[0] is None:
        return x.to(wide)
    out = torch.empty(x.shape, dtype=wide)
    return rotate(x, *(table.unsqueeze(1) for table in tables), out=out, transpose=transpose)


def _read(x: Tensor, tables: Sequence[Tensor | None], tokens: slice | Tensor, block: Block) -> Tensor:
    """Of packed [tokens, heads, head_dim] those of a block, [groups, heads, length, head_dim], wide and rotated."""
    x = x[tokens, block.heads].unflatten(0, (block.groups, -1)).transpose(1, 2)
    wide = torch.promote_types(x.dtype, torch.float32)
    if tables[0] is None:
        return x.to(wide) if x.stride(3) == 1 else x.to(wide, memory_format=torch.contiguous_format)
    out = torch.empty(x.shape, dtype=wide)
    return rotate(x, *(y[tokens].unflatten(0, (block.groups, -1)).unsqueeze(1) for y in tables), out=out)


def _write(
    out: Tensor, x: Tensor, tables: Sequence[Tensor | None], tokens: slice | Tensor, block: Block, add: bool = False
) -> None:
    """The transpose of `_read`: x, rotated back, goes to its places of packed out, or is added there."""
    x = x.transpose(1, 2)
    if isinstance(tokens, Tensor):
        out[:, block.heads].index_add_(0, tokens, x.flatten(0, 1).to(out.dtype))
        return
    part = out[tokens, block.heads].unflatten(0, x.shape[:2])
    if add:
        part.add_(x)
    elif tables[0] is None:
        part.copy_(x)
    else:
        rotate(x, *(y[tokens].unflatten(0, x.shape[:2]).unsqueeze(2) for y in tables), out=part, transpose=True)


def _is_wide(x: Tensor) -> bool:
    return torch.promote_types(x.dtype, torch.float32) == x.dtype


def _is_ragged(sizes: Sizes, where: tuple[Tensor, Tensor, Tensor | None]) -> bool:
    """Whether blocks may be small, or share or leave out tokens: then the rotation comes before and after them."""
    cu_seqlens_q, _, kv_index = where
    return kv_index is not None or len(sizes) > 1 or sum(map(len, sizes.values())) < len(cu_seqlens_q) - 1


def saved_shapes(q: Tensor, k: Tensor, tables: Sequence[Tensor | None]) -> list[tuple]:
    """Of what `attention` keeps for the backward, all of it in float32 or wider."""
    rotated = [x.shape for x, cos in ((q, tables[0]), (k, tables[2])) if cos is not None and _is_wide(q)]
    return [(q.shape[0], q.shape[1]), *rotated]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor | None],
    where: tuple[Tensor, Tensor, Tensor | None],
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    """o and what the backward needs; where: cu_seqlens of both sides and kv_index.

    That is, [tokens, heads], the logarithm of each row's sum and, of tokens in float32 or wider, these rotated.
    """
    sizes, wide = _sizes(*where), torch.promote_types(q.dtype, torch.float32)
    ragged = _is_ragged(sizes, where)
    new = torch.zeros if ragged else torch.empty
    out, logsumexp = new(q.shape, dtype=q.dtype), new(q.shape[:2], dtype=wide)
    saved = [logsumexp]
    if ragged or _is_wide(q):
        keep = _is_wide(q)
        q, k = _rotated(q, tables[:2]), _rotated(k, tables[2:])
        saved += [x for x, cos in ((q, tables[0]), (k, tables[2])) if cos is not None and keep]
        tables = (None,) * 4
    for block in _blocks(sizes, *q.shape[1:]):
        q_, k_ = _read(q, tables[:2], block.queries, block), _read(k, tables[2:], block.keys, block)
        v_ = _read(v, (None, None), block.keys, block)
        o, l = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_, k_, v_, scale=scale)  # noqa: E741
        _write(out, o, (None, None), block.queries, block)
        logsumexp[block.queries, block.heads] = l.transpose(1, 2).flatten(0, 1)
        del q_, k_, v_, o  # Before the next block makes its own.
    return out, saved


def _backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of [groups * heads, length, head_dim], from weights that are formed once more."""
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    rows = min(q.shape[1], max(32, CACHED // k.shape[1]))
    pairs = max(1, CACHED // (rows * k.shape[1]))
    for pair in range(0, len(q), pairs):
        k_, v_, dk_, dv_ = (x[pair : pair + pairs] for x in (k, v, dk, dv))
        for row in range(0, q.shape[1], rows):
            q_, do_, dq_ = (x[pair : pair + pairs, row : row + rows] for x in (q, do, dq))
            # In place, which autocast leaves alone: it may be on in a backward.
            P = q.new_empty((*q_.shape[:2], k.shape[1])).baddbmm_(q_, k_.mT, beta=0, alpha=scale).softmax(-1)
            dS = torch.empty_like(P).baddbmm_(do_, v_.mT, beta=0)
            dS = torch.ops.aten._softmax_backward_data(dS, P, -1, P.dtype)
            added = 0 if row == 0 else 1
            dq_.baddbmm_(dS, k_, beta=0, alpha=scale)
            dk_.baddbmm_(dS.mT, q_, beta=added, alpha=scale)
            dv_.baddbmm_(P.mT, do_, beta=added)
    return dq, dk, dv


def attention_backward(
    do: Tensor,
    out: Tensor,
    saved: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor | None],
    where: tuple[Tensor, Tensor, Tensor | None],
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write dq, dk and dv, whatever their strides."""
    logsumexp, *rotated = saved
    sizes, unrounded, sums = _sizes(*where), _is_wide(q), (dq, dk, dv)
    ragged = _is_ragged(sizes, where)
    reading = writing = tables
    if ragged or unrounded:
        reading = (None,) * 4
        q = rotated.pop(0) if unrounded and tables[0] is not None else _rotated(q, tables[:2])
        k = rotated.pop(0) if unrounded and tables[2] is not None else _rotated(k, tables[2:])
    if ragged:
        writing = (None,) * 4
        # Groups that share a context add up in float32 or wider.
        sums = [torch.zeros(x.shape, dtype=logsumexp.dtype) for x in (q, k, v)]
    # PyTorch's backward gives a thread whole heads; a rounded output would cost it its accuracy.
    for block in _blocks(sizes, *q.shape[1:], torch.get_num_threads() if unrounded else 1):
        q_, k_ = _read(q, reading[:2], block.queries, block), _read(k, reading[2:], block.keys, block)
        v_, do_ = _read(v, (None, None), block.keys, block), _read(do, (None, None), block.queries, block)
        if k_.shape[2] >= LONG and unrounded:
            o_ = _read(out, (None, None), block.queries, block)
            l_ = logsumexp[block.queries, block.heads].unflatten(0, (block.groups, -1)).transpose(1, 2)
            tiled = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            dq_, dk_, dv_ = tiled(do_, q_, k_, v_, o_, l_, 0.0, False, scale=scale)
        else:
            pairs = (x.flatten(0, 1) for x in (do_, q_, k_, v_))
            dq_, dk_, dv_ = (x.unflatten(0, q_.shape[:2]) for x in _backward(*pairs, scale))
        places = (writing[:2], block.queries), (writing[2:], block.keys), ((None, None), block.keys)
        for x, dx, place in zip(sums, (dq_, dk_, dv_), places, strict=True):
            _write(x, dx, *place, block, add=ragged)
        del q_, k_, v_, do_, dq_, dk_, dv_, dx  # Before the next block makes its own.
    if ragged:
        for dx, x, rotation in zip((dq, dk, dv), sums, (tables[:2], tables[2:], (None, None)), strict=True):
            dx.copy_(_rotated(x, rotation, transpose=True))
