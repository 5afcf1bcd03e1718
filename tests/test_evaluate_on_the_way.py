"""Evaluations within a run: what they write, and what they must leave alone."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from images import encoded
from PIL import Image
from ranks import run_ranks
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tiny_runs import assert_equal_states, load_tiniest, metrics_of, tiniest

from capi import pretrained
from capi.checkpoint import load_newest_checkpoint
from capi.config_check import check_config
from capi.evaluate import evaluate_labelled, on_the_way, synthetic
from capi.evaluate.labelled import open_labelled
from capi.evaluate.probes import Grid
from capi.train import main


@pytest.fixture
def small(monkeypatch) -> None:
    for name, value in {"BANK_IMAGES": 48, "QUERY_IMAGES": 32, "BANK_PATCHES": 256, "QUERY_PATCHES": 128}.items():
        monkeypatch.setattr(synthetic, f"_{name}", value)
    grid = Grid((1e-2,), (0.0,), iterations=5)
    monkeypatch.setattr(synthetic, "_GRID", grid)
    monkeypatch.setattr(on_the_way, "_GRID", grid)


@pytest.fixture
def pictures(tmp_path) -> Path:
    for part, n in (("train", 12), ("test", 6)):
        for index in range(n):
            path = tmp_path / part / f"class {index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(Image.new("RGB", (20, 20), (20 * index, 200 * (index % 2), 0))))
    return tmp_path


def evaluating(tmp_path: Path, *more: str) -> list[str]:
    return [*tiniest(tmp_path), "--run.evaluate_every", "2", *more]


def scores_of(run_dir: Path) -> dict[int, dict[str, float]]:
    lines = [line for line in metrics_of(run_dir) if any(key.startswith("eval_") for key in line)]
    return {line.pop("step"): line for line in lines}


@pytest.mark.usefixtures("small")
def test_held_out_scenes_are_evaluated_and_nothing_of_the_run_changes(tmp_path):
    assert main(evaluating(tmp_path, "--optim.steps", "5")) == 0
    run_dir = tmp_path / "run"
    scores = scores_of(run_dir)
    assert list(scores) == [1, 3, 4]
    for line in scores.values():
        assert set(line) == {"eval_image_knn", "eval_image_linear", "eval_patch_knn", "eval_patch_miou"}
        assert all(0 <= score <= 1 for score in line.values())
    (events,) = run_dir.glob("events.out.tfevents.*")
    written = [
        (event.step, value.tag)
        for event in EventFileLoader(str(events)).Load()
        for value in event.summary.value
        if value.tag.startswith("eval_")
    ]
    assert {step for step, _ in written} == {1, 3, 4}
    assert len(written) == 12

    assert main([*tiniest(tmp_path), "--optim.steps", "5", "--run.output_dir", str(tmp_path / "without")]) == 0
    one, other = (load_newest_checkpoint(tmp_path / name)["trainer"] for name in ("run", "without"))
    assert_equal_states(one, other)
    own = ("loss", "clustering_loss", "target_entropy", "dead_prototypes")
    losses = [
        [[line[key] for key in own] for line in metrics_of(tmp_path / name) if "loss" in line]
        for name in ("run", "without")
    ]
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("small")
def test_labelled_images_are_evaluated_by_the_moving_average(tmp_path, pictures):
    sources = [f"folder:{pictures / part}" for part in ("train", "test")]
    options = ["--run.evaluate_train", sources[0], "--run.evaluate_test", sources[1], "--optim.steps", "4"]
    assert main(evaluating(tmp_path, *options)) == 0
    scores = scores_of(tmp_path / "run")
    assert list(scores) == [1, 3]
    encoder = pretrained.load(tmp_path / "run")
    train, test = (open_labelled(source, part) for source, part in zip(sources, ("train", "test"), strict=True))
    alone = evaluate_labelled(encoder, train, test, image_size=16, grid=on_the_way._GRID, crops=0)
    names = ("global", "patch_mean", "global_and_patch_mean")
    assert list(scores[3]) == [f"eval_{probe}_{name}" for probe in ("knn", "linear") for name in names]
    assert list(scores[3].values()) == [result["accuracy"] for result in alone["results"]]


@pytest.mark.usefixtures("small")
def test_masks_are_evaluated(tmp_path):
    for part, n in (("train", 8), ("test", 4)):
        for index in range(n):
            values = np.repeat(np.array([[0, 1]], dtype=np.uint8), 8, axis=1).repeat(16, axis=0)
            for name, data in (("images", 200 * values), ("masks", values)):
                path = tmp_path / part / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(Image.fromarray(data)))
    options = [f"--run.evaluate_{part}=folder:{tmp_path / part}" for part in ("train", "test")]
    assert main(evaluating(tmp_path, *options, "--optim.steps", "2")) == 0
    assert list(scores_of(tmp_path / "run")[1]) == ["eval_knn_patches", "eval_linear_patches"]


def test_an_evaluation_that_fails_or_takes_too_long_is_a_line_in_the_log(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError("the share is gone")

    released = threading.Event()
    monkeypatch.setattr(on_the_way.Evaluator, "_scores", fail)
    assert main(evaluating(tmp_path)) == 0
    assert caplog.text.count("no evaluation: the share is gone") == 3
    monkeypatch.setattr(on_the_way.Evaluator, "_scores", lambda *_: released.wait(60) and {})
    monkeypatch.setattr(on_the_way, "_SECONDS", 0.1)
    assert main(evaluating(tmp_path, "--run.output_dir", str(tmp_path / "slow"))) == 0
    assert caplog.text.count("no evaluation: given up: 0 s are over") == 3
    released.set()
    for name in ("run", "slow"):
        assert not scores_of(tmp_path / name)
        assert len(metrics_of(tmp_path / name)) == 6


def test_an_evaluation_does_not_hold_up_a_stop(tmp_path, monkeypatch):
    def wait(self, backbone, watch):
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            watch()
            time.sleep(0.01)

    monkeypatch.setattr(on_the_way.Evaluator, "_scores", wait)
    assert main(evaluating(tmp_path, "--run.stop_timeout", "30")) == 128 + signal.SIGTERM
    assert load_newest_checkpoint(tmp_path / "run")["step"] == 2


def test_its_time_is_not_the_steps(tmp_path, monkeypatch):
    clock, hours = time.perf_counter, [0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 3600 * hours[0])
    monkeypatch.setattr(on_the_way.Evaluator, "_scores", lambda *_: hours.append(hours.pop() + 1) or {"eval_x": 1.0})
    assert main(evaluating(tmp_path, "--run.log_every", "3", "--optim.steps", "3")) == 0
    (line,) = (line for line in metrics_of(tmp_path / "run") if "loss" in line)
    # An evaluation falls within the three steps, which take far less than an hour.
    assert hours[0] > 0
    assert line["images_per_second"] > 10 * 3 * 8 / 3600


def of_two_ranks(rank: int, arguments: list[str], port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    # Rank 0 takes its time, and the other waits.
    on_the_way.Evaluator._scores = lambda *_: time.sleep(0.2) or {"eval_rank": float(rank)}
    assert main(arguments) == 0


def test_the_other_ranks_wait_for_rank_0(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    run_ranks(of_two_ranks, (evaluating(tmp_path, "--optim.steps", "3"), port), 2)
    assert scores_of(tmp_path / "run") == {step: {"eval_rank": 0.0} for step in (1, 2)}


def test_sources_that_are_missing_end_the_run_at_its_start(tmp_path, capsys):
    for options, message in (
        (
            ["--run.evaluate_train", "folder:photos"],
            "both run.evaluate_train and run.evaluate_test, got run.evaluate_train",
        ),
        (["--data.source", f"folder:{tmp_path}"], "both run.evaluate_train and run.evaluate_test, got neither"),
        (["--run.evaluate_every", "-1"], "run.evaluate_every must not be negative, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            check_config(load_tiniest(tmp_path, "--run.evaluate_every", "2", *options))
    missing = f"folder:{tmp_path / 'missing'}"
    assert main(evaluating(tmp_path, "--run.evaluate_train", missing, "--run.evaluate_test", missing)) == 1
    assert f"error: {missing}: expected a folder, got no such path" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
