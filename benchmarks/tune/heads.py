"""Configurations of the heads' kernels on a GPU: compiled in parallel, checked against float64, timed by graph replays.

    python -m benchmarks.tune.heads [--seconds 70] [--sections columns rows ...]

A line for each variant as soon as it is timed; heads.SECTION.json in $CAPI_BENCH_OUT, or here, after each section. The
most valuable sections come first, and none begins a variant after so many seconds. A variant that fails is said to.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import triton
from torch import Tensor

from benchmarks.timing import Contestant, GraphReplays, first_line
from capi_kernels import clustering_triton, sinkhorn_triton
from capi_kernels.clustering_triton import head_rows_config, head_rows_kernel
from capi_kernels.sinkhorn_triton import (
    ROW_LIMIT,
    assignments_kernel,
    column_step_kernel,
    columns_config,
    first_column_sums_kernel,
    first_sums_config,
    log2_scale,
    row_step_config,
    row_step_kernel,
    rows_config,
)
from capi_kernels.student_loss_triton import student_rows_config, student_rows_kernel

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
TEMPERATURE, PREDICTION = 0.06, 0.12
EPS = 1e-8
HOPPER = 90
SHIFT = 4.0  # In the place of the maxima: rows then have sums of about 1.
STARTED = perf_counter()

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
        variant["PARTS"] = parts if parts <= sinkhorn_triton.MOST_FOLDED_PARTS else 0
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


def student_rows(predicted: int, prototypes: int, variants: list[dict]) -> Case:
    def arguments(make: Make, config: dict) -> list:
        logits = draw(make, (predicted, prototypes), 0.12)
        targets = draw(make, (predicted, prototypes), 1 / prototypes, seed=1)
        out = [make((predicted,), torch.float32), make((predicted, prototypes), DTYPE)]
        if isinstance(targets, Tensor):
            targets.abs_()
        numbers = [None, None, prototypes, prototypes, 1, 0, prototypes, 1, None]
        scales = [log2_scale(TEMPERATURE), log2_scale(PREDICTION), PREDICTION]
        return [logits, targets, None, None, None, None, *out, *numbers, *scales]

    def check(arguments: list, config: dict) -> None:
        case.launch(arguments, config)
        logits, targets, loss, minus_dz = arguments[0], arguments[1], arguments[6], arguments[7]
        t, z = targets[-512:].double(), logits[-512:].double() / PREDICTION
        close("loss", loss[-512:], -(t * z.log_softmax(1)).sum(1), 1e-5)
        close("minus dz", minus_dz[-512:], t - z.softmax(1) * t.sum(1, keepdim=True), 4e-3)

    case = Case(
        student_rows_kernel,
        lambda config: predicted,
        arguments,
        6 * predicted * prototypes,
        check,
        student_rows_config(prototypes, 2, given=True) | {"GATHER": False},
        variants,
    )
    return case


SMALL = 256, 64, 4096
WHOLE_BATCH = 8, 16384, 16384
CHUNK = 64, 512, 16384

CASES: dict[str, list[Case]] = {
    "columns": [
        columns(
            *CHUNK,
            first=False,
            row_sums=True,
            variants=columns_variants(
                (32, 4, 4, 8, 128),
                (32, 4, 3, 8, 128),
                (32, 2, 3, 8, 128),
                (32, 3, 3, 8, 128),
                (32, 8, 4, 8, 128),
                (64, 4, 3, 8, None),
                (16, 8, 3, 4, None),
            ),
        ),
        columns(*CHUNK, True, True, columns_variants((32, 4, 3, 8, 128), (32, 4, 4, 8, 128), (32, 2, 3, 8, 128))),
        columns(*CHUNK, False, False, columns_variants((32, 4, 3, 8, 128), (32, 4, 4, 8, 128), (32, 2, 3, 8, 128))),
    ],
    "head_rows": [
        head_rows(
            *CHUNK,
            variants=[
                {"ROWS": 32, "BIAS": True, "AHEAD": 3},
                {"ROWS": 32, "BIAS": False, "AHEAD": 2},
                {"ROWS": 32, "BIAS": True, "AHEAD": 0},
                {"ROWS": 32, "BIAS": True, "AHEAD": 2},
                {"ROWS": 64, "BIAS": True, "AHEAD": 3},
                {"ROWS": 16, "BIAS": True, "AHEAD": 3},
                {"ROWS": 128, "BIAS": True, "AHEAD": 3},
            ],
        )
    ],
    "rows": [
        row_steps(
            *WHOLE_BATCH,
            variants=[
                {"ROWS": 256},
                {"ROWS": 128},
                {"ROWS": 496},
            ],
        ),
        first_sums(
            *WHOLE_BATCH,
            variants=[
                {"LANES": 64, "STAGES": 3},
                {"LANES": 64, "STAGES": 4},
                {"LANES": 32, "STAGES": 3, "num_warps": 4},
                {"LANES": 128, "STAGES": 3},
            ],
        ),
        writes(*WHOLE_BATCH, variants=[{"num_warps": 16}]),
    ],
    "small": [
        columns(
            *SMALL,
            first=False,
            row_sums=True,
            variants=columns_variants(
                (128, 8, 3, 4, None),
                (128, 8, 4, 4, None),
                (64, 8, 3, 2, None),
                (64, 16, 3, 2, None),
            ),
        ),
        columns(*SMALL, True, True, columns_variants((128, 8, 3, 4, None), (64, 16, 3, 2, None))),
        columns(256, 16, 16384, False, True, columns_variants((128, 8, 3, 1, None), (256, 8, 3, 2, None))),
        columns(256, 32, 16384, False, True, columns_variants((128, 8, 3, 2, None), (256, 8, 3, 4, None))),
        columns(128, 128, 16384, False, True, columns_variants((64, 8, 3, 4, None), (128, 4, 3, 8, 128))),
        columns(64, 256, 16384, False, True, columns_variants((32, 8, 3, 4, None), (64, 4, 3, 8, 128))),
        writes(*SMALL, variants=[{"num_warps": 4}]),
    ],
    "student": [
        student_rows(8 * 512, 16384, [{"num_warps": 8}, {"num_warps": 16}]),
        student_rows(33 * 512, 16384, [{"num_warps": 8}, {"num_warps": 16}]),
    ],
}


def replayed(run: Callable[[], object], calls: int = 4, replays: int = 7) -> float:
    """Microseconds of a call: the median of the replays of a graph of several."""
    watch = GraphReplays(Contestant(run), DEVICE, calls)
    return statistics.median([watch.seconds(i) for i in range(replays)][1:]) * 1e6


def operations() -> Iterator[tuple[str, Callable[[], Callable[[], object]]]]:
    """Whole operations, and what to compare their parts with."""

    def sinkhorn(shape: tuple[int, int, int]) -> Callable[[], object]:
        x = draw(in_memory, shape)
        return lambda: sinkhorn_triton.balanced(x, 3, EPS, TEMPERATURE, None, True)

    def product(dim: int) -> Callable[[], object]:
        a, b = draw(in_memory, (CHUNK[0] * CHUNK[1], CHUNK[2]), 0.01), draw(in_memory, (CHUNK[0] * CHUNK[1], dim))
        total = torch.zeros(CHUNK[2], dim, device=DEVICE)
        clustering_triton.add_product_(total, a.mT, b)
        close("product", total[:512], a[:, :512].double().mT @ b.double(), 1e-3)
        return lambda: clustering_triton.add_product_(total, a.mT, b)

    def head(dim: int) -> Callable[[], object]:
        features, weight = draw(in_memory, (256, 512, dim)), draw(in_memory, (16384, dim), dtype=torch.float32)
        bias = torch.zeros(16384, device=DEVICE)
        rows = torch.randint(256 * 512, (4096,), device=DEVICE)
        options = TEMPERATURE, PREDICTION, 3, EPS, True, None, None, DTYPE
        return lambda: clustering_triton.clustering_head(features, weight, bias, rows, *options)

    def column_sums() -> Callable[[], object]:
        x, out = draw(in_memory, (CHUNK[0] * CHUNK[1], CHUNK[2])), torch.empty(CHUNK[2], device=DEVICE)
        return lambda: torch.sum(x, 0, dtype=torch.float32, out=out)

    def reduction() -> Callable[[], object]:
        parts, out = torch.ones(1, 1024, CHUNK[2], device=DEVICE), torch.empty(1, CHUNK[2], device=DEVICE)
        return lambda: sinkhorn_triton.reduce_parts(parts, out, EPS, update=False)

    for name, shape in (("sinkhorn", (256, 512, 16384)), ("rows form", WHOLE_BATCH), ("small", SMALL)):
        yield f"{name} {shape}", lambda shape=shape: sinkhorn(shape)
    for dim in (1024, 384):
        yield f"head dim {dim}", lambda dim=dim: head(dim)
        yield f"weight product dim {dim}, of 64 positions", lambda dim=dim: product(dim)
    yield "torch.sum of the logits of 64 positions", column_sums
    yield "sum of 1024 parts of the bias gradient", reduction


def warm_operation(name: str) -> None:
    """Compile what an operation launches, on a few positions."""
    if name == "head":
        features, weight = draw(in_memory, (2, 512, 384)), draw(in_memory, (16384, 384), dtype=torch.float32)
        rows = torch.randint(1024, (4096,), device=DEVICE)
        bias = torch.zeros(16384, device=DEVICE)
        options = TEMPERATURE, PREDICTION, 3, EPS, True, None, None, DTYPE
        clustering_triton.clustering_head(features, weight, bias, rows, *options)
    else:
        shape = {"sinkhorn": (2, 512, 16384), "rows form": (1, 16384, 16384), "small": (2, 64, 4096)}[name]
        sinkhorn_triton.balanced(draw(in_memory, shape), 3, EPS, TEMPERATURE, None, True)
    torch.cuda.synchronize()


def compile_task(task: tuple) -> tuple[tuple, str]:
    """In a process of its own: what a task compiles lands in Triton's cache."""
    kind, *which = task
    try:
        if kind == "operation":
            warm_operation(*which)
        else:
            case = CASES[kind][which[0]]
            case.compile(case.variants[which[1]])
    except Exception as error:
        return task, first_line(error)
    return task, ""


def tasks(sections: list[str]) -> list[tuple]:
    found: list[tuple] = []
    if "operations" in sections:
        found += [("operation", name) for name in ("head", "rows form", "sinkhorn", "small")]
    for section in sections:
        for i, case in enumerate(CASES.get(section, ())):
            found += [(section, i, j) for j in range(len(case.variants))]
    return found


def say(line: str) -> None:
    print(f"[{perf_counter() - STARTED:5.1f} s] {line}", flush=True)


def time_variant(section: str, case: Case, variant: dict) -> dict:
    name, config = case.kernel.fn.__name__, case.config(variant)
    what = {key: value for key, value in config.items() if key not in ("EVEN", "enable_fp_fusion")}
    entry = {"section": section, "kernel": name, "config": what}
    try:
        arguments = case.arguments(in_memory, config)
        case.check(arguments, config)
        compiled = case.launch(arguments, config)
        entry |= {"registers": compiled.n_regs, "spills": compiled.n_spills, "shared": compiled.metadata.shared}
        entry["us"] = replayed(lambda: case.launch(arguments, config))
        entry["gb_per_second"] = case.moved / entry["us"] / 1e3
        used = f"{entry['registers']} registers, {entry['spills']} spilled, {entry['shared']} shared"
        say(f"{name} {what}: {entry['us']:.1f} us, {entry['gb_per_second']:.0f} GB/s; {used}")
    except Exception as error:
        entry["failed"] = first_line(error)
        say(f"{name} {what}: FAILED {entry['failed']}")
    return entry


def time_cases(section: str, deadline: float) -> list[dict]:
    results = []
    for case in CASES[section]:
        for variant in case.variants:
            if perf_counter() > deadline:
                say(f"{case.kernel.fn.__name__} {variant}: left out, no time")
            else:
                results.append(time_variant(section, case, variant))
    return results


def time_section(section: str, deadline: float) -> list[dict]:
    if section in CASES:
        return time_cases(section, deadline)
    results = []
    if section == "copies":
        for elements in (CHUNK, (256, 512, 16384), SMALL):
            x = draw(in_memory, elements)
            y = torch.empty_like(x)
            microseconds = replayed(lambda x=x, y=y: y.copy_(x))
            entry = {"copy of": elements, "us": microseconds, "gb_per_second": 4 * x.numel() / microseconds / 1e3}
            say(f"copy of {elements}: {entry['us']:.1f} us, {entry['gb_per_second']:.0f} GB/s")
            results.append(entry)
            del x, y
    elif section == "operations":
        for name, make in operations():
            if perf_counter() > deadline:
                say(f"{name}: left out, no time")
                continue
            try:
                torch.cuda.empty_cache()
                run = make()
                run()
                results.append({"operation": name, "us": replayed(run, calls=1 if "head" in name else 2, replays=5)})
                say(f"{name}: {results[-1]['us']:.0f} us")
                del run
            except Exception as error:
                results.append({"operation": name, "failed": first_line(error)})
                say(f"{name}: FAILED {results[-1]['failed']}")
    return results


def main() -> None:
    sections = ["copies", "columns", "head_rows", "operations", "rows", "small", "student"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=70.0, help="no variant begins later")
    parser.add_argument("--sections", nargs="+", default=sections, choices=sections)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    arguments = parser.parse_args()
    deadline = STARTED + arguments.seconds
    context = multiprocessing.get_context("spawn")
    wanted = tasks(arguments.sections)
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        pending = {pool.submit(compile_task, task) for task in wanted}
        for future in as_completed(pending):
            task, error = future.result()
            if error:
                say(f"compiling {task}: FAILED {error}")
    say(f"compiled {len(wanted)} tasks on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    out = Path(os.environ.get("CAPI_BENCH_OUT", "."))
    for section in arguments.sections:
        torch.cuda.empty_cache()
        try:
            results = time_section(section, deadline)
            (out / f"heads.{section}.json").write_text(json.dumps(results, indent=1))
        except Exception as error:
            say(f"{section}: FAILED {first_line(error)}")


if __name__ == "__main__":
    main()
