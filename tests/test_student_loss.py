import math
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from numerics import assert_draws_as_accurate, peak_allocation
from torch import Tensor

from capi_kernels import reference, student_loss, student_loss_with_statistics
from capi_kernels.heads import cross_entropy_cpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (5, 1), (1, 7), (9, 37), (3, 64), (4, 1025)]  # predictions, prototypes


@pytest.fixture(autouse=True)
def use_the_op_for_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["capi_kernels.heads.student_loss"], "PLAIN_BYTES", 0)


def draw(predicted: int, prototypes: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and targets whose rows do not sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    logits, targets = torch.randn(2, predicted, prototypes, generator=generator, dtype=torch.float64).unbind(0)
    return logits.to(DEVICE, dtype), (1.3 * (2 * targets).softmax(-1)).to(DEVICE, dtype)


def draw_cases(shape: tuple[int, int], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [draw(*shape, dtype, seed) for seed in range(8)]


def run(loss_of, logits: Tensor, targets: Tensor, temperature: float = 0.12) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of three times it."""
    logits = logits.detach().requires_grad_()
    loss = loss_of(logits, targets, temperature)
    (3 * loss).backward()
    return loss.detach(), logits.grad


def on_kernels(logits: Tensor, targets: Tensor, temperature: float = 0.12) -> tuple[Tensor, Tensor]:
    """The same from the kernels' launchers."""
    from capi_kernels.heads import gradients_triton, student_loss_triton

    scale = -1 / (temperature * len(logits))
    loss, gradient, entropy, most_likely = student_loss_triton.student_loss(logits, targets, temperature, scale, False)
    assert len(entropy) == len(most_likely) == 0
    gradients_triton.scale_(gradient, torch.tensor(3.0, device=DEVICE))
    return loss, gradient


def assert_defined(run_ours, cases: list[tuple[Tensor, Tensor]], temperature: float = 0.12) -> None:
    """Half precision is defined in float32 and then rounded, as it is computed.

    The losses of all cases are judged together: the definition's own error in a single number can be zero by chance.
    """
    draws = []
    for logits, targets in cases:
        wide = torch.promote_types(logits.dtype, torch.float32)
        actual = run_ours(logits, targets, temperature)
        loss, gradient = run(reference.student_loss, logits.to(wide), targets.to(wide), temperature)
        oracle = run(reference.student_loss, logits.double(), targets.double(), temperature)
        draws.append((actual, (loss, gradient.to(logits.dtype)), oracle))
    assert_draws_as_accurate(draws)


def test_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]], dtype=torch.float64)
    targets = torch.tensor([[0.5, 1.5], [1.0, 0.0]], dtype=torch.float64)
    for loss_of in (student_loss, reference.student_loss):
        loss, gradient = run(loss_of, 2 * logits, targets, 2.0)
        # First row: -(0.5 ln 1/4 + 1.5 ln 3/4), second: ln 2; d/dz = softmax sum(t) - t, over 2 rows and temperature 2.
        assert loss.item() == pytest.approx((-0.5 * math.log(0.25) - 1.5 * math.log(0.75) + math.log(2)) / 2)
        expected = torch.tensor([[0.5 - 0.5, 1.5 - 1.5], [0.5 - 1.0, 0.5]], dtype=torch.float64) * 3 / 4
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_loss_and_gradient_match_the_definition(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy_cpu, "BLOCK_BYTES", 4 * 4 * shape[1])  # four rows
    assert_defined(partial(run, student_loss), draw_cases(shape, dtype))
    assert_defined(partial(run, student_loss), draw_cases(shape, dtype), 0.7)


def test_float64() -> None:
    if DEVICE == "cuda":
        pytest.skip("the kernels compute in float32")
    logits, targets = draw(9, 37)
    for actual, oracle in zip(
        run(student_loss, logits, targets), run(reference.student_loss, logits, targets), strict=True
    ):
        torch.testing.assert_close(actual, oracle, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu), torch.float32], ids=str
)
def test_kernel_matches_the_definition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    cases = draw_cases(shape, dtype)
    assert_defined(on_kernels, cases)
    first, second = (on_kernels(*cases[0]) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.usefixtures("guarded_memory")
def test_kernel_reads_strided_tensors_of_other_types() -> None:
    pytest.importorskip("triton")
    given = []
    for seed in range(8):
        logits, targets = draw(6, 38, torch.float32, seed)
        given.append((logits[::2, ::2], targets.half()[::2, 1::2]))
    assert_defined(on_kernels, given)
    assert_defined(on_kernels, [(logits.T.contiguous().T, targets.T.contiguous().T) for logits, targets in given])


def statistics_cases() -> Iterator[tuple[Tensor, Tensor]]:
    """Equal targets, none at all, and ones too small for a normal number; a strided view; other types."""
    logits, targets = draw(9, 70, torch.float32)
    targets[1, [3, 40]] = 0.5
    targets[2] = 1 / 70
    targets[3] = 0
    targets[4] = 1e-41
    targets[4, 7] = 1
    targets[5, :60] = targets[5, 10:] = 1e-30
    yield logits, targets
    yield logits[::2, ::2], targets[::2, ::2]
    yield logits.half(), targets
    yield logits, targets.half()


def entropy_of(targets: Tensor) -> Tensor:
    """Mean entropy of the rows, in nats."""
    return -torch.xlogy(targets, targets).sum(-1).mean()


def assert_statistics(entropy: Tensor, most_likely: Tensor, targets: Tensor) -> None:
    targets = targets.float().cpu()
    oracle = entropy_of(targets.double())
    assert abs(entropy.cpu() - oracle) <= 2 * abs(entropy_of(targets) - oracle) + 4 * torch.finfo(torch.float32).eps
    assert most_likely.dtype == torch.int64
    assert most_likely.tolist() == [row.index(max(row)) for row in targets.tolist()]  # the first of equal ones


@pytest.mark.parametrize("plain", [False, True])
def test_statistics_of_the_targets(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.undo()
    monkeypatch.setattr(cross_entropy_cpu, "BLOCK_BYTES", 4 * 4 * 70)  # four rows
    for logits, targets in statistics_cases():
        expected = run(student_loss, logits, targets)
        leaf = logits.detach().requires_grad_()
        loss, entropy, most_likely = student_loss_with_statistics(leaf, targets.requires_grad_())
        (3 * loss).backward()
        assert torch.equal(loss, expected[0])
        assert torch.equal(leaf.grad, expected[1])
        assert not entropy.requires_grad
        assert entropy.dtype == loss.dtype
        assert_statistics(entropy, most_likely, targets.detach())


@pytest.mark.usefixtures("guarded_memory")
def test_kernel_statistics_of_the_targets() -> None:
    pytest.importorskip("triton")
    from capi_kernels.heads.student_loss_triton import student_loss

    for logits, targets in statistics_cases():
        loss, gradient, entropy, most_likely = student_loss(logits, targets, 0.12, -1.0, True)
        assert_statistics(entropy, most_likely, targets)
        assert all(
            torch.equal(x, y)
            for x, y in zip((loss, gradient), student_loss(logits, targets, 0.12, -1.0, False), strict=False)
        )


@pytest.mark.parametrize("kernel", [False, True], ids=["cpu", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_extremes(kernel: bool, dtype: torch.dtype) -> None:
    """Logits of +-1e4, equal ones, and targets of a single prototype or of none."""
    if kernel:
        pytest.importorskip("triton")
    run_ours = on_kernels if kernel else partial(run, student_loss)
    cases = draw_cases((4, 9), dtype)
    for logits, targets in cases:
        logits[0] = 1e4 * logits[0].sign()
        logits[1] = -1e4
        targets[2] = torch.eye(9)[4].to(targets)
        targets[3] = 0
        loss, gradient = run_ours(logits, targets)
        assert loss.isfinite()
        assert (gradient[3] == 0).all()
    assert_defined(run_ours, cases)


def test_strided_and_autocast() -> None:
    logits, targets = draw(6, 18, torch.float32)
    view, given = logits[::2, ::2], targets.T[::2].T[::2]
    expected = run(student_loss, view.contiguous(), given.contiguous())
    for x, y in zip(run(student_loss, view, given), expected, strict=True):
        assert torch.equal(x, y)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for x, y in zip(run(student_loss, view, given), expected, strict=True):
            assert torch.equal(x, y)


def test_the_gradient_of_half_logits_is_rounded_once() -> None:
    """A loss scaled by 1.01, which bfloat16 does not have, over 7 predictions."""
    logits, targets = draw(7, 37, torch.bfloat16)
    logits.requires_grad_()
    (1.01 * student_loss(logits, targets)).backward()
    wide = logits.detach().float().requires_grad_()
    (1.01 * reference.student_loss(wide, targets.float())).backward()
    # The gradient before and after its factor is rounded to 8 bits.
    torch.testing.assert_close(logits.grad.float(), wide.grad, rtol=2**-8, atol=2**-9 * wide.grad.abs().max().item())
    ratio = (logits.grad.double() * wide.grad).sum() / wide.grad.double().square().sum()
    assert abs(ratio - 1) < 1e-3


def test_gradient_reaches_the_logits_alone_and_once() -> None:
    logits, targets = draw(5, 7, torch.float32)
    targets.requires_grad_()
    logits.requires_grad_()
    loss = student_loss(logits, targets)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()
    assert torch.autograd.grad(student_loss(logits, targets), targets, allow_unused=True) == (None,)
    with torch.no_grad():
        assert not student_loss(logits, targets).requires_grad
    twice = student_loss(logits, targets)
    first, second = (torch.autograd.grad(twice, logits, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_small_logits_take_the_definition(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda":
        pytest.skip("of a CPU")
    monkeypatch.undo()
    cases = draw_cases((4, 37), dtype)
    assert_defined(partial(run, student_loss), cases)
    logits, targets = cases[0]
    expected = run(reference.student_loss, logits, targets.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(x, y) for x, y in zip(run(student_loss, logits, targets), expected, strict=True))
    assert torch.autograd.grad(
        student_loss(logits.requires_grad_(), targets.requires_grad_()), targets, allow_unused=True
    ) == (None,)
    large = torch.zeros(1, (1 << 18) + 1, requires_grad=True)
    for x, name in ((large, "_StudentLossBackward"), (large[:, 1:], "NegBackward0")):
        assert type(student_loss(x, torch.ones_like(x)).grad_fn).__name__ == name


def scaled_gradient(factor: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """That which the forward saved, and what the backward made of it."""
    logits, targets = draw(5, 7, dtype)
    loss = student_loss(logits.requires_grad_(), targets)
    (saved,) = loss.grad_fn.saved_tensors
    before, pointer = saved.clone(), saved.data_ptr()
    del saved
    (gradient,) = torch.autograd.grad(factor * loss, logits)
    assert gradient.data_ptr() == pointer  # nothing is allocated
    return before, gradient


def test_backward_multiplies_in_place_and_only_where_there_is_something_to_do() -> None:
    before, gradient = scaled_gradient(1.0)
    assert torch.equal(gradient, before)
    before, gradient = scaled_gradient(3.0)
    assert torch.equal(gradient, 3 * before)
    before, gradient = scaled_gradient(1.0, torch.float16)  # saved without the factor 1 / (temperature predictions)
    assert torch.equal(gradient, (before.float() / (0.12 * 5)).half())
    assert before.abs().max() > 0.1


def test_backward_allocates_nothing_for_what_has_no_gradient() -> None:
    logits, targets = draw(64, 1000, torch.float32)
    loss = student_loss(logits.requires_grad_(), targets)
    assert peak_allocation(lambda: torch.autograd.grad(loss, logits)) < 1000


def test_a_retained_graph_gives_its_gradient_again() -> None:
    logits, targets = draw(5, 7, torch.float32)
    loss = 3 * student_loss(logits.requires_grad_(), targets)
    first, second, last = (torch.autograd.grad(loss, logits, retain_graph=keep)[0] for keep in (True, True, False))
    assert torch.equal(first, second)
    assert torch.equal(first, last)
    assert first.data_ptr() != last.data_ptr()


@pytest.mark.usefixtures("guarded_memory")
def test_kernel_multiplies_by_a_number_on_the_device() -> None:
    pytest.importorskip("triton")
    from capi_kernels.heads.gradients_triton import scale_

    for dtype in (torch.float16, torch.float32):
        for size in (0, 1, 8192, 8193):
            x = draw(1, max(1, size), dtype)[0][0, :size]
            scaled = torch.empty(size, dtype=dtype, device=DEVICE).copy_(x)
            for factor in (1.0, 0.3):
                scale_(scaled, torch.tensor(factor, device=DEVICE))
                assert torch.equal(scaled, (x.float() * torch.tensor(factor, device=DEVICE)).to(dtype))


def test_memory_is_the_gradient_and_a_few_rows() -> None:
    if DEVICE == "cuda":
        pytest.skip("counts CPU tensors")
    logits = torch.randn(512, 4096, requires_grad=True)
    targets = torch.rand(512, 4096)
    gradient = logits.numel() * 4
    assert peak_allocation(lambda: student_loss(logits, targets)) <= gradient + 6 * cross_entropy_cpu.BLOCK_BYTES


def test_bad_arguments() -> None:
    logits, targets = draw(5, 7)
    cases = [
        (TypeError, "logits must be floating point, got torch.int64", logits.long(), targets, 0.1),
        (ValueError, r"logits must have the axes \[predicted, prototypes\], got shape \(7,\)", logits[0], targets, 0.1),
        (ValueError, "logits must have at least one element on the axis predicted, got 0", logits[:0], targets, 0.1),
        (TypeError, "targets must be floating point, got torch.bool", logits, targets.bool(), 0.1),
        (ValueError, r"targets must have the shape \[predicted=5, prototypes=7\], got", logits, targets[:, 1:], 0.1),
        (ValueError, "targets must be on the device of logits", logits, targets.to("meta"), 0.1),
        (ValueError, "temperature must be positive and finite, got 0.0", logits, targets, 0.0),
    ]
    for error, message, *arguments in cases:
        with pytest.raises(error, match=message):
            student_loss(*arguments)


@pytest.mark.gpu
def test_true_size_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((4096, 16384), generator=generator).to(DEVICE, torch.bfloat16)
    targets = (torch.randn((4096, 16384), generator=generator) * 8).softmax(-1).to(DEVICE)
    first, second = (run(student_loss, logits, targets) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert_defined(partial(run, student_loss), [(logits, targets)])


@pytest.mark.usefixtures("without_annotations")
def test_a_temperature_beyond_64_bits() -> None:
    with pytest.raises(ValueError, match=r"temperature must be a float or an integer of 64 bits, got 1180591620"):
        student_loss(*draw(5, 7), temperature=2**70)
