"""Processes that stand for the ranks of a run."""

import time
from collections.abc import Callable

import torch

LONG = 240.0  # Seconds in which any ranks here have ended, on the busiest machine.


def run_ranks(function: Callable[..., None], arguments: tuple, n: int) -> None:
    """Calls function(rank, *arguments) in n processes; raises what one of them raises."""
    ranks = torch.multiprocessing.start_processes(function, arguments, n, join=False, start_method="spawn")
    deadline = time.monotonic() + LONG
    try:
        while not ranks.join(timeout=1):  # Raises what a rank does.
            assert time.monotonic() < deadline, "the ranks do not come to an end"
    finally:
        for process in ranks.processes:
            process.kill()
