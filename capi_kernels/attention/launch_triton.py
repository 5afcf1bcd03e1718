"""Which kernels compute an attention: short contexts stay on chip; long ones, and all in float32, pass in tiles."""

from collections.abc import Sequence

import torch
from torch import Tensor

from capi_kernels._capability import attends_as, capability
from capi_kernels.attention import configs
from capi_kernels.attention.operands_triton import Operands, as_operand, launchable
from capi_kernels.attention.resident_backward_triton import resident_backward
from capi_kernels.attention.short_backward_triton import short_backward
from capi_kernels.attention.short_forward_triton import short_forward
from capi_kernels.attention.tiled_backward_triton import tiled_backward
from capi_kernels.attention.tiled_forward_triton import tiled_forward


def attention_forward(*operands) -> tuple[Tensor, Tensor]:
    """o [queries, heads, head_dim] and what the backward needs, [2, heads, queries]."""
    x = launchable(Operands(*operands))
    gpu = attends_as(capability(x.q.device))
    config = configs.short_forward(x.q.dtype, x.head_dim, x.max_seqlen_q, x.max_seqlen_k, gpu)
    if config is not None:
        return short_forward(x, config)
    return tiled_forward(x, configs.tiled_forward(x.q.dtype, x.head_dim, x.max_seqlen_q))


def new_gradients(x: Operands, parts: Sequence[int]) -> list[Tensor]:
    """Buffers [tokens, parts, heads, head_dim] for dq, dk and dv: one of 3 parts, or one of 1 and one of 2."""
    shapes = [(len(tokens), n, x.heads, x.head_dim) for tokens, n in zip((x.q, x.k), parts, strict=False)]
    return [torch.empty(shape, dtype=x.q.dtype, device=x.q.device) for shape in shapes]


def attention_backward(do: Tensor, out: Tensor, stats: Tensor, *operands, parts: Sequence[int]) -> list[Tensor]:
    """dq, dk and dv in `new_gradients`."""
    x, do = launchable(Operands(*operands)), as_operand(do)
    buffers = new_gradients(x, parts)
    gradients = [part for buffer in buffers for part in buffer.unbind(1)]
    kind, gpu = (x.q.dtype, x.head_dim), attends_as(capability(x.q.device))
    if config := configs.short_backward(*kind, x.max_seqlen_q, x.max_seqlen_k, x.kv_index is not None, gpu):
        short_backward(x, do, stats, *gradients, config)
    elif config := configs.resident_backward(*kind, x.max_seqlen_k, gpu):
        resident_backward(x, do, stats, *gradients, config)
    else:
        for_dq, for_dkdv = configs.tiled_dq(*kind, gpu), configs.tiled_dkdv(*kind, gpu)
        tiled_backward(x, do, out, stats, *gradients, for_dq, for_dkdv)
    return buffers
