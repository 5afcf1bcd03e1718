"""Processes that stand for the ranks of a run."""

import multiprocessing
import time
from collections.abc import Callable

import torch

LONG = 240.0  # Seconds in which any ranks here have ended, on the busiest machine.

# What they need is imported once, by the server that forks them, which has no threads: a spawned process takes seconds.
multiprocessing.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.checkpoint.state_dict", "capi.train", "tiny_runs"]
)


def run_ranks(function: Callable[..., None], arguments: tuple, n: int) -> None:
    """Calls function(rank, *arguments) in n processes; raises what one of them raises."""
    ranks = torch.multiprocessing.start_processes(function, arguments, n, join=False, start_method="forkserver")
    deadline = time.monotonic() + LONG
    try:
        while not ranks.join(timeout=1):  # Raises what a rank does.
            assert time.monotonic() < deadline, "the ranks do not come to an end"
    finally:
        for process in ranks.processes:
            process.kill()
