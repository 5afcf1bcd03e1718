"""Attention on a CPU of groups of one size, in float32 or wider, all at a time.

Where they are small each kernel takes so little time that what is around it counts: what they share is made once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from capi_kernels.attention.rotary import halves, turned

Tables = Sequence[Tensor | None]  # cos and sin, or None and None, of one side or of two
Rotated = Sequence[Tensor | None]  # q and k as the forward rotated them, where it kept them
PACKED = torch.contiguous_format
VECTOR = 16  # Numbers in a vector instruction, at most.
aten = torch.ops.aten


def images(x: Tensor, groups: int) -> Tensor:
    """A view [groups, heads, length, head_dim] of packed [tokens, heads, head_dim], of one head of tables."""
    if x.ndim == 2:
        return x.view(groups, 1, -1, x.shape[1])
    return x.view(groups, -1, x.shape[1], x.shape[2]).transpose(1, 2)


def packed(x: Tensor) -> Tensor:
    """[tokens, heads, head_dim] of [groups, heads, length, head_dim], a view where they lie so."""
    return x.transpose(1, 2).flatten(0, 1)


def gradient_buffers(q: Tensor, k: Tensor, parts: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Buffers [tokens, parts, heads, head_dim], without an axis of 1, and the places of dq, dk and dv in them."""
    buffers = [torch.empty((len(x), n, *x.shape[1:]), dtype=x.dtype) for x, n in zip((q, k, k), parts, strict=False)]
    places = [part for buffer in buffers for part in buffer.unbind(1)]
    return [x[:, 0] if n == 1 else x for x, n in zip(buffers, parts, strict=True)], places


def _turns_of(tables: Tables, groups: int) -> list[tuple[Tensor, Tensor, Tensor] | None]:
    """What `turned` takes to rotate q and k [groups, heads, length, head_dim]."""
    turns = []
    for cos, sin in (tables[:2], tables[2:]):
        if turns and cos is tables[0] and sin is tables[1]:
            turns *= 2
        else:
            turns.append(None if cos is None else (images(cos, groups), *halves(images(sin, groups))))
    return turns


def _taken(x: Tensor, groups: int, turn: Sequence[Tensor] | None = None) -> Tensor:
    """Contiguous [groups, heads, length, head_dim] of packed x."""
    x = images(x, groups)
    return turned(x, turn, torch.empty_like(x, memory_format=PACKED))


def _given(dx: Tensor, x: Tensor, groups: int, turn: Sequence[Tensor] | None, place: Tensor | None) -> Tensor:
    """Packed [tokens, heads, head_dim], as x is, of dx [groups, heads, length, head_dim], or with these two in one."""
    out = torch.empty_like(x, memory_format=PACKED) if place is None else place
    to = images(out, groups)
    turned(dx.view(to.shape), turn, to, transpose=True)
    return out


def tiled(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """PyTorch's tiled attention, but for rows of NaN: of fewer keys than a vector holds it makes zeros."""
    out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    if k.shape[-2] < VECTOR and (zero := logsumexp == 0).any():  # As it then is, but not only then.
        lost = zero & ~(q @ k.mT).amax(-1).isfinite()
        out.masked_fill_(lost.unsqueeze(-1), torch.nan)
    return out, logsumexp


def whole_forward(
    q: Tensor, k: Tensor, v: Tensor, tables: Tables, groups: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`attention` of cpu.py. Rotated keys lie as [groups, heads, keys, head_dim], whatever their shape says."""
    q_turn, k_turn = _turns_of(tables, groups)
    q_, k_, v_ = (images(x if x.stride(-1) == 1 else x.contiguous(), groups) for x in (q, k, v))
    if q_turn is not None:  # As packed as q is: and so is then o.
        q_ = turned(q_, q_turn, images(torch.empty_like(q, memory_format=PACKED), groups))
    if k_turn is not None:
        k_ = _taken(k, groups, k_turn)
    out, logsumexp = tiled(q_, k_, v_, scale)
    rotated = packed(q_), k if k_turn is None else k_.view_as(k)
    return packed(out), logsumexp.transpose(1, 2).flatten(0, 1), *rotated


def tiled_backward(
    do: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tables,
    groups: int,
    scale: float,
    parts: Sequence[int],
    rotated: Rotated,
) -> list[Tensor]:
    """`attention_backward` of cpu.py by PyTorch's, which forms no weights."""
    (q_turn, k_turn), (q_, k_) = _turns_of(tables, groups), rotated
    q_ = _taken(q, groups, q_turn) if q_ is None else images(q_, groups)
    k_ = _taken(k, groups, k_turn) if k_ is None else k_.view(groups, k.shape[1], -1, k.shape[2])
    do, v_, out = (images(x if x.stride(-1) == 1 else x.contiguous(), groups) for x in (do, v, out))
    logsumexp = logsumexp.view(groups, -1, q.shape[1]).transpose(1, 2)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = backward(do, q_, k_, v_, out, logsumexp, 0.0, False, scale=scale)
    del q_, k_
    if len(parts) == 3:
        return [_given(dq, q, groups, q_turn, None), _given(dk, k, groups, k_turn, None), packed(dv)]
    buffers, places = gradient_buffers(q, k, parts)
    for dx, turn, place in zip((dq, dk, dv), (q_turn, k_turn, None), places, strict=True):
        turned(dx, turn, images(place, groups), transpose=True)
    return buffers


def small_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tables,
    groups: int,
    scale: float,
    parts: Sequence[int],
    rotated: Rotated,
) -> list[Tensor]:
    """`attention_backward` of cpu.py where all weights are formed at a time.

    Each gradient goes where it belongs before the next is formed: their memory is one after the other's.
    """
    pairs, head_dim = groups * q.shape[1], q.shape[2]
    (q_turn, k_turn), (q_, k_) = _turns_of(tables, groups), rotated
    q_ = _taken(*((q, groups, q_turn) if q_ is None else (q_, groups))).view(pairs, -1, head_dim)
    k_ = (_taken(k, groups, k_turn) if k_ is None else k_).view(pairs, -1, head_dim)
    # In place, which autocast leaves alone: it may be on in a backward.
    dS = torch.empty(pairs, q_.shape[1], k_.shape[1], dtype=q.dtype).baddbmm_(q_, k_.mT, beta=0, alpha=scale)
    P = torch.empty_like(dS)
    aten._softmax.out(dS, -1, False, out=P)
    do_, v_ = _taken(do, groups).view(pairs, -1, head_dim), _taken(v, groups).view(pairs, -1, head_dim)
    dS.baddbmm_(do_, v_.mT, beta=0)
    aten._softmax_backward_data.out(dS, P, -1, P.dtype, grad_input=dS)
    v_.baddbmm_(P.mT, do_, beta=0)
    del P
    buffers, places = ([], [None] * 3) if len(parts) == 3 else gradient_buffers(q, k, parts)
    dv = _given(v_, v, groups, None, places[2])
    del v_
    do_.baddbmm_(dS, k_, beta=0, alpha=scale)
    dq = _given(do_, q, groups, q_turn, places[0])
    del do_
    k_ = k_ if rotated[1] is None else torch.empty_like(k_)
    k_.baddbmm_(dS.mT, q_, beta=0, alpha=scale)
    del dS, q_
    dk = _given(k_, k, groups, k_turn, places[1])
    return buffers or [dq, dk, dv]
