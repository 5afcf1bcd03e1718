"""Position-wise Sinkhorn-Knopp: assignments E_ik c_k a_i with E = exp((logits - max over images) / temperature).

    c <- c / (c S + eps), S_k = sum_i a_i E_ik        a <- a / (a R + eps), R_i = sum_k E_ik c_k

are the official code's divisions by column and row sums plus eps, gathered in one potential per column and row, with
c = exp(50) at first. The ops `capi_kernels::sinkhorn` and `capi_kernels::assignments_from_potentials` are opaque to
torch.compile; their outputs are constants to autograd.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup

from capi_kernels._autocast import register_autocast
from capi_kernels._checks import (
    check_chosen,
    check_chosen_logits,
    check_device,
    check_not_empty,
    check_positive,
    check_potentials,
    check_sinkhorn_options,
    check_tensor,
)
from capi_kernels._process_groups import group_name, named_group, resolve_group
from capi_kernels.reference import Potentials
from capi_kernels.sinkhorn import cpu

OP = "capi_kernels::sinkhorn"
torch.library.define(
    OP,
    "(Tensor logits, int n_iterations, float eps, float temperature, str? process_group, bool assign)"
    " -> (Tensor assignments, Tensor column_max, Tensor column, Tensor row)",
)
ASSIGNMENTS_OP = "capi_kernels::assignments_from_potentials"
torch.library.define(
    ASSIGNMENTS_OP,
    "(Tensor logits, Tensor column_max, Tensor column, Tensor row, Tensor? rows, float temperature, ScalarType dtype)"
    " -> Tensor",
)


def without_gradient(name: str) -> None:
    """The outputs of the op `name` are constants to autograd, whatever requires a gradient."""

    def setup_context(ctx: FunctionCtx, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*((output,) if isinstance(output, Tensor) else output))
        ctx.n_inputs = len(inputs)

    def backward(ctx: FunctionCtx, *_: Tensor | None) -> tuple[None, ...]:
        return (None,) * ctx.n_inputs

    torch.library.register_autograd(name, backward, setup_context=setup_context)


@torch.library.impl(OP, "CPU")
def _(logits, n_iterations, eps, temperature, process_group, assign):
    out, potentials = cpu.balanced(logits, n_iterations, eps, temperature, named_group(process_group), assign)
    return logits.new_empty(0) if out is None else out, *potentials


@torch.library.impl(OP, "CUDA")
def _(logits, n_iterations, eps, temperature, process_group, assign):
    from capi_kernels.sinkhorn.balance_triton import balanced

    with torch.cuda.device(logits.device):
        out, potentials = balanced(logits, n_iterations, eps, temperature, named_group(process_group), assign)
    return logits.new_empty(0) if out is None else out, *potentials


@torch.library.register_fake(OP)
def _(logits, n_iterations, eps, temperature, process_group, assign):
    *slices, images, prototypes = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    potentials = (logits.new_empty((*slices, n), dtype=dtype) for n in (prototypes, prototypes, images))
    return logits.new_empty(logits.shape if assign else 0), *potentials


@torch.library.impl(ASSIGNMENTS_OP, "CPU")
def _(logits, column_max, column, row, rows, temperature, dtype):
    return cpu.assignments(logits, Potentials(column_max, column, row), rows, temperature).to(dtype)


@torch.library.impl(ASSIGNMENTS_OP, "CUDA")
def _(logits, column_max, column, row, rows, temperature, dtype):
    from capi_kernels.sinkhorn.assignments_triton import assignments

    with torch.cuda.device(logits.device):
        return assignments(logits, Potentials(column_max, column, row), rows, temperature, dtype)


@torch.library.register_fake(ASSIGNMENTS_OP)
def _(logits, column_max, column, row, rows, temperature, dtype):
    return logits.new_empty(logits.shape if rows is None else (len(rows), logits.shape[-1]), dtype=dtype)


for name in (OP, ASSIGNMENTS_OP):
    register_autocast(name)
    without_gradient(name)


def _check(logits: Tensor, n_iterations: int, eps: float, temperature: float) -> None:
    check_tensor("logits", logits, "... images prototypes")
    check_not_empty("logits", images=logits.shape[-2], prototypes=logits.shape[-1])
    check_sinkhorn_options(n_iterations, eps)
    check_positive(temperature=temperature)


@torch.no_grad()
def sinkhorn_positionwise(
    logits: Tensor,
    n_iterations: int = 3,
    eps: float = 1e-8,
    *,
    temperature: float = 1.0,
    process_group: ProcessGroup | str | None = "world",
) -> Float[Tensor, "*slices images prototypes"]:
    """Balanced soft assignment of images to prototypes, at each position apart from the others (arXiv 2502.08769).

    M = exp(logits / temperature - max over images + 50), then `n_iterations` times M <- M / (column sums + eps) and
    M <- M / (row sums + eps). A drop-in for the official `sinkhorn_knopp` that leaves its input as it is and computes
    in float32 (float64 for float64) whatever the dtype. No gradient: assignments are targets. On a CPU it takes, beyond
    the output, the potentials and at most one position of float32 (8 MB of smaller ones).

    Args:
        logits: [..., images, prototypes], any floating dtype and strides. NaN, +inf, or a prototype at -inf for every
            image make their position NaN, as in the official code; a single -inf gets no assignment.
        eps: added to every sum. Without it, 0, an image more than 65 temperatures below the column's maximum in all of
            its logits gets less than its share: its potential would be out of float32's range.
        temperature: divides the logits.
        process_group: images are spread over it: maxima and column sums are all-reduced. "world" is the default group
            where torch.distributed is initialised; None stays in this process.

    Returns:
        Assignments [..., images, prototypes] in the dtype of the logits; every row sums to 1.

    Raises:
        TypeError: logits that are not floating point, a process_group that is none, or float64 on a GPU.
        ValueError: fewer than two axes, no image or prototype, n_iterations < 1, a negative or non-finite eps, a
            temperature that is not positive and finite, on a GPU more than 1 048 576 prototypes.
    """
    _check(logits, n_iterations, eps, temperature)
    process_group = group_name(resolve_group(process_group))
    return torch.ops.capi_kernels.sinkhorn(logits, n_iterations, eps, temperature, process_group, True)[0]


@torch.no_grad()
def sinkhorn_potentials(
    logits: Tensor,
    n_iterations: int = 3,
    eps: float = 1e-8,
    *,
    temperature: float = 1.0,
    process_group: ProcessGroup | str | None = "world",
) -> Potentials:
    """What `sinkhorn_positionwise` multiplies: exp((logits - column_max) / temperature) * column * row.

    Arguments and errors are those of `sinkhorn_positionwise`.

    Returns:
        Potentials(column_max [..., prototypes], column [..., prototypes], row [..., images]) in float32 (float64 for
        float64). Only the product column * row is defined: a factor may move from one to the other.
    """
    _check(logits, n_iterations, eps, temperature)
    process_group = group_name(resolve_group(process_group))
    _, *potentials = torch.ops.capi_kernels.sinkhorn(logits, n_iterations, eps, temperature, process_group, False)
    return Potentials(*potentials)


@torch.no_grad()
def assignments_from_potentials(
    logits: Tensor, potentials: Potentials, rows: Tensor | None = None, *, temperature: float = 1.0
) -> Float[Tensor, "*rows prototypes"]:
    """Assignments exp((logits - column_max) / temperature) * column * row, of all rows or of chosen ones.

    Args:
        logits: [..., images, prototypes], any floating dtype and strides; with `rows` [positions, images, prototypes],
            or [selected, prototypes], those of the chosen rows alone, in their order.
        potentials: as from `sinkhorn_potentials` or `clustering_head`: column_max and column [..., prototypes], row
            [..., images]; with `rows` [positions, prototypes] and [positions, images].
        rows: int32 or int64 [selected], image * positions + position of the rows wanted, in any order, with repeats;
            None takes all.
        temperature: the one of the potentials.

    Returns:
        Assignments [..., images, prototypes], with `rows` [selected, prototypes], in the dtype of the logits, without
        gradient.

    Raises:
        TypeError: logits that are not floating point, rows that are not int32 or int64, potentials that are none, or
            not float32 or float64.
        ValueError: no prototype, logits or potentials of another shape or device, rows out of range (looked at on a
            CPU, uncompiled), a temperature that is not positive and finite.
    """
    check_tensor("logits", logits, "... images prototypes")
    check_not_empty("logits", prototypes=logits.shape[-1])
    check_positive(temperature=temperature)
    *slices, images, prototypes = logits.shape
    check_potentials(potentials)
    potentials = Potentials(*potentials)
    if rows is None:
        for name, x, last in zip(Potentials._fields, potentials, (prototypes, prototypes, images), strict=True):
            check_device(name, x, ("logits", logits))
            if tuple(x.shape) != (*slices, last):
                raise ValueError(f"{name} must have the shape {(*slices, last)}, got {tuple(x.shape)}")
    else:
        check_chosen("rows", rows, potentials, prototypes, ("logits", logits))
        check_chosen_logits("logits", logits, potentials.row, rows, prototypes)
    return torch.ops.capi_kernels.assignments_from_potentials(logits, *potentials, rows, temperature, logits.dtype)
