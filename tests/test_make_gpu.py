"""`make gpu` on stand-ins for its processes: the gate, the order of things, what fails and what is cut off."""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import gpu, shapes
from benchmarks.gate import Gate
from benchmarks.gpu import Run, operations, steps_beside_tests
from benchmarks.measure import OURS
from benchmarks.train_step import StepCase, configuration

CPU = torch.device("cpu")
# A step: says so in the file `log` when it starts, waits and is timed; and a test that takes a while.
STEP = """
import os, pathlib, sys, time
name, log = sys.argv[1:3]
def say(what):
    with open(log, "a") as file:
        file.write(f"{name} {what}\\n")
gate = pathlib.Path(os.environ["CAPI_GATE"])
say("compiles")
(gate / f"{name}.ready").touch()
while not (gate / f"{name}.open").exists():
    time.sleep(0.01)
say("begins")
time.sleep(0.05)
say("ends")
"""
TESTS = "import sys, time; time.sleep(0.5); open(sys.argv[1], 'a').write('tests end\\n'); print('90 passed')"


def python(code: str, *arguments: object) -> tuple[str, ...]:
    return sys.executable, "-S", "-c", code, *map(str, arguments)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "out", seconds=60, machine="h100")


def test_steps_are_timed_one_by_one_once_all_is_quiet(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "log"
    steps = {name: python(STEP, name, log) for name in ("a", "b", "c")}
    steps_beside_tests(run, python(TESTS, log), steps, threads=1)
    lines = log.read_text().splitlines()
    assert sorted(lines[:3]) == ["a compiles", "b compiles", "c compiles"], "they compile beside the tests"
    assert lines[3:] == ["tests end"] + [f"{name} {what}" for name in "abc" for what in ("begins", "ends")]
    assert run.failures == []
    assert (run.out / "h100.tests.log").read_text() == "90 passed\n"


def test_a_step_that_fails_stops_no_other(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = tmp_path / "log"
    broken = python("print('compiling'); raise SystemExit('out of memory')")
    breaks_later = python(STEP.replace("time.sleep(0.05)", "raise SystemExit(3)"), "later", log)
    steps = {"broken": broken, "later": breaks_later, "sound": python(STEP, "sound", log)}
    steps_beside_tests(run, python("raise SystemExit(1)"), steps, threads=1)
    assert run.failures == ["tests", "step-broken", "step-later"]
    assert log.read_text().splitlines()[-1] == "sound ends"
    assert "step-broken: status 1: out of memory" in capsys.readouterr().out


def test_a_compilation_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it does not heed the interruption."""
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    run, log = Run(tmp_path / "out", seconds=3, machine="h100"), tmp_path / "log"
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(100)"
    steps = {
        "slow": python("import time; time.sleep(100)"),
        "stubborn": python(stubborn),
        "sound": python(STEP, "sound", log),
    }
    steps_beside_tests(run, None, steps, threads=1)
    assert run.failures == ["step-slow", "step-stubborn"]
    assert log.read_text().splitlines()[-1] == "sound ends"
    assert time.monotonic() - run.began < 30


def test_a_stage_cut_off_saves_what_it_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = """
import sys, time
try:
    print("measuring", flush=True)
    time.sleep(100)
except KeyboardInterrupt:
    open(sys.argv[-1], "w").write("found")
"""
    task = run.start("heads", python(saves, run.out / "found"))
    while "measuring" not in task.log.read_text():
        time.sleep(0.05)
    run.finish(task, time.monotonic())
    assert (run.out / "found").read_text() == "found"


def test_without_time_a_stage_is_left_out_and_the_status_tells(run: Run, capsys: pytest.CaptureFixture) -> None:
    operations(run, "heads", time.monotonic() + 5)
    assert run.failures == ["heads"]
    assert "heads: left out, 5 s were left" in capsys.readouterr().out


PYTEST = """
import json, os, sys
arguments = sys.argv[1:]
raw = arguments[arguments.index("--benchmark-json") + 1] if "--benchmark-json" in arguments else None
expected = ["CAPI_GATE"] if "step" in str(raw) else ["CAPI_BENCH_SECONDS"] if raw else ["CAPI_GPU_TESTS"]
assert all(name in os.environ for name in expected + ["CAPI_BENCH_OUT"])
if raw and "step" in raw:
    gate = os.environ["CAPI_GATE"]
    name = raw.split(".step-")[1].removesuffix(".json")
    open(os.path.join(gate, name + ".ready"), "w")
    while not os.path.exists(os.path.join(gate, name + ".open")):
        pass
if raw:
    extra = {"op": "x", "shape": {"n": 1}, "direction": "step", "implementation": "ours", "bytes": None, "flop": 1}
    extra |= {"peak_memory_bytes": 1, "ceilings": None, "share_of_floor": None}
    machine = {"gpu": "H100", "driver": "1", "cuda": "13", "torch": "2", "triton": "3", "command": "pytest"}
    failed = [{**extra, "reason": "off by 3"}] if "heads" in raw else []
    benchmarks = [] if failed else [{"extra_info": extra, "stats": {"median": 1.0, "min": 1.0}}]
    json.dump({"machine_info": machine, "commit_info": {"id": "0" * 40}, "datetime": "2026-12-01T10:00:00",
               "benchmarks": benchmarks, "absent": [], "failed": failed}, open(raw, "w"))
print(" ".join(arguments))
sys.exit("heads" in str(raw))
"""


def test_one_command_runs_all_stages_and_its_status_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(shapes, "GPU", True)
    monkeypatch.setattr(shapes, "MACHINE", "h100")
    monkeypatch.setattr(gpu, "PYTEST", python(PYTEST))
    monkeypatch.setenv("CAPI_GPU_TESTS", "all")
    assert gpu.main(["--out", str(tmp_path), "--steps", "vits14-ours", "vits14-official_compiled"]) == 1
    out = capsys.readouterr().out
    assert "failed: ours of x: off by 3" in out
    assert out.splitlines()[-1].endswith("failed: heads")
    written = {path.name for path in tmp_path.iterdir()}
    for name in ("tests.log", "step-vits14-ours.json", "step-vits14-official_compiled.json", "heads.json"):
        assert f"h100.{name}" in written
    assert {"h100.attention.json", "h100.md"} <= written
    assert "-m gpu" in (tmp_path / "h100.tests.log").read_text()
    for path in tmp_path.iterdir():
        path.unlink()
    assert gpu.main(["--out", str(tmp_path), "--stages", "attention"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"h100.attention.json", "h100.attention.log"}


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(shapes, "GPU", False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "expected a CUDA device, got none" in capsys.readouterr().err


def test_a_step_is_found_by_its_name_alone(run: Run) -> None:
    names = [f"{preset}x512-{name}" for preset in ("vits14", "vitb14", "vitl14") for name in (OURS, *gpu.PEERS)]
    for step in gpu.STEPS:
        *_, expression = gpu.step(run, step)
        assert [name for name in names if all(word in name for word in expression.split(" and "))] == [
            step.replace("-", "x512-", 1)
        ]


def test_files_without_gpu_tests_are_not_imported_for_them() -> None:
    command = gpu.gpu_test_command(processes=6)
    files = [Path(word).name for word in command if word.endswith(".py")]
    assert "test_sinkhorn_triton.py" in files
    assert "test_visualize.py" not in files
    assert command[command.index("-m", 3) + 1] == "gpu"


# The gate


def wait_in_thread(wait: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_the_gate_lets_through_who_is_called_and_asks_once(tmp_path: Path) -> None:
    gate = Gate("a", str(tmp_path))
    assert not gate.is_ready()
    thread = wait_in_thread(gate.wait)
    while not gate.is_ready():
        time.sleep(0.01)
    Gate("b", str(tmp_path)).open()
    thread.join(0.3)
    assert thread.is_alive()
    gate.open()
    thread.join(10)
    assert not thread.is_alive()
    gate.wait()


def test_a_compiler_behind_the_gate_waits_when_all_is_compiled(tmp_path: Path) -> None:
    gate = Gate("a", str(tmp_path))
    compiler = gate.behind(lambda graph: graph, graph=2)
    assert compiler("teacher") == "teacher"
    assert not gate.is_ready()
    gate.open()
    assert compiler("student") == "student"
    assert gate.is_ready()
    assert compiler("once more") == "once more"


def test_without_a_folder_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAPI_GATE", raising=False)
    gate = Gate("a")
    gate.wait()
    gate.leave_losses("vits14", [1.0])
    assert gate.losses("vits14") is None


def test_a_peer_in_another_process_must_have_our_first_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPI_GATE", str(tmp_path))
    config = configuration("tiny", 6, CPU, torch.float32, "--model.drop_path_rate", "0")
    config.model.embed_dim, config.model.n_registers = 32, 8

    def enter(name: str) -> None:
        Gate(f"tiny-{name}").open()
        StepCase(config, "tiny", CPU, torch.float32).enter(name)

    enter(OURS)
    enter("official_eager")
    path = tmp_path / "tiny.losses.json"
    path.write_text(json.dumps([1.001 * loss for loss in json.loads(path.read_text())]))
    with pytest.raises(AssertionError, match=r"expected .*, got"):
        enter("official_eager")
