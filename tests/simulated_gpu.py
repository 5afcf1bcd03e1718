"""A GPU as two clocks: the host's, which launching advances, and the device's, which runs what was launched."""

import time
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch

CYCLES_PER_SECOND = 2e9
DEVICE = torch.device("cuda")


class SimulatedGpu:
    """Takes the place of torch.cuda for as long as a test runs; time passes only where it is said to."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.host = self.device = self.spun = 0.0
        self.capturing: list[float] | None = None
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool):
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.device = max(gpu.device, gpu.host)

            def query(self) -> bool:
                return gpu.host >= self.at

            def synchronize(self) -> None:
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, end: "Event") -> float:
                return (end.at - self.at) * 1e3

        class Graph:
            def __init__(self):
                self.work: list[float] = []

            def pool(self) -> "Graph":
                return self

            def replay(self) -> None:
                gpu.launch(sum(self.work), host=20e-6)

        @contextmanager
        def graph(captured: Graph, pool: Graph | None = None, stream: object = None):
            gpu.capturing = captured.work
            try:
                yield
            finally:
                gpu.capturing = None

        @contextmanager
        def on_stream(stream: object):
            yield

        stream = type("Stream", (), {"wait_stream": lambda self, other: None})
        fakes = {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": graph,
            "Stream": lambda device: stream(),
            "stream": on_stream,
            "current_stream": lambda device: stream(),
            "synchronize": lambda *_: self.synchronize(),
            "_sleep": lambda cycles: self._spin(cycles / CYCLES_PER_SECOND),
            "empty_cache": lambda: None,
            "memory_allocated": lambda device: 100,
            "max_memory_allocated": lambda device: 350,
            "reset_peak_memory_stats": lambda device: None,
        }
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        for module in ("timing", "measure"):
            patch.setattr(f"benchmarks.{module}.perf_counter", lambda: self.host)
        patch.setattr(time, "sleep", self._pass)
        zeros = torch.zeros
        patch.setattr(torch, "zeros", lambda *size, device=None, **options: zeros(*size, **options))

    def _spin(self, seconds: float) -> None:
        self.spun = seconds
        self.launch(seconds)

    def _pass(self, seconds: float) -> None:
        self.host += seconds

    def synchronize(self) -> None:
        if self.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.host = max(self.host, self.device)

    def launch(self, seconds: float, host: float = 5e-6) -> None:
        """Work of so many seconds, which takes the host so long to launch."""
        self.host += host
        if self.capturing is not None:
            self.capturing.append(seconds)
        else:
            self.device = max(self.device, self.host) + seconds

    def kernel(self, seconds: float, host: float = 5e-6) -> Callable[..., None]:
        return lambda *_: self.launch(seconds, host)
