"""Reading from file systems and servers that fail now and then."""

import errno
import logging
import time
from collections.abc import Callable
from functools import partial
from io import IOBase
from pathlib import Path
from typing import TypeVar

import fsspec

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_DELAYS = (0.5, 1.0, 2.0, 4.0)  # Seconds before the second to the fifth try.
_LASTING = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(ImportError, ValueError, TypeError, LookupError, NotImplementedError),
)
_LASTING_ERRNOS = {errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO}
_PASSING_STATUS = {408, 425, 429}  # Of the HTTP answers 400 to 499 these alone may change.
_CHUNK = 2**20


def attempt(read: Callable[..., Result], *args) -> Result | Exception:
    """What `read` returns, or the exception that it raises: on foreign data that may be any."""
    try:
        return read(*args)
    except Exception as error:
        return error


def reason(error: Exception) -> str:
    """Type and message of an error, on one line."""
    return " ".join(f"{type(_origin(error)).__name__}: {_origin(error)}".split())


def persistent(read: Callable[[], Result], name: str) -> Result:
    """What `read` returns, tried five times within eight seconds while it raises what may pass.

    Raises:
        Exception: that of the last try, or the first that will not pass: no such file, no access, no such protocol.
    """
    for delay in _DELAYS:
        try:
            return read()
        except Exception as error:
            if not _may_pass(error):
                raise
            logger.warning("%s: %s; trying again in %g s", name, reason(error), delay)
            time.sleep(delay)
    return read()


def _origin(error: Exception) -> Exception:
    # fsspec takes whatever a server answers for a missing file.
    return error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error


def _may_pass(error: Exception) -> bool:
    error = _origin(error)
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return not 400 <= status < 500 or status in _PASSING_STATUS
    return not isinstance(error, _LASTING) and getattr(error, "errno", None) not in _LASTING_ERRNOS


class PersistentFile:
    """A file at a path or URL, read from its start to its end: where the connection breaks, reading goes on there."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._file: IOBase | None = None
        self._position, self._size = 0, None
        self._ranges = True
        self.start = b""
        """The first bytes read, at most 40."""

    def read(self, n: int) -> bytes:
        """At most `n` bytes, none at the end.

        Raises:
            OSError: what is left is lost, of a file that could be read up to here.
            Exception: of whatever kind, if nothing could be read.
        """
        try:
            data = persistent(partial(self._read, n), self._url)
        except Exception as error:
            if self._position == 0:
                raise
            size = "" if self._size is None else f" of {self._size}"
            raise OSError(f"reading broke at byte {self._position}{size}: {reason(error)}") from error
        if self._position == 0:
            self.start = data[:40]
        self._position += len(data)
        return data

    def close(self) -> None:
        if self._file is not None:
            attempt(self._file.close)
            self._file = None

    def _read(self, n: int) -> bytes:
        try:
            if self._file is None:
                self._open()
            data = self._file.read(n)
        except Exception as error:
            self.close()
            if self._ranges and isinstance(error, ValueError) and self._url.startswith("http"):
                # A server that sends whole files only.
                self._ranges = False
                return self._read(n)
            raise
        if not data and self._size is not None and self._position < self._size:
            self.close()
            raise ConnectionError(f"the file ended at byte {self._position}")
        return data

    def _open(self) -> None:
        if "://" in self._url:
            system, path = fsspec.url_to_fs(self._url)
            self._file = system.open(path, "rb", **({} if self._ranges else {"block_size": 0}))
            self._size = getattr(self._file, "size", None)
        else:
            self._file = Path(self._url).open("rb")  # noqa: SIM115 (closed by close)
        if self._position and isinstance(attempt(self._file.seek, self._position), Exception):
            to_skip = self._position
            while to_skip and (skipped := len(self._file.read(min(to_skip, _CHUNK)))):
                to_skip -= skipped
