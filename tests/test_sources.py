"""Folders, .tar shards and Hugging Face data sets: what is listed, how it is named, and what a broken place costs."""

import errno
import importlib
import io
import os
import re
import shutil
import sys
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from capi.config import Config
from capi.data import ImageStream, evaluation_images
from capi.data.listing import IMAGE_EXTENSIONS, _image_extensions
from capi.data.retry import PersistentFile, persistent
from capi.data.shards import HubShards
from capi.data.sources import Cursor, IndexedSource, ShardedSource, ShardReader, SourceError, open_source

os.environ["HF_HUB_OFFLINE"] = "1"


def make_config(source: str, **data) -> Config:
    config = Config()
    config.model.patch_size, config.optim.batch_size, config.run.device = 2, 4, "cpu"
    config.masking.prediction_subsampling = 0.5
    config.data.source, config.data.image_size, config.data.num_workers = source, 8, 0
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


def opened(source: str, **data) -> IndexedSource | ShardedSource:
    return open_source(make_config(source, **data))


def encoded(number: int, file_format: str = "PNG") -> bytes:
    """An image of one colour, whose red tells its number."""
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (number, 50, 50)).save(file, file_format)
    return file.getvalue()


def number(data: bytes) -> int:
    return Image.open(io.BytesIO(data)).getpixel((0, 0))[0]


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def parquet(path: Path, numbers: Iterable[int]) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encoded(n), "path": f"{n}.png"} for n in numbers]
    pq.write_table(pa.table({"image": images}), path)


class TestFingerprint:
    @pytest.fixture(params=["folder", "wds", "hf"])
    def place(self, request, tmp_path: Path) -> tuple[Path, Callable[[str], str]]:
        """A folder of three files, and the fingerprint of a source in a folder of that path."""
        root = tmp_path / "first"
        if request.param == "hf":
            pytest.importorskip("datasets")
        for i in range(3):
            if request.param == "hf":
                parquet(root / f"train-{i}.parquet", [i])
            else:
                (root / "a").mkdir(parents=True, exist_ok=True)
                name = "a/x.png" if request.param == "folder" else "a/x.tar"
                (root / name.replace("x", str(i))).write_bytes(b"0123"[i:])
        pattern = {"folder": "folder:{}", "wds": "wds:{}/a/*.tar", "hf": "hf:{}"}[request.param]
        return root, lambda path: opened(pattern.format(path)).fingerprint

    def test_is_the_same_wherever_the_files_lie(self, place, tmp_path: Path, monkeypatch):
        root, fingerprint = place
        expected = fingerprint(str(root))
        assert expected.startswith("3 files, ")
        shutil.copytree(root, tmp_path / "elsewhere" / "second")
        (tmp_path / "link").symlink_to(root)
        monkeypatch.chdir(tmp_path)
        for path in (f"{root}/", str(tmp_path / "elsewhere" / "second"), "first", "./elsewhere/second/", "link"):
            assert fingerprint(path) == expected, path

    @pytest.mark.parametrize("change", ["added", "removed", "renamed", "resized"])
    def test_is_another_for_other_files(self, place, change: str):
        root, fingerprint = place
        before = fingerprint(str(root))
        path = sorted(p for p in root.rglob("*") if p.is_file())[1]
        if change == "added":
            shutil.copy(path, path.with_stem(f"{path.stem}0"))
        elif change == "removed":
            path.unlink()
        elif change == "renamed":
            path.rename(path.with_stem(f"{path.stem[:-1]}7"))
        elif path.suffix == ".parquet":
            parquet(path, [7, 8])
        else:
            path.write_bytes(b"longer than it was")
        assert fingerprint(str(root)) != before

    def test_names_and_sizes_do_not_run_into_each_other(self, tmp_path: Path):
        for folder, files in (("a", {"1.png": 12, "2.png": 3}), ("b", {"1.png": 1, "2.png": 23})):
            (tmp_path / folder).mkdir()
            for name, size in files.items():
                (tmp_path / folder / name).write_bytes(bytes(size))
        assert opened(f"folder:{tmp_path}/a").fingerprint != opened(f"folder:{tmp_path}/b").fingerprint

    def test_many_files_are_listed_in_order_whatever_answers_first(self, tmp_path: Path, monkeypatch):
        for i in range(50):
            (tmp_path / f"{i}.png").write_bytes(bytes(i))
        expected = opened(f"folder:{tmp_path}").fingerprint
        assert expected.startswith("50 files, 1225 bytes, ")
        monkeypatch.setattr("capi.data.folder._STAT_CHUNK", 1)
        monkeypatch.setattr("capi.data.folder._STAT_THREADS", 3)
        assert opened(f"folder:{tmp_path}").fingerprint == expected

    def test_link_to_nowhere_has_no_size(self, tmp_path: Path):
        (tmp_path / "0.png").symlink_to(tmp_path / "nowhere")
        before = opened(f"folder:{tmp_path}").fingerprint
        assert before.startswith("1 files, 0 bytes, ")
        (tmp_path / "nowhere").write_bytes(b"")
        assert opened(f"folder:{tmp_path}").fingerprint != before

    def test_remote_shards_are_known_by_their_names(self):
        pytest.importorskip("aiohttp")
        first, moved, signed, other = (
            opened(f"wds:http://{place}").fingerprint
            for place in (
                "a.org/x/{0..3}.tar",
                "b.org/y/z/{0..3}.tar",
                "a.org/x/{0..3}.tar?key=7",
                "a.org/x/{0..4}.tar",
            )
        )
        assert first == moved == signed != other

    def test_synthetic_scenes_depend_on_number_size_and_seed(self):
        config = make_config("synthetic", synthetic_size=10)
        before = open_source(config).fingerprint
        config.run.seed = 1
        values = {before, open_source(config).fingerprint, opened("synthetic", synthetic_size=11).fingerprint}
        assert len(values) == 3

    def test_streamed_source_goes_on_under_another_path(self, tmp_path: Path, caplog):
        (tmp_path / "a").mkdir()
        for shard in range(2):
            data = tar_of({f"{i}.png": encoded(10 * shard + i) for i in range(6)})
            (tmp_path / "a" / f"{shard}.tar").write_bytes(data)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        stream = ImageStream(make_config(f"wds:{tmp_path}/a/*.tar", shuffle_buffer=4))
        batches = iter(stream)
        next(batches)
        state, expected = stream.state_dict(), [batch.images for batch in islice(batches, 4)]
        moved = ImageStream(make_config(f"wds:{tmp_path}/b/*.tar", shuffle_buffer=4), states=[state])
        assert stream.fingerprint == moved.fingerprint
        for batch, images in zip(moved, expected, strict=False):
            assert batch.images.equal(images)
        assert not caplog.records
        (tmp_path / "b" / "2.tar").write_bytes(data)
        ImageStream(make_config(f"wds:{tmp_path}/b/*.tar", shuffle_buffer=4), states=[state])
        assert "epoch 0 restarts" in caplog.text and "3 files" in caplog.text


class Server(ThreadingHTTPServer):
    """Serves `data` under every path, as far as `mode` lets it."""

    def __init__(self, data: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.status, self.ranges, self.n_drops, self.drop_at = data, 200, True, 0, 0
        self.n_requests, self.n_sent = 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server = self.server
        server.n_requests += 1
        found = server.status == 200 or "/good" in self.path
        body, asked = server.data if found else b"", self.headers.get("Range")
        first, last = 0, len(body) - 1
        if found and server.ranges and asked:
            first, last = (int(edge) for edge in asked.removeprefix("bytes=").split("-"))
            last = min(last, len(body) - 1)
            body = body[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(server.data)}")
        else:
            self.send_response(200 if found else server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            if server.n_drops and first <= server.drop_at <= last:
                server.n_drops -= 1
                body = body[: server.drop_at - first]
                self.close_connection = True
            server.n_sent += len(body)
            with suppress(ConnectionError):  # The client may have read enough.
                self.wfile.write(body)

    def log_message(self, *_):
        pass


class TestReasons:
    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch):
        monkeypatch.setattr("capi.data.retry._DELAYS", (0, 0))

    @pytest.mark.parametrize(
        ("place", "expected"),
        [
            ("page", "expected a .tar archive, got a file that begins with b'<html>quota exceeded"),
            ("empty", "expected a .tar archive, got an empty file"),
            ("folder", "IsADirectoryError: "),
            ("short", "ReadError: "),
        ],
    )
    def test_of_a_local_shard(self, tmp_path: Path, place: str, expected: str):
        path = tmp_path / "0.tar"
        if place == "folder":
            path.mkdir()
        else:
            contents = {
                "page": b"<html>quota exceeded</html>",
                "empty": b"",
                "short": tar_of({"0.txt": bytes(999)})[:700],
            }
            path.write_bytes(contents[place])
        config = make_config(f"wds:{path}", num_workers=0)
        for consumer in (lambda: next(iter(ImageStream(config))), lambda: evaluation_images(config, 1)):
            with pytest.raises(SourceError, match="none readable among 1") as caught:
                consumer()
            assert f"{path}: " in str(caught.value)
            assert expected in str(caught.value)
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("status", [403, 404, 503, None])
    def test_of_a_remote_shard(self, status: int | None):
        pytest.importorskip("aiohttp")
        with serving(b"") as server:
            server.status = status
            url = f"{server.url}/0.tar" if status else "http://127.0.0.1:9/0.tar"
            with pytest.raises(SourceError, match="none readable among 1") as caught:
                next(iter(ImageStream(make_config(f"wds:{url}"))))
        assert f"{url}: " in str(caught.value)
        assert (f"ClientResponseError: {status}" if status else "Cannot connect to host 127.0.0.1:9") in str(
            caught.value
        )

    def test_of_the_first_images(self, tmp_path: Path):
        broken = encoded(1, "JPEG")[:-2]
        (tmp_path / "0.tar").write_bytes(tar_of({f"{i}.jpg": broken for i in range(5)}))
        with pytest.raises(SourceError, match="none readable among 5") as caught:
            next(iter(ImageStream(make_config(f"wds:{tmp_path}/0.tar"))))
        said = [f"{tmp_path}/0.tar:{i}.jpg: OSError: image file is truncated" in str(caught.value) for i in range(5)]
        assert said == [True, True, True, False, False]

    def test_of_a_shard_met_on_the_way(self, tmp_path: Path, caplog):
        (tmp_path / "0.tar").write_bytes(tar_of({f"{i}.png": encoded(i) for i in range(4)}))
        (tmp_path / "1.tar").write_bytes(b"<html>quota exceeded</html>")
        stream = ImageStream(make_config(f"wds:{tmp_path}/*.tar", shuffle_buffer=1))
        list(islice(stream, 5))
        assert f"{tmp_path}/1.tar: SourceError: expected a .tar archive" in caplog.text
        assert stream.n_skipped == 1

    @pytest.mark.parametrize(
        ("protocol", "package", "hint"),
        [("http", "aiohttp", r"'\.\[data\]'"), ("s3", "s3fs", "s3fs"), ("gs", "gcsfs", "gcsfs")],
    )
    def test_missing_package_is_named(self, monkeypatch, protocol: str, package: str, hint: str):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
        monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, protocol, raising=False)
        with pytest.raises(ImportError, match=f"^wds:{protocol}://a/0.tar needs {package}: pip install {hint}$"):
            opened(f"wds:{protocol}://a/0.tar")

    def test_unknown_protocol_is_named(self):
        with pytest.raises(SourceError, match="expected a protocol that fsspec knows, got foo"):
            opened("wds:foo://a/0.tar")


@contextmanager
def serving(data: bytes) -> Iterator[Server]:
    with Server(data) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


class TestBrokenConnection:
    IMAGES = tar_of({f"{i}.png": encoded(i) + bytes(3000) for i in range(40)})
    BLOCK = 2**13

    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch):
        pytest.importorskip("aiohttp")
        monkeypatch.setattr("capi.data.retry._DELAYS", (0, 0, 0, 0))
        monkeypatch.setitem(fsspec.config.conf, "http", {"block_size": self.BLOCK})
        monkeypatch.setattr("capi.data.shards._TAR_BUFFER", self.BLOCK)

    def numbers(self, source: ShardedSource) -> list[int]:
        return [number(read()) for _, read in source.shard(0)]

    @pytest.mark.parametrize("ranges", [True, False])
    @pytest.mark.parametrize("n_drops", [0, 1, 4])
    @pytest.mark.parametrize("place", [0, 100, 70_000])
    def test_goes_on_where_it_broke(self, caplog, ranges: bool, n_drops: int, place: int):
        with serving(self.IMAGES) as server:
            server.ranges, server.n_drops, server.drop_at = ranges, n_drops, place
            assert self.numbers(opened(f"wds:{server.url}/0.tar")) == list(range(40))
            assert server.n_drops == 0
            if ranges:
                assert len(caplog.records) == n_drops
                # What came is not asked for again: twice a block and what is read ahead of it, at most.
                assert server.n_sent <= len(self.IMAGES) + (n_drops + 1) * 2 * self.BLOCK

    def test_what_is_lost_for_good_is_named_and_counted(self):
        with serving(self.IMAGES) as server:
            server.n_drops, server.drop_at = 1000, 70_000
            reader = ShardReader(
                opened(f"wds:{server.url}/0.tar"), seed=0, reader=0, n_readers=1, buffer=1, cursor=Cursor(0)
            )
            samples = list(reader.rest_of_epoch())
            assert server.n_drops == 1000 - 10  # Five tries for the member that broke, five for the next.
        read = [sample for sample in samples if isinstance(sample.data, bytes)]
        assert [number(sample.data) for sample in read] == list(range(len(read)))
        assert (70_000 - 2 * self.BLOCK) // 4096 - 1 <= len(read) <= 70_000 // 4096
        member, rest = samples[len(read) :]
        assert member.name == f"{server.url}/0.tar:{len(read)}.png"
        assert rest.name == f"{server.url}/0.tar after {len(read) + 1} images"
        for sample in (member, rest):
            assert f" of {len(self.IMAGES)}: ClientPayloadError" in str(sample.data)
            assert (
                70_000 - 2 * self.BLOCK <= int(re.search(r"reading broke at byte (\d+)", str(sample.data))[1]) <= 70_000
            )

    @pytest.mark.parametrize(("status", "n_tries"), [(404, 1), (403, 1), (429, 5), (500, 5), (503, 5)])
    def test_only_what_may_pass_is_tried_again(self, status: int, n_tries: int):
        with serving(self.IMAGES) as server:
            server.status = status
            with pytest.raises(FileNotFoundError):
                self.numbers(opened(f"wds:{server.url}/0.tar"))
            assert server.n_requests == 2 * n_tries  # HEAD and GET.

    @pytest.mark.parametrize("kind", ["folder", "wds"])
    def test_hiccup_of_a_local_file_system(self, tmp_path: Path, monkeypatch, kind: str):
        data = encoded(7) if kind == "folder" else self.IMAGES
        path = tmp_path / ("0.png" if kind == "folder" else "0.tar")
        path.write_bytes(data)
        source = opened(f"{kind}:{tmp_path}" if kind == "folder" else f"wds:{path}")
        open_file, calls = io.open, []

        class Hiccup(io.FileIO):
            def readall(self):
                return self.read()

            def read(self, n: int = -1):
                calls.append(n)
                if len(calls) in (1, 3, 4):
                    raise OSError(errno.EIO, "Input/output error")
                return super().read(min(n, 50_000))

        monkeypatch.setattr(
            io, "open", lambda file, mode="r", *a: Hiccup(file) if file == path else open_file(file, mode, *a)
        )
        if kind == "folder":
            assert source.read(0) == data
        else:
            assert self.numbers(source) == list(range(40))
            assert len(calls) > 4

    def test_hiccup_of_a_hugging_face_data_set(self, tmp_path: Path, monkeypatch):
        pytest.importorskip("datasets")
        parquet(tmp_path / "train.parquet", range(10))
        source = opened(f"hf:{tmp_path}")
        rows, n_starts = HubShards._rows, []

        def hiccup(self, index: int):
            n_starts.append(index)
            for position, row in enumerate(rows(self, index)):
                if position == 3 * len(n_starts) and len(n_starts) < 4:
                    raise OSError(errno.EIO, "Input/output error")
                yield row

        monkeypatch.setattr(HubShards, "_rows", hiccup)
        assert self.numbers(source) == list(range(10))
        assert len(n_starts) == 4

    def test_file_that_ends_early_is_read_on(self, monkeypatch):
        data, n_opened = bytes(range(200)), []

        class File(io.BytesIO):
            size = len(data)

        class System:
            def open(self, path: str, mode: str) -> File:
                n_opened.append(path)
                return File(data if len(n_opened) > 2 else data[:100])

        monkeypatch.setattr(fsspec, "url_to_fs", lambda url: (System(), url))
        file = PersistentFile("somewhere://0.tar")
        assert b"".join(iter(lambda: file.read(60), b"")) == data
        assert len(n_opened) == 3

    def test_missing_file_is_not_tried_again(self, tmp_path: Path, caplog):
        (tmp_path / "0.png").symlink_to(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError):
            opened(f"folder:{tmp_path}").read(0)
        assert not caplog.records

    def test_waits_longer_from_try_to_try_and_not_for_ever(self, monkeypatch):
        monkeypatch.undo()
        waited = []
        monkeypatch.setattr("time.sleep", waited.append)

        def broken():
            raise OSError(errno.EIO, "Input/output error")

        with pytest.raises(OSError, match="Input/output error"):
            persistent(broken, "a file")
        assert waited == sorted(set(waited)) and len(waited) == 4 and sum(waited) < 8


class TestFolderListing:
    def test_order_is_that_of_the_paths(self, tmp_path: Path):
        names = ["a-b/1.png", "a.png", "a/0.png", "a/b/0.png", "a/b.png", "a0.png", "b/é.png", "b/z.png"]
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        source = opened(f"folder:{tmp_path}")
        assert [source.name(i) for i in range(len(source))] == sorted(f"{tmp_path}/{name}" for name in names)

    def test_folder_that_cannot_be_listed_is_named(self, tmp_path: Path, caplog, monkeypatch):
        (tmp_path / "0.png").write_bytes(b"")
        (tmp_path / "closed").mkdir()
        scandir = os.scandir

        def refusing(folder: bytes):
            if b"closed" in folder:
                raise PermissionError(13, "Permission denied")
            return scandir(folder)

        monkeypatch.setattr(os, "scandir", refusing)
        assert len(opened(f"folder:{tmp_path}")) == 1
        assert f"left out the folder {tmp_path}/closed/: Permission denied" in caplog.text

    def test_loader_processes_share_the_names(self, tmp_path: Path):
        for i in range(30):
            (tmp_path / f"{'a' * 200}{i:02d}.png").write_bytes(b"")
        (tmp_path / "b.png").write_bytes(b"")
        source = opened(f"folder:{tmp_path}")
        # No name is padded to the longest.
        assert source._names.nbytes == 30 * 206 + 5
        # A process that is spawned gets a handle, not a copy.
        assert len(ForkingPickler.dumps(source)) < 2000
        assert source._names.is_shared() and source._ends.is_shared()
        assert source.name(30) == str(tmp_path / "b.png")


class TestFormats:
    """Whatever the installed Pillow decodes is an image."""

    WRITTEN = "apng avif bmp dds dib gif icns ico j2k jfif jp2 jpg mpo pcx png pnm qoi sgi tga tif webp"

    @pytest.fixture
    def images(self) -> dict[str, bytes]:
        files = {}
        for i, extension in enumerate(self.WRITTEN.split()):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), (10 * i, 50, 50)).save(file, Image.registered_extensions()[f".{extension}"])
            files[f"{i:02d}.{extension if i % 2 else extension.upper()}"] = file.getvalue()
        return files

    @pytest.mark.parametrize("kind", ["folder", "wds"])
    def test_are_found_and_read(self, tmp_path: Path, images: dict[str, bytes], kind: str):
        others = dict.fromkeys(("a.txt", "b.mp4", "c.json", "d.npy", "e.pdf", "png", "f.svg"), b"no image")
        if kind == "wds":
            (tmp_path / "0.tar").write_bytes(tar_of(images | others))
            source = f"wds:{tmp_path}/0.tar"
        else:
            for name, data in (images | others).items():
                (tmp_path / name).write_bytes(data)
            source = f"folder:{tmp_path}"
            assert len(opened(source)) == len(images)
        reds = evaluation_images(make_config(source), len(images))[:, 0, 0, 0].tolist()
        assert all(abs(red - 10 * i) <= 8 for i, red in enumerate(reds))

    @pytest.mark.parametrize("extension", ["ps", "eps", "mpg", "h5", "grib", "wmf"])
    def test_leave_out_what_pillow_cannot_decode_itself(self, tmp_path: Path, extension: str):
        (tmp_path / f"0.{extension}").write_bytes(b"")
        with pytest.raises(SourceError, match="expected images of a format that Pillow reads, found none"):
            opened(f"folder:{tmp_path}")

    def test_include_those_of_plugins(self, monkeypatch):
        monkeypatch.setitem(Image.OPEN, "NEW", (None, None))
        monkeypatch.setitem(Image.EXTENSION, ".new", "NEW")
        assert _image_extensions() - IMAGE_EXTENSIONS == {"new"}


class TestStartUp:
    @pytest.fixture(autouse=True)
    def listen(self, caplog):
        caplog.set_level("INFO")

    def images(self, place: Path, n: int) -> None:
        place.mkdir(exist_ok=True)
        for i in range(n):
            (place / f"{i}.png").write_bytes(encoded(i))

    @pytest.mark.parametrize(("n", "warns"), [(3, True), (4, False)])
    def test_says_how_many_images_a_folder_has(self, tmp_path: Path, caplog, n: int, warns: bool):
        self.images(tmp_path / "a", n)
        config = make_config(f"folder:{tmp_path / 'a'}")
        ImageStream(config)
        assert f"folder:{tmp_path / 'a'}: {n} images" in caplog.text
        assert ("fewer images than optim.batch_size, 4" in caplog.text) == warns
        caplog.clear()
        ImageStream(config, rank=1, world_size=2)
        assert not caplog.records

    @pytest.mark.parametrize(("n", "warns"), [(1, True), (3, True), (4, False), (6, False)])
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_says_how_many_shards_a_stream_has(self, tmp_path: Path, caplog, n: int, warns: bool, num_workers: int):
        for shard in range(2):
            members = {f"{i}.png": encoded(i) for i in range(n) if i % 2 == shard}
            (tmp_path / f"{shard}.tar").write_bytes(tar_of(members))
        config = make_config(f"wds:{tmp_path}/*.tar", num_workers=num_workers)
        config.run.micro_batch_size = 2
        list(islice(ImageStream(config), 12))
        assert f"wds:{tmp_path}/*.tar: 2 shards" in caplog.text
        assert caplog.text.count("fewer images than optim.batch_size, 4") == warns


class TestMemberNames:
    """WebDataset's rule: what stands before the first dot names a sample, what follows is the extension."""

    def taken(self, tmp_path: Path, image_key: str, *names: str) -> list[str]:
        (tmp_path / "0.tar").write_bytes(tar_of({name: encoded(1) for name in names}))
        shard = opened(f"wds:{tmp_path}/0.tar", image_key=image_key).shard(0)
        return [name.removeprefix(f"{tmp_path}/0.tar:") for name, _ in shard]

    @pytest.mark.parametrize(
        ("image_key", "expected"),
        [
            ("auto", ["a.jpg", "d/a.PNG"]),
            ("jpg", ["a.jpg"]),
            (".JPG", ["a.jpg"]),
            ("left.jpg", ["a.left.jpg", "b.LEFT.jpg"]),
            ("*.jpg", ["a.left.jpg", "b.LEFT.jpg", "b.right.jpg", "IMG_2021.05.01.jpg"]),
            ("*jpg", ["a.jpg", "a.left.jpg", "b.LEFT.jpg", "b.right.jpg", "IMG_2021.05.01.jpg"]),
        ],
    )
    def test_key_picks_members(self, tmp_path: Path, image_key: str, expected: list[str]):
        names = (
            "a.jpg",
            "a.json",
            "a.left.jpg",
            "b.LEFT.jpg",
            "b.right.jpg",
            "IMG_2021.05.01.jpg",
            "d/a.PNG",
            ".h.jpg",
        )
        taken = self.taken(tmp_path, image_key, *names)
        assert [name for name in taken if not name.startswith("members of")] == expected

    @pytest.mark.parametrize(
        "names",
        [
            ("a.jpg", "a.seg.png"),
            ("a.seg.png", "a.jpg"),
            ("d.e/a.jpg",),
            ("a.v2.json", "a.jpg"),
            ("._a.b.jpg", "c.jpg"),
        ],
    )
    def test_companions_of_an_image_are_not_missed(self, tmp_path: Path, names: tuple[str, ...]):
        assert len(self.taken(tmp_path, "auto", *names)) == 1

    @pytest.mark.parametrize("image_key", ["auto", "jpg"])
    def test_what_is_left_out_is_counted_and_said_once(self, tmp_path: Path, caplog, image_key: str):
        for shard in range(2):
            names = ["plain.jpg", "plain.seg.jpg", *(f"track v2.{i}.jpg" for i in range(8)), "x/y.2.jpg"]
            (tmp_path / f"{shard}.tar").write_bytes(tar_of(dict.fromkeys(names, encoded(shard))))
        config = make_config(f"wds:{tmp_path}/*.tar", image_key=image_key)
        list(islice(ImageStream(config), 6))
        said = [record.getMessage() for record in caplog.records if "WebDataset" in record.getMessage()]
        assert len(said) == 1
        assert "9 of 10 images of" in said[0]
        assert "such as track v2.0.jpg, whose extension is 0.jpg" in said[0]
        assert "data.image_key '*jpg' takes them" in said[0]
        assert len({*self.taken(tmp_path, "*jpg", *names)}) == len(names)

    def test_shard_of_such_names_alone_says_so(self, tmp_path: Path):
        (tmp_path / "0.tar").write_bytes(tar_of({f"IMG_2021.05.{i:02d}.jpg": encoded(i) for i in range(8)}))
        with pytest.raises(SourceError, match=r"8 of 8 images of .*0\.tar, such as IMG_2021\.05\.00\.jpg"):
            next(iter(ImageStream(make_config(f"wds:{tmp_path}/0.tar"))))

    def test_key_that_takes_all_is_named(self, tmp_path: Path):
        (tmp_path / "0.tar").write_bytes(tar_of({f"{i}.rgb.jpg": encoded(i) for i in range(3)}))
        with pytest.raises(SourceError, match=r"data\.image_key 'rgb\.jpg' takes them"):
            next(iter(ImageStream(make_config(f"wds:{tmp_path}/0.tar"))))

    def test_wildcards_in_a_path_that_exists_are_taken_as_they_are(self, tmp_path: Path):
        (tmp_path / "[raw] run").mkdir()
        (tmp_path / "[raw] run" / "0.tar").write_bytes(tar_of({"0.png": encoded(5)}))
        assert opened(f"wds:{tmp_path}/[raw] run/0.tar").n_shards == 1


class TestConfigurations:
    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        pytest.importorskip("datasets")
        place, header = tmp_path / "two", "---\nconfigs:\n"
        for i, name in enumerate(("full", "small")):
            parquet(place / name / "train.parquet", [i])
            header += f"- config_name: {name}\n  data_files: {name}/*.parquet\n"
        (place / "README.md").write_text(f"{header}---\n")
        return place

    def test_is_named_after_the_data_set(self, place: Path):
        full, small = opened(f"hf:{place}:full"), opened(f"hf:{place}:small")
        assert [number(read()) for source in (full, small) for _, read in source.shard(0)] == [0, 1]

    @pytest.mark.parametrize(("suffix", "got"), [("", "none"), (":large", "large")])
    def test_must_be_one_of_those_there_are(self, place: Path, suffix: str, got: str):
        message = (
            rf"^hf:{place}{suffix}: expected hf:NAME:CONFIGURATION with one of the .* \['full', 'small'\], got {got}$"
        )
        with pytest.raises(SourceError, match=message):
            opened(f"hf:{place}{suffix}")

    def test_colon_in_a_local_path(self, place: Path):
        other = place.rename(place.with_name("two:full"))
        assert opened(f"hf:{other}:small").n_shards == 1
        parquet(other.with_name("one:x") / "train.parquet", [3])
        assert opened(f"hf:{other.with_name('one:x')}").n_shards == 1

    def test_missing_split_is_said_on_one_line(self, place: Path):
        with pytest.raises(SourceError, match=r"split test cannot be loaded: ValueError: Bad split: test\."):
            opened(f"hf:{place}:full", hf_split="test")
