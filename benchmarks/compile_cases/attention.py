"""The kernels of attention."""

from capi_kernels import (
    _attention_triton,
    _short_backward_triton,
    _short_forward_triton,
    _tiled_attention_triton,
    cross_attention_weights_triton,
)

CASES = [
    *_short_forward_triton.COMPILE_CASES,
    *_short_backward_triton.COMPILE_CASES,
    *_attention_triton.COMPILE_CASES,
    *cross_attention_weights_triton.COMPILE_CASES,
    *_tiled_attention_triton.COMPILE_CASES,
]
