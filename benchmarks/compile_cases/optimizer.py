"""The kernels of the update."""

from capi_kernels import adamw_triton

CASES = [*adamw_triton.COMPILE_CASES]
