"""Attention of short contexts on chip, several heads a program, with the tables of the rotary embedding packed.

    forward: S = rope(q) rope(k)^T; o = softmax(S scale) v
    backward: dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q

A token has one 32-bit word for each channel, cos and sin in half precision: y_j = x_j cos_j + x_partner(j) sin_j, the
partner in the other half of the head, the sign of the first half's sin in the word. Never written to memory: S, P,
their gradients, the rotated q and k.
"""

from collections.abc import Callable
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from capi_kernels._attention_triton import Operands, load_stats, new_output, store_stats
from capi_kernels._rotary_triton import load_channels, padded, rotated, store_channels

PACK_TOKENS = 64
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class PackedConfig(NamedTuple):
    """Tile sizes, how the work is cut, and how a kernel is compiled.

    block_k, second and tail: the pieces that hold the keys. unrolled: tiles of queries; 0 loops over as many as there
    are. heads: that share a program. stages, inner: loads ahead in the loop over heads and in that over tiles. keep:
    the tables stay in registers over the heads. join: a product over all channels instead of one for each half. lean:
    the backward keeps weights in the type of v. read_o: it takes rowsum(P dP) as rowsum(o do). keys_first: scores are
    [keys, queries], for few queries. by: what a program loops over. channels_first: products for dk and dv are
    [channels, keys].
    """

    block_q: int
    block_k: int
    num_warps: int
    unrolled: int = 1
    heads: int = 1
    stages: int = 1
    inner: int = 1
    keep: bool = False
    join: bool = True
    second: int = 0
    tail: int = 0
    lean: bool = False
    keys_first: bool = False
    read_o: bool = False
    by: str = "queries"
    channels_first: bool = False
    max_registers: int | None = None

    @property
    def options(self) -> dict:
        options = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}

    def constants(self, kernel: Callable, head_dim: int) -> dict:
        values = {
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "SECOND": self.second,
            "TAIL": self.tail,
            "UNROLLED": self.unrolled,
            "HEADS": self.heads,
            "STAGES": self.stages,
            "INNER": self.inner,
            "KEEP": self.keep,
            "JOIN": self.join,
            "LEAN": self.lean,
            "KEYS_FIRST": self.keys_first,
            "READ_O": self.read_o,
            "CHANNELS_FIRST": self.channels_first,
            "HEAD_DIM": head_dim,
            "BLOCK_HALF": padded((head_dim + 1) // 2),
            "BLOCK_D": padded(head_dim),
        }
        return {name: values[name] for name in kernel.arg_names if name in values}


@triton.jit
@no_type_check
def pack_kernel(
    cos_ptr, sin_ptr, table_ptr, tokens, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr
):
    """One program per block of tokens."""
    token = tl.program_id(0) * TOKENS
    mask = tl.arange(0, TOKENS) < tokens - token
    cos = load_channels(cos_ptr, token, mask, HEAD_DIM, 0, HEAD_DIM, BLOCK_D)
    sin = load_channels(sin_ptr, token, mask, HEAD_DIM, 0, HEAD_DIM, BLOCK_D)
    sin = tl.where((tl.arange(0, BLOCK_D) < HEAD_DIM // 2)[None, :], -sin, sin)
    low = cos.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high = sin.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16
    store_channels(table_ptr, low | high, token, mask, HEAD_DIM, 0, HEAD_DIM, BLOCK_D)


def pack_tables(cos: Tensor | None, sin: Tensor | None) -> Tensor | None:
    """One int32 for each element of cos and sin [tokens, head_dim], as these kernels read them."""
    if cos is None:
        return None
    tokens, head_dim = cos.shape
    table = cos.new_empty(cos.shape, dtype=torch.int32)
    pack_kernel[(triton.cdiv(tokens, PACK_TOKENS),)](
        cos, sin, table, tokens, HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), TOKENS=PACK_TOKENS, num_warps=4
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
def load_words(table_ptr, token, mask, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """The table of len(mask) tokens, 2 x [len(mask), BLOCK_HALF]."""
    HALF: tl.constexpr = HEAD_DIM // 2
    word1 = load_channels(table_ptr, token, mask, HEAD_DIM, 0, HALF, BLOCK_HALF)
    return word1, load_channels(table_ptr, token, mask, HEAD_DIM, HALF, HALF, BLOCK_HALF)


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
    if INTERPRETED or x.dtype.primitive_bitwidth != 16:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit
@no_type_check
def load_head(
    x_ptr,
    token,
    mask,
    stride_token,
    word1,
    word2,
    ROTARY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    JOIN: tl.constexpr,
):
    """A head of len(mask) tokens, rotated: both halves, or twice the tile of all channels."""
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2  # An odd head has no tables.
    if JOIN and not ROTARY and HEAD_DIM == 2 * BLOCK_HALF:
        x = load_channels(x_ptr, token, mask, stride_token, 0, HEAD_DIM, HEAD_DIM)
        return x, x
    x1 = load_channels(x_ptr, token, mask, stride_token, 0, HALF, BLOCK_HALF)
    x2 = load_channels(x_ptr, token, mask, stride_token, HALF, HEAD_DIM - HALF, BLOCK_HALF)
    if ROTARY:
        cos1, sin1 = unpack(word1)
        cos2, sin2 = unpack(word2)
        y1 = (x1 * cos1 + x2 * sin1).to(x1.dtype)
        y2 = (x2 * cos2 + x1 * sin2).to(x2.dtype)
        x1, x2 = y1, y2
    if JOIN:
        x = pinned(together(x1, x2))
        return x, x
    else:
        return x1, x2


@triton.jit
@no_type_check
def load_rotated_head(
    x_ptr, table_ptr, token, mask, stride_token, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr, JOIN: tl.constexpr
):
    if table_ptr is None:
        return load_head(x_ptr, token, mask, stride_token, 0, 0, False, HEAD_DIM, BLOCK_HALF, JOIN)
    else:
        word1, word2 = load_words(table_ptr, token, mask, HEAD_DIM, BLOCK_HALF)
        return load_head(x_ptr, token, mask, stride_token, word1, word2, True, HEAD_DIM, BLOCK_HALF, JOIN)


@triton.jit
@no_type_check
def scores(a1, a2, b1, b2, JOIN: tl.constexpr):
    s = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    if not JOIN:
        s = tl.dot(a2, tl.trans(b2), s, input_precision="ieee")
    return s


@triton.jit
@no_type_check
def store_gradient(
    x_ptr, g1, g2, table_ptr, token, mask, stride_token, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    """The transpose of the rotation, not its inverse: dx_j = g_j cos_j + g_partner sin_partner."""
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    if table_ptr is None:
        store_channels(x_ptr, g1, token, mask, stride_token, 0, HALF, BLOCK_HALF)
        store_channels(x_ptr, g2, token, mask, stride_token, HALF, HEAD_DIM - HALF, BLOCK_HALF)
    else:
        word1, word2 = load_words(table_ptr, token, mask, HEAD_DIM, BLOCK_HALF)
        cos1, sin1 = unpack(word1)
        cos2, sin2 = unpack(word2)
        store_channels(x_ptr, g1 * cos1 + g2 * sin2, token, mask, stride_token, 0, HALF, BLOCK_HALF)
        store_channels(x_ptr, g2 * cos2 + g1 * sin1, token, mask, stride_token, HALF, HALF, BLOCK_HALF)


@triton.jit
@no_type_check
def attend(
    q1,
    q2,
    k1,
    k2,
    v,
    mask_k,
    second_k1,
    second_k2,
    second_v,
    second_mask,
    tail_k1,
    tail_k2,
    tail_v,
    tail_mask,
    scale_log2,
    SECOND: tl.constexpr,
    TAIL: tl.constexpr,
    JOIN: tl.constexpr,
):
    """o, m and 1 / l of a tile of queries over one to three pieces of keys."""
    # Padded keys score -inf; zero would still receive weight. The context may be empty.
    s = tl.where(mask_k[None, :], scores(q1, q2, k1, k2, JOIN), float("-inf"))
    m = tl.maximum(tl.max(s, 1), -1e30)
    if SECOND > 0:
        second_s = tl.where(second_mask[None, :], scores(q1, q2, second_k1, second_k2, JOIN), float("-inf"))
        m = tl.maximum(m, tl.max(second_s, 1))
    if TAIL > 0:
        tail_s = tl.where(tail_mask[None, :], scores(q1, q2, tail_k1, tail_k2, JOIN), float("-inf"))
        m = tl.maximum(m, tl.max(tail_s, 1))
    shift = (m * scale_log2)[:, None]
    p = tl.exp2(s * scale_log2 - shift)
    l = tl.sum(p, 1)  # noqa: E741
    o = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    if SECOND > 0:
        second_p = tl.exp2(second_s * scale_log2 - shift)
        l += tl.sum(second_p, 1)  # noqa: E741
        o = tl.dot(second_p.to(v.dtype), second_v, o, input_precision="ieee")
    if TAIL > 0:
        tail_p = tl.exp2(tail_s * scale_log2 - shift)
        l += tl.sum(tail_p, 1)  # noqa: E741
        o = tl.dot(tail_p.to(v.dtype), tail_v, o, input_precision="ieee")
    inverse_l = 1 / tl.where(l > 0, l, 1.0)
    return o * inverse_l[:, None], m, inverse_l


@triton.jit
@no_type_check
def packed_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    stats_ptr,
    q_table_ptr,
    k_table_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    kv_index_ptr,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    out_stride_token,
    out_stride_head,
    queries,
    heads,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SECOND: tl.constexpr,
    TAIL: tl.constexpr,
    UNROLLED: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
    INNER: tl.constexpr,
    KEEP: tl.constexpr,
    JOIN: tl.constexpr,
    SELF: tl.constexpr,
):
    """One program per (group, HEADS heads); all keys of a head are on chip. SELF: the queries are the keys."""
    ROTARY: tl.constexpr = k_table_ptr is not None
    SHARED: tl.constexpr = SELF and BLOCK_Q == BLOCK_K and UNROLLED == 1 and ROTARY  # One read of the table for both.
    programs = heads // HEADS
    group = tl.program_id(0) // programs
    first_head = tl.program_id(0) % programs * HEADS
    context = group if kv_index_ptr is None else tl.load(kv_index_ptr + group)
    q_start = tl.load(cu_seqlens_q_ptr + group)
    q_end = tl.load(cu_seqlens_q_ptr + group + 1)
    k_start = tl.load(cu_seqlens_k_ptr + context)
    k_end = tl.load(cu_seqlens_k_ptr + context + 1)
    rows = tl.cast(queries, tl.int64) * heads
    mask_k = tl.arange(0, BLOCK_K) < k_end - k_start
    if ROTARY and KEEP:
        word1, word2 = load_words(k_table_ptr, k_start, mask_k, HEAD_DIM, BLOCK_HALF)
    for head in tl.range(first_head, first_head + HEADS, num_stages=STAGES, disable_licm=not KEEP):
        head = tl.cast(head, tl.int64)
        k_head = k_ptr + head * k_stride_head
        v_head = v_ptr + head * v_stride_head
        q_head = q_ptr + head * q_stride_head
        out_head = out_ptr + head * out_stride_head
        stats_head = stats_ptr + head * queries
        if ROTARY and not KEEP:
            word1, word2 = load_words(k_table_ptr, k_start, mask_k, HEAD_DIM, BLOCK_HALF)
        if not ROTARY:
            word1, word2 = 0, 0
        k1, k2 = load_head(k_head, k_start, mask_k, k_stride_token, word1, word2, ROTARY, HEAD_DIM, BLOCK_HALF, JOIN)
        v = load_channels(v_head, k_start, mask_k, v_stride_token, 0, HEAD_DIM, BLOCK_D)
        second_k1, second_k2, second_v, second_mask = k1, k2, v, mask_k
        tail_k1, tail_k2, tail_v, tail_mask = k1, k2, v, mask_k
        if SECOND > 0:
            second = k_start + BLOCK_K
            second_mask = tl.arange(0, SECOND) < k_end - second
            second_k1, second_k2 = load_rotated_head(
                k_head, k_table_ptr, second, second_mask, k_stride_token, HEAD_DIM, BLOCK_HALF, JOIN
            )
            second_v = load_channels(v_head, second, second_mask, v_stride_token, 0, HEAD_DIM, BLOCK_D)
        if TAIL > 0:
            tail = k_start + BLOCK_K + SECOND
            tail_mask = tl.arange(0, TAIL) < k_end - tail
            tail_k1, tail_k2 = load_rotated_head(
                k_head, k_table_ptr, tail, tail_mask, k_stride_token, HEAD_DIM, BLOCK_HALF, JOIN
            )
            tail_v = load_channels(v_head, tail, tail_mask, v_stride_token, 0, HEAD_DIM, BLOCK_D)
        if UNROLLED > 0:
            for index in tl.static_range(UNROLLED):
                tile = q_start + index * BLOCK_Q
                mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
                if SHARED:
                    q1, q2 = load_head(
                        q_head, tile, mask_q, q_stride_token, word1, word2, ROTARY, HEAD_DIM, BLOCK_HALF, JOIN
                    )
                else:
                    q1, q2 = load_rotated_head(
                        q_head, q_table_ptr, tile, mask_q, q_stride_token, HEAD_DIM, BLOCK_HALF, JOIN
                    )
                o, m, inverse_l = attend(
                    q1, q2, k1, k2, v, mask_k, second_k1, second_k2, second_v, second_mask,
                    tail_k1, tail_k2, tail_v, tail_mask, scale_log2, SECOND, TAIL, JOIN,
                )  # fmt: skip
                store_channels(out_head, o, tile, mask_q, out_stride_token, 0, HEAD_DIM, BLOCK_D)
                store_stats(stats_head, m, inverse_l, tile, mask_q, rows)
        else:
            for tile in tl.range(q_start, q_end, BLOCK_Q, num_stages=INNER, disable_licm=True):
                mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
                q1, q2 = load_rotated_head(
                    q_head, q_table_ptr, tile, mask_q, q_stride_token, HEAD_DIM, BLOCK_HALF, JOIN
                )
                o, m, inverse_l = attend(
                    q1, q2, k1, k2, v, mask_k, second_k1, second_k2, second_v, second_mask,
                    tail_k1, tail_k2, tail_v, tail_mask, scale_log2, SECOND, TAIL, JOIN,
                )  # fmt: skip
                store_channels(out_head, o, tile, mask_q, out_stride_token, 0, HEAD_DIM, BLOCK_D)
                store_stats(stats_head, m, inverse_l, tile, mask_q, rows)


@triton.jit
@no_type_check
def packed_tiled_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    stats_ptr,
    q_table_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    kv_index_ptr,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    out_stride_token,
    out_stride_head,
    tiles,
    queries,
    heads,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per (group, head, tile of queries) of any length; q is rotated here, k was before."""
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    group = tl.program_id(0) // tiles // heads
    q_end = tl.load(cu_seqlens_q_ptr + group + 1)
    tile = tl.load(cu_seqlens_q_ptr + group) + tl.program_id(0) % tiles * BLOCK_Q
    if tile >= q_end:
        return
    context = group if kv_index_ptr is None else tl.load(kv_index_ptr + group)
    k_start = tl.load(cu_seqlens_k_ptr + context)
    k_end = tl.load(cu_seqlens_k_ptr + context + 1)
    k_ptr += head * k_stride_head
    v_ptr += head * v_stride_head
    mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
    q, _q2 = load_rotated_head(
        q_ptr + head * q_stride_head, q_table_ptr, tile, mask_q, q_stride_token, HEAD_DIM, BLOCK_HALF, True
    )
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)  # noqa: E741
    o = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for key in tl.range(k_start, k_end, BLOCK_K, num_stages=STAGES):
        mask_k = tl.arange(0, BLOCK_K) < k_end - key
        k, _k2 = load_head(k_ptr, key, mask_k, k_stride_token, 0, 0, False, HEAD_DIM, BLOCK_HALF, True)
        v = load_channels(v_ptr, key, mask_k, v_stride_token, 0, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_Q, BLOCK_K]
        # Padded keys score -inf; zero would still receive weight.
        s = tl.where(mask_k[None, :], s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s * scale_log2 - (new_m * scale_log2)[:, None])
        rescale = tl.exp2((m - new_m) * scale_log2)
        l = l * rescale + tl.sum(p, 1)  # noqa: E741
        o = tl.dot(p.to(v.dtype), v, o * rescale[:, None], input_precision="ieee")
        m = new_m
    inverse_l = 1 / tl.where(l > 0, l, 1.0)  # The context may be empty.
    o = o * inverse_l[:, None]
    store_channels(out_ptr + head * out_stride_head, o, tile, mask_q, out_stride_token, 0, HEAD_DIM, BLOCK_D)
    # Of an empty context m must be finite, for -inf - m to stay -inf in the backward.
    m = tl.maximum(m, -1e30)
    store_stats(stats_ptr + head * queries, m, inverse_l, tile, mask_q, tl.cast(queries, tl.int64) * heads)


@triton.jit
@no_type_check
def packed_few_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    stats_ptr,
    q_table_ptr,
    k_table_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    kv_index_ptr,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    out_stride_token,
    out_stride_head,
    queries,
    heads,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLLED: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
    KEEP: tl.constexpr,
    JOIN: tl.constexpr,
):
    """One program per (group, HEADS heads), of few queries: keys fill the long side of the products, S^T = K Q^T."""
    ROTARY: tl.constexpr = k_table_ptr is not None
    programs = heads // HEADS
    group = tl.program_id(0) // programs
    first_head = tl.program_id(0) % programs * HEADS
    context = group if kv_index_ptr is None else tl.load(kv_index_ptr + group)
    q_start = tl.load(cu_seqlens_q_ptr + group)
    q_end = tl.load(cu_seqlens_q_ptr + group + 1)
    k_start = tl.load(cu_seqlens_k_ptr + context)
    k_end = tl.load(cu_seqlens_k_ptr + context + 1)
    rows = tl.cast(queries, tl.int64) * heads
    mask_k = tl.arange(0, BLOCK_K) < k_end - k_start
    if ROTARY and KEEP:
        word1, word2 = load_words(k_table_ptr, k_start, mask_k, HEAD_DIM, BLOCK_HALF)
    for head in tl.range(first_head, first_head + HEADS, num_stages=STAGES, disable_licm=not KEEP):
        head = tl.cast(head, tl.int64)
        if ROTARY and not KEEP:
            word1, word2 = load_words(k_table_ptr, k_start, mask_k, HEAD_DIM, BLOCK_HALF)
        if not ROTARY:
            word1, word2 = 0, 0
        k_head = k_ptr + head * k_stride_head
        k1, k2 = load_head(k_head, k_start, mask_k, k_stride_token, word1, word2, ROTARY, HEAD_DIM, BLOCK_HALF, JOIN)
        v = load_channels(v_ptr + head * v_stride_head, k_start, mask_k, v_stride_token, 0, HEAD_DIM, BLOCK_D)
        for index in tl.static_range(UNROLLED):
            tile = q_start + index * BLOCK_Q
            mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
            q1, q2 = load_rotated_head(
                q_ptr + head * q_stride_head, q_table_ptr, tile, mask_q, q_stride_token, HEAD_DIM, BLOCK_HALF, JOIN
            )
            # Padded keys score -inf; zero would still receive weight. The context may be empty.
            s = tl.where(mask_k[:, None], scores(k1, k2, q1, q2, JOIN), float("-inf"))  # [BLOCK_K, BLOCK_Q]
            m = tl.maximum(tl.max(s, 0), -1e30)
            p = tl.exp2(s * scale_log2 - (m * scale_log2)[None, :])
            l = tl.sum(p, 0)  # noqa: E741
            inverse_l = 1 / tl.where(l > 0, l, 1.0)
            p = p * inverse_l[None, :]
            # o^T = V^T P: on its long side are the channels.
            o = tl.trans(tl.dot(tl.trans(v), p.to(v.dtype), input_precision="ieee"))
            store_channels(out_ptr + head * out_stride_head, o, tile, mask_q, out_stride_token, 0, HEAD_DIM, BLOCK_D)
            store_stats(stats_ptr + head * queries, m, inverse_l, tile, mask_q, rows)


@triton.jit
@no_type_check
def weights_of(s, m, inverse_l, scale_log2, like, AXIS: tl.constexpr):
    """P of scores, from what the forward left of their rows, which lie along the other axis than AXIS."""
    if like.dtype == tl.float32:
        return tl.exp2(s * scale_log2 - tl.expand_dims(m * scale_log2, AXIS)) * tl.expand_dims(inverse_l, AXIS)
    else:
        # One instruction less a score; log2 is good to what counts in half precision. Padded rows have no gradient.
        shift = m * scale_log2 - tl.log2(tl.maximum(inverse_l, 1e-30))
        return tl.exp2(s * scale_log2 - tl.expand_dims(shift, AXIS))


@triton.jit
@no_type_check
def add_queries(
    dk1,
    dk2,
    dv,
    k1,
    k2,
    v,
    mask_k,
    q_ptr,
    out_ptr,
    do_ptr,
    stats_ptr,
    dq_ptr,
    q_table_ptr,
    tile,
    q_end,
    q_stride_token,
    out_stride_token,
    do_stride_token,
    dq_stride_token,
    rows,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    JOIN: tl.constexpr,
    LEAN: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    READ_O: tl.constexpr,
):
    """Write dq of a tile of queries and one head, and add its part of dk and dv."""
    mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
    q1, q2 = load_rotated_head(q_ptr, q_table_ptr, tile, mask_q, q_stride_token, HEAD_DIM, BLOCK_HALF, JOIN)
    do = load_channels(do_ptr, tile, mask_q, do_stride_token, 0, HEAD_DIM, BLOCK_D)
    m, inverse_l = load_stats(stats_ptr, tile, mask_q, rows)
    if READ_O:
        o = load_channels(out_ptr, tile, mask_q, out_stride_token, 0, HEAD_DIM, BLOCK_D)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if KEYS_FIRST:
        s = tl.where(mask_k[:, None], scores(k1, k2, q1, q2, JOIN), float("-inf"))
        p = weights_of(s, m, inverse_l, scale_log2, do, 0)
        weights = p.to(do.dtype)
        dv = tl.dot(weights, do, dv, input_precision="ieee")
        if LEAN:
            p = weights.to(tl.float32)
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        if not READ_O:  # Whole rows are here.
            delta = tl.sum(p * dp, 0)
        ds = (p * (dp - delta[None, :])).to(k1.dtype)
        ds_by_key, ds_by_query = ds, tl.trans(ds)
    else:
        s = tl.where(mask_k[None, :], scores(q1, q2, k1, k2, JOIN), float("-inf"))
        p = weights_of(s, m, inverse_l, scale_log2, do, 1)
        weights = p.to(do.dtype)
        dv = tl.dot(tl.trans(weights), do, dv, input_precision="ieee")
        if LEAN:
            p = weights.to(tl.float32)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        if not READ_O:
            delta = tl.sum(p * dp, 1)
        ds = (p * (dp - delta[:, None])).to(k1.dtype)
        ds_by_key, ds_by_query = tl.trans(ds), ds
    if JOIN:
        dk1 = tl.dot(ds_by_key, q1, dk1, input_precision="ieee")
        if KEYS_FIRST:
            dq1, dq2 = apart(tl.trans(tl.dot(tl.trans(k1), ds, input_precision="ieee")))
        else:
            dq1, dq2 = apart(tl.dot(ds_by_query, k1, input_precision="ieee"))
    else:
        dk1 = tl.dot(ds_by_key, q1, dk1, input_precision="ieee")
        dk2 = tl.dot(ds_by_key, q2, dk2, input_precision="ieee")
        dq1 = tl.dot(ds_by_query, k1, input_precision="ieee")
        dq2 = tl.dot(ds_by_query, k2, input_precision="ieee")
    store_gradient(
        dq_ptr,
        dq1 * scale,
        dq2 * scale,
        q_table_ptr,
        tile,
        mask_q,
        dq_stride_token,
        HEAD_DIM,
        BLOCK_HALF,
    )
    return dk1, dk2, dv


@triton.jit
@no_type_check
def packed_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    do_ptr,
    stats_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    q_table_ptr,
    k_table_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    out_stride_token,
    out_stride_head,
    do_stride_token,
    do_stride_head,
    dq_stride_token,
    dq_stride_head,
    dk_stride_token,
    dk_stride_head,
    dv_stride_token,
    dv_stride_head,
    queries,
    heads,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLLED: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
    INNER: tl.constexpr,
    JOIN: tl.constexpr,
    LEAN: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    READ_O: tl.constexpr,
):
    """One program per (group, HEADS heads) and its own keys. KEYS_FIRST: scores are [keys, queries]."""
    programs = heads // HEADS
    group = tl.program_id(0) // programs
    first_head = tl.program_id(0) % programs * HEADS
    q_start = tl.load(cu_seqlens_q_ptr + group)
    q_end = tl.load(cu_seqlens_q_ptr + group + 1)
    k_start = tl.load(cu_seqlens_k_ptr + group)
    k_end = tl.load(cu_seqlens_k_ptr + group + 1)
    rows = tl.cast(queries, tl.int64) * heads
    mask_k = tl.arange(0, BLOCK_K) < k_end - k_start
    for head in tl.range(first_head, first_head + HEADS, num_stages=STAGES, disable_licm=True):
        head = tl.cast(head, tl.int64)
        k1, k2 = load_rotated_head(
            k_ptr + head * k_stride_head, k_table_ptr, k_start, mask_k, k_stride_token, HEAD_DIM, BLOCK_HALF, JOIN
        )
        v = load_channels(v_ptr + head * v_stride_head, k_start, mask_k, v_stride_token, 0, HEAD_DIM, BLOCK_D)
        dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        dk1 = tl.zeros([BLOCK_K, 2 * BLOCK_HALF if JOIN else BLOCK_HALF], tl.float32)
        dk2 = tl.zeros([BLOCK_K, 2 * BLOCK_HALF if JOIN else BLOCK_HALF], tl.float32)
        q_head = q_ptr + head * q_stride_head
        out_head = out_ptr + head * out_stride_head
        do_head = do_ptr + head * do_stride_head
        dq_head = dq_ptr + head * dq_stride_head
        stats_head = stats_ptr + head * queries
        if UNROLLED > 0:
            for index in tl.static_range(UNROLLED):
                dk1, dk2, dv = add_queries(
                    dk1, dk2, dv, k1, k2, v, mask_k, q_head, out_head, do_head, stats_head, dq_head, q_table_ptr,
                    q_start + index * BLOCK_Q, q_end, q_stride_token, out_stride_token, do_stride_token,
                    dq_stride_token, rows, scale, scale_log2, HEAD_DIM, BLOCK_HALF, BLOCK_D, BLOCK_Q, JOIN, LEAN,
                    KEYS_FIRST, READ_O,
                )  # fmt: skip
        else:
            for tile in tl.range(q_start, q_end, BLOCK_Q, num_stages=INNER, disable_licm=True):
                dk1, dk2, dv = add_queries(
                    dk1, dk2, dv, k1, k2, v, mask_k, q_head, out_head, do_head, stats_head, dq_head, q_table_ptr,
                    tile, q_end, q_stride_token, out_stride_token, do_stride_token,
                    dq_stride_token, rows, scale, scale_log2, HEAD_DIM, BLOCK_HALF, BLOCK_D, BLOCK_Q, JOIN, LEAN,
                    KEYS_FIRST, READ_O,
                )  # fmt: skip
        store_channels(dv_ptr + head * dv_stride_head, dv, k_start, mask_k, dv_stride_token, 0, HEAD_DIM, BLOCK_D)
        if JOIN:
            dk1, dk2 = apart(dk1)
        store_gradient(
            dk_ptr + head * dk_stride_head,
            dk1 * scale,
            dk2 * scale,
            k_table_ptr,
            k_start,
            mask_k,
            dk_stride_token,
            HEAD_DIM,
            BLOCK_HALF,
        )


@triton.jit
@no_type_check
def store_rotated_back(
    x_ptr,
    g1,
    g2,
    word1,
    word2,
    ROTARY: tl.constexpr,
    token,
    mask,
    stride_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """As `store_gradient`, of words that are here."""
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    if ROTARY:
        cos1, sin1 = unpack(word1)
        cos2, sin2 = unpack(word2)
        g1, g2 = g1 * cos1 + g2 * sin2, g2 * cos2 + g1 * sin1
    store_channels(x_ptr, g1, token, mask, stride_token, 0, HALF, BLOCK_HALF)
    store_channels(x_ptr, g2, token, mask, stride_token, HALF, HEAD_DIM - HALF, BLOCK_HALF)


@triton.jit
@no_type_check
def packed_backward_whole_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    stats_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    k_table_ptr,
    cu_seqlens_k_ptr,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    do_stride_token,
    do_stride_head,
    dq_stride_token,
    dq_stride_head,
    dk_stride_token,
    dk_stride_head,
    dv_stride_token,
    dv_stride_head,
    queries,
    heads,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
    KEEP: tl.constexpr,
    LEAN: tl.constexpr,
):
    """One program per (image, HEADS heads) of self-attention, one tile for all: two reads of the table, or one."""
    ROTARY: tl.constexpr = k_table_ptr is not None
    programs = heads // HEADS
    image = tl.program_id(0) // programs
    first_head = tl.program_id(0) % programs * HEADS
    start = tl.load(cu_seqlens_k_ptr + image)
    end = tl.load(cu_seqlens_k_ptr + image + 1)
    rows = tl.cast(queries, tl.int64) * heads
    mask = tl.arange(0, BLOCK_K) < end - start
    if ROTARY and KEEP:
        word1, word2 = load_words(k_table_ptr, start, mask, HEAD_DIM, BLOCK_HALF)
    for head in tl.range(first_head, first_head + HEADS, num_stages=STAGES, disable_licm=not KEEP):
        head = tl.cast(head, tl.int64)
        if not ROTARY:
            word1, word2 = 0, 0
        elif not KEEP:
            word1, word2 = load_words(k_table_ptr, start, mask, HEAD_DIM, BLOCK_HALF)
        q_head = q_ptr + head * q_stride_head
        k_head = k_ptr + head * k_stride_head
        q, _q2 = load_head(q_head, start, mask, q_stride_token, word1, word2, ROTARY, HEAD_DIM, BLOCK_HALF, True)
        k, _k2 = load_head(k_head, start, mask, k_stride_token, word1, word2, ROTARY, HEAD_DIM, BLOCK_HALF, True)
        v = load_channels(v_ptr + head * v_stride_head, start, mask, v_stride_token, 0, HEAD_DIM, BLOCK_D)
        do = load_channels(do_ptr + head * do_stride_head, start, mask, do_stride_token, 0, HEAD_DIM, BLOCK_D)
        m, inverse_l = load_stats(stats_ptr + head * queries, start, mask, rows)
        s = tl.where(mask[None, :], tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
        p = weights_of(s, m, inverse_l, scale_log2, do, 1)
        weights = p.to(do.dtype)
        dv = tl.dot(tl.trans(weights), do, input_precision="ieee")
        store_channels(dv_ptr + head * dv_stride_head, dv, start, mask, dv_stride_token, 0, HEAD_DIM, BLOCK_D)
        if LEAN:
            p = weights.to(tl.float32)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        # Whole rows are here: neither o nor a pass before this one.
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(k.dtype)
        dk1, dk2 = apart(tl.dot(tl.trans(ds), q, input_precision="ieee") * scale)
        if ROTARY and not KEEP:
            word1, word2 = load_words(k_table_ptr, start, mask, HEAD_DIM, BLOCK_HALF)
        dk_head = dk_ptr + head * dk_stride_head
        store_rotated_back(dk_head, dk1, dk2, word1, word2, ROTARY, start, mask, dk_stride_token, HEAD_DIM, BLOCK_HALF)
        dq1, dq2 = apart(tl.dot(ds, k, input_precision="ieee") * scale)
        dq_head = dq_ptr + head * dq_stride_head
        store_rotated_back(dq_head, dq1, dq2, word1, word2, ROTARY, start, mask, dq_stride_token, HEAD_DIM, BLOCK_HALF)


@triton.jit
@no_type_check
def packed_backward_by_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    do_ptr,
    stats_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    q_table_ptr,
    k_table_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    out_stride_token,
    out_stride_head,
    do_stride_token,
    do_stride_head,
    dq_stride_token,
    dq_stride_head,
    dk_stride_token,
    dk_stride_head,
    dv_stride_token,
    dv_stride_head,
    queries,
    heads,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLLED: tl.constexpr,
    HEADS: tl.constexpr,
    STAGES: tl.constexpr,
    INNER: tl.constexpr,
    LEAN: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
):
    """One program per (group, HEADS heads), all queries of a head on chip while TILES tiles of its keys pass."""
    programs = heads // HEADS
    group = tl.program_id(0) // programs
    first_head = tl.program_id(0) % programs * HEADS
    q_start = tl.load(cu_seqlens_q_ptr + group)
    q_end = tl.load(cu_seqlens_q_ptr + group + 1)
    k_start = tl.load(cu_seqlens_k_ptr + group)
    k_end = tl.load(cu_seqlens_k_ptr + group + 1)
    rows = tl.cast(queries, tl.int64) * heads
    mask_q = tl.arange(0, BLOCK_Q) < q_end - q_start
    for head in tl.range(first_head, first_head + HEADS, num_stages=STAGES, disable_licm=True):
        head = tl.cast(head, tl.int64)
        q, _q2 = load_rotated_head(
            q_ptr + head * q_stride_head, q_table_ptr, q_start, mask_q, q_stride_token, HEAD_DIM, BLOCK_HALF, True
        )
        do = load_channels(do_ptr + head * do_stride_head, q_start, mask_q, do_stride_token, 0, HEAD_DIM, BLOCK_D)
        o = load_channels(out_ptr + head * out_stride_head, q_start, mask_q, out_stride_token, 0, HEAD_DIM, BLOCK_D)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        m, inverse_l = load_stats(stats_ptr + head * queries, q_start, mask_q, rows)
        dq = tl.zeros([2 * BLOCK_HALF, BLOCK_Q] if KEYS_FIRST else [BLOCK_Q, 2 * BLOCK_HALF], tl.float32)
        for key in tl.range(k_start, k_end, BLOCK_K, num_stages=INNER, disable_licm=True):
            mask_k = tl.arange(0, BLOCK_K) < k_end - key
            k, _k2 = load_rotated_head(
                k_ptr + head * k_stride_head, k_table_ptr, key, mask_k, k_stride_token, HEAD_DIM, BLOCK_HALF, True
            )
            v = load_channels(v_ptr + head * v_stride_head, key, mask_k, v_stride_token, 0, HEAD_DIM, BLOCK_D)
            if KEYS_FIRST:
                s = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_K, BLOCK_Q]
                s = tl.where(mask_k[:, None], s, float("-inf"))
                p = weights_of(s, m, inverse_l, scale_log2, do, 0)
                weights = p.to(do.dtype)
                dv = tl.dot(weights, do, input_precision="ieee")
            else:
                s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_Q, BLOCK_K]
                s = tl.where(mask_k[None, :], s, float("-inf"))
                p = weights_of(s, m, inverse_l, scale_log2, do, 1)
                weights = p.to(do.dtype)
                if CHANNELS_FIRST:
                    dv = tl.trans(tl.dot(tl.trans(do), weights, input_precision="ieee"))
                else:
                    dv = tl.dot(tl.trans(weights), do, input_precision="ieee")
            store_channels(dv_ptr + head * dv_stride_head, dv, key, mask_k, dv_stride_token, 0, HEAD_DIM, BLOCK_D)
            if LEAN:
                p = weights.to(tl.float32)
            if KEYS_FIRST:
                dp = tl.dot(v, tl.trans(do), input_precision="ieee")
                ds = (p * (dp - delta[None, :])).to(k.dtype)
                dq = tl.dot(tl.trans(k), ds, dq, input_precision="ieee")
                dk = tl.dot(ds, q, input_precision="ieee")
            else:
                dp = tl.dot(do, tl.trans(v), input_precision="ieee")
                ds = (p * (dp - delta[:, None])).to(k.dtype)
                dq = tl.dot(ds, k, dq, input_precision="ieee")
                if CHANNELS_FIRST:
                    dk = tl.trans(tl.dot(tl.trans(q), ds, input_precision="ieee"))
                else:
                    dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
            dk1, dk2 = apart(dk * scale)
            dk_head = dk_ptr + head * dk_stride_head
            store_gradient(dk_head, dk1, dk2, k_table_ptr, key, mask_k, dk_stride_token, HEAD_DIM, BLOCK_HALF)
        if KEYS_FIRST:
            dq = tl.trans(dq)
        dq1, dq2 = apart(dq * scale)
        dq_head = dq_ptr + head * dq_stride_head
        store_gradient(dq_head, dq1, dq2, q_table_ptr, q_start, mask_q, dq_stride_token, HEAD_DIM, BLOCK_HALF)


def packed_forward(
    x: Operands, q_table: Tensor | None, k_table: Tensor | None, config: PackedConfig, *, self_attention: bool
) -> tuple[Tensor, Tensor]:
    """o [queries, heads, head_dim] and, [2, heads, queries] in float32, m and 1 / l."""
    if config.by == "tiles":
        return packed_tiled_forward(x, q_table, config)
    out, stats = new_output(x)
    kernel = packed_few_kernel if config.keys_first else packed_forward_kernel
    mode = {} if config.keys_first else {"SELF": self_attention}
    arguments = x.arguments(kernel, out=out, stats=stats, q_table=q_table, k_table=k_table)
    kernel[(x.groups * (x.heads // config.heads),)](
        **{**arguments, **config.constants(kernel, x.head_dim)}, **mode, **config.options
    )
    return out, stats


def packed_tiled_forward(x: Operands, q_table: Tensor | None, config: PackedConfig) -> tuple[Tensor, Tensor]:
    """As `packed_forward`, of sequences of any length; k is rotated by a kernel before."""
    out, stats = new_output(x)
    x = x._replace(k=rotated(x.k, x.k_cos, x.k_sin))
    kernel = packed_tiled_forward_kernel
    arguments = x.arguments(kernel, out=out, stats=stats, q_table=q_table)
    tiles = triton.cdiv(x.max_seqlen_q, config.block_q)
    kernel[(tiles * x.heads * x.groups,)](
        **{**arguments, **config.constants(kernel, x.head_dim)}, tiles=tiles, **config.options
    )
    return out, stats


def packed_backward(
    x: Operands,
    q_table: Tensor | None,
    k_table: Tensor | None,
    do: Tensor,
    out: Tensor,
    stats: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    config: PackedConfig,
) -> None:
    """Write dq, dk and dv, whatever their strides."""
    kernel = {
        "queries": packed_backward_kernel,
        "keys": packed_backward_by_keys_kernel,
        "whole": packed_backward_whole_kernel,
    }[config.by]
    arguments = x.arguments(kernel, do=do, out=out, stats=stats, dq=dq, dk=dk, dv=dv, q_table=q_table, k_table=k_table)
    kernel[(x.groups * (x.heads // config.heads),)](
        **{**arguments, **config.constants(kernel, x.head_dim)}, **config.options
    )
