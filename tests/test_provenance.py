import json
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_runs import tiniest

from capi import provenance
from capi.distributed import World
from capi.provenance import record_start, without_secrets
from capi.train import main

ALONE = World(0, 1, torch.device("cpu"))


def entries(run_dir: Path) -> list[dict]:
    return json.loads((run_dir / "run.json").read_text())


def test_every_start_adds_an_entry(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("API_TOKEN", "hidden-9431")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    arguments = tiniest(tmp_path)
    assert main([*arguments, "--optim.steps", "2"]) == 0
    assert main([*arguments, "--run.allow_changes", "[optim.steps]"]) == 0
    assert main([*arguments, "--run.allow_changes", "[optim.steps]"]) == 0  # Nothing is left to do.
    first, second = entries(tmp_path / "run")
    assert (first["step"], second["step"]) == (0, 2)
    assert first["time"] <= second["time"]
    assert first["packages"]["torch"] == torch.__version__
    assert first["job"] == {"SLURM_JOB_ID": "17"}
    (machine,) = first["machines"]
    assert first["processes"] == machine["processes"] == 1
    assert machine["cpu"]
    assert machine["memory_bytes"] > 2**27
    assert "hidden-9431" not in (tmp_path / "run" / "run.json").read_text()


def test_the_commit_is_that_of_the_checkout_it_runs_from(tmp_path, monkeypatch) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    assert provenance._code()["commit"] is None
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True, timeout=60)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert provenance._code()["commit"] == commit
    assert provenance._code()["uncommitted_changes"] is False
    (tmp_path / "file").write_text("2")
    assert provenance._code()["uncommitted_changes"] is True
    # Installed within the checkout of something else.
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(provenance, "_ROOT", tmp_path / "site-packages")
    assert provenance._code()["commit"] is None


def test_machines_of_one_kind_stand_once() -> None:
    a, b = ({"host": name, "gpu": "H100"} for name in "ab")
    assert provenance._counted([a, a, b]) == [{**a, "processes": 2}, {**b, "processes": 1}]


def test_a_damaged_file_is_set_aside(tmp_path, caplog) -> None:
    (tmp_path / "run.json").write_text("[{")
    assert record_start(tmp_path, ALONE, 3)["step"] == 3
    assert [entry["step"] for entry in entries(tmp_path)] == [3]
    assert (tmp_path / "run.json.damaged").read_text() == "[{"
    assert "cannot be read" in caplog.text


def test_a_full_disk_costs_the_entry_alone(tmp_path, monkeypatch, caplog) -> None:
    def full(path: Path, write) -> None:
        raise OSError(f"{path} could not be written: No space left on device")

    monkeypatch.setattr(provenance, "write_atomically", full)
    assert record_start(tmp_path, ALONE, 0)["step"] == 0
    assert "No space left" in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wds:https://host/{000..100}.tar", "wds:https://host/{000..100}.tar"),
        ("'wds:https://u:p@host/a.tar?sig=s&t=1' --x 1", "'wds:https://host/a.tar?...' --x 1"),
        ("s3://key@bucket/?a", "s3://bucket/?..."),
        ("what? a@b", "what? a@b"),
    ],
)
def test_addresses_lose_what_may_be_a_credential(text: str, expected: str) -> None:
    assert without_secrets(text) == expected
