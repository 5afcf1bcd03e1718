"""A run folder belongs to one process at a time."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import tiniest

from capi.run_folder import RunFolder
from capi.train import main

HOLDER = """
import os, sys, time
from pathlib import Path
from capi.run_folder import RunFolder
RunFolder(Path(sys.argv[1]))
child = os.fork()  # As a loader process, which outlives its parent for a while.
if child:
    print(os.getpid(), child, flush=True)
time.sleep(600)
"""


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    return tiniest(tmp_path)


def test_a_second_run_in_a_folder_is_refused_until_a_kill_ends_the_first(arguments, tmp_path, capsys) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(run_dir)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        child = None
        try:
            parent, child = map(int, holder.stdout.readline().split())
            for options in ([], ["--run.resume", "false"]):
                assert main([*arguments, *options]) == 1
                message = capsys.readouterr().err
                assert message == (
                    f"error: {run_dir} is in use by process {parent} on {os.uname().nodename}; "
                    "expected another run.output_dir, or that run to end first\n"
                )
            assert [path.name for path in run_dir.iterdir()] == [".lock"]
            os.kill(parent, signal.SIGKILL)
            holder.wait()
            os.kill(child, 0)  # It is there still.
            assert main([*arguments, "--optim.steps", "2"]) == 0
        finally:
            holder.kill()
            if child:
                os.kill(child, signal.SIGKILL)
    assert not (run_dir / ".lock").exists()


def test_a_file_system_without_locks_is_warned_of(arguments, tmp_path, monkeypatch, caplog) -> None:
    def no_locks(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert main([*arguments, "--optim.steps", "2"]) == 0
    assert f"{tmp_path / 'run'} cannot be locked (No locks available)" in caplog.text


def test_a_lock_whose_file_its_owner_has_just_removed_is_taken_anew(tmp_path, monkeypatch) -> None:
    original, calls = fcntl.lockf, []

    def slow(*arguments) -> None:
        original(*arguments)
        if not calls:
            (tmp_path / "run" / ".lock").unlink()
        calls.append(arguments)

    monkeypatch.setattr(fcntl, "lockf", slow)
    folder = RunFolder(tmp_path / "run")
    assert len(calls) == 2
    assert (tmp_path / "run" / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    folder.release()


def test_a_folder_to_which_nothing_was_written_goes_again(tmp_path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.release()
    assert not (tmp_path / "run").exists()
    folder = RunFolder(tmp_path / "run")
    (tmp_path / "run" / "file").touch()
    folder.release()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]
