"""The student's loss: soft cross-entropy, its gradient computed in the same pass over the logits.

    loss = mean over predictions of LSE(z) sum(t) - sum(t z), z = logits / temperature
    dlogits = (softmax(z) sum(t) - t) / (temperature predictions)

The pass can also say of the targets, which it reads anyway, their mean entropy and their most likely prototypes. Never
written: the log-softmax. The op `capi_kernels::student_loss` is opaque to torch.compile.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from capi_kernels import reference
from capi_kernels._autocast import register_autocast
from capi_kernels._autograd import apply_of
from capi_kernels._checks import check_device, check_not_empty, check_positive, check_shape, check_tensor
from capi_kernels.heads import student_loss_cpu
from capi_kernels.heads.gradients import times
from capi_kernels.reference import StudentLoss

PLAIN_BYTES = 1 << 20  # Of logits: below, what an op costs in Python outweighs the memory traffic that it saves.

OP = "capi_kernels::student_loss"
torch.library.define(
    OP,
    "(Tensor logits, Tensor targets, float temperature, bool statistics)"
    " -> (Tensor loss, Tensor gradient, Tensor target_entropy, Tensor most_likely)",
)


def _scales(dtype: torch.dtype, temperature: float, predicted: int) -> tuple[float, float]:
    """What the forward multiplies t - softmax(z) sum(t) by to give the gradient, and what is left to the backward.

    In float16 all but the sign: a gradient that small needs the factor by which the loss was scaled first.
    """
    scale = 1 / (temperature * predicted)
    return (-1.0, scale) if dtype == torch.float16 else (-scale, 1.0)


@torch.library.impl(OP, "CPU")
def _(logits, targets, temperature, statistics):
    scale, _ = _scales(logits.dtype, temperature, len(logits))
    return student_loss_cpu.student_loss(logits, targets, temperature, scale, statistics)


@torch.library.impl(OP, "CUDA")
def _(logits, targets, temperature, statistics):
    from capi_kernels.heads import student_loss_triton

    scale, _ = _scales(logits.dtype, temperature, len(logits))
    with torch.cuda.device(logits.device):
        return student_loss_triton.student_loss(logits, targets, temperature, scale, statistics)


@torch.library.register_fake(OP)
def _(logits, targets, temperature, statistics):
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (
        logits.new_empty((), dtype=wide),
        logits.new_empty(logits.shape),
        logits.new_empty(() if statistics else 0, dtype=wide),
        logits.new_empty(len(logits) if statistics else 0, dtype=torch.int64),
    )


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, gradient, *statistics = output
    _, ctx.factor = _scales(gradient.dtype, inputs[2], len(gradient))
    ctx.mark_non_differentiable(gradient, *statistics)
    ctx.set_materialize_grads(False)  # Else zeros as large as the logits are made for what has no gradient.
    ctx.save_for_backward(gradient)


def _backward(ctx: FunctionCtx, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 4
    (gradient,) = ctx.saved_tensors
    return times(gradient, dloss if ctx.factor == 1 else dloss * ctx.factor), None, None, None


register_autocast(OP)
torch.library.register_autograd(OP, _backward, setup_context=_setup_context)


class _StudentLoss(torch.autograd.Function):
    """The op once more, in the form that torch.func knows."""

    @staticmethod
    def forward(logits, targets, temperature, statistics):  # Named: without gradients Dynamo counts them.
        return torch.ops.capi_kernels.student_loss(logits, targets, temperature, statistics)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(once_differentiable(_backward))


_apply = apply_of(_StudentLoss)


def student_loss(logits: Tensor, targets: Tensor, temperature: float = 0.12) -> Float[Tensor, ""]:
    """Mean over predictions of -sum_k target_k log softmax(logits / temperature)_k (arXiv 2502.08769).

    On a CPU logits of up to 1 MiB take the definition itself, which is the fastest for them.

    Args:
        logits: [predicted, prototypes], any floating dtype and strides. All is computed in float32 (float64 for
            float64), also under autocast.
        targets: [predicted, prototypes], any floating dtype and strides, without gradient; they need not sum to 1.
        temperature: divides the logits.

    Returns:
        The loss in float32 (float64 for float64), with a gradient to the logits alone.

    Raises:
        TypeError: another dtype, or float64 on a GPU.
        ValueError: other shapes or devices, no prediction, a temperature that is not positive and finite, on a GPU
            more than 1 048 576 prototypes.
    """
    if _takes_definition(logits, targets, temperature):
        return reference.student_loss(logits, targets, temperature)
    return _apply(logits, targets, temperature, False)[0]


def student_loss_with_statistics(logits: Tensor, targets: Tensor, temperature: float = 0.12) -> StudentLoss:
    """The same loss, and of the targets that it reads the mean entropy and each one's most likely prototype.

    Arguments and errors are those of `student_loss`.

    Returns:
        StudentLoss(loss, target_entropy in nats, of the loss's dtype, most_likely int64 [predicted], the first of equal
        ones); the statistics without gradient.
    """
    if _takes_definition(logits, targets, temperature):
        return reference.student_loss_with_statistics(logits, targets, temperature)
    loss, _, target_entropy, most_likely = _apply(logits, targets, temperature, True)
    return StudentLoss(loss, target_entropy, most_likely)


def _takes_definition(logits: Tensor, targets: Tensor, temperature: float) -> bool:
    """Whether the logits are so few that the definition is the fastest; raises where an argument is wrong."""
    check_tensor("logits", logits, "predicted prototypes")
    predicted, prototypes = logits.shape
    check_not_empty("logits", predicted=predicted, prototypes=prototypes)
    check_positive(temperature=temperature)
    check_tensor("targets", targets, "predicted prototypes")
    check_device("targets", targets, ("logits", logits))
    check_shape("targets", targets, predicted=predicted, prototypes=prototypes)
    itemsize = torch.promote_types(logits.dtype, torch.float32).itemsize
    return logits.device.type == "cpu" and logits.numel() * itemsize <= PLAIN_BYTES
