"""The runs of an experiment: every arm with every seed, each trained once, and a line of a file for each.

An arm is a set of options of `python -m capi.train`. What does not depend on the clock goes into its line: on a CPU of
the same kind a second run gives the same bits, as every training has one thread to itself.
"""

import argparse
import json
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import torch
import yaml

from capi import train
from capi.checkpoint import write_atomically
from capi.metrics import read_metrics

logger = logging.getLogger("capi")

_ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
# Of every line of metrics; scores of evaluations on the way besides.
_KEPT = ("loss", "clustering_loss", "target_entropy", "positional_mi", "positional_mi_floor", "dead_prototypes")

LAST = 5  # readings whose mean is how a run ended
Options = Mapping[str, object]
Record = dict


@dataclass(frozen=True)
class Run:
    """One training: an arm's options, by dotted name as `capi.train` takes them, with one seed."""

    arm: str
    seed: int
    options: Options
    places: Options = field(default_factory=dict)
    """Options that say where things lie, which may differ between machines."""


def read_sweep(path: Path) -> dict[str, Options]:
    """The options of every arm of a YAML file; those under `all` are every arm's, unless it says otherwise.

    Raises ValueError for a file of another form.
    """
    sweep = yaml.safe_load(path.read_text())
    if not isinstance(sweep, dict) or not all(isinstance(options, dict | None) for options in sweep.values()):
        raise ValueError(f"{path}: expected a mapping of options for each arm, got {str(sweep)[:80]}")
    common = sweep.pop("all", None) or {}
    return {arm: {**common, **(options or {})} for arm, options in sweep.items()}


def chosen(sweep: Mapping[str, Options], names: Sequence[str] | None) -> dict[str, Options]:
    """The named arms, or all of them; raises ValueError for a name that is none."""
    if unknown := set(names or ()) - set(sweep):
        raise ValueError(f"expected names of {', '.join(sweep)}, got {', '.join(sorted(unknown))}")
    return {name: sweep[name] for name in names or sweep}


def read_records(path: Path) -> list[Record]:
    """The runs that are done, as their lines say; none where there is no such file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def append(path: Path, record: Record) -> None:
    """Adds the line of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def perform(
    runs: Iterable[Run], results: Path, folder: Path, jobs: int = 1, score: Callable[[Path], dict] | None = None
) -> None:
    """Trains the runs that `results` has no line of, so many at a time, and appends theirs.

    What was broken off goes on from its newest checkpoint below `folder`. `score` is given the folder of a run that is
    done, and adds to its scores; for several jobs it must be picklable.

    Raises:
        ValueError: an arm has other options than those its line was made with.
        RuntimeError: a training failed or was stopped.
    """
    done = {(record["arm"], record["seed"]): record["options"] for record in read_records(results)}
    missing = []
    for run in runs:
        options = done.get((run.arm, run.seed))
        if options is None:
            missing.append(run)
        elif options != _plain(run.options):
            raise ValueError(
                f"{results} has {run.arm}, seed {run.seed}, with other options than it has now: expected "
                f"{_plain(run.options)}, got {options}; take its line out, or write to another file"
            )
    work = partial(_trained, folder=folder, score=score)
    pool = ProcessPoolExecutor(jobs, get_context("spawn")) if jobs > 1 else None
    try:
        futures = [pool.submit(work, run) for run in missing] if pool else []
        finished = (future.result() for future in as_completed(futures)) if pool else map(work, missing)
        for number, record in enumerate(finished, start=1):
            append(results, record)
            logger.info("%s, seed %d: done, %d of %d", record["arm"], record["seed"], number, len(missing))
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)  # After a failure or Ctrl-C no other begins.


def _trained(run: Run, folder: Path, score: Callable[[Path], dict] | None) -> Record:
    """Trains, or goes on, to the end; returns the line."""
    run_dir = folder / f"{run.arm}-seed-{run.seed}"
    options = {**run.options, **run.places, "run.seed": run.seed, "run.output_dir": run_dir}
    torch.set_num_threads(1)  # A sum by several depends on their number.
    began = time.process_time()
    status = train.main(argv(options))
    if status:
        raise RuntimeError(f"the training of {run.arm}, seed {run.seed}, ended with status {status}: see {run_dir}")
    seconds = time.process_time() - began
    lines = read_metrics(run_dir / "metrics.jsonl")
    evaluated = sorted({name for line in lines for name in line if name.startswith("eval_")})
    series = {name: [[line["step"] + 1, line[name]] for line in lines if name in line] for name in (*_KEPT, *evaluated)}
    return {
        "arm": run.arm,
        "seed": run.seed,
        "options": _plain(run.options),
        "scores": {name: series[name][-1][1] for name in evaluated} | (score(run_dir) if score else {}),
        "tokens_a_reading": next(line["assigned_tokens"] for line in lines if "assigned_tokens" in line),
        "series": series,
        "cpu_seconds": round(seconds),  # Of the call that finished it.
        **made(),
    }


def argv(options: Options) -> list[str]:
    """The options as words of a command line."""
    return [
        f"--{name}={value if isinstance(value, str | Path) else json.dumps(value)}" for name, value in options.items()
    ]


def _plain(options: Options) -> dict:
    return json.loads(json.dumps(dict(options)))


def made() -> dict[str, str]:
    """When, of which commit, "-dirty" where more than results differs from it, and with what."""

    def said(*command: str) -> str:
        done = subprocess.run(["git", "-C", _ROOT, *command], capture_output=True, text=True, timeout=60)
        return done.stdout.strip()

    commit = said("describe", "--always", "--exclude=*") or "unknown"
    changed = said("status", "--porcelain", "--untracked-files=no", "--", ".", ":!experiments/results")
    return {
        "date": time.strftime("%F", time.gmtime()),
        "commit": commit + ("-dirty" if changed else ""),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def of_arms(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each arm, by seed."""
    arms: dict[str, list[Record]] = {}
    for record in records:
        arms.setdefault(record["arm"], []).append(record)
    return {arm: sorted(of_arm, key=lambda record: record["seed"]) for arm, of_arm in arms.items()}


def excess(record: Record) -> list[tuple[int, float]]:
    """Step and information over chance, in nats, of every reading."""
    measured, by_chance = (record["series"][name] for name in ("positional_mi", "positional_mi_floor"))
    return [(step, value - floor) for (step, value), (_, floor) in zip(measured, by_chance, strict=True)]


def last_excess(record: Record) -> float:
    """How a run ended: the mean of the last readings."""
    return mean(value for _, value in excess(record)[-LAST:])


def seeds_of(records: Iterable[Record]) -> str:
    return ", ".join(str(record["seed"]) for record in records)


def spread(values: Sequence[float]) -> str:
    """Mean and, of several, their standard deviation."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def write_table(results: Path, name: str, records: Sequence[Record], text: str) -> None:
    """Writes the table beside the results, with what made it."""
    dates, commits = (sorted({record[key] for record in records}) for key in ("date", "commit"))
    head = (
        f"Made by `python -m experiments.{name}` on {' to '.join(sorted({dates[0], dates[-1]}))}, on CPUs. "
        f"Commits {', '.join(commits)}. Means and standard deviations over the seeds named."
    )
    write_atomically(results.with_suffix(".md"), lambda file: file.write_text(f"{head}\n\n{text}\n"))


def command(description: str, name: str) -> argparse.ArgumentParser:
    """The command line of an experiment: which seeds, and where they go."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m experiments.{name}", description=description, formatter_class=form)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="(0 1 2)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / f"{name}.jsonl", help="(%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs") / name, help="of the trainings (%(default)s)")
    parser.add_argument("--report", action="store_true", help="train nothing: table and figure of what is there")
    return parser


def exit_status(main: Callable[[], None]) -> int:
    """Runs an experiment's command; what its user can set right is said in one line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0
