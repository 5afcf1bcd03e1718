import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from capi.checkpoint import load_newest_checkpoint, newest_checkpoint, save_checkpoint, write_atomically


def test_newest_first_and_only_so_many_kept(tmp_path) -> None:
    assert load_newest_checkpoint(tmp_path) is None
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step_000000010.pt", "step_000000100.pt"]
    assert load_newest_checkpoint(tmp_path) == {"step": 100}


def test_a_failed_write_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write_text("old"))

    def fail(file: Path) -> None:
        file.write_text("ne")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, caplog) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1, "x": torch.arange(1000)}, keep=3)
    save_checkpoint(tmp_path, 2, {"step": 2, "x": torch.arange(1000)}, keep=3)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    newest.write_bytes(newest.read_bytes()[:500])
    state = load_newest_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 1
    assert "step_000000002.pt cannot be read" in caplog.text


def test_a_kill_at_any_instant_leaves_a_good_checkpoint(tmp_path) -> None:
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from capi.checkpoint import save_checkpoint\n"
        "step = int(sys.argv[2])\n"
        "while True:\n"
        "    step += 1\n"
        "    save_checkpoint(Path(sys.argv[1]), step, {'step': step, 'x': torch.full((200_000,), step)}, keep=1)\n"
    )
    reached = 0
    for delay in (0.0, 0.013, 0.029, 0.041):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(reached)])
        try:
            deadline = time.monotonic() + 60
            while (newest := newest_checkpoint(tmp_path)) is None or newest.name <= f"step_{reached:09d}.pt":
                assert time.monotonic() < deadline, "no checkpoint was written"
                assert process.poll() is None
                time.sleep(0.005)
            time.sleep(delay)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        state = load_newest_checkpoint(tmp_path)
        assert state is not None
        assert state["step"] > reached
        assert (state["x"] == state["step"]).all()
        reached = state["step"]
