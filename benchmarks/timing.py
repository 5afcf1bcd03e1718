"""Seconds of a call: of the wall clock on a CPU, of the device on a GPU, without the host's time where calls are short.

On a GPU a call is short where the host may need longer to launch it than the device to run it. What it takes there is
read from replays of a CUDA graph that holds several calls; the host's time of one call stands apart.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

from benchmarks.costs import Ceilings

SPIN_CYCLES = 1_000_000  # About half a millisecond: the host launches a graph while the GPU still spins.
GRAPH_SECONDS = 2e-3  # A graph holds about as many calls as fit, so that its edges do not count.
MOST_CALLS = 16


class Unavailable(Exception):
    """A peer that cannot run here, or cannot be timed, and why."""


@dataclass(frozen=True)
class Contestant:
    """One implementation: `run` is timed, on what `untimed` makes of `arguments(round)` on the device beforehand.

    `copies` rounds have different arguments. A run that holds `calls` repetitions is long: it is timed as it comes.
    """

    run: Callable[..., object]
    arguments: Callable[[int], tuple] = lambda _: ()
    untimed: Callable[..., tuple] = lambda *arguments: arguments
    copies: int = 1
    calls: int | None = None

    def operands(self, round_number: int) -> tuple:
        return self.untimed(*self.arguments(round_number))


class WallClock:
    """On a CPU, and a long run on a GPU: from the start to the end of it, the host's time included."""

    how = "as it comes"

    def __init__(self, contestant: Contestant, device: torch.device):
        self.contestant, self.device = contestant, device

    def seconds(self, round_number: int) -> float:
        """For one call."""
        operands, calls = self.contestant.operands(round_number), self.contestant.calls or 1
        if self.device.type == "cpu":
            start = perf_counter()
            self.contestant.run(*operands)
            return (perf_counter() - start) / calls
        return _between_events(self.device, lambda: self.contestant.run(*operands)) / calls


class GraphReplays:
    """One CUDA graph of several calls on rotated inputs; what is untimed lies in a graph before it."""

    def __init__(self, contestant: Contestant, device: torch.device, calls: int):
        self.device, self.calls = device, calls
        self.how = f"replays of a CUDA graph of {calls} calls"
        self.before, self.timed = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for i in range(2):
                contestant.run(*contestant.operands(i))
        torch.cuda.synchronize(device)
        arguments = [contestant.arguments(i) for i in range(calls)]
        # Two captures on one stream and pool, as autograd needs: the backward runs where its forward did.
        with torch.cuda.graph(self.before, stream=stream):
            # An empty graph would be warned of.
            marker = torch.zeros((), device=device)
            operands = [contestant.untimed(*x) for x in arguments]
        with torch.cuda.graph(self.timed, pool=self.before.pool(), stream=stream):
            results = [contestant.run(*x) for x in operands]
        del marker, operands, results  # Alive until here, so that no call writes where another did.

    def seconds(self, round_number: int) -> float:
        """For one call, whatever the round."""

        def ahead() -> None:
            self.before.replay()
            torch.cuda._sleep(SPIN_CYCLES)

        return _between_events(self.device, self.timed.replay, ahead) / self.calls


class AfterSpin:
    """Device events around a call that the host launched while the device spun, for what no graph can hold.

    Raises:
        Unavailable: the host is not through before the spin is, however long: the call waits for the device. Or the
            time depends on how long the device spins.
    """

    TOLERANCE = 0.03
    DOUBLINGS = 5

    def __init__(self, contestant: Contestant, device: torch.device, host: float, reason: str):
        self.contestant, self.device, self.reason = contestant, device, reason
        cycles_per_second = SPIN_CYCLES / _between_events(device, lambda: torch.cuda._sleep(SPIN_CYCLES))
        self.cycles = int(cycles_per_second * (2 * host + 5e-4))
        once = self._median()
        self.cycles *= 2
        twice = self._median()
        if abs(once - twice) > self.TOLERANCE * twice:
            raise self._unavailable(f"{once * 1e6:.0f} us after a spin, {twice * 1e6:.0f} us after one twice as long")
        self.how = f"after a spin of {self.cycles / cycles_per_second * 1e3:.1f} ms, as no graph can hold it: {reason}"

    def seconds(self, round_number: int) -> float:
        for _ in range(self.DOUBLINGS):
            operands = self.contestant.operands(round_number)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)
            torch.cuda._sleep(self.cycles)
            start.record()
            self.contestant.run(*operands)
            end.record()
            hidden = not start.query()
            end.synchronize()
            if hidden:
                return start.elapsed_time(end) / 1e3
            self.cycles *= 2
        raise self._unavailable("the host is never through before a spin is")

    def _median(self) -> float:
        return statistics.median(self.seconds(i) for i in range(5))

    def _unavailable(self, why: str) -> Unavailable:
        return Unavailable(f"its launches cannot be hidden: {why}; no CUDA graph can hold it: {self.reason}")


Stopwatch = WallClock | GraphReplays | AfterSpin


def stopwatch(contestant: Contestant, device: torch.device) -> Stopwatch:
    """What times this contestant, which has run before: a graph where one can hold it.

    Raises:
        Unavailable: neither a graph nor a spin hides its launches.
    """
    if device.type == "cpu" or contestant.calls is not None:
        return WallClock(contestant, device)
    rough = WallClock(contestant, device).seconds(0)
    calls = max(2, contestant.copies, min(MOST_CALLS, math.ceil(GRAPH_SECONDS / rough)))
    try:
        return GraphReplays(contestant, device, calls)
    except RuntimeError as error:
        reason = first_line(error)
    torch.cuda.synchronize(device)
    return AfterSpin(contestant, device, host_seconds(contestant, device), reason)


def host_seconds(contestant: Contestant, device: torch.device) -> float | None:
    """What one call takes on the host of a GPU, which need not wait for it: a median of 10. None for a long run."""
    if device.type == "cpu" or contestant.calls is not None:
        return None
    taken = []
    for i in range(10):
        operands = contestant.operands(i)
        torch.cuda.synchronize(device)
        start = perf_counter()
        contestant.run(*operands)
        taken.append(perf_counter() - start)
    torch.cuda.synchronize(device)
    return statistics.median(taken)


def first_line(error: Exception) -> str:
    """The type and the first line of a message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _between_events(
    device: torch.device, run: Callable[[], object], ahead: Callable[[], object] = lambda: None
) -> float:
    """Seconds on the device from what comes after `ahead` to the end of `run`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    ahead()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class CeilingMeter:
    """What a device reaches: copies of buffers of any size, bf16 products of one; each measured once, medians of 20."""

    def __init__(self, device: torch.device, matmul_size: int):
        self.device, self.matmul_size = device, matmul_size
        self._copies: dict[int, float] = {}
        self._product: float | None = None

    def at(self, copied_bytes: int) -> Ceilings:
        """The ceilings, the copy's between two buffers of so many bytes."""
        if self._product is None:
            n = self.matmul_size
            a, b = self._draw(n, n), self._draw(n, n)
            product = torch.empty_like(a)
            self._product = 2 * n**3 / self._median(lambda: torch.mm(a, b, out=product)) / 1e12
        if copied_bytes not in self._copies:
            source = self._draw(copied_bytes // 2)
            target = torch.empty_like(source)
            self._copies[copied_bytes] = 2 * copied_bytes / self._median(lambda: target.copy_(source)) / 1e9
        return Ceilings(self._copies[copied_bytes], self._product, copied_bytes)

    def _draw(self, *shape: int) -> torch.Tensor:
        """Random numbers: of zeros a product takes less power and time."""
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(shape, generator=generator, device=self.device, dtype=torch.bfloat16)

    def _median(self, run: Callable[[], object]) -> float:
        run()
        watch = stopwatch(Contestant(run), self.device)
        return statistics.median([watch.seconds(i) for i in range(25)][5:])
