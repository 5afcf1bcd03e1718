"""Trainings in forks of the test's process, one or several ranks: real signals end them."""

import faulthandler
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch._dynamo  # Each fork would import it anew.
from tiny_runs import TINIEST, free_port

from capi.checkpoint import load_newest_checkpoint
from capi.train import main

LONG = 100.0  # Seconds in which everything here has ended, on the busiest machine.


class Run:
    """A training in a fork of this process: a new interpreter would take seconds to import PyTorch."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        environment: dict[str, str] | None = None,
        prepare: Callable[[], None] = lambda: None,
        command: Callable[[list[str]], int] = main,
    ):
        self.folder = folder
        self.log = folder / f"log{len(list(folder.glob('log*')))}"
        self.log.touch()
        (folder / "tiniest.yaml").write_text(TINIEST)
        self.arguments = ["--config", str(folder / "tiniest.yaml"), "--run.output_dir", str(folder / "run"), *options]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of the threads of pytest-xdist.
            self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                self._become(environment or {})
                prepare()
                status = command(self.arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def _become(self, environment: dict[str, str]) -> None:
        os.setpgid(0, 0)
        file = os.open(self.log, os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
        logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
        faulthandler.enable(sys.stderr)
        torch.set_num_threads(1)
        os.environ.update(environment)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LONG
        while not condition():
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGABRT)  # It says where it is.
                time.sleep(1)
                raise AssertionError(self.said())
            time.sleep(0.02)

    def wait_for_steps(self, n: int) -> None:
        metrics = self.folder / "run" / "metrics.jsonl"
        self.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= n)

    def wait_for_words(self, words: str) -> None:
        self.wait_for(lambda: words in self.said())

    def said(self) -> str:
        return self.log.read_text()

    def send(self, signum: int) -> float:
        os.kill(self.pid, signum)
        return time.monotonic()

    def status(self) -> int:
        """The exit status, or minus the signal that ended it."""
        status: list[int] = []

        def ended() -> bool:
            pid, code = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                status.append(os.waitstatus_to_exitcode(code))
            return bool(pid)

        self.wait_for(ended)
        return status[0]


@contextmanager
def forks(folder: Path) -> Iterator[Callable[..., Run]]:
    """What starts runs in the folder; those that are left at the end are killed."""
    runs = []

    def begin(*options: str, **how) -> Run:
        runs.append(Run(folder, *options, **how))
        return runs[-1]

    yield begin
    for run in runs:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)  # Its loaders as well.
        with suppress(ChildProcessError):
            os.waitpid(run.pid, 0)


def steps_saved(folder: Path) -> int | None:
    state = load_newest_checkpoint(folder / "run")
    return None if state is None else state["step"]


def start_ranks(
    start: Callable[..., Run], size: int, *options: str, prepare: Callable[[], None] = lambda: None
) -> list[Run]:
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [start(*options, environment=shared | {"RANK": str(rank)}, prepare=prepare) for rank in range(size)]
