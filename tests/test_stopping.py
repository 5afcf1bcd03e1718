"""Runs that are asked to stop, in processes of their own, by real signals."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked_runs import LONG, Run, forks, start_ranks, steps_saved
from tiny_runs import assert_equal_states, free_port
from torch.distributed import HashStore

import capi.step
import capi.stopping
from capi.checkpoint import load_newest_checkpoint
from capi.data.synthetic import SyntheticScenes
from capi.step import Trainer


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    with forks(tmp_path) as begin:
        yield begin


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


@pytest.mark.parametrize(("size", "told", "signum"), [(2, 1, signal.SIGUSR2), (3, 0, signal.SIGTERM)])
def test_ranks_stop_together_while_one_waits_for_data(size, told, signum, tmp_path, start) -> None:
    """One rank alone gets a signal; all end with its status."""
    hang = readers_that_hang_on(tmp_path / "flag")
    options = ("--optim.steps", "100000", "--optim.batch_size", "12")
    ranks = start_ranks(start, size, *options, prepare=lambda: os.environ["RANK"] == str(told) and hang())
    ranks[0].wait_for_steps(2)
    (tmp_path / "flag").touch()
    ranks[told].wait_for_words("reading")
    began = ranks[told].send(signum)
    assert [rank.status() for rank in ranks] == [128 + signum] * size, ranks[0].said()
    assert time.monotonic() - began < 15
    other = "" if told == 0 else " on another rank"
    assert f"stopped by {signal.Signals(signum).name}{other} after step" in ranks[0].said()
    state = load_newest_checkpoint(tmp_path / "run")
    assert state["step"] == (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    assert [stream["layout"]["rank"] for stream in state["streams"]] == list(range(size))


@pytest.mark.parametrize("end", [signal.SIGSTOP, signal.SIGKILL])
def test_a_run_whose_other_rank_hangs_or_is_gone_stops_with_a_checkpoint(end, tmp_path, start) -> None:
    ranks = start_ranks(
        start, 2, "--optim.steps", "100000", "--run.stop_timeout", "1", "--run.checkpoint_every", "100000"
    )
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
