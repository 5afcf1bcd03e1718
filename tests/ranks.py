"""Processes that stand for the ranks of a run."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tiny_runs import free_port

from capi.train import main

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


def train_ranks(folder: Path, arguments: Sequence[list[str]]) -> list[tuple[int, str]]:
    """Status and stderr of `python -m capi.train` as each rank, with its own arguments, in `folder`/node0, node1 ..."""
    folders = [folder / f"node{rank}" for rank in range(len(arguments))]
    world = {"LOCAL_RANK": "0", "WORLD_SIZE": str(len(folders)), "MASTER_ADDR": "127.0.0.1"}
    world["MASTER_PORT"] = str(free_port())
    processes = []
    for rank, of_rank in enumerate(folders):
        of_rank.mkdir(exist_ok=True)
        how = of_rank, arguments[rank], world | {"RANK": str(rank)}
        processes.append(multiprocessing.get_context("forkserver").Process(target=_train, args=how))
        processes[-1].start()
    deadline = time.monotonic() + LONG
    try:
        for process in processes:
            process.join(deadline - time.monotonic())
            assert process.exitcode is not None, "the ranks do not come to an end"
    finally:
        for process in processes:
            process.kill()
    errors = [(of_rank / "stderr").read_text() for of_rank in folders]
    return list(zip([process.exitcode for process in processes], errors, strict=True))


def _train(folder: Path, arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    with Path("stderr").open("w", buffering=1) as sys.stderr:
        status = main(arguments)
    sys.exit(status)
