"""The rotary embedding from packed tables, as pieces of Triton kernels: y_j = x_j cos_j + x_partner(j) sin_j.

A token has one 32-bit word for each channel, cos and sin in half precision; the partner is in the other half of the
head, and the word has the sign of the first half's sin. That is half the bytes, loads and waiting registers of two
tables in float32, and one table serves the rotation and its transpose. A half is off by at most 2^-12, which for x in
half precision is at most what rounding y is.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_hip

from capi_kernels.attention.memory_triton import Heads, load_head, padded, padded_half, store_head
from capi_kernels.attention.rotary_triton import load_halves

PACK_TOKENS = 64
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
@no_type_check
def pack_kernel(cos_ptr, sin_ptr, table_ptr, tokens, HEAD_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    """One program per block of tokens."""
    token = tl.program_id(0) * BLOCK_TOKENS
    mask = tl.arange(0, BLOCK_TOKENS) < tokens - token
    cos = load_head(Heads(cos_ptr, HEAD_DIM, 0), token, mask, HEAD_DIM)
    sin = load_head(Heads(sin_ptr, HEAD_DIM, 0), token, mask, HEAD_DIM)
    sin = tl.where((tl.arange(0, padded(HEAD_DIM)) < HEAD_DIM // 2)[None, :], -sin, sin)
    low = cos.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high = sin.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16
    store_head(Heads(table_ptr, HEAD_DIM, 0), low | high, token, mask, HEAD_DIM)


def pack_tables(cos: Tensor | None, sin: Tensor | None) -> Tensor | None:
    """One int32 for each element of cos and sin [tokens, head_dim]; None without them."""
    if cos is None:
        return None
    tokens, head_dim = cos.shape
    table = cos.new_empty(cos.shape, dtype=torch.int32)
    pack_kernel[(triton.cdiv(tokens, PACK_TOKENS),)](
        *(cos, sin, table, tokens, head_dim, PACK_TOKENS),
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=True,
    )
    return table


@triton.jit
@no_type_check
def unpack(word):
    """cos and signed sin in float32."""
    cos = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    sin = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
@no_type_check
def load_words(table_ptr, token, mask, HEAD_DIM: tl.constexpr):
    """The halves of the table of len(mask) tokens; zeros, which nobody reads, where there is none."""
    if table_ptr is None:
        return 0, 0
    else:
        word1 = load_head(Heads(table_ptr, HEAD_DIM, 0), token, mask, HEAD_DIM, 1)
        return word1, load_head(Heads(table_ptr, HEAD_DIM, 0), token, mask, HEAD_DIM, 2)


@triton.jit
@no_type_check
def together(x1, x2):
    """[N, M] and [N, M] side by side: [N, 2 M]."""
    return tl.reshape(tl.permute(tl.join(x1, x2), (0, 2, 1)), (x1.shape[0], 2 * x1.shape[1]))


@triton.jit
@no_type_check
def apart(x):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
@no_type_check
def pinned(x):
    """x, which the compiler computes once, in one layout: it would rather rotate a tile again for each use of it."""
    if INTERPRETED or is_hip() or x.dtype.primitive_bitwidth != 16:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit
@no_type_check
def load_rotated_by(x, token, mask, words, ROTARY: tl.constexpr, HEAD_DIM: tl.constexpr):
    """A head of len(mask) tokens, its halves padded each by itself, rotated in float32."""
    if not ROTARY and 2 * padded_half(HEAD_DIM) == HEAD_DIM:
        return load_head(x, token, mask, HEAD_DIM)
    else:
        x1, x2 = load_halves(x, token, mask, HEAD_DIM)
        if ROTARY:
            cos1, sin1 = unpack(words[0])
            cos2, sin2 = unpack(words[1])
            y1 = (x1 * cos1 + x2 * sin1).to(x1.dtype)
            y2 = (x2 * cos2 + x1 * sin2).to(x2.dtype)
            x1, x2 = y1, y2
        return pinned(together(x1, x2))


@triton.jit
@no_type_check
def load_rotated_head(x, table_ptr, token, mask, HEAD_DIM: tl.constexpr):
    """The same, of words that nothing else needs."""
    words = load_words(table_ptr, token, mask, HEAD_DIM)
    return load_rotated_by(x, token, mask, words, table_ptr is not None, HEAD_DIM)


@triton.jit
@no_type_check
def store_gradient(x, g, token, mask, words, ROTARY: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The transpose of the rotation, not its inverse: dx_j = g_j cos_j + g_partner sin_partner."""
    g1, g2 = apart(g)
    if ROTARY:
        cos1, sin1 = unpack(words[0])
        cos2, sin2 = unpack(words[1])
        g1, g2 = g1 * cos1 + g2 * sin2, g2 * cos2 + g1 * sin1
    store_head(x, g1, token, mask, HEAD_DIM, 1)
    store_head(x, g2, token, mask, HEAD_DIM, 2)


@triton.jit
@no_type_check
def store_rotated_gradient(x, g, table_ptr, token, mask, HEAD_DIM: tl.constexpr):
    """The same, of words that nothing else needs."""
    words = load_words(table_ptr, token, mask, HEAD_DIM)
    store_gradient(x, g, token, mask, words, table_ptr is not None, HEAD_DIM)
