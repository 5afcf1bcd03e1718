"""Loader processes that die, hang or have too little memory: one line says so, within seconds."""

import io
import multiprocessing
import os
import signal
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from images import encoded
from PIL import Image
from torch.utils.data._utils import signal_handling

from capi.config import Config
from capi.data import Batch, ImageStream, evaluation_images
from capi.data.loader import LoaderError, affordable_prefetch
from capi.data.prefetch import DevicePrefetcher
from capi.data.reading import HungError, Interrupted, Reads, StuckError
from capi.data.shards import TarShards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # More processes than cores, on purpose.

CPU = torch.device("cpu")


def make_config(source: str = "synthetic", *, num_workers: int = 0, read_timeout: float = 60.0) -> Config:
    config = Config()
    config.model.patch_size, config.masking.prediction_subsampling = 2, 0.5
    config.optim.batch_size, config.run.device = 4, "cpu"
    config.data.source, config.data.image_size, config.data.synthetic_size = source, 8, 8
    config.data.num_workers, config.data.read_timeout = num_workers, read_timeout
    return config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encoded(Image.new("RGB", (9, 9), (number,) * 3)))
    return tmp_path


@pytest.fixture
def stuck(folder: Path, monkeypatch) -> Iterator[str]:
    """A file whose reading never ends, as on a dead mount; released after the test, since a thread waits for it."""
    name, released, read_bytes = str(folder / "1.png"), threading.Event(), Path.read_bytes

    def read(path: Path) -> bytes:
        if str(path) == name:
            released.wait(30)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    yield name
    released.set()


@pytest.fixture(params=["alone", "beside other loaders"])
def sigchld(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With and without PyTorch's handler, which the first of its loaders sets and none takes away."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    if request.param != "alone":
        signal_handling._set_SIGCHLD_handler()
    yield
    signal.signal(signal.SIGCHLD, handler)


class TestDeadProcess:
    @pytest.mark.usefixtures("sigchld")
    @pytest.mark.parametrize(
        ("signum", "message"),
        [
            (signal.SIGKILL, r"ended by SIGKILL: so the system ends processes where memory runs out"),
            (signal.SIGBUS, r"ended by SIGBUS: /dev/shm has .* free of .*--shm-size.*data.num_workers 0"),
            (signal.SIGSEGV, r"ended by SIGSEGV$"),
        ],
    )
    def test_ends_the_wait_and_says_how_it_died(self, signum: signal.Signals, message: str):
        handler = signal.getsignal(signal.SIGCHLD)
        with DevicePrefetcher(ImageStream(make_config(num_workers=2)), CPU) as batches:
            next(batches)
            victim = multiprocessing.active_children()[0]
            os.kill(victim.pid, signum)
            time.sleep(0.3)  # Nothing is raised but where the images are asked for: a checkpoint may be under way.
            began = time.monotonic()
            with pytest.raises(LoaderError, match=rf"loader process \(pid {victim.pid}\) was {message}"):
                list(islice(batches, 100))
            assert time.monotonic() - began < 10
            assert batches.state_dict()["step"] >= 1
        assert not multiprocessing.active_children()
        assert signal.getsignal(signal.SIGCHLD) == handler

    def test_status_of_a_process_that_exits(self, monkeypatch):
        monkeypatch.setattr("capi.data.stream.sample_masks", lambda *_: os._exit(3))
        with pytest.raises(LoaderError, match=r"a loader process \(pid \d+\) ended with status 3$"):
            next(iter(ImageStream(make_config(num_workers=1))))

    def test_batch_that_cannot_be_sent_ends_its_process(self, monkeypatch, capfd):
        # multiprocessing prints a traceback and drops what it cannot send: the run would wait for it for ever.
        monkeypatch.setattr(Batch, "__reduce__", lambda _: [].index(0))
        with pytest.raises(LoaderError, match="ended with status 1"):
            next(iter(ImageStream(make_config(num_workers=1))))
        assert "a loader process cannot send a batch: ValueError: 0 is not in list" in capfd.readouterr().err

    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
    def test_follows_its_parent_even_from_a_stuck_read(self, folder: Path, stuck: str):
        fork = multiprocessing.get_context("fork")
        receiver, sender = fork.Pipe(duplex=False)
        parent = fork.Process(target=_load_and_tell, args=[sender, f"folder:{folder}"])
        parent.start()
        pids = receiver.recv()
        parent.kill()
        deadline = time.monotonic() + 10
        while any(map(_alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(pids) == 2 and not any(map(_alive, pids))
        parent.join()


def _load_and_tell(sender: Connection, source: str) -> None:
    def tell() -> bool:
        sender.send([process.pid for process in multiprocessing.active_children()])
        return False

    list(ImageStream(make_config(source, num_workers=2)).batches(tell))


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


class TestStuckRead:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_is_given_up_named_and_replaced(self, folder: Path, stuck: str, caplog, num_workers: int):
        stream = ImageStream(make_config(f"folder:{folder}", num_workers=num_workers, read_timeout=0.2))
        began = time.monotonic()
        with DevicePrefetcher(stream, CPU) as batches:
            shown = [sorted(images[:, 0, 0, 0].tolist()) for ((images, _),) in islice(batches, 6)]
        assert shown == [[0, 2, 2, 3]] * 6
        assert stream.n_skipped == 1
        (message,) = [record.getMessage() for record in caplog.records if stuck in record.getMessage()]
        assert "StuckError: expected to be read within 0.2 s (data.read_timeout)" in message
        # Tried once by each process, and not again as long as that read has not returned.
        assert time.monotonic() - began < 10

    @pytest.mark.parametrize("num_workers", [0, 1])
    @pytest.mark.parametrize("place", ["between two members", "within a member"])
    def test_ends_its_shard_alone(self, tmp_path: Path, monkeypatch, caplog, place: str, num_workers: int):
        for shard in range(2):
            with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
                for i in range(4):
                    data = encoded(Image.new("RGB", (9, 9), (4 * shard + i,) * 3))
                    info = tarfile.TarInfo(f"{i}.png")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        released, members_of = threading.Event(), TarShards.shard

        def shard(source: TarShards, index: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
            for position, (name, read) in enumerate(members_of(source, index)):
                is_stuck = (index, position) == (1, 1)
                if is_stuck and place.startswith("between"):
                    released.wait(30)
                yield name, partial(released.wait, 30) if is_stuck else read

        monkeypatch.setattr(TarShards, "shard", shard)
        config = make_config(f"wds:{tmp_path}/*.tar", num_workers=num_workers, read_timeout=0.2)
        batches = ImageStream(config).batches()
        shown = {number for batch in islice(batches, 4) for number in batch.images[:, 0, 0, 0].tolist()}
        batches.close()
        released.set()
        assert shown == {0, 1, 2, 3, 4}
        n_images = 1 if place.startswith("between") else 2
        assert f"{tmp_path}/1.tar after {n_images} images: StuckError: expected to be read within 0.2 s" in caplog.text

    def test_does_not_hold_the_pictures(self, folder: Path, stuck: str):
        config = make_config(f"folder:{folder}", read_timeout=0.2)
        assert evaluation_images(config, 4)[:, 0, 0, 0].tolist() == [0, 2, 2, 3]

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_can_be_interrupted(self, folder: Path, stuck: str, num_workers: int):
        asked = []
        stream = ImageStream(make_config(f"folder:{folder}", num_workers=num_workers))
        began = time.monotonic()
        with (
            DevicePrefetcher(stream, CPU, lambda: asked.append(time.monotonic()) or len(asked) == 2) as batches,
            pytest.raises(Interrupted),
        ):
            list(islice(batches, 3))
        assert asked[1] - began < 10
        assert batches.state_dict()["step"] == 0
        assert time.monotonic() - asked[1] < 5  # The process that is stuck is not waited for.
        assert not multiprocessing.active_children()

    def test_process_that_does_not_run_can_be_interrupted(self, monkeypatch):
        """Stopped before its first batch: one on its way would be waited for, whose memory the process hands over."""
        monkeypatch.setattr("capi.data.stream.sample_masks", lambda *_: os.kill(os.getpid(), signal.SIGSTOP))
        with (
            DevicePrefetcher(ImageStream(make_config(num_workers=1)), CPU, lambda: True) as batches,
            pytest.raises(Interrupted),
        ):
            next(batches)
        assert not multiprocessing.active_children()

    @pytest.mark.parametrize("kind", ["named pipe", "socket", "device"])
    def test_what_is_no_regular_file_is_never_opened(self, folder: Path, caplog, kind: str):
        path = folder / "1.png"
        path.unlink()
        if kind == "named pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            monkey = socket.socket(socket.AF_UNIX)
            monkey.bind(os.path.relpath(path))
            monkey.close()
        batch = next(iter(ImageStream(make_config(f"folder:{folder}"))))
        assert batch.skipped == [str(path)]
        assert f"{path}: ValueError: expected a regular file, got a {kind}" in caplog.text


class TestReads:
    def test_gives_what_is_read_or_raised(self):
        reads = Reads(60.0)
        assert reads("a", lambda x: x + 1, 2) == 3
        assert repr(reads("a", lambda: 1 / 0)) == "ZeroDivisionError('division by zero')"
        assert reads("a", threading.get_ident) == reads("b", threading.get_ident) != threading.get_ident()
        reads.close()

    def test_a_late_answer_is_not_taken_for_another(self, monkeypatch):
        released = threading.Event()
        reads = Reads(0.05)
        late = reads("late", lambda: released.wait(30) and "late")
        assert isinstance(late, StuckError)
        assert isinstance(reads("late", lambda: "not asked"), StuckError)
        released.set()
        assert [reads(name, lambda n=name: n) for name in "abc"] == ["a", "b", "c"]
        deadline = time.monotonic() + 10
        while isinstance(answer := reads("late", lambda: "again"), StuckError) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert answer == "again"
        reads.close()

    def test_a_dead_source_ends_the_run(self, folder: Path, monkeypatch):
        for number in range(4, 10):
            (folder / f"{number}.png").touch()
        released = threading.Event()
        monkeypatch.setattr(Path, "read_bytes", lambda _: released.wait(30) and b"")
        with pytest.raises(HungError, match=r"8 reads in a row are stuck, the last of them .*\.png"):
            next(iter(ImageStream(make_config(f"folder:{folder}", read_timeout=0.02))))
        released.set()

    def test_leaves_no_thread(self, folder: Path):
        before = threading.active_count()
        batches = iter(ImageStream(make_config(f"folder:{folder}")))
        next(batches)
        batches.close()
        deadline = time.monotonic() + 10
        while threading.active_count() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() <= before


class TestSharedMemory:
    @pytest.fixture
    def room(self, monkeypatch) -> Callable[[int], None]:
        def set_to(free: int) -> None:
            status = SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=64_000_000)
            monkeypatch.setattr(os, "statvfs", {"/dev/shm": status}.__getitem__)

        return set_to

    def test_micro_batch_that_does_not_fit_is_refused(self, room):
        config = make_config(num_workers=2)
        room(3 * 8 * 8 * 4 - 1)
        with pytest.raises(LoaderError, match=r"/dev/shm has 0\.000767 MB free of 64 MB, expected .* --shm-size"):
            ImageStream(config)
        config.data.num_workers = 0
        ImageStream(config)

    def test_less_than_two_ahead_is_said_and_halved(self, room, caplog):
        n_bytes = 77_000_000
        room((2 * 8 + 1) * n_bytes)
        assert affordable_prefetch(n_bytes, 8, 1, 1) == 2
        assert not caplog.records
        for held, ranks in ((2, 1), (1, 2)):
            assert affordable_prefetch(n_bytes, 8, held, ranks) == 1
        assert "has 1.31 GB free" in caplog.text and "18 micro-batches of 77 MB" in caplog.text
        assert "1.39 GB" in caplog.text and "2.62 GB" in caplog.text and "--ipc=host" in caplog.text

    def test_no_shared_memory_file_system(self, monkeypatch):
        def missing(_: str) -> None:
            raise FileNotFoundError

        monkeypatch.setattr(os, "statvfs", missing)
        assert affordable_prefetch(10**15, 8, 1, 1) == 2

    def test_ranks_of_one_machine_share_it(self, room, monkeypatch, caplog):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        room(10 * 3 * 8 * 8)  # Each of two ranks has two images: six micro-batches of two may exist.
        stream, options = ImageStream(make_config(num_workers=1), world_size=2), {}
        assert "6 micro-batches of" in caplog.text
        monkeypatch.setattr("capi.data.stream.loaded", lambda _, **given: options.update(given) or (_ for _ in ()))
        assert list(stream) == [] and options["prefetch_factor"] == 1

    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_that_runs_out_ends_the_run_in_one_line(self, monkeypatch, num_workers: int):
        def full(_: torch.Tensor) -> None:
            raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

        monkeypatch.setattr(torch.Tensor, "share_memory_", full)
        with pytest.raises(LoaderError, match=r"cannot hand over .*No space left on device \(28\).*/dev/shm") as caught:
            next(iter(ImageStream(make_config(num_workers=num_workers))))
        assert "\n" not in str(caught.value)
        assert not multiprocessing.active_children()


def test_read_timeout_must_be_positive():
    with pytest.raises(ValueError, match=r"data\.read_timeout must be positive, got 0"):
        ImageStream(make_config(read_timeout=0.0))
