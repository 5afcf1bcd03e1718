"""Work in another thread, which does not keep the process from its end."""

import threading
from collections.abc import Callable
from concurrent.futures import Future


def in_background(work: Callable[[], object]) -> Future:
    """The result of `work`."""
    future = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
