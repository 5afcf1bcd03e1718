"""Sinkhorn-Knopp, position by position.

`operation` has the ops and the public functions, `cpu` what a CPU runs. On a GPU `balance_triton` chooses between the
forms in `columns_triton` and `rows_triton`, `assignments_triton` writes what their potentials give, and
`common_triton` is what all kernels of this package and of the heads share.
"""
