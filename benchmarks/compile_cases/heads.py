"""The kernels of both heads and of Sinkhorn."""

from capi_kernels import clustering_triton, sinkhorn_triton, student_loss_triton

CASES = [*sinkhorn_triton.COMPILE_CASES, *clustering_triton.COMPILE_CASES, *student_loss_triton.COMPILE_CASES]
