"""Which kernels compute an attention: short contexts stay on chip; long ones, and all in float32, pass in tiles."""

from torch import Tensor

from capi_kernels._attention_triton import Operands, resident_backward, resident_backward_config
from capi_kernels._capability import attends_as, capability
from capi_kernels._short_backward_triton import short_backward, short_backward_config
from capi_kernels._short_forward_triton import short_forward, short_forward_config
from capi_kernels._tiled_attention_triton import tiled_backward, tiled_forward


def attention_forward(x: Operands) -> tuple[Tensor, Tensor]:
    """o [queries, heads, head_dim] and, [2, heads, queries] in float32, m and 1 / l."""
    gpu = attends_as(capability(x.q.device))
    config = short_forward_config(x.q.dtype, x.head_dim, x.max_seqlen_q, x.max_seqlen_k, gpu)
    return tiled_forward(x) if config is None else short_forward(x, config)


def attention_backward(x: Operands, do: Tensor, out: Tensor, stats: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Write dq, dk and dv, whatever their strides."""
    gpu = attends_as(capability(x.q.device))
    indexed = x.kv_index is not None
    config = short_backward_config(x.q.dtype, x.head_dim, x.max_seqlen_q, x.max_seqlen_k, indexed, gpu)
    if config is not None:
        short_backward(x, do, stats, dq, dk, dv, config)
        return
    config = resident_backward_config(x.q.dtype, x.head_dim, x.max_seqlen_k, gpu)
    if config is not None:
        resident_backward(x, do, stats, dq, dk, dv, config)
        return
    tiled_backward(x, do, out, stats, dq, dk, dv)
