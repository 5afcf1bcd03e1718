"""Checkpoints that a kill at any instant and a full disk cannot spoil, and the exported encoder.

Each is a folder `checkpoints/step_<step>` (see `capi.sharded_checkpoint`; step = optimiser steps done). Earlier
versions wrote files `step_<step>.pt`, which are still read.
"""

import json
import logging
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from capi import sharded_checkpoint
from capi.atomic import first_cause, write_atomically
from capi.config import ModelConfig
from capi.model import CAPI, Student

logger = logging.getLogger(__name__)


def remove_stale_temporaries(run_dir: Path) -> None:
    """Removes what a write that was killed left behind."""
    for folder in (run_dir, run_dir / "checkpoints"):
        for temporary in [*folder.glob(".*.tmp"), *folder.glob(".tmp??????")]:  # ours, and safetensors' own
            logger.info("removed %s, left by a write that was broken off", temporary)
            _remove(temporary)


def save_checkpoint(
    run_dir: Path,
    step: int,
    state: Mapping,
    keep: int,
    *,
    files: dict[str, int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes `checkpoints/step_<step>`: tensors are those of `state["trainer"]`, by name or by name in groups by name.

    Of the checkpoints up to this one all but the newest `keep` are removed, before (for the room) and after. `files`
    and `group` are those of `sharded_checkpoint.write`; without them this process writes all. Raises OSError as that
    does; the newest checkpoint is then as it was.
    """
    tensors = _flat(state.get("trainer", {}))
    rest = {key: value for key, value in state.items() if key != "trainer"}
    if files is None:
        tensors, files = sharded_checkpoint.part_of_rank(tensors, 0, 1)
    path = run_dir / "checkpoints" / f"step_{step:09d}"

    def make_room() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_old(run_dir, step, keep)

    sharded_checkpoint.write(path, tensors, files, rest, group=group, make_room=make_room)
    if group is None or dist.get_rank() == 0:
        _remove_old(run_dir, step, keep)
    return path


def _flat(tensors: Mapping, prefix: str = "") -> dict[str, Tensor]:
    flat = {}
    for name, value in tensors.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _remove_old(run_dir: Path, step: int, keep: int) -> None:
    for old in [path for path in checkpoints(run_dir) if step_of(path) <= step][:-keep]:
        _remove(old)


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    # Under its own name half a checkpoint would be taken for a damaged one.
    hidden = path if path.name.startswith(".") else path.with_name(f".{path.name}.old.tmp")
    path.rename(hidden)
    shutil.rmtree(hidden)


def load_checkpoint(path: Path, prefix: str = "") -> dict:
    """A checkpoint on the CPU: that of an earlier version mapped from its file, of a folder the tensors named so.

    Those of a folder are in `["trainer"]["model"]` by the model's key names, and in `["trainer"]["optimizer"]`.

    Raises:
        ValueError: a file is damaged, be it by one bit.
        OSError: it cannot be read.
    """
    if path.is_dir():
        sharded_checkpoint.check(path)
        grouped: dict[str, dict | Tensor] = {}
        for name, tensor in sharded_checkpoint.read_tensors(path, prefix).items():
            group, dot, rest = name.partition(".")
            if dot:
                grouped.setdefault(group, {})[rest] = tensor
            else:
                grouped[name] = tensor
        return {**sharded_checkpoint.read_state(path), "trainer": grouped}
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch itself does not look at the checksums.
            if any(member.compress_type for member in archive.infolist()):  # It never does; it could be without end.
                raise ValueError("it is compressed")
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file makes the loader raise
        raise ValueError(f"it is damaged: {first_cause(error)}") from error
    raise ValueError(f"it is damaged: the checksum of {damaged} is another")


def load_newest_checkpoint(run_dir: Path, prefix: str = "") -> dict | None:
    """The newest checkpoint that is sound, as `load_checkpoint` gives it; None where there is none or all are damaged.

    Raises:
        OSError: none is sound, and one could not be read: what it holds is not known.
    """
    unread = None
    for path in reversed(checkpoints(run_dir)):
        try:
            return load_checkpoint(path, prefix)
        except (ValueError, OSError) as error:
            unread = error if isinstance(error, OSError) else unread
            logger.warning("%s cannot be read, trying the one before: %s", path, error)
    if unread is not None:
        raise unread
    return None


def newest_checkpoint(run_dir: Path) -> Path | None:
    return next(reversed(checkpoints(run_dir)), None)


def set_newer_aside(run_dir: Path, step: int) -> None:
    """Renames checkpoints of more steps, which could not be read: a run that goes on from `step` writes its own."""
    for path in checkpoints(run_dir):
        if step_of(path) > step:
            names = (f"{path.name}.damaged{'' if n == 0 else f'.{n}'}" for n in count())
            aside = next(name for name in names if not path.with_name(name).exists())
            logger.warning("renamed %s to %s", path, aside)
            path.rename(path.with_name(aside))


def checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first."""
    found = (run_dir / "checkpoints").glob("step_*")
    return sorted((path for path in found if is_checkpoint(path)), key=lambda path: (step_of(path), path.is_dir()))


def is_checkpoint(path: Path) -> bool:
    """By its name."""
    return path.stem.removeprefix("step_").isdigit() and (path.suffix == ".pt" or (not path.suffix and path.is_dir()))


def step_of(checkpoint: Path) -> int:
    """Optimiser steps done, by the name."""
    return int(checkpoint.stem.removeprefix("step_"))


def save_encoder(path: Path, student: Student, config: ModelConfig) -> None:
    """Writes backbone and head under the official key names, with the model's configuration as metadata.

    Raises OSError as `write_atomically` does.
    """
    _save_encoder(path, student.state_dict(), config)


def save_heads(path: Path, model: CAPI) -> None:
    """Writes the teacher's clustering and the moving average's head, by the model's own key names.

    Raises OSError as `write_atomically` does.
    """
    _save_heads(path, model.state_dict())


def export_checkpoint(path: Path, encoder: Path, heads: Path, config: ModelConfig) -> None:
    """Writes the moving average and the heads of a checkpoint that has just been written, as the two above do."""
    read = sharded_checkpoint.read_tensors(path, ("model.student_ema.", "model.teacher.head.layer."))
    model = {name.removeprefix("model."): tensor for name, tensor in read.items()}
    ema = {name.removeprefix("student_ema."): x for name, x in model.items() if name.startswith("student_ema.")}
    _save_encoder(encoder, ema, config)
    _save_heads(heads, model)


def _save_encoder(path: Path, state: Mapping[str, Tensor], config: ModelConfig) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {"config": json.dumps(asdict(config))}
    write_atomically(path, lambda file: save_file(tensors, file, metadata))


def _save_heads(path: Path, state: Mapping[str, Tensor]) -> None:
    heads = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if name.startswith(("teacher.head.layer.", "student_ema.head."))
    }
    write_atomically(path, lambda file: save_file(heads, file))
