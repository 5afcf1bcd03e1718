"""How a run starts: which checkpoint all ranks go on from, what may have changed since, and what is moved aside.

The run folder is rank 0's, and may lie on a disk of its node alone. Where all ranks see it they read and write its
checkpoints together; of the rest in it no other rank reads or writes anything.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import yaml

from capi.atomic import write_atomically
from capi.checkpoint import remove_stale_temporaries, set_newer_aside
from capi.config import Config, to_yaml
from capi.data import ImageStream
from capi.distributed import World, gather
from capi.nested import load_text
from capi.restore import Found, all_see, check_fits, find_newest, restore
from capi.run_folder import RunFolder
from capi.step import Trainer

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Changes = dict[str, tuple[object, object]]

# What a run's results depend on by more than rounding is compared when it goes on: every group but `distributed` and
# `run`, and of this:
_COMPARED_OF_RUN = ("run.seed", "run.precision", "run.teacher_precision")
_FREE = ("data.num_workers", "data.read_timeout", "distributed.timeout")
# Neither worth a word when they change.
_OF_THE_START = ("run.output_dir", "run.resume", "run.allow_changes")


def together(work: Callable[[], Result]) -> Result:
    """What `work` returns on this rank; an error on any rank ends all of them, rank 0 with a line that names the rank.

    Raises:
        ValueError: on rank 0 of several; a single process raises its own error.
        SystemExit: on the other ranks.
    """
    result = error = None
    try:
        result = work()
    except (ValueError, OSError, ImportError) as caught:
        error = caught
    errors = gather(None if error is None else str(error))
    if len(errors) == 1 and error is not None:
        raise error
    for rank, message in enumerate(errors):
        if message is not None:
            dist.barrier()  # A rank that leaves early would break the connections that others still read from.
            raise ValueError(f"rank {rank}: {message}") if dist.get_rank() == 0 else SystemExit(1)
    return result


@contextmanager
def run_folder(path: Path, world: World) -> Iterator[RunFolder | None]:
    """Rank 0's folder, locked (None on the other ranks). Raises as `together` does."""
    folder = together(lambda: RunFolder(path) if world.is_main else None)
    try:
        yield folder
    finally:
        if folder is not None:
            folder.release()


@dataclass
class Start:
    """Where a run goes on from."""

    step: int
    """Optimiser steps done."""
    stream: ImageStream | None
    """This rank's images from there on; None when all steps are done."""
    data_fingerprint: str | None
    """Of rank 0's images; None there where it is not known, and on the other ranks."""
    shared: bool
    """Whether all ranks see the run folder, and read and write checkpoints together."""


def begin(trainer: Trainer, folder: RunFolder | None) -> Start:
    """Loads the newest sound checkpoint of rank 0's folder into every rank's trainer, and makes the folder this run's.

    Without a checkpoint, or with `run.resume` false, an earlier run in the folder is moved aside. Nothing is written
    or moved before all checks have passed.

    Raises:
        ValueError: as `together`: the folder holds a run of another configuration or of other images and
            `run.allow_changes` does not name what changed, ranks differ in what they were started with, or weights
            are spread over ranks that do not see rank 0's folder.
    """
    config, world = trainer.config, trainer.world
    run_dir = Path(config.run.output_dir)
    shared = all_see(run_dir, world)
    together(lambda: None if shared or folder is None else _check_weights_are_whole(trainer))
    found = together(lambda: find_newest(run_dir, world, shared=shared)) if config.run.resume else None
    content = found and found.content
    saved = gather(content and {key: value for key, value in content.items() if key != "trainer"})[0]
    step = saved["step"] if saved else 0
    everyone = gather(described(trainer))
    together(lambda: _check_ranks_agree(everyone))
    finished = step >= config.optim.steps
    moved = saved is not None and _source(saved["config"]) != everyone[0]["data"]["source"]
    stream = None if finished and not moved else together(lambda: _open_stream(config, world, saved))
    # That of rank 0 is asked for alone: of millions of files it takes a while.
    fingerprint = together(lambda: stream.fingerprint if stream and folder else None)
    changes = together(lambda: _permitted_changes(config, saved, everyone[0], fingerprint) if folder else {})
    if found is not None:
        left_out = gather(together(lambda: _check_fits(found, trainer, step, shared=shared)))[0]
        restore(found, trainer, left_out, shared=shared)
    together(lambda: _take_over(folder, trainer, saved, changes) if folder else None)
    return Start(step, None if finished else stream, fingerprint, shared)


def described(trainer: Trainer) -> dict:
    """The configuration as it is run: with the precision that `auto` stands for, and a path of images from the root."""
    config = json.loads(json.dumps(asdict(trainer.config)))
    config["data"]["source"] = _absolute(trainer.config.data.source)
    config["run"]["precision"] = {torch.float32: "fp32", torch.bfloat16: "bf16"}[trainer.compute_dtype]
    return config


def _source(saved: dict) -> str:
    return _absolute(saved["data"]["source"])


def _absolute(source: str) -> str:
    kind, _, place = source.partition(":")
    return (
        f"{kind}:{Path(place).expanduser().resolve()}" if kind in ("folder", "wds") and "://" not in place else source
    )


def _fields(config: dict, prefix: str = "") -> dict[str, object]:
    """Every value of a nested configuration by its dotted name."""
    fields = {}
    for key, value in config.items():
        fields |= _fields(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return fields


def _is_compared(name: str) -> bool:
    return name in _COMPARED_OF_RUN if name.startswith(("run.", "distributed.")) else name not in _FREE


def _changes(saved: dict, current: dict) -> Changes:
    """Old and new value of every field that differs; one that an older version did not have was at its default."""
    before = _fields(json.loads(json.dumps(asdict(Config())))) | _fields(saved)
    now = _fields(current)
    before["data.source"] = _source(saved)
    if before["run.precision"] == "auto":  # of a version that did not note what it stood for
        before["run.precision"] = now["run.precision"]
    unknown = before.keys() - now.keys()
    if unknown:
        logger.warning("ignored what this version does not know: %s", ", ".join(sorted(unknown)))
    return {name: (before[name], value) for name, value in now.items() if before[name] != value}


def _check_ranks_agree(everyone: Sequence[dict]) -> None:
    """Each node may have its images and its folder elsewhere, but nothing else of its own."""
    first = _fields(everyone[0])
    for rank, config in enumerate(everyone):
        own = _fields(config)
        differing = [n for n in first if first[n] != own[n] and n not in ("data.source", "run.output_dir")]
        if differing:
            values = ", ".join(f"{name} {_short(own[name])}, not {_short(first[name])}" for name in differing)
            raise ValueError(f"rank {rank} was started with {values} as rank 0; expected the same on all ranks")


def _open_stream(config: Config, world: World, saved: dict | None) -> ImageStream:
    """This rank's images from the checkpoint's step on."""
    if saved is None:
        return ImageStream(config, rank=world.rank, world_size=world.size)
    states, data = saved["streams"], saved["config"]["data"]
    if "samples" not in states[0]:  # of an older version, which counted steps alone
        states = [{**states[0], "samples": saved["step"] * saved["config"]["optim"]["batch_size"]}, *states[1:]]
    source = _source(saved["config"])
    positions = {"image_key": config.data.image_key, "hf_split": config.data.hf_split}
    moved = saved.get("data_fingerprint") is None and source != _absolute(config.data.source)
    if moved or any(data.get(key, value) != value for key, value in positions.items()):
        # A position in what may be another stream means nothing.
        states = [{**states[0], "layout": {**states[0]["layout"], "content": f"that of {source}"}}, *states[1:]]
    return ImageStream(config, rank=world.rank, world_size=world.size, start_step=saved["step"], states=states)


def _permitted_changes(config: Config, saved: dict | None, current: dict, fingerprint: str | None) -> Changes:
    """What is new since the checkpoint. Raises ValueError where `run.allow_changes` does not name it."""
    known = _fields(current) | _fields(saved["config"] if saved else {})
    for entry in config.run.allow_changes:
        if not any(_is_within(name, entry) for name in known):
            raise ValueError(f"run.allow_changes must name fields such as optim.steps, got {entry}")
    if saved is None:
        return {}
    changes, source = _changes(saved["config"], current), current["data"]["source"]
    # Which scenes are drawn follows from the other fields.
    if None not in (fingerprint, saved.get("data_fingerprint")) and source != "synthetic":
        changes = _with_images_judged(changes, saved["data_fingerprint"] == fingerprint, source)
    allowed = config.run.allow_changes
    refused = {n: c for n, c in changes.items() if _is_compared(n) and not any(_is_within(n, e) for e in allowed)}
    if refused:
        names = ", ".join(dict.fromkeys([*allowed, *refused]))
        raise ValueError(
            f"{config.run.output_dir} holds a run with other values of {_listed(refused)}; expected the same, or "
            f"--run.allow_changes '[{names}]' to go on with the new ones, or another run.output_dir, or "
            "--run.resume false to move that run aside"
        )
    return changes


def _with_images_judged(changes: Changes, same: bool, source: str) -> Changes:
    """Not the path of the images counts, but which they are."""
    others = {name: change for name, change in changes.items() if name != "data.source"}
    old, new = changes.get("data.source", (source, source))
    if not same:
        return others | {"data.source": (f"{old} as it was", f"{new} with other images")}
    if old != new:
        logger.info("data.source %s holds the images that were in %s", new, old)
    return others


def _is_within(name: str, entry: str) -> bool:
    return name == entry or name.startswith(f"{entry}.")


def _listed(changes: Changes) -> str:
    return ", ".join(f"{name} ({_short(old)} -> {_short(new)})" for name, (old, new) in sorted(changes.items()))


def _short(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _check_weights_are_whole(trainer: Trainer) -> None:
    if trainer.sharded:
        raise ValueError(
            "weights are spread over the ranks, and not all of these see rank 0's run folder and may write to it; "
            f"expected a run.output_dir on a file system that they share, got {trainer.config.run.output_dir}"
        )


def _check_fits(found: Found, trainer: Trainer, step: int, *, shared: bool) -> set[str]:
    try:
        return check_fits(found, trainer, shared=shared)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the checkpoint of step {step} does not fit this model: {reason}") from error


def _take_over(folder: RunFolder, trainer: Trainer, saved: dict | None, changes: Changes) -> None:
    """Makes the folder this run's: with its configuration, and without what would mix with it."""
    config = trainer.config
    remove_stale_temporaries(folder.path)
    if saved is not None:
        set_newer_aside(folder.path, saved["step"])
        _record(folder.path, saved, changes, trainer.world)
    elif _holds_another_run(folder.path, described(trainer), config.run.resume):
        folder.move_aside()
    write_atomically(folder.path / "config.yaml", lambda file: file.write_text(to_yaml(config)))


def _holds_another_run(run_dir: Path, current: dict, resume: bool) -> bool:
    """Whether a run that starts anew would mix with what is there.

    Metrics alone are the beginning of this very run, if its configuration is the same: they come again.
    """
    if any((run_dir / "checkpoints").glob("step_*")) or (run_dir / "encoder.safetensors").exists():
        return True
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists() or metrics.stat().st_size == 0:
        return False
    try:
        saved = load_text((run_dir / "config.yaml").read_text())
        return not resume or any(map(_is_compared, _changes(saved, current)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return True


def _record(run_dir: Path, saved: dict, changes: Changes, world: World) -> None:
    """Logs what is new since the checkpoint, and adds to `changes.yaml` what was changed by permission."""
    step = saved["step"]
    permitted = {name: change for name, change in changes.items() if _is_compared(name)}
    free = {name: change for name, change in changes.items() if name not in (*permitted, *_OF_THE_START)}
    if len(saved["streams"]) != world.size:
        free["the number of processes"] = (len(saved["streams"]), world.size)
    if free:
        logger.info("going on after step %d with other values of %s", step, _listed(free))
    if not permitted:
        return
    logger.warning("going on after step %d with other values of %s, as allowed", step, _listed(permitted))
    if "data.source" in permitted:
        logger.warning("images of the epoch that was broken off may come twice or not at all")
    entry = {"step": step, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    entry["changes"] = {name: list(change) for name, change in permitted.items()}
    with (run_dir / "changes.yaml").open("a") as file:
        yaml.safe_dump([entry], file, sort_keys=False)
