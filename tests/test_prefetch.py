"""Steps on the device: in order, resumable, without a leftover process; on a GPU copied while another step computes."""

import multiprocessing
import os
import signal
import time
from collections import Counter
from contextlib import contextmanager
from itertools import islice

import pytest
import torch
from torch import Tensor

from capi.config import Config
from capi.data import Batch, ImageStream
from capi.data.prefetch import DevicePrefetcher, MicroBatch
from capi.data.sources import SourceError
from capi.profiling import HostTime

CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # More processes than cores, on purpose.


def make_config(*, micro_batch_size: int | None = 2, num_workers: int = 0, device: str = "cpu") -> Config:
    config = Config()
    config.model.patch_size, config.masking.prediction_subsampling = 7, 0.5
    config.masking.mask_ratio = (0.3, 0.7)
    config.optim.batch_size = 6
    config.run.device, config.run.micro_batch_size = device, micro_batch_size
    config.data.source, config.data.image_size = "synthetic", 28
    config.data.synthetic_size, config.data.num_workers = 32, num_workers
    return config


def assert_holds(step: list[MicroBatch], expected: list[Batch]) -> None:
    assert len(step) == len(expected)
    for (images, masks), batch in zip(step, expected, strict=True):
        assert torch.equal(images.cpu(), batch.images)
        assert torch.equal(masks.visible_indices.cpu(), batch.masks.visible_indices)
        assert torch.equal(masks.predict_indices.cpu(), batch.masks.predict_indices)
        assert masks.visible_counts == batch.masks.visible_counts
        assert masks.predict_counts == batch.masks.predict_counts


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_groups_micro_batches_and_moves_nothing_on_a_cpu(monkeypatch, micro_batch_size: int | None):
    stream = ImageStream(make_config(micro_batch_size=micro_batch_size))
    n = stream.micro_batches_per_step
    assert n == (1 if micro_batch_size is None else 3)
    expected = list(islice(ImageStream(make_config(micro_batch_size=micro_batch_size)), 4 * n))
    taken = []
    iterate = ImageStream.batches
    monkeypatch.setattr(ImageStream, "batches", lambda self, _: (taken.append(b) or b for b in iterate(self)))
    batches = DevicePrefetcher(stream, CPU)
    for k in range(4):
        step = next(batches)
        batches.prefetch()
        assert len(taken) == (k + 1) * n
        assert_holds(step, expected[k * n : (k + 1) * n])
        assert all(images is batch.images for (images, _), batch in zip(step, taken[k * n :], strict=True))


def test_state_is_that_of_the_last_step_yielded():
    stream = ImageStream(make_config())
    batches = DevicePrefetcher(stream, CPU)
    assert batches.state_dict()["step"] == 0
    next(batches), next(batches)
    state = batches.state_dict()
    expected = next(batches)
    assert batches.state_dict()["step"] == 3
    resumed = DevicePrefetcher(ImageStream(make_config(), states=[state]), CPU)
    assert resumed.state_dict()["step"] == 2
    for (a, _), (b, _) in zip(next(resumed), expected, strict=True):
        assert torch.equal(a, b)


def test_waiting_for_the_loader_is_measured_and_nothing_else(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    iterate = ImageStream.batches

    def slow(stream, interrupted):
        for batch in iterate(stream):
            clock[0] += 2
            yield batch

    monkeypatch.setattr(ImageStream, "batches", slow)
    host = HostTime()
    batches = DevicePrefetcher(ImageStream(make_config()), CPU, host=host)
    for _ in range(2):
        next(batches)
        clock[0] += 100  # The step itself.
    assert host.seconds() == {"data wait": 2 * 3 * 2, "other": 200}


@pytest.mark.parametrize("how", ["exception", "close", "Ctrl-C"])
def test_loader_processes_end(how: str):
    assert not multiprocessing.active_children()
    batches = DevicePrefetcher(ImageStream(make_config(num_workers=2)), CPU)
    try:
        with batches:
            next(batches)
            assert len(multiprocessing.active_children()) == 2
            if how == "exception":
                raise RuntimeError("of the step")
            if how == "Ctrl-C":
                for process in multiprocessing.active_children():
                    os.kill(process.pid, signal.SIGSTOP)  # So that the signal finds us waiting for the loader.
                signal.signal(signal.SIGALRM, signal.default_int_handler)
                signal.setitimer(signal.ITIMER_REAL, 0.5)
                for _ in range(100):
                    next(batches)
                pytest.fail("expected to be interrupted")
    except (RuntimeError, KeyboardInterrupt):
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGCONT)
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert not multiprocessing.active_children()
    with pytest.raises(StopIteration):
        next(batches)


def test_unreadable_files_are_counted_and_errors_pass(tmp_path):
    (tmp_path / "0.png").write_bytes(b"broken")
    config = make_config()
    config.data.source = f"folder:{tmp_path}"
    with DevicePrefetcher(ImageStream(config), CPU) as batches, pytest.raises(SourceError, match="none readable"):
        next(batches)
    assert batches.n_skipped == 0
    config.data.source = "synthetic"
    stream = ImageStream(config)
    stream._skipped.add("a file")
    assert DevicePrefetcher(stream, CPU).n_skipped == 1


class FakeStream:
    """A CUDA stream as its order alone: `behind` says how much of every stream must have run before its next work."""

    def __init__(self, name: str = "copy"):
        self.name, self.behind = name, Counter()

    def launch(self) -> Counter:
        self.behind[self.name] += 1
        return Counter(self.behind)

    def record_event(self, event: "FakeEvent | None" = None) -> "FakeEvent":
        event = event or FakeEvent()
        event.behind = Counter(self.behind)
        return event

    def wait_stream(self, stream: "FakeStream") -> None:
        self.behind |= stream.behind


class FakeEvent:
    waited: list[Counter]

    def __init__(self, blocking: bool = False):
        self.behind = Counter()

    def synchronize(self) -> None:
        FakeEvent.waited.append(self.behind)


class FakeCuda:
    """Notes on which stream every tensor is copied, and who was told of its use."""

    def __init__(self, monkeypatch):
        self.compute = self.current = FakeStream("compute")
        self.copied: dict[int, Counter] = {}
        self.recorded: set[int] = set()
        self.kept: list[Tensor] = []  # Alive, so that no identity comes twice.
        FakeEvent.waited = []
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream())
        monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("the whole device was waited for"))
        monkeypatch.setattr(Tensor, "to", lambda *args, **options: self.to(*args, **options))
        monkeypatch.setattr(Tensor, "record_stream", lambda *args: self.record(*args))

    @contextmanager
    def stream(self, stream: FakeStream):
        previous, self.current = self.current, stream
        yield
        self.current = previous

    def to(self, tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        assert device.type == "cuda" and non_blocking
        copy = tensor.clone()
        self.kept.append(copy)
        assert self.current.name == "copy"
        self.copied[id(copy)] = self.current.launch()
        return copy

    def record(self, tensor: Tensor, stream: FakeStream) -> None:
        assert stream is self.compute
        self.recorded.add(id(tensor))


@pytest.mark.parametrize("n_calls", [0, 1, 3, 5])
def test_order_of_copies_and_computation(monkeypatch, n_calls: int):
    expected = list(islice(ImageStream(make_config()), 15))
    cuda = FakeCuda(monkeypatch)
    stream = ImageStream(make_config())
    batches = DevicePrefetcher(stream, torch.device("cuda"))
    for k in range(5):
        n_waits = len(FakeEvent.waited)
        step = next(batches)
        assert cuda.current is cuda.compute
        assert_holds(step, expected[3 * k : 3 * k + 3])
        launched = cuda.compute.launch()
        for images, masks in step:
            for tensor in (images, masks.visible_indices, masks.predict_indices):
                # The copy is behind the computation that follows, which the allocator knows of.
                assert cuda.copied[id(tensor)] <= launched
                assert id(tensor) in cuda.recorded
                # It began without waiting for any computation on the device.
                assert cuda.copied[id(tensor)]["compute"] == 0
        for i in range(n_calls):
            batches.prefetch()
            assert len(cuda.copied) == 3 * (3 * (k + 1) + min(i + 1, 3))
        assert stream.state_dict()["step"] == k + 1 + (n_calls >= 3)
        assert batches.state_dict()["step"] == k + 1
        # Before any of step k + 1 is copied, the host waits for k steps, 0 to k - 1, and not for step k. Where
        # `prefetch` was not called, the like happens in `next`, for step k.
        waits = [behind["compute"] for behind in FakeEvent.waited[n_waits:]]
        assert waits == ([k] if n_calls else [k - 1] * (k > 0))


def make_gpu_config(num_workers: int) -> Config:
    config = make_config(micro_batch_size=16, num_workers=num_workers, device="auto")
    config.optim.batch_size, config.data.image_size = 64, 224
    return config


BUSY_CYCLES = 800_000_000  # Some 0.4 seconds, longer than the loader needs for a step on a quiet machine.


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 2])
def test_copies_overlap_with_a_busy_device_and_arrive_intact(num_workers: int):
    device = torch.device("cuda", torch.cuda.current_device())
    config, n_steps, cycles, n_overlaps = make_gpu_config(num_workers), 9, BUSY_CYCLES, 0
    expected = list(islice(ImageStream(config), 4 * n_steps))
    with DevicePrefetcher(ImageStream(config), device) as batches:
        for k in range(n_steps):
            step = next(batches)
            torch.cuda._sleep(cycles)
            seen = [(images.clone(), masks) for images, masks in step]
            del step  # Its memory must not be written to before the clones are made.
            computed = torch.cuda.current_stream(device).record_event()
            for _ in range(4):
                batches.prefetch()
            batches._copy_stream.synchronize()
            if not computed.query():
                n_overlaps += 1
            elif cycles < 16 * BUSY_CYCLES:
                # Either the copies waited for the device, which they would however long it is busy, or the loader took
                # longer than that, as it does for the first scenes and on a busy machine: longer still, then.
                cycles *= 2
            assert_holds(seen, expected[4 * k : 4 * k + 4])
    assert n_overlaps >= 2


@pytest.mark.gpu
def test_memory_of_two_steps():
    device = torch.device("cuda", torch.cuda.current_device())
    with DevicePrefetcher(ImageStream(make_gpu_config(2)), device) as batches:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_stats(device)["active_bytes.all.current"]
        for _ in range(6):
            step = next(batches)
            torch.cuda._sleep(BUSY_CYCLES)
            del step
            for _ in range(4):
                batches.prefetch()
        peak = torch.cuda.memory_stats(device)["active_bytes.all.peak"] - before
    assert peak < 2.5 * 64 * 3 * 224**2
