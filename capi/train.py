"""Trains a CAPI encoder: `python -m capi.train [--config PRESET_OR_FILE] [--GROUP.FIELD VALUE ...]`."""

import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from capi.checkpoint import newest_checkpoint, save_checkpoint, step_of
from capi.config import Config, check_config, load_config
from capi.data.prefetch import DevicePrefetcher
from capi.distributed import World, any_rank, average, gather, join_world
from capi.masking import check_masking
from capi.metrics import AssignmentStatistics, MetricsWriter, entropy_floor, peak_flops, training_flop_per_image
from capi.results import Results
from capi.resume import Start, begin, described, run_folder, together
from capi.step import StepResult, Trainer, graphs_obstacle
from capi.stopping import Stopped, StopRequest

logger = logging.getLogger("capi")


class Diverged(RuntimeError):
    """Losses or gradients were not finite for too many steps in a row, or the state itself is not finite any more."""


def train(config: Config, world: World, stop: StopRequest) -> int:
    """Runs or resumes a training in `config.run.output_dir`; returns the exit status.

    Raises:
        ValueError: the configuration does not fit together, or the folder is in use or holds a run of another
            configuration.
        OSError: the run folder cannot be read or written to. (Where a checkpoint cannot be written, the run goes on.)
        Stopped: a signal ended the run where its ranks could not agree on a step.
        Diverged: losses or gradients were not finite for `config.run.max_nan_steps` steps in a row, or weights or
            optimiser states are not.
    """
    together(lambda: _check(config, world))
    run_dir = Path(config.run.output_dir)
    with run_folder(run_dir, world) as folder:
        trainer = Trainer(config, world)
        start = begin(trainer, folder)
        results = Results(trainer, run_dir)
        if world.is_main:
            _announce(config, trainer, start.step)
        if start.stream is not None:
            with logging_redirect_tqdm():  # a log line does not break the progress bar
                signum = _run_steps(trainer, start, run_dir, results, stop)
            if signum is not None:
                return 128 + signum
        return together(lambda: _finish(config, results, run_dir) if world.is_main else 0)


def _check(config: Config, world: World) -> None:
    check_config(config, world.size)
    side = config.data.image_size // config.model.patch_size
    check_masking(config.masking, (side, side))
    obstacle = graphs_obstacle(config, world)
    if config.run.cuda_graphs == "on" and obstacle is not None:
        raise ValueError(f"run.cuda_graphs is on, but {obstacle}; expected auto or off")


def _run_steps(trainer: Trainer, begun: Start, run_dir: Path, results: Results, stop: StopRequest) -> int | None:
    """Trains from the steps done to the end, or to a stop signal, which it returns."""
    config, world, start = trainer.config, trainer.world, begun.step
    n_tokens = (config.data.image_size // config.model.patch_size) ** 2
    statistics = AssignmentStatistics(n_tokens, config.clustering.n_prototypes)
    writer = MetricsWriter(run_dir, start) if world.is_main else None
    checkpoints = _Checkpoints(trainer, begun, run_dir, results)
    bar = tqdm(
        total=config.optim.steps,
        initial=start,
        disable=not world.is_main,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file needs no animation
    )
    try:
        prefetcher = DevicePrefetcher(begun.stream, world.device)
        with stop.deferred(), prefetcher as batches, checkpoints.saved_alone_by(stop, bar):
            rates = _Rates(config, world, batches)
            for step in range(start, config.optim.steps):
                last = step + 1 == config.optim.steps
                checkpoints.streams = [batches.state_dict()]
                with suppress(Stopped), stop.at_once():
                    micro_batches = next(batches)
                # Before the step is launched: a rank without data holds the others up where their state is whole.
                if any_rank(stop.signum is not None):
                    checkpoints.save(step)
                    bar.close()
                    name = signal.Signals(stop.signum).name if stop.signum else "a signal on another rank"
                    where = _goes_on_from(run_dir, step) if world.is_main else "there"
                    logger.warning("stopped by %s after step %d; the same command goes on from %s", name, step, where)
                    stop.kill_loaders()
                    return stop.signum or signal.SIGTERM
                checkpoints.streams.append(batches.state_dict())
                result = trainer.step(micro_batches, step, (lambda: None) if last else batches.prefetch)
                positions = torch.cat([masks.predict_indices for _, masks in micro_batches]) % n_tokens
                statistics.update(positions, result.clusters)
                rates.step_ends()
                del micro_batches  # The prefetcher bounds what the device holds.
                done = step + 1
                if done % config.run.log_every == 0 or last:
                    _log(trainer, result, step, statistics, rates, writer, bar)
                if world.device.type == "cpu" or done % config.run.log_every == 0 or last:
                    _check_finite(trainer, run_dir, config.run.max_nan_steps if not last else 1)
                bar.update()
                if done % config.run.checkpoint_every == 0 or last:
                    checkpoints.save(done)
            if any_rank(stop.signum is not None):
                return stop.signum or signal.SIGTERM
    finally:
        bar.close()
        if writer is not None:
            writer.close()
    return None


class _Checkpoints:
    """Saves whole steps: where all ranks have come to one, or on this rank's own account."""

    def __init__(self, trainer: Trainer, begun: Start, run_dir: Path, results: Results):
        self.trainer, self.run_dir, self.results = trainer, run_dir, results
        self.saved, self.data_fingerprint = begun.step, begun.data_fingerprint
        trainer.steps_done = begun.step
        self.streams: list[dict] = []
        """Where this rank's stream stood after the last steps."""

    def save(self, step: int) -> None:
        """Called by all ranks after the same step."""
        if step == self.saved:
            return
        _check_state(self.trainer, step, self.run_dir)
        streams = gather(self._stream(step))
        with self.trainer.updating:  # Whoever ends the process waits for the file.
            written = self._write(step, streams)
        if written and step < self.trainer.config.optim.steps:
            try:
                self.results.write()
            except OSError as error:
                logger.error("%s", error)

    def save_alone(self) -> None:
        """Without the other ranks, from any thread: the last whole step, where the state is at one.

        Where the others' streams stood is not known: they take this rank's place for theirs, if they can.
        """
        if not self.trainer.world.is_main:
            return
        with self.trainer.updating:
            step = self.trainer.steps_done
            if step is None or step == self.saved or self.trainer.not_finite():
                return
            if not self._write(step, [self._stream(step)]):
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


class _Rates:
    """Images per second and the share of time spent waiting for data, between two log lines."""

    def __init__(self, config: Config, world: World, batches: DevicePrefetcher):
        self.config, self.batches = config, batches
        self.flop_per_image = training_flop_per_image(config)
        peak = peak_flops(world.device)
        self.peak = peak * world.size if peak else None
        self.reset()

    def reset(self) -> None:
        self.began, self.waited, self.steps = time.perf_counter(), self.batches.waited_seconds, 0

    def step_ends(self) -> None:
        self.steps += 1

    def read(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self.began
        images_per_second = self.steps * self.config.optim.batch_size / elapsed
        values = {
            "images_per_second": images_per_second,
            "flops_per_second": images_per_second * self.flop_per_image,
            "data_wait": (self.batches.waited_seconds - self.waited) / elapsed,
        }
        if self.peak:
            values["mfu"] = values["flops_per_second"] / self.peak
        self.reset()
        return values


def _log(
    trainer: Trainer,
    result: StepResult,
    step: int,
    statistics: AssignmentStatistics,
    rates: _Rates,
    writer: MetricsWriter | None,
    bar: tqdm,
) -> None:
    """Writes one line of metrics; the only place where a healthy step waits for the device."""
    config, world = trainer.config, trainer.world
    loss, clustering_loss, entropy = average(
        torch.stack([result.loss, result.clustering_loss, result.target_entropy])
    ).tolist()
    assignments = statistics.read()
    if writer is None:
        return
    n_tokens = statistics.n_positions
    sinkhorn_batch = config.optim.batch_size * (1 if config.clustering.positionwise else n_tokens)
    values = {
        "loss": loss,
        "clustering_loss": clustering_loss,
        "target_entropy": entropy,
        "target_entropy_floor": entropy_floor(sinkhorn_batch, config.clustering.n_prototypes),
        **assignments,
        **rates.read(),
        "peak_memory_bytes": _peak_memory(world.device),
        "lr": result.lr,
        "momentum": result.momentum,
        "clustering_lr": result.clustering_lr,
        "time": time.time(),
    }
    writer.write(step, values)
    bar.set_postfix_str(
        f"loss {loss:.3f}, target entropy {entropy:.3f}, {values['images_per_second']:.0f} images/s", refresh=False
    )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every platform

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _check_finite(trainer: Trainer, run_dir: Path, limit: int) -> None:
    """Stops a run whose losses or gradients have not been finite for `limit` steps."""
    bad_steps = int(trainer.bad_steps)
    if bad_steps >= limit:
        good = newest_checkpoint(run_dir)
        raise Diverged(
            f"losses or gradients were not finite for {bad_steps} steps in a row (run.max_nan_steps is "
            f"{trainer.config.run.max_nan_steps}); last good checkpoint: {good or 'none'}. "
            "Try a lower learning rate, or run.precision fp32."
        )


def _check_state(trainer: Trainer, step: int, run_dir: Path) -> None:
    """Stops a run whose weights or optimiser states are not finite: no later step would mend them."""
    name = trainer.not_finite()
    if any_rank(name is not None):
        raise Diverged(
            f"{name or 'the state of another rank'} is not finite after step {step}; last good checkpoint: "
            f"{newest_checkpoint(run_dir) or 'none'}. Try a lower learning rate, or run.precision fp32."
        )


def _goes_on_from(run_dir: Path, done: int) -> str:
    newest = newest_checkpoint(run_dir)
    if newest is None:
        return "the start"
    return "there" if step_of(newest) == done else f"step {step_of(newest)}"


def _announce(config: Config, trainer: Trainer, start: int) -> None:
    millions = sum(p.numel() for p in trainer.model.student.parameters()) / 1e6
    device = torch.cuda.get_device_name() if trainer.world.device.type == "cuda" else "CPU"
    logger.info(
        "%s: %.2f M student parameters, %d images a step over %d process(es) on %s, %s",
        *(config.run.output_dir, millions, config.optim.batch_size, trainer.world.size, device, trainer.compute_dtype),
    )
    obstacle = graphs_obstacle(config, trainer.world)
    if trainer.world.device.type == "cuda" and config.run.cuda_graphs == "auto" and obstacle is not None:
        logger.info("the host launches every step anew, without a CUDA graph: %s", obstacle)
    if 0 < start < config.optim.steps:
        logger.info("resuming after step %d", start)
    if start >= config.optim.steps:
        logger.info("all %d steps are done already; for a new run choose another run.output_dir", start)
    tokens = (config.data.image_size // config.model.patch_size) ** 2
    batch = config.optim.batch_size * (1 if config.clustering.positionwise else tokens)
    floor = entropy_floor(batch, config.clustering.n_prototypes)
    if floor > 0:
        logger.warning(
            "the Sinkhorn batch of %d is smaller than the %d prototypes: balanced targets keep an entropy of at least "
            "ln(K/B) = %.2f nats; the authors train at about 0.5",
            *(batch, config.clustering.n_prototypes, floor),
        )


def _finish(config: Config, results: Results, run_dir: Path) -> int:
    """Writes the results, and returns the exit status: 1 where the last checkpoint could not be written."""
    logger.info("wrote %s", ", ".join(map(str, results.write(at_the_end=True))))
    if config.run.evaluate:
        results.compare()
    newest = newest_checkpoint(run_dir)
    return int(newest is None or step_of(newest) < config.optim.steps)


def main(argv: list[str] | None = None) -> int:
    """Command line of the trainer; returns the exit status."""
    config = load_config(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with StopRequest(config.run.stop_timeout) as stop, join_world(config.run.device) as world:
            return train(config, world, stop)
    except (ValueError, OSError, ImportError, Diverged) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except Stopped as stopped:
        logger.warning("%s; the newest checkpoint stays", stopped)
        return 128 + stopped.signum


if __name__ == "__main__":
    sys.exit(main())
