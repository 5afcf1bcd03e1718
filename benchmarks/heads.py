"""Cases of the heads: Sinkhorn, the clustering head with its targets, the student's loss, and their official peers."""

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.measure import OURS, check, rotated
from benchmarks.shapes import Logits
from benchmarks.timing import Contestant
from capi_kernels import clustering_head, clustering_targets, reference, sinkhorn_positionwise, student_loss

TARGET_TEMPERATURE = 0.06
MOST_LOGITS = 1 << 24  # Of the definition at once.


def _draw(*size: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=dtype)


def enter_sinkhorn(name: str, shape: Logits, device: torch.device, dtype: torch.dtype) -> Contestant:
    """Assignments of standard normal logits, which unit features on standard normal prototypes have."""
    positions, *_, n_iterations, _ = shape
    inputs = rotated(lambda seed: (_draw(*shape[:3], seed=seed, device=device, dtype=dtype),), device)
    if name == OURS:

        def run(logits: Tensor) -> Tensor:
            return sinkhorn_positionwise(logits, n_iterations, temperature=TARGET_TEMPERATURE, process_group=None)
    else:
        formula = peers.official(peers.official_sinkhorn, name)

        def run(logits: Tensor) -> Tensor:
            return formula(logits, TARGET_TEMPERATURE, n_iterations)

    out = run(*inputs[0])
    for position in {0, positions - 1}:
        logits = inputs[0][0][position]
        options = {"n_iterations": n_iterations, "temperature": TARGET_TEMPERATURE, "process_group": None}
        same_dtype, oracle = (reference.sinkhorn_positionwise(x, **options) for x in (logits, logits.double()))
        check(name, out[position], same_dtype, oracle)
    return Contestant(run, lambda round_number: inputs[round_number % len(inputs)], copies=len(inputs))


def _head_reference(
    features: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, n_iterations: int
) -> list[Tensor]:
    """Loss and gradients of the definition, a few positions at a time: all together might not fit.

    Not one at a time: a product of few rows may take another order of sums, with a smaller error than that of the
    products which the head needs (MKL in AVX-512 does so).
    """
    wide = torch.promote_types(dtype, weight.dtype)
    parameters = [x.to(wide).requires_grad_() for x in (weight, bias)]
    total = [torch.zeros(shape, dtype=wide, device=features.device) for shape in ((), weight.shape, bias.shape)]
    for part in features.to(dtype).split(max(1, MOST_LOGITS // (features.shape[1] * len(weight)))):
        loss = reference.clustering_head(part, *parameters, n_iterations=n_iterations, process_group=None).loss
        for sum_, x in zip(total, [loss.detach(), *torch.autograd.grad(loss, parameters)], strict=True):
            sum_ += x * (len(part) / len(features))
    return total


class HeadCase:
    """Features [positions, images, dim], the layer on them, and the rows whose targets the student needs."""

    def __init__(self, shape: Logits, device: torch.device, dtype: torch.dtype):
        self.shape, self.device, self.dtype = shape, device, dtype
        self._references: tuple[list[Tensor], list[Tensor]] | None = None

    def draw(self, seed: int) -> tuple[Tensor, ...]:
        positions, images, prototypes, _, dim = self.shape
        features = _draw(positions, images, dim, seed=seed, device=self.device, dtype=self.dtype)
        weight = _draw(prototypes, dim, seed=seed + 100, device=self.device)
        bias = 0.1 * _draw(prototypes, seed=seed + 200, device=self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        rows = torch.randint(positions * images, (images * 8,), generator=generator, device=self.device)
        return features, weight, bias, rows

    def enter(self, name: str) -> Contestant:
        """The loss, the gradients of the layer, and the targets of the rows, which ours makes of the potentials."""
        n_iterations = self.shape.n_iterations
        formula = peers.official(peers.official_head, name)

        def run(features: Tensor, weight: Tensor, bias: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
            if name == OURS:
                loss, given = clustering_head(features, weight, bias, n_iterations=n_iterations, process_group=None)
                own = features[rows % len(features), rows // len(features)]
                targets = clustering_targets(own, weight, bias, given, rows)
            else:
                loss, targets = formula(features, weight, bias, rows, n_iterations)
            return targets, loss.detach(), *torch.autograd.grad(loss, (weight, bias))

        def arguments(round_number: int) -> tuple[Tensor, ...]:
            features, weight, bias, rows = inputs[round_number % len(inputs)]
            return features, weight.requires_grad_(), bias.requires_grad_(), rows

        inputs = rotated(self.draw, self.device)
        _, loss, dweight, dbias = run(*arguments(0))
        if self._references is None:
            features, weight, bias, _ = (x.detach() for x in inputs[0])
            same_dtype, oracle = (
                _head_reference(features, weight, bias, dtype, n_iterations) for dtype in (self.dtype, torch.float64)
            )
            self._references = same_dtype, oracle
        same_dtype, oracle = self._references
        if name == OURS or self.dtype == torch.float32:
            for got, same, exact in zip((loss, dweight, dbias), same_dtype, oracle, strict=True):
                check(name, got, same, exact)
        else:
            # The official assignments have an error of about 5 % in bfloat16, the gradients with them.
            assert abs(loss.double() - oracle[0]) <= 0.05 * oracle[0], f"expected a loss of {oracle[0]}, got {loss}"
        return Contestant(run, arguments, copies=len(inputs))


def enter_student_loss(name: str, shape: Logits, device: torch.device, dtype: torch.dtype) -> Contestant:
    """The loss of `positions` predictions an image against given targets, and its gradient, in one call."""
    predicted, prototypes = shape.positions * shape.images, shape.prototypes

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        logits = (0.12 * _draw(predicted, prototypes, seed=seed, device=device)).to(dtype)
        teacher = _draw(shape.positions, shape.images, prototypes, seed=seed + 100, device=device)
        targets = sinkhorn_positionwise(teacher, temperature=TARGET_TEMPERATURE, process_group=None)
        return logits.requires_grad_(), targets.flatten(0, 1).to(dtype)

    formula = student_loss if name == OURS else peers.official(peers.official_student_loss, name)

    def run(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss = formula(logits, targets)
        return loss.detach(), *torch.autograd.grad(loss, logits)

    inputs = rotated(draw, device)
    logits, targets = inputs[0]
    results = []
    for x in (logits, logits.detach().double().requires_grad_()):
        loss = reference.student_loss(x, targets.to(torch.promote_types(x.dtype, torch.float32)))
        results.append([loss.detach(), *torch.autograd.grad(loss, x)])
    for got, same_dtype, oracle in zip(run(logits, targets), *results, strict=True):
        check(name, got.to(same_dtype.dtype), same_dtype, oracle)
    return Contestant(run, lambda round_number: inputs[round_number % len(inputs)], copies=len(inputs))
