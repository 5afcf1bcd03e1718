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


def _blocks(q: Tensor, where: tuple[Tensor, Tensor, Tensor | None], heads_at_least: int = 1) -> Iterator[Block]:
    """All heads of all groups that have queries and keys, a few at a time."""
    cu_seqlens_q, cu_seqlens_k, kv_index = where
    _, heads, head_dim = q.shape
    places_q, places_k = (list(pairwise(cu_seqlens.tolist())) for cu_seqlens in (cu_seqlens_q, cu_seqlens_k))
    if kv_index is not None:
        places_k = [places_k[context] for context in kv_index.tolist()]
    of_size = defaultdict(list)
    for (start_q, end_q), (start_k, end_k) in zip(places_q, places_k, strict=True):
        of_size[end_q - start_q, end_k - start_k].append((start_q, start_k))
    for (queries, keys), starts in of_size.items():
        if queries == 0 or keys == 0:
            continue
        together = max(heads_at_least, TOGETHER // ((queries + keys) * head_dim))
        for group in range(0, len(starts), max(1, together // heads)):
            starts_q, starts_k = zip(*starts[group : group + max(1, together // heads)], strict=True)
            tokens = len(starts_q), _tokens(list(starts_q), queries), _tokens(list(starts_k), keys)
            for head in range(0, heads, together):
                yield Block(*tokens, slice(head, head + together))


def _read(x: Tensor, tables: Sequence[Tensor | None], tokens: slice | Tensor, block: Block) -> Tensor:
    """Of packed [tokens, heads, head_dim] those of a block, [groups, heads, length, head_dim], wide and rotated."""
    x = x[tokens, block.heads].unflatten(0, (block.groups, -1)).transpose(1, 2)
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    if tables[0] is None:
        return out.copy_(x)
    return rotate(x, *(y[tokens].unflatten(0, (block.groups, -1)).unsqueeze(1) for y in tables), out=out)


def _write(out: Tensor, x: Tensor, tables: Sequence[Tensor | None], tokens: slice | Tensor, block: Block) -> None:
    """The transpose of `_read`: x, rotated back, goes to its places of packed out."""
    x = x.transpose(1, 2)
    in_place = isinstance(tokens, slice)
    part = out[tokens, block.heads].unflatten(0, x.shape[:2]) if in_place else x.new_empty(x.shape, dtype=out.dtype)
    if tables[0] is None:
        part.copy_(x)
    else:
        rotate(x, *(y[tokens].unflatten(0, x.shape[:2]).unsqueeze(2) for y in tables), out=part, transpose=True)
    if not in_place:
        out[tokens, block.heads] = part.flatten(0, 1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor | None],
    where: tuple[Tensor, Tensor, Tensor | None],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o and, [tokens, heads], the logarithm of each row's sum; where: cu_seqlens of both sides and kv_index."""
    out = torch.zeros(q.shape, dtype=q.dtype)
    logsumexp = torch.zeros(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for block in _blocks(q, where):
        q_, k_ = _read(q, tables[:2], block.queries, block), _read(k, tables[2:], block.keys, block)
        v_ = _read(v, (None, None), block.keys, block)
        o, l = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_, k_, v_, scale=scale)  # noqa: E741
        _write(out, o, (None, None), block.queries, block)
        logsumexp[block.queries, block.heads] = l.transpose(1, 2).flatten(0, 1)
        del q_, k_, v_, o  # Before the next block makes its own.
    return out, logsumexp


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
    logsumexp: Tensor,
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
    """Write dq, dk and dv, whatever their strides; what no group has or reads is left as it is."""
    # Groups that share a context add up in float32 or wider.
    sums = None if where[2] is None else [torch.zeros(k.shape, dtype=logsumexp.dtype) for _ in range(2)]
    # A rounded output would cost PyTorch's backward its accuracy; it gives a thread whole heads.
    unrounded = out.dtype == logsumexp.dtype
    for block in _blocks(q, where, torch.get_num_threads() if unrounded else 1):
        q_, k_ = _read(q, tables[:2], block.queries, block), _read(k, tables[2:], block.keys, block)
        v_, do_ = _read(v, (None, None), block.keys, block), _read(do, (None, None), block.queries, block)
        if k_.shape[2] >= LONG and unrounded:
            o_ = _read(out, (None, None), block.queries, block)
            l_ = logsumexp[block.queries, block.heads].unflatten(0, (block.groups, -1)).transpose(1, 2)
            tiled = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            dq_, dk_, dv_ = tiled(do_, q_, k_, v_, o_, l_, 0.0, False, scale=scale)
        else:
            pairs = (x.flatten(0, 1) for x in (do_, q_, k_, v_))
            dq_, dk_, dv_ = (x.unflatten(0, q_.shape[:2]) for x in _backward(*pairs, scale))
        _write(dq, dq_, tables[:2], block.queries, block)
        if sums is None:
            _write(dk, dk_, tables[2:], block.keys, block)
            _write(dv, dv_, (None, None), block.keys, block)
        else:
            keys = torch.arange(len(k))[block.keys]
            for x, dx in zip(sums, (dk_, dv_), strict=True):
                x[:, block.heads].index_add_(0, keys, dx.transpose(1, 2).flatten(0, 1))
        del q_, k_, v_, do_, dq_, dk_, dv_  # Before the next block makes its own.
    if sums is not None:
        everything = Block(1, slice(None), slice(None), slice(None))
        for dx, x, back in ((dk, sums[0], tables[2:]), (dv, sums[1], (None, None))):
            _write(dx, x.transpose(0, 1).unsqueeze(0), back, slice(None), everything)
