"""Saves a run's whole steps, and stops a run whose numbers are finite no more."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from capi.checkpoint import newest_checkpoint, save_checkpoint, step_of
from capi.distributed import gather, largest
from capi.results import Results
from capi.resume import Start, described
from capi.sharding import whole_average
from capi.step import Trainer
from capi.stopping import Stopped, StopRequest

logger = logging.getLogger("capi")


class Diverged(RuntimeError):
    """Losses or gradients were not finite for too many steps in a row, or the state itself is not finite any more."""


class Checkpoints:
    """Saves whole steps: where all ranks have come to one, or on this rank's own account."""

    def __init__(self, trainer: Trainer, begun: Start, run_dir: Path, results: Results):
        self.trainer, self.run_dir, self.results = trainer, run_dir, results
        self.saved, self.data_fingerprint = begun.step, begun.data_fingerprint
        trainer.steps_done = begun.step
        self.streams: list[dict] = []
        """Where this rank's stream stood after the last steps."""
        self.all_streams = gather(begun.stream.state_dict())
        """Where every rank's stream stood when all were saved last, or at the start."""

    def save(self, step: int) -> None:
        """Called by all ranks after the same step."""
        if step == self.saved:
            return
        check_state(self.trainer, step, self.run_dir)
        self.all_streams = gather(self._stream(step))
        with self.trainer.updating:  # Whoever ends the process waits for the file.
            written = self._write(step, self.all_streams)
        if not largest(written) or step == self.trainer.config.optim.steps:
            return
        if (model := whole_average(self.trainer.model, self.trainer.world)) is not None:
            try:
                self.results.write(model)
            except OSError as error:
                logger.error("%s", error)

    def save_alone(self) -> None:
        """Without the other ranks, from any thread: the last whole step, where the state is at one.

        Where the others' streams stand is not known: they go on from where they stood when all were saved last, so that
        their images since then come twice.
        """
        if not self.trainer.world.is_main:
            return
        if self.trainer.sharded:
            logger.warning("no rank can save alone what distributed.shard has parted among all")
            return
        with self.trainer.updating:
            step = self.trainer.steps_done
            if step is None or step == self.saved or self.trainer.not_finite():
                return
            if not self._write(step, [self._stream(step), *self.all_streams[1:]]):
                return
        logger.warning("saved step %d; the same command goes on from there", step)

    @contextmanager
    def saved_alone_by(self, stop: StopRequest, bar: tqdm) -> Iterator[None]:
        """Saves, within, what a request leaves behind that finds no end of the step, or that breaks the step itself."""
        stop.save = self.save_alone
        try:
            yield
        except Exception as error:
            if stop.signum is None or isinstance(error, Diverged):
                raise
            # A Ctrl-C also ends the processes that compile for us, and a rank that has left ends a reduction.
            bar.close()
            logger.warning("%s within a step (%s)", Stopped(stop.signum), type(error).__name__)
            self.save_alone()
            raise Stopped(stop.signum) from error

    def _stream(self, step: int) -> dict:
        return next(state for state in self.streams if state["step"] == step)

    def _write(self, step: int, streams: list[dict]) -> bool:
        """Whether rank 0 has written the checkpoint; where it could not, a line in the log says why."""
        self.saved, trainer = step, self.trainer
        if trainer.bad_steps > 0:
            logger.warning("losses or gradients of step %d are not finite: no checkpoint is written", step)
            return False
        if not trainer.world.is_main:
            return False
        state = {
            "step": step,
            "trainer": trainer.state_dict(),
            "streams": streams,
            "config": described(trainer),
            "data_fingerprint": self.data_fingerprint,
        }
        try:
            save_checkpoint(self.run_dir, step, state, trainer.config.run.keep_checkpoints)
        except OSError as error:
            logger.error("%s; the newest checkpoint: %s", error, newest_checkpoint(self.run_dir) or "none")
            return False
        return True


def check_finite(trainer: Trainer, run_dir: Path, limit: int) -> None:
    """Stops a run whose losses or gradients have not been finite for `limit` steps; called by all ranks."""
    bad_steps = int(trainer.bad_steps)
    if bad_steps >= limit:
        good = newest_checkpoint(run_dir)
        whose = trainer.faults.named() if trainer.faults is not None else ""  # before any rank leaves
        raise Diverged(
            f"{whose and f'{whose} are not finite; '}losses or gradients were not finite for {bad_steps} steps in a "
            f"row (run.max_nan_steps is {trainer.config.run.max_nan_steps}); last good checkpoint: {good or 'none'}. "
            "Try a lower learning rate, or run.precision fp32."
        )


def check_state(trainer: Trainer, step: int, run_dir: Path) -> None:
    """Stops a run whose weights or optimiser states are not finite: no later step would mend them."""
    names = gather(trainer.not_finite())
    bad = [f"rank {rank}'s {name}" if len(names) > 1 else name for rank, name in enumerate(names) if name is not None]
    if bad:
        raise Diverged(
            f"{', '.join(bad)} is not finite after step {step}; last good checkpoint: "
            f"{newest_checkpoint(run_dir) or 'none'}. Try a lower learning rate, or run.precision fp32."
        )


def goes_on_from(run_dir: Path, done: int) -> str:
    newest = newest_checkpoint(run_dir)
    if newest is None:
        return "the start"
    return "there" if step_of(newest) == done else f"step {step_of(newest)}"
