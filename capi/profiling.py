"""Where the time of training steps goes: the host's by phase, always; the device's by a trace, where one is wanted."""

import gzip
import json
import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger("capi")

LARGEST = 60
WARM_UP_STEPS = 8  # In which kernels are compiled, and a CUDA graph is captured.
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
HOST_WORK = ("cpu_op",)


class HostTime:
    """Where the time of the main thread goes: in one phase at a time, `other` where none is named."""

    def __init__(self):
        self._seconds: dict[str, float] = defaultdict(float)
        self._phase, self._since = "other", time.perf_counter()

    @property
    def current(self) -> str:
        """The phase that the main thread is in, for other threads."""
        return self._phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within, time is the phase's; that around it gets none."""
        outer = self._phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def seconds(self) -> dict[str, float]:
        """Of each phase so far."""
        self._enter(self._phase)
        return dict(self._seconds)

    def since(self, earlier: dict[str, float]) -> dict[str, float]:
        return {phase: seconds - earlier.get(phase, 0.0) for phase, seconds in self.seconds().items()}

    def _enter(self, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now


@dataclass(frozen=True)
class StepProfile:
    """Of one step, on average; times in seconds."""

    steps: int
    span: float
    """From the first thing that the device did to the last, under the profiler."""
    busy: float
    """What of it the device worked; kernels side by side count once."""
    launches: float
    """Kernels, copies and fills."""
    kernels: list[tuple[str, float, float]]
    """Name, times run, seconds; the longest in all come first."""

    def text(self, step_seconds: float, host: dict[str, float] | None = None) -> str:
        """A table; the step takes `step_seconds` without a profiler, of which the host spends these in its phases."""
        total = sum(seconds for *_, seconds in self.kernels) or 1.0
        lines = [
            f"of {self.steps} steps: {step_seconds * 1e3:.3f} ms a step, {self.span * 1e3:.3f} under the profiler; "
            f"busy {self.busy * 1e3:.3f}; idle {self.idle_share(step_seconds):.1%}; launches {self.launches:.0f}"
        ]
        if host is not None:
            lines.append("host: " + ", ".join(f"{phase} {seconds * 1e3:.3f} ms" for phase, seconds in host.items()))
        for name, times, seconds in self.kernels[:LARGEST]:
            lines.append(f"{seconds * 1e3:9.3f} ms {seconds / total:6.1%} {times:7.1f}x  {name[:150]}")
        return "\n".join(lines) + "\n"

    def idle_share(self, step_seconds: float) -> float:
        """Of a step that takes so long without a profiler, which slows the host."""
        return max(0.0, 1 - self.busy / step_seconds)


def of_events(events: list[dict], steps: int, *, of_host: bool = False) -> StepProfile:
    """Of the events of a Chrome trace, whose times are microseconds.

    Of the host they are PyTorch's operations, each without those that it calls.

    Raises:
        ValueError: nothing was done.
    """
    categories = HOST_WORK if of_host else DEVICE_WORK
    work = sorted((e for e in events if e.get("cat") in categories), key=lambda e: (e["ts"], -e["dur"]))
    if not work:
        raise ValueError(f"expected work on the {'host' if of_host else 'device'}, got none")
    times: dict[str, int] = defaultdict(int)
    taken: dict[str, float] = defaultdict(float)
    callers: dict[object, list[tuple[float, str]]] = defaultdict(list)  # In each thread, those that have not ended.
    busy, last = 0.0, work[0]["ts"]
    for event in work:
        start, end, name = event["ts"], event["ts"] + event["dur"], event["name"]
        times[name] += 1
        taken[name] += event["dur"]
        if of_host:
            stack = callers[event["tid"]]
            while stack and stack[-1][0] <= start:
                stack.pop()
            if stack:
                taken[stack[-1][1]] -= event["dur"]
            stack.append((end, name))
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    kernels = [(name, times[name] / steps, seconds / 1e6 / steps) for name, seconds in taken.items()]
    kernels.sort(key=lambda kernel: -kernel[2])
    span = last - work[0]["ts"]
    return StepProfile(steps, span / 1e6 / steps, busy / 1e6 / steps, len(work) / steps, kernels)


def of_profiler(profiler: profile, steps: int, path: Path, *, of_host: bool = False) -> StepProfile:
    """Writes the trace to `path` (.json.gz) as well.

    Raises:
        ValueError: nothing was done.
        OSError: the file cannot be written.
    """
    profiler.export_chrome_trace(str(path))
    with gzip.open(path, "rt") as file:
        return of_events(json.load(file)["traceEvents"], steps, of_host=of_host)


class StepProfiler:
    """Times `steps` steps of a run, after a warm-up, then traces as many; leaves profile.txt and profile.json.gz."""

    def __init__(self, steps: int, host: HostTime, device: torch.device, run_dir: Path):
        self.steps, self.host, self.device, self.run_dir = steps, host, device, run_dir

    def step_ends(self, done: int) -> None:
        """Called after each step with the number of those that this process has taken; a trace that fails is logged."""
        if self.steps == 0:
            return
        if done == WARM_UP_STEPS:
            self._synchronize()
            self.host_began = self.host.seconds()
        elif done == WARM_UP_STEPS + self.steps:
            self._synchronize()
            taken = self.host.since(self.host_began)
            self.host_seconds = {phase: seconds / self.steps for phase, seconds in taken.items()}
            self.step_seconds = sum(self.host_seconds.values())  # The phases leave nothing out.
            cuda = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self.profiler = profile(activities=[ProfilerActivity.CPU, *cuda])
            with warnings.catch_warnings():
                # Unless it gathers the events of several cycles, which takes several times as long.
                warnings.filterwarnings("ignore", ".*Profiler clears events")
                self.profiler.start()
        elif done == WARM_UP_STEPS + 2 * self.steps:
            self._synchronize()
            self.profiler.stop()
            try:
                self._write()
            except (OSError, ValueError, RuntimeError) as error:
                logger.error("the steps were not profiled: %s", error)

    def _write(self) -> None:
        trace, table = self.run_dir / "profile.json.gz", self.run_dir / "profile.txt"
        on_gpu = self.device.type == "cuda"
        found = of_profiler(self.profiler, self.steps, trace, of_host=not on_gpu)
        of = (
            torch.cuda.get_device_name(self.device)
            if on_gpu
            else "CPU (PyTorch's operations, each without its callees)"
        )
        text = f"{of}\n{found.text(self.step_seconds, self.host_seconds)}"
        table.write_text(text)
        logger.info("profiled %d steps (%s, %s)\n%s", self.steps, table, trace, "\n".join(text.splitlines()[:13]))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
