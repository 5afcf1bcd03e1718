"""Attention on a CPU of groups of one size that are small: its backward, and how they are taken out of packed tensors.

Each kernel takes so little time that what is around it counts: what they share is made once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from capi_kernels.attention.rotary import halves, turned

Tables = Sequence[Tensor | None]  # cos and sin, or None and None, of one side or of two
PACKED = torch.contiguous_format
aten = torch.ops.aten


def images(x: Tensor, groups: int) -> Tensor:
    """A view [groups, heads, length, head_dim] of packed [tokens, heads, head_dim], of one head of tables."""
    if x.ndim == 2:
        return x.view(groups, 1, -1, x.shape[1])
    return x.view(groups, -1, x.shape[1], x.shape[2]).transpose(1, 2)


def turns_of(tables: Tables, groups: int) -> list[tuple[Tensor, Tensor, Tensor] | None]:
    """What `turned` takes to rotate q and k [groups, heads, length, head_dim]."""
    turns = []
    for cos, sin in (tables[:2], tables[2:]):
        if turns and cos is tables[0] and sin is tables[1]:
            turns *= 2
        else:
            turns.append(None if cos is None else (images(cos, groups), *halves(images(sin, groups))))
    return turns


def taken(x: Tensor, groups: int, turn: Sequence[Tensor] | None = None) -> Tensor:
    """Contiguous [groups, heads, length, head_dim] of packed x."""
    x = images(x, groups)
    return turned(x, turn, torch.empty_like(x, memory_format=PACKED))


def given(dx: Tensor, x: Tensor, groups: int, turn: Sequence[Tensor] | None = None) -> Tensor:
    """Packed [tokens, heads, head_dim] of dx [groups * heads, length, head_dim], as x is."""
    out = torch.empty_like(x, memory_format=PACKED)
    packed = images(out, groups)
    turned(dx.view_as(packed), turn, packed, transpose=True)
    return out


def small_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, tables: Tables, groups: int, scale: float, rotated: Tensor | None
) -> list[Tensor]:
    """`attention_backward` to parts of 1 where all weights, in float32 or wider, are formed at a time.

    Each gradient goes where it belongs before the next is formed: their memory is one after the other's.
    """
    pairs, head_dim = groups * q.shape[1], q.shape[2]
    q_turn, k_turn = turns_of(tables, groups)
    q_ = taken(q, groups, q_turn).view(pairs, -1, head_dim)
    k_ = (taken(k, groups, k_turn) if rotated is None else rotated).view(pairs, -1, head_dim)
    # In place, which autocast leaves alone: it may be on in a backward.
    dS = torch.empty(pairs, q_.shape[1], k_.shape[1], dtype=q.dtype).baddbmm_(q_, k_.mT, beta=0, alpha=scale)
    P = torch.empty_like(dS)
    aten._softmax.out(dS, -1, False, out=P)
    do_, v_ = taken(do, groups).view(pairs, -1, head_dim), taken(v, groups).view(pairs, -1, head_dim)
    dS.baddbmm_(do_, v_.mT, beta=0)
    aten._softmax_backward_data.out(dS, P, -1, P.dtype, grad_input=dS)
    v_.baddbmm_(P.mT, do_, beta=0)
    del P
    dv = given(v_, v, groups)
    del v_
    do_.baddbmm_(dS, k_, beta=0, alpha=scale)
    dq = given(do_, q, groups, q_turn)
    del do_
    k_ = k_ if rotated is None else torch.empty_like(k_)
    k_.baddbmm_(dS.mT, q_, beta=0, alpha=scale)
    del dS, q_
    return [dq, given(k_, k, groups, k_turn), dv]
