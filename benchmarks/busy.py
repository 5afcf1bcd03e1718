"""The CPU's Sinkhorn against the official formula, alone and beside processes that keep cores busy, as Markdown.

PYTHONPATH=tests python -m benchmarks.busy > benchmarks/results/cpu_busy.md
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from os import cpu_count, getloadavg
from time import perf_counter

import torch

from benchmarks import shapes
from benchmarks.heads import enter_sinkhorn
from benchmarks.measure import OURS

CPU = torch.device("cpu")
PEER = "official_eager"


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def medians(shape: shapes.Logits, rounds: int) -> dict[str, float]:
    """Seconds of a call, of rounds that alternate between the implementations."""
    entrants = {name: enter_sinkhorn(name, shape, CPU, torch.float32) for name in (OURS, PEER)}
    seconds: dict[str, list[float]] = {name: [] for name in entrants}
    for round_number in range(rounds):
        for name, contestant in entrants.items():
            operands = contestant.operands(round_number)
            start = perf_counter()
            contestant.run(*operands)
            seconds[name].append(perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of PyTorch")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="processes beside it")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print("# Sinkhorn on a CPU beside busy processes\n")
    command = " ".join(["PYTHONPATH=tests python -m benchmarks.busy", *sys.argv[1:]])
    print(f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {cpu_count()} cores, PyTorch {torch.__version__}.")
    print(f"- Load average as it started: {getloadavg()[0]:.1f}.")
    print(f"- `{command}`; medians of {arguments.rounds} rounds that alternate.")
    print("- positions x images x prototypes, float32.\n")
    print("| shape | threads | busy processes | ours | official | speed against the official |")
    print("| --- | --- | --- | --- | --- | --- |")
    for shape in shapes.SINKHORN:
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for count in arguments.busy:
                with busy_processes(count):
                    taken = medians(shape, arguments.rounds)
                ours, theirs = taken[OURS], taken[PEER]
                sizes = shapes.name((shape.positions, shape.images, shape.prototypes))
                columns = (
                    sizes,
                    threads,
                    count,
                    f"{ours * 1e3:.1f} ms",
                    f"{theirs * 1e3:.1f} ms",
                    f"{theirs / ours:.2f}x",
                )
                print("|", " | ".join(map(str, columns)), "|", flush=True)


if __name__ == "__main__":
    main()
