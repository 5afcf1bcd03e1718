"""Reads that may never return, each given up after a time: a dead mount must not hold a run for ever."""

import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from capi.data.retry import attempt

Result = TypeVar("Result")

POLL_SECONDS = 1.0
"""How often who waits for images looks up."""
_MAX_STUCK_IN_A_ROW = 8


class Interrupted(BaseException):
    """Who waits for images was asked to stop. Not an Exception, which foreign data may raise and which is forgiven."""


class StuckError(TimeoutError):
    """A read that has not returned."""


class HungError(TimeoutError):
    """So many reads in a row have not returned that the source must be gone."""


def never() -> bool:
    """The answer of a caller that has no reason to stop waiting."""
    return False


def at_once(_: str, read: Callable[..., Result], *args) -> Result | Exception:
    """As Reads, of what cannot get stuck."""
    return attempt(read, *args)


class Reads:
    """Reads in a thread of its own, which is left behind when it does not return: nothing else ends such a read.

    Args:
        seconds: time after which a read is given up.
        interrupted: asked every second of a read whether to stop waiting.
    """

    def __init__(self, seconds: float, interrupted: Callable[[], bool] = never):
        self._seconds, self._interrupted = seconds, interrupted
        self._reader: _Reader | None = None
        self._stuck: dict[str, _Reader] = {}
        self._stuck_in_a_row = 0

    def __call__(self, name: str, read: Callable[..., Result], *args) -> Result | Exception:
        """What `read(*args)` returns, or the exception that it raises; a StuckError where it does not return in time.

        A name whose read is still stuck is not tried again.

        Raises:
            HungError: eight reads in a row did not return in time.
            Interrupted: `interrupted()` said so.
        """
        if name in self._stuck and self._stuck[name].is_alive():
            return StuckError("an earlier read has not returned yet")
        if self._reader is None:
            self._reader = _Reader()
        self._reader.requests.put((read, args))
        deadline = time.monotonic() + self._seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                result = self._reader.results.get(timeout=min(left, POLL_SECONDS))
            except queue.Empty:
                if self._interrupted():
                    raise Interrupted from None
            else:
                self._stuck_in_a_row = 0
                return result
        self._reader.requests.put(None)
        self._stuck[name], self._reader = self._reader, None
        self._stuck_in_a_row += 1
        reason = f"expected to be read within {self._seconds:g} s (data.read_timeout)"
        if self._stuck_in_a_row >= _MAX_STUCK_IN_A_ROW:
            raise HungError(f"{_MAX_STUCK_IN_A_ROW} reads in a row are stuck, the last of them {name}: {reason}")
        return StuckError(reason)

    def close(self) -> None:
        """Ends the thread."""
        if self._reader is not None:
            self._reader.requests.put(None)


class _Reader(threading.Thread):
    """Answers requests one by one, until it is asked None."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="reader")
        self.requests, self.results = queue.SimpleQueue(), queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        while (request := self.requests.get()) is not None:
            read, args = request
            self.results.put(attempt(read, *args))
            del request, read, args  # Nothing is held while waiting for the next.
