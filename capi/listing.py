"""What the sources of images share: the files that are images, the fingerprint of a listing, the error they raise."""

import hashlib
from collections.abc import Iterable

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"})


class SourceError(ValueError):
    """A data source that is missing, empty, or has no readable image."""


def listing_fingerprint(files: Iterable[tuple[bytes, int | None]]) -> str:
    """Number, size and digest of files in this order, each given by its name and its size in bytes (None: unknown)."""
    digest, n_files, n_bytes = hashlib.sha256(), 0, 0
    for name, size in files:
        digest.update(b"%d %b %d\n" % (len(name), name, -1 if size is None else size))
        n_files += 1
        n_bytes += size or 0
    return f"{n_files} files, {n_bytes} bytes, sha256 {digest.hexdigest()}"
