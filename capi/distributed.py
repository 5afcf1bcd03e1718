"""Processes of one run: one a GPU, started by torchrun, or a single one."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


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
    if "WORLD_SIZE" not in os.environ:
        yield World(0, 1, place)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), place)
        dist.barrier()  # a rank that leaves early would break the connections that others still read from
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Averages gradients over the ranks, in their own (fp32) precision."""
    if dist.is_initialized():
        for parameter in parameters:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


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
