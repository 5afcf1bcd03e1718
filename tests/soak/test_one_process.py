"""Faults of a training of one process: kills, disks, data, numbers, the clock."""

import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from faulty_runs import begun_files, metrics_of, namespaces, steps_saved, weights
from PIL import Image
from tiny_runs import assert_equal_states

KILLS = 50
DISK = "600k"
OPTIONS = ("--run.log_every", "1", "--run.checkpoint_every", "1")
SAME = "the same command goes on"


def assert_as_without(start, folder: Path, *options: str) -> None:
    """The run's state after its last step is that of an uninterrupted one."""
    assert start(*options, "--run.output_dir", str(folder / "whole")).status() == 0
    assert_equal_states(weights(folder / "run"), weights(folder / "whole"))


def images(folder: Path, n: int, broken: int = 0, colour: int = 7) -> str:
    """A source of so many pictures, every so many of them half a file."""
    folder.mkdir()
    rng = np.random.default_rng(colour)
    for i in range(n):
        path = folder / f"{i:03d}.png"
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
        if broken and i % broken == 0:
            path.write_bytes(path.read_bytes()[:100])
    return f"folder:{folder}"


def test_kills_at_random_instants(tmp_path, start, row) -> None:
    rng, options, kills, amid_a_save, steps = random.Random(0), (*OPTIONS, "--optim.steps", "600"), 0, 0, []
    while kills < KILLS:
        run = start(*options, fault="slow save" if kills % 2 else "slow steps")
        begun = run.lines()
        run.wait_for(lambda begun=begun, run=run: run.lines() > begun)
        time.sleep(rng.uniform(0, 1))
        run.send(signal.SIGKILL)
        assert run.status() == -signal.SIGKILL, run.said()
        kills, amid_a_save = kills + 1, amid_a_save + bool(begun_files(tmp_path / "run"))
        steps.append(steps_saved(tmp_path / "run") or 0)
    assert steps == sorted(steps)
    assert amid_a_save > 3
    assert start(*options).status() == 0
    assert_as_without(start, tmp_path, *options)
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(600))
    assert not begun_files(tmp_path / "run")
    came = f"{kills} kills, {amid_a_save} amid a checkpoint; weights and optimisers bit for bit, every step logged once"
    row(
        "kill -9 at random instants",
        "SIGKILL, saving too",
        "goes on from the newest whole checkpoint",
        "137",
        came,
        SAME,
    )


needs_namespaces = pytest.mark.skipif(not namespaces(), reason="this machine allows no namespaces")


@needs_namespaces
def test_a_full_disk(tmp_path, start, row) -> None:
    """A small file system in a namespace; what was on it is kept for the second start."""
    here = f"mkdir -p {tmp_path}/run {tmp_path}/kept\nmount -t tmpfs -o size={DISK} none {tmp_path}/run\n"
    fill = f"cp -r {tmp_path}/kept/. {tmp_path}/run\n"
    keep = f'"$@" && status=0 || status=$?\ncp -r {tmp_path}/run/. {tmp_path}/kept\nexit $status\n'
    run = start("--run.checkpoint_every", "1", "--run.keep_checkpoints", "9", shell=here + fill + keep)
    status = run.status()
    assert status == 1, run.said()
    assert "could not be written: No space left on device; the newest checkpoint: " in run.said()
    saved = steps_saved(tmp_path / "kept")
    assert 0 < saved < 6
    again = start(
        "--run.checkpoint_every", "1", shell=f"mkdir -p {tmp_path}/run\ncp -r {tmp_path}/kept/. {tmp_path}/run"
    )
    assert again.status() == 0, again.said()
    assert_as_without(start, tmp_path)
    came = f"checkpoints up to step {saved} whole, a line for each other; then bit for bit"
    row("full disk", f"a tmpfs of {DISK}", "trains on, ends with 1", "1", came, f"make room; {SAME}")


@needs_namespaces
def test_a_read_only_folder(tmp_path, start, row) -> None:
    mount = (
        f"mkdir -p {tmp_path}/run\nmount --bind {tmp_path}/run {tmp_path}/run\nmount -o remount,ro,bind {tmp_path}/run"
    )
    run = start(shell=mount)
    assert run.status() == 1
    assert "Read-only file system" in run.said().splitlines()[-1]
    assert "Traceback" not in run.said()
    row(
        "read-only folder",
        "a bind mount",
        "one line",
        "1",
        "one line, read-only file system",
        "another folder",
    )


def test_a_file_in_place_of_the_folder(tmp_path, start, row) -> None:
    (tmp_path / "run").write_text("")
    run = start()
    assert run.status() == 1
    assert "error: " in run.said().splitlines()[-1]
    assert "Traceback" not in run.said()
    row("a file in place of the run folder", "a file", "one line", "1", "one line that names it", "another folder")


def test_broken_images(tmp_path, start, row) -> None:
    source = images(tmp_path / "images", 60, broken=10)
    run = start("--data.source", source, "--optim.steps", "15")
    assert run.status() == 0, run.said()
    assert run.said().count(".png") >= 6
    assert all(np.isfinite(line["loss"]) for line in metrics_of(tmp_path / "run"))
    row(
        "1 in 10 images broken",
        "files cut off",
        "others stand in, named once",
        "0",
        "6 named, all steps",
        "mend the files",
    )


def test_data_that_vanish(tmp_path, start, row) -> None:
    source, steps = images(tmp_path / "images", 60), ("--optim.steps", "40", "--run.checkpoint_every", "2")
    run = start("--data.source", source, *steps, "--data.num_workers", "1", fault="data gone")
    assert run.status() == 1, run.said()
    assert "error: " in run.said()
    last, saved = run.said().splitlines()[-1], steps_saved(tmp_path / "run")
    assert saved
    (tmp_path / "gone").rename(tmp_path / "images")
    assert start("--data.source", source, *steps).status() == 0
    assert "no image" in last or "readable" in last or "read" in last, last
    row(
        "data vanish",
        "the folder renamed in step 3",
        "one line",
        "1",
        f"checkpoint {saved} whole",
        f"bring them back; {SAME}",
    )


def test_data_that_change(tmp_path, start, row) -> None:
    source = images(tmp_path / "images", 60)
    assert start("--data.source", source, "--optim.steps", "6").status() == 0
    (tmp_path / "images" / "000.png").unlink()
    longer = ("--data.source", source, "--optim.steps", "9", "--run.allow_changes")
    refused = start(*longer, "[optim.steps]")
    assert refused.status() == 1
    assert "with other images" in refused.said()
    assert start(*longer, "[optim.steps, data.source]").status() == 0
    row(
        "data change",
        "a file removed between two starts",
        "refused until allowed",
        "1",
        "one line",
        "run.allow_changes",
    )


def test_nan_in_the_images_once(tmp_path, start, row) -> None:
    run = start("--optim.steps", "9", fault="nan in images once")
    assert run.status() == 0, run.said()
    losses = [line["loss"] for line in metrics_of(tmp_path / "run")]
    assert [loss is None for loss in losses] == [step == 3 for step in range(9)]
    row("NaN in the images of a step", "NaN in step 4", "the step changes no weight", "0", "goes on", "nothing")


def test_nan_in_the_images_for_long(tmp_path, start, row) -> None:
    run = start("--optim.steps", "20", "--run.checkpoint_every", "3", fault="nan in images")
    assert run.status() == 1, run.said()
    assert "not finite for 3 steps in a row" in run.said()
    assert steps_saved(tmp_path / "run") == 3
    assert start("--optim.steps", "20", "--run.checkpoint_every", "3").status() == 0
    assert_as_without(start, tmp_path, "--optim.steps", "20", "--run.checkpoint_every", "3")
    row(
        "NaN in all images from a step on",
        "from step 4",
        "ends after 3 steps",
        "1",
        "step 3 whole",
        f"mend them; {SAME}",
    )


def test_a_clock_that_is_set_back(tmp_path, start, row) -> None:
    assert start("--optim.steps", "9", fault="clock").status() == 0
    assert_as_without(start, tmp_path, "--optim.steps", "9")
    row("clock set back", "time.time by a day in step 4", "no difference", "0", "bit for bit", "nothing")
