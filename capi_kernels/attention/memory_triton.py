"""Where the attention kernels find their rows: heads of packed tensors, and the sequences of groups and contexts."""

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl
from torch import Tensor

INDEX_BLOCK = tl.constexpr(1024)


class Heads(NamedTuple):
    """[tokens, heads, head_dim] with contiguous channels, from its first head on, or from another."""

    ptr: Tensor
    stride_token: int
    stride_head: int


class Sequences(NamedTuple):
    """Where each group of queries and each context starts, and which context a group reads: by default its own."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    kv_index: Tensor | None


def heads_of(x: Tensor) -> Heads:
    return Heads(x, x.stride(0), x.stride(1))


@triton.constexpr_function
def padded(channels: int) -> int:
    """The power of two that holds the channels, at least the 16 of a matrix instruction."""
    return max(16, triton.next_power_of_2(channels))


@triton.constexpr_function
def first_half(head_dim: int) -> int:
    return (head_dim + 1) // 2  # An odd head has no tables.


@triton.constexpr_function
def padded_half(head_dim: int) -> int:
    return padded(first_half(head_dim))


@triton.jit
@no_type_check
def from_head(x, head):
    """x from an int64 head on."""
    return Heads(x.ptr + head * x.stride_head, x.stride_token, x.stride_head)


@triton.jit
@no_type_check
def load_head(x, token, mask, HEAD_DIM: tl.constexpr, PART: tl.constexpr = 0):  # -> [len(mask), padded channels]
    """The first head of len(mask) tokens from `token` on, or its first or second half; zero where the mask is off."""
    FIRST: tl.constexpr = first_half(HEAD_DIM) if PART == 2 else 0
    COUNT: tl.constexpr = first_half(HEAD_DIM) if PART == 1 else HEAD_DIM - FIRST
    BLOCK: tl.constexpr = padded(HEAD_DIM) if PART == 0 else padded_half(HEAD_DIM)
    offs = tl.arange(0, BLOCK)
    inside = mask[:, None] if COUNT == BLOCK else mask[:, None] & (offs < COUNT)[None, :]
    # int64 up to the first token; a tile spans less than 2^31 elements (checked by `as_operand`).
    ptr = x.ptr + (tl.cast(token, tl.int64) * x.stride_token + FIRST)
    return tl.load(ptr + tl.arange(0, mask.shape[0])[:, None] * x.stride_token + offs[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def store_head(x, rows, token, mask, HEAD_DIM: tl.constexpr, PART: tl.constexpr = 0):
    FIRST: tl.constexpr = first_half(HEAD_DIM) if PART == 2 else 0
    COUNT: tl.constexpr = first_half(HEAD_DIM) if PART == 1 else HEAD_DIM - FIRST
    BLOCK: tl.constexpr = padded(HEAD_DIM) if PART == 0 else padded_half(HEAD_DIM)
    offs = tl.arange(0, BLOCK)
    inside = mask[:, None] if COUNT == BLOCK else mask[:, None] & (offs < COUNT)[None, :]
    ptr = x.ptr + (tl.cast(token, tl.int64) * x.stride_token + FIRST)
    ptrs = ptr + tl.arange(0, mask.shape[0])[:, None] * x.stride_token + offs[None, :]
    tl.store(ptrs, rows.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def bounds(cu_seqlens_ptr, i):
    """Where a group or context starts and ends."""
    return tl.load(cu_seqlens_ptr + i), tl.load(cu_seqlens_ptr + i + 1)


@triton.jit
@no_type_check
def context_of(sequences, group):
    return group if sequences.kv_index is None else tl.load(sequences.kv_index + group)


@triton.jit
@no_type_check
def count_readers(kv_index_ptr, groups, context):
    """How many groups read the context."""
    if kv_index_ptr is None:
        return 1
    else:
        readers = 0
        for first in range(0, groups, INDEX_BLOCK):
            offs = first + tl.arange(0, INDEX_BLOCK)
            readers += tl.sum((tl.load(kv_index_ptr + offs, mask=offs < groups, other=-1) == context).to(tl.int32), 0)
        return readers


@triton.jit
@no_type_check
def next_reader(kv_index_ptr, groups, context, after):
    """The first group after `after` that reads the context."""
    if kv_index_ptr is None:
        return context
    else:
        reader = groups
        for first in range(0, groups, INDEX_BLOCK):
            offs = first + tl.arange(0, INDEX_BLOCK)
            reads = tl.load(kv_index_ptr + offs, mask=offs < groups, other=-1) == context
            reader = tl.minimum(reader, tl.min(tl.where(reads & (offs > after), offs, groups), 0))
        return reader
