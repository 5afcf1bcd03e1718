"""Checkpoints that a kill at any instant cannot spoil, and the exported encoder."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from capi.config import ModelConfig
from capi.model import Student

logger = logging.getLogger(__name__)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` on a temporary file and moves it to `path` once its bytes are on disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def save_checkpoint(run_dir: Path, step: int, state: dict, keep: int) -> Path:
    """Writes `checkpoints/step_<step>.pt` (step = optimiser steps done) and removes all but the newest `keep`."""
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:09d}.pt"
    write_atomically(path, lambda file: torch.save(state, file))
    for old in _checkpoints(run_dir)[:-keep]:
        old.unlink()
    return path


def load_newest_checkpoint(run_dir: Path) -> dict | None:
    """The newest checkpoint that can be read, on the CPU; None without one."""
    for path in reversed(_checkpoints(run_dir)):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file makes the loader raise
            logger.warning("%s cannot be read (%s); trying the one before", path, error)
    return None


def newest_checkpoint(run_dir: Path) -> Path | None:
    return next(reversed(_checkpoints(run_dir)), None)


def _checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step_*.pt"))


def save_encoder(path: Path, student: Student, config: ModelConfig) -> None:
    """Writes backbone and head under the official key names, with the model's configuration as metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
    metadata = {"config": json.dumps(asdict(config))}
    write_atomically(path, lambda file: save_file(tensors, file, metadata))
