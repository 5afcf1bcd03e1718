"""Saves a run's whole steps while it goes on, and stops a run whose numbers are finite no more."""

import logging
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from tqdm import tqdm

from capi.background import in_background
from capi.checkpoint import newest_checkpoint, save_checkpoint, step_of
from capi.distributed import gather
from capi.results import Results
from capi.resume import Start, described
from capi.sharded_checkpoint import part_of_rank, tensors_of
from capi.sharding import whole_average
from capi.step import Trainer
from capi.stopping import LAST_CHECKPOINT_SECONDS, Stopped, StopRequest

logger = logging.getLogger("capi")

_SECONDS_FOR_OTHERS = 20.0  # of the minute that a last checkpoint has


class Diverged(RuntimeError):
    """Losses or gradients were not finite for too many steps in a row, or the state itself is not finite any more."""


class Checkpoints:
    """Saves whole steps: where all ranks have come to one, or on this rank's own account.

    The first way the state is copied to the host's memory, and another thread writes the copy while training goes on.
    One such write is on its way at most. Each rank copies and writes its part, where all see the run folder; else rank
    0 does it all.
    """

    def __init__(self, trainer: Trainer, begun: Start, run_dir: Path, results: Results):
        self.trainer, self.run_dir, self.results = trainer, run_dir, results
        self.saved, self.data_fingerprint = begun.step, begun.data_fingerprint
        trainer.steps_done = begun.step
        self.streams: list[dict] = []
        """Where this rank's stream stood after the last steps."""
        self.all_streams = gather(begun.stream.state_dict())
        """Where every rank's stream stood when all were saved last, or at the start."""
        self._on_disk, self._writing = begun.step, Future()
        self._writing.set_result(None)
        self._group = None
        if begun.shared and trainer.world.size > 1:
            # Of its own: ranks come to what they say here at other times than to their steps.
            self._group = dist.new_group(backend="gloo")
        # What DefaultStager, which up to PyTorch 2.11 forgets its memory each time, does the work with.
        self._stager = StateDictStager(pin_memory=trainer.world.device.type == "cuda")

    def save(self, step: int) -> None:
        """Called by all ranks after the same step; returns once the state is copied."""
        if step == self.saved:
            return
        self.finish()
        self._check_state(step)
        self.all_streams = gather(self._stream(step))
        self.saved, world = step, self.trainer.world
        if self.trainer.bad_steps > 0:
            logger.warning("losses or gradients of step %d are not finite: no checkpoint is written", step)
            return
        if self._group is None and not world.is_main:
            return
        with self.trainer.updating:
            tensors = tensors_of(self.trainer.model, self.trainer.optimizers)
            rank, size = (0, 1) if self._group is None else (world.rank, world.size)
            part, files = part_of_rank(tensors, rank, size)
            state = self._state(step, self.all_streams, self._copied(part))
        self._writing = in_background(lambda: self._write(step, state, files))
        config = self.trainer.config
        draws = config.run.evaluate and step < config.optim.steps
        if draws and (model := whole_average(self.trainer.model, world)) is not None:
            self.results.draw(model)

    def finish(self, timeout: float | None = None) -> None:
        """Waits for the checkpoint that is being written, if one is; TimeoutError after so many seconds."""
        self._writing.result(timeout)

    def save_alone(self) -> None:
        """Without the other ranks, from any thread: the last whole step, where the state is at one.

        Where the others' streams stand is not known: they go on from where they stood when all were saved last, so that
        their images since then come twice.
        """
        if not self.trainer.world.is_main:
            return
        try:
            self.finish(None if self._group is None else _SECONDS_FOR_OTHERS)
        except TimeoutError:
            logger.warning("step %d is not written to its end: another rank does not answer", self.saved)
        with self.trainer.updating:
            step = self.trainer.steps_done
            if step is None or step == self._on_disk or self.trainer.not_finite():
                return
            if self.trainer.sharded:
                logger.warning("step %d is not saved: no rank by itself has all of its weights", step)
                return
            tensors = tensors_of(self.trainer.model, self.trainer.optimizers)
            streams = [self._stream(step), *self.all_streams[1:]]
            if not self._write(step, self._state(step, streams, tensors), alone=True):
                return
        logger.warning("saved step %d; the same command goes on from there", step)

    @contextmanager
    def saved_alone_by(self, stop: StopRequest, bar: tqdm) -> Iterator[None]:
        """Saves, within, what a request leaves behind that finds no end of the step, or that breaks the step itself.

        On leaving, all that was to be saved is on disk.
        """
        stop.save = self.save_alone
        patience = LAST_CHECKPOINT_SECONDS
        try:
            yield
            patience = None
        except Exception as error:
            if stop.signum is None or isinstance(error, Diverged):
                raise
            # A Ctrl-C also ends the processes that compile for us, and a rank that has left ends a reduction.
            bar.close()
            logger.warning("%s within a step (%s)", Stopped(stop.signum), type(error).__name__)
            self.save_alone()
            raise Stopped(stop.signum) from error
        finally:
            with suppress(TimeoutError):
                self.finish(patience)

    def check_finite(self, limit: int) -> None:
        """Stops a run whose losses or gradients have not been finite for `limit` steps; called by all ranks."""
        trainer, bad_steps = self.trainer, int(self.trainer.bad_steps)
        if bad_steps >= limit:
            self.finish()
            whose = trainer.faults.named() if trainer.faults is not None else ""  # before any rank leaves
            raise Diverged(
                f"{whose and f'{whose} are not finite; '}losses or gradients were not finite for {bad_steps} steps in "
                f"a row (run.max_nan_steps is {trainer.config.run.max_nan_steps}); last good checkpoint: "
                f"{self._newest()}. Try a lower learning rate, or run.precision fp32."
            )

    def _check_state(self, step: int) -> None:
        """Stops a run whose weights or optimiser states are not finite: no later step would mend them."""
        names = gather(self.trainer.not_finite())
        whose = [f"rank {rank}'s " if len(names) > 1 else "" for rank in range(len(names))]
        bad = [f"{of_rank}{name}" for of_rank, name in zip(whose, names, strict=True) if name is not None]
        if bad:
            raise Diverged(
                f"{', '.join(bad)} is not finite after step {step}; last good checkpoint: {self._newest()}. "
                "Try a lower learning rate, or run.precision fp32."
            )

    def _newest(self) -> Path | str:
        return newest_checkpoint(self.run_dir) or "none"

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """In the host's memory, which is kept for the next time."""
        on_gpu = self.trainer.world.device.type == "cuda"
        copies = self._stager.stage(tensors, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _stream(self, step: int) -> dict:
        return next(state for state in self.streams if state["step"] == step)

    def _state(self, step: int, streams: list[dict], tensors: dict[str, Tensor]) -> dict:
        return {
            "step": step,
            "streams": streams,
            "config": described(self.trainer),
            "data_fingerprint": self.data_fingerprint,
            "trainer": tensors,
        }

    def _write(self, step: int, state: dict, files: dict[str, int] | None = None, *, alone: bool = False) -> bool:
        """Whether the checkpoint is written; where it could not be, a line in rank 0's log says why."""
        keep, is_main = self.trainer.config.run.keep_checkpoints, self.trainer.world.is_main
        try:
            path = save_checkpoint(self.run_dir, step, state, keep, files=files, group=None if alone else self._group)
        except OSError as error:
            if is_main:
                logger.error("%s; the newest checkpoint: %s", error, self._newest())
            return False
        self._on_disk = step
        if is_main and not alone and step < self.trainer.config.optim.steps:
            try:
                self.results.export(path)
            except OSError as error:
                logger.error("%s", error)
        return True


def goes_on_from(run_dir: Path, done: int) -> str:
    newest = newest_checkpoint(run_dir)
    if newest is None:
        return "the start"
    return "there" if step_of(newest) == done else f"step {step_of(newest)}"
