"""What a run leaves besides its checkpoints, at each of them, at a stop and at its end."""

import logging
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import metrics_of, tiniest

from capi import pretrained, results
from capi.checkpoint import checkpoints, load_newest_checkpoint
from capi.saving import Checkpoints
from capi.step import Trainer
from capi.train import main

PNG = b"\x89PNG"


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    # On a busy machine pictures alone take longer than a stop may.
    return [*tiniest(tmp_path), "--run.evaluate", "true", "--run.stop_timeout", "100"]


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def before_step(monkeypatch) -> Callable[[int, Callable[[], object]], None]:
    """Does something before a step is computed."""

    def register(number: int, action: Callable[[], object]) -> None:
        original = Trainer.step

        def step(self, batches, current, *launched):
            if current == number:
                action()
            return original(self, batches, current, *launched)

        monkeypatch.setattr(Trainer, "step", step)

    return register


@pytest.fixture
def saved_at_once(monkeypatch) -> None:
    """Has a run wait for each of its checkpoints."""
    save = Checkpoints.save

    def save_and_wait(self, step: int) -> None:
        save(self, step)
        self.finish()

    monkeypatch.setattr(Checkpoints, "save", save_and_wait)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def assert_encoder_is_of_the_checkpoint(run_dir: Path) -> None:
    exported = pretrained.load(run_dir / "encoder.safetensors").state_dict()
    saved = load_newest_checkpoint(run_dir)["trainer"]["model"]
    for name, tensor in exported.items():
        assert torch.equal(tensor, saved[f"student_ema.backbone.{name}"]), name
    heads = load_file(run_dir / "heads.safetensors")
    assert set(heads) == {name for name in saved if name.startswith(("teacher.head.", "student_ema.head."))}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in heads.items())


@pytest.mark.usefixtures("saved_at_once")
def test_encoder_and_pictures_are_there_at_every_checkpoint(arguments, run_dir, before_step) -> None:
    seen = {}
    before_step(4, lambda: seen.update({p.name: p.read_bytes() for p in run_dir.iterdir() if p.is_file()}))
    before_step(5, stop)
    assert main([*arguments, "--optim.steps", "9"]) == 128 + signal.SIGTERM
    assert seen["curves.png"][:4] == seen["features.png"][:4] == PNG
    assert "evaluation.yaml" not in seen
    assert (run_dir / "encoder.safetensors").read_bytes() != seen["encoder.safetensors"]
    assert (run_dir / "features.png").read_bytes() != seen["features.png"]
    assert_encoder_is_of_the_checkpoint(run_dir)


def test_encoder_and_pictures_are_there_after_a_stop(arguments, run_dir, before_step) -> None:
    before_step(1, stop)
    assert main(arguments) == 128 + signal.SIGTERM
    assert_encoder_is_of_the_checkpoint(run_dir)
    for name in ("curves.png", "features.png"):
        assert (run_dir / name).read_bytes()[:4] == PNG


def test_pictures_change_no_number_of_the_run(arguments, tmp_path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (20, 20), (i * 30, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    arguments += ["--data.source", f"folder:{tmp_path / 'images'}"]
    for name, evaluate in (("with", "true"), ("without", "false")):
        assert main([*arguments, "--run.output_dir", str(tmp_path / name), "--run.evaluate", evaluate]) == 0
    one, other = (load_newest_checkpoint(tmp_path / name)["trainer"]["model"] for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_picture_that_fails_is_a_line_in_the_log(arguments, run_dir, before_step, monkeypatch, caplog) -> None:
    def fail(*_) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(results, "plot_curves", fail)
    monkeypatch.setattr(results, "evaluation_images", fail)
    before_step(4, stop)
    assert main(arguments) == 128 + signal.SIGTERM
    assert "curves.png could not be written: no fonts" in caplog.text
    assert "features.png could not be written: no fonts" in caplog.text
    assert not list(run_dir.glob("*.png"))
    assert_encoder_is_of_the_checkpoint(run_dir)


def test_a_source_that_hangs_holds_up_a_stop_for_a_bounded_time(
    arguments, run_dir, before_step, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(results, "evaluation_images", lambda *_: time.sleep(100))
    monkeypatch.setattr(results, "_PATIENCE", 0.1)
    before_step(1, stop)
    assert main(arguments) == 128 + signal.SIGTERM
    assert "features.png could not be written: the source gave no images within 0 s" in caplog.text
    assert (run_dir / "curves.png").exists()


# A full disk, for which a limit on the size of files stands: more than what the tests' own output comes to.


def limit_files(n_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def unlimited_afterwards():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("unlimited_afterwards", "saved_at_once")
def test_a_run_goes_on_while_the_disk_is_full_and_saves_again_later(arguments, run_dir, before_step, caplog) -> None:
    arguments = [*arguments, "--run.checkpoint_every", "1", "--run.keep_checkpoints", "1", "--run.evaluate", "false"]
    seen = []
    before_step(2, lambda: limit_files(20_000))
    before_step(4, lambda: seen.append([path.name for path in (run_dir / "checkpoints").iterdir()]))
    before_step(4, lambda: limit_files(resource.RLIM_INFINITY))
    assert main(arguments) == 0
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    newest = run_dir / "checkpoints" / "step_000000002"
    for step in (3, 4):
        path = run_dir / "checkpoints" / f"step_{step:09d}"
        assert f"{path} could not be written: File too large; the newest checkpoint: {newest}" in errors
    assert all("\n" not in error for error in errors)
    assert seen == [["step_000000002"]]
    assert [path.name for path in checkpoints(run_dir)] == ["step_000000006"]
    assert {0, 1, 4, 5} <= {line["step"] for line in metrics_of(run_dir)}


@pytest.mark.usefixtures("unlimited_afterwards", "saved_at_once")
def test_a_stop_that_cannot_be_saved_says_from_where_it_goes_on(arguments, before_step, caplog) -> None:
    before_step(4, lambda: limit_files(20_000))
    before_step(4, stop)
    assert main(arguments) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 5; the same command goes on from step 3" in caplog.text


@pytest.mark.usefixtures("unlimited_afterwards", "saved_at_once")
def test_a_last_checkpoint_that_cannot_be_written_is_no_success(arguments, run_dir, before_step) -> None:
    """The encoder, which is smaller, may fit all the same."""
    before_step(5, lambda: limit_files(max(x.stat().st_size for x in checkpoints(run_dir)[0].iterdir()) - 1000))
    assert main([*arguments, "--run.evaluate", "false"]) == 1
    assert [path.name for path in checkpoints(run_dir)] == ["step_000000003"]
    saved = load_newest_checkpoint(run_dir)["trainer"]["model"]
    exported = pretrained.load(run_dir / "encoder.safetensors").state_dict()
    assert any(not torch.equal(tensor, saved[f"student_ema.backbone.{name}"]) for name, tensor in exported.items())


@pytest.mark.usefixtures("unlimited_afterwards")
def test_an_encoder_that_cannot_be_written_at_the_end_is_one_line(arguments, run_dir, capsys) -> None:
    arguments = [*arguments, "--run.evaluate", "false"]
    assert main(arguments) == 0
    before = (run_dir / "encoder.safetensors").read_bytes()
    capsys.readouterr()
    limit_files(4000)
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: {run_dir / 'encoder.safetensors'} could not be written: ")
    assert message.count("\n") == 1
    assert (run_dir / "encoder.safetensors").read_bytes() == before
    assert not list(run_dir.glob(".*"))
