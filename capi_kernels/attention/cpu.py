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

from capi_kernels.attention.rotary import rotate

LONG = 256  # Keys from which the tiled backward is the faster one.
CACHED = 2**17  # Weights formed at a time in the other: half a MiB.
TOGETHER = 2**18  # Channels of queries and keys taken at a time: copies of no more are alive.

Tables = Sequence[Tensor | None]  # cos and sin, or None and None
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
        x = x[tokens, self.heads] if x.ndim == 3 else x[tokens].unsqueeze(1)
        return x.view(self.groups, -1, *x.shape[1:]).transpose(1, 2)

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
            tokens = len(starts_q), keys, _tokens(starts_q, queries), _tokens(starts_k, keys)
            for head in range(0, heads, together):
                yield Block(*tokens, slice(head, head + together))


def _is_wide(x: Tensor) -> bool:
    return torch.promote_types(x.dtype, torch.float32) == x.dtype


def _wide(x: Tensor, tables: Tables, *, transpose: bool = False, new: bool = False) -> Tensor:
    """[..., head_dim] in float32 or wider, rotated or rotated back; x itself where nothing is to do, unless new."""
    if tables[0] is None and not new and _is_wide(x) and x.stride(-1) == 1:
        return x
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    return out.copy_(x) if tables[0] is None else rotate(x, *tables, out=out, transpose=transpose)


def _rotated(x: Tensor, tables: Tables, transpose: bool = False) -> Tensor:
    """`_wide` of packed [tokens, heads, head_dim] and tables [tokens, head_dim]."""
    return _wide(x, [None if table is None else table.unsqueeze(1) for table in tables], transpose=transpose)


def _is_ragged(sizes: Sizes, where: tuple[Tensor, Tensor, Tensor | None]) -> bool:
    """Whether blocks may be small, or share or leave out tokens: then the rotation comes before and after them."""
    cu_seqlens_q, _, kv_index = where
    return kv_index is not None or len(sizes) > 1 or sum(map(len, sizes.values())) < len(cu_seqlens_q) - 1


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tables,
    where: tuple[Tensor, Tensor, Tensor | None],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, [tokens, heads] the logarithm of each row's sum, and k, which was rotated if it is in float32 or wider.

    where: cu_seqlens of both sides and kv_index.
    """
    sizes, tiled = _sizes(*where), torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    ragged, unrounded = _is_ragged(sizes, where), _is_wide(q)
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    if ragged or unrounded:
        q, k, tables = _rotated(q, tables[:2]), _rotated(k, tables[2:]), NONE * 2
    if unrounded and not ragged:
        (starts,) = sizes.values()
        images = (x.view(len(starts), -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, _wide(v, NONE)))
        out, logsumexp = (x.transpose(1, 2).flatten(0, 1) for x in tiled(*images, scale=scale))
        return out, logsumexp, k
    new = torch.zeros if ragged else torch.empty
    out, logsumexp = new(q.shape, dtype=dtype), new(q.shape[:2], dtype=wide)
    for block in _blocks(sizes, *q.shape[1:]):
        places = (q, tables[:2], block.queries), (k, tables[2:], block.keys), (v, NONE, block.keys)
        operands = [_wide(block.part(x, tokens), block.tables(tables, tokens)) for x, tables, tokens in places]
        o, l = tiled(*operands, scale=scale)  # noqa: E741
        out[block.queries, block.heads] = o.transpose(1, 2).flatten(0, 1).to(dtype)
        logsumexp[block.queries, block.heads] = l.transpose(1, 2).flatten(0, 1)
        del operands, o  # Before the next block makes its own.
    return out, logsumexp, k


def _backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of contiguous [groups, heads, length, head_dim], from weights that are formed once more.

    They take the places of do and, where all queries come at a time, of k and v.
    """
    shapes = do.shape, k.shape, v.shape
    do, q, k, v = (x.flatten(0, 1) for x in (do, q, k, v))
    rows = min(q.shape[1], max(32, CACHED // k.shape[1]))
    pairs = max(1, CACHED // (rows * k.shape[1]))
    kept = int(rows < q.shape[1])
    dk, dv = (torch.zeros_like(k), torch.zeros_like(v)) if kept else (k, v)
    for pair in range(0, len(q), pairs):
        k_, v_, dk_, dv_ = (x[pair : pair + pairs] for x in (k, v, dk, dv))
        for row in range(0, q.shape[1], rows):
            q_, do_ = (x[pair : pair + pairs, row : row + rows] for x in (q, do))
            # In place, which autocast leaves alone: it may be on in a backward.
            dS, P = torch.empty((2, *q_.shape[:2], k.shape[1]), dtype=q.dtype)
            torch.ops.aten._softmax.out(dS.baddbmm_(q_, k_.mT, beta=0, alpha=scale), -1, False, out=P)
            dS.baddbmm_(do_, v_.mT, beta=0)
            torch.ops.aten._softmax_backward_data.out(dS, P, -1, P.dtype, grad_input=dS)
            dv_.baddbmm_(P.mT, do_, beta=kept)
            do_.baddbmm_(dS, k_, beta=0, alpha=scale)
            dk_.baddbmm_(dS.mT, q_, beta=kept, alpha=scale)
    return tuple(x.view(shape) for x, shape in zip((do, dk, dv), shapes, strict=True))


def _put(out: Tensor, x: Tensor, tables: Tables, tokens: slice | Tensor, block: Block, add: bool) -> None:
    """x, [groups, heads, length, head_dim], rotated back, goes to its places of packed out, or is added there."""
    if isinstance(tokens, Tensor):
        out[:, block.heads].index_add_(0, tokens, x.transpose(1, 2).flatten(0, 1))
    elif add:
        block.part(out, tokens).add_(x)
    elif tables[0] is None:
        block.part(out, tokens).copy_(x)
    else:
        rotate(x, *tables, out=block.part(out, tokens), transpose=True)


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
    parts: tuple[int, ...],
    rotated: Tensor | None = None,
) -> list[Tensor]:
    """dq, dk and dv in buffers [tokens, parts, heads, head_dim]: one of 3 parts, or one of 1 and one of 2.

    rotated: k wide and rotated, if the forward kept it.
    """
    sizes, unrounded = _sizes(*where), _is_wide(q)
    ragged = _is_ragged(sizes, where)
    shapes = [(len(x), n, *x.shape[1:]) for x, n in zip((q, k), parts, strict=False)]
    inner, grads, dtype = tables, None, q.dtype
    if ragged:
        q, k = _rotated(q, tables[:2]), _rotated(k, tables[2:]) if rotated is None else rotated
        inner = NONE * 2
        # Groups that share a context add up in float32 or wider.
        grads = [torch.zeros(x.shape, dtype=logsumexp.dtype) for x in (q, k, v)]
    # PyTorch's backward gives a thread whole heads; a rounded output would cost it its accuracy.
    for block in _blocks(sizes, *q.shape[1:], torch.get_num_threads() if unrounded else 1):
        queries, keys, tiled = block.queries, block.keys, unrounded and block.length >= LONG
        q_tables = block.tables(inner[:2], queries)
        k_tables = q_tables if inner[0] is inner[2] else block.tables(inner[2:], keys)
        keys_given = (k, k_tables, keys) if rotated is None else (rotated, NONE, keys)
        places = (do, NONE, queries), (q, q_tables, queries), keys_given, (v, NONE, keys)
        operands = [_wide(block.part(x, tokens), rotation, new=not tiled) for x, rotation, tokens in places]
        if tiled:
            o_, l_ = _wide(block.part(out, queries), NONE), block.part(logsumexp.unsqueeze(2), queries).squeeze(3)
            backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            results = backward(*operands, o_, l_, 0.0, False, scale=scale)
        else:
            results = _backward(*operands, scale)
        del operands
        if grads is None:  # Only now, when the first block has set its memory free.
            buffers = [torch.empty(shape, dtype=dtype) for shape in shapes]
            grads = [part for buffer in buffers for part in buffer.unbind(1)]
        places = (q_tables, queries), (k_tables, keys), (NONE, keys)
        for grad, x, place in zip(grads, results, places, strict=True):
            _put(grad, x, *place, block, add=ragged)
        del results, x  # Before the next block makes its own.
    if ragged:
        buffers = [torch.empty(shape, dtype=dtype) for shape in shapes]
        outs = [part for buffer in buffers for part in buffer.unbind(1)]
        for grad, x, rotation in zip(outs, grads, (tables[:2], tables[2:], NONE), strict=True):
            grad.copy_(_rotated(x, rotation, transpose=True))
    return buffers
