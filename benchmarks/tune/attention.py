"""Times configurations of the attention kernels at the shapes of CAPI, each checked against float64 before.

    python -m benchmarks.tune.attention [--seconds 100] [--only SECTION ...]

Worker processes compile and check first, on few images; then one process times by replays of CUDA graphs, and says at
once what it found. After each section it writes attention_tune.json to $CAPI_BENCH_OUT, or here. `--smoke` goes through
all of it with tiny shapes, in the interpreter too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.timing import Contestant, first_line, stopwatch
from capi_kernels import reference
from capi_kernels.attention.configs import Config
from capi_kernels.attention.launch_triton import attention_backward, attention_forward, new_gradients
from capi_kernels.attention.operands_triton import Operands, launchable
from capi_kernels.attention.packed_rotary_triton import pack_tables
from capi_kernels.attention.short_backward_triton import short_backward
from capi_kernels.attention.short_forward_triton import short_forward
from capi_kernels.attention.tiled_forward_triton import tiled_forward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
CHECKED_IMAGES = 16
COMPILE_SECONDS = 70


class Shape(NamedTuple):
    images: int
    queries: int | None  # None: the keys themselves.
    keys: int
    heads: int = 16
    head_dim: int = 64


class Section(NamedTuple):
    shape: Shape
    direction: str
    configs: list[Config]

    @property
    def name(self) -> str:
        sizes = [n for n in self.shape if n is not None]
        return "x".join(map(str, sizes)) + " " + self.direction


def sections(smoke: bool = False, only: list[str] | None = None) -> list[Section]:
    """The most valuable first; those of these names."""
    C = Config
    visible_forward = [C(64, 128, 4, r) for r in (128, None, 168)] + [
        C(128, 128, 8),
        C(64, 128, 8),
        C(64, 64, 4, tail=64),
    ]
    visible_backward = [C(128, 128, 8, heads=h, num_stages=s) for h, s in ((4, 2), (2, 2), (4, 1), (1, 1))]
    visible_backward += [C(64, 128, 8), C(64, 128, 4)]
    teacher = [C(64, 256, 4, tail=16), C(64, 256, 8, tail=16), C(128, 256, 8, tail=16), C(64, 256, 4, tail=64)]
    few_forward = [C(16, 128, 8, keys_first=True), C(16, 128, 8, 64, keys_first=True), C(64, 128, 4, 128)]
    few_backward = [C(16, 128, 8, 128, keys_first=True), C(16, 128, 8, keys_first=True)]
    many_forward = [C(64, 128, 4, r) for r in (128, None, 168)] + [C(128, 128, 8)]
    many_backward = [C(128, 128, 8), C(64, 128, 8), C(64, 128, 4)]
    long = [C(128, 64, 8, num_stages=s) for s in (2, 3)] + [C(64, 64, 4, num_stages=3), C(128, 128, 8, num_stages=2)]
    tables = [
        (Shape(512, None, 106), "forward", visible_forward),
        (Shape(512, None, 106), "backward", visible_backward),
        (Shape(256, None, 272), "forward", teacher),
        (Shape(512, 8, 106), "forward", few_forward),
        (Shape(512, 8, 106), "backward", few_backward),
        (Shape(512, 166, 106), "forward", many_forward),
        (Shape(512, 166, 106), "backward", many_backward),
        (Shape(16, None, 4096), "forward", long),
    ]
    if smoke:
        tables = [(s._replace(images=1, heads=8), d, c[:: max(1, len(c) // 2)]) for s, d, c in tables[:-1]]
    plan = [Section(*table) for table in tables]
    return [section for section in plan if not only or section.name in only]


def label(config: Config) -> str:
    """What differs from the defaults."""
    defaults = Config._field_defaults
    fields = config._asdict().items()
    return " ".join(f"{k}={v}" for k, v in fields if k not in defaults or v != defaults[k])


class Case:
    """One set of inputs: the strided views that the model gives, what a backward reads, and float64's answer."""

    def __init__(self, shape: Shape, seed: int):
        self.shape = shape
        images, queries, keys, heads, head_dim = shape
        self.own = queries is None
        self.parts = [3] if self.own else [1, 2]
        queries = keys if queries is None else queries
        self.layout = peers.Layout(images, queries, keys, DEVICE)
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, heads, head_dim, generator=generator, device=DEVICE).to(DTYPE)

        if self.own:
            self.qkv = draw(images * keys, 3).unbind(1)
        else:
            self.qkv = (draw(images * queries), *draw(images * keys, 2).unbind(1))
        self.do = draw(images * queries)
        self.tables = []
        for tokens in (images * queries, images * keys):
            angle = 44 * torch.rand(tokens, head_dim, generator=generator, device=DEVICE)
            self.tables += [angle.cos(), angle.sin()]
        if self.own:
            self.tables[2:] = self.tables[:2]
        self.lengths = [self.layout.cu_seqlens(n) for n in (queries, keys)]
        if self.own:
            self.lengths[1] = self.lengths[0]
        self.most = (queries, keys)
        self.scale = head_dim**-0.5

    @property
    def x(self) -> Operands:
        return Operands(*self.qkv, *self.tables, *self.lengths, None, *self.most, self.scale)

    def ours(self) -> tuple[Tensor, Tensor]:
        """Today's o and stats."""
        return attention_forward(*self.x)

    def ours_backward(self, out: Tensor, stats: Tensor) -> list[Tensor]:
        buffers = attention_backward(self.do, out, stats, *self.x, parts=self.parts)
        return [part for buffer in buffers for part in buffer.unbind(1)]

    def forward(self, config: Config) -> tuple[Tensor, Tensor]:
        forward = tiled_forward if self.most[1] > 320 else short_forward
        return forward(launchable(self.x), config)

    def backward(self, config: Config, stats: Tensor) -> list[Tensor]:
        x = launchable(self.x)
        gradients = [part for buffer in new_gradients(x, self.parts) for part in buffer.unbind(1)]
        short_backward(x, self.do, stats, *gradients, config)
        return gradients

    @property
    def checked_heads(self) -> int:
        """The definition forms [heads, queries, keys]."""
        return 1 if self.most[1] > 1024 else self.shape.heads

    def defined(self, dtype: torch.dtype) -> list[Tensor]:
        """o, dq, dk, dv of the definition, of the first heads."""
        wide = torch.promote_types(dtype, torch.float32)
        heads = slice(self.checked_heads)
        qkv = [x[:, heads].detach().to(dtype).requires_grad_() for x in self.qkv]
        tables = [x.to(wide) for x in self.tables]
        out = reference.masked_cross_attention(*qkv, *tables, *self.lengths, *self.most)
        return [out.detach(), *torch.autograd.grad(out, qkv, self.do[:, heads].to(dtype))]


def over_budget(actual: Tensor, same_dtype: Tensor, oracle: Tensor) -> float:
    """The largest error over what the tests allow."""
    error = (actual.double() - oracle).abs().max()
    rounding = torch.finfo(actual.dtype).eps * oracle.abs().max()
    return float(error / (2 * (same_dtype.double() - oracle).abs().max() + rounding))


def check(section: Section, config: Config, case: Case, versions: list[list[Tensor]]) -> str:
    """Errors over their budget, "0.20/0.16/0.20"."""
    if section.direction == "forward":
        actual, first = [case.forward(config)[0]], 0
    else:
        actual, first = case.backward(config, case.ours()[1]), 1
    heads = slice(case.checked_heads)
    errors = [over_budget(x[:, heads], *(v[first + i] for v in versions)) for i, x in enumerate(actual)]
    return "/".join(f"{error:.2f}" for error in errors)


def jobs(plan: list[Section]) -> list[tuple[Section, Config | None]]:
    """What to compile: today's kernels, then every configuration."""
    return [(s, None) for s in plan] + [(s, config) for s in plan for config in s.configs]


def work(folder: Path, index: int, count: int, plan: list[Section], smoke: bool) -> None:
    """Compile and check every `count`-th job."""
    cases = {}
    for n, (section, config) in list(enumerate(jobs(plan)))[index::count]:
        if config is None:
            # On whole inputs: today's kernels take how many heads share a program from their number.
            case = Case(section.shape, 0)
            saved = case.ours()
            if section.direction == "backward":
                case.ours_backward(*saved)
            cases.clear()
            del case, saved
            continue
        shape = section.shape._replace(images=min(section.shape.images, 1 if smoke else CHECKED_IMAGES))
        if shape.keys > 1024:
            shape = shape._replace(images=1)
        try:
            if shape not in cases:
                case = Case(shape, 0)
                cases = {shape: (case, [case.defined(dtype) for dtype in (DTYPE, torch.float64)])}
            result = {"error": check(section, config, *cases[shape])}
        except Exception as error:
            result = {"failed": first_line(error)}
        (folder / f"{n}.part").write_text(json.dumps(result))
        (folder / f"{n}.part").rename(folder / f"{n}.json")


def warm_peer(shape: Shape) -> None:
    """Leaves torch.compile's cache with what the peer of a section needs."""
    case = Case(shape, 0)
    qkv = [x.detach().requires_grad_() for x in case.qkv]
    out = peers.attention("sdpa_cudnn", case.layout)(*qkv, *case.tables)
    torch.autograd.grad(out, qkv, case.do)


def warmed(plan: list[Section]) -> list[Shape]:
    return list(dict.fromkeys(s.shape for s in plan if s.shape.keys < 1024))


def microseconds(run: Callable, arguments: Callable, untimed: Callable = lambda *x: x, copies: int = 2) -> float:
    contestant = Contestant(run, arguments, untimed, copies=copies)
    contestant.run(*contestant.operands(0))
    watch = stopwatch(contestant, DEVICE)
    return 1e6 * statistics.median(watch.seconds(i) for i in range(5))


def baselines(section: Section, cases: list[Case], compiled: bool) -> Iterator[tuple[str, Callable[[], float]]]:
    """What to compare with: today's kernels, cuDNN without a rotary embedding and, if asked, with a compiled one."""
    backward = section.direction == "backward"

    def with_gradients(i: int) -> tuple:
        case = cases[i % len(cases)]
        return [x.detach().requires_grad_() for x in case.qkv], case

    if not compiled:
        if backward:
            saved = [case.ours() for case in cases]
            yield (
                "ours",
                lambda: microseconds(lambda i: cases[i].ours_backward(*saved[i]), lambda i: (i % len(cases),)),
            )
        else:
            yield "ours", lambda: microseconds(lambda i: cases[i].ours(), lambda i: (i % len(cases),))
            tables = cases[0].tables
            yield "packing the queries' tables", lambda: microseconds(lambda: pack_tables(*tables[:2]), lambda _: ())
        run = peers._sdpa(cases[0].layout, peers.SDPBackend.CUDNN_ATTENTION)
        name = "cudnn without rotary"
    else:
        rotated = peers.attention("sdpa_cudnn", cases[0].layout)
        name = "cudnn with compiled rotary"
        run = None

    def forward(qkv: list[Tensor], case: Case) -> Tensor:
        return run(*qkv) if run else rotated(*qkv, *case.tables)

    if backward:
        yield (
            name,
            lambda: microseconds(
                torch.autograd.grad, with_gradients, lambda qkv, case: (forward(qkv, case), qkv, case.do)
            ),
        )
    else:
        yield name, lambda: microseconds(forward, with_gradients)


def time_section(section: Section, found: dict[str, dict], say: Callable) -> Iterator[dict]:
    """Time one implementation after the other."""
    cases = [Case(section.shape, seed) for seed in range(2)]
    saved = [case.ours() for case in cases]
    backward = section.direction == "backward"
    expected = cases[0].ours_backward(*saved[0]) if backward else [saved[0][0]]

    def run(config: Config, i: int) -> object:
        return cases[i].backward(config, saved[i][1]) if backward else cases[i].forward(config)

    for name, measure in baselines(section, cases, compiled=False):
        yield attempt(section, name, measure, {}, say)
    for config in section.configs:
        name = label(config)
        result = found.get(name, {"failed": "not compiled in time"})
        if "failed" in result:
            say(section, name, "failed: " + result["failed"])
            yield {"config": name, **result}
            continue

        def measure(config=config, result=result) -> float:
            got = run(config, 0)
            got = got if backward else got[:1]
            # All images, next to today's kernels: relative to the largest value.
            apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True)]
            result["apart"] = max(apart)
            return microseconds(partial(run, config), lambda i: (i % len(cases),))

        yield attempt(section, name, measure, result, say)


def attempt(section: Section, name: str, measure: Callable[[], float], known: dict, say: Callable) -> dict:
    try:
        row = {"config": name, **known, "us": measure(), **known}
        note = f"  err {known['error']}  apart {known['apart']:.4f}" if "error" in known else ""
        say(section, name, f"{row['us']:8.1f} us{note}")
    except Exception as error:
        row = {"config": name, "failed": first_line(error)}
        say(section, name, "failed: " + row["failed"])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=100, help="no new measurement after so many")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", help='sections, such as "512x106x16x64 forward"')
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--warm-peer", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    plan = sections(arguments.smoke, arguments.only)
    if arguments.work:
        folder, index, count = arguments.work
        work(Path(folder), int(index), int(count), plan, arguments.smoke)
        return
    if arguments.warm_peer is not None:
        warm_peer(warmed(plan)[arguments.warm_peer])
        return

    began = perf_counter()

    def say(section: Section, name: str, text: str) -> None:
        print(f"{perf_counter() - began:5.0f} s  {section.name}  {text}  {name}", flush=True)

    def late() -> bool:
        return perf_counter() - began > arguments.seconds

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.tune.attention", *["--smoke"] * arguments.smoke]
        command += ["--only", *arguments.only] if arguments.only else []
        warm = [] if DEVICE.type == "cpu" else range(len(warmed(plan)))
        one = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        processes = [subprocess.Popen([*command, "--warm-peer", str(i)], env=one) for i in warm]
        count = max(1, arguments.workers - len(processes))
        processes += [subprocess.Popen([*command, "--work", folder, str(i), str(count)]) for i in range(count)]
        for process in processes:
            try:
                process.wait(max(0.1, COMPILE_SECONDS - (perf_counter() - began)) if not arguments.smoke else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        found: dict[str, dict[str, dict]] = {section.name: {} for section in plan}
        for n, (section, config) in enumerate(jobs(plan)):
            if (result := Path(folder) / f"{n}.json").exists():
                found[section.name][label(config)] = json.loads(result.read_text())
    done, all_of_them = sum(map(len, found.values())), sum(len(s.configs) for s in plan)
    print(f"{perf_counter() - began:5.0f} s  {done} of {all_of_them} compiled and checked", flush=True)

    output = Path(os.environ.get("CAPI_BENCH_OUT", ".")) / "attention_tune.json"
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    results = {"device": device, "torch": torch.__version__, "sections": {}}
    for section in plan:
        rows = results["sections"][section.name] = []
        try:
            for row in time_section(section, found[section.name], say) if not late() else ():
                rows.append(row)
                if late():
                    say(section, "", "out of time")
                    break
        except Exception as error:
            say(section, "", "failed: " + first_line(error))
        output.write_text(json.dumps(results, indent=1))
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    for section in plan:
        if late() or DEVICE.type == "cpu":
            continue
        try:
            cases = [Case(section.shape, seed) for seed in range(2)]
            for name, measure in baselines(section, cases, compiled=True):
                results["sections"][section.name].append(attempt(section, name, measure, {}, say))
        except Exception as error:
            say(section, "", "failed: " + first_line(error))
        output.write_text(json.dumps(results, indent=1))
        cases = None
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
