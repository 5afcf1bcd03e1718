"""What the attention kernels share: their operands, and the backward of sequences whose keys fit one tile.

    P = exp2((S - m) log2(e) scale) / l, dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = dS K, dK = dS^T Q

m and 1 / l, the maximum of a row and its sum, come from the forward. Every kernel takes groups of queries that read
contexts; in self-attention both are the images. Never written to memory: S, P, their gradients, the rotated q and k.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from capi_kernels._capability import TARGETS, attends_as
from capi_kernels._packed_rotary_triton import pack_tables
from capi_kernels._rotary_triton import load_channels, load_rotated, padded, store_channels, store_unrotated

LOG2_E = 1.4426950408889634
RESIDENT_KEYS = 128  # The longest context that one tile of keys holds.
ENOUGH_PROGRAMS = 1024  # To keep a GPU busy; beyond, a program takes several heads.
HEAD_DIMS = (16, 32, 64, 80, 96, 128)  # What is compiled offline; any up to 128 runs.
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
INDEX_BLOCK = tl.constexpr(1024)


class Config(NamedTuple):
    """Tile sizes, and how a kernel is compiled.

    tail: a second tile of keys. heads: that share a program. keys_first: scores are [keys, queries].
    """

    block_q: int
    block_k: int
    num_warps: int
    max_registers: int | None = None
    num_stages: int = 1
    tail: int = 0
    heads: int = 1
    keys_first: bool = False

    @property
    def options(self) -> dict:
        # Fused multiply-adds are wanted: every product here is summed in float32 right away.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}

    def constants(self, kernel: Callable) -> dict:
        """Those of the kernel's parameters that the configuration gives."""
        values = {
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "BLOCK_TOKENS": self.block_q,
            "TAIL": self.tail,
            "HEADS": self.heads,
            "STAGES": self.num_stages,
            "KEYS_FIRST": self.keys_first,
        }
        return {name: values[name] for name in kernel.arg_names if name in values}


class Operands(NamedTuple):
    """What both directions read: [tokens, heads, head_dim] with contiguous channels, and where the sequences lie."""

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
    def own(self) -> bool:
        """Whether queries lie where keys do, with the same tables."""
        same = self.q_cos is self.k_cos and self.q_sin is self.k_sin
        return same and self.cu_seqlens_q is self.cu_seqlens_k and self.kv_index is None

    def packed_tables(self) -> dict[str, Tensor | None]:
        q_table = pack_tables(self.q_cos, self.q_sin)
        return {"q_table": q_table, "k_table": q_table if self.own else pack_tables(self.k_cos, self.k_sin)}

    def arguments(self, kernel: Callable, **tensors: Tensor | None) -> dict:
        """The operands, these tensors and the strides of both, as far as the kernel has parameters of their names."""
        tensors = {**{name: x for name, x in self._asdict().items() if name in TENSORS}, **tensors}
        values = {f"{name}_ptr": x for name, x in tensors.items()}
        for name, x in tensors.items():
            if x is not None and x.ndim == 3:
                values[f"{name}_stride_token"], values[f"{name}_stride_head"] = x.stride(0), x.stride(1)
        values |= {
            "groups": self.groups,
            "queries": self.q.shape[0],
            "heads": self.heads,
            "scale": self.scale,
            "scale_log2": self.scale * LOG2_E,
            **channel_blocks(self.head_dim),
        }
        return {name: values[name] for name in kernel.arg_names if name in values}


TENSORS = frozenset(Operands._fields) - {"max_seqlen_q", "max_seqlen_k", "scale"}


def channel_blocks(head_dim: int) -> dict[str, int]:
    return {"HEAD_DIM": head_dim, "BLOCK_HALF": padded((head_dim + 1) // 2), "BLOCK_D": padded(head_dim)}


def as_operand(x: Tensor) -> Tensor:
    """x with contiguous channels: itself, or a copy where it has none, or tokens too far apart for 32-bit offsets."""
    return x if x.stride(-1) == 1 and 0 <= x.stride(0) < 2**31 // 256 else x.contiguous()


def operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_cos: Tensor | None,
    q_sin: Tensor | None,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    kv_index: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> Operands:
    if q.dtype not in TYPES:
        raise TypeError(f"on a GPU q must be torch.float16, torch.bfloat16 or torch.float32, got {q.dtype}")
    if q.shape[2] > HEAD_DIMS[-1]:
        raise ValueError(f"on a GPU head_dim must be at most {HEAD_DIMS[-1]}, got {q.shape[2]}")
    # An index in int64 would ask for kernels of its own.
    kv_index = kv_index if kv_index is None else kv_index.int()
    others = (q_cos, q_sin, k_cos, k_sin, cu_seqlens_q, cu_seqlens_k, kv_index)
    others = (x if x is None else x.contiguous() for x in others)
    return Operands(*map(as_operand, (q, k, v)), *others, max_seqlen_q, max_seqlen_k, scale)


def compile_case(
    kernel: Callable, dtype: torch.dtype, head_dim: int, config: Config, indexed: bool = False, **more: object
) -> tuple[str, Callable, dict, dict]:
    """One entry of COMPILE_CASES: the types that `Operands.arguments` gives, of packed 16-byte aligned projections."""
    keys = "+".join(str(n) for n in (config.block_k, config.tail) if n)
    name = f"{TYPES[dtype]} head_dim={head_dim} {config.block_q} x {keys}" + indexed * " kv_index"
    constants = {} if indexed else {"kv_index_ptr": None}
    constants |= config.constants(kernel) | channel_blocks(head_dim) | more
    arguments = {}
    for parameter in kernel.arg_names:
        if parameter in constants:
            arguments[parameter] = constants[parameter]
        elif parameter.endswith("_ptr"):
            stem = parameter.removesuffix("_ptr")
            table = stem.endswith(("cos", "sin")) or stem in ("stats", "delta")
            index = stem.startswith("cu_seqlens") or stem == "kv_index" or stem.endswith("table")
            arguments[parameter] = "*fp32" if table else "*i32" if index else f"*{TYPES[dtype]}"
        elif parameter.startswith("scale"):
            arguments[parameter] = "fp32"
        else:
            arguments[parameter] = "i32" if "_stride_" in parameter else "i32?"
    return name, kernel, arguments, config.options


def compile_cases(
    kernel: Callable,
    dtype: torch.dtype,
    head_dim: int,
    config_of: Callable[[int], Config | None],
    indexed: bool = False,
    **more: object,
) -> list[tuple]:
    """One entry for each configuration that some capabilities have, with the capabilities that it is launched on."""
    configs = {target: config_of(attends_as(target)) for target in TARGETS}
    return [
        (*compile_case(kernel, dtype, head_dim, config, indexed, **more), [x for x in configs if configs[x] == config])
        for config in dict.fromkeys(configs.values())
        if config is not None
    ]


def heads_per_program(x: Operands) -> int:
    """Heads that share a program share the tables it reads, several times the bytes of their q and k."""
    most = x.groups * x.heads // ENOUGH_PROGRAMS
    return next(n for n in (4, 3, 2, 1) if n == 1 or (x.heads % n == 0 and n <= most))


def new_output(x: Operands) -> tuple[Tensor, Tensor]:
    """o [queries, heads, head_dim] and, [2, heads, queries] in float32, m and 1 / l."""
    out = torch.empty(x.q.shape, dtype=x.q.dtype, device=x.q.device)
    return out, torch.empty((2, x.heads, len(x.q)), dtype=torch.float32, device=x.q.device)


@triton.jit
@no_type_check
def store_stats(stats_ptr, m, inverse_l, token, mask, rows):
    stats_ptr += tl.cast(token, tl.int64) + tl.arange(0, mask.shape[0])
    tl.store(stats_ptr, m, mask=mask)
    tl.store(stats_ptr + rows, inverse_l, mask=mask)


@triton.jit
@no_type_check
def load_stats(stats_ptr, token, mask, rows):
    """m and 1 / l of len(mask) queries; padded ones weigh nothing."""
    stats_ptr += tl.cast(token, tl.int64) + tl.arange(0, mask.shape[0])
    m = tl.load(stats_ptr, mask=mask, other=0.0)
    return m, tl.load(stats_ptr + rows, mask=mask, other=0.0)


@triton.jit
@no_type_check
def count_readers(kv_index_ptr, groups, context):
    """How many groups read the context."""
    readers = 0
    for first in range(0, groups, INDEX_BLOCK):
        offs = first + tl.arange(0, INDEX_BLOCK)
        readers += tl.sum((tl.load(kv_index_ptr + offs, mask=offs < groups, other=-1) == context).to(tl.int32), 0)
    return readers


@triton.jit
@no_type_check
def next_reader(kv_index_ptr, groups, context, after):
    """The first group after `after` that reads the context."""
    reader = groups
    for first in range(0, groups, INDEX_BLOCK):
        offs = first + tl.arange(0, INDEX_BLOCK)
        reads = tl.load(kv_index_ptr + offs, mask=offs < groups, other=-1) == context
        reader = tl.minimum(reader, tl.min(tl.where(reads & (offs > after), offs, groups), 0))
    return reader


@triton.jit
@no_type_check
def add_group(
    dk1,
    dk2,
    dv,
    k1,
    k2,
    v,
    mask_k,
    q_ptr,
    do_ptr,
    stats_ptr,
    dq_ptr,
    q_cos_ptr,
    q_sin_ptr,
    q_start,
    q_end,
    q_stride_token,
    do_stride_token,
    dq_stride_token,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Write dq of one group and one head, and add its part of dk and dv."""
    for tile in tl.range(q_start, q_end, BLOCK_Q, disable_licm=True):
        mask_q = tl.arange(0, BLOCK_Q) < q_end - tile
        q1, q2 = load_rotated(q_ptr, q_cos_ptr, q_sin_ptr, tile, mask_q, q_stride_token, HEAD_DIM, BLOCK_HALF)
        do = load_channels(do_ptr, tile, mask_q, do_stride_token, 0, HEAD_DIM, BLOCK_D)
        m = tl.load(stats_ptr + tl.cast(tile, tl.int64) + tl.arange(0, BLOCK_Q), mask=mask_q, other=0.0)
        s = tl.dot(k1, tl.trans(q1), input_precision="ieee")
        s = tl.dot(k2, tl.trans(q2), s, input_precision="ieee")  # [BLOCK_K, BLOCK_Q]
        s = tl.where(mask_k[:, None], s, float("-inf"))
        p = tl.exp2((s - m[None, :]) * scale_log2)
        # Whole rows are here: their sums in these very bits, and neither o nor a pass before this one.
        l = tl.sum(p, 0)  # noqa: E741
        p = p / tl.where(l > 0, l, 1.0)[None, :]  # The context may be empty.
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = (p * (dp - tl.sum(p * dp, 0)[None, :])).to(k1.dtype)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
        dk2 = tl.dot(ds, q2, dk2, input_precision="ieee")
        dq1 = tl.dot(tl.trans(ds), k1, input_precision="ieee") * scale
        dq2 = tl.dot(tl.trans(ds), k2, input_precision="ieee") * scale
        store_unrotated(dq_ptr, dq1, dq2, q_cos_ptr, q_sin_ptr, tile, mask_q, dq_stride_token, HEAD_DIM, BLOCK_HALF)
    return dk1, dk2, dv


@triton.jit
@no_type_check
def resident_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    stats_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    q_cos_ptr,
    q_sin_ptr,
    k_cos_ptr,
    k_sin_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    kv_index_ptr,
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
    groups,
    queries,
    heads,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (context, head): its keys stay on chip while the groups that read it pass in order."""
    context = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    q_ptr += head * q_stride_head
    do_ptr += head * do_stride_head
    dq_ptr += head * dq_stride_head
    stats_ptr += head * queries
    k_start = tl.load(cu_seqlens_k_ptr + context)
    k_end = tl.load(cu_seqlens_k_ptr + context + 1)
    mask_k = tl.arange(0, BLOCK_K) < k_end - k_start
    k1, k2 = load_rotated(
        k_ptr + head * k_stride_head, k_cos_ptr, k_sin_ptr, k_start, mask_k, k_stride_token, HEAD_DIM, BLOCK_HALF
    )
    v = load_channels(v_ptr + head * v_stride_head, k_start, mask_k, v_stride_token, 0, HEAD_DIM, BLOCK_D)
    dk1 = tl.zeros([BLOCK_K, BLOCK_HALF], tl.float32)
    dk2 = tl.zeros([BLOCK_K, BLOCK_HALF], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    readers = 1 if kv_index_ptr is None else count_readers(kv_index_ptr, groups, context)
    group = context if kv_index_ptr is None else -1
    for _ in range(readers):
        if kv_index_ptr is not None:
            group = next_reader(kv_index_ptr, groups, context, group)
        q_start = tl.load(cu_seqlens_q_ptr + group)
        q_end = tl.load(cu_seqlens_q_ptr + group + 1)
        dk1, dk2, dv = add_group(
            dk1,
            dk2,
            dv,
            k1,
            k2,
            v,
            mask_k,
            q_ptr,
            do_ptr,
            stats_ptr,
            dq_ptr,
            q_cos_ptr,
            q_sin_ptr,
            q_start,
            q_end,
            q_stride_token,
            do_stride_token,
            dq_stride_token,
            scale,
            scale_log2,
            HEAD_DIM,
            BLOCK_HALF,
            BLOCK_D,
            BLOCK_Q,
        )
    dk_ptr += head * dk_stride_head
    store_unrotated(
        dk_ptr, dk1 * scale, dk2 * scale, k_cos_ptr, k_sin_ptr, k_start, mask_k, dk_stride_token, HEAD_DIM, BLOCK_HALF
    )
    store_channels(dv_ptr + head * dv_stride_head, dv, k_start, mask_k, dv_stride_token, 0, HEAD_DIM, BLOCK_D)


def resident_backward_config(dtype: torch.dtype, head_dim: int, max_seqlen_k: int, capability: int) -> Config | None:
    """None where the keys do not fit: too many, heads too wide, or float32, whose products take no matrix unit."""
    wide = head_dim > 64
    if dtype == torch.float32 or max_seqlen_k > RESIDENT_KEYS:
        return None
    if max_seqlen_k > 64 and head_dim > 32 and capability < 90:
        return None
    if max_seqlen_k <= 64:
        return Config(16, 64, 8 if wide else 4)
    return Config(16, 128, 8)


def resident_backward(
    x: Operands, do: Tensor, stats: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, config: Config
) -> None:
    """Write dq, dk and dv, whatever their strides."""
    resident_backward_kernel[(x.contexts * x.heads,)](
        **x.arguments(resident_backward_kernel, do=do, stats=stats, dq=dq, dk=dk, dv=dv),
        **config.constants(resident_backward_kernel),
        **config.options,
    )


def _compile_cases() -> list:
    cases = []
    for dtype, head_dim, keys, indexed in product((torch.bfloat16, torch.float16), HEAD_DIMS, (64, 128), (False, True)):
        config_of = partial(resident_backward_config, dtype, head_dim, keys)
        cases += compile_cases(resident_backward_kernel, dtype, head_dim, config_of, indexed)
    return cases


COMPILE_CASES = _compile_cases()
