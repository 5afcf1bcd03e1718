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

from capi_kernels import reference
from capi_kernels._autocast import register_autocast
from capi_kernels._checks import (
    check_chosen,
    check_chosen_logits,
    check_device,
    check_not_empty,
    check_positive,
    check_shape,
    check_tensor,
)
from capi_kernels.clustering import SoftCrossEntropy
from capi_kernels.reference import Potentials, TargetRows
from capi_kernels.sinkhorn import assignments, chosen_rows

PLAIN_BYTES = 1 << 22  # Of logits: below, what an op costs in Python outweighs the memory traffic that it saves.

OP = "capi_kernels::student_loss"
torch.library.define(
    OP,
    "(Tensor logits, Tensor targets, Tensor? column_max, Tensor? column, Tensor? row, Tensor? rows,"
    " float target_temperature, float temperature) -> (Tensor loss, Tensor minus_dz)",
)


@torch.library.impl(OP, "CPU")
def _(logits, targets, column_max, column, row, rows, target_temperature, temperature):
    predicted, prototypes = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    minus_dz = torch.empty((predicted, prototypes), dtype=logits.dtype)
    loss = torch.zeros((), dtype=torch.float64)
    cross_entropy = SoftCrossEntropy(predicted, prototypes, wide, temperature)
    for start in range(0, predicted, cross_entropy.rows):
        here = slice(start, start + cross_entropy.rows)
        if rows is None:
            t = targets[here].to(wide).contiguous()
        else:
            teacher = targets if targets.ndim == 3 else targets[here]
            chosen = chosen_rows(teacher, Potentials(column_max, column, row), rows[here])
            t = assignments(*chosen, target_temperature).to(wide)
        loss += cross_entropy(t, logits[here], minus_dz[here])
    return (loss / predicted).to(wide), minus_dz


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
    _, minus_dz = output
    ctx.factor = -1 / (inputs[-1] * len(minus_dz))
    ctx.mark_non_differentiable(minus_dz)
    ctx.save_for_backward(minus_dz)


def _backward(ctx: FunctionCtx, dloss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (minus_dz,) = ctx.saved_tensors
    # With one axis rather than none the factor is multiplied in its own type, not first rounded to that of the logits.
    factor = (dloss * ctx.factor).reshape(1)
    return torch.mul(minus_dz, factor, out=torch.empty_like(minus_dz)), *[None] * 7


register_autocast(OP)
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

    On a CPU logits of up to 4 MiB with given targets take the definition itself, which is the fastest for them.

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
        TypeError: another dtype, or float64 on a GPU.
        ValueError: other shapes or devices, no prediction, rows out of range (looked at on a CPU, uncompiled),
            temperatures that are not positive and finite, on a GPU more than 1 048 576 prototypes.
    """
    check_tensor("logits", logits, "predicted prototypes")
    predicted, prototypes = logits.shape
    check_not_empty("logits", predicted=predicted, prototypes=prototypes)
    check_positive(temperature=temperature)
    if not isinstance(targets, TargetRows):
        check_tensor("targets", targets, "predicted prototypes")
        check_device("targets", targets, ("logits", logits))
        check_shape("targets", targets, predicted=predicted, prototypes=prototypes)
        wide = torch.promote_types(logits.dtype, torch.float32)
        if logits.device.type == "cpu" and logits.numel() * wide.itemsize <= PLAIN_BYTES:
            return reference.student_loss(logits, targets.to(wide), temperature)
        return _StudentLoss.apply(logits, targets, None, None, None, None, 1.0, temperature)[0]
    teacher, potentials, rows, target_temperature = targets
    check_chosen("targets.rows", rows, potentials, prototypes, ("logits", logits))
    check_shape("targets.rows", rows, predicted=predicted)
    check_chosen_logits("targets.logits", teacher, potentials.row, rows, prototypes)
    check_device("targets.logits", teacher, ("logits", logits))
    check_positive(**{"targets.temperature": target_temperature})
    return _StudentLoss.apply(logits, teacher, *potentials, rows, target_temperature, temperature)[0]
