"""The op `capi_kernels::attention`: every query attends to the context of its group, o = softmax(q k^T scale) v.

q and k are rotated within. Without cu_seqlens_k this is self-attention: keys lie where the queries do, with their
tables. The op and `capi_kernels::attention_backward` are opaque to torch.compile and go by these names in the policies
of selective activation checkpointing: saving the first spares its recomputation.
"""

from itertools import compress

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from capi_kernels._autocast import register_autocast
from capi_kernels._autograd import apply_of
from capi_kernels.attention import cpu

OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_cos, Tensor? q_sin, Tensor? k_cos, Tensor? k_sin, Tensor cu_seqlens_q,"
    " Tensor? cu_seqlens_k, Tensor? kv_index, SymInt max_seqlen_q, SymInt max_seqlen_k, float scale"
)
OP = "capi_kernels::attention"
# Saved is what the backward needs of each row and, on a CPU, what `cpu.kept` says of q and k as they were rotated.
# Gradients come in buffers of `parts`: [3] is dqkv [tokens, 3, heads, head_dim], [1, 2] are dq [queries, heads,
# head_dim] and dkv [context, 2, heads, head_dim], [1, 1, 1], on a CPU only, dq, dk and dv.
torch.library.define(OP, f"({OPERANDS}) -> (Tensor out, Tensor[] saved)")
torch.library.define(
    f"{OP}_backward", f"(Tensor do, Tensor out, Tensor[] saved, {OPERANDS}, int[] parts) -> Tensor[] gradients"
)
register_autocast(OP, 3)


def _complete(q_cos, q_sin, k_cos, k_sin, cu_seqlens_q, cu_seqlens_k, *rest) -> tuple:
    """With the tables and lengths of keys, in self-attention too."""
    if cu_seqlens_k is None:
        k_cos, k_sin, cu_seqlens_k = q_cos, q_sin, cu_seqlens_q
    return q_cos, q_sin, k_cos, k_sin, cu_seqlens_q, cu_seqlens_k, *rest


@torch.library.impl(OP, "CPU")
def _(q, k, v, *operands):
    *tables, cu_seqlens_q, cu_seqlens_k, kv_index, _, max_seqlen_k, scale = _complete(*operands)
    out, logsumexp, *rotated = cpu.attention(q, k, v, tables, (cu_seqlens_q, cu_seqlens_k, kv_index), scale)
    return out, [logsumexp, *compress(rotated, cpu.kept(q.dtype, tables, max_seqlen_k))]


@torch.library.impl(f"{OP}_backward", "CPU")
def _(do, out, saved, q, k, v, *operands):
    *operands, parts = operands
    *tables, cu_seqlens_q, cu_seqlens_k, kv_index, _, max_seqlen_k, scale = _complete(*operands)
    where = (cu_seqlens_q, cu_seqlens_k, kv_index)
    logsumexp, *kept = saved
    rotated = [kept.pop(0) if is_kept else None for is_kept in cpu.kept(q.dtype, tables, max_seqlen_k)]
    return cpu.attention_backward(do, out, logsumexp, q, k, v, tables, where, scale, parts, rotated)


@torch.library.impl(OP, "CUDA")
def _(q, k, v, *operands):
    from capi_kernels.attention.launch_triton import attention_forward

    with torch.cuda.device_of(q):
        out, stats = attention_forward(q, k, v, *_complete(*operands))
    return out, [stats]


@torch.library.impl(f"{OP}_backward", "CUDA")
def _(do, out, saved, q, k, v, *operands):
    from capi_kernels.attention.launch_triton import attention_backward

    *operands, parts = operands
    with torch.cuda.device_of(do):
        gradients = attention_backward(do, out, *saved, q, k, v, *_complete(*operands), parts=parts)
    return [dx.squeeze(1) if n == 1 else dx for dx, n in zip(gradients, parts, strict=True)]


@torch.library.register_fake(OP)
def _(q, k, v, *operands):
    (queries, heads, _), (*tables, _, _, _, _, max_seqlen_k, _) = q.shape, _complete(*operands)
    if q.device.type == "cpu":
        saved = [q.new_empty((queries, heads), dtype=torch.promote_types(q.dtype, torch.float32))]
        saved += [x.new_empty(x.shape) for x in compress((q, k), cpu.kept(q.dtype, tables, max_seqlen_k))]
    else:
        saved = [q.new_empty((2, heads, queries), dtype=torch.float32)]
    return q.new_empty(q.shape), saved


@torch.library.register_fake(f"{OP}_backward")
def _(do, out, saved, q, k, *operands):
    tokens, (_, heads, head_dim) = (q.shape[0], k.shape[0], k.shape[0]), q.shape
    return [
        q.new_empty((n, *([count] if count > 1 else []), heads, head_dim))
        for n, count in zip(tokens, operands[-1], strict=False)
    ]


def _apart(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v where they came as qkv, None, None or as q, kv, None."""
    if k is None:
        return q.unbind(1)
    return (q, k, v) if v is not None else (q, *k.unbind(1))


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
    *tensors, max_seqlen_q, max_seqlen_k, scale = inputs
    ctx.options = max_seqlen_q, max_seqlen_k, scale
    out, *saved = output
    if isinstance(saved[0], list):  # From the op itself.
        (saved,) = saved
    else:
        ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, out, *saved)


def _backward(ctx: FunctionCtx, do: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 13
    everything = ctx.saved_tensors  # May be asked for only once.
    q, k, v, *rest, out = everything[:11]
    operands = (*_apart(q, k, v), *rest, *ctx.options)
    # Apart a CPU can write each gradient before it forms the next.
    parts = [3] if k is None else [1, 1, 1] if v is not None and do.device.type == "cpu" else [1, 2]
    dq, *dkv = torch.ops.capi_kernels.attention_backward(do, out, everything[11:], *operands, parts)
    if v is not None and len(dkv) == 1:
        dkv = dkv[0].unbind(1)
    return dq, *dkv, *[None] * (12 - len(dkv))


torch.library.register_autograd(OP, _backward, setup_context=_setup_context)


class _Attention(torch.autograd.Function):
    """The op once more, in the form that torch.func knows, of q, k and v, of q, kv and None, or of qkv, None and None.

    The gradient of a tensor of several parts is the buffer of the backward itself: nothing is copied.
    """

    @staticmethod
    def forward(  # Named: without gradients Dynamo counts them.
        q, k, v, q_cos, q_sin, k_cos, k_sin, cu_seqlens_q, cu_seqlens_k, kv_index, max_seqlen_q, max_seqlen_k, scale
    ):
        tables, where = (q_cos, q_sin, k_cos, k_sin), (cu_seqlens_q, cu_seqlens_k, kv_index)
        operands = (*_apart(q, k, v), *tables, *where, max_seqlen_q, max_seqlen_k, scale)
        out, saved = torch.ops.capi_kernels.attention(*operands)
        return out, *saved

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(once_differentiable(_backward))


_apply = apply_of(_Attention)


def attention(*operands) -> Tensor:
    """o [queries, heads, head_dim] of the operands of the op; q, k and v may be packed as `_Attention` says."""
    return _apply(*operands)[0]
