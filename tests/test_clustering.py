import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_draws_as_accurate, least_exact, peak_allocation, sums_in_blocks
from ranks import run_ranks
from torch import Tensor

from capi_kernels import (
    ClusteringHead,
    Potentials,
    assignments_from_potentials,
    clustering_head,
    clustering_targets,
    reference,
    sinkhorn_positionwise,
    sinkhorn_potentials,
)
from capi_kernels.sinkhorn import cpu

# positions, images, prototypes, dim
SHAPES = [(1, 1, 1, 1), (1, 5, 7, 3), (6, 4, 9, 5), (5, 16, 40, 8)]
SEEDS = range(4)  # The loss is one number: several are judged together.


def draw(
    positions: int, images: int, prototypes: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, ...]:
    """Features (a transposed view), weight, bias, and unsorted rows with repeats."""
    generator = torch.Generator().manual_seed(positions + images + 1000 * seed)
    features, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((images, positions, dim), (prototypes, dim), (prototypes,))
    )
    rows = torch.randint(positions * images, (11,), generator=generator)
    return features.transpose(0, 1), weight, bias, rows


def own(features: Tensor, rows: Tensor) -> Tensor:
    """The features of the rows image * positions + position."""
    return features[rows % len(features), rows // len(features)]


def run(head, features: Tensor, weight: Tensor, bias: Tensor | None, **options) -> dict[str, Tensor]:
    """Loss and gradients."""
    weight = weight.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    loss, _ = head(features, weight, bias, **options)
    (3 * loss).backward()
    results = {"loss": loss.detach(), "dweight": weight.grad}
    return results if bias is None else results | {"dbias": bias.grad}


Draw = tuple[Tensor, Tensor, Tensor | None, Tensor]  # The rows are for the targets.


def assert_defined(head: Callable[..., ClusteringHead], draws: Iterable[Draw], **options) -> None:
    """Loss and gradients of all draws together, in float32 and in float64."""
    compared = []
    definition = {name: option for name, option in options.items() if name != "position_chunk"}
    for *inputs, _ in draws:
        wide = [x if x is None else x.double() for x in inputs]
        oracle = run(reference.clustering_head, *wide, **definition)
        single = least_exact(partial(run, reference.clustering_head, *inputs, **definition), oracle)
        actual = run(head, *inputs, **options)
        assert actual.keys() == oracle.keys()
        compared.append([list(x.values()) for x in (actual, single, oracle)])
        for name, result in run(head, *wide, **options).items():
            torch.testing.assert_close(result, oracle[name], rtol=1e-11, atol=1e-12)
    assert_draws_as_accurate(compared)


@pytest.mark.parametrize("positionwise", [True, False], ids=["positionwise", "together"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 2, None])
def test_loss_and_gradients_match_the_definition(
    shape: tuple[int, ...], positionwise: bool, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk == 1:
        monkeypatch.setattr(cpu, "CHUNK_BYTES", 3 * 4 * shape[2])  # three rows
    draws = [draw(*shape, seed=seed) for seed in SEEDS]
    for options in ({}, {"n_iterations": 2, "eps": 0.1, "target_temperature": 0.2, "prediction_temperature": 0.5}):
        for with_bias in (True, False):
            given = [(f, w, b if with_bias else None, rows) for f, w, b, rows in draws]
            assert_defined(clustering_head, given, position_chunk=chunk, positionwise=positionwise, **options)


@pytest.mark.parametrize("positionwise", [True, False], ids=["positionwise", "together"])
@pytest.mark.parametrize("chunk", [1, 2, None])
def test_images_that_are_balanced_alone(positionwise: bool, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the definition in one chunk or several, also in blocks of which one has no image of the loss."""
    draws = [draw(5, 8, 12, 6, seed=seed) for seed in SEEDS]
    for n_scored in (1, 3, 8):
        assert_defined(clustering_head, draws, position_chunk=chunk, positionwise=positionwise, n_scored=n_scored)
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 3 * 4 * 12)  # three rows
    assert_defined(clustering_head, draws, position_chunk=chunk, positionwise=positionwise, n_scored=2)
    # Slices of what all of them are balanced to.
    features, weight, bias, _ = draws[0]
    options = {"position_chunk": chunk, "positionwise": positionwise}
    potentials = clustering_head(features, weight, bias, **options).potentials
    for some, every in zip(clustering_head(*draws[0][:3], n_scored=3, **options).potentials, potentials, strict=True):
        assert torch.equal(some, every)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("positionwise", [True, False], ids=["positionwise", "together"])
def test_products_summed_in_another_order_are_as_accurate(positionwise: bool, blocks: int) -> None:
    """As another machine's library may do."""

    def in_another_order(*arguments, **options) -> ClusteringHead:
        with sums_in_blocks(blocks):
            return clustering_head(*arguments, **options)

    draws = [draw(5, 16, 40, 96, seed=seed) for seed in SEEDS]
    for chunk in (2, None):
        assert_defined(in_another_order, draws, position_chunk=chunk, positionwise=positionwise)


@pytest.mark.parametrize("positionwise", [True, False], ids=["positionwise", "together"])
def test_bfloat16_features_meet_float32_weights(positionwise: bool) -> None:
    """What the definition loses through logits of bfloat16 bounds what the op may lose, over all draws."""
    options = {"positionwise": positionwise, "target_temperature": 0.5, "prediction_temperature": 0.5}
    errors = {}
    for seed in SEEDS:
        features, weight, bias, _ = draw(5, 16, 40, 8, seed=seed)
        half = features.bfloat16()
        oracle = run(reference.clustering_head, half.double(), weight.double(), bias.double(), **options)
        single = least_exact(partial(run, reference.clustering_head, half, weight, bias, **options), oracle)
        actual = run(clustering_head, half, weight, bias, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = clustering_head(half.float(), weight, bias, **options)
        assert torch.equal(autocast.loss, actual["loss"])
        for name, exact in oracle.items():
            assert actual[name].dtype == torch.float32
            pair = [(x[name].double() - exact).abs().max() for x in (actual, single)]
            errors[name] = [max(pair) for pair in zip(errors.get(name, pair), pair, strict=True)]
    for name, (error, budget) in errors.items():
        assert error <= 2 * budget, name


def test_targets_are_aligned_with_rows() -> None:
    features, weight, bias, _ = draw(6, 4, 9, 5)
    rows = torch.tensor([23, 0, 7, 7, 22, 1], dtype=torch.int32)  # image * 6 + position
    assignments = sinkhorn_positionwise((F.normalize(features, dim=-1) @ weight.T + bias) / 0.06)
    for chunk in (1, 4, 6):
        potentials = clustering_head(features, weight, bias, position_chunk=chunk).potentials
        targets = clustering_targets(own(features, rows), weight, bias, potentials, rows)
        for target, (image, position) in zip(targets, [(3, 5), (0, 0), (1, 1), (1, 1), (3, 4), (0, 1)], strict=True):
            torch.testing.assert_close(target, assignments[position, image], rtol=1e-4, atol=1e-6)
            assert (target - assignments[position, image - 1]).abs().max() > 1e-2


def test_potentials_are_those_of_sinkhorn() -> None:
    features, weight, bias, _ = draw(6, 4, 9, 5, dtype=torch.float64)
    logits = F.normalize(features, dim=-1) @ weight.T + bias
    for positionwise, slices in [(True, logits), (False, logits.flatten(0, 1))]:
        expected = sinkhorn_potentials(slices, temperature=0.06)
        if not positionwise:
            shapes = zip(expected, ((6, 9), (6, 9), (6, 4)), strict=True)
            expected = [x.expand(shape) if len(x) == 9 else x.view(shape) for x, shape in shapes]
        for chunk in (1, 4, 6):
            head = clustering_head(features, weight, bias, positionwise=positionwise, position_chunk=chunk)
            for actual, potential in zip(head.potentials, expected, strict=True):
                torch.testing.assert_close(actual, potential, rtol=1e-9, atol=0)


@pytest.mark.parametrize("positionwise", [True, False], ids=["positionwise", "together"])
def test_targets_of_rows_from_their_features_and_the_potentials(positionwise: bool) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        features, weight, bias, rows = draw(5, 16, 40, 8, dtype=dtype)
        for b in (bias, None):
            potentials = clustering_head(features, weight, b, positionwise=positionwise).potentials
            actual = clustering_targets(own(features, rows), weight, b, potentials, rows)
            assert actual.dtype == dtype
            wide = [x if x is None else x.double() for x in (features, weight, b)]
            exact = reference.clustering_head(*wide, positionwise=positionwise).potentials
            oracle = reference.clustering_targets(own(wide[0], rows), *wide[1:], exact, rows)
            torch.testing.assert_close(actual.double(), oracle, rtol=0, atol=tolerance)
            assert (actual - oracle.roll(1, 0)).abs().amax(1).min() > 1e-2
            same_dtype = reference.clustering_targets(own(features, rows), weight, b, potentials, rows)
            torch.testing.assert_close(same_dtype.double(), oracle, rtol=0, atol=tolerance)


def test_targets_of_rows_are_computed_in_the_dtype_of_the_features() -> None:
    features, weight, bias, rows = draw(5, 16, 40, 8)
    half = own(features, rows).bfloat16()
    potentials = clustering_head(features.bfloat16(), weight, bias).potentials
    targets = clustering_targets(half, weight, bias, potentials, rows)
    assert targets.dtype == torch.float32
    logits = F.linear(F.normalize(half.float()).bfloat16(), weight.bfloat16(), bias.bfloat16())
    by_hand = assignments_from_potentials(logits.float(), potentials, rows, temperature=0.06)
    torch.testing.assert_close(targets, by_hand, rtol=0, atol=0)
    assert (clustering_targets(half.float(), weight, bias, potentials, rows) - targets).abs().max() > 1e-3
    assert (
        clustering_targets(half, weight, bias, potentials, rows, target_temperature=0.2) - targets
    ).abs().max() > 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = clustering_targets(half.float(), weight.requires_grad_(), bias, potentials, rows)
    assert torch.equal(autocast, targets)
    assert not autocast.requires_grad


def test_bad_arguments_of_targets() -> None:
    features, weight, bias, rows = draw(6, 4, 9, 5)
    potentials = clustering_head(features, weight, bias).potentials
    good = {"features": own(features, rows), "weight": weight, "bias": bias, "potentials": potentials}
    good["rows"] = rows
    column = potentials._replace(column=potentials.row)
    cases = [
        (ValueError, r"features must have the axes \[selected, dim\], got shape \(6, 4, 5\)", {"features": features}),
        (ValueError, r"weight must have the shape \[prototypes=9, dim=5\], got \(9, 4\)", {"weight": weight[:, :4]}),
        (ValueError, r"bias must have the shape \[prototypes=9\], got \(8,\)", {"bias": bias[:8]}),
        (ValueError, r"column must have the shape \[positions=6, prototypes=9\]", {"potentials": column}),
        (ValueError, r"rows must have the shape \[selected=11\], got \(10,\)", {"rows": rows[1:]}),
        (ValueError, r"rows must be in \[0, 24\), got values from", {"rows": rows + 24}),
        (ValueError, r"rows must be in \[0, 24\), got values from -1 to", {"rows": rows.where(rows != rows[0], -1)}),
        (ValueError, r"rows must have one axis, got shape \(1, 11\)", {"rows": rows[None]}),
        (TypeError, "rows must be torch.int32 or torch.int64, got torch.bool", {"rows": rows.bool()}),
        (ValueError, "target_temperature must be positive and finite, got 0.0", {"target_temperature": 0.0}),
    ]
    for error, message, bad in cases:
        with pytest.raises(error, match=message):
            clustering_targets(**(good | bad))


def test_features_without_length_or_with_a_tiny_one() -> None:
    """Below 1e-7 the length is 1e-7: a zero vector stays one, and a tiny one is not blown up to a unit vector."""
    draws = [draw(6, 4, 9, 5, seed=seed) for seed in SEEDS]
    for features, *_ in draws:
        features[2, 1] = 0
        features[3, 2] *= 1e-9
    assert_defined(clustering_head, draws)


def test_gradients_reach_weight_and_bias_alone() -> None:
    features, weight, bias, _ = draw(6, 4, 9, 5)
    features, weight = features.requires_grad_(), weight.requires_grad_()
    loss, potentials = clustering_head(features, weight, bias)
    assert not any(x.requires_grad for x in potentials)
    loss.backward()
    assert features.grad is None
    assert bias.grad is None
    assert weight.grad.abs().max() > 0
    with torch.no_grad():
        plain = clustering_head(features, weight, bias)
    assert not plain.loss.requires_grad
    assert torch.equal(plain.loss, loss)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_gradients_are_those_that_the_forward_saved(factor: float) -> None:
    """Scaled in place, copied nowhere; anew where the graph is kept for another backward."""
    features, weight, bias, _ = draw(6, 4, 9, 5)
    leaves = weight.requires_grad_(), bias.requires_grad_()
    loss = factor * clustering_head(features, *leaves).loss
    kept = torch.autograd.grad(loss, leaves, retain_graph=True)
    node = loss.grad_fn.next_functions[0][0]
    pointers = [x.data_ptr() for x in node.saved_tensors]
    before = [x.clone() for x in node.saved_tensors]
    loss.backward()
    assert [x.grad.data_ptr() for x in leaves] == pointers
    for leaf, x, y in zip(leaves, before, kept, strict=True):
        assert torch.equal(leaf.grad, factor * x)
        assert torch.equal(leaf.grad, y)


def test_backward_allocates_nothing_for_what_has_no_gradient() -> None:
    features, weight, bias, _ = draw(2, 3, 500, 64)
    loss = clustering_head(features, weight.requires_grad_(), bias.requires_grad_()).loss
    assert peak_allocation(lambda: torch.autograd.grad(loss, (weight, bias))) < 1000


def test_properties() -> None:
    features, weight, bias, _ = draw(6, 8, 9, 5, dtype=torch.float64)
    before = features.clone(), weight.clone(), bias.clone()
    first = run(clustering_head, features, weight, bias, position_chunk=2)
    second = run(clustering_head, features, weight, bias, position_chunk=2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(x, y) for x, y in zip((features, weight, bias), before, strict=True))
    contiguous = run(clustering_head, features.contiguous(), weight, bias, position_chunk=2)
    assert all(torch.equal(first[name], contiguous[name]) for name in first)

    images = torch.tensor([3, 1, 5, 0, 7, 2, 4, 6])
    permuted = run(clustering_head, features[:, images], weight, bias)
    scaled = run(clustering_head, features * 7, weight, bias)
    for name in first:
        torch.testing.assert_close(permuted[name], first[name], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(scaled[name], first[name], rtol=1e-10, atol=1e-12)


def test_float64_stays_under_autocast() -> None:
    features, weight, bias, rows = draw(6, 4, 9, 5, dtype=torch.float64)
    expected = run(clustering_head, features, weight, bias)
    potentials = clustering_head(features, weight, bias).potentials
    targets = clustering_targets(own(features, rows), weight, bias, potentials, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(clustering_head, features, weight, bias)
        assert torch.equal(clustering_targets(own(features, rows), weight, bias, potentials, rows), targets)
    assert all(torch.equal(actual[name], x) for name, x in expected.items())


def test_shapes_without_memory() -> None:
    """On meta tensors, as when a model is planned before it is made."""
    features, weight, bias, rows = (x.to("meta") for x in draw(6, 4, 9, 5))
    head = clustering_head(features, weight.requires_grad_(), bias)
    head.loss.backward()
    assert weight.grad.shape == (9, 5)
    assert clustering_targets(features[0], weight, bias, head.potentials, rows[:4]).shape == (4, 9)


def test_logits_of_all_positions_never_exist_at_once() -> None:
    features, weight, bias, _ = draw(32, 64, 512, 16)
    weight.requires_grad_()
    everything = 32 * 64 * 512 * 4
    for positionwise in (True, False):
        options = {"positionwise": positionwise, "position_chunk": 2}
        assert (
            peak_allocation(lambda options=options: clustering_head(features, weight, bias, **options)) < everything / 3
        )


@pytest.mark.usefixtures("without_annotations")
def test_bad_arguments() -> None:
    features, weight, bias, _ = draw(6, 4, 9, 5)
    good = {"features": features, "weight": weight, "bias": bias}
    cases = [
        (TypeError, "features must be floating point, got torch.int64", {"features": features.long()}),
        (
            ValueError,
            r"features must have the axes \[positions, images, dim\], got shape \(4, 5\)",
            {"features": features[0]},
        ),
        (ValueError, "features must have at least one element on the axis positions", {"features": features[:0]}),
        (ValueError, "features must have at least one element on the axis images", {"features": features[:, :0]}),
        (ValueError, "features must have at least one element on the axis dim", {"features": features[..., :0]}),
        (TypeError, "weight must be floating point, got torch.int64", {"weight": weight.long()}),
        (ValueError, r"weight must have the shape \[prototypes=9, dim=5\], got \(9, 4\)", {"weight": weight[:, :4]}),
        (ValueError, "weight must have at least one element on the axis prototypes", {"weight": weight[:0]}),
        (ValueError, "weight must be on the device of features, cpu, got meta", {"weight": weight.to("meta")}),
        (ValueError, r"bias must have the shape \[prototypes=9\], got \(8,\)", {"bias": bias[:8]}),
        (TypeError, "bias must have the dtype of weight, torch.float32, got torch.float64", {"bias": bias.double()}),
        (ValueError, "target_temperature must be positive and finite, got nan", {"target_temperature": math.nan}),
        (ValueError, "prediction_temperature must be positive and finite, got 0.0", {"prediction_temperature": 0.0}),
        (ValueError, "n_iterations must be at least 1, got 0", {"n_iterations": 0}),
        (ValueError, "eps must be finite and at least 0, got inf", {"eps": math.inf}),
        (ValueError, "position_chunk must be at least 1, got 0", {"position_chunk": 0}),
        (ValueError, "n_scored must be at least 1, got 0", {"n_scored": 0}),
        (ValueError, "n_scored must be at most the 4 images, got 5", {"n_scored": 5}),
        (ValueError, r"position_chunk must be below 2\^31, got 18446744073709551616", {"position_chunk": 2**64}),
        (TypeError, "positionwise must be True or False, got None", {"positionwise": None}),
        (TypeError, "process_group must be", {"process_group": "all"}),
    ]
    for error, message, bad in cases:
        with pytest.raises(error, match=message):
            clustering_head(**(good | bad))


IMAGES_OF_RANK = (3, 5)


def compare_with_one_process(rank: int, folder: Path) -> None:
    """Two ranks with different numbers of images against one process that has all of them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    features, weight, bias, _ = draw(6, 8, 9, 5, dtype=torch.float64)
    mine = slice(0, 3) if rank == 0 else slice(3, 8)
    logits = F.normalize(features, dim=-1) @ weight.T + bias
    alone = {"process_group": None}
    expected = sinkhorn_positionwise(logits, temperature=0.06, **alone)
    # Chunks of two positions on the rank with most images; both must cut alike.
    cpu.CHUNK_BYTES = 2 * 5 * 9 * 8
    for op in (sinkhorn_positionwise, reference.sinkhorn_positionwise):
        for group in ("world", torch.distributed.group.WORLD):
            actual = op(logits[:, mine], temperature=0.06, process_group=group)
            torch.testing.assert_close(actual, expected[:, mine], rtol=0, atol=1e-13)
    separate = sinkhorn_positionwise(logits[:, mine], temperature=0.06, **alone)
    assert (separate - expected[:, mine]).abs().max() > 1e-2

    images = IMAGES_OF_RANK[rank]
    for positionwise in (True, False):
        for chunk in (None, 4):
            options = {"positionwise": positionwise, "position_chunk": chunk}
            rows = torch.arange(6 * images)
            column_max, column, row = clustering_head(features, weight, bias, **options, **alone).potentials
            expected = Potentials(column_max, column, row[:, mine])
            potentials = clustering_head(features[:, mine], weight, bias, **options).potentials
            layer = own(features[:, mine], rows), weight, bias
            actual, expected = (clustering_targets(*layer, given, rows) for given in (potentials, expected))
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
            whole = run(clustering_head, features, weight, bias, **options, **alone)
            part = run(clustering_head, features[:, mine], weight, bias, **options)
            for name in ("loss", "dweight", "dbias"):  # local means: weighted by their tokens they make the global one
                weighted = part[name] * (images / 8)
                torch.distributed.all_reduce(weighted)
                torch.testing.assert_close(weighted, whole[name], rtol=1e-11, atol=1e-12)
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    run_ranks(compare_with_one_process, (tmp_path,), 2)
