"""Timing on a simulated GPU: the device's time without the host's, the host's apart; ceilings; profiles of steps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from simulated_gpu import DEVICE, SimulatedGpu

pytest.importorskip("pytest_benchmark")

from benchmarks import costs, step_profile, timing
from benchmarks.measure import Failed, Measurement, race
from benchmarks.timing import CeilingMeter, Contestant, GraphReplays, Unavailable, WallClock, host_seconds, stopwatch


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimulatedGpu:
    return SimulatedGpu(monkeypatch)


@pytest.mark.parametrize("host", [1e-6, 400e-6])
def test_a_short_call_is_not_charged_with_its_launch(gpu: SimulatedGpu, host: float) -> None:
    contestant = Contestant(gpu.kernel(100e-6, host))
    watch = stopwatch(contestant, DEVICE)
    assert [watch.seconds(i) for i in range(3)] == pytest.approx([100e-6] * 3)
    assert watch.how == f"replays of a CUDA graph of {watch.calls} calls"
    assert watch.calls >= 4
    assert host_seconds(contestant, DEVICE) == pytest.approx(host)
    # Device events alone would have charged it.
    assert WallClock(contestant, DEVICE).seconds(0) == pytest.approx(100e-6 + host)


def test_what_comes_before_a_backward_is_not_timed(gpu: SimulatedGpu) -> None:
    seen = []

    def forward(number: int) -> tuple[int]:
        gpu.launch(5e-3)
        return (number + 10,)

    def backward(number: int) -> None:
        seen.append(number)
        gpu.launch(1e-3, 2e-3)

    contestant = Contestant(backward, lambda i: (i,), forward, copies=7)
    watch = stopwatch(contestant, DEVICE)
    assert watch.seconds(0) == pytest.approx(1e-3)
    assert seen[-watch.calls :] == list(range(10, 17)), "each call of the graph has inputs of its own"
    assert host_seconds(contestant, DEVICE) == pytest.approx(2e-3)


@pytest.mark.parametrize("host", [10e-6, 3e-3, 40e-3])
def test_what_no_graph_holds_is_timed_after_a_spin(gpu: SimulatedGpu, host: float) -> None:
    def run() -> None:
        if gpu.capturing is not None:
            raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")
        gpu.launch(200e-6, host)

    watch = stopwatch(Contestant(run), DEVICE)
    assert watch.seconds(0) == pytest.approx(200e-6)
    assert "after a spin of" in watch.how
    assert "operation not permitted" in watch.how


def test_a_spin_that_hid_too_little_is_doubled(gpu: SimulatedGpu) -> None:
    """Where the host needs longer at times than when it was measured."""
    watch = timing.AfterSpin(Contestant(gpu.kernel(200e-6, 4e-3)), DEVICE, host=100e-6, reason="")
    assert watch.seconds(0) == pytest.approx(200e-6)


def test_what_waits_for_the_device_has_no_time_of_its_own(gpu: SimulatedGpu) -> None:
    def run() -> None:
        gpu.synchronize()
        gpu.launch(200e-6, 1e-3)

    with pytest.raises(Unavailable, match=r"the host is never through .* no CUDA graph can hold it: .* is capturing"):
        stopwatch(Contestant(run), DEVICE)


def test_a_time_that_depends_on_the_spin_is_none(gpu: SimulatedGpu) -> None:
    contestant = Contestant(lambda: gpu.launch(100e-6 + gpu.spun / 100))
    with pytest.raises(Unavailable, match="125 us after a spin, 150 us after one twice as long"):
        timing.AfterSpin(contestant, DEVICE, host=1e-3, reason="")


def test_a_step_is_timed_as_it_comes(gpu: SimulatedGpu) -> None:
    contestant = Contestant(gpu.kernel(4e-3, 12e-3), calls=4)
    watch = stopwatch(contestant, DEVICE)
    assert watch.seconds(0) == pytest.approx(16e-3 / 4)
    assert host_seconds(contestant, DEVICE) is None


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_on_a_gpu_a_peer_that_cannot_run_is_absent_and_we_have_failed(gpu: SimulatedGpu, one_at_a_time: bool) -> None:
    def cannot(*_: object) -> Contestant:
        raise RuntimeError("no kernel image\n  for this device")

    def is_wrong(*_: object) -> Contestant:
        raise AssertionError("off by 3")

    def race_of(ours: Callable) -> dict:
        entrants = {
            "enters": cannot,
            "runs": lambda: Contestant(cannot),
            "wrong": is_wrong,
            "ours": ours,
            "peer": lambda: Contestant(gpu.kernel(8e-3)),
        }
        return race(entrants, DEVICE, 3, 60, one_at_a_time)

    results = race_of(lambda: Contestant(gpu.kernel(8e-3)))
    for name in ("enters", "runs"):
        assert isinstance(results[name], Unavailable)
        assert str(results[name]) == "RuntimeError: no kernel image for this device"
    assert isinstance(results["wrong"], Failed)
    for name in ("ours", "peer"):
        assert results[name].seconds == pytest.approx([8e-3] * 3)
        assert results[name].peak_memory_bytes == 250
        assert results[name].host_seconds == pytest.approx(5e-6)
    for ours in (cannot, is_wrong):
        results = race_of(ours)
        assert isinstance(results["ours"], Failed)
        assert isinstance(results["peer"], Measurement), "the others are measured all the same"


def test_a_step_is_inspected_after_its_rounds(gpu: SimulatedGpu) -> None:
    def inspect(name: str, contestant: Contestant, seconds: float) -> dict:
        return {"of": name, "calls": contestant.calls, "seconds": seconds}

    results = race({"ours": lambda: Contestant(gpu.kernel(8e-3, 0), calls=4)}, DEVICE, 3, 60, True, inspect)
    assert results["ours"].inspected == {"of": "ours", "calls": 4, "seconds": pytest.approx(2e-3)}


def test_ceilings_are_measured_once_for_a_size_in_the_units_they_are_named_after() -> None:
    meter, asked = CeilingMeter(torch.device("cpu"), matmul_size=100), []
    meter._median = lambda run: (run(), asked.append(1), 1e-3)[-1]
    assert meter.at(10**6) == costs.Ceilings(2.0, 2e-3, 10**6)
    assert meter.at(4 * 10**6) == costs.Ceilings(8.0, 2e-3, 4 * 10**6)
    assert meter.at(10**6).copied_bytes == 10**6
    assert len(asked) == 3, "a product and two copies"


def test_copies_of_a_ceiling_are_as_large_as_the_operation() -> None:
    assert costs.sinkhorn_positionwise(256, 512, 16384, 3, 2).copied_bytes == 2**32
    assert costs.clustering_head(256, 512, 16384, 3, 1024, 2).copied_bytes == 2**32
    forward = costs.attention(512, 106, 106, 16, 64, 2, "forward")
    assert 2 * forward.copied_bytes == forward.bytes


def test_a_ceiling_is_a_median_of_graph_replays(gpu: SimulatedGpu) -> None:
    assert CeilingMeter(DEVICE, 100)._median(gpu.kernel(300e-6, 1e-3)) == pytest.approx(300e-6)


def test_the_captures_of_one_graph_share_a_stream_and_a_pool(
    gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backward can be captured only where its forward was, and must not be given the forward's memory."""
    captures, graph = [], torch.cuda.graph

    def noted(captured: object, pool: object = None, stream: object = None):
        captures.append((captured, pool, stream))
        return graph(captured, pool, stream)

    monkeypatch.setattr(torch.cuda, "graph", noted)
    GraphReplays(Contestant(gpu.kernel(1e-3)), DEVICE, 2)
    (before, _, stream), (_, pool, same_stream) = captures
    assert pool is before.pool()
    assert stream is same_stream is not None


# Profiles


def test_a_profile_that_fails_says_so_and_costs_no_figure(tmp_path: Path) -> None:
    """Here there is no device to profile."""
    seen = step_profile.inspect(Contestant(lambda: None, calls=4), 1.0, tmp_path / "p.txt")
    assert list(seen) == ["profile"]
    assert seen["profile"].startswith("failed: ")
