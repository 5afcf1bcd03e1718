"""Images in a folder, with random access."""

import logging
import os
import stat
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import Path

import torch

from capi.data.listing import IMAGE_EXTENSIONS, SourceError, listing_fingerprint
from capi.data.retry import persistent

logger = logging.getLogger(__name__)

_EXTENSIONS = frozenset(map(os.fsencode, IMAGE_EXTENSIONS))
_STAT_THREADS = 16
_STAT_CHUNK = 1024
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class ImageFolder:
    """Every image file below a folder, in the order of its path; hidden files and folders are left out.

    The names are one block of bytes with offsets. Loader processes share both, however they are started: a fork copies
    no page that is only read, and torch hands a spawned process its tensors in shared memory.
    """

    def __init__(self, path: str) -> None:
        self.source = f"folder:{path}"
        root = Path(path).expanduser()
        if not root.is_dir():
            raise SourceError(f"{self.source}: expected a folder, got {'a file' if root.exists() else 'no such path'}")
        self._root = os.fsencode(root)
        names, ends = bytearray(), array("q", [0])
        for name in _image_names(self._root):
            names += name
            ends.append(len(names))
        if not names:
            raise SourceError(f"{self.source}: expected images of a format that Pillow reads, found none at any depth")
        self._names = torch.frombuffer(names, dtype=torch.uint8)
        self._ends = torch.frombuffer(ends, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def name(self, index: int) -> str:
        return os.fsdecode(self._path(*self._relative_names(range(index, index + 1))))

    def read(self, index: int) -> bytes:
        """The bytes of the file. Raises OSError or, of what is no regular file and might never end, ValueError."""
        name = self.name(index)
        return persistent(partial(_read_regular, Path(name)), name)

    @cached_property
    def fingerprint(self) -> str:
        """Number, names relative to the folder and sizes of the images: asks the file system for every size."""
        # A file system behind a network takes its time for each, and answers many at once.
        with ThreadPoolExecutor(_STAT_THREADS) as threads:
            return listing_fingerprint(self._with_sizes(threads))

    def _with_sizes(self, threads: ThreadPoolExecutor) -> Iterator[tuple[bytes, int | None]]:
        n, stride = len(self), _STAT_THREADS * _STAT_CHUNK
        for start in range(0, n, stride):
            stop = min(start + stride, n)
            chunks = (range(first, min(first + _STAT_CHUNK, stop)) for first in range(start, stop, _STAT_CHUNK))
            yield from chain.from_iterable(threads.map(self._sizes, chunks))

    def _sizes(self, indices: range) -> list[tuple[bytes, int | None]]:
        return [(name, _size(self._path(name))) for name in self._relative_names(indices)]

    def _relative_names(self, indices: range) -> list[bytes]:
        ends = self._ends[indices.start : indices.stop + 1].tolist()
        block = self._names[ends[0] : ends[-1]].numpy().tobytes()
        return [block[start - ends[0] : end - ends[0]] for start, end in pairwise(ends)]

    def _path(self, name: bytes) -> bytes:
        return os.path.join(self._root, name)  # noqa: PTH118 (a Path for each of a million files takes seconds)


def _read_regular(path: Path) -> bytes:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"expected a regular file, got {_KINDS.get(stat.S_IFMT(mode), 'a file of another kind')}")
    return path.read_bytes()


def _size(path: bytes) -> int | None:
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except OSError:  # A link that leads nowhere, or a file that is gone: reading it will say so.
        return None


def _image_names(root: bytes) -> Iterator[bytes]:
    """Names below `root`, relative to it, in the order of their bytes."""
    visited = set()  # A link may lead back to a folder above it.
    pending = [b""]  # Names still to come, the next one last; those of folders end with a slash.
    while pending:
        name = pending.pop()
        if name and not name.endswith(b"/"):
            yield name
            continue
        folder = os.path.join(root, name)  # noqa: PTH118
        try:
            status = os.stat(folder)  # noqa: PTH116
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                found = [name + entry for entry in map(_wanted, entries) if entry]
        except OSError as error:
            logger.warning("left out the folder %s: %s", os.fsdecode(folder), error.strerror)
            continue
        # With its slash, a folder stands where the names in it do.
        pending += sorted(found, reverse=True)


def _wanted(entry: os.DirEntry[bytes]) -> bytes | None:
    """The name of an image, that of a folder with a slash, or None."""
    if entry.name.startswith(b"."):
        return None
    try:
        if entry.is_dir():
            return entry.name + b"/"
    except OSError:  # A link that leads to itself.
        pass
    _, dot, extension = entry.name.rpartition(b".")
    return entry.name if dot and extension.lower() in _EXTENSIONS else None
