"""Folders, .tar shards and Hugging Face data sets: what is listed, how it is named, and what a broken place costs."""

import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from capi.config import Config
from capi.data import ImageStream
from capi.sources import IndexedSource, ShardedSource, open_source

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
            path.rename(path.with_stem(f"{path.stem}0"))
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
        monkeypatch.setattr("capi.folder._STAT_CHUNK", 1)
        monkeypatch.setattr("capi.folder._STAT_THREADS", 3)
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
        moved = ImageStream(make_config(f"wds:{tmp_path}/b/*.tar", shuffle_buffer=4), state=state)
        assert stream.fingerprint == moved.fingerprint
        for batch, images in zip(moved, expected, strict=False):
            assert batch.images.equal(images)
        assert not caplog.records
        (tmp_path / "b" / "2.tar").write_bytes(data)
        ImageStream(make_config(f"wds:{tmp_path}/b/*.tar", shuffle_buffer=4), state=state)
        assert "epoch 0 restarts" in caplog.text and "3 files" in caplog.text


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
