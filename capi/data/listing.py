"""What the sources of images share: the files that are images, the fingerprint of a listing, the error they raise."""

import hashlib
import io
from collections.abc import Iterable

from PIL import Image

# Pillow names these and cannot decode them: a film, weather and other data whose decoder an application must bring, and
# PostScript, a program, which it leaves to Ghostscript.
_NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


def _image_extensions() -> frozenset[str]:
    extensions = Image.registered_extensions()  # Loads all formats.
    formats = Image.OPEN.keys() - _NO_IMAGES | {"MPO"}  # What opens JPEG opens MPO too.
    return frozenset(extension.removeprefix(".") for extension, name in extensions.items() if name in formats)


IMAGE_EXTENSIONS = _image_extensions()
"""Of the files that the installed Pillow decodes, in lower case and without the dot."""


def open_image(data: bytes) -> Image.Image:
    """What `Image.open` gives of these bytes, but not of a format that Pillow leaves to others, whatever the name says.

    Raises what that raises.
    """
    return Image.open(io.BytesIO(data), formats=[name for name in Image.ID if name not in _NO_IMAGES])


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
