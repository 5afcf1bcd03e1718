"""Ranks that are lost, in processes of their own: killed, stopped, asleep, failing or not finite."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from forked_runs import LONG, Run, forks, start_ranks, steps_saved
from tiny_runs import assert_equal_states
from torch.distributed import HashStore
from torch.distributed.launcher import LaunchConfig, elastic_launch

import capi.watchdog
from capi.checkpoint import load_newest_checkpoint
from capi.distributed import World
from capi.profiling import HostTime
from capi.step import Trainer
from capi.train import main
from capi.watchdog import EXIT_STATUS, Beat, Lost, Watchdog, where

OPTIONS = ("--optim.steps", "100000", "--optim.batch_size", "12", "--run.checkpoint_every", "100000")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    with forks(tmp_path) as begin:
        yield begin


def in_step(step: int, rank: int, work: Callable[[Trainer], None]) -> Callable[[], None]:
    """Has a rank do more before that step."""

    def prepare() -> None:
        original = Trainer.step

        def other(self, batches, number, *launched):
            if number == step and self.world.rank == rank:
                work(self)
            return original(self, batches, number, *launched)

        Trainer.step = other

    return prepare


def asleep(_: Trainer) -> None:
    time.sleep(600)


@pytest.mark.parametrize("lost", [0, 1])
def test_the_others_name_a_rank_that_was_killed(lost, tmp_path, start) -> None:
    ranks = start_ranks(start, 3, *OPTIONS, "--distributed.timeout", "5")
    ranks[0].wait_for_steps(4)
    ranks[lost].send(signal.SIGKILL)
    for rank in set(range(3)) - {lost}:
        assert ranks[rank].status() == EXIT_STATUS == 75, ranks[rank].said()
        named = rf"^error: rank {lost} \(.*, pid {ranks[lost].pid}\) has not finished step \d+ for .* no sign of life"
        assert re.search(named, ranks[rank].said(), re.MULTILINE), ranks[rank].said()
        assert "Traceback" not in ranks[rank].said()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    assert steps_saved(tmp_path) in ((None,) if lost == 0 else (lines, lines + 1))


@pytest.mark.parametrize(("lost", "how"), [(0, "stopped"), (1, "stopped"), (0, "asleep"), (1, "asleep")])
def test_a_rank_that_is_stuck_ends_all_of_them(lost, how, tmp_path, start) -> None:
    """One asleep goes on to beat."""

    def prepare() -> None:
        capi.watchdog.SLOW_TIMES = 1  # Steps are long where others compute as well.
        if how == "asleep":
            in_step(5, lost, asleep)()

    ranks = start_ranks(start, 2, *OPTIONS, "--distributed.timeout", "3", prepare=prepare)
    ranks[0].wait_for_steps(4)
    began = time.monotonic()
    if how == "stopped":
        ranks[lost].send(signal.SIGSTOP)
    for rank in range(2) if how == "asleep" else [1 - lost]:
        assert ranks[rank].status() == EXIT_STATUS, ranks[rank].said()
        named = rf"^error: rank {lost} \(.*, pid {ranks[lost].pid}\) has not finished step \d+ for \d+ s"
        found = re.findall(named, ranks[rank].said(), re.MULTILINE)
        assert len(found) == 1, ranks[rank].said()
        assert ranks[rank].said().count("has not finished") == 1
        assert ("no sign of life" in ranks[rank].said()) == (how == "stopped")
        if rank == lost or how == "stopped":  # Else the other may have left before, and the main thread found it gone.
            stacks = (tmp_path / "run" / f"stacks-rank{rank}.txt").read_text()
            assert "most recent call first" in stacks
            assert (re.search(r"line \d+ in asleep", stacks) is not None) == (rank == lost)
    assert 2 < time.monotonic() - began < 20
    if how == "asleep":
        assert "in asleep" in ranks[1 - lost].said()
    if lost == 1 or how == "asleep":
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
        assert steps_saved(tmp_path) == lines


def test_ranks_that_were_all_stopped_go_on(tmp_path, start) -> None:
    """As by `scontrol suspend`, for longer than the timeout, and one after the other."""
    ranks = start_ranks(start, 2, *OPTIONS, "--distributed.timeout", "2")
    ranks[0].wait_for_steps(4)
    for signum, seconds in ((signal.SIGSTOP, 3.0), (signal.SIGCONT, 0.1)):
        for rank in ranks:
            rank.send(signum)
            time.sleep(seconds / 2)
    ranks[0].wait_for_steps((tmp_path / "run" / "metrics.jsonl").read_text().count("\n") + 3)
    time.sleep(1)
    ranks[0].send(signal.SIGTERM)
    assert [rank.status() for rank in ranks] == [143, 143], ranks[0].said() + ranks[1].said()


def test_the_others_say_what_a_rank_failed_of(tmp_path, start) -> None:
    def fail(_: Trainer) -> None:
        raise TypeError("expected a bowl of petunias")

    ranks = start_ranks(start, 2, *OPTIONS, prepare=in_step(5, 1, fail))
    assert ranks[1].status() == 70  # As the test has it of an exception.
    assert "Traceback" in ranks[1].said()
    assert ranks[0].status() == EXIT_STATUS, ranks[0].said()
    assert re.search(r"^error: rank 1 \(.*\) failed: TypeError: expected a bowl", ranks[0].said(), re.MULTILINE)
    assert "Traceback" not in ranks[0].said()
    assert steps_saved(tmp_path) == 5


def gradients(trainer: Trainer) -> None:
    trainer.model.student.backbone.mask_token.register_hook(lambda gradient: gradient * torch.nan)


def clustering_gradients(trainer: Trainer) -> None:
    trainer.model.teacher["head"].layer.weight.register_hook(lambda gradient: gradient * torch.nan)


def teacher_features(trainer: Trainer) -> None:
    original = trainer.model.teacher_features
    trainer.model.teacher_features = lambda images: original(images) * torch.nan


@pytest.mark.parametrize("poison", [gradients, clustering_gradients, teacher_features])
def test_a_rank_whose_numbers_are_not_finite_is_named(poison, start) -> None:
    """Though all ranks' losses and gradients are not finite after what they reduce."""
    ranks = start_ranks(start, 2, *OPTIONS, prepare=in_step(5, 1, poison))
    what = "teacher features" if poison is teacher_features else "gradients"
    for rank in ranks:
        assert rank.status() == 1
        assert re.search(rf"^error: rank 1's {what} are not finite; ", rank.said(), re.MULTILINE), rank.said()


@pytest.mark.parametrize("lost", [0, 1])
def test_torchrun_starts_the_ranks_again_and_nothing_is_lost(lost, tmp_path, start) -> None:
    """The weights are those of two ranks of which none was killed, bit for bit."""

    def die(_: Trainer) -> None:
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    def rank(arguments: list[str]) -> None:
        in_step(4, lost, die)()
        if status := main(arguments):
            os._exit(status)

    how = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0")
    how.max_restarts, how.start_method, how.monitor_interval, how.run_id = 1, "fork", 0.1, "test"
    run = start("--distributed.timeout", "5", command=lambda arguments: not elastic_launch(how, rank)(arguments))
    assert run.status() == 0, run.said()
    assert "resuming after step" in run.said()
    assert [rank.status() for rank in start_ranks(start, 2, "--run.output_dir", str(tmp_path / "whole"))] == [0, 0]
    states = (load_newest_checkpoint(tmp_path / name)["trainer"] for name in ("run", "whole"))
    assert_equal_states(*states)


def test_a_step_that_takes_long_is_logged_with_the_stacks(tmp_path, start) -> None:
    stacks = tmp_path / "run" / "stacks-rank0.txt"

    def sluggish(_: Trainer) -> None:
        deadline = time.monotonic() + LONG
        while not stacks.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)

    def prepare() -> None:
        capi.watchdog.BEAT_SECONDS, capi.watchdog.SLOW_SECONDS, capi.watchdog.SLOW_TIMES = 0.1, 0.5, 2
        in_step(4, 0, sluggish)()

    run = start(prepare=prepare)
    assert run.status() == 0, run.said()
    line = rf"step 5 takes \d+ s, where [\d.e-]+ s are usual: other, .* in sluggish; stacks in {stacks}"
    assert len(re.findall(line, run.said())) == 1, run.said()
    assert re.search(r"step 5 has ended after [1-9]\d* s", run.said())
    assert "in sluggish" in stacks.read_text()


@pytest.mark.parametrize(("phase", "overdue"), [("launch", True), ("launch", False), ("evaluation", False)])
def test_a_rank_waits_for_one_that_evaluates(phase, overdue, tmp_path, caplog) -> None:
    """It is the rank behind whose own limit counts."""
    watchdog = Watchdog(World(1, 2, torch.device("cpu")), timeout=60.0)
    watchdog._store, watchdog._run_dir = HashStore(), tmp_path
    for step in range(5):
        watchdog.step_begins(step)
    watchdog._began -= 100
    behind, here = Beat(1, 4, 100.0, phase, "a.py:1 in f", False, overdue), watchdog._beat(1)
    assert here.overdue
    watchdog._beats = [json.dumps(asdict(beat)).encode() for beat in (behind, replace(here, waits=True))]
    named = "this process has not finished step 5 for 100 s; it is at: launch, a.py:1 in f"
    assert watchdog._judge() == (named if overdue else None)
    watchdog._notice_slow_step()
    assert ("step 5 takes 100 s" in caplog.text) == (phase == "launch")


def test_an_error_of_a_connection_is_named_once() -> None:
    """What is raised for it says "connection" itself."""
    watchdog = Watchdog(World(0, 2, torch.device("cpu")), timeout=1.0)
    watchdog._store = HashStore()
    named = pytest.raises(Lost, match=r"connection to another rank broke: \[gloo\] reset")
    with named as caught, watchdog.steps(HostTime(), Path(), lambda: None):
        raise RuntimeError("[gloo] reset\nand more")
    assert not watchdog._is_of_a_lost_rank(caught.value)


def test_who_waits_for_others_is_told_by_the_stack() -> None:
    frame = sys._getframe()
    assert where(frame) == (False, f"test_watchdog.py:{frame.f_lineno} in {frame.f_code.co_name}")
    weight = torch.ones(1, requires_grad=True)
    seen = []
    weight.register_hook(lambda gradient: seen.append(where(sys._getframe().f_back)))
    (weight * 2).sum().backward()
    assert seen[0][0]  # The hook's caller is the engine, in which gradients are averaged.


def test_its_threads_end_with_it() -> None:
    """One within the store, at the end of the interpreter, would abort the process."""
    store = HashStore()
    watchdog = Watchdog(World(0, 1, torch.device("cpu"), store), 60.0)
    watchdog._store = store
    for target in (watchdog._exchange, watchdog._watch):
        watchdog._start(target)
    assert all(thread.is_alive() for thread in watchdog._threads)
    watchdog.__exit__(None, None, None)
    assert not any(thread.is_alive() for thread in watchdog._threads)
