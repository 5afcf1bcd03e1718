"""Runs that are asked to stop, in processes of their own, by real signals."""

import logging
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch._dynamo  # Each fork would import it anew.
from tiny_runs import TINIEST, assert_equal_states
from torch.distributed import HashStore

import capi.step
import capi.stopping
from capi.checkpoint import load_newest_checkpoint
from capi.data.synthetic import SyntheticScenes
from capi.step import Trainer
from capi.train import main

LONG = 100.0  # Seconds in which everything here has ended, on the busiest machine.


class Run:
    """A training in a fork of this process: a new interpreter would take seconds to import PyTorch."""

    def __init__(self, folder: Path, *options: str, environment: dict[str, str] | None = None, prepare=lambda: None):
        self.folder = folder
        self.log = folder / f"log{len(list(folder.glob('log*')))}"
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
                status = main(self.arguments)
            finally:
                os._exit(status)

    def _become(self, environment: dict[str, str]) -> None:
        os.setpgid(0, 0)
        file = os.open(self.log, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
        torch.set_num_threads(1)
        os.environ.update(environment)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LONG
        while not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def wait_for_steps(self, n: int) -> None:
        metrics = self.folder / "run" / "metrics.jsonl"
        self.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= n)

    def wait_for_words(self, words: str) -> None:
        self.wait_for(lambda: words in self.said())

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

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


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs = []

    def begin(*options: str, **how) -> Run:
        runs.append(Run(tmp_path, *options, **how))
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


def readers_that_hang_on(flag: Path) -> Callable[[], None]:
    """Once the flag is there, images are read from a pipe that nobody writes to."""
    pipe = flag.with_suffix(".pipe")
    os.mkfifo(pipe)

    def prepare() -> None:
        original = SyntheticScenes.image

        def image(self, index):
            if flag.exists():
                print("reading", flush=True)
                pipe.read_bytes()
            return original(self, index)

        SyntheticScenes.image = image

    return prepare


def step_that_hangs(step: int) -> None:
    """In a call that no handler interrupts, as a reduction is that waits for a rank."""
    original = Trainer.step

    def hanging(self, batches, number, *launched):
        if number == step:
            print("hanging", flush=True)
            HashStore().wait(["never"])
        return original(self, batches, number, *launched)

    Trainer.step = hanging


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_a_run_that_waits_for_data_stops_at_once_with_a_checkpoint(num_workers, tmp_path, start) -> None:
    prepare = readers_that_hang_on(tmp_path / "flag")
    run = start("--optim.steps", "100000", "--data.num_workers", num_workers, prepare=prepare)
    run.wait_for_steps(2)
    (tmp_path / "flag").touch()
    run.wait_for(lambda: run.said().count("reading") == max(1, int(num_workers)))
    time.sleep(0.2)
    began = run.send(signal.SIGTERM)
    assert run.status() == 128 + signal.SIGTERM, run.said()
    assert time.monotonic() - began < 8
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    assert steps_saved(tmp_path) == lines
    assert f"stopped by SIGTERM after step {lines};" in run.said()
    assert "Traceback" not in run.said()


@pytest.mark.parametrize("second", [None, signal.SIGTERM, signal.SIGINT])
def test_a_step_that_hangs_is_left_with_the_last_whole_one_saved(second, tmp_path, start) -> None:
    timeout = "60" if second else "1"
    run = start("--run.stop_timeout", timeout, "--run.checkpoint_every", "100", prepare=lambda: step_that_hangs(2))
    run.wait_for_words("hanging")
    began = run.send(signal.SIGTERM)
    if second:
        time.sleep(0.3)
        run.send(second)
    assert run.status() == 128 + signal.SIGTERM, run.said()
    assert time.monotonic() - began < 30
    assert steps_saved(tmp_path) == 2
    assert "saved step 2; the same command goes on from there" in run.said()
    if second is None:
        assert start().status() == 0
        assert start("--run.output_dir", str(tmp_path / "whole")).status() == 0
        states = (load_newest_checkpoint(tmp_path / name)["trainer"] for name in ("run", "whole"))
        assert_equal_states(*states)


def test_a_state_amid_its_update_is_not_saved(tmp_path, start) -> None:
    def hang_in_update() -> None:
        capi.stopping.LAST_CHECKPOINT_SECONDS = 1.0
        original = capi.step.update_ema

        def update_ema(*arguments) -> None:
            original(*arguments)
            if (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1:
                print("hanging", flush=True)
                HashStore().wait(["never"])

        capi.step.update_ema = update_ema

    run = start("--run.stop_timeout", "0.5", prepare=hang_in_update)
    run.wait_for_words("hanging")
    run.send(signal.SIGUSR2)
    assert run.status() == 128 + signal.SIGUSR2, run.said()
    assert steps_saved(tmp_path) is None


def test_a_signal_before_the_first_step_ends_the_run(tmp_path, start) -> None:
    (tmp_path / "flag").touch()
    run = start(prepare=readers_that_hang_on(tmp_path / "flag"))
    run.wait_for_words("reading")
    run.send(signal.SIGINT)
    assert run.status() == 128 + signal.SIGINT, run.said()
    assert steps_saved(tmp_path) is None
    (tmp_path / "flag").unlink()
    assert start().status() == 0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def two_ranks(start: Callable[..., Run], *options: str, prepare: Callable[[], None] = lambda: None) -> list[Run]:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [start(*options, environment=shared | {"RANK": str(rank)}, prepare=prepare) for rank in range(2)]


def test_ranks_stop_together_while_one_waits_for_data(tmp_path, start) -> None:
    """Rank 0 gets no signal."""
    hang = readers_that_hang_on(tmp_path / "flag")
    ranks = two_ranks(start, "--optim.steps", "100000", prepare=lambda: os.environ["RANK"] == "1" and hang())
    ranks[0].wait_for_steps(2)
    (tmp_path / "flag").touch()
    ranks[1].wait_for_words("reading")
    ranks[1].send(signal.SIGTERM)
    assert [rank.status() for rank in ranks] == [143, 143], ranks[0].said()
    assert "stopped by a signal on another rank" in ranks[0].said()
    state = load_newest_checkpoint(tmp_path / "run")
    assert state["step"] == (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    assert [stream["layout"]["rank"] for stream in state["streams"]] == [0, 1]


@pytest.mark.parametrize("end", [signal.SIGSTOP, signal.SIGKILL])
def test_a_run_whose_other_rank_hangs_or_is_gone_stops_with_a_checkpoint(end, tmp_path, start) -> None:
    ranks = two_ranks(start, "--optim.steps", "100000", "--run.stop_timeout", "1", "--run.checkpoint_every", "100000")
    ranks[0].wait_for_steps(2)
    if end == signal.SIGKILL:
        ranks[0].send(signal.SIGSTOP)  # The signal comes before it finds the other gone.
    ranks[1].send(end)
    ranks[0].send(signal.SIGTERM)
    ranks[0].send(signal.SIGCONT)
    assert ranks[0].status() == 143, ranks[0].said()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    assert steps_saved(tmp_path) in (lines, lines + 1)
    assert "the same command goes on from there" in ranks[0].said()
    streams = load_newest_checkpoint(tmp_path / "run")["streams"]
    assert [stream["step"] for stream in streams] == [steps_saved(tmp_path), 0], "that of the other is its last known"


def test_a_worker_stops_when_torchrun_is_gone(tmp_path, start) -> None:
    """As when a signal that torchrun does not handle ends it."""

    def launch() -> None:
        worker = os.fork()
        if worker:
            (tmp_path / "worker").write_text(str(worker))
            signal.pause()
        signal.alarm(int(LONG))  # It must not outlive this test for long.
        os.setsid()  # as torchrun has it

    run = start("--optim.steps", "100000", environment={"TORCHELASTIC_RUN_ID": "none"}, prepare=launch)
    run.wait_for_steps(2)
    run.send(signal.SIGUSR2)
    assert run.status() == -signal.SIGUSR2
    run.wait_for_words("stopped by SIGTERM after step")
    run.wait_for(lambda: (tmp_path / "run" / "checkpoints").exists())
    worker = Path("/proc", (tmp_path / "worker").read_text(), "stat")
    run.wait_for(lambda: not worker.exists() or worker.read_text().rpartition(")")[2].split()[0] == "Z")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    assert steps_saved(tmp_path) == lines


def test_a_run_outlives_the_shell_that_started_it(tmp_path, start) -> None:
    """Without torchrun, as with nohup."""

    def launch() -> None:
        if os.fork():
            os._exit(0)

    run = start("--optim.steps", "40", prepare=launch)
    assert run.status() == 0
    run.wait_for(lambda: (tmp_path / "run" / "encoder.safetensors").exists())


def test_tasks_of_a_slurm_step_train_one_run(tmp_path, start) -> None:
    step = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    step["SLURM_STEP_NODELIST"] = "localhost"
    tasks = [start(environment=step | {"SLURM_PROCID": n, "SLURM_LOCALID": n}) for n in ("0", "1")]
    assert [task.status() for task in tasks] == [0, 0], tasks[0].said()
    assert "8 images a step over 2 process(es)" in tasks[0].said()
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 6
