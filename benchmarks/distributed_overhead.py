"""What it costs on a CPU that processes train together, at equal work on the same two cores, as Markdown.

python -m benchmarks.distributed_overhead > benchmarks/results/cpu_distributed.md

Three arrangements take the same images a step: one process of two threads; two processes of one thread that train
together over gloo; two that train apart, each on its half alone. Together over apart is what communicating costs,
together over one process what dividing a batch among processes costs against dividing it among threads.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
import torch.distributed as dist

from benchmarks.train_step import configuration, draw_batch
from capi.distributed import World, leave_group
from capi.step import Trainer

CPU = torch.device("cpu")
ANSWER_SECONDS = 600.0


class Arrangement(NamedTuple):
    name: str
    processes: int
    threads: int
    """Of each process."""
    together: bool


ARRANGEMENTS = (
    Arrangement("one process", 1, 2, together=False),
    Arrangement("apart", 2, 1, together=False),
    Arrangement("together", 2, 1, together=True),
)


def _work(pipe: Connection, arrangement: Arrangement, rank: int, preset: str, batch: int, store: str) -> None:
    """Trains as many steps as it is told to, again and again, and answers when it is done; None ends it."""
    torch.set_num_threads(arrangement.threads)
    share, size = batch // arrangement.processes, 1
    if arrangement.together:
        size = arrangement.processes
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    trainer = Trainer(
        configuration(preset, share * size, CPU, torch.float32), World(rank if size > 1 else 0, size, CPU)
    )
    images = draw_batch(configuration(preset, share, CPU, torch.float32), rank, CPU)
    step = 0
    while (steps := pipe.recv()) is not None:
        for _ in range(steps):
            trainer.step([images], step)
            step += 1
        pipe.send(step)
    if dist.is_initialized():
        leave_group()


@contextmanager
def started(arrangement: Arrangement, preset: str, batch: int) -> Iterator[list[Connection]]:
    """The pipes of an arrangement's processes, which have trained two steps already."""
    context, processes, pipes = multiprocessing.get_context("spawn"), [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(arrangement.processes):
                ours, theirs = context.Pipe()
                arguments = (theirs, arrangement, rank, preset, batch, str(Path(folder) / "store"))
                processes.append(context.Process(target=_work, args=arguments, daemon=True))
                processes[-1].start()
                theirs.close()
                pipes.append(ours)
            train(pipes, 2)
            yield pipes
            for pipe in pipes:
                pipe.send(None)
            for process in processes:
                process.join(10)
        finally:
            for process in processes:
                process.kill()


def train(pipes: Sequence[Connection], steps: int) -> float:
    """Seconds of so many steps of all processes of an arrangement."""
    start = perf_counter()
    for pipe in pipes:
        pipe.send(steps)
    for pipe in pipes:
        if not pipe.poll(ANSWER_SECONDS):
            raise TimeoutError(f"a process did not train {steps} steps in {ANSWER_SECONDS:.0f} s")
        pipe.recv()
    return perf_counter() - start


def compare(preset: str, batch: int, rounds: int, steps: int) -> dict[str, float]:
    """Median seconds of a step of each arrangement, over rounds in which they take turns; those that wait sleep."""
    one, apart, together = ARRANGEMENTS
    taken: dict[str, list[float]] = {arrangement.name: [] for arrangement in ARRANGEMENTS}
    with started(one, preset, batch) as a, started(apart, preset, batch) as b, started(together, preset, batch) as c:
        for _ in range(rounds):
            for arrangement, pipes in zip(ARRANGEMENTS, (a, b, c), strict=True):
                taken[arrangement.name].append(train(pipes, steps) / steps)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["tiny:192", "vits14:16"], help="PRESET:IMAGES, of a step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="of a round")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    print("# Processes that train together, on a CPU\n")
    print(f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores, PyTorch {torch.__version__}, float32.")
    print(f"- Load average as it started: {load:.1f}.")
    print(
        f"- `{' '.join(['python -m benchmarks.distributed_overhead', *sys.argv[1:]])}`; medians of {arguments.rounds}"
    )
    print(
        f"  rounds of {arguments.steps} steps in which the arrangements take turns. All take as many images a step.\n"
    )
    print("| step | one process, 2 threads | 2 apart | 2 together | together / apart | together / one process |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for case in arguments.cases:
        preset, _, batch = case.partition(":")
        taken = compare(preset, int(batch), arguments.rounds, arguments.steps)
        one, apart, together = (taken[arrangement.name] for arrangement in ARRANGEMENTS)
        times = " | ".join(f"{seconds * 1e3:.0f} ms" for seconds in (one, apart, together))
        ratios = f"{together / apart:.2f} | {together / one:.2f}"
        print(f"| {preset}, {batch} images | {times} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
