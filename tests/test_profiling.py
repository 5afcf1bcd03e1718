"""The host's time by phase; what a trace says of steps; a run that profiles some of its own."""

import gzip
import json
import time

import pytest
from tiny_runs import FIXED, metrics_of, tiniest

from capi import profiling
from capi.profiling import HostTime, of_events
from capi.train import main


def test_time_is_of_one_phase_at_a_time(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    host = HostTime()

    def spend(seconds: float) -> None:
        clock[0] += seconds

    spend(1)
    with host.phase("launch"):
        spend(2)
        with host.phase("data wait"):
            spend(4)
        spend(8)
    spend(16)
    before = host.seconds()
    assert before == {"other": 17, "launch": 10, "data wait": 4}
    with pytest.raises(ZeroDivisionError), host.phase("update"):
        spend(32)
        _ = 1 / 0
    spend(64)
    assert host.since(before) == {"other": 64, "launch": 0, "data wait": 0, "update": 32}


def kernel(name: str, start: float, duration: float, category: str = "kernel") -> dict:
    return {"cat": category, "name": name, "ts": start, "dur": duration}


def test_a_profile_counts_what_the_device_did() -> None:
    events = [
        kernel("b", 30, 10),
        kernel("a", 0, 20),
        kernel("a", 10, 20),  # Beside the first: 30 microseconds busy in all, 40 of work.
        kernel("copy", 60, 40, "gpu_memcpy"),
        kernel("cudaLaunchKernel", 0, 500, "cuda_runtime"),
        {"ph": "M", "name": "process_name"},
    ]
    found = of_events(events, steps=2)
    assert found.span == pytest.approx(50e-6)
    assert found.busy == pytest.approx(40e-6)
    assert found.launches == 2
    assert found.kernels[-1][0] == "b"
    assert {name: (n, round(s * 1e6)) for name, n, s in found.kernels} == {
        "a": (1, 20),
        "copy": (0.5, 20),
        "b": (0.5, 5),
    }
    # Idle is judged by the step without a profiler, which may slow the host.
    assert found.idle_share(100e-6) == pytest.approx(0.6)
    assert found.idle_share(30e-6) == 0
    lines = found.text(100e-6).splitlines()
    assert lines[0] == ("of 2 steps: 0.100 ms a step, 0.050 under the profiler; busy 0.040; idle 60.0%; launches 2")
    assert len(lines) == 4


def test_a_profile_shows_the_sixty_largest_kernels() -> None:
    found = of_events([kernel(f"k{i}", 100 * i, i + 1) for i in range(80)], 1)
    lines = found.text(1.0).splitlines()
    assert len(lines) == 61
    assert "k79" in lines[1]


def test_an_operation_of_the_host_counts_without_those_that_it_calls() -> None:
    def op(name: str, start: float, duration: float, thread: int) -> dict:
        return {**kernel(name, start, duration, "cpu_op"), "tid": thread}

    events = [
        op("mm", 10, 30, 1),
        op("linear", 0, 50, 1),
        op("t", 5, 5, 1),
        op("linear", 20, 100, 2),
        op("t", 60, 5, 1),
    ]
    found = of_events([*events, kernel("kernel", 0, 1000)], 1, of_host=True)
    assert {name: (n, round(s * 1e6)) for name, n, s in found.kernels} == {
        "linear": (2, 50 - 30 - 5 + 100),
        "mm": (1, 30),
        "t": (2, 10),
    }
    assert found.busy == pytest.approx(120e-6)
    with pytest.raises(ValueError, match="work on the device, got none"):
        of_events(events, 1)


def test_a_run_profiles_steps(tmp_path, caplog) -> None:
    options = ("--run.profile", "2", "--optim.steps", "12", *FIXED)
    assert main([*tiniest(tmp_path), *options]) == 0
    run_dir = tmp_path / "run"
    first, summary, host, *operations = (run_dir / "profile.txt").read_text().splitlines()
    assert first == "CPU (PyTorch's operations, each without its callees)"
    assert summary.startswith("of 2 steps: ")
    named = [part.split() for part in host.removeprefix("host: ").split(", ")]
    seconds = {" ".join(words[:-2]): float(words[-2]) for words in named}
    assert {"data wait", "draw and send", "launch", "update", "other"} <= seconds.keys()
    assert sum(seconds.values()) == pytest.approx(float(summary.split()[3]), abs=0.01)
    assert any("aten::addmm" in line for line in operations)
    with gzip.open(run_dir / "profile.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(e.get("name") == "aten::_fused_adamw_" for e in events) == 2 * 5  # Of five groups.
    assert len(metrics_of(run_dir)) == 12


def test_a_profile_takes_more_steps_than_it_shows(tmp_path, capsys) -> None:
    assert main([*tiniest(tmp_path), "--run.profile", "2"]) == 1
    assert "run.profile 2 takes 12 steps, got optim.steps 6" in capsys.readouterr().err
    assert main([*tiniest(tmp_path), "--run.profile", "-1"]) == 1
    assert "run.profile must not be negative, got -1" in capsys.readouterr().err


def test_a_run_outlives_its_profile(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(profiling, "HOST_WORK", ())
    assert main([*tiniest(tmp_path), "--run.profile", "1", "--optim.steps", "10"]) == 0
    assert "the steps were not profiled: expected work on the host, got none" in caplog.text
    assert len(metrics_of(tmp_path / "run")) == 10


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["on", "off"])
def test_a_run_profiles_steps_on_a_gpu(graphs, tmp_path) -> None:
    options = ("--run.device", "cuda", "--run.compile", "off", "--run.cuda_graphs", graphs)
    assert main([*tiniest(tmp_path), "--run.profile", "2", "--optim.steps", "12", *FIXED, *options]) == 0
    _, summary, host, *kernels = (tmp_path / "run/profile.txt").read_text().splitlines()
    assert int(summary.split()[-1]) > 100
    assert "device wait" in host
    assert any("adamw_kernel" in line for line in kernels)
    assert all(0 <= line["device_wait"] <= 1 for line in metrics_of(tmp_path / "run"))
