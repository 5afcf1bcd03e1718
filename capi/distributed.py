"""Processes of one run: one a GPU, started by torchrun, or a single one."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Joins the processes that torchrun's environment names (without it, a world of one), and leaves them at the end.

    Raises:
        ValueError: `device` is "cuda" and there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device is cuda, but PyTorch sees no GPU; expected a GPU, or run.device auto or cpu")
    use_gpu = device != "cpu" and torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    place = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(place)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # A group of one would only make the work that of many.
        yield World(0, 1, place)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), place)
        dist.barrier()  # a rank that leaves early would break the connections that others still read from
    finally:
        dist.destroy_process_group()


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


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; over the host's network, so that no GPU is waited for."""
    if not dist.is_initialized():
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value)


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
