"""The clustering head on Triton kernels: in the interpreter here, and once more where there is a GPU."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from numerics import assert_draws_as_accurate, least_exact, sums_in_blocks
from torch import Tensor
from torch.distributed import ProcessGroup

from capi_kernels import Potentials, _process_groups, reference, sinkhorn_potentials
from capi_kernels.heads import clustering_head_triton
from capi_kernels.heads.clustering_head_triton import clustering_head, head_rows
from capi_kernels.sinkhorn import balance_triton

pytestmark = pytest.mark.usefixtures("guarded_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# positions, images, prototypes, dim
SHAPES = [(1, 1, 1, 1), (1, 5, 7, 3), (3, 4, 9, 5), (2, 9, 64, 8)]
SEEDS = range(3)  # The loss is one number: several are judged together.
MORE_SEEDS = range(16)  # Of half precision: two roundings of the features give errors of one size, but of any ratio.


def draw(
    positions: int, images: int, prototypes: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, ...]:
    """Features (a transposed view) in `dtype`; float32 weight and bias."""
    generator = torch.Generator().manual_seed(positions + images + 1000 * seed)
    features, weight, bias = (
        torch.randn(shape, generator=generator).to(DEVICE)
        for shape in ((images, positions, dim), (prototypes, dim), (prototypes,))
    )
    return features.to(dtype).transpose(0, 1), weight, bias


def run(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positionwise: bool,
    chunk: int | None = None,
    temperatures: tuple[float, float] = (0.06, 0.12),
    n_iterations: int = 3,
    eps: float = 1e-8,
    n_scored: int | None = None,
) -> dict[str, Tensor | None]:
    loss, potentials, dweight, dbias = clustering_head(
        features, weight, bias, *temperatures, n_iterations, eps, positionwise, chunk, None, features.dtype, n_scored
    )
    return {"loss": loss, "dweight": dweight, "dbias": dbias, **potentials._asdict()}


def defined(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positionwise: bool,
    temperatures: tuple[float, float] = (0.06, 0.12),
    n_iterations: int = 3,
    eps: float = 1e-8,
    n_scored: int | None = None,
) -> dict[str, Tensor]:
    weight = weight.detach().requires_grad_()
    bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
    bias = bias.detach().requires_grad_()
    target_temperature, prediction_temperature = temperatures
    loss, _ = reference.clustering_head(
        features,
        weight,
        bias,
        target_temperature=target_temperature,
        prediction_temperature=prediction_temperature,
        n_iterations=n_iterations,
        eps=eps,
        positionwise=positionwise,
        n_scored=n_scored,
    )
    loss.backward()
    return {"loss": loss.detach(), "dweight": weight.grad, "dbias": bias.grad}


Draw = tuple[Tensor, Tensor, Tensor | None]


def results(draws: Iterable[Draw], run: Callable[..., dict], *options, **run_options) -> list[tuple[dict, dict, dict]]:
    """What the kernels, the definition in the same dtype and the definition in float64 make of each draw."""
    compared = []
    for inputs in draws:
        oracle = defined(*(x if x is None else x.double() for x in inputs), *options)
        single = least_exact(partial(defined, *inputs, *options), oracle)
        actual = run(*inputs, *options, **run_options)
        compared.append(({name: actual[name] for name in oracle}, single, oracle))
    return compared


def assert_defined(compared: list[tuple[dict, dict, dict]]) -> None:
    assert_draws_as_accurate([list(x.values()) for x in draw] for draw in compared)


def assert_no_less_exact(compared: list[tuple[dict, dict, dict]]) -> None:
    """What the definition loses through logits of half precision bounds what the head may lose, over all draws.

    By the root of the mean square: the loss is one number a draw, whose error is that of one rounding or another by
    chance. (Of bfloat16 logits both lose 0.0024 over a hundred draws, but one may lose 3 times the other over three.)
    """
    for name in compared[0][2]:
        errors = [[float((x[name].double() - oracle[name]).abs().max()) for x in pair] for *pair, oracle in compared]
        error, budget = (math.hypot(*column) for column in zip(*errors, strict=True))
        assert all(actual[name].dtype == torch.float32 for actual, *_ in compared)
        assert error <= 2 * budget, name


@pytest.mark.parametrize("positionwise", [True, False], ids=["positionwise", "together"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_match_the_definition(shape: tuple[int, ...], positionwise: bool) -> None:
    chunk = 2 if shape[0] > 2 else None
    draws = [draw(*shape, seed=seed) for seed in SEEDS]
    assert_defined(results(draws, run, positionwise, chunk=chunk))
    without_bias = [(features, weight, None) for features, weight, _ in draws]
    assert_defined(results(without_bias, run, positionwise, chunk=chunk))


@pytest.mark.skipif(DEVICE == "cuda", reason="CPU products are replaced")
@pytest.mark.parametrize("blocks", [1, 3])
def test_products_summed_in_another_order_are_as_accurate(blocks: int) -> None:
    """As another library that multiplies may do."""

    def in_another_order(*arguments, **options) -> dict:
        with sums_in_blocks(blocks):
            return run(*arguments, **options)

    assert_defined(results([draw(2, 9, 64, 96, seed=seed) for seed in SEEDS], in_another_order, True))


def test_options() -> None:
    options = (True, (0.2, 0.5), 2, 0.1)
    compared = results(
        [draw(3, 4, 9, 5, seed=seed) for seed in SEEDS],
        lambda *inputs: run(*inputs[:4], None, *inputs[4:]),
        *options,
    )
    assert_defined(compared)


@pytest.mark.parametrize("positionwise", [True, False], ids=["positionwise", "together"])
@pytest.mark.parametrize("chunk", [2, None])
def test_images_that_are_balanced_alone(positionwise: bool, chunk: int | None) -> None:
    options = (positionwise, (0.06, 0.12), 3, 1e-8, 2)
    compared = results([draw(3, 5, 9, 5, seed=seed) for seed in SEEDS], lambda *x: run(*x[:4], chunk, *x[4:]), *options)
    assert_defined(compared)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("positionwise", [True, False], ids=["positionwise", "together"])
def test_half_features_meet_float32_weights(positionwise: bool, dtype: torch.dtype) -> None:
    draws = [draw(3, 9, 64, 8, dtype, seed) for seed in MORE_SEEDS]
    assert_no_less_exact(results(draws, lambda *x: run(*x[:4], 2, *x[4:]), positionwise, (0.5, 0.5)))


@pytest.mark.parametrize("positionwise", [True, False], ids=["positionwise", "together"])
def test_the_same_bits_twice(positionwise: bool) -> None:
    inputs = draw(3, 4, 9, 5)
    for chunk in (1, 2, None):
        first, second = (run(*inputs, positionwise, chunk) for _ in range(2))
        assert all(torch.equal(first[name], x) for name, x in second.items())


def test_potentials_are_those_of_sinkhorn() -> None:
    features, weight, bias = draw(3, 4, 9, 5)
    logits = torch.nn.functional.normalize(features.double(), dim=-1) @ weight.double().T + bias
    for positionwise, slices in ((True, logits), (False, logits.flatten(0, 1))):
        expected = reference.sinkhorn_potentials(slices, temperature=0.06)
        actual = run(features, weight, bias, positionwise, 2)
        assert actual["row"].shape == slices.shape[:-1]
        product = actual["column"].unsqueeze(-2) * actual["row"].unsqueeze(-1)
        expected_product = expected.column.unsqueeze(-2) * expected.row.unsqueeze(-1)
        torch.testing.assert_close(product.double(), expected_product, rtol=1e-4, atol=0)
        rounding = (features.shape[-1] + 2) * torch.finfo(torch.float32).eps  # of each term of a logit's sum
        error = (actual["column_max"].double() - expected.column_max).abs().max()
        assert error <= rounding * weight.norm(dim=-1).max() + rounding * bias.abs().max()


@pytest.mark.parametrize("ahead", range(4))
def test_rows_write_their_gradient_over_the_logits_and_nothing_else(
    ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large logits, a row without mass, two programs."""
    default = clustering_head_triton.head_rows_config
    options = {"AHEAD": ahead, "BIAS": ahead % 2 == 0}
    monkeypatch.setattr(clustering_head_triton, "head_rows_config", lambda *shape: default(*shape) | options)
    positions, images, prototypes = 2, 20, 37
    generator = torch.Generator().manual_seed(0)
    guard = torch.full((3, positions, images, prototypes), 7.0, device=DEVICE)
    logits = guard[1]
    logits.copy_(torch.randn(logits.shape, generator=generator) + 1e4)
    logits[0, 1] -= 100
    before = logits.clone()
    potentials = sinkhorn_potentials(before, 2)  # as after the last but one iteration, column update included
    row = potentials.row.clone()
    loss, dbias = torch.full((40,), math.nan, device=DEVICE), torch.full((1, prototypes), math.nan, device=DEVICE)
    head_rows(logits, potentials, loss, dbias, 1.0, 0.5, 1e-8)

    M = reference.assignments_from_potentials(before.double(), Potentials(*potentials[:2], row))
    t = M / (M.sum(-1, keepdim=True) + 1e-8)
    torch.testing.assert_close(potentials.row.double(), row / (M.sum(-1) + 1e-8), rtol=1e-5, atol=0)
    z = (before.double() / 0.5).requires_grad_()
    expected = -(t * z.log_softmax(-1)).sum(-1)
    expected.sum().backward()
    torch.testing.assert_close(loss.double(), expected.detach().flatten(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(-logits.double(), z.grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(-dbias[0].double(), z.grad.sum((0, 1)), rtol=1e-5, atol=1e-5)
    assert (guard[0] == 7).all()
    assert (guard[2] == 7).all()


def test_position_chunks_fit_in_their_bytes() -> None:
    features = torch.zeros(256, 512, 1, device=DEVICE)
    chunk = clustering_head_triton.default_position_chunk
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

    monkeypatch.setattr(_process_groups, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(_process_groups, "all_reduce", all_reduce)
    with pytest.raises(Reduced):
        _process_groups.largest([3, -4], ProcessGroup(0, 2), torch.device("meta"))  # which stands for a GPU


def test_a_batch_gathered_over_many_steps_is_balanced_whole() -> None:
    """More images than a block has: the rows form, one position at a time, as with features of many micro-batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance_triton, "MOST_IMAGES_IN_BLOCK", 32)
        assert_defined(results([draw(2, 40, 9, 5, seed=seed) for seed in SEEDS], run, True, chunk=1))


@pytest.mark.gpu
def test_the_heads_true_size_on_a_gpu() -> None:
    draws = [draw(8, 512, 16384, 1024, torch.bfloat16, seed) for seed in SEEDS]
    first, second = (run(*draws[0], True, 4) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_no_less_exact(results(draws, run, True, chunk=4))


@pytest.mark.gpu
def test_gradients_of_the_public_op_on_a_gpu() -> None:
    from capi_kernels import clustering_head as public

    features, weight, bias = draw(3, 9, 64, 8)
    weight.requires_grad_()
    head = public(features, weight, bias)
    (3 * head.loss).backward()
    expected = run(features, weight.detach(), bias, True)
    assert all(torch.equal(x, expected[name]) for name, x in head.potentials._asdict().items())
    torch.testing.assert_close(weight.grad, 3 * expected["dweight"])
