"""What ends a run before its last step: signals, and the end of torchrun, which started it."""

import logging
import math
import multiprocessing
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread, main_thread
from types import FrameType
from typing import NoReturn

logger = logging.getLogger("capi")

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
SECOND_SIGNAL_SECONDS = 2.0  # Schedulers and launchers may both send a first one.
LAST_CHECKPOINT_SECONDS = 60.0


class Stopped(BaseException):
    """A request ends the run. No Exception: those of a file that is read are taken for faults of the file."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopRequest:
    """Requests to stop: SIGTERM, SIGUSR2, Ctrl-C, or torchrun being gone.

    The first kills loader processes and raises Stopped in the main thread, or within `deferred` is noted in `signum`.
    `timeout` seconds later, or 2 seconds after a second one, the process ends with the status 128 + signum, whatever
    the main thread waits for: another thread calls `save`, for a minute at most.

    Use it as a context manager, in the main thread.
    """

    def __init__(self, timeout: float):
        self.signum: int | None = None
        self.save: Callable[[], None] = lambda: None
        self._timeout = timeout
        self._raises = True

    def __enter__(self) -> "StopRequest":
        # Handlers wait until the main thread returns from what it calls; what the interpreter writes here does not.
        self._received, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        self._handlers = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        self._watcher = Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._wakeup.close()
        self._watcher.join()  # Where it ends the process, it does so with the right status.
        self._received.close()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a request is only noted."""
        with self._raising(False):
            yield

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, also within `deferred`, a request raises Stopped, even one noted before."""
        with self._raising(True):
            if self.signum is not None:
                raise Stopped(self.signum)
            yield

    @contextmanager
    def _raising(self, raises: bool) -> Iterator[None]:
        before, self._raises = self._raises, raises
        try:
            yield
        finally:
            self._raises = before

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:  # A second one must not break off what the first has begun.
            self.signum = signum
            if self._raises:
                self.kill_loaders()  # Already the way of the exception through the loader would wait for them.
                raise Stopped(signum)

    def kill_loaders(self) -> None:
        """Kills the loader processes: of the orderly end of one that hangs, each takes seconds."""
        # PyTorch's handler would take their end for a fault.
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._handlers.setdefault(signal.SIGCHLD, handler or signal.SIG_DFL)
        _kill_children()

    def _watch(self) -> None:
        first, deadline = None, math.inf
        launcher = _launcher()
        while True:
            ready, _, _ = select.select([self._received], [], [], min(1.0, max(0.0, deadline - time.monotonic())))
            if ready:
                received = self._received.recv(64)
                if not received:
                    return
                for signum in filter(SIGNALS.__contains__, received):
                    seconds = self._timeout if first is None else SECOND_SIGNAL_SECONDS
                    first, deadline = first or signum, min(deadline, time.monotonic() + seconds)
            if launcher is not None and _launcher() != launcher:
                launcher = None
                # To the main thread: it may wait in a system call that only a signal of its own ends.
                signal.pthread_kill(main_thread().ident, signal.SIGTERM)
            if time.monotonic() >= deadline:
                self._leave(first)

    def _leave(self, signum: int) -> None:
        leave_process(128 + signum, lambda: self._save_last(signum))

    def _save_last(self, signum: int) -> None:
        logger.warning("%s, but the step does not end: leaving it", Stopped(signum))
        try:
            self.save()
        except Exception as error:
            logger.error("no checkpoint could be written: %s", error)


def leave_process(status: int, save: Callable[[], None]) -> NoReturn:
    """Ends the process whatever its main thread waits for, a minute later at most; `save` raises nothing."""
    last = Thread(target=save, daemon=True)
    last.start()
    last.join(LAST_CHECKPOINT_SECONDS)
    _kill_children()  # They could outlive us.
    os._exit(status)


def _kill_children() -> None:
    for child in multiprocessing.active_children():
        child.kill()


def _launcher() -> int | None:
    """The process id of torchrun, which gives every worker, or its wrapper, a session; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    leader = os.getsid(0)
    if leader == os.getpid():
        return os.getppid()
    try:
        return int(Path(f"/proc/{leader}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0 if Path("/proc").exists() else None
