"""The profile of a contestant's training steps: its table in a file, its figures for the results."""

import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import Contestant, first_line
from capi.profiling import of_profiler


def inspect(contestant: Contestant, step_seconds: float, path: Path) -> dict:
    """Profiles one run, writes the table to `path` and returns what the results file says of it.

    Never raises: the times are measured by then.
    """
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            contestant.run(*contestant.operands(0))
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            found = of_profiler(profiler, contestant.calls or 1, Path(folder) / "trace.json.gz")
        path.write_text(found.text(step_seconds))
    except Exception as error:
        return {"profile": f"failed: {first_line(error)}"}
    share = found.idle_share(step_seconds)
    return {"gpu_busy_seconds": found.busy, "gpu_idle_share": share, "launches": round(found.launches)}
