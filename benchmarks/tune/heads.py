"""Configurations of the heads' kernels on a GPU: compiled in parallel, checked against float64, timed by graph replays.

    python -m benchmarks.tune.heads [--seconds 70] [--sections columns rows ...]

A line for each variant as soon as it is timed; heads.SECTION.json in $CAPI_BENCH_OUT, or here, after each section. The
most valuable sections come first, and none begins a variant after so many seconds. A variant that fails is said to.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from time import perf_counter

import torch

from benchmarks.timing import Contestant, GraphReplays, first_line
from benchmarks.tune.heads_kernels import (
    DEVICE,
    DTYPE,
    EPS,
    PREDICTION,
    TEMPERATURE,
    Case,
    close,
    columns,
    columns_variants,
    draw,
    first_sums,
    head_rows,
    in_memory,
    row_steps,
    scaled,
    student_rows,
    writes,
)
from capi_kernels.heads.clustering_head_triton import add_product_, clustering_head
from capi_kernels.sinkhorn.balance_triton import balanced
from capi_kernels.sinkhorn.common_triton import reduce_parts

STARTED = perf_counter()
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
        student_rows(8 * 512, 16384, False, [{"num_warps": 8}, {"num_warps": 16}]),
        student_rows(8 * 512, 16384, True, [{"num_warps": 8}, {"num_warps": 16}]),
        student_rows(33 * 512, 16384, False, [{"num_warps": 8}, {"num_warps": 16}]),
        scaled(8 * 512 * 16384, 1.0, [{"BLOCK": 8192, "num_warps": 8}, {"BLOCK": 32768, "num_warps": 8}]),
        scaled(8 * 512 * 16384, 0.5, [{"BLOCK": 8192, "num_warps": 8}, {"BLOCK": 4096, "num_warps": 4}]),
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
        return lambda: balanced(x, 3, EPS, TEMPERATURE, None, True)

    def product(dim: int) -> Callable[[], object]:
        a, b = draw(in_memory, (CHUNK[0] * CHUNK[1], CHUNK[2]), 0.01), draw(in_memory, (CHUNK[0] * CHUNK[1], dim))
        total = torch.zeros(CHUNK[2], dim, device=DEVICE)
        add_product_(total, a.mT, b)
        close("product", total[:512], a[:, :512].double().mT @ b.double(), 1e-3)
        return lambda: add_product_(total, a.mT, b)

    def head(dim: int) -> Callable[[], object]:
        features, weight = draw(in_memory, (256, 512, dim)), draw(in_memory, (16384, dim), dtype=torch.float32)
        bias = torch.zeros(16384, device=DEVICE)
        options = TEMPERATURE, PREDICTION, 3, EPS, True, None, None, DTYPE
        return lambda: clustering_head(features, weight, bias, *options)

    def column_sums() -> Callable[[], object]:
        x, out = draw(in_memory, (CHUNK[0] * CHUNK[1], CHUNK[2])), torch.empty(CHUNK[2], device=DEVICE)
        return lambda: torch.sum(x, 0, dtype=torch.float32, out=out)

    def reduction() -> Callable[[], object]:
        parts, out = torch.ones(1, 1024, CHUNK[2], device=DEVICE), torch.empty(1, CHUNK[2], device=DEVICE)
        return lambda: reduce_parts(parts, out, EPS, update=False)

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
        bias = torch.zeros(16384, device=DEVICE)
        options = TEMPERATURE, PREDICTION, 3, EPS, True, None, None, DTYPE
        clustering_head(features, weight, bias, *options)
    else:
        shape = {"sinkhorn": (2, 512, 16384), "rows form": (1, 16384, 16384), "small": (2, 64, 4096)}[name]
        balanced(draw(in_memory, shape), 3, EPS, TEMPERATURE, None, True)
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
