"""Weights & Biases and MLflow, of rank 0: the lines of `metrics.jsonl` from a thread that cannot hold the training up.

A resumed run goes on as the same run there, whose id stays in the run folder. What either package asks of the
environment holds: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE (offline writes to the run folder alone),
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and the rest.
"""

import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from queue import Full, Queue
from threading import Thread

from capi.checkpoint import write_atomically
from capi.config import Config
from capi.provenance import without_secrets

logger = logging.getLogger(__name__)

MOST_LINES = 10_000  # That wait for a network; what comes while so many do is lost.
SECONDS_TO_END = 10.0

Line = tuple[int, Mapping[str, int | float]]
Write = Callable[[int, Mapping[str, int | float]], object]

# Where the environment does not say otherwise: no reports to the makers, no copy of the output, no wait without end.
_ENVIRONMENT = {
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_CONSOLE": "off",
    "WANDB_QUIET": "true",
    "WANDB_LOGIN_TIMEOUT": "60",
    "WANDB_INIT_TIMEOUT": "30",  # At its end, too, a process waits so long for a run that has not begun.
    "WANDB_FINISH_TIMEOUT": f"{SECONDS_TO_END:.0f}",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def import_loggers(names: Sequence[str]) -> None:
    """Imports the packages: here, since a fork amid an import of another thread leaves a lock behind.

    Raises:
        ImportError: one is not installed, or is broken.
    """
    if names:
        for variable, value in _ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
    for name in names:
        try:
            # A folder of that name, such as wandb leaves where it ran, is a package to Python too.
            found = import_module(name).__file__ is not None
            reason = "it is not installed"
        except ImportError as error:
            found, reason = False, error
        if not found:
            raise ImportError(f"run.loggers names {name}, but {reason}; expected pip install '.[{name}]'")


def start_loggers(config: Config, run_dir: Path, provenance: Mapping) -> list["Logger"]:
    """Those of `run.loggers`, each in a thread of its own; `provenance` is the start's entry of `run.json`."""
    values = json.loads(without_secrets(json.dumps(asdict(config))))
    sinks = {"wandb": _wandb, "mlflow": _mlflow}
    return [Logger(name, sinks[name], run_dir, values, provenance) for name in dict.fromkeys(config.run.loggers)]


class _RunFailed(Exception):
    pass


class Logger:
    """Hands lines to a thread, which writes them. One that cannot be written costs a line in the log, and is lost."""

    def __init__(
        self,
        name: str,
        sink: Callable[[Path, Mapping, Mapping], AbstractContextManager[Write]],
        run_dir: Path,
        config: Mapping,
        provenance: Mapping,
    ):
        self.name = name
        self._sink = lambda: sink(run_dir, config, provenance)
        self._lines: Queue[Line | None] = Queue(MOST_LINES)
        self._full = self._failing = self._run_failed = False
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, int | float]) -> None:
        """Returns at once."""
        if not self._thread.is_alive():
            return
        try:
            self._lines.put_nowait((step, values))
            self._full = False
        except Full:
            if not self._full:
                logger.error("%s: %d lines wait already; those from step %d on are lost", self.name, MOST_LINES, step)
            self._full = True

    def close(self, *, failed: bool) -> None:
        """Waits for what is not written yet, ten seconds at most."""
        self._run_failed = failed
        with suppress(Full):
            self._lines.put_nowait(None)
        self._thread.join(SECONDS_TO_END)
        if self._thread.is_alive():
            logger.error("%s: left with %d lines not written", self.name, self._lines.qsize())

    def _run(self) -> None:
        try:
            with self._sink() as write:
                for step, values in iter(self._lines.get, None):
                    self._write(write, step, values)
                if self._run_failed:
                    raise _RunFailed
        except _RunFailed:
            pass
        except Exception as error:  # whatever a network and the packages raise
            logger.error("%s: the run goes on without it: %s", self.name, _one_line(error))

    def _write(self, write: Write, step: int, values: Mapping[str, int | float]) -> None:
        try:
            write(step, values)
        except Exception as error:
            if not self._failing:
                logger.error("%s: lines from step %d on are lost: %s", self.name, step, _one_line(error))
            self._failing = True
            return
        if self._failing:
            logger.warning("%s: lines from step %d on are written again", self.name, step)
        self._failing = False


@contextmanager
def _wandb(run_dir: Path, config: Mapping, provenance: Mapping) -> Iterator[Write]:
    """Steps that the run has already are left out there."""
    import wandb

    run_id = _kept_id(run_dir, "wandb") or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    _keep_id(run_dir, "wandb", run_id)
    with wandb.init(
        id=run_id,
        resume="allow",
        name=os.environ.get("WANDB_NAME", run_dir.resolve().name),
        dir=os.environ.get("WANDB_DIR", run_dir),
    ) as run:
        run.config.update({**config, "provenance": dict(provenance)}, allow_val_change=True)
        yield lambda step, values: run.log(dict(values), step=step)


@contextmanager
def _mlflow(run_dir: Path, config: Mapping, provenance: Mapping) -> Iterator[Write]:
    """Parameters never change there: those of the first start stay."""
    import mlflow

    name = os.environ.get("MLFLOW_RUN_NAME", run_dir.resolve().name)
    kept, known_to = _kept_id(run_dir, "mlflow"), -1
    try:
        run = mlflow.start_run(run_id=kept, run_name=name)
    except mlflow.MlflowException as error:
        if kept is None or error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        place = without_secrets(mlflow.get_tracking_uri())
        logger.warning("mlflow: no run %s is known at %s; it starts anew", kept, place)
        run = mlflow.start_run(run_name=name)
    with run:
        run_id = run.info.run_id
        if run_id == kept:
            history = mlflow.MlflowClient().get_metric_history(run_id, "time")
            known_to = max((metric.step for metric in history), default=-1)
        _keep_id(run_dir, "mlflow", run_id)
        parameters = {key: value for key, value in _flat(config) if key not in run.data.params}
        mlflow.log_params(parameters)
        mlflow.set_tags({f"capi.{key}": value for key, value in _flat(provenance)})
        yield lambda step, values: step > known_to and mlflow.log_metrics(dict(values), step=step)


def _kept_id(run_dir: Path, name: str) -> str | None:
    path = run_dir / f"{name}_run_id"
    return path.read_text().strip() if path.exists() else None


def _keep_id(run_dir: Path, name: str, run_id: str) -> None:
    write_atomically(run_dir / f"{name}_run_id", lambda file: file.write_text(f"{run_id}\n"))


def _flat(values: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _one_line(error: Exception) -> str:
    return without_secrets(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
