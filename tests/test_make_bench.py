"""`make bench`: a benchmark that fails becomes a row, the report is written, and the status tells."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")

from benchmarks import report

ROOT = Path(__file__).resolve().parents[1]
# One small shape, of which we compute something else.
PLUGIN = """
from benchmarks import heads, shapes
from capi_kernels.sinkhorn import cpu

shapes.SINKHORN[:] = [shapes.Logits(2, 3, 8, 3, 4)]
right = heads.sinkhorn_positionwise
assert not hasattr(cpu.balanced, "__wrapped__"), "types are checked in what is timed"
heads.sinkhorn_positionwise = lambda *arguments, **options: 1.01 * right(*arguments, **options)
"""


def test_a_benchmark_whose_check_fails_becomes_a_row_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLUGIN)
    raw = tmp_path / "cpu.json"
    command = [sys.executable, "-m", "pytest", "-p", "planted", "benchmarks/test_sinkhorn.py"]
    # A worker of pytest-xdist hands down that it is one, under which nothing is timed.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**inherited, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    environment["PYTHONPATH"] += os.pathsep + str(ROOT / "tests")
    done = subprocess.run(
        [*command, "--benchmark-only", "--benchmark-json", str(raw)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    content = json.loads(raw.read_text())
    (failed,) = content["failed"]
    assert failed["implementation"] == report.OURS
    assert "above the budget" in failed["reason"]
    (other,) = (benchmark["extra_info"]["implementation"] for benchmark in content["benchmarks"])
    assert other == "official_eager"
    text = report.markdown(report.read("cpu", tmp_path))
    assert "**failed**" in text
    assert "- ours, sinkhorn_positionwise 2 positions, 3 images, 8 prototypes, 3 n_iterations: " in text


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("pytest_status", "report_status"), [(0, 0), (1, 0), (0, 1)])
def test_the_report_follows_whatever_failed_and_the_status_tells(
    tmp_path: Path, pytest_status: int, report_status: int
) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/log\ncase "$*" in\n*shapes*) echo cpu;;\n'
        f"*pytest*) exit {pytest_status};;\n*report*) exit {report_status};;\nesac\n"
    )
    python.chmod(0o755)
    marker = tmp_path / "venv" / ".installed"
    command = ["make", "--no-print-directory", "-o", str(marker), f"VENV={tmp_path / 'venv'}", "bench", "PART=sinkhorn"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode == 0) == (pytest_status == report_status == 0)
    _, measured, reported = (tmp_path / "log").read_text().splitlines()
    raw = "benchmarks/results/cpu.sinkhorn.json"
    assert measured == f"-m pytest benchmarks --benchmark-only --benchmark-json {raw} -k sinkhorn"
    assert reported == f"-m benchmarks.report {raw} --readme"
