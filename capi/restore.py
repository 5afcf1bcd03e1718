"""Which checkpoint all ranks go on from, and how it gets into every rank's trainer.

Where all ranks see rank 0's run folder each reads its part of the files. Where that lies on a disk of rank 0's node
alone, no other rank reads or writes it: rank 0 reads, and hands out.
"""

import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from capi import sharded_checkpoint
from capi.checkpoint import checkpoints, load_checkpoint
from capi.distributed import World, gather
from capi.sharded_checkpoint import check_fit, load_into, read_state, read_tensors, saved_shapes, shapes_of, tensors_of
from capi.step import Trainer

logger = logging.getLogger(__name__)

_QUEUE = "model.teacher.head.queue."
_LOOKS, _SECONDS_BETWEEN = 5, 0.2  # A network's file system may show a new file a little later.


@dataclass
class Found:
    """A checkpoint that all ranks have found whole."""

    path: Path
    """Of a folder that they see, on each rank; else on rank 0."""
    content: dict | None
    """All but the tensors of a folder; on rank 0."""


def all_see(folder: Path, world: World) -> bool:
    """Whether every rank's `folder` is rank 0's and may be written to. Called by all ranks."""
    if world.size == 1:
        return True
    token = folder / f".{gather(uuid4().hex)[0]}.tmp"
    if world.is_main:
        with suppress(OSError):  # as on a full disk: then no rank sees it
            token.touch()
    dist.barrier()
    seen = gather(_exists(token) and os.access(folder, os.W_OK))
    if world.is_main:
        token.unlink(missing_ok=True)
    return all(seen)


def _exists(token: Path) -> bool:
    for _ in range(_LOOKS):
        if token.exists():
            return True
        time.sleep(_SECONDS_BETWEEN)
    return False


def find_newest(folder: Path, world: World, *, shared: bool) -> Found | None:
    """The newest checkpoint of rank 0's folder that is whole; None where there is none. Called by all ranks.

    Where the folder is `shared`, each rank checks its part of the files. What is damaged is named in rank 0's log.

    Raises:
        OSError: on all ranks: none is whole, and one could not be read: what it holds is not known.
    """
    names = gather([path.name for path in checkpoints(folder)] if world.is_main else None)[0]
    unread = None
    for name in reversed(names):
        found, error = Found(folder / "checkpoints" / name, None), None
        try:
            found.content = _check(found.path, world, shared=shared)
        except (ValueError, OSError) as caught:
            error = caught
        errors = [error for error in gather(error) if error is not None]
        if not errors:
            return found
        if world.is_main:
            logger.warning("%s cannot be read, trying the one before: %s", found.path, errors[0])
        unread = next((error for error in errors if isinstance(error, OSError)), unread)
    if unread is not None:
        raise unread
    return None


def _check(path: Path, world: World, *, shared: bool) -> dict | None:
    if path.suffix:
        return load_checkpoint(path) if world.is_main else None
    if shared:
        sharded_checkpoint.check(path, world.rank, world.size)
    elif world.is_main:
        sharded_checkpoint.check(path)
    return read_state(path) if world.is_main else None


def check_fits(found: Found, trainer: Trainer, *, shared: bool) -> set[str]:
    """Which tensors are not to be loaded: those of a Sinkhorn queue that begins anew, as it has another size.

    Raises ValueError where the other tensors of a checkpoint are not those of this model.
    """
    tensors = tensors_of(trainer.model, trainer.optimizers)
    if not (shared or trainer.world.is_main) or (found.path.suffix and not trainer.world.is_main):
        return set()
    old = found.path.suffix != ""
    saved = shapes_of(_of_earlier_version(found.content["trainer"], trainer)) if old else saved_shapes(found.path)
    ours = shapes_of(tensors)
    queue = {name for name in saved.keys() | ours.keys() if name.startswith(_QUEUE)}
    if all(saved.get(name) == ours.get(name) for name in queue):
        queue = set()
    check_fit(*({name: x for name, x in side.items() if name not in queue} for side in (saved, ours)))
    return queue


@torch.no_grad()
def restore(found: Found, trainer: Trainer, left_out: set[str], *, shared: bool) -> None:
    """Loads a checkpoint that fits, on all ranks; leaves nothing of its memory in use."""
    tensors = tensors_of(trainer.model, trainer.optimizers)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    if found.path.suffix == "" and shared:
        load_into(found.path, tensors, alone=trainer.world.size == 1)
    else:
        whole = {}
        if trainer.world.is_main:
            old = found.path.suffix != ""
            whole = _of_earlier_version(found.content["trainer"], trainer) if old else read_tensors(found.path)
        _hand_out(whole, tensors, trainer.world)
    trainer.share_tables()


def _of_earlier_version(saved: Mapping, trainer: Trainer) -> dict[str, Tensor]:
    """The tensors of `step_*.pt` by their names of today: states had the number of a parameter within its optimiser."""
    whole = {f"model.{name}": tensor for name, tensor in saved["model"].items()}
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    for key, optimizer in zip(("student_optimizer", "clustering_optimizer"), trainer.optimizers, strict=True):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, state in saved[key]["state"].items():
            if index >= len(parameters):
                raise ValueError(f"{key} has states of {len(saved[key]['state'])} parameters, not {len(parameters)}")
            whole |= {f"optimizer.{names[parameters[index]]}.{name}": value for name, value in state.items()}
    return whole


def _hand_out(whole: Mapping[str, Tensor], tensors: Mapping[str, Tensor], world: World) -> None:
    """Copies whole tensors of rank 0 into those of all ranks."""
    for name, ours in tensors.items():
        if isinstance(ours, DTensor):
            value = torch.empty(ours.shape, dtype=ours.dtype, device=ours.device)
            if world.is_main:
                value.copy_(whole[name])
            ours.copy_(distribute_tensor(value, ours.device_mesh, ours.placements))
            continue
        if world.is_main:
            ours.copy_(whole[name])
        if world.size > 1:
            dist.broadcast(ours, 0)
