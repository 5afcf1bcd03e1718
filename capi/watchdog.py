"""Knows how far every rank is, and ends a run of which a rank is lost: dead, stuck or failed.

Once a second a thread of every rank leaves in the store where the ranks met what its main thread is at, and reads what
the others left. The steps count, not the thread's own life: that of a stuck rank goes on. Collectives do not tell who
is missing: over NCCL they hang, over gloo they raise an error that names a port.
"""

import faulthandler
import json
import linecache
import logging
import os
import re
import socket
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Lock, Thread, main_thread
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

from capi.distributed import ALONE_SECONDS, World, gather
from capi.profiling import HostTime
from capi.saving import Diverged
from capi.stopping import LAST_CHECKPOINT_SECONDS, Stopped, leave_process

logger = logging.getLogger("capi")

EXIT_STATUS = os.EX_TEMPFAIL
BEAT_SECONDS = 1.0
MISSED_BEATS = 3.5  # In which a rank of a broken connection is taken for gone.
SLOW_SECONDS = 30.0
SLOW_TIMES = 10  # the median step
USUAL_STEPS = 3  # that tell what is usual: in the first ones kernels are compiled
UNWIND_SECONDS = 30.0
JOIN_SECONDS = 10.0  # A store that is gone may not answer for longer.
ALONE = ("evaluation", "checkpoint")  # Phases of one rank, for which the others wait.

_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_OWN = f"{Path(__file__).parent.parent}{os.sep}capi"  # and capi_kernels
_COLLECTIVES = (f"{_TORCH}distributed{os.sep}", f"{_TORCH}nn{os.sep}parallel{os.sep}distributed.py")


class Lost(RuntimeError):
    """A rank does not go on, this or another: the run has ended, and is to be started again."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    count: int = 0
    step: int | None = None
    """That it is in; None before the first and after the last."""
    seconds: float = 0.0
    """Since that began."""
    phase: str = "start"
    place: str = ""
    """The line that the main thread is at, outside of PyTorch."""
    waits: bool = False
    """For other ranks, or for the device."""
    overdue: bool = False


class Watchdog:
    """Watches the main threads of all ranks, with two threads of its own; a context manager, entered by all ranks.

    Where a rank is in a step for more than `timeout` seconds (and ten times the median step), or gives no sign of life
    for as long, or fails, every rank ends with a line that names it and `EXIT_STATUS`: by `Lost`, or where the main
    thread is stuck, from here, with the stacks of its threads and, on rank 0, the last whole step saved. A rank alone
    is never ended. A step that takes far longer than usual is logged, once, with the stacks.
    """

    def __init__(self, world: World, timeout: float):
        self.world, self.timeout = world, timeout
        self._interval = min(BEAT_SECONDS, timeout / 10)
        self._host, self._save = HostTime(), lambda: None
        self._run_dir: Path | None = None
        self._step: int | None = None
        self._looked, self._left_out, self._clock = time.monotonic(), 0.0, Lock()
        self._began = self._answered = self._now()
        self._durations: deque[float] = deque(maxlen=100)
        self._noticed: int | None = None
        self._beats, self._changed = [b""] * world.size, [self._began] * world.size
        self._names = ["this process"] * world.size
        self._store: dist.Store | None = None
        self._verdict: str | None = None
        self._verdict_is_known = Event()
        self._leaving = False
        self._ending = Lock()
        self._over = Event()
        self._threads: list[Thread] = []

    def __enter__(self) -> "Watchdog":
        if self.world.store is not None:
            processes = gather(f"{socket.gethostname()}, pid {os.getpid()}")
            self._names = [f"rank {rank} ({process})" for rank, process in enumerate(processes)]
            self._store = dist.PrefixStore("watchdog", self.world.store)
            self._store.set(str(self.world.rank), json.dumps(asdict(Beat())))
            dist.barrier()
            self._start(self._exchange)
        self._start(self._watch)
        return self

    def _start(self, target: Callable[[], None]) -> None:
        self._threads.append(Thread(target=target, daemon=True))
        self._threads[-1].start()

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._is_of_a_lost_rank(error):
            self._leave(error)
        if not isinstance(error, Lost):  # Then the threads see to it that the process does end.
            self._over.set()
            for thread in self._threads:  # At the end of the interpreter one within the store would abort the process.
                thread.join(JOIN_SECONDS)

    @contextmanager
    def steps(self, host: HostTime, run_dir: Path, save: Callable[[], None]) -> Iterator[None]:
        """Within, steps are watched; `save` is what a rank can save alone, from any thread.

        Raises:
            Lost: another rank does not go on.
        """
        self._host, self._run_dir, self._save = host, run_dir, save
        try:
            yield
        except Diverged:  # as all ranks
            raise
        except BaseException as error:
            if self._is_of_a_lost_rank(error):
                self._leave(error)
            self._ending.acquire()  # The other thread only bounds the time that this one takes.
            why = f"was {error}" if isinstance(error, Stopped) else f"failed: {type(error).__name__}: {_line(error)}"
            self._agree(f"{self._names[self.world.rank]} {why}")
            raise
        finally:
            self._step = None

    def step_begins(self, step: int) -> None:
        now = self._now()
        if self._step is not None:
            self._durations.append(now - self._began)
        if self._noticed is not None and self._noticed == self._step:
            logger.warning("step %d has ended after %.0f s", self._step + 1, now - self._began)
        self._began, self._step = now, step

    # The main thread.

    def _is_of_a_lost_rank(self, error: BaseException | None) -> bool:
        """Whether a collective or the store has failed, as when another rank is gone: gloo has no type for it."""
        if self._store is None or isinstance(error, Lost):
            return False
        return isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and re.search("gloo|nccl|connection", str(error), re.IGNORECASE) is not None
        )

    def _leave(self, error: BaseException) -> NoReturn:
        """Raises Lost; by whichever thread comes first the process is ended."""
        self._leaving = True
        self._ending.acquire()
        verdict = self._agree(self._reason(error))
        _quietly(self._save)
        raise Lost(verdict) from error

    def _reason(self, error: BaseException) -> str:
        """Of a broken connection: which rank has stopped to beat, some beats later."""
        deadline = self._now() + 2 * MISSED_BEATS * self._interval
        while self._now() < deadline:
            if self._verdict is not None:
                return self._verdict
            if gone := self._silent(MISSED_BEATS * self._interval):
                return "; ".join(map(self._described, gone))
            time.sleep(self._interval / 5)
        behind = [f"; {self._described(rank)}" for rank in self._behind(overdue=False)]
        return f"a connection to another rank broke: {_line(error)}{''.join(behind)}"

    def _agree(self, verdict: str) -> str:
        """The first verdict of any rank; waits for it to reach the others, as the store may end with this process."""
        self._verdict = self._verdict or verdict
        if self._store is None:
            return self._verdict
        self._verdict_is_known.wait(2 * self._interval)
        if self.world.is_main:
            time.sleep(2 * self._interval)
        return self._verdict

    # The thread that talks to the store, which may hang in it.

    def _exchange(self) -> None:
        ranks, count = list(map(str, range(self.world.size))), 0
        while not self._over.wait(self._interval):
            count += 1
            try:
                self._store.set(ranks[self.world.rank], json.dumps(asdict(self._beat(count))))
                beats = self._store.multi_get(ranks)
                if self._verdict is not None:
                    self._verdict = self._store.compare_set("verdict", "", self._verdict).decode()
                    self._verdict_is_known.set()
                elif self._store.check(["verdict"]):
                    self._verdict = self._store.get("verdict").decode()
            except RuntimeError:  # From now on it does not answer.
                return
            self._answered = self._now()
            for rank, beat in enumerate(beats):
                if beat != self._beats[rank]:
                    self._beats[rank], self._changed[rank] = beat, self._answered

    def _beat(self, count: int) -> Beat:
        waits, place = where(sys._current_frames()[main_thread().ident])
        phase, seconds = self._host.current, self._now() - self._began
        return Beat(
            count=count,
            step=self._step,
            seconds=seconds,
            phase=phase,
            place=place,
            waits=waits or phase == "device wait" or self._leaving,
            overdue=self._step is not None and seconds > self._limit(),
        )

    # The thread that judges.

    def _watch(self) -> None:
        while not self._over.wait(self._interval):
            self._notice_slow_step()
            if self._store is None:
                continue
            known = self._verdict is not None
            verdict = self._verdict or self._judge()
            # A rank that failed breaks the connections: it is for the main thread, if it can, to end this one.
            if verdict is not None and not (known and self._over.wait(MISSED_BEATS * self._interval)):
                self._end(verdict)

    def _judge(self) -> str | None:
        """Who is lost, if someone is."""
        if lost := self._silent(self.timeout):
            return "; ".join(map(self._described, lost))
        if self._step is None or self._now() - self._began <= self._limit():
            return None
        if self._now() - self._answered > self.timeout / 2:
            return f"the store of the ranks has not answered for {self._now() - self._answered:.0f} s"
        if behind := self._behind(overdue=True):
            return "; ".join(map(self._described, behind))
        if all(beat.overdue for beat in self._everyone()):
            return f"no rank goes on: in step {self._step + 1}, all wait for each other or for their devices"
        return None

    def _limit(self) -> float:
        """Seconds that the step may take."""
        usual = self._usual()
        limit = max(self.timeout, SLOW_TIMES * (usual or 0.0))
        return limit + ALONE_SECONDS if usual is None or self._host.current in ALONE else limit

    def _usual(self) -> float | None:
        return statistics.median(self._durations) if len(self._durations) >= USUAL_STEPS else None

    def _silent(self, seconds: float) -> list[int]:
        """Ranks without a sign of life; the one that keeps the store where nothing is heard of any."""
        now = self._now()
        if now - self._answered > seconds:
            return [] if self.world.is_main else [0]
        return [rank for rank, changed in enumerate(self._changed) if self._answered - changed > seconds]

    def _behind(self, *, overdue: bool) -> list[int]:
        """Ranks that others wait for."""
        everyone = enumerate(self._everyone())
        return [rank for rank, beat in everyone if not beat.waits and (beat.overdue or not overdue)]

    def _everyone(self) -> list[Beat]:
        return [self._read(rank) for rank in range(self.world.size)]

    def _read(self, rank: int) -> Beat:
        return Beat(**json.loads(self._beats[rank])) if self._beats[rank] else Beat()

    def _described(self, rank: int) -> str:
        beat, silence = self._read(rank), self._now() - self._changed[rank]
        step, seconds = beat.step, beat.seconds + silence
        if silence > MISSED_BEATS * self._interval:
            what = f"gives no sign of life for {silence:.0f} s"
            step, seconds = self._step, self._now() - self._began  # It may have gone on since its last beat.
        else:
            what = f"is at: {beat.phase}, {beat.place}"
        if step is not None:
            what = f"has not finished step {step + 1} for {seconds:.0f} s; it {what}"
        return f"{self._names[rank]} {what}"

    def _notice_slow_step(self) -> None:
        usual, step, seconds = self._usual(), self._step, self._now() - self._began
        if step is None or usual is None or step == self._noticed or seconds < max(SLOW_TIMES * usual, SLOW_SECONDS):
            return
        if any(phase in ALONE for phase in (self._host.current, *(beat.phase for beat in self._everyone()))):
            return
        self._noticed = step
        waits, place = where(sys._current_frames()[main_thread().ident])
        who = self._behind(overdue=False) if waits and self._store is not None else []
        if who or not waits or self.world.is_main:
            logger.warning(
                "step %d takes %.0f s, where %.2g s are usual: %s; stacks in %s",
                *(step + 1, seconds, usual),
                "; ".join(map(self._described, who)) or f"{self._host.current}, {place}",
                self._write_stacks(f"step {step + 1} takes {seconds:.0f} s"),
            )

    def _end(self, verdict: str) -> None:
        """Ends the process, whose main thread does not."""
        if not self._ending.acquire(timeout=LAST_CHECKPOINT_SECONDS + UNWIND_SECONDS):  # The main thread was to do it.
            os._exit(EXIT_STATUS)
        self._leaving = True
        verdict = self._agree(verdict)
        logger.error("error: %s; stacks in %s", verdict, self._write_stacks(verdict))
        leave_process(EXIT_STATUS, lambda: _quietly(self._save))

    def _write_stacks(self, why: str) -> str:
        """Where the stacks of all threads are now; the run folder may be on this node, or not, or be what hangs."""
        name, written = f"stacks-rank{self.world.rank}.txt", Event()

        def write() -> None:
            if self._run_dir is not None and self._run_dir.is_dir():
                with (self._run_dir / name).open("a") as file:
                    file.write(f"{time.strftime('%F %T')}: {why}\n")
                    file.flush()
                    faulthandler.dump_traceback(file)
                written.set()

        writer = Thread(target=_quietly, args=(write,), daemon=True)
        writer.start()
        writer.join(5.0)
        if written.is_set():
            return str(self._run_dir / name)
        faulthandler.dump_traceback(sys.__stderr__)
        return "the log"

    def _now(self) -> float:
        """Seconds, without those in which this process, or its machine, was stopped: no thread has asked then."""
        with self._clock:
            now = time.monotonic()
            if now - self._looked > 3 * self._interval:
                self._left_out += now - self._looked
            self._looked = now
            return now - self._left_out


def where(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a thread waits for other ranks, and its innermost line outside of PyTorch."""
    waits, outer = False, frame
    while outer is not None and outer.f_code.co_filename.startswith(_TORCH):
        # DistributedDataParallel averages within the backward pass.
        waits |= outer.f_code.co_filename.startswith(_COLLECTIVES) or outer.f_code.co_name == "_engine_run_backward"
        outer = outer.f_back
    if outer is None:
        return waits, "PyTorch"
    code = outer.f_code
    if outer is frame and code.co_filename.startswith(_OWN):
        waits |= ".wait(" in linecache.getline(code.co_filename, outer.f_lineno)
    return waits, f"{Path(code.co_filename).name}:{outer.f_lineno} in {code.co_name}"


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]


def _quietly(work: Callable[[], object]) -> None:
    try:
        work()
    except Exception as error:
        logger.error("%s: %s", type(error).__name__, _line(error))
