"""What the device does in training steps: how long it is busy and idle, what is launched, the largest kernels."""

import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import Contestant, first_line

LARGEST = 60
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


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

    def text(self, step_seconds: float) -> str:
        """A table; the step takes `step_seconds` without a profiler."""
        total = sum(seconds for *_, seconds in self.kernels) or 1.0
        lines = [
            f"of {self.steps} steps: {step_seconds * 1e3:.3f} ms a step, {self.span * 1e3:.3f} under the profiler; "
            f"busy {self.busy * 1e3:.3f}; idle {self.idle_share(step_seconds):.1%}; launches {self.launches:.0f}"
        ]
        for name, times, seconds in self.kernels[:LARGEST]:
            lines.append(f"{seconds * 1e3:9.3f} ms {seconds / total:6.1%} {times:7.1f}x  {name[:150]}")
        return "\n".join(lines) + "\n"

    def idle_share(self, step_seconds: float) -> float:
        """Of a step that takes so long without a profiler, which slows the host."""
        return max(0.0, 1 - self.busy / step_seconds)


def of_events(events: list[dict], steps: int) -> StepProfile:
    """Of the events of a Chrome trace, whose times are microseconds.

    Raises:
        ValueError: the device did nothing.
    """
    work = sorted((e for e in events if e.get("cat") in DEVICE_WORK), key=lambda e: e["ts"])
    if not work:
        raise ValueError("expected work on the device, got none")
    by_name: dict[str, list[float]] = defaultdict(list)
    busy, last = 0.0, work[0]["ts"]
    for event in work:
        start, end = event["ts"], event["ts"] + event["dur"]
        by_name[event["name"]].append(event["dur"])
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    kernels = [(name, len(taken) / steps, sum(taken) / 1e6 / steps) for name, taken in by_name.items()]
    kernels.sort(key=lambda kernel: -kernel[2])
    span = last - work[0]["ts"]
    return StepProfile(steps, span / 1e6 / steps, busy / 1e6 / steps, len(work) / steps, kernels)


def inspect(contestant: Contestant, step_seconds: float, path: Path) -> dict:
    """Profiles one run, writes the table to `path` and returns what the results file says of it.

    Never raises: the times are measured by then.
    """
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            contestant.run(*contestant.operands(0))
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            found = of_events(json.loads(trace.read_text())["traceEvents"], contestant.calls or 1)
        path.write_text(found.text(step_seconds))
    except Exception as error:
        return {"profile": f"failed: {first_line(error)}"}
    share = found.idle_share(step_seconds)
    return {"gpu_busy_seconds": found.busy, "gpu_idle_share": share, "launches": round(found.launches)}
