"""What the launchers of the attention kernels share: the operands of the op, in the form that kernels take."""

from typing import NamedTuple

import torch
from torch import Tensor

from capi_kernels.attention.configs import HEAD_DIMS
from capi_kernels.attention.memory_triton import Sequences
from capi_kernels.attention.packed_rotary_triton import pack_tables
from capi_kernels.attention.rotary_triton import Tables

LOG2_E = 1.4426950408889634
ENOUGH_PROGRAMS = 1024  # To keep a GPU busy; beyond, a program takes several heads.
TYPES = (torch.float16, torch.bfloat16, torch.float32)


class Operands(NamedTuple):
    """Those of the op: every kernel takes groups of queries that read contexts; in self-attention both are images."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_cos: Tensor | None
    q_sin: Tensor | None
    k_cos: Tensor | None
    k_sin: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    kv_index: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float

    @property
    def groups(self) -> int:
        return len(self.cu_seqlens_q) - 1

    @property
    def contexts(self) -> int:
        return len(self.cu_seqlens_k) - 1

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def head_dim(self) -> int:
        return self.q.shape[2]

    @property
    def scale_log2(self) -> float:
        return self.scale * LOG2_E

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.cu_seqlens_q, self.cu_seqlens_k, self.kv_index)

    @property
    def tables(self) -> tuple[Tables, Tables]:
        """Of queries and keys."""
        return Tables(self.q_cos, self.q_sin), Tables(self.k_cos, self.k_sin)

    @property
    def own(self) -> bool:
        """Whether queries lie where keys do, with the same tables."""
        same = self.q_cos is self.k_cos and self.q_sin is self.k_sin
        return same and self.cu_seqlens_q is self.cu_seqlens_k and self.kv_index is None

    def packed_tables(self) -> tuple[Tensor | None, Tensor | None]:
        """Of queries and keys."""
        q_table = pack_tables(self.q_cos, self.q_sin)
        return q_table, q_table if self.own else pack_tables(self.k_cos, self.k_sin)


def as_operand(x: Tensor) -> Tensor:
    """x with contiguous channels: itself, or a copy where it has none, or tokens too far apart for 32-bit offsets."""
    return x if x.stride(-1) == 1 and 0 <= x.stride(0) < 2**31 // 256 else x.contiguous()


def launchable(x: Operands) -> Operands:
    """The operands as kernels take them: with contiguous channels and tables, an index in int32."""
    dtype, head_dim = x.q.dtype, x.head_dim
    if dtype not in TYPES:
        raise TypeError(f"on a GPU q must be torch.float16, torch.bfloat16 or torch.float32, got {dtype}")
    if head_dim > HEAD_DIMS[-1]:
        raise ValueError(f"on a GPU head_dim must be at most {HEAD_DIMS[-1]}, got {head_dim}")
    q, k, v, *others, kv_index, max_seqlen_q, max_seqlen_k, scale = x
    others = (y if y is None else y.contiguous() for y in others)
    # An index in int64 would ask for kernels of its own.
    kv_index = kv_index if kv_index is None else kv_index.int().contiguous()
    return Operands(*map(as_operand, (q, k, v)), *others, kv_index, max_seqlen_q, max_seqlen_k, scale)


def heads_per_program(x: Operands) -> int:
    """Heads that share a program share the tables it reads, several times the bytes of their q and k."""
    most = x.groups * x.heads // ENOUGH_PROGRAMS
    return next(n for n in (4, 3, 2, 1) if n == 1 or (x.heads % n == 0 and n <= most))


def new_output(x: Operands) -> tuple[Tensor, Tensor]:
    """o [queries, heads, head_dim] and, [2, heads, queries] in float32, m and 1 / l."""
    out = torch.empty(x.q.shape, dtype=x.q.dtype, device=x.q.device)
    return out, torch.empty((2, x.heads, len(x.q)), dtype=torch.float32, device=x.q.device)
