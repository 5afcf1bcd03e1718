"""Several implementations of one operation, checked, then timed in turn; their peak memory and their graph breaks."""

import gc
import os
import shutil
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter

import torch
from numerics import assert_as_accurate, peak_allocation
from torch import Tensor

from benchmarks.timing import Contestant, Stopwatch, Unavailable, first_line, host_seconds, stopwatch

OURS = "ours"


class Failed(Exception):
    """An implementation that was found wrong, or that must run and does not, and why."""


@dataclass(frozen=True)
class Compiled:
    """What torch.compile made of an implementation: whole graphs, and breaks between them."""

    graphs: int = 0
    breaks: int = 0
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement:
    seconds: list[float]
    """Of each round, for one call."""
    peak_memory_bytes: int
    """See `peak_memory`."""
    host_seconds: float | None = None
    """What one call takes on the host of a GPU."""
    timing: str = ""
    """How the seconds were taken."""
    compiled: Compiled = Compiled()
    inspected: dict = field(default_factory=dict)
    """What else was looked at after the rounds."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def peak_memory(contestant: Contestant, device: torch.device, before: int | None) -> int:
    """Bytes that are allocated at most during a call, beyond `before` or, without it, what there was at its start.

    On a CPU always the latter.
    """
    operands = contestant.operands(0)
    if device.type == "cpu":
        return peak_allocation(lambda: contestant.run(*operands))
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device) if before is None else before
    torch.cuda.reset_peak_memory_stats(device)
    contestant.run(*operands)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def race(
    entrants: dict[str, Callable[[], Contestant]],
    device: torch.device,
    rounds: int,
    seconds: float,
    one_at_a_time: bool = False,
    inspect: Callable[[str, Contestant, float], dict] | None = None,
) -> dict[str, Measurement | Unavailable | Failed]:
    """Measures each entrant, or says what kept it from running, or that it failed.

    An entrant checks itself and returns what to time. Unavailable is what calls itself so and, on a GPU, what a peer
    raises; failed is what a check found wrong, a peer with graph breaks, and whatever else we raise, or a CPU. Rounds
    alternate, so that all meet the same state of the machine, unless there is room for one at a time only: then peak
    memory counts what an entrant made on entering too. At most `rounds` rounds, at least three, and no new one once
    `seconds` have passed. `inspect`, of a name, what was timed and its median, looks on afterwards.
    """
    results: dict[str, Measurement | Unavailable | Failed] = {}
    entered: dict[str, tuple[Contestant, Stopwatch, Measurement]] = {}

    def refuse(name: str, error: Exception) -> None:
        # Kept without its traceback, which would hold on to the entrant's tensors.
        if isinstance(error, Unavailable | Failed):
            results[name] = error.with_traceback(None)
        elif name == OURS or device.type == "cpu" or isinstance(error, AssertionError):
            traceback.print_exception(error)
            results[name] = Failed(first_line(error))
        else:
            results[name] = Unavailable(_whole(error))
        entered.pop(name, None)

    def measure() -> None:
        began = perf_counter()
        for round_number in range(rounds):
            if round_number >= 3 and perf_counter() - began > seconds:
                break
            for name, (_, watch, measurement) in list(entered.items()):
                try:
                    measurement.seconds.append(watch.seconds(round_number))
                except Exception as error:
                    refuse(name, error)
        for name, (contestant, _, measurement) in entered.items():
            if inspect is not None:
                measurement.inspected.update(inspect(name, contestant, measurement.median))
            results[name] = measurement
        entered.clear()

    for name, enter in entrants.items():
        release(device)
        before = torch.cuda.memory_allocated(device) if one_at_a_time and device.type == "cuda" else None
        _forget_compilation()
        try:
            contestant = enter()
            if device.type == "cuda":
                contestant.run(*contestant.operands(0))  # Compiles; checking itself has warmed up the rest.
            memory, host = peak_memory(contestant, device, before), host_seconds(contestant, device)
            compiled = compilation()
            if name != OURS and compiled.breaks:
                raise Failed(f"expected 0 graph breaks, got {compiled.breaks}: {'; '.join(compiled.reasons)}")
            watch = stopwatch(contestant, device)
            entered[name] = contestant, watch, Measurement([], memory, host, watch.how, compiled)
            if one_at_a_time:
                measure()
        except Exception as error:
            refuse(name, error)
        contestant = watch = None
    measure()
    return {name: results[name] for name in entrants}


def _whole(error: Exception) -> str:
    """The message in one line: some say only further down why nothing runs here."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:700]


def _forget_compilation() -> None:
    if "torch._dynamo.utils" in sys.modules:
        sys.modules["torch._dynamo.utils"].counters.clear()


def compilation() -> Compiled:
    """Of everything that torch.compile compiled since it was last asked to forget."""
    if "torch._dynamo.utils" not in sys.modules:
        return Compiled()
    counters = sys.modules["torch._dynamo.utils"].counters
    breaks = counters["graph_break"]
    reasons = tuple(" ".join(reason.split())[:160] for reason in breaks)
    return Compiled(counters["stats"]["unique_graphs"], sum(breaks.values()), reasons)


def check(name: str, actual: Tensor, same_dtype: Tensor, oracle: Tensor) -> None:
    """An error against float64 of at most twice that of the definition in the same type, of a peer ten times.

    How a peer rounds is its own affair; that it computes something else would show in other orders of magnitude.
    """
    if name == OURS:
        assert_as_accurate(actual, same_dtype, oracle)
        return
    error, own_error = ((x.double() - oracle).abs().max() for x in (actual, same_dtype))
    budget = 10 * own_error + torch.finfo(same_dtype.dtype).eps * oracle.abs().max()
    assert error <= budget, f"{name} is off by {error:.3g}, above the budget {budget:.3g}"


def release(device: torch.device) -> None:
    """Gives back what the last entrant left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rotated(make: Callable[[int], tuple[Tensor, ...]], device: torch.device) -> list[tuple[Tensor, ...]]:
    """make(0), make(1), ...: inputs for successive rounds, so many that none is still in the GPU's L2 cache."""
    copies = [make(0)]
    if device.type == "cuda":
        size = sum(x.numel() * x.element_size() for x in copies[0])
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        copies += [make(i) for i in range(1, min(1 + 2 * cache // size, 16))]
    return copies


def installed(package: str) -> str | None:
    """Its version, None where it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(device: torch.device) -> dict[str, str | int | None]:
    """What the results file says of the machine, beside what pytest-benchmark does."""
    info = {"torch": torch.__version__, "triton": installed("triton"), "threads": torch.get_num_threads(), "gpu": None}
    if device.type == "cuda":
        driver = None
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
            driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        info |= {"gpu": torch.cuda.get_device_name(device), "driver": driver, "cuda": torch.version.cuda}
        info |= {"cudnn": torch.backends.cudnn.version(), "xformers": installed("xformers")}
    return info


class Deadline:
    """CAPI_BENCH_SECONDS after the start, from which on nothing more is measured."""

    def __init__(self):
        self.seconds = float(os.environ.get("CAPI_BENCH_SECONDS", "inf"))
        self.began = perf_counter()

    def check(self, needed: float = 0.0) -> None:
        """Raises Unavailable unless there are `needed` seconds left."""
        left = self.seconds - (perf_counter() - self.began)
        if left < needed:
            raise Unavailable(f"left out: {left:.0f} s were left of CAPI_BENCH_SECONDS, it needs {needed:.0f}")
