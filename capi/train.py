"""Trains a CAPI encoder: `python -m capi.train [--config PRESET_OR_FILE] [--GROUP.FIELD VALUE ...]`."""

import logging
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from capi.checkpoint import newest_checkpoint, step_of
from capi.collapse import CollapseAlarm
from capi.config import Config, load_config
from capi.config_check import check_config
from capi.data.prefetch import DevicePrefetcher
from capi.distributed import World, join_world, largest
from capi.evaluate.on_the_way import Evaluator
from capi.fp8 import fp8_obstacle
from capi.loggers import import_loggers, start_loggers
from capi.masking import check_masking
from capi.metrics import AssignmentStatistics, MetricsWriter, read_metrics
from capi.model import CAPI
from capi.profiling import WARM_UP_STEPS, StepProfiler
from capi.progress import Rates, announce, log_evaluation, log_step
from capi.provenance import record_start
from capi.results import Results
from capi.resume import Start, begin, run_folder, together
from capi.saving import Checkpoints, Diverged, goes_on_from
from capi.sharding import whole_average
from capi.step import Trainer
from capi.step_graph import graphs_obstacle
from capi.stopping import Stopped, StopRequest
from capi.watchdog import EXIT_STATUS, Lost, Watchdog

logger = logging.getLogger("capi")


def train(config: Config, world: World, stop: StopRequest, watchdog: Watchdog) -> int:
    """Runs or resumes a training in `config.run.output_dir`; returns the exit status.

    Raises:
        ValueError: the configuration does not fit together, or the folder is in use or holds a run of another
            configuration.
        OSError: the run folder cannot be read or written to. (Where a checkpoint cannot be written, the run goes on.)
        Stopped: a signal ended the run where its ranks could not agree on a step.
        Diverged: losses or gradients were not finite for `config.run.max_nan_steps` steps in a row, or weights or
            optimiser states are not.
        Lost: another rank does not go on.
    """
    together(lambda: _check(config, world))
    evaluator = together(lambda: Evaluator(config) if world.is_main and config.run.evaluate_every else None)
    run_dir = Path(config.run.output_dir)
    with run_folder(run_dir, world) as folder:
        trainer = Trainer(config, world)
        start = begin(trainer, folder)
        results = Results(trainer, run_dir)
        if world.is_main:
            announce(config, trainer, start.step)
        if start.stream is not None:
            with logging_redirect_tqdm():  # a log line does not break the progress bar
                signum = _run_steps(trainer, start, run_dir, results, stop, watchdog, evaluator)
            if signum is not None:
                return 128 + signum
        model = whole_average(trainer.model, world)
        return together(lambda: _finish(config, results, model, run_dir) if model is not None else 0)


def _check(config: Config, world: World) -> None:
    check_config(config, world.size)
    side = config.data.image_size // config.model.patch_size
    check_masking(config.masking, (side, side))
    import_loggers(config.run.loggers if world.is_main else [])
    needed = WARM_UP_STEPS + 2 * config.run.profile
    if config.run.profile and config.optim.steps < needed:
        raise ValueError(f"run.profile {config.run.profile} takes {needed} steps, got optim.steps {config.optim.steps}")
    obstacle = graphs_obstacle(config, world)
    if config.run.cuda_graphs == "on" and obstacle is not None:
        raise ValueError(f"run.cuda_graphs is on, but {obstacle}; expected auto or off")
    if config.run.teacher_precision == "fp8" and (obstacle := fp8_obstacle(config, world)) is not None:
        raise ValueError(f"run.teacher_precision is fp8, but {obstacle}; expected auto")


def _run_steps(
    trainer: Trainer,
    begun: Start,
    run_dir: Path,
    results: Results,
    stop: StopRequest,
    watchdog: Watchdog,
    evaluator: Evaluator | None,
) -> int | None:
    """Trains from the steps done to the end, or to a stop signal on any rank, which it returns."""
    config, world, start = trainer.config, trainer.world, begun.step
    n_tokens = (config.data.image_size // config.model.patch_size) ** 2
    statistics = AssignmentStatistics(n_tokens, config.clustering.n_prototypes)
    entry = record_start(run_dir, world, start)
    writer = MetricsWriter(run_dir, start, start_loggers(config, run_dir, entry)) if world.is_main else None
    before = read_metrics(run_dir / "metrics.jsonl") if world.is_main else []
    alarm = CollapseAlarm(n_tokens, config.clustering.n_prototypes, before)
    checkpoints = Checkpoints(trainer, begun, run_dir, results)
    bar = tqdm(
        total=config.optim.steps,
        initial=start,
        disable=not world.is_main,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file needs no animation
    )
    try:
        prefetcher = DevicePrefetcher(begun.stream, world.device, host=trainer.host)
        profiler = StepProfiler(config.run.profile if world.is_main else 0, trainer.host, world.device, run_dir)
        watched = watchdog.steps(trainer.host, run_dir, checkpoints.save_alone)
        with stop.deferred(), prefetcher as batches, watched, checkpoints.saved_alone_by(stop, bar):
            rates = Rates(config, world, trainer.host)
            for step in range(start, config.optim.steps):
                watchdog.step_begins(step)
                last = step + 1 == config.optim.steps
                checkpoints.streams = [batches.state_dict()]
                with suppress(Stopped), stop.at_once():
                    micro_batches = next(batches)
                # Before the step is launched: a rank without data holds the others up where their state is whole.
                if signum := largest(stop.signum or 0):
                    with trainer.host.phase("checkpoint"):
                        checkpoints.save(step)
                        checkpoints.finish()
                    bar.close()
                    name = signal.Signals(signum).name + ("" if stop.signum else " on another rank")
                    where = goes_on_from(run_dir, step) if world.is_main else "there"
                    logger.warning("stopped by %s after step %d; the same command goes on from %s", name, step, where)
                    stop.kill_loaders()
                    return signum
                checkpoints.streams.append(batches.state_dict())
                result = trainer.step(micro_batches, step, (lambda: None) if last else batches.prefetch)
                positions = torch.cat([masks.predict_indices for _, masks in micro_batches]) % n_tokens
                statistics.update(positions, result.clusters)
                rates.step_ends()
                profiler.step_ends(step + 1 - start)
                del micro_batches  # The prefetcher bounds what the device holds.
                done = step + 1
                if done % config.run.log_every == 0 or last:
                    log_step(trainer, result, step, statistics, alarm, rates, writer, bar)
                if world.device.type == "cpu" or done % config.run.log_every == 0 or last:
                    checkpoints.check_finite(config.run.max_nan_steps if not last else 1)
                bar.update()
                if done % config.run.checkpoint_every == 0 or last:
                    with trainer.host.phase("checkpoint"):
                        checkpoints.save(done)
                if config.run.evaluate_every and (done % config.run.evaluate_every == 0 or last):
                    log_evaluation(trainer, evaluator, step, rates, writer, stop)
            if signum := largest(stop.signum or 0):
                return signum
    finally:
        bar.close()
        if writer is not None:
            writer.close()
    return None


def _finish(config: Config, results: Results, model: CAPI, run_dir: Path) -> int:
    """Writes the results, and returns the exit status: 1 where the last checkpoint could not be written."""
    logger.info("wrote %s", ", ".join(map(str, results.write(model))))
    if config.run.evaluate:
        results.compare(model)
    newest = newest_checkpoint(run_dir)
    return int(newest is None or step_of(newest) < config.optim.steps)


def main(argv: list[str] | None = None) -> int:
    """Command line of the trainer; returns the exit status."""
    config = load_config(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with (
            StopRequest(config.run.stop_timeout) as stop,
            join_world(config.run.device, config.distributed.timeout) as world,
            Watchdog(world, config.distributed.timeout) as watchdog,
        ):
            return train(config, world, stop, watchdog)
    except Lost as lost:
        print(f"error: {lost}", file=sys.stderr)  # noqa: T201
        return EXIT_STATUS
    except (ValueError, OSError, ImportError, Diverged) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except Stopped as stopped:
        logger.warning("%s; the newest checkpoint stays", stopped)
        return 128 + stopped.signum


if __name__ == "__main__":
    sys.exit(main())
