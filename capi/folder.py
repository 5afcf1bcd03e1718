"""Images in a folder, with random access."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from capi.listing import IMAGE_EXTENSIONS, SourceError


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
