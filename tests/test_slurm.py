"""The batch script, with programs in the place of Slurm's."""

import os
import subprocess
from pathlib import Path

import pytest
from pages import DOCS

from capi.config import load_config

SCRIPT = DOCS / "capi.sbatch"


def submit(folder: Path, status: int, **environment: str) -> tuple[int, list[str]]:
    """The script's exit status, and the commands that it gave: srun ends with `status`."""
    for name, end in (("srun", status), ("scontrol", 0)):
        program = folder / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> "{folder}/commands"\nexit {end}\n')
        program.chmod(0o755)
    paths = f"{folder}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(SCRIPT), "--config", "tiny", "--run.output_dir", "a run"]
    environment = {**os.environ, "PATH": paths, "SLURM_JOB_ID": "7", **environment}
    ended = subprocess.run(command, env=environment, timeout=60)
    return ended.returncode, (folder / "commands").read_text().splitlines()


@pytest.mark.parametrize("status", [0, 1, 2, 75, 130, 137, 140, 143])
def test_the_job_is_queued_again_after_its_time_or_a_lost_rank(status, tmp_path) -> None:
    ended, commands = submit(tmp_path, status)
    assert ended == status
    assert commands[0].startswith("srun --")
    assert commands[0].endswith("python -m capi.train --config tiny --run.output_dir a run")
    assert commands[1:] == (["scontrol requeue 7"] if status in (75, 137, 140) else [])


def test_a_job_that_never_gets_on_is_not_queued_for_ever(tmp_path) -> None:
    assert submit(tmp_path, 75, SLURM_RESTART_COUNT="50")[1][1:] == []


def test_the_time_before_the_limit_is_enough_for_a_stop() -> None:
    options = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in SCRIPT.read_text().splitlines()
        if line.startswith("#SBATCH") and "=" in line
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    signal, seconds = options["signal"].split("@")
    assert signal == "USR2"
    assert int(seconds) > load_config([]).run.stop_timeout + 60
