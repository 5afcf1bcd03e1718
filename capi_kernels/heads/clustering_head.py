"""The clustering head: cross-entropy between a linear layer's logits and their own Sinkhorn assignment.

    z = normalise(features) weight^T + bias        t = Sinkhorn(z / target_temperature), held fixed
    loss = mean over tokens of LSE(z / T) sum(t) - sum(t z) / T        dz = (softmax(z / T) sum(t) - t) / (T tokens)

Positions are streamed: logits, assignment, loss and the gradients of weight and bias of a few positions at a time.
Never written: [positions, images, prototypes]. Without position-wise balancing every pass recomputes the logits. The op
`capi_kernels::clustering_head` is opaque to torch.compile; it computes the gradients with the loss.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed import ProcessGroup

from capi_kernels._autocast import dtype_under_autocast, register_autocast
from capi_kernels._autograd import apply_of
from capi_kernels._checks import (
    check_count,
    check_flag,
    check_not_empty,
    check_positive,
    check_sinkhorn_options,
    check_tensor,
)
from capi_kernels._process_groups import group_name, named_group, resolve_group
from capi_kernels.heads import clustering_head_cpu
from capi_kernels.heads.gradients import times
from capi_kernels.heads.linear import check_linear
from capi_kernels.reference import ClusteringHead, Potentials

OP = "capi_kernels::clustering_head"
torch.library.define(
    OP,
    "(Tensor features, Tensor weight, Tensor? bias, float target_temperature, float prediction_temperature,"
    " int n_iterations, float eps, bool positionwise, SymInt? position_chunk, SymInt? n_scored, str? process_group,"
    " ScalarType dtype)"
    " -> (Tensor loss, Tensor column_max, Tensor column, Tensor row, Tensor dweight, Tensor dbias)",
)


def _outputs(weight: Tensor, results: tuple[Tensor, Potentials, Tensor, Tensor]) -> tuple[Tensor, ...]:
    loss, potentials, dweight, dbias = results
    return loss, *potentials, dweight.to(weight.dtype), dbias.to(weight.dtype)


@torch.library.impl(OP, "CPU")
def _(features, weight, *arguments):
    *arguments, n_scored, process_group, dtype = arguments
    results = clustering_head_cpu.clustering_head(
        features, weight, *arguments, named_group(process_group), dtype, n_scored
    )
    return _outputs(weight, results)


@torch.library.impl(OP, "CUDA")
def _(features, weight, *arguments):
    from capi_kernels.heads import clustering_head_triton

    *arguments, n_scored, process_group, dtype = arguments
    with torch.cuda.device(features.device):
        results = clustering_head_triton.clustering_head(
            features, weight, *arguments, named_group(process_group), dtype, n_scored
        )
    return _outputs(weight, results)


@torch.library.register_fake(OP)
def _(features, weight, bias, *arguments):
    (positions, images, _), prototypes = features.shape, len(weight)
    *_, positionwise, _, _, _, dtype = arguments
    slices, row = ((positions,), images) if positionwise else ((), positions * images)
    wide = torch.promote_types(dtype, torch.float32)
    shapes = (), *((*slices, n) for n in (prototypes, prototypes, row))
    return (
        *(features.new_empty(shape, dtype=wide) for shape in shapes),
        weight.new_empty(weight.shape),
        weight.new_empty(prototypes),
    )


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, *others, dweight, dbias = output
    ctx.mark_non_differentiable(*others, dweight, dbias)
    ctx.set_materialize_grads(False)  # Else zeros as large as the weight are made for what has no gradient.
    ctx.save_for_backward(dweight, dbias)


def _backward(ctx: FunctionCtx, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 11
    gradients = zip(ctx.saved_tensors, ctx.needs_input_grad[1:3], strict=True)
    return None, *(times(x, dloss) if needed else None for x, needed in gradients), *[None] * 9


register_autocast(OP)
torch.library.register_autograd(OP, _backward, setup_context=_setup_context)


class _ClusteringHead(torch.autograd.Function):
    """The op once more, in the form that torch.func knows."""

    @staticmethod
    def forward(  # Named: without gradients Dynamo counts them.
        features,
        weight,
        bias,
        target_temperature,
        prediction_temperature,
        n_iterations,
        eps,
        positionwise,
        position_chunk,
        n_scored,
        process_group,
        dtype,
    ):
        temperatures, sinkhorn = (target_temperature, prediction_temperature), (n_iterations, eps, positionwise)
        return torch.ops.capi_kernels.clustering_head(
            features, weight, bias, *temperatures, *sinkhorn, position_chunk, n_scored, process_group, dtype
        )

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(once_differentiable(_backward))


_apply = apply_of(_ClusteringHead)


def clustering_head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    target_temperature: float = 0.06,
    prediction_temperature: float = 0.12,
    n_iterations: int = 3,
    eps: float = 1e-8,
    positionwise: bool = True,
    position_chunk: int | None = None,
    n_scored: int | None = None,
    process_group: ProcessGroup | str | None = "world",
) -> ClusteringHead:
    """Cross-entropy between a linear layer's logits and their Sinkhorn assignment (arXiv 2502.08769, clustering).

    logits = normalise(features) weight^T + bias; loss = mean over tokens of
    -sum sinkhorn(logits / target_temperature) * log_softmax(logits / prediction_temperature). Gradients reach weight
    and bias alone, neither the features nor through the assignment. Logits take the dtype of the features (under
    autocast, its dtype); all else is float32 (float64 for float64).

    Args:
        features: [positions, images, dim], any floating dtype and strides, of any length.
        weight: [prototypes, dim].
        bias: [prototypes] or None.
        n_iterations, eps, process_group: as in `sinkhorn_positionwise`. The loss is this process's mean.
        positionwise: balance every position apart; otherwise all positions together.
        position_chunk: positions handled at a time, the same on all ranks. By default what fits in a CPU's cache, but
            all positions where they are balanced together, whose logits and exponentials are held in float32 then;
            fewer take n_iterations + 2 times the matrix product instead. On a GPU 1 GiB of logits by default, but at
            most a quarter of the free memory (over a group, of the rank with least; agreeing on it waits for the GPU
            where the group has no backend for CPU tensors). Changes memory, speed and rounding: a product of another
            shape may add up its terms in another order. The same call on the same machine gives the same bits. Over a
            group a CPU holds two chunks: while the sums of one are reduced, the other is computed.
        n_scored: the loss and its gradients are those of the first so many images of each position; the others, such
            as those of earlier batches, are only balanced with them. By default all of them count.

    Returns:
        ClusteringHead(loss, potentials of the assignments, as from `sinkhorn_potentials` of [positions, images,
        prototypes]; together, all positions have the same columns). `clustering_targets` makes assignments of them.

    Raises:
        TypeError: features, weight or bias that are not floating point, options of another type, or float64 on a GPU.
        ValueError: other shapes or devices, an empty axis, temperatures that are not positive and finite, n_iterations
            or position_chunk < 1, n_scored < 1 or more than the images, a negative or non-finite eps, on a GPU more
            than 1 048 576 prototypes.
    """
    check_tensor("features", features, "positions images dim")
    positions, images, dim = features.shape
    check_not_empty("features", positions=positions, images=images, dim=dim)
    check_linear(features, weight, bias)
    check_positive(target_temperature=target_temperature, prediction_temperature=prediction_temperature)
    check_sinkhorn_options(n_iterations, eps)
    check_flag("positionwise", positionwise)
    process_group = group_name(resolve_group(process_group))
    if position_chunk is not None:
        check_count("position_chunk", position_chunk)
    if n_scored is not None:
        check_count("n_scored", n_scored)
        if n_scored > images:
            raise ValueError(f"n_scored must be at most the {images} images, got {n_scored}")
    loss, column_max, column, row, _, _ = _apply(
        features,
        weight,
        bias,
        target_temperature,
        prediction_temperature,
        n_iterations,
        eps,
        positionwise,
        position_chunk,
        n_scored,
        process_group,
        dtype_under_autocast(features),
    )
    if not positionwise:
        column_max, column = column_max.expand(positions, -1), column.expand(positions, -1)
        row = row.view(positions, images)
    return ClusteringHead(loss, Potentials(column_max, column, row))
