"""The clustering head on Triton kernels: in the interpreter here, and once more where there is a GPU."""

import math

import pytest
import torch
from numerics import assert_as_accurate
from torch import Tensor
from torch.distributed import ProcessGroup

from capi_kernels import Potentials, clustering_triton, reference, sinkhorn, sinkhorn_potentials, sinkhorn_triton
from capi_kernels.clustering_triton import clustering_head, head_rows

pytestmark = pytest.mark.usefixtures("guarded_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# positions, images, prototypes, dim
SHAPES = [(1, 1, 1, 1), (1, 5, 7, 3), (3, 4, 9, 5), (2, 9, 64, 8)]


def draw(
    positions: int, images: int, prototypes: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Features (a transposed view) in `dtype`; float32 weight and bias; unsorted rows with repeats."""
    generator = torch.Generator().manual_seed(positions + images)
    features, weight, bias = (
        torch.randn(shape, generator=generator).to(DEVICE)
        for shape in ((images, positions, dim), (prototypes, dim), (prototypes,))
    )
    rows = torch.randint(positions * images, (7,), generator=generator).to(DEVICE)
    return features.to(dtype).transpose(0, 1), weight, bias, rows


def run(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    positionwise: bool,
    chunk: int | None = None,
    temperatures: tuple[float, float] = (0.06, 0.12),
    n_iterations: int = 3,
    eps: float = 1e-8,
) -> dict[str, Tensor | None]:
    loss, targets, potentials, dweight, dbias = clustering_head(
        features, weight, bias, rows, *temperatures, n_iterations, eps, positionwise, chunk, None, features.dtype
    )
    return {"loss": loss, "targets": targets, "dweight": dweight, "dbias": dbias, **potentials._asdict()}


def defined(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    positionwise: bool,
    temperatures: tuple[float, float] = (0.06, 0.12),
    n_iterations: int = 3,
    eps: float = 1e-8,
) -> dict[str, Tensor]:
    weight = weight.detach().requires_grad_()
    bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
    bias = bias.detach().requires_grad_()
    target_temperature, prediction_temperature = temperatures
    loss, targets, _ = reference.clustering_head(
        features,
        weight,
        bias,
        rows,
        target_temperature=target_temperature,
        prediction_temperature=prediction_temperature,
        n_iterations=n_iterations,
        eps=eps,
        positionwise=positionwise,
    )
    loss.backward()
    return {"loss": loss.detach(), "targets": targets, "dweight": weight.grad, "dbias": bias.grad}


@pytest.mark.parametrize("positionwise", [True, False], ids=["positionwise", "together"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_targets_and_gradients_match_the_definition(shape: tuple[int, ...], positionwise: bool) -> None:
    features, weight, bias, rows = draw(*shape)
    chunk = 2 if shape[0] > 2 else None
    for biased in (bias, None):
        wide = [x if x is None else x.double() for x in (features, weight, biased)]
        oracle = defined(*wide, rows, positionwise)
        single = defined(features, weight, biased, rows, positionwise)
        actual = run(features, weight, biased, rows, positionwise, chunk)
        for name in oracle:
            assert_as_accurate(actual[name], single[name], oracle[name])


def test_options() -> None:
    features, weight, bias, rows = draw(3, 4, 9, 5)
    options = ((0.2, 0.5), 2, 0.1)
    oracle = defined(features.double(), weight.double(), bias.double(), rows, True, *options)
    single = defined(features, weight, bias, rows, True, *options)
    actual = run(features, weight, bias, rows, True, None, *options)
    for name in oracle:
        assert_as_accurate(actual[name], single[name], oracle[name])


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("positionwise", [True, False], ids=["positionwise", "together"])
def test_half_features_meet_float32_weights(positionwise: bool, dtype: torch.dtype) -> None:
    features, weight, bias, rows = draw(3, 9, 64, 8, dtype)
    temperatures = (0.5, 0.5)
    oracle = defined(features.double(), weight.double(), bias.double(), rows, positionwise, temperatures)
    single = defined(features, weight, bias, rows, positionwise, temperatures)
    actual = run(features, weight, bias, rows, positionwise, 2, temperatures)
    for name in oracle:
        assert actual[name].dtype == torch.float32
        # What the definition loses through logits of half precision bounds what the head may.
        error, budget = (x[name].double() - oracle[name] for x in (actual, single))
        assert error.abs().max() <= 2 * budget.abs().max(), name


def test_chunks_change_no_bit_of_targets_and_potentials() -> None:
    features, weight, bias, rows = draw(3, 4, 9, 5)
    whole = run(features, weight, bias, rows, True)
    assert all(torch.equal(whole[name], x) for name, x in run(features, weight, bias, rows, True).items())
    for chunk in (1, 2):
        part = run(features, weight, bias, rows, True, chunk)
        for name in ("targets", "row", "column", "column_max", "loss"):
            assert torch.equal(part[name], whole[name]), name


def test_targets_are_aligned_with_rows() -> None:
    features, weight, bias, _ = draw(3, 4, 9, 5)
    rows = torch.tensor([11, 0, 4, 4, 10, 1], dtype=torch.int32, device=DEVICE)  # image * 3 + position
    assignments = defined(features, weight, bias, torch.arange(12, device=DEVICE), True)["targets"]
    for chunk in (1, 3):
        targets = run(features, weight, bias, rows, True, chunk)["targets"]
        torch.testing.assert_close(targets, assignments[rows], rtol=1e-4, atol=1e-6)
        assert (targets - assignments[rows - 3]).abs().amax(1).min() > 1e-2


def test_no_rows_and_zero_rows() -> None:
    features, weight, bias, rows = draw(3, 4, 9, 5)
    assert run(features, weight, bias, None, True)["targets"] is None
    assert run(features, weight, bias, rows[:0], True)["targets"].shape == (0, 9)


def test_potentials_are_those_of_sinkhorn() -> None:
    features, weight, bias, _ = draw(3, 4, 9, 5)
    logits = torch.nn.functional.normalize(features, dim=-1) @ weight.T + bias
    for positionwise, slices in ((True, logits), (False, logits.flatten(0, 1))):
        expected = reference.sinkhorn_potentials(slices.double(), temperature=0.06)
        actual = run(features, weight, bias, None, positionwise, 2)
        assert actual["row"].shape == slices.shape[:-1]
        product = actual["column"].unsqueeze(-2) * actual["row"].unsqueeze(-1)
        expected_product = expected.column.unsqueeze(-2) * expected.row.unsqueeze(-1)
        torch.testing.assert_close(product.double(), expected_product, rtol=1e-4, atol=0)
        torch.testing.assert_close(actual["column_max"].double(), expected.column_max)


def test_rows_write_their_gradient_over_the_logits_and_nothing_else() -> None:
    """Large logits, a row without mass in its targets, and every place of a row that is chosen several times."""
    positions, images, prototypes = 2, 9, 37  # more rows than a program has
    generator = torch.Generator().manual_seed(0)
    guard = torch.full((3, positions, images, prototypes), 7.0, device=DEVICE)
    logits = guard[1]
    logits.copy_(torch.randn(logits.shape, generator=generator) + 1e4)
    logits[0, 1] -= 100
    before = logits.clone()
    potentials = sinkhorn_potentials(before, 2)  # as after the last but one iteration, column update included
    row = potentials.row.clone()
    rows = torch.tensor([4, 0, 4], device=DEVICE)
    chosen = torch.tensor([1, 0, 2], device=DEVICE)
    start = torch.searchsorted(rows.sort()[0], torch.arange(positions * images + 1, device=DEVICE))
    loss, targets = (torch.full(shape, math.nan, device=DEVICE) for shape in ((18,), (3, prototypes)))
    head_rows(logits, potentials, loss, targets, chosen, start, 1.0, 0.5, 1e-8)

    M = reference.assignments_from_potentials(before.double(), Potentials(*potentials[:2], row))
    t = M / (M.sum(-1, keepdim=True) + 1e-8)
    torch.testing.assert_close(potentials.row.double(), row / (M.sum(-1) + 1e-8), rtol=1e-5, atol=0)
    z = (before.double() / 0.5).requires_grad_()
    expected = -(t * z.log_softmax(-1)).sum(-1)
    expected.sum().backward()
    torch.testing.assert_close(loss.double(), expected.detach().flatten(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(-logits.double(), z.grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(targets.double(), t.flatten(0, 1)[[4, 0, 4]], rtol=1e-4, atol=1e-6)
    assert (guard[0] == 7).all()
    assert (guard[2] == 7).all()


def test_position_chunks_fit_in_their_bytes() -> None:
    features = torch.zeros(256, 512, 1, device=DEVICE)
    chunk = clustering_triton.default_position_chunk
    if DEVICE == "cpu":
        assert chunk(features, 16384, torch.bfloat16, None) == 64
        assert chunk(features, 16384, torch.float32, None) == 32
        assert chunk(features.expand(-1, -1, 1).repeat(1, 64, 1), 16384, torch.float32, None) == 1


@pytest.mark.parametrize(("backends", "device"), [("cpu:gloo,cuda:nccl", "cpu"), ("cuda:nccl", "meta")])
def test_ranks_agree_on_a_cpu_where_they_can(backends: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reduced(Exception):
        pass

    def all_reduce(x: Tensor, op, group) -> None:
        assert x.device.type == device
        raise Reduced

    monkeypatch.setattr(sinkhorn, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(sinkhorn, "all_reduce", all_reduce)
    with pytest.raises(Reduced):
        sinkhorn.largest([3, -4], ProcessGroup(0, 2), torch.device("meta"))  # which stands for a GPU


def test_a_batch_gathered_over_many_steps_is_balanced_whole() -> None:
    """More images than a block has: the rows form, one position at a time, as with features of many micro-batches."""
    features, weight, bias, rows = draw(2, 40, 9, 5)
    oracle = defined(features.double(), weight.double(), bias.double(), rows, True)
    single = defined(features, weight, bias, rows, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sinkhorn_triton, "MOST_IMAGES_IN_BLOCK", 32)
        actual = run(features, weight, bias, rows, True, 1)
    for name in oracle:
        assert_as_accurate(actual[name], single[name], oracle[name])


@pytest.mark.gpu
def test_the_heads_true_size_on_a_gpu() -> None:
    features, weight, bias, rows = draw(8, 512, 16384, 1024, torch.bfloat16)
    first, second = (run(features, weight, bias, rows, True, 4) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    single = defined(features, weight, bias, rows, True)
    oracle = defined(features.double(), weight.double(), bias.double(), rows, True)
    for name in oracle:
        error, budget = (x[name].double() - oracle[name] for x in (first, single))
        assert error.abs().max() <= 2 * budget.abs().max(), name


@pytest.mark.gpu
def test_gradients_of_the_public_op_on_a_gpu() -> None:
    from capi_kernels import clustering_head as public

    features, weight, bias, rows = draw(3, 9, 64, 8)
    weight.requires_grad_()
    head = public(features, weight, bias, rows)
    (3 * head.loss).backward()
    expected = run(features, weight.detach(), bias, rows, True)
    assert torch.equal(head.targets, expected["targets"])
    torch.testing.assert_close(weight.grad, 3 * expected["dweight"])
