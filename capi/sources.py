"""Where images come from: sources with random access, and sources of shards that are streamed."""

import os
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import fsspec
import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from capi.config import Config
from capi.seeding import Purpose, generator
from capi.synthetic import SyntheticScenes

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"})

Result = TypeVar("Result")

_SCENE_CACHE_BYTES = 2**28
# A data set of a million loose files counts a million shards; finding one among them takes as many steps.
_MAX_HUB_SHARDS = 1024


class SourceError(ValueError):
    """A data source that is missing, empty, or has no readable image."""


class SyntheticImages:
    """The embedded scenes, kept in memory as far as they fit in 256 MiB."""

    def __init__(self, size: int, image_size: int, seed: int) -> None:
        self.source = "synthetic"
        self._scenes = SyntheticScenes(size, image_size, seed)
        self._cache: dict[int, ndarray] = {}
        self._cache_size = _SCENE_CACHE_BYTES // (3 * image_size**2)

    def __len__(self) -> int:
        return len(self._scenes)

    def name(self, index: int) -> str:
        return f"scene {index}"

    def read(self, index: int) -> UInt8[ndarray, "height width 3"]:
        image = self._cache.get(index)
        if image is None:
            image = self._scenes.image(index)
            if len(self._cache) < self._cache_size:
                self._cache[index] = image
        return image


class ImageFolder:
    """Every image file below a folder, in the order of its path; hidden files and folders are left out."""

    def __init__(self, path: str) -> None:
        self.source = f"folder:{path}"
        root = Path(path).expanduser()
        if not root.is_dir():
            raise SourceError(f"{self.source}: expected a folder, got {'a file' if root.exists() else 'no such path'}")
        paths = sorted(_image_paths(root))
        if not paths:
            raise SourceError(
                f"{self.source}: expected images ({', '.join(sorted(IMAGE_EXTENSIONS))}), found none at any depth"
            )
        # One block of bytes: counting the references of a list's strings would copy it into every forked process.
        self._paths = np.array([os.fsencode(p) for p in paths])

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return os.fsdecode(self._paths[index])

    def read(self, index: int) -> bytes:
        return Path(self.name(index)).read_bytes()


def _image_paths(root: Path) -> Iterator[str]:
    suffixes = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
    visited = set()  # A link may lead back to a folder above it.
    for folder, folders, files in os.walk(root, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in files:
            if not file.startswith(".") and file.lower().endswith(suffixes):
                yield os.path.join(folder, file)  # noqa: PTH118 (a Path for each of a million files takes seconds)


class TarShards:
    """Images in .tar shards (WebDataset's layout): members whose name after its first dot is the wanted extension.

    The `webdataset` builder of Hugging Face `datasets` does not serve: it stops at the first broken shard, at samples
    with different members, and decodes members that nobody asked for.
    """

    def __init__(self, pattern: str, image_key: str) -> None:
        self.source = f"wds:{pattern}"
        try:
            from braceexpand import braceexpand
        except ImportError as error:
            raise ImportError(f"{self.source} needs braceexpand: pip install capi[data]") from error
        self._urls = [url for expanded in braceexpand(pattern) for url in self._matches(expanded)]
        self._extensions = IMAGE_EXTENSIONS if image_key == "auto" else {image_key.lower().lstrip(".")}

    def _matches(self, pattern: str) -> list[str]:
        if "://" in pattern:
            return [pattern]
        path = Path(pattern).expanduser()
        matches = sorted(map(str, Path(path.anchor).glob(str(path.relative_to(path.anchor)))))
        if not matches:
            raise SourceError(f"{self.source}: expected .tar shards, found no file {pattern}")
        return matches

    @property
    def n_shards(self) -> int:
        return len(self._urls)

    def shard(self, index: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """Names of the images of one shard, each with a function that reads it before the next is asked for."""
        url = self._urls[index]
        with fsspec.open(url, "rb") as file, tarfile.open(fileobj=file, mode="r|*", bufsize=2**20) as tar:
            for member in tar:
                basename = member.name.rpartition("/")[2]
                hidden = basename.startswith(".")
                if member.isfile() and not hidden and basename.partition(".")[2].lower() in self._extensions:
                    yield f"{url}:{member.name}", partial(_member_bytes, tar, member)


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    return tar.extractfile(member).read()


class HubShards:
    """Images of a Hugging Face data set, streamed; `name` may be a local folder."""

    def __init__(self, name: str, split: str, image_key: str) -> None:
        self.source = f"hf:{name}"
        try:
            import datasets
        except ImportError as error:
            raise ImportError(f"{self.source} needs Hugging Face datasets: pip install capi[data]") from error
        try:
            dataset = datasets.load_dataset(os.path.expanduser(name), split=split, streaming=True)  # noqa: PTH111
        except Exception as error:
            raise SourceError(f"{self.source}: split {split} cannot be loaded: {error}") from error
        if dataset.column_names is not None and image_key not in dataset.column_names:
            raise SourceError(
                f"{self.source}: data.image_key must be one of the columns {dataset.column_names}, got {image_key}"
            )
        self._column = image_key
        self._dataset = dataset.select_columns([image_key]).cast_column(image_key, datasets.Image(decode=False))

    @property
    def n_shards(self) -> int:
        return min(self._dataset.num_shards, _MAX_HUB_SHARDS)

    def shard(self, index: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """Names of the images of one shard, each with a function that reads it."""
        # Plain iteration would divide the shard among the loader processes of torch once more; by batches it does not.
        batches = self._dataset.shard(self.n_shards, index).iter(batch_size=16)
        rows = (row for batch in batches for row in batch[self._column])
        for position, image in enumerate(rows):
            path = (image or {}).get("path") or "no path"
            yield f"{self.source} shard {index} row {position} ({path})", partial(_stored_bytes, image)


def _stored_bytes(image: dict | None) -> bytes:
    if image is None:
        raise ValueError("the row has no image")
    if image.get("bytes") is not None:
        return image["bytes"]
    with fsspec.open(image["path"], "rb") as file:
        return file.read()


IndexedSource = SyntheticImages | ImageFolder
ShardedSource = TarShards | HubShards


def open_source(config: Config) -> IndexedSource | ShardedSource:
    """The source that `config.data.source` names.

    Raises:
        ValueError: the name is of no known form.
        SourceError: there is nothing of that name, or no image in it.
        ImportError: the source needs the extra `data`.
    """
    data = config.data
    kind, _, place = data.source.partition(":")
    if data.source == "synthetic":
        return SyntheticImages(data.synthetic_size, data.image_size, config.run.seed)
    if kind == "folder" and place:
        return ImageFolder(place)
    if kind == "wds" and place:
        return TarShards(place, data.image_key)
    if kind == "hf" and place:
        return HubShards(place, data.hf_split, "image" if data.image_key == "auto" else data.image_key)
    raise ValueError(f"data.source must be synthetic, folder:PATH, hf:NAME or wds:PATTERN, got {data.source}")


class Sample(NamedTuple):
    """An image of a sharded source, as it was read: its bytes, or why there are none."""

    unit: int
    shard: int
    position: int
    name: str
    data: bytes | Exception


class Cursor(NamedTuple):
    """Where a reader stands: in `block` of `epoch`, which starts at (unit, position) and of which `taken` are gone."""

    epoch: int
    block: int = 0
    unit: int = 0
    position: int = 0
    taken: int = 0


class ShardReader:
    """Reader `reader` of `n_readers`, which share the samples of every epoch without overlap.

    An epoch visits the shards in an order of its own; where readers outnumber shards, several share a shard, each
    taking every n-th sample. Samples are shuffled in blocks of `buffer`: as one block is handed out, the next is read,
    so a position in the stream is five integers, and going back to it reads at most two blocks again.
    """

    def __init__(self, source: ShardedSource, *, seed: int, reader: int, n_readers: int, buffer: int, cursor: Cursor):
        self.cursor = cursor
        self._source, self._seed, self._buffer = source, seed, buffer
        self._reader, self._n_readers = reader, n_readers

    def rest_of_epoch(self) -> Iterator[Sample]:
        """The samples of the cursor's epoch from the cursor on, which moves along and ends at the next epoch."""
        epoch, number, unit, position, taken = self.cursor
        samples = self._in_reading_order(epoch, unit, position)
        block = list(islice(samples, self._buffer))
        while block:
            unit, position = block[0].unit, block[0].position
            order = generator(Purpose.SHUFFLE, self._seed, epoch, self._reader, number).permutation(len(block))
            following = []
            for count, i in enumerate(order, start=1):
                following += islice(samples, 1)
                if count > taken:
                    self.cursor = Cursor(epoch, number, unit, position, count)
                    yield block[i]
                block[i] = None  # Frees the bytes.
            block, number, taken = following, number + 1, 0
        self.cursor = Cursor(epoch + 1)

    def _in_reading_order(self, epoch: int, first_unit: int, first_position: int) -> Iterator[Sample]:
        n_parts = -(-self._n_readers // self._source.n_shards)
        order = generator(Purpose.ORDER, self._seed, epoch).permutation(self._source.n_shards * n_parts)
        units = order[self._reader :: self._n_readers]
        for unit in range(first_unit, len(units)):
            shard, part = divmod(int(units[unit]), n_parts)
            start = first_position if unit == first_unit else 0
            position = -1
            try:
                for position, (name, read) in enumerate(self._source.shard(shard)):
                    if position >= start and position % n_parts == part:
                        yield Sample(unit, shard, position, name, attempt(read))
            except Exception as error:
                # Whatever a broken shard makes its reader raise ends that shard alone.
                yield Sample(unit, shard, position + 1, f"{self._source.source} shard {shard}", error)


def attempt(read: Callable[..., Result], *args) -> Result | Exception:
    """What `read` returns, or the exception that it raises: on foreign data that may be any."""
    try:
        return read(*args)
    except Exception as error:
        return error


def in_order(source: IndexedSource | ShardedSource, start: int = 0) -> Iterator[bytes | ndarray | Exception]:
    """Every image of the source once, as `Sample.data`; an indexed source from `start` on and round to it."""
    if isinstance(source, IndexedSource):
        for index in chain(range(start, len(source)), range(start)):
            yield attempt(source.read, index)
        return
    for shard in range(source.n_shards):
        try:
            for _, read in source.shard(shard):
                yield attempt(read)
        except Exception as error:
            yield error
