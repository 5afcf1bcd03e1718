"""Checkpoints that a kill at any instant and a full disk cannot spoil, and the exported encoder."""

import json
import logging
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from capi.config import ModelConfig
from capi.model import CAPI, Student

logger = logging.getLogger(__name__)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary file and moves it to `path` once its bytes are on disk.

    Raises:
        OSError: the file could not be written; `path` is as it was, and no temporary stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.touch()
        permissions = temporary.stat().st_mode
        write(temporary)
        with suppress(OSError):  # not on every file system
            temporary.chmod(permissions)  # safetensors writes files that their owner alone may read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        # PyTorch hides the system's error behind one of its own, and safetensors has a type for it.
        if isinstance(error, OSError | RuntimeError | SafetensorError):
            raise OSError(f"{path} could not be written: {_first_cause(error)}") from error
        raise


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _first_cause(error: BaseException) -> str:
    """The system's error, if there is one behind this, in one line."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause or error).partition("\n")[0]


def remove_stale_temporaries(run_dir: Path) -> None:
    """Removes what a write that was killed left behind."""
    for folder in (run_dir, run_dir / "checkpoints"):
        for temporary in [*folder.glob(".*.tmp"), *folder.glob(".tmp??????")]:  # ours, and safetensors' own
            logger.info("removed %s, left by a write that was broken off", temporary)
            temporary.unlink(missing_ok=True)


def save_checkpoint(run_dir: Path, step: int, state: dict, keep: int) -> Path:
    """Writes `checkpoints/step_<step>.pt` (step = optimiser steps done).

    Of the checkpoints up to this one all but the newest `keep` are removed, before (for the room) and after. Raises
    OSError as `write_atomically` does; the newest checkpoint is then as it was.
    """

    def write(file: Path) -> None:
        with file.open("wb") as stream:  # Of a file that it opens itself PyTorch does not tell why a write failed.
            torch.save(state, stream)

    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:09d}.pt"
    _remove_old(run_dir, step, keep)
    write_atomically(path, write)
    _remove_old(run_dir, step, keep)
    return path


def _remove_old(run_dir: Path, step: int, keep: int) -> None:
    for old in [path for path in checkpoints(run_dir) if step_of(path) <= step][:-keep]:
        old.unlink()


def load_checkpoint(path: Path) -> dict:
    """A checkpoint on the CPU, mapped from its file.

    Raises:
        ValueError: the file is damaged, be it by one bit.
        OSError: it cannot be read.
    """
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
        raise ValueError(f"it is damaged: {_first_cause(error)}") from error
    raise ValueError(f"it is damaged: the checksum of {damaged} is another")


def load_newest_checkpoint(run_dir: Path) -> dict | None:
    """The newest checkpoint that is sound, as `load_checkpoint` gives it; None where there is none or all are damaged.

    Raises:
        OSError: none is sound, and one could not be read: what it holds is not known.
    """
    unread = None
    for path in reversed(checkpoints(run_dir)):
        try:
            return load_checkpoint(path)
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
            logger.warning("renamed %s to %s.damaged", path, path.name)
            path.rename(path.with_name(f"{path.name}.damaged"))


def checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first."""
    found = (run_dir / "checkpoints").glob("step_*.pt")
    return sorted((path for path in found if path.stem.removeprefix("step_").isdigit()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimiser steps done, by the file's name."""
    return int(checkpoint.stem.removeprefix("step_"))


def save_encoder(path: Path, student: Student, config: ModelConfig) -> None:
    """Writes backbone and head under the official key names, with the model's configuration as metadata.

    Raises OSError as `write_atomically` does.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
    metadata = {"config": json.dumps(asdict(config))}
    write_atomically(path, lambda file: save_file(tensors, file, metadata))


def save_heads(path: Path, model: CAPI) -> None:
    """Writes the teacher's clustering and the moving average's head, by the model's own key names.

    Raises OSError as `write_atomically` does.
    """
    heads = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith(("teacher.head.", "student_ema.head."))
    }
    write_atomically(path, lambda file: save_file(heads, file))
