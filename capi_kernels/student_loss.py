"""The student's loss: soft cross-entropy, its gradient computed in the same pass over the logits.

    loss = mean over predictions of LSE(z) sum(t) - sum(t z), z = logits / temperature
    dlogits = (softmax(z) sum(t) - t) / (temperature predictions)

The targets are given, or made row by row of the teacher's logits and their Sinkhorn potentials. Never written: the
log-softmax, or targets that were not given. The op `capi_kernels::student_loss` is opaque to torch.compile.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from capi_kernels._checks import (
    check_chosen,
    check_chosen_logits,
    check_device,
    check_not_empty,
    check_positive,
    check_shape,
    check_tensor,
)
from capi_kernels.clustering import soft_cross_entropy_
from capi_kernels.reference import Potentials, TargetRows
from capi_kernels.sinkhorn import assignments, chosen_rows, keep_autocast_off

BLOCK_BYTES = 1 << 20  # Rows that stay in a core's cache between the passes over them.

OP = "capi_kernels::student_loss"
torch.library.define(
    OP,
    "(Tensor logits, Tensor targets, Tensor? column_max, Tensor? column, Tensor? row, Tensor? rows,"
    " float target_temperature, float temperature) -> (Tensor loss, Tensor dz)",
)


@torch.library.impl(OP, "CPU")
def _(logits, targets, column_max, column, row, rows, target_temperature, temperature):
    predicted, prototypes = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    dz = torch.empty((predicted, prototypes), dtype=logits.dtype)
    loss = torch.zeros((), dtype=torch.float64)
    block = max(1, BLOCK_BYTES // (prototypes * wide.itemsize))
    for start in range(0, predicted, block):
        here = slice(start, start + block)
        if rows is None:
            t = targets[here].to(wide).contiguous()
        else:
            teacher = targets if targets.ndim == 3 else targets[here]
            chosen = chosen_rows(teacher, Potentials(column_max, column, row), rows[here])
            t = assignments(*chosen, target_temperature).to(wide)
        z = torch.empty(t.shape, dtype=wide).copy_(logits[here])
        block_loss, block_dz = soft_cross_entropy_(t, z, temperature)
        loss += block_loss
        dz[here] = block_dz
    return (loss / predicted).to(wide), dz


@torch.library.impl(OP, "CUDA")
def _(logits, targets, column_max, column, row, rows, target_temperature, temperature):
    from capi_kernels.student_loss_triton import student_loss

    potentials = None if rows is None else Potentials(column_max, column, row)
    with torch.cuda.device(logits.device):
        return student_loss(logits, targets, potentials, rows, target_temperature, temperature)


@torch.library.register_fake(OP)
def _(logits, targets, column_max, column, row, rows, target_temperature, temperature):
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty((), dtype=wide), logits.new_empty(logits.shape)


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, dz = output
    ctx.factor = 1 / (inputs[-1] * len(dz))
    ctx.mark_non_differentiable(dz)
    ctx.save_for_backward(dz)


def _backward(ctx: FunctionCtx, dloss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (dz,) = ctx.saved_tensors
    # With one axis rather than none the factor is multiplied in its own type, not first rounded to that of the logits.
    factor = (dloss * ctx.factor).reshape(1)
    return torch.mul(dz, factor, out=torch.empty_like(dz)), *[None] * 7


keep_autocast_off(OP)
torch.library.register_autograd(OP, _backward, setup_context=_setup_context)


class _StudentLoss(torch.autograd.Function):
    """The op once more, in the form that torch.func knows."""

    @staticmethod
    def forward(
        logits, targets, column_max, column, row, rows, target_temperature, temperature
    ):  # Named: without gradients Dynamo counts them.
        return torch.ops.capi_kernels.student_loss(
            logits, targets, column_max, column, row, rows, target_temperature, temperature
        )

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(once_differentiable(_backward))


def student_loss(logits: Tensor, targets: Tensor | TargetRows, temperature: float = 0.12) -> Float[Tensor, ""]:
    """Mean over predictions of -sum_k target_k log softmax(logits / temperature)_k (arXiv 2502.08769).

    Args:
        logits: [predicted, prototypes], any floating dtype and strides. All is computed in float32 (float64 for
            float64), also under autocast.
        targets: [predicted, prototypes], any floating dtype and strides, without gradient; they need not sum to 1. Or
            TargetRows(logits, potentials, rows, temperature), the arguments of `assignments_from_potentials`: the
            assignments of these rows, computed where they are needed.
        temperature: divides the logits.

    Returns:
        The loss in float32 (float64 for float64), with a gradient to the logits alone.

    Raises:
        TypeError: another dtype.
        ValueError: other shapes or devices, no prediction, rows out of range (looked at on a CPU, uncompiled),
            temperatures that are not positive and finite.
    """
    check_tensor("logits", logits, "predicted prototypes")
    predicted, prototypes = logits.shape
    check_not_empty("logits", predicted=predicted, prototypes=prototypes)
    check_positive(temperature=temperature)
    if not isinstance(targets, TargetRows):
        check_tensor("targets", targets, "predicted prototypes")
        check_device("targets", targets, ("logits", logits))
        check_shape("targets", targets, predicted=predicted, prototypes=prototypes)
        return _StudentLoss.apply(logits, targets, None, None, None, None, 1.0, temperature)[0]
    teacher, potentials, rows, target_temperature = targets
    check_chosen("targets.rows", rows, potentials, prototypes, ("logits", logits))
    check_shape("targets.rows", rows, predicted=predicted)
    check_chosen_logits("targets.logits", teacher, potentials.row, rows, prototypes)
    check_device("targets.logits", teacher, ("logits", logits))
    check_positive(**{"targets.temperature": target_temperature})
    return _StudentLoss.apply(logits, teacher, *potentials, rows, target_temperature, temperature)[0]
