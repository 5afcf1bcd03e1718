"""The clustering head: cross-entropy between a linear layer's logits and their own Sinkhorn assignment.

    z = normalise(features) weight^T + bias        t = Sinkhorn(z / target_temperature), held fixed
    loss = mean over tokens of LSE(z / T) sum(t) - sum(t z) / T        dz = (softmax(z / T) sum(t) - t) / (T tokens)

Positions are streamed: logits, assignment, loss and the gradients of weight and bias of a few positions at a time.
Never written: [positions, images, prototypes]. Without position-wise balancing every pass recomputes the logits. The op
`capi_kernels::clustering_head` is opaque to torch.compile; it computes the gradients with the loss.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator
from itertools import chain, count, repeat

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from capi_kernels._autocast import autocast_off, dtype_under_autocast, register_autocast
from capi_kernels._checks import (
    check_chosen,
    check_count,
    check_device,
    check_index,
    check_not_empty,
    check_positive,
    check_shape,
    check_sinkhorn_options,
    check_tensor,
    resolve_group,
)
from capi_kernels.reference import ClusteringHead, Potentials
from capi_kernels.sinkhorn import (
    HEADROOM,
    balance,
    exponentials,
    group_name,
    named_group,
    positions_per_chunk,
    rows_per_block,
)

BLOCK_BYTES = 1 << 19  # Rows that stay in a core's cache between the passes of the cross-entropy.

Blocks = Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]  # assignments, rows, logits, features: [p, rows, ...] each


def normalised(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Features divided by their length in float32 or wider, in `dtype`, contiguous."""
    wide = torch.promote_types(features.dtype, torch.float32)
    norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True, dtype=wide).clamp_min_(1e-7)
    return torch.div(features, norm, out=torch.empty(features.shape, dtype=dtype, device=features.device))


class StreamedLinear:
    """normalise(features) weight^T + bias, a chunk of positions at a time, into one buffer."""

    def __init__(self, features: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, chunk: int):
        self.features, self.dtype, self.chunk = features, dtype, chunk
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.buffer = features.new_empty((chunk, features.shape[1], len(weight)), dtype=dtype)

    def __call__(self, start: int) -> tuple[Tensor, Tensor]:
        """Logits [p, images, prototypes] and normalised features [p, images, dim] of the positions from `start` on."""
        features = normalised(self.features[start : start + self.chunk], self.dtype)
        logits = self.buffer[: len(features)]
        tokens = features.flatten(0, 1)
        if self.bias is None:
            torch.mm(tokens, self.weight.mT, out=logits.flatten(0, 1))
        else:
            torch.addmm(self.bias, tokens, self.weight.mT, out=logits.flatten(0, 1))
        return logits, features


def _balance_positions(
    linear: StreamedLinear,
    exps: Tensor,
    potentials: Potentials,
    temperature: float,
    n_iterations: int,
    eps: float,
    process_group: ProcessGroup | None,
) -> Blocks:
    """Balance every position apart, chunk by chunk."""
    positions, images = potentials.row.shape
    chunk, _, prototypes = exps.shape
    on_cpu = exps.device.type == "cpu"
    rows = rows_per_block(chunk, images, prototypes, exps.itemsize) if on_cpu else images
    for start in range(0, positions, chunk):
        here = slice(start, start + chunk)
        column_max, column, row = (x[here] for x in potentials)
        column_max, column, row = column_max.unsqueeze(1), column.unsqueeze(1), row.unsqueeze(2)
        logits, features = linear(start)
        column_max.copy_(logits.amax(1, keepdim=True))
        if process_group is not None:
            all_reduce(column_max, ReduceOp.MAX, process_group)
        blocks = list(zip(*(x.split(rows, dim=1) for x in (exps[: len(row)], row, logits, features)), strict=True))
        passes = chain([exponentials(blocks, column_max, temperature)], repeat(blocks))
        yield from balance(passes, column, n_iterations, eps, process_group)


def _balance_together(
    linear: StreamedLinear,
    exps: Tensor,
    potentials: Potentials,
    temperature: float,
    n_iterations: int,
    eps: float,
    process_group: ProcessGroup | None,
) -> Blocks:
    """Balance all positions as one: every pass recomputes the logits, chunk by chunk."""
    images = exps.shape[1]
    column_max, column, row = potentials
    column_max, column, row = column_max.unsqueeze(1), column.unsqueeze(1), row.unsqueeze(2)

    def blocks() -> Blocks:
        for start in range(0, len(linear.features), linear.chunk):
            tensors = (exps[: len(linear.features) - start], *linear(start))
            E, logits, features = (x.flatten(0, 1).unsqueeze(0) for x in tensors)
            yield E, row[:, start * images :][:, : E.shape[1]], logits, features

    column_max.fill_(-torch.inf)
    for _, _, logits, _ in blocks():
        torch.maximum(column_max, logits.amax(1, keepdim=True).to(column_max.dtype), out=column_max)
    if process_group is not None:
        all_reduce(column_max, ReduceOp.MAX, process_group)
    passes = (exponentials(blocks(), column_max, temperature) for _ in count())
    yield from balance(passes, column, n_iterations, eps, process_group)


class SoftCrossEntropy:
    """Cross-entropy of rows in cache-sized blocks, with the buffers that it reuses."""

    def __init__(self, rows: int, prototypes: int, dtype: torch.dtype, temperature: float):
        self.rows = max(1, min(rows, BLOCK_BYTES // (prototypes * dtype.itemsize)))
        self.temperature = temperature
        self.scaled, self.log_p = torch.empty((2, self.rows, prototypes), dtype=dtype).unbind(0)

    def __call__(self, targets: Tensor, logits: Tensor, minus_dz: Tensor) -> Tensor:
        """Sum over at most `rows` rows of -sum(t log_softmax(z)), z = logits / temperature, in float64.

        Minus its gradient in z, t - softmax(z) sum(t), is written to `minus_dz`, which may be `logits`.
        """
        z, log_p = self.scaled[: len(logits)], self.log_p[: len(logits)]
        torch.div(logits.to(z.dtype), self.temperature, out=z)
        torch.log_softmax(z, -1, out=log_p)
        loss = -torch.mul(targets, log_p, out=z).sum().double()  # more exact than a dot product
        wide = minus_dz.dtype == z.dtype
        torch.ops.aten._log_softmax_backward_data.out(targets, log_p, -1, z.dtype, out=minus_dz if wide else z)
        if not wide:
            minus_dz.copy_(z)
        return loss


def _stream(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    target_temperature: float,
    prediction_temperature: float,
    n_iterations: int,
    eps: float,
    positionwise: bool,
    position_chunk: int | None,
    process_group: ProcessGroup | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Potentials, Tensor, Tensor]:
    """The loss, the targets of `rows`, the potentials, and the gradients of the loss in weight and bias."""
    positions, images, dim = features.shape
    prototypes, tokens = len(weight), positions * images
    wide = torch.promote_types(dtype, torch.float32)
    chunk = position_chunk or positions
    if position_chunk is None and positionwise:
        chunk = positions_per_chunk(images, prototypes, wide.itemsize, process_group)
    chunk = min(positions, chunk)

    targets = None
    if rows is not None:
        # rows count image by image, the stream position by position.
        keys, order = (rows % positions * images + rows // positions).sort()
        bounds = keys.tolist()
        targets = features.new_empty((len(rows), prototypes), dtype=wide)

    balance_blocks = _balance_positions
    if not positionwise and chunk < positions:
        balance_blocks = _balance_together
    elif not positionwise:  # Everything in a chunk: a single position of all tokens.
        features, chunk = features.reshape(1, tokens, dim), 1
    slices = positions if positionwise else 1
    shapes = ((slices, prototypes), (slices, prototypes), (slices, tokens // slices))
    potentials = Potentials(*(features.new_ones(shape, dtype=wide) for shape in shapes))

    linear = StreamedLinear(features, weight, bias, dtype, chunk)
    exps = features.new_empty((chunk, features.shape[1], prototypes), dtype=wide)
    loss = features.new_zeros((), dtype=torch.float64)
    dweight = torch.zeros_like(weight, dtype=wide)
    dbias = weight.new_zeros(prototypes, dtype=wide)
    cross_entropy = SoftCrossEntropy(chunk * features.shape[1], prototypes, wide, prediction_temperature)
    start = 0
    for t, _, logits, f in balance_blocks(
        linear, exps, potentials, target_temperature, n_iterations, eps, process_group
    ):
        t, logits, f = (x.flatten(0, 1) for x in (t, logits, f))
        if targets is not None:
            chosen = slice(bisect_left(bounds, start), bisect_left(bounds, start + len(t)))
            targets.index_copy_(0, order[chosen], t[keys[chosen] - start])
        start += len(t)
        minus_dlogits = logits if dtype == wide else torch.empty_like(t)
        for block in zip(*(x.split(cross_entropy.rows) for x in (t, logits, minus_dlogits)), strict=True):
            loss += cross_entropy(*block)
        if dtype == wide:
            dweight.addmm_(minus_dlogits.mT, f)
        else:
            dweight += minus_dlogits.to(dtype).mT @ f
        dbias += minus_dlogits.sum(0)
    potentials.column.mul_(math.exp(HEADROOM))
    factor = -1 / (prediction_temperature * tokens)
    if not positionwise:
        potentials = Potentials(*(x[0] for x in potentials))
    return (loss / tokens).to(wide), targets, potentials, dweight.mul_(factor), dbias.mul_(factor)


OP = "capi_kernels::clustering_head"
torch.library.define(
    OP,
    "(Tensor features, Tensor weight, Tensor? bias, Tensor? rows, float target_temperature,"
    " float prediction_temperature, int n_iterations, float eps, bool positionwise, SymInt? position_chunk,"
    " str? process_group, ScalarType dtype) -> (Tensor loss, Tensor targets, Tensor column_max, Tensor column,"
    " Tensor row, Tensor dweight, Tensor dbias)",
)


def _outputs(features: Tensor, weight: Tensor, results: tuple) -> tuple[Tensor, ...]:
    loss, targets, potentials, dweight, dbias = results
    targets = loss.new_empty((0, len(weight))) if targets is None else targets
    return loss, targets, *potentials, dweight.to(weight.dtype), dbias.to(weight.dtype)


@torch.library.impl(OP, "CPU")
def _(features, weight, *arguments):
    *arguments, process_group, dtype = arguments
    return _outputs(features, weight, _stream(features, weight, *arguments, named_group(process_group), dtype))


@torch.library.impl(OP, "CUDA")
def _(features, weight, *arguments):
    from capi_kernels import clustering_triton

    *arguments, process_group, dtype = arguments
    with torch.cuda.device(features.device):
        results = clustering_triton.clustering_head(features, weight, *arguments, named_group(process_group), dtype)
    return _outputs(features, weight, results)


@torch.library.register_fake(OP)
def _(features, weight, bias, rows, *arguments):
    (positions, images, _), prototypes = features.shape, len(weight)
    *_, positionwise, _, _, dtype = arguments
    slices, row = ((positions,), images) if positionwise else ((), positions * images)
    wide = torch.promote_types(dtype, torch.float32)
    shapes = (), (0 if rows is None else len(rows), prototypes), *((*slices, n) for n in (prototypes, prototypes, row))
    return (
        *(features.new_empty(shape, dtype=wide) for shape in shapes),
        weight.new_empty(weight.shape),
        weight.new_empty(prototypes),
    )


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, *others, dweight, dbias = output
    ctx.mark_non_differentiable(*others, dweight, dbias)
    ctx.save_for_backward(dweight, dbias)


def _backward(ctx: FunctionCtx, dloss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[1:3]
    gradients = (x * dloss if needs else None for x, needs in zip(ctx.saved_tensors, needed, strict=True))
    return None, *gradients, *[None] * 9


register_autocast(OP)
torch.library.register_autograd(OP, _backward, setup_context=_setup_context)


class _ClusteringHead(torch.autograd.Function):
    """The op once more, in the form that torch.func knows."""

    @staticmethod
    def forward(  # Named: without gradients Dynamo counts them.
        features,
        weight,
        bias,
        rows,
        target_temperature,
        prediction_temperature,
        n_iterations,
        eps,
        positionwise,
        position_chunk,
        process_group,
        dtype,
    ):
        temperatures, sinkhorn = (target_temperature, prediction_temperature), (n_iterations, eps, positionwise)
        return torch.ops.capi_kernels.clustering_head(
            features, weight, bias, rows, *temperatures, *sinkhorn, position_chunk, process_group, dtype
        )

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(once_differentiable(_backward))


def _check_linear(features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor("weight", weight, "prototypes dim")
    prototypes = len(weight)
    check_not_empty("weight", prototypes=prototypes)
    check_shape("weight", weight, prototypes=prototypes, dim=features.shape[-1])
    check_device("weight", weight, ("features", features))
    if bias is not None:
        check_tensor("bias", bias, "prototypes", like=("weight", weight))
        check_shape("bias", bias, prototypes=prototypes)


def clustering_head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None = None,
    *,
    target_temperature: float = 0.06,
    prediction_temperature: float = 0.12,
    n_iterations: int = 3,
    eps: float = 1e-8,
    positionwise: bool = True,
    position_chunk: int | None = None,
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
        rows: int32 or int64 [selected], image * positions + position of the tokens whose assignments are returned; in
            any order, with repeats. None returns none.
        n_iterations, eps, process_group: as in `sinkhorn_positionwise`. The loss is this process's mean.
        positionwise: balance every position apart; otherwise all positions together.
        position_chunk: positions handled at a time, the same on all ranks. By default what fits in a CPU's cache, but
            all positions where they are balanced together, whose logits and exponentials are held in float32 then;
            fewer take n_iterations + 2 times the matrix product instead. On a GPU 1 GiB of logits by default, but at
            most a quarter of the free memory (over a group, of the rank with least; agreeing on it waits for the GPU
            where the group has no backend for CPU tensors). Changes memory, speed and rounding: a product of another
            shape may add up its terms in another order. The same call on the same machine gives the same bits.

    Returns:
        ClusteringHead(loss, targets [selected, prototypes] in the order of `rows` or None, potentials of the
        assignments, as from `sinkhorn_potentials` of [positions, images, prototypes]; together, all positions have
        the same columns).

    Raises:
        TypeError: features, weight or bias that are not floating point, rows that are not int32 or int64, or
            float64 on a GPU.
        ValueError: other shapes or devices, an empty axis, rows out of range (looked at on a CPU, uncompiled),
            temperatures that are not positive and finite, n_iterations or position_chunk < 1, a negative or non-finite
            eps, on a GPU more than 1 048 576 prototypes.
    """
    check_tensor("features", features, "positions images dim")
    positions, images, dim = features.shape
    check_not_empty("features", positions=positions, images=images, dim=dim)
    _check_linear(features, weight, bias)
    if rows is not None:
        check_index("rows", rows, positions * images, ("features", features))
    check_positive(target_temperature=target_temperature, prediction_temperature=prediction_temperature)
    check_sinkhorn_options(n_iterations, eps)
    process_group = group_name(resolve_group(process_group))
    if position_chunk is not None:
        check_count("position_chunk", position_chunk)
    loss, targets, column_max, column, row, _, _ = _ClusteringHead.apply(
        features,
        weight,
        bias,
        rows,
        target_temperature,
        prediction_temperature,
        n_iterations,
        eps,
        positionwise,
        position_chunk,
        process_group,
        dtype_under_autocast(features),
    )
    if not positionwise:
        column_max, column = column_max.expand(positions, -1), column.expand(positions, -1)
        row = row.view(positions, images)
    return ClusteringHead(loss, None if rows is None else targets, Potentials(column_max, column, row))


@torch.no_grad()
def clustering_targets(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    potentials: Potentials,
    rows: Tensor,
    *,
    target_temperature: float = 0.06,
) -> Float[Tensor, "selected prototypes"]:
    """Targets of `clustering_head` for chosen rows, from its potentials and the features of these rows alone.

    The logits are computed as in the head, in the dtype of the features (under autocast, its dtype), so that the
    targets are the head's own but for the rounding of a matrix product of another shape. No gradient.

    Args:
        features: [selected, dim], those of the rows, in their order; any floating dtype and strides, of any length.
        weight, bias: [prototypes, dim] and [prototypes] or None, as the head had them.
        potentials: those that the head returned.
        rows: int32 or int64 [selected], image * positions + position, as for the head.
        target_temperature: that of the head.

    Returns:
        Targets [selected, prototypes] in float32 (float64 for float64), in the order of `rows`.

    Raises:
        TypeError: features, weight or bias that are not floating point, rows that are not int32 or int64.
        ValueError: other shapes or devices, an empty axis but the rows', rows out of range (looked at on a CPU,
            uncompiled), a temperature that is not positive and finite.
    """
    check_tensor("features", features, "selected dim")
    selected, dim = features.shape
    check_not_empty("features", dim=dim)
    _check_linear(features, weight, bias)
    check_chosen("rows", rows, potentials, len(weight), ("features", features))
    check_shape("rows", rows, selected=selected)
    check_positive(target_temperature=target_temperature)
    dtype = dtype_under_autocast(features)
    with autocast_off(features.device.type):
        logits = F.linear(normalised(features, dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    wide = torch.promote_types(dtype, torch.float32)
    return torch.ops.capi_kernels.assignments_from_potentials(logits, *potentials, rows, target_temperature, wide)
