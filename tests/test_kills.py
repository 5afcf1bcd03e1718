"""A training that is killed at instants that nobody chose ends as one that was not; `make soak` kills fifty."""

import multiprocessing
import random
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import ranks  # noqa: F401 (names what the server imports once)
from tiny_runs import assert_equal_states, metrics_of, tiniest

from capi.checkpoint import load_newest_checkpoint, newest_checkpoint, step_of
from capi.train import main

STEPS = "30"


def train(arguments: list[str]) -> None:
    sys.exit(main(arguments))


@pytest.fixture
def run(tmp_path: Path) -> Iterator:
    """Starts the training in a fork of a server: a new interpreter would take seconds to import PyTorch."""
    processes = []

    def start() -> BaseProcess:
        arguments = [*tiniest(tmp_path), "--optim.steps", STEPS, "--run.checkpoint_every", "1"]
        process = multiprocessing.get_context("forkserver").Process(target=train, args=(arguments,))
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_three_kills_change_no_bit(tmp_path, run) -> None:
    rng, folder = random.Random(0), tmp_path / "run"
    steps = [0]
    for _ in range(3):
        process, deadline = run(), time.monotonic() + 60
        while (newest := newest_checkpoint(folder)) is None or step_of(newest) <= steps[-1]:
            assert time.monotonic() < deadline
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join(60)
        assert process.exitcode == -9
        steps.append(load_newest_checkpoint(folder)["step"])
    assert 0 < steps[1] < steps[2] < steps[3] < int(STEPS)
    last = run()
    last.join(60)
    assert last.exitcode == 0
    assert main([*tiniest(tmp_path), "--optim.steps", STEPS, "--run.output_dir", str(tmp_path / "whole")]) == 0
    assert_equal_states(*(load_newest_checkpoint(tmp_path / name)["trainer"] for name in ("run", "whole")))
    assert [line["step"] for line in metrics_of(folder)] == [line["step"] for line in metrics_of(tmp_path / "whole")]
