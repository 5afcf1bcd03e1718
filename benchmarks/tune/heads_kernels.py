"""The heads' kernels for the sweep: arguments at one shape, what a run moves, its check against float64.

Each function gives the Case of a kernel, with the configurations to try.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from capi_kernels.heads.clustering_head_triton import head_rows_config, head_rows_kernel
from capi_kernels.heads.gradients_triton import CONFIG as SCALE_CONFIG
from capi_kernels.heads.gradients_triton import scale_kernel
from capi_kernels.heads.student_loss_triton import student_rows_config, student_rows_kernel
from capi_kernels.sinkhorn.assignments_triton import assignments_kernel
from capi_kernels.sinkhorn.columns_triton import MOST_FOLDED_PARTS, column_step_kernel, columns_config
from capi_kernels.sinkhorn.common_triton import ROW_LIMIT, log2_scale, rows_config
from capi_kernels.sinkhorn.rows_triton import (
    first_column_sums_kernel,
    first_sums_config,
    row_step_config,
    row_step_kernel,
)

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
TEMPERATURE, PREDICTION = 0.06, 0.12
EPS = 1e-8
HOPPER = 90
SHIFT = 4.0  # In the place of the maxima: rows then have sums of about 1.

Make = Callable[..., object]


def draw(make: Make, shape: tuple[int, ...], std: float = 1.0, dtype: torch.dtype = DTYPE, seed: int = 0) -> object:
    return make(shape, dtype, lambda x: x.normal_(0, std, generator=torch.Generator(DEVICE).manual_seed(seed)))


def in_memory(shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    x = torch.empty(shape, dtype=dtype, device=DEVICE)
    return x if fill is None else fill(x)


def as_type(shape: tuple[int, ...], dtype: torch.dtype, fill: Callable | None = None) -> torch.dtype:
    """What a kernel is compiled for without any memory."""
    return dtype


@dataclass
class Case:
    """A kernel at one shape: its arguments, what a run moves, how it is checked, and its configurations."""

    kernel: object
    grid: Callable[[dict], int]
    arguments: Callable[[Make, dict], list]
    moved: int
    check: Callable[[list, dict], None]
    common: dict
    variants: list[dict]

    def config(self, variant: dict) -> dict:
        return {key: value for key, value in (self.common | variant).items() if value is not None}

    def launch(self, arguments: list, config: dict) -> object:
        return self.kernel[self.grid(config),](*arguments, **config)

    def compile(self, variant: dict) -> None:
        config = self.config(variant)
        self.kernel.warmup(*self.arguments(as_type, config), grid=(self.grid(config),), **config)


def close(name: str, actual: Tensor, oracle: Tensor, tolerance: float) -> None:
    error = float((actual.double() - oracle).abs().max() / oracle.abs().max())
    assert error <= tolerance, f"{name} is off by {error:.2g} of the largest"


def potentials(make: Make, positions: int, images: int, prototypes: int) -> list:
    """Like those in the middle of an iteration: uneven columns and rows."""
    return [
        make((positions, prototypes), torch.float32, lambda x: x.fill_(SHIFT)),
        draw(make, (positions, prototypes), dtype=torch.float32, seed=1),
        draw(make, (positions, images), dtype=torch.float32, seed=2),
    ]


def updated(potential: Tensor, total: Tensor) -> Tensor:
    return potential / (potential * total + EPS)


def positive(arguments: list, indices: tuple[int, ...]) -> list:
    for i in indices:
        if isinstance(arguments[i], Tensor):
            arguments[i].abs_().add_(0.5)
    return arguments


def strides(*shape: int) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def exponential(logits: Tensor, maximum: Tensor | float = SHIFT) -> Tensor:
    return ((logits.double() - maximum) / TEMPERATURE).exp()


def columns(positions: int, images: int, prototypes: int, first: bool, row_sums: bool, variants: list[dict]) -> Case:
    base = columns_config(images, prototypes, 2, HOPPER, first, row_sums)

    def programs(config: dict) -> int:
        return triton.cdiv(prototypes, config["BLOCK_PROTOTYPES"] * config["TILES"])

    def arguments(make: Make, config: dict) -> list:
        n = programs(config)
        column_max, column, row = potentials(make, positions, images, prototypes)
        parts = [make((positions, n, images), torch.float32, lambda x: x.fill_(1.0)) for _ in range(2)]
        # Without parts to add up the rows are read and written in place.
        last_row = draw(make, (positions, images), dtype=torch.float32, seed=2) if config["PARTS"] else row
        given = [draw(make, (positions, images, prototypes)), column_max, column, row, last_row, *parts]
        numbers = [images, prototypes, *strides(positions, images, prototypes), log2_scale(TEMPERATURE), EPS, ROW_LIMIT]
        return [*positive(given, (2, 3, 4)), *numbers]

    def check(arguments: list, config: dict) -> None:
        before = [x.clone() if isinstance(x, Tensor) and x.ndim == 2 else x for x in arguments]
        case.launch(arguments, config)
        logits, _, column, row, *_ = arguments
        for p in (0, positions - 1):
            maximum = logits[p].double().amax(0) if first else SHIFT
            E = exponential(logits[p], maximum)
            a = torch.ones(images, device=DEVICE, dtype=torch.float64)
            if not first:
                a = before[3][p].double()
                if config["PARTS"]:
                    a = before[4][p].double() / (config["PARTS"] + EPS)
            c = torch.full((prototypes,), math.exp(50)).to(E) if first else before[2][p].double()
            c = updated(c, a @ E)
            close("column", column[p], c, 1e-5)
            if row_sums:
                close("row sums", arguments[6][p].sum(0), a * (E @ c), 1e-5)
            if config["PARTS"]:
                close("row", row[p], a, 1e-6)

    case = Case(
        column_step_kernel,
        lambda config: positions * programs(config),
        arguments,
        2 * positions * images * prototypes,
        check,
        base | {"FIRST": first, "ROW_SUMS": row_sums},
        variants,
    )
    for variant in variants:
        width = variant["BLOCK_PROTOTYPES"] * variant["TILES"]
        parts = triton.cdiv(prototypes, width)
        variant["EVEN"] = images == base["BLOCK_IMAGES"] and prototypes % width == 0
        variant["PARTS"] = parts if parts <= MOST_FOLDED_PARTS else 0
    return case


def columns_variants(*variants: tuple) -> list[dict]:
    names = "BLOCK_PROTOTYPES", "TILES", "STAGES", "num_warps", "maxnreg"
    return [dict(zip(names, variant, strict=True)) for variant in variants]


def first_sums(positions: int, images: int, prototypes: int, variants: list[dict]) -> Case:
    def arguments(make: Make, config: dict) -> list:
        out = [make((positions, prototypes), torch.float32) for _ in range(2)]
        logits = draw(make, (positions, images, prototypes))
        return [logits, *out, images, prototypes, *strides(positions, images, prototypes), log2_scale(TEMPERATURE)]

    def check(arguments: list, config: dict) -> None:
        case.launch(arguments, config)
        logits, column_max, column_sum, *_ = arguments
        for p, here in ((0, slice(0, 512)), (positions - 1, slice(prototypes - 512, None))):
            x = logits[p, :, here].double()
            assert torch.equal(column_max[p, here].double(), x.amax(0))
            close("sums", column_sum[p, here], exponential(x, x.amax(0)).sum(0), 1e-5)

    case = Case(
        first_column_sums_kernel,
        lambda config: positions * triton.cdiv(prototypes, config["BLOCK_PROTOTYPES"]),
        arguments,
        2 * positions * images * prototypes,
        check,
        first_sums_config(images, prototypes, 2),
        variants,
    )
    return case


def row_steps(positions: int, images: int, prototypes: int, variants: list[dict]) -> Case:
    def arguments(make: Make, config: dict) -> list:
        given = [draw(make, (positions, images, prototypes)), *potentials(make, positions, images, prototypes)]
        programs = triton.cdiv(images, config["ROWS"])
        given.append(make((positions, programs, prototypes), torch.float32))
        numbers = [images, prototypes, *strides(positions, images, prototypes), log2_scale(TEMPERATURE), EPS, ROW_LIMIT]
        return [*positive(given, (2, 3)), *numbers]

    def check(arguments: list, config: dict) -> None:
        before = arguments[3].clone()
        case.launch(arguments, config)
        logits, _, column, row, parts, *_ = arguments
        here = slice((images - 1) // config["ROWS"] * config["ROWS"], None)  # the last program's
        M = exponential(logits[-1, here]) * column[-1].double()
        a = updated(before[-1, here].double(), M.sum(1))
        close("row", row[-1, here], a, 1e-5)
        close("column sums", parts[-1, -1], a @ M, 1e-5)

    case = Case(
        row_step_kernel,
        lambda config: positions * triton.cdiv(images, config["ROWS"]),
        arguments,
        2 * positions * images * prototypes,
        check,
        row_step_config(positions * images, prototypes, 2) | {"COLUMN_SUMS": True},
        variants,
    )
    return case


def check_assignments(logits: Tensor, column: Tensor, row: Tensor, out: Tensor) -> None:
    """Of the last images of the first and the last position."""
    for p in (0, -1):
        M = exponential(logits[p, -64:]) * column[p].double()
        close("assignments", out[p, -64:], M * updated(row[p, -64:].double(), M.sum(1))[:, None], 4e-3)


def writes(positions: int, images: int, prototypes: int, variants: list[dict]) -> Case:
    def arguments(make: Make, config: dict) -> list:
        given = [draw(make, (positions, images, prototypes)), *potentials(make, positions, images, prototypes)]
        out, axes = make((positions, images, prototypes), DTYPE), strides(positions, images, prototypes)
        numbers = [positions, images, prototypes, *axes, prototypes, *axes, log2_scale(TEMPERATURE), EPS, ROW_LIMIT]
        return [*positive(given, (2, 3)), None, out, *numbers]

    def check(arguments: list, config: dict) -> None:
        before = arguments[3].clone()
        case.launch(arguments, config)
        logits, _, column, _, _, out, *_ = arguments
        check_assignments(logits, column, before, out)

    case = Case(
        assignments_kernel,
        lambda config: positions * images,
        arguments,
        4 * positions * images * prototypes,
        check,
        rows_config(prototypes) | {"UPDATE_ROW": True, "GATHER": True},
        variants,
    )
    return case


def head_rows(positions: int, images: int, prototypes: int, variants: list[dict]) -> Case:
    rows = positions * images

    def arguments(make: Make, config: dict) -> list:
        given = [draw(make, (positions, images, prototypes)), *potentials(make, positions, images, prototypes)]
        programs = triton.cdiv(rows, config["ROWS"])
        given += [make((rows,), torch.float32), make((programs, prototypes), torch.float32)]
        scales = [log2_scale(TEMPERATURE), log2_scale(PREDICTION), PREDICTION, EPS, ROW_LIMIT]
        return [*positive(given, (2, 3)), rows, images, prototypes, *scales]

    def check(arguments: list, config: dict) -> None:
        before, row = arguments[0][-1].clone(), arguments[3][-1].double()
        case.launch(arguments, config)
        logits, _, column, _, loss, parts, *_ = arguments
        M = exponential(before) * column[-1].double()
        t, z = M * updated(row, M.sum(1))[:, None], before.double() / PREDICTION
        close("loss", loss[-images:], -(t * z.log_softmax(1)).sum(1), 1e-5)
        minus_dz = t - z.softmax(1) * t.sum(1, keepdim=True)
        close("minus dz", logits[-1], minus_dz, 4e-3)
        if config["BIAS"]:
            n = max(1, images // config["ROWS"])
            close("bias", parts[-n:].sum(0), logits[-1].double().sum(0), 1e-5)  # of what was rounded

    case = Case(
        head_rows_kernel,
        lambda config: triton.cdiv(rows, config["ROWS"]),
        arguments,
        4 * positions * images * prototypes,
        check,
        head_rows_config(prototypes, DTYPE, HOPPER),
        variants,
    )
    return case


def student_rows(predicted: int, prototypes: int, statistics: bool, variants: list[dict]) -> Case:
    scale = -1 / (PREDICTION * predicted)

    def arguments(make: Make, config: dict) -> list:
        logits = draw(make, (predicted, prototypes), 0.12)
        targets = draw(make, (predicted, prototypes), 1 / prototypes, seed=1)
        out = [make((predicted,), torch.float32), make((predicted, prototypes), DTYPE)]
        if isinstance(targets, Tensor):
            targets.abs_()
        of_targets = [make((predicted,), torch.float32), make((predicted,), torch.int64)]
        numbers = [prototypes, prototypes, 1, prototypes, 1, log2_scale(PREDICTION), PREDICTION, scale]
        return [logits, targets, *out, *(of_targets if statistics else (None, None)), *numbers]

    def check(arguments: list, config: dict) -> None:
        case.launch(arguments, config)
        logits, targets, loss, gradient, entropy, most_likely, *_ = arguments
        t, z = targets[-512:].double(), logits[-512:].double() / PREDICTION
        close("loss", loss[-512:], -(t * z.log_softmax(1)).sum(1), 1e-5)
        close("gradient", gradient[-512:], scale * (t - z.softmax(1) * t.sum(1, keepdim=True)), 4e-3)
        if statistics:
            close("entropy", entropy[-512:], -torch.xlogy(t, t).sum(1), 1e-5)
            best = t.gather(1, most_likely[-512:, None])[:, 0]
            assert torch.equal(best, t.amax(1)), "not the most likely prototypes"

    case = Case(
        student_rows_kernel,
        lambda config: predicted,
        arguments,
        6 * predicted * prototypes,
        check,
        student_rows_config(prototypes, 2),
        variants,
    )
    return case


def scaled(elements: int, factor: float, variants: list[dict]) -> Case:
    """The backward of the student's loss: nothing to do where the factor is 1."""

    def arguments(make: Make, config: dict) -> list:
        return [draw(make, (elements,)), make((), torch.float32, lambda x: x.fill_(factor)), elements]

    def check(arguments: list, config: dict) -> None:
        before = arguments[0][-512:].clone()
        case.launch(arguments, config)
        assert torch.equal(arguments[0][-512:], factor * before), "not scaled"

    case = Case(
        scale_kernel,
        lambda config: triton.cdiv(elements, config["BLOCK"]),
        arguments,
        0 if factor == 1 else 4 * elements,
        check,
        SCALE_CONFIG,
        variants,
    )
    return case
