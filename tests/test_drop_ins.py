"""The adapters of docs/drop_ins.md against what they stand in for, restated, in float64."""

import pytest
import torch
from numerics import assert_draws_as_accurate, peak_allocation
from pages import DOCS, run_page
from torch import Tensor

from benchmarks import drop_ins
from benchmarks.drop_ins import birder_sinkhorn_, dino_sinkhorn, lightly_loss, lightly_sinkhorn, swav_sinkhorn

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def adapters() -> dict:
    return run_page(DOCS / "drop_ins.md")


def draws(*shape: int) -> list[Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("iterations", [1, 3])
def test_lightly_sinkhorn_knopp(adapters, dtype, iterations) -> None:
    """Its formula computes in the dtype of the logits, half precision included."""

    def versions(logits: Tensor):
        logits = (logits / 0.06).to(dtype)
        ours = adapters["lightly_sinkhorn_knopp"](logits, iterations)
        return [ours], [lightly_sinkhorn(logits, iterations)], [lightly_sinkhorn(logits.double(), iterations)]

    shapes = draws(5, 7, 33)
    if dtype == torch.float64:  # The official constant in the exponent: eps weighs otherwise.
        for logits in shapes:
            (ours,), _, (oracle,) = versions(logits)
            assert torch.allclose(ours, oracle, rtol=1e-7, atol=1e-10)
    else:
        assert_draws_as_accurate(versions(logits) for logits in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lightly_capi_loss(adapters, dtype) -> None:
    """Loss and gradient; the targets come in the order of an index that is not sorted."""

    def versions(seed: int):
        generator = torch.Generator().manual_seed(seed)
        teacher = torch.randn(5, 9, 33, generator=generator).to(dtype)
        student = torch.randn(5, 3, 33, generator=generator).to(dtype)
        index = torch.rand(5, 9, generator=generator).argsort(1)[:, :3]

        def loss_and_gradient(loss, dtype: torch.dtype) -> list[Tensor]:
            logits = student.to(dtype).requires_grad_()
            value = loss(teacher.to(dtype), logits, index, 0.1, 0.2)
            return [value.detach(), *torch.autograd.grad(value, logits)]

        ours = loss_and_gradient(adapters["lightly_capi_loss"], dtype)
        same_dtype = loss_and_gradient(lightly_loss, dtype)
        # Ours is never coarser than float32.
        same_dtype[0] = same_dtype[0].to(ours[0].dtype)
        return ours, same_dtype, loss_and_gradient(lightly_loss, torch.float64)

    assert_draws_as_accurate(versions(seed) for seed in range(4))


def test_lightly_capi_loss_makes_no_matrix_of_assignments(adapters) -> None:
    teacher, student = torch.randn(16, 144, 2048), torch.randn(16, 2, 2048)
    index = torch.arange(32).view(16, 2)
    assert peak_allocation(lambda: adapters["lightly_capi_loss"](teacher, student, index)) < teacher.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 8, 33), (8, 33)], ids=["positions", "together"])
def test_birder_sinkhorn_knopp(adapters, dtype, shape) -> None:
    """It leaves its argument as it is."""

    def versions(logits: Tensor):
        logits = logits.to(dtype)
        before = logits.clone()
        ours = adapters["birder_sinkhorn_knopp_"](logits, 0.06, 3)
        assert torch.equal(logits, before)
        same_dtype, oracle = (birder_sinkhorn_(x, 0.06, 3) for x in (logits.clone(), logits.double()))
        return [ours], [same_dtype], [oracle]

    assert_draws_as_accurate(versions(logits) for logits in draws(*shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dino_sinkhorn_knopp_teacher(adapters, dtype) -> None:
    """Theirs turns what comes to float32; a number of masked patches changes nothing."""

    def versions(logits: Tensor):
        logits = logits.to(dtype)
        ours = adapters["dino_sinkhorn_knopp_teacher"](logits, 0.07, torch.tensor([3]))
        return [ours], [dino_sinkhorn(logits.float(), 0.07)], [dino_sinkhorn(logits.double(), 0.07)]

    assert_draws_as_accurate(versions(logits) for logits in draws(6, 515))


def test_dino_at_131072_prototypes(adapters) -> None:
    (logits,) = draws(3, 131072)[:1]
    ours = adapters["dino_sinkhorn_knopp_teacher"](logits, 0.07)
    assert_draws_as_accurate([([ours], [dino_sinkhorn(logits, 0.07)], [dino_sinkhorn(logits.double(), 0.07)])])


def test_dino_overflows_where_the_adapter_does_not(adapters) -> None:
    (logits,) = draws(6, 20)[:1]
    logits = logits + 8  # More than 88 temperatures of 0.07.
    assert dino_sinkhorn(logits, 0.07).isnan().any()
    ours = adapters["dino_sinkhorn_knopp_teacher"](logits, 0.07)
    assert torch.allclose(ours.double(), dino_sinkhorn(logits.double(), 0.07), atol=1e-5)


@pytest.mark.parametrize("iterations", [1, 3])
def test_swav_distributed_sinkhorn(adapters, iterations) -> None:
    def versions(x: Tensor):
        scores = x.clamp(-1, 1)  # Cosines.
        ours = adapters["swav_assignments"](scores, 0.05, iterations)
        same_dtype, oracle = (swav_sinkhorn(s, 0.05, iterations) for s in (scores, scores.double()))
        return [ours], [same_dtype], [oracle]

    assert_draws_as_accurate(versions(x) for x in draws(40, 30))


def test_each_adapter_is_timed_with_arguments_that_it_takes(adapters) -> None:
    timed = {drop_in.adapter for drop_in in drop_ins.DROP_INS}
    assert timed == {name for name, value in adapters.items() if getattr(value, "__module__", "") == "drop_ins"}
    small = drop_ins.DropIn(swav_sinkhorn, "swav_assignments", "8 samples x 5", lambda: (torch.rand(8, 5),))
    assert all(taken > 0 for taken in drop_ins.compare(small, adapters["swav_assignments"], rounds=2))


def test_the_page_shows_what_was_measured() -> None:
    results = (DOCS.parent / "benchmarks" / "results" / "cpu_drop_ins.md").read_text().splitlines()
    page = (DOCS / "drop_ins.md").read_text()
    assert all(line in page for line in results if line.startswith("|"))
