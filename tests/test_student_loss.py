import math
import sys
from functools import partial

import pytest
import torch
from numerics import assert_draws_as_accurate, peak_allocation
from torch import Tensor

from capi_kernels import Potentials, TargetRows, reference, sinkhorn_potentials, student_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (5, 1), (1, 7), (9, 37), (3, 64), (4, 1025)]  # predictions, prototypes
KINDS = ["given", "of_potentials", "own_logits"]
MODULE = sys.modules["capi_kernels.student_loss"]  # the package's attribute of this name is the function


def draw(predicted: int, prototypes: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and targets whose rows do not sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    logits, targets = torch.randn(2, predicted, prototypes, generator=generator, dtype=torch.float64).unbind(0)
    return logits.to(DEVICE, dtype), (1.3 * (2 * targets).softmax(-1)).to(DEVICE, dtype)


def draw_rows(predicted: int, prototypes: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> TargetRows:
    """Unsorted rows with repeats of [positions, images, prototypes], which lies images first in memory."""
    generator = torch.Generator().manual_seed(100 + seed)
    logits = torch.randn(4, 3, prototypes, generator=generator, dtype=torch.float64).to(dtype).transpose(0, 1)
    rows = torch.randint(12, (predicted,), generator=generator)
    potentials = sinkhorn_potentials(logits, temperature=0.2)
    return TargetRows(logits.to(DEVICE), Potentials(*(x.to(DEVICE) for x in potentials)), rows.to(DEVICE), 0.2)


def with_their_own_logits(targets: TargetRows) -> TargetRows:
    """The same rows, whose logits alone are given, prototypes first in memory."""
    own = targets.logits[targets.rows % 3, targets.rows // 3]
    return targets._replace(logits=own.T.contiguous().T)


def draw_cases(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> list[tuple[Tensor, Tensor | TargetRows]]:
    cases = [draw(*shape, dtype, seed) for seed in range(8)]
    if kind == "given":
        return cases
    rows = [draw_rows(*shape, dtype, seed) for seed in range(8)]
    rows = [with_their_own_logits(x) for x in rows] if kind == "own_logits" else rows
    return [(logits, targets) for (logits, _), targets in zip(cases, rows, strict=True)]


def widened(targets: Tensor | TargetRows, dtype: torch.dtype) -> Tensor | TargetRows:
    if isinstance(targets, Tensor):
        return targets.to(dtype)
    potentials = Potentials(*(x.to(dtype) for x in targets.potentials))
    return targets._replace(logits=targets.logits.to(dtype), potentials=potentials)


def run(loss_of, logits: Tensor, targets: Tensor | TargetRows, temperature: float = 0.12) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of three times it."""
    logits = logits.detach().requires_grad_()
    loss = loss_of(logits, targets, temperature)
    (3 * loss).backward()
    return loss.detach(), logits.grad


def on_kernels(logits: Tensor, targets: Tensor | TargetRows, temperature: float = 0.12) -> tuple[Tensor, Tensor]:
    """The same from the kernel's launcher."""
    from capi_kernels import student_loss_triton

    potentials = rows = None
    target_temperature = 1.0
    if isinstance(targets, TargetRows):
        targets, potentials, rows, target_temperature = targets
    loss, dz = student_loss_triton.student_loss(logits, targets, potentials, rows, target_temperature, temperature)
    return loss, (dz.double() * (3 / (temperature * len(dz)))).to(dz.dtype)


def assert_defined(run_ours, cases: list[tuple[Tensor, Tensor | TargetRows]], temperature: float = 0.12) -> None:
    """Half precision is defined in float32 and then rounded, as it is computed.

    The losses of all cases are judged together: the definition's own error in a single number can be zero by chance.
    """
    draws = []
    for logits, targets in cases:
        wide = torch.promote_types(logits.dtype, torch.float32)
        actual = run_ours(logits, targets, temperature)
        loss, gradient = run(reference.student_loss, logits.to(wide), widened(targets, wide), temperature)
        oracle = run(reference.student_loss, logits.double(), widened(targets, torch.float64), temperature)
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
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_match_the_definition(
    shape: tuple[int, int], dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "BLOCK_BYTES", 4 * 4 * shape[1])  # four rows
    assert_defined(partial(run, student_loss), draw_cases(shape, dtype, kind))
    assert_defined(partial(run, student_loss), draw_cases(shape, dtype, kind), 0.7)


@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind: str) -> None:
    if DEVICE == "cuda":
        pytest.skip("the kernels compute in float32")
    logits, targets = draw_cases((9, 37), torch.float64, kind)[0]
    for actual, oracle in zip(
        run(student_loss, logits, targets), run(reference.student_loss, logits, targets), strict=True
    ):
        torch.testing.assert_close(actual, oracle, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("guarded_memory")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu), torch.float32], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_matches_the_definition(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> None:
    pytest.importorskip("triton")
    cases = draw_cases(shape, dtype, kind)
    assert_defined(on_kernels, cases)
    first, second = (on_kernels(*cases[0]) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.usefixtures("guarded_memory")
def test_kernel_reads_strided_tensors_of_other_types() -> None:
    pytest.importorskip("triton")
    given, made = [], []
    for seed in range(8):
        logits, targets = draw(6, 38, torch.float32, seed)
        given.append((logits[::2, ::2], targets.half()[::2, 1::2]))
        made.append((logits.T[::2, ::2].T[:3], draw_rows(3, 19, torch.float32, seed)))
    assert_defined(on_kernels, given)
    assert_defined(on_kernels, made)
    logits, targets = made[0]
    int32 = targets._replace(rows=targets.rows.int())
    for x, y in zip(on_kernels(logits, int32), on_kernels(logits, targets), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("kernel", [False, True], ids=["cpu", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_extremes(kernel: bool, dtype: torch.dtype) -> None:
    """Logits of +-1e4, equal ones, and targets of a single prototype or of none."""
    if kernel:
        pytest.importorskip("triton")
    run_ours = on_kernels if kernel else partial(run, student_loss)
    cases = draw_cases((4, 9), dtype, "given")
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


def test_targets_made_of_potentials_equal_stored_ones() -> None:
    logits, _ = draw(9, 37, torch.float32)
    rows = draw_rows(9, 37, torch.float32)
    stored = reference.assignments_from_potentials(rows.logits, rows.potentials, rows.rows, temperature=0.2)
    for x, y in zip(run(student_loss, logits, rows), run(student_loss, logits, stored), strict=True):
        torch.testing.assert_close(x, y)
    own = with_their_own_logits(rows)
    for x, y in zip(run(student_loss, logits, rows), run(student_loss, logits, own), strict=True):
        assert torch.equal(x, y)
    wrong = rows._replace(rows=(rows.rows + 1) % 12)
    assert (run(student_loss, logits, wrong)[0] - run(student_loss, logits, rows)[0]).abs() > 1e-2


def test_memory_is_the_gradient_and_a_few_rows() -> None:
    if DEVICE == "cuda":
        pytest.skip("counts CPU tensors")
    logits = torch.randn(512, 4096, requires_grad=True)
    targets = torch.rand(512, 4096)
    gradient = logits.numel() * 4
    assert peak_allocation(lambda: student_loss(logits, targets)) <= gradient + 6 * MODULE.BLOCK_BYTES


def test_bad_arguments() -> None:
    logits, targets = draw(5, 7)
    rows = draw_rows(5, 7)
    cases = [
        (TypeError, "logits must be floating point, got torch.int64", logits.long(), targets, 0.1),
        (ValueError, r"logits must have the axes \[predicted, prototypes\], got shape \(7,\)", logits[0], targets, 0.1),
        (ValueError, "logits must have at least one element on the axis predicted, got 0", logits[:0], targets, 0.1),
        (TypeError, "targets must be floating point, got torch.bool", logits, targets.bool(), 0.1),
        (ValueError, r"targets must have the shape \[predicted=5, prototypes=7\], got", logits, targets[:, 1:], 0.1),
        (ValueError, "targets must be on the device of logits", logits, targets.to("meta"), 0.1),
        (ValueError, "temperature must be positive and finite, got 0.0", logits, targets, 0.0),
        (ValueError, "targets.logits must have the shape", logits, rows._replace(logits=rows.logits[..., 1:]), 0.1),
        (ValueError, r"targets.logits must have the shape \[sel", logits, rows._replace(logits=rows.logits[0]), 0.1),
        (ValueError, "targets.logits must have the axes", logits, rows._replace(logits=rows.logits[None]), 0.1),
        (TypeError, "targets.logits must be floating", logits, rows._replace(logits=rows.logits.long()), 0.1),
        (TypeError, "targets.rows must be torch.int32 or", logits, rows._replace(rows=rows.rows.bool()), 0.1),
        (
            ValueError,
            r"targets.rows must have the shape \[predicted=5\]",
            logits,
            rows._replace(rows=rows.rows[1:]),
            0.1,
        ),
        (ValueError, "targets.temperature must be positive and", logits, rows._replace(temperature=math.nan), 0.1),
    ]
    column = rows.potentials._replace(column=rows.potentials.row)
    cases.append((ValueError, "column must have the shape", logits, rows._replace(potentials=column), 0.1))
    if DEVICE == "cpu":
        far = rows._replace(rows=rows.rows + 12)
        cases.append((ValueError, r"targets.rows must be in \[0, 12\), got values from", logits, far, 0.1))
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
