"""Loader processes: what they make arrives in order; one that dies ends the wait for it, and so can the caller."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection, queues
from multiprocessing.process import BaseProcess
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from capi.data.reading import POLL_SECONDS, Interrupted
from capi.data.retry import reason

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

_SHARED_MEMORY = "/dev/shm"
_ADVICE = (
    "give it more (docker run --shm-size=8g, or --ipc=host), or set data.num_workers 0 or a smaller "
    "run.micro_batch_size"
)
_SECONDS_TO_END = 2.0


class LoaderError(OSError):
    """Loader processes that died, or that have too little memory to hand over what they make."""


def loaded(
    dataset: Dataset,
    *,
    num_workers: int,
    prefetch_factor: int,
    pin_memory: bool,
    interrupted: Callable[[], bool],
) -> Iterator[Item]:
    """The items of an endless dataset, which loader processes make ahead, or this one if `num_workers` is 0.

    The processes end with the iterator.

    Raises:
        LoaderError: a loader process died before it made the next item.
        Interrupted: `interrupted()`, which is asked every second of waiting for the processes, said so.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        timeout=POLL_SECONDS if num_workers else 0,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_prepare_process,
        generator=torch.Generator(),  # Else the loader would draw from the global one.
    )
    items, processes, threads = _start(loader)
    try:
        while True:
            try:
                item = next(items)
            except Exception as error:
                failure = error
            else:
                yield item
                del item  # Its memory is the caller's to free.
                continue
            waited = str(failure).startswith("DataLoader timed out")
            # What a dying process sent cannot be received: a moment later it is dead.
            connection.wait([p.sentinel for p in processes], 0 if waited else POLL_SECONDS)
            dead = [p for p in processes if p.exitcode is not None]
            if dead:
                raise LoaderError(_obituary(dead[0])) from None
            if not waited:
                raise failure
            if not all(thread.is_alive() for thread in threads):
                raise LoaderError("a thread that receives from the loader processes died")
            if interrupted():
                raise Interrupted
    finally:
        # As the interpreter ends, multiprocessing has ended them, and no thread can be started.
        if processes and not sys.is_finalizing():
            _end(items, processes)


def _end(items: Iterator, processes: list[BaseProcess]) -> None:
    # A process that is stuck or stopped does not hear that it should end.
    killer = threading.Timer(_SECONDS_TO_END, _kill, [processes])
    killer.start()
    items._shutdown_workers()  # Left to the garbage collector, a traceback would keep it.
    killer.cancel()


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _start(loader: DataLoader) -> tuple[Iterator, list[BaseProcess], list[threading.Thread]]:
    """An iterator of the loader, its processes, and the threads of this process that serve them."""
    old_processes, old_threads = set(multiprocessing.active_children()), set(threading.enumerate())
    handler = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings():
        # Python 3.12 warns of threads at a fork; the processes use neither those threads nor the GPU.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        items = iter(loader)
    # PyTorch's handler of SIGCHLD raises as soon as a process dies, be it amid a step or a checkpoint: it is not for
    # these, even where another loader has set it.
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    if getattr(items, "_worker_pids_set", False):
        signal_handling._remove_worker_pids(id(items))
        items._worker_pids_set = False
    processes = [p for p in multiprocessing.active_children() if p not in old_processes]
    threads = [t for t in threading.enumerate() if t not in old_threads]
    return items, processes, threads


def _unchanged(item: Item) -> Item:
    return item


def _obituary(process: BaseProcess) -> str:
    code = process.exitcode
    if code >= 0:
        return f"a loader process (pid {process.pid}) ended with status {code}"
    hint = ""
    if -code == signal.SIGKILL:
        hint = ": so the system ends processes where memory runs out; data.num_workers says how many share it"
    elif -code == signal.SIGBUS:
        hint = f": {_room()}; {_ADVICE}"
    return f"a loader process (pid {process.pid}) was ended by {signal.Signals(-code).name}{hint}"


def _prepare_process(_: int) -> None:
    """A signal that a terminal or a scheduler sends to every process must not end a loader before its last batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    queues.Queue._on_queue_feeder_error = staticmethod(_cannot_send)
    if multiprocessing.get_start_method() != "spawn":  # Its full clean-up at exit does not bear a waiting thread.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, POLL_SECONDS)
        # At its own exit the training process terminates its loaders by this very signal, and waits for them.
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


def _cannot_send(error: Exception, _: object) -> None:
    """Ends a process that cannot send an item: multiprocessing would drop it, and the training wait for it for ever."""
    if not isinstance(error, BrokenPipeError):  # Nobody listens any more.
        print(f"a loader process cannot send a batch: {reason(error)}", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(1)


def affordable_prefetch(n_bytes: int, num_workers: int, n_held: int, n_ranks: int) -> int:
    """Micro-batches that each loader process may make ahead so that all fit in shared memory: 2, else 1 and a warning.

    Args:
        n_bytes: size of a micro-batch.
        num_workers: loader processes of each of the `n_ranks` on this machine.
        n_held: micro-batches that a rank holds besides those made ahead.

    Raises:
        LoaderError: not even one micro-batch fits.
    """
    room = _room()
    if num_workers == 0 or room is None:
        return 2
    if n_bytes > room.free:
        raise LoaderError(f"{room}, expected at least the {_megabytes(n_bytes)} of a micro-batch; {_ADVICE}")
    wanted = n_ranks * (2 * num_workers + n_held) * n_bytes
    if wanted <= room.free:
        return 2
    logger.warning(
        "%s, but %d micro-batches of %s, made ahead by %d loader processes a rank, may need %s: each makes one ahead "
        "instead of two, and the run ends where that does not fit either; %s",
        *(room, wanted // n_bytes, _megabytes(n_bytes), num_workers, _megabytes(wanted), _ADVICE),
    )
    return 1


class _Room(NamedTuple):
    """Bytes of shared memory."""

    free: int
    total: int

    def __str__(self) -> str:
        return f"{_SHARED_MEMORY} has {_megabytes(self.free)} free of {_megabytes(self.total)}"


def _room() -> _Room | None:
    """None where shared memory is no file system."""
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return None
    return _Room(status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize)


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.3g} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:.3g} GB"


def share(tensors: Iterable[Tensor]) -> None:
    """Moves what a loader process made to shared memory, where it takes no further copy to hand it over.

    Raises:
        LoaderError: there is not enough.
    """
    tensors = list(tensors)
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        n_bytes = sum(tensor.nbytes for tensor in tensors)
        raise LoaderError(
            f"a loader process cannot hand over a micro-batch of {_megabytes(n_bytes)} ({reason(error)}); "
            f"{_room() or _SHARED_MEMORY}; {_ADVICE}"
        ) from error
