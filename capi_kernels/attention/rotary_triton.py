"""y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2 on the halves of a head, and its transpose, as pieces of Triton kernels.

A head is held as two halves: each element is read once, its partner stands in the same place of the other half, and a
product over the channels is the sum of two. Halves and heads that are no power of two are padded with zeros.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from capi_kernels.attention.memory_triton import Heads, from_head, heads_of, load_head, padded_half, store_head
from capi_kernels.attention.softmax_triton import queries_by_keys

ROTATE_TOKENS = 32


class Tables(NamedTuple):
    """[tokens, head_dim] in float32, or neither."""

    cos: Tensor | None
    sin: Tensor | None


@triton.jit
@no_type_check
def load_halves(x, token, mask, HEAD_DIM: tl.constexpr):
    """Those of one head of len(mask) tokens."""
    return load_head(x, token, mask, HEAD_DIM, 1), load_head(x, token, mask, HEAD_DIM, 2)


@triton.jit
@no_type_check
def load_tables(tables, token, mask, HEAD_DIM: tl.constexpr):
    """The halves of both."""
    cos, sin = Heads(tables.cos, HEAD_DIM, 0), Heads(tables.sin, HEAD_DIM, 0)
    c1, s1 = load_head(cos, token, mask, HEAD_DIM, 1), load_head(sin, token, mask, HEAD_DIM, 1)
    return c1, s1, load_head(cos, token, mask, HEAD_DIM, 2), load_head(sin, token, mask, HEAD_DIM, 2)


@triton.jit
@no_type_check
def load_rotated(x, tables, token, mask, HEAD_DIM: tl.constexpr):
    """The halves, rotated in float32; as they are where there are no tables."""
    x1, x2 = load_halves(x, token, mask, HEAD_DIM)
    if tables.cos is not None:
        c1, s1, c2, s2 = load_tables(tables, token, mask, HEAD_DIM)
        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2
        x1, x2 = y1.to(x1.dtype), y2.to(x2.dtype)
    return x1, x2


@triton.jit
@no_type_check
def store_unrotated(x, g, tables, token, mask, HEAD_DIM: tl.constexpr):
    """The transpose of the rotation, not its inverse: dx1 = g1 c1 + g2 s2, dx2 = g2 c2 - g1 s1."""
    g1, g2 = g
    if tables.cos is None:
        store_head(x, g1, token, mask, HEAD_DIM, 1)
        store_head(x, g2, token, mask, HEAD_DIM, 2)
    else:
        # A store between the loads keeps the compiler from holding all four tables at once, which would spill.
        c1 = load_head(Heads(tables.cos, HEAD_DIM, 0), token, mask, HEAD_DIM, 1)
        s2 = load_head(Heads(tables.sin, HEAD_DIM, 0), token, mask, HEAD_DIM, 2)
        store_head(x, g1 * c1 + g2 * s2, token, mask, HEAD_DIM, 1)
        c2 = load_head(Heads(tables.cos, HEAD_DIM, 0), token, mask, HEAD_DIM, 2)
        s1 = load_head(Heads(tables.sin, HEAD_DIM, 0), token, mask, HEAD_DIM, 1)
        store_head(x, g2 * c2 - g1 * s1, token, mask, HEAD_DIM, 2)


@triton.jit
@no_type_check
def zero_halves(BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    HALF: tl.constexpr = padded_half(HEAD_DIM)
    return tl.zeros([BLOCK, HALF], tl.float32), tl.zeros([BLOCK, HALF], tl.float32)


@triton.jit
@no_type_check
def scaled(x, scale):
    return x[0] * scale, x[1] * scale


@triton.jit
@no_type_check
def halves_by_halves(q, k, KEYS: tl.constexpr):
    """q k^T of rows of queries and rows of keys, or its transpose."""
    s = queries_by_keys(q[0], k[0], KEYS)
    if KEYS == 0:
        return tl.dot(k[1], tl.trans(q[1]), s, input_precision="ieee")
    else:
        return tl.dot(q[1], tl.trans(k[1]), s, input_precision="ieee")


@triton.jit
@no_type_check
def add_product(acc, scores, x):
    """acc + scores x, of halves x."""
    return tl.dot(scores, x[0], acc[0], input_precision="ieee"), tl.dot(scores, x[1], acc[1], input_precision="ieee")


@triton.jit
@no_type_check
def rotate_kernel(x, out, tables, tokens, heads, HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    """One program per block of tokens, all their heads: the tables are read once."""
    token = tl.program_id(0) * BLOCK_TOKENS
    mask = tl.arange(0, BLOCK_TOKENS) < tokens - token
    c1, s1, c2, s2 = load_tables(tables, token, mask, HEAD_DIM)
    for head in range(heads):
        x1, x2 = load_halves(from_head(x, tl.cast(head, tl.int64)), token, mask, HEAD_DIM)
        rotated_head = from_head(out, tl.cast(head, tl.int64))
        store_head(rotated_head, x1 * c1 - x2 * s1, token, mask, HEAD_DIM, 1)
        store_head(rotated_head, x2 * c2 + x1 * s2, token, mask, HEAD_DIM, 2)


def rotated(x: Tensor, tables: Tables) -> Tensor:
    """A rotated copy of x [tokens, heads, head_dim]; x itself where there are no tables."""
    if tables.cos is None:
        return x
    tokens, heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rotate_kernel[(triton.cdiv(tokens, ROTATE_TOKENS),)](
        *(heads_of(x), heads_of(out), tables, tokens, heads, head_dim, ROTATE_TOKENS),
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=True,
    )
    return out
