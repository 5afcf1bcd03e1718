"""Trainings by the command line, in processes of their own that are ended with the test; and what they leave."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tiny_runs import TINIEST
from torch import Tensor

from capi.checkpoint import load_newest_checkpoint, newest_checkpoint, step_of

ROOT = Path(__file__).parents[2]
LONG = 300.0  # Seconds in which everything here has ended, on the busiest machine.


def steps_saved(run_dir: Path) -> int | None:
    """What stands in a checkpoint, and under which name, is known here alone."""
    newest = newest_checkpoint(run_dir)
    return None if newest is None else step_of(newest)


def weights(run_dir: Path) -> dict[str, Tensor]:
    """Model and optimisers after the last step."""
    return load_newest_checkpoint(run_dir)["trainer"]


def begun_files(run_dir: Path) -> list[Path]:
    """What a kill amid a checkpoint leaves of it."""
    return list((run_dir / "checkpoints").glob(".*"))


class Run:
    """`python -m capi.train`, in a session of its own.

    fault: of `injected.py`. shell: what a shell does before it, with mounts that nobody else sees. within: a command
    that runs it.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        fault: str = "",
        shell: str = "",
        within: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ):
        self.folder, self.log = folder, folder / f"log{len(list(folder.glob('log*')))}"
        (folder / "tiniest.yaml").write_text(TINIEST)
        command = [sys.executable, *([str(Path(__file__).with_name("injected.py"))] if fault else ["-m", "capi.train"])]
        command += ["--config", str(folder / "tiniest.yaml"), "--run.output_dir", str(folder / "run"), *options]
        if shell:
            command = ["unshare", *root(), "--mount", "sh", "-ec", f'{shell}\nexec "$@"', "sh", *command]
        command = [*within, *command]
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CAPI_FAULT": fault, "TORCH_CPP_LOG_LEVEL": "ERROR"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | own | (environment or {}), start_new_session=True
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def lines(self) -> int:
        metrics = self.folder / "run" / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LONG
        while not condition():
            assert time.monotonic() < deadline, self.said()[-2000:]
            assert self.process.poll() is None, self.said()[-2000:]
            time.sleep(0.01)

    def wait_for_steps(self, n: int) -> None:
        self.wait_for(lambda: self.lines() >= n)

    def send(self, signum: int) -> None:
        os.kill(self.process.pid, signum)

    def status(self, seconds: float = LONG) -> int:
        """The exit status, or minus the signal that ended it."""
        return self.process.wait(seconds)

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # Its loaders as well.
        self.process.wait()


def root() -> list[str]:
    """What lets `unshare` make namespaces: nothing for root, who may, and root within its own for others."""
    return [] if os.geteuid() == 0 else ["--map-root-user"]


def namespaces() -> bool:
    """Whether this machine lets us have a mount and a network of our own."""
    done = subprocess.run(["unshare", *root(), "--mount", "--net", "mount", "-t", "tmpfs", "none", "/mnt"], check=False)
    return done.returncode == 0


def metrics_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
