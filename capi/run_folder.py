"""The folder of a run: one process at a time may use it, and an earlier run in it is moved aside, never deleted."""

import fcntl
import logging
import os
import socket
from contextlib import suppress
from itertools import count
from pathlib import Path

logger = logging.getLogger(__name__)


class RunFolder:
    """A run's folder, made where it is missing and locked for this process until `release` or its end, however it ends.

    Raises:
        ValueError: another process uses the folder.
        OSError: the folder cannot be made or written to.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = _acquire(path)

    def move_aside(self) -> Path:
        """Moves what is there to `<path>.1` (or the next free number), and goes on with an empty folder.

        Raises:
            ValueError: it cannot be moved.
        """
        here = self.path.resolve()  # of a link, what it leads to
        if Path.cwd().is_relative_to(here):
            raise ValueError(f"{self.path} holds another run and is the working directory; expected another run folder")
        aside = next(p for n in count(1) if not os.path.lexists(p := here.with_name(f"{here.name}.{n}")))
        try:
            here.rename(aside)
            here.mkdir()
        except OSError as error:
            raise ValueError(
                f"{self.path} holds another run, which cannot be moved to {aside} ({error.strerror}); "
                "expected another run.output_dir"
            ) from error
        old, self._lock = self._lock, _acquire(self.path)
        _release(aside, old)
        logger.warning("moved the earlier run in %s to %s", self.path, aside)
        return aside

    def release(self) -> None:
        """Lets others use the folder, and removes it if nothing was written to it."""
        _release(self.path, self._lock)
        with suppress(OSError):
            self.path.rmdir()


def _acquire(folder: Path) -> int | None:
    """The open lock file; None on a file system without locks."""
    path = folder / ".lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # A lock of the process, unlike that of flock: loader processes that outlive a kill do not hold it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = os.read(lock, 200).decode(errors="replace").strip() or "another process"
            os.close(lock)
            raise ValueError(
                f"{folder} is in use by {owner}; expected another run.output_dir, or that run to end first"
            ) from error
        except OSError as error:
            os.close(lock)
            logger.warning("%s cannot be locked (%s): see to it that no other run uses it", folder, error.strerror)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                with suppress(OSError):  # A full disk takes no note, but does not stop a run that writes nothing.
                    os.truncate(lock, 0)
                    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return lock
        os.close(lock)  # Its owner has just left, and with it the file.


def _release(folder: Path, lock: int | None) -> None:
    with suppress(OSError):
        (folder / ".lock").unlink()
    if lock is not None:
        os.close(lock)
