import os
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from capi import sharded_checkpoint
from capi.checkpoint import (
    checkpoints,
    load_newest_checkpoint,
    newest_checkpoint,
    remove_stale_temporaries,
    save_checkpoint,
    save_encoder,
    set_newer_aside,
    step_of,
    write_atomically,
)
from capi.config import ModelConfig
from capi.model import Student


def test_newest_first_and_only_so_many_kept(tmp_path) -> None:
    assert load_newest_checkpoint(tmp_path) is None
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step_000000010", "step_000000100"]
    assert load_newest_checkpoint(tmp_path) == {"step": 100, "trainer": {}}


def test_a_failed_write_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write_text("old"))

    def fail(file: Path) -> None:
        file.write_text("ne")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """Stands for a full disk: the system refuses to write beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_does_not_fit_is_an_error_of_one_line_and_leaves_nothing(tmp_path) -> None:
    state = {"trainer": {"x": torch.zeros(100_000)}}
    save_checkpoint(tmp_path, 1, state, keep=1)
    with file_size_limit(100_000), pytest.raises(OSError) as error:
        save_checkpoint(tmp_path, 2, state, keep=1)
    path = tmp_path / "checkpoints" / "step_000000002"
    assert str(error.value) == f"{path} could not be written: File too large"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000000001"]


def test_an_encoder_that_does_not_fit_is_an_error_of_one_line_and_leaves_the_old_one(tmp_path) -> None:
    config, path = ModelConfig(embed_dim=16, num_heads=2, encoder_depth=1, predictor_depth=1), tmp_path / "encoder"
    student = Student(config, 16)
    save_encoder(path, student, config)
    before = path.read_bytes()
    with file_size_limit(10_000), pytest.raises(OSError) as error:
        save_encoder(path, student, config)
    assert str(error.value).startswith(f"{path} could not be written: ")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_permissions_that_the_umask_leaves(tmp_path, umask) -> None:
    config = ModelConfig(embed_dim=16, num_heads=2, encoder_depth=1, predictor_depth=1)
    before = os.umask(umask)
    try:
        save_encoder(tmp_path / "encoder", Student(config, 16), config)
        checkpoint = save_checkpoint(tmp_path, 1, {"trainer": {"x": torch.zeros(3)}}, keep=1)
    finally:
        os.umask(before)
    assert checkpoint.stat().st_mode & 0o777 == 0o777 & ~umask
    for path in (tmp_path / "encoder", *checkpoint.iterdir()):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_retention_takes_the_oldest_and_never_what_was_just_written(tmp_path) -> None:
    for step in (100, 200, 1_000_000_000, 20):
        save_checkpoint(tmp_path, step, {"step": step}, keep=1)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [20, 1_000_000_000]


def test_room_is_made_before_a_checkpoint_is_written_but_not_of_the_newest(tmp_path, monkeypatch) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"step": step}, keep=3)
    seen, original = [], sharded_checkpoint._write
    monkeypatch.setattr(sharded_checkpoint, "_write", lambda *a: (seen.append(checkpoints(tmp_path)), original(*a)))
    save_checkpoint(tmp_path, 4, {"step": 4}, keep=2)
    assert [step_of(path) for path in seen[0]] == [2, 3]
    assert [step_of(path) for path in checkpoints(tmp_path)] == [3, 4]


def test_one_wrong_bit_in_a_file_of_an_earlier_version_is_damage(tmp_path, caplog) -> None:
    for step in (1, 2):
        path = tmp_path / "checkpoints" / f"step_{step:09d}.pt"
        path.parent.mkdir(exist_ok=True)
        torch.save({"step": step, "x": torch.arange(100_000)}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert load_newest_checkpoint(tmp_path)["step"] == 1
    assert "step_000000002.pt cannot be read, trying the one before: it is damaged: the checksum" in caplog.text


def test_checkpoints_of_earlier_versions_are_counted_with_the_others(tmp_path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for step in (1, 2, 4):
        torch.save({"step": step}, tmp_path / "checkpoints" / f"step_{step:09d}.pt")
    save_checkpoint(tmp_path, 3, {"step": 3}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000000002.pt", "step_000000003", "step_000000004.pt"]
    set_newer_aside(tmp_path, 3)
    assert load_newest_checkpoint(tmp_path)["step"] == 3


def test_a_checkpoint_that_is_removed_in_part_is_none(tmp_path, monkeypatch) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    monkeypatch.setattr(shutil, "rmtree", lambda _: None)  # as where a kill comes in between
    save_checkpoint(tmp_path, 3, {"step": 3}, keep=2)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [2, 3]
    assert (tmp_path / "checkpoints" / ".step_000000001.old.tmp").is_dir()


def test_what_is_set_aside_takes_no_others_place(tmp_path) -> None:
    for n in range(3):
        save_checkpoint(tmp_path, 2, {"step": 2, "n": n}, keep=1)
        set_newer_aside(tmp_path, 1)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step_000000002.damaged{end}" for end in ("", ".1", ".2")]


def test_what_a_broken_off_write_left_is_removed_and_nothing_else(tmp_path) -> None:
    (tmp_path / "checkpoints").mkdir()
    stale = [".config.yaml.tmp", ".tmpAbC123", "checkpoints/.step_000000001.pt.tmp"]
    stale += [f"checkpoints/.step_000000001.{end}tmp/state.json" for end in ("", "alone.", "old.")]
    kept = ["notes.tmp", ".hidden", "checkpoints/step_000000001.pt", "checkpoints/step_000000002/state.json", ".tmp"]
    for name in [*stale, *kept]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    remove_stale_temporaries(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, caplog) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step, "trainer": {"x": torch.arange(1000)}}, keep=3)
    (file,) = newest_checkpoint(tmp_path).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:500])
    assert load_newest_checkpoint(tmp_path)["step"] == 1
    assert f"step_000000002 cannot be read, trying the one before: it is damaged: {file.name} has 500" in caplog.text


def save_without_end(run_dir: Path, step: int) -> None:
    torch.set_num_threads(1)  # A fork does not have those of this process.
    try:
        while True:
            step += 1
            state = {"step": step, "trainer": {"x": torch.full((200_000,), step)}}
            save_checkpoint(run_dir, step, state, keep=1)
    finally:
        os._exit(1)


def test_a_kill_at_any_instant_leaves_a_good_checkpoint(tmp_path) -> None:
    reached = 0
    for delay in (0.0, 0.013, 0.029, 0.041):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of the threads of pytest-xdist.
            child = os.fork()
        if child == 0:
            save_without_end(tmp_path, reached)
        try:
            deadline = time.monotonic() + 60
            while (newest := newest_checkpoint(tmp_path)) is None or step_of(newest) <= reached:
                assert time.monotonic() < deadline, "no checkpoint was written"
                time.sleep(0.005)
            time.sleep(delay)
        finally:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "it ended before"
        state = load_newest_checkpoint(tmp_path)
        assert state is not None
        assert state["step"] > reached
        remove_stale_temporaries(tmp_path)
        assert (state["trainer"]["x"] == state["step"]).all()
        reached = state["step"]
