"""y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2 on the halves of a head, and its transpose, as pieces of Triton kernels.

A head is held as two halves: each element is read once, its partner stands in the same place of the other half, and a
product over the channels is the sum of two. Halves and heads that are no power of two are padded with zeros.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

ROTATE_TOKENS = 32


def padded(channels: int) -> int:
    """The power of two that holds the channels, at least the 16 of a matrix instruction."""
    return max(16, triton.next_power_of_2(channels))


@triton.jit
@no_type_check
def load_channels(ptr, token, mask, stride_token, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Channels [FIRST, FIRST + COUNT) of len(mask) tokens from `token` on, zero where the mask is off."""
    offs = tl.arange(0, BLOCK)
    inside = mask[:, None] if COUNT == BLOCK else mask[:, None] & (offs < COUNT)[None, :]
    # int64 up to the first token; a tile spans less than 2^31 elements (checked by `as_operand`).
    ptr += tl.cast(token, tl.int64) * stride_token + FIRST
    return tl.load(ptr + tl.arange(0, mask.shape[0])[:, None] * stride_token + offs[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def store_channels(ptr, x, token, mask, stride_token, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    inside = mask[:, None] if COUNT == BLOCK else mask[:, None] & (offs < COUNT)[None, :]
    ptr += tl.cast(token, tl.int64) * stride_token + FIRST
    ptrs = ptr + tl.arange(0, mask.shape[0])[:, None] * stride_token + offs[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def load_rotated(
    x_ptr, cos_ptr, sin_ptr, token, mask, x_stride_token, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr
):  # -> 2 x [len(mask), BLOCK_HALF]
    """The halves of one head of len(mask) tokens, rotated in float32; as they are where there are no tables."""
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2  # An odd head has no tables.
    REST: tl.constexpr = HEAD_DIM - HALF
    x1 = load_channels(x_ptr, token, mask, x_stride_token, 0, HALF, BLOCK_HALF)
    x2 = load_channels(x_ptr, token, mask, x_stride_token, HALF, REST, BLOCK_HALF)
    if cos_ptr is not None:
        c1 = load_channels(cos_ptr, token, mask, HEAD_DIM, 0, HALF, BLOCK_HALF)
        s1 = load_channels(sin_ptr, token, mask, HEAD_DIM, 0, HALF, BLOCK_HALF)
        c2 = load_channels(cos_ptr, token, mask, HEAD_DIM, HALF, HALF, BLOCK_HALF)
        s2 = load_channels(sin_ptr, token, mask, HEAD_DIM, HALF, HALF, BLOCK_HALF)
        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2
        x1, x2 = y1.to(x1.dtype), y2.to(x2.dtype)
    return x1, x2


@triton.jit
@no_type_check
def store_unrotated(
    x_ptr, g1, g2, cos_ptr, sin_ptr, token, mask, x_stride_token, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    """The transpose of the rotation, not its inverse: dx1 = g1 c1 + g2 s2, dx2 = g2 c2 - g1 s1."""
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    REST: tl.constexpr = HEAD_DIM - HALF
    if cos_ptr is None:
        store_channels(x_ptr, g1, token, mask, x_stride_token, 0, HALF, BLOCK_HALF)
        store_channels(x_ptr, g2, token, mask, x_stride_token, HALF, REST, BLOCK_HALF)
    else:
        # A store between the loads keeps the compiler from holding all four tables at once, which would spill.
        c1 = load_channels(cos_ptr, token, mask, HEAD_DIM, 0, HALF, BLOCK_HALF)
        s2 = load_channels(sin_ptr, token, mask, HEAD_DIM, HALF, HALF, BLOCK_HALF)
        store_channels(x_ptr, g1 * c1 + g2 * s2, token, mask, x_stride_token, 0, HALF, BLOCK_HALF)
        c2 = load_channels(cos_ptr, token, mask, HEAD_DIM, HALF, HALF, BLOCK_HALF)
        s1 = load_channels(sin_ptr, token, mask, HEAD_DIM, 0, HALF, BLOCK_HALF)
        store_channels(x_ptr, g2 * c2 - g1 * s1, token, mask, x_stride_token, HALF, HALF, BLOCK_HALF)


@triton.jit
@no_type_check
def rotate_kernel(
    x_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    x_stride_token,
    x_stride_head,
    out_stride_token,
    out_stride_head,
    tokens,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One program per block of tokens, all their heads: the tables are read once."""
    token = tl.program_id(0) * BLOCK_TOKENS
    mask = tl.arange(0, BLOCK_TOKENS) < tokens - token
    HALF: tl.constexpr = HEAD_DIM // 2
    c1 = load_channels(cos_ptr, token, mask, HEAD_DIM, 0, HALF, BLOCK_HALF)
    s1 = load_channels(sin_ptr, token, mask, HEAD_DIM, 0, HALF, BLOCK_HALF)
    c2 = load_channels(cos_ptr, token, mask, HEAD_DIM, HALF, HALF, BLOCK_HALF)
    s2 = load_channels(sin_ptr, token, mask, HEAD_DIM, HALF, HALF, BLOCK_HALF)
    for head in range(heads):
        x_head = x_ptr + tl.cast(head, tl.int64) * x_stride_head
        out_head = out_ptr + tl.cast(head, tl.int64) * out_stride_head
        x1 = load_channels(x_head, token, mask, x_stride_token, 0, HALF, BLOCK_HALF)
        x2 = load_channels(x_head, token, mask, x_stride_token, HALF, HALF, BLOCK_HALF)
        store_channels(out_head, x1 * c1 - x2 * s1, token, mask, out_stride_token, 0, HALF, BLOCK_HALF)
        store_channels(out_head, x2 * c2 + x1 * s2, token, mask, out_stride_token, HALF, HALF, BLOCK_HALF)


def rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """A rotated copy of x [tokens, heads, head_dim]; x itself where there are no tables."""
    if cos is None:
        return x
    tokens, heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rotate_kernel[(triton.cdiv(tokens, ROTATE_TOKENS),)](
        x,
        out,
        cos,
        sin,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        tokens,
        heads,
        HEAD_DIM=head_dim,
        BLOCK_HALF=padded(head_dim // 2),
        BLOCK_TOKENS=ROTATE_TOKENS,
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=True,
    )
    return out
