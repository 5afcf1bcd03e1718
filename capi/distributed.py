"""Processes of one run: one a GPU, started by torchrun or by Slurm, or a single one."""

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor, nn

from capi.config import Config

CONNECT_SECONDS = 3.0
ALONE_SECONDS = 1200.0  # In which a rank may list files, evaluate or write what the others wait for.


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = None
    """A connection, for one thread, to where the processes met; None for one alone."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def is_sharded(config: Config, world: World) -> bool:
    """Whether each rank keeps a part of the weights; a process alone keeps the whole."""
    return config.distributed.shard == "full" and world.size > 1


@dataclass(frozen=True)
class _Place:
    """What the environment says of this process, and where to meet the others."""

    rank: int
    size: int
    local_rank: int
    meeting: str


@contextmanager
def join_world(device: str, timeout: float) -> Iterator[World]:
    """Joins the processes that the environment of torchrun or of a Slurm step names, and leaves them at the end.

    Without either, or in a step of one task, this process is a world of one. A collective fails in which a rank is
    waited for more than `timeout` seconds, and those that one may take alone.

    Raises:
        ValueError: `device` is "cuda" and there is no GPU for this process, or another launcher started several.
        OSError: the processes do not find each other.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device is cuda, but PyTorch sees no GPU; expected a GPU, or run.device auto or cpu")
    use_gpu = device != "cpu" and torch.cuda.is_available()
    here = _launched(os.environ)
    place = torch.device("cuda", here.local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(place)
    if here.size == 1:  # A group of one would only make the work that of many.
        yield World(0, 1, place)
        return
    backend = "cpu:gloo,cuda:nccl" if use_gpu else "gloo"
    try:
        patience = timedelta(seconds=timeout + ALONE_SECONDS)
        kept = _meet(here, os.environ, patience)
        of_group = dist.PrefixStore("group", kept)
        dist.init_process_group(backend, timeout=patience, store=of_group, rank=here.rank, world_size=here.size)
        store = dist.TCPStore(kept.host, kept.port, timeout=patience, wait_for_workers=False)
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        raise OSError(f"process {here.rank} of {here.size} does not find the others: {reason}") from error
    try:
        yield World(here.rank, here.size, place, store)
        dist.barrier()  # a rank that leaves early would break the connections that others still read from
    finally:
        leave_group()


_LEFT: list[dist.ProcessGroup] = []


def leave_group() -> None:
    """Destroys the groups of this process; the object of the default one lives until the process ends.

    DDP holds it as well, and lets go of it with the GIL held: a last hold waits for gloo's threads, which may need the
    GIL to let go of a tensor, and the process never ends.
    """
    _LEFT.append(dist.group.WORLD)
    dist.destroy_process_group()


def _launched(environment: Mapping[str, str]) -> _Place:
    """Where torchrun or Slurm has put this process; the only one where neither has."""
    if "WORLD_SIZE" in environment:
        size = int(environment["WORLD_SIZE"])
        if size > 1 and "RANK" not in environment:
            raise ValueError(f"WORLD_SIZE is {size} and RANK is not set; expected both, as torchrun sets them")
        return _Place(int(environment.get("RANK", 0)), size, int(environment.get("LOCAL_RANK", 0)), "env://")
    # SLURM_NTASKS is there in the shell of an allocation as well, which is no task of it.
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _slurm_task(environment)
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if int(environment.get(name, 1)) > 1:
            raise ValueError(
                f"started as one of several processes ({name} is {environment[name]}), each of which would train the "
                "same run; expected torchrun or srun"
            )
    return _Place(0, 1, 0, "")


def _meet(here: _Place, environment: Mapping[str, str], patience: timedelta) -> dist.TCPStore:
    """A store that rank 0 keeps, and that is new with every start."""
    if here.meeting == "env://":
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]:
            raise ValueError(f"WORLD_SIZE is {here.size} and {missing[0]} is not set; expected it, as torchrun sets it")
        host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    else:
        url = urlsplit(here.meeting)
        host, port = url.hostname, url.port
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(host, port, here.size, here.rank == 0, patience)
    # That of torchrun outlives a restart, after which ranks would find the addresses of processes that are gone.
    lasting = dist.PrefixStore("capi", dist.TCPStore(host, port, timeout=patience, wait_for_workers=False))
    if here.rank == 0:
        kept = dist.TCPStore(host, 0, here.size, True, patience, wait_for_workers=False)
        lasting.set("port", str(kept.port))
        return kept
    deadline = time.monotonic() + patience.total_seconds()
    while True:
        try:
            port = int(lasting.get("port"))
            store = dist.TCPStore(host, port, timeout=timedelta(seconds=CONNECT_SECONDS), wait_for_workers=False)
            store.set_timeout(patience)
            return store
        except dist.DistError:
            if time.monotonic() > deadline:
                raise


def _slurm_task(environment: Mapping[str, str]) -> _Place:
    host = environment.get("MASTER_ADDR") or _first_host(environment["SLURM_STEP_NODELIST"])
    # The same for all tasks of a step, and another for the next one, which may run beside it.
    number = 13 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    port = environment.get("MASTER_PORT") or 15000 + number % 16384
    local_rank = int(environment["SLURM_LOCALID"])
    if torch.cuda.device_count() == 1:  # Slurm may show every task a GPU of its own.
        local_rank = 0
    size = int(environment["SLURM_STEP_NUM_TASKS"])
    return _Place(int(environment["SLURM_PROCID"]), size, local_rank, f"tcp://{host}:{port}")


def _first_host(hosts: str) -> str:
    """Of a list as Slurm writes it: node003 of `node[003-006,9],other`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)[0]
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)


class GradientAverage:
    """The mean over the ranks of these parameters' gradients, in their own (fp32) precision, on its way until `wait`.

    Alone, gradients stay as they are.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self._parameters = list(parameters)
        self._work = None
        if dist.is_initialized():
            self._all = torch.cat([parameter.grad.flatten() for parameter in self._parameters])
            self._work = dist.all_reduce(self._all, async_op=True)

    def wait(self) -> None:
        """Gives the parameters the mean. On a GPU the device waits, not the host."""
        if self._work is None:
            return
        self._work.wait()
        means = (self._all / dist.get_world_size()).split([parameter.numel() for parameter in self._parameters])
        for parameter, mean in zip(self._parameters, means, strict=True):
            parameter.grad = mean.view_as(parameter)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def average(value: Tensor) -> Tensor:
    """The mean of a tensor over the ranks."""
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def mean_over_ranks(count: int, differ: bool) -> float:
    """The mean of a number that the host knows; without talking to the others where it does not `differ`."""
    if not (differ and dist.is_initialized()):
        return float(count)
    value = torch.tensor(count, dtype=torch.float64)
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()


def largest(number: int) -> int:
    """Of any rank; over the host's network, so that no GPU is waited for."""
    if not dist.is_initialized():
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def gather(value: object) -> list:
    """Every rank's object, in rank order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_columns(x: Shaped[Tensor, "rows columns"]) -> Shaped[Tensor, "rows all_columns"] | None:
    """The columns of all ranks, as many or as few as each has, in rank order: on rank 0; None on the others."""
    if not dist.is_initialized():
        return x
    counts = gather(x.shape[1])
    padded = F.pad(x, (0, max(counts) - x.shape[1]))
    parts = [torch.empty_like(padded) for _ in counts] if dist.get_rank() == 0 else None
    dist.gather(padded, parts)
    return None if parts is None else torch.cat([part[:, :n] for part, n in zip(parts, counts, strict=True)], dim=1)
