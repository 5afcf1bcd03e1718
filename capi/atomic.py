"""Files that are there whole or not at all, whenever the process is killed and however full the disk is."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary file and moves it to `path` once its bytes are on disk.

    Raises:
        OSError: the file could not be written; `path` is as it was, and no temporary stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.touch()
        permissions = temporary.stat().st_mode
        write(temporary)
        with suppress(OSError):  # not on every file system
            temporary.chmod(permissions)  # safetensors writes files that their owner alone may read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        # PyTorch hides the system's error behind one of its own, and safetensors has a type for it.
        if isinstance(error, OSError | RuntimeError | SafetensorError):
            raise OSError(f"{path} could not be written: {first_cause(error)}") from error
        raise


def sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def first_cause(error: BaseException) -> str:
    """The system's error, if there is one behind this, in one line."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause or error).partition("\n")[0]
