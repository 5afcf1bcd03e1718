"""Times of several implementations of one operation, taken in turn, their peak memory, and the device's ceilings."""

import gc
import os
import shutil
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from numerics import assert_as_accurate, peak_allocation
from torch import Tensor

from benchmarks.costs import Ceilings

SPIN_CYCLES = 1_000_000  # About half a millisecond: the host queues a call's kernels while the GPU still spins.
OURS = "ours"


class Unavailable(Exception):
    """A peer that cannot run here, and why."""


@dataclass(frozen=True)
class Contestant:
    """One implementation: `run(*arguments(round))` is timed, `arguments` is not.

    Of a short call on a GPU the launches are hidden; a call that holds `calls` repetitions is timed as it comes.
    """

    run: Callable[..., object]
    arguments: Callable[[int], tuple] = lambda _: ()
    calls: int | None = None


@dataclass(frozen=True)
class Measurement:
    seconds: list[float]
    """Of each round, for one call."""
    peak_memory_bytes: int
    """See `peak_memory`."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def seconds_of(contestant: Contestant, round_number: int, device: torch.device) -> float:
    """Of one round: device events on a GPU, the wall clock on a CPU."""
    arguments = contestant.arguments(round_number)
    if device.type == "cpu":
        start = perf_counter()
        contestant.run(*arguments)
        return (perf_counter() - start) / (contestant.calls or 1)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if contestant.calls is None:
        torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    contestant.run(*arguments)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / (contestant.calls or 1)


def peak_memory(contestant: Contestant, device: torch.device, before: int | None) -> int:
    """Bytes that are allocated at most during a call, beyond `before` or, without it, what there was at its start.

    On a CPU always the latter.
    """
    arguments = contestant.arguments(0)
    if device.type == "cpu":
        return peak_allocation(lambda: contestant.run(*arguments))
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device) if before is None else before
    torch.cuda.reset_peak_memory_stats(device)
    contestant.run(*arguments)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def race(
    entrants: dict[str, Callable[[], Contestant]],
    device: torch.device,
    rounds: int,
    seconds: float,
    one_at_a_time: bool = False,
) -> dict[str, Measurement | Exception]:
    """Measures each entrant, or says what kept it from running: Unavailable, or on a GPU what a peer raised.

    An entrant checks itself and returns what to time. Their rounds alternate, so that all meet the same state of the
    machine, unless there is room for one at a time only: then peak memory counts what an entrant made on entering too.
    At most `rounds` rounds, at least three, and no new one once `seconds` have passed.

    Raises:
        Exception: whatever we raise ourselves, and on a CPU whatever a peer raises.
    """
    results: dict[str, Measurement | Exception] = {}
    contestants: dict[str, Contestant] = {}

    def measure() -> None:
        taken: dict[str, list[float]] = {name: [] for name in contestants}
        began = perf_counter()
        for round_number in range(rounds):
            if round_number >= 3 and perf_counter() - began > seconds:
                break
            for name, contestant in contestants.items():
                taken[name].append(seconds_of(contestant, round_number, device))
        for name, measured in taken.items():
            results[name] = Measurement(measured, memory[name])
        contestants.clear()

    memory: dict[str, int] = {}
    for name, enter in entrants.items():
        release(device)
        before = torch.cuda.memory_allocated(device) if one_at_a_time and device.type == "cuda" else None
        try:
            contestant = enter()
            if device.type == "cuda":
                contestant.run(*contestant.arguments(0))  # Compiles; checking itself has warmed up the rest.
            memory[name] = peak_memory(contestant, device, before)
            contestants[name] = contestant
            if one_at_a_time:
                measure()
        except Unavailable as reason:
            results[name] = reason
        except Exception as error:
            if name == OURS or device.type == "cpu":
                raise
            # Without its traceback, which would hold on to the peer's tensors.
            results[name] = Unavailable(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}")
            contestants.pop(name, None)
        contestant = None
    measure()
    return results


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


def measure_ceilings(device: torch.device, copied_bytes: int, matmul_size: int) -> Ceilings:
    """Copy bandwidth, reads and writes counted, and bf16 matrix products of random numbers: medians of 20."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    source = draw(copied_bytes // 2)
    target = torch.empty_like(source)
    a, b = draw(matmul_size, matmul_size), draw(matmul_size, matmul_size)
    product = torch.empty_like(a)
    copy = Contestant(lambda: target.copy_(source))
    matmul = Contestant(lambda: torch.mm(a, b, out=product))
    copy_seconds, matmul_seconds = (
        statistics.median([seconds_of(contestant, i, device) for i in range(25)][5:]) for contestant in (copy, matmul)
    )
    return Ceilings(2 * copied_bytes / copy_seconds / 1e9, 2 * matmul_size**3 / matmul_seconds / 1e12)


def machine(device: torch.device) -> dict[str, str | int | None]:
    """What the results file says of the machine, beside what pytest-benchmark does."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    info = {"torch": torch.__version__, "triton": triton, "threads": torch.get_num_threads(), "gpu": None}
    if device.type == "cuda":
        driver = None
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
            driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        info |= {"gpu": torch.cuda.get_device_name(device), "driver": driver, "cuda": torch.version.cuda}
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
