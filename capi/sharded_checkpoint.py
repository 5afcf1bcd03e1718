"""A checkpoint as a folder that all ranks of a run write and read together, by PyTorch's distributed checkpoint.

    step_000000100/
        shard-<rank>-model-<file>-of-<files>.safetensors    tensors, each whole or in slices, from every rank
        state.json                                          the rest: step, configuration, places in the data
        manifest.json                                       size and SHA-256 of every file; written last

Its tensors are safetensors and all else is JSON: reading it runs no code, whoever wrote it.
"""

import hashlib
import json
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.futures import Future

from capi.atomic import first_cause, sync_directory

# Of a process by itself, which is what is meant.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)

Shape = tuple[torch.Size, torch.dtype]

FORMAT = 1
"""Of the folder; another one is refused."""
MANIFEST, STATE = "manifest.json", "state.json"
_BYTES_PER_FILE = 2**26  # of each rank: a file at a time is copied once more, while no other thread may run
_READERS = 4  # threads that hash files: a single one is slower than most disks


def tensors_of(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All tensors of a training by name, the very ones: `model.NAME`, and `optimizer.NAME.STATE` of a parameter.

    Sharded ones are DTensors. An optimiser that has no states yet is given them.
    """
    states = get_optimizer_state_dict(model, optimizers)["state"]
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()} | {
        f"optimizer.{name}.{key}": value for name, state in states.items() for key, value in state.items()
    }


def part_of_rank(tensors: Mapping[str, Tensor], rank: int, size: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What this rank writes, and for every tensor of all ranks the number of the file that it goes to, from 1 on.

    A rank writes its slices of the sharded tensors, and of the others, which all have, as many bytes as the rest do.
    """
    part, files, total, loads = {}, {}, 0, [0] * size
    for name, tensor in tensors.items():
        n_bytes = tensor.numel() * tensor.element_size()
        files[name] = 1 + total // (size * _BYTES_PER_FILE)
        total += n_bytes
        owner = rank
        if not isinstance(tensor, DTensor):
            owner = loads.index(min(loads))
            loads[owner] += n_bytes
        if owner == rank:
            part[name] = tensor
    return part, files


def write(
    path: Path,
    tensors: dict[str, Tensor],
    files: dict[str, int],
    state: Mapping,
    *,
    group: dist.ProcessGroup | None = None,
    make_room: Callable[[], object] = lambda: None,
) -> None:
    """Writes the folder `path` under a hidden name and renames it once all its bytes, of every rank, are on disk.

    Without a group this process writes it alone; with one all its ranks call this, each with `part_of_rank`. Rank 0
    calls `make_room` first, and adds the `state` (as JSON has it; keys may be whole numbers).

    Raises:
        OSError: on all ranks: one of them could not write its part. No temporary stays.
    """
    # Another name where one rank writes what a save of all ranks, which may still hang, has begun.
    temporary = path.with_name(f".{path.name}{'' if group else '.alone'}.tmp")
    writer = _Writer(temporary, path, files, state, make_room)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    except (dcp.CheckpointException, RuntimeError, OSError) as error:
        if writer.is_coordinator:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{path} could not be written: {_reason(error, of_many=group is not None)}") from error


def _reason(error: BaseException, *, of_many: bool) -> str:
    if not isinstance(error, dcp.CheckpointException):
        return first_cause(error)
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {first_cause(cause)}" if of_many else first_cause(cause)


class _Writer(dcp.HuggingFaceStorageWriter):
    """PyTorch's writer of safetensors, and around it the hidden folder, the manifest and the rename.

    What it raises here on one rank PyTorch raises on all.
    """

    is_coordinator = False

    def __init__(
        self, temporary: Path, path: Path, files: dict[str, int], state: Mapping, make_room: Callable[[], object]
    ):
        super().__init__(str(temporary), fqn_to_index_mapping=files, save_distributed=True)
        self._temporary, self._final, self._state, self._make_room = temporary, path, state, make_room

    def set_up_storage_writer(self, is_coordinator: bool, *args: object, **options: object) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **options)
        self.is_coordinator = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if self.is_coordinator:
            self._make_room()
        return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[tuple[str, dict]]]:
        """Writes this rank's files, and says of each what stands in the manifest."""
        written = super().write_data(plan, planner).wait()
        names = sorted({result.storage_data.relative_path for result in written})
        described = Future()
        described.set_result([(name, _described(self._temporary / name)) for name in names])
        return described

    def finish(self, metadata: Metadata, results: list[list[tuple[str, dict]]]) -> None:
        """On rank 0, once all have written."""
        _write(self._temporary / STATE, json.dumps(self._state))
        files = dict(entry for of_rank in results for entry in of_rank)
        files[STATE] = _described(self._temporary / STATE)
        manifest = {
            "format": FORMAT,
            "step": self._state.get("step"),
            "ranks": len(results),
            "time": time.time(),
            "versions": {name: version(name) for name in ("torch", "safetensors")}
            | {"python": platform.python_version()},
            "files": files,
        }
        _write(self._temporary / MANIFEST, json.dumps(manifest, indent=1))
        sync_directory(self._temporary)
        self._temporary.rename(self._final)
        sync_directory(self._final.parent)


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _described(path: Path) -> dict:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check(path: Path, part: int = 0, parts: int = 1) -> None:
    """Reads every `parts`-th file of the folder, from the `part`-th on, and holds it against the manifest.

    Raises:
        ValueError: what is damaged or missing, by its name.
        OSError: a file cannot be read: what it holds is not known.
    """
    files = _files_of_manifest(path)
    for extra in sorted(file.name for file in path.glob("*.safetensors") if file.name not in files):
        raise ValueError(f"it is damaged: {extra} is none of its files by {MANIFEST}")
    with ThreadPoolExecutor(_READERS) as readers:
        for name, fault in readers.map(lambda entry: _fault(path, *entry), sorted(files.items())[part::parts]):
            if fault is not None:
                raise ValueError(f"it is damaged: {name} {fault}")


def _files_of_manifest(path: Path) -> dict[str, tuple[int, str]]:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"it has the format {manifest['format']}, and this version reads {FORMAT}")
        if path.name.removeprefix("step_").isdigit() and manifest["step"] != int(path.name.removeprefix("step_")):
            raise ValueError(f"it is damaged: its {MANIFEST} is that of step {manifest['step']}")
        files = {Path(name).name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if files.keys() != manifest["files"].keys() or STATE not in files:
            raise KeyError(STATE)
    except FileNotFoundError as error:
        raise ValueError(f"it has no {MANIFEST}: it was not written to its end") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is damaged: its {MANIFEST} is none") from error
    return files


def _fault(path: Path, name: str, expected: tuple[int, str]) -> tuple[str, str | None]:
    file, (size, sha256) = path / name, expected
    try:
        found = _described(file)
    except FileNotFoundError:
        return name, "is missing"
    if found["size"] != size:
        return name, f"has {found['size']} bytes, not {size}"
    if found["sha256"] != sha256:
        return name, "has another checksum"
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError:
            return name, "is no file of safetensors"
    return name, None


def read_state(path: Path) -> dict:
    """What `state.json` holds, after `check`; keys that are whole numbers come back as such. ValueError: it is none."""

    def with_numbers(pairs: dict) -> dict:
        return {int(key): value for key, value in pairs.items()} if pairs and all(map(str.isdecimal, pairs)) else pairs

    try:
        state = json.loads((path / STATE).read_text(), object_hook=with_numbers)
    except ValueError as error:
        raise ValueError(f"it is damaged: its {STATE} is none") from error
    if not isinstance(state, dict):
        raise ValueError(f"it is damaged: its {STATE} is none")
    return state


def read_tensors(path: Path, prefix: str | tuple[str, ...] = "") -> dict[str, Tensor]:
    """The tensors of these names, whole, on the CPU, after `check`."""
    reader = dcp.HuggingFaceStorageReader(str(path))
    saved = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(x.size, dtype=x.properties.dtype) for name, x in saved.items() if name.startswith(prefix)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def check_fit(saved: Mapping[str, Shape], ours: Mapping[str, Shape]) -> None:
    """Raises ValueError where names, shapes or types of what was saved are not ours."""
    for name in sorted(saved.keys() ^ ours.keys()):
        raise ValueError(f"{name} is {'in the model' if name in ours else 'in the checkpoint'} alone")
    for name, expected in ours.items():
        if saved[name] != expected:
            (shape, dtype), (old_shape, old_dtype) = expected, saved[name]
            raise ValueError(f"{name} is {tuple(shape)} {dtype}, and saved is {tuple(old_shape)} {old_dtype}")


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def saved_shapes(path: Path) -> dict[str, Shape]:
    saved = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: (x.size, x.properties.dtype) for name, x in saved.items()}


@torch.no_grad()
def load_into(path: Path, tensors: dict[str, Tensor], *, alone: bool) -> None:
    """Reads into these tensors, after `check`: of sharded ones each rank the slices that it holds now.

    Unless `alone`, all ranks call it. Raises OSError, on all of them, where the files cannot be read after all.
    """
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=alone)
    except dcp.CheckpointException as error:
        raise OSError(f"{path} could not be read: {_reason(error, of_many=not alone)}") from error
