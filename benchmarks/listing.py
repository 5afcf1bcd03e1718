"""A folder of millions of images: how long a run takes to list it, and what the listing weighs in every process.

python -m benchmarks.listing > benchmarks/results/cpu_listing.md

The names of ten million images come from a generator in the place of the file system's, for the time and the memory of
the listing itself; a tree of empty files says what reading folders and sizes takes beside it, of a disk's cache.
"""

import argparse
import gc
import multiprocessing
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from unittest.mock import patch

import torch
from torch.utils.data import DataLoader, IterableDataset

from capi.data import folder
from capi.data.folder import ImageFolder

NAMES_TO_READ = 20_000
PER_FOLDER = 1000


def names(count: int) -> Iterator[bytes]:
    """As of the largest ImageNet: 32 bytes each."""
    for i in range(count):
        yield b"n%08d/n%08d_%07d.JPEG" % (i // PER_FOLDER, i // PER_FOLDER, i)


def memory(pid: int | str = "self") -> dict[str, int]:
    """Bytes of a process: its share of pages that several have (`Pss`), and those of its own (`Private`)."""
    sizes = {"Pss": 0, "Private": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, _, rest = line.partition(":")
        if key == "Pss" or key.startswith("Private_"):
            sizes[key.partition("_")[0]] += int(rest.split()[0]) * 1024
    return sizes


class Names(IterableDataset):
    """Looks up names at random, as loader processes do, and yields how many it has seen and what it weighs."""

    def __init__(self, source: ImageFolder | None):
        self.source = source

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.source is not None:
            indices = random.Random(0).choices(range(len(self.source)), k=NAMES_TO_READ)
            assert all(self.source.name(i) for i in indices)
        while True:
            yield os.getpid(), os.getppid()


def loaders(source: ImageFolder | None, method: str, workers: int) -> tuple[float, list[dict[str, int]]]:
    """Seconds until all loader processes have answered, and the memory of the main process, then of each of them."""
    loader = DataLoader(Names(source), batch_size=None, num_workers=workers, multiprocessing_context=method)
    start = perf_counter()
    items = iter(loader)
    processes = {next(items)[0] for _ in range(workers)}
    seconds = perf_counter() - start
    sizes = [memory(), *map(memory, processes)]
    del items, loader
    gc.collect()
    return seconds, sizes


def make_tree(root: Path, count: int) -> None:
    """So many empty files."""
    for i, name in enumerate(names(count)):
        if i % PER_FOLDER == 0:
            (root / os.fsdecode(name)).parent.mkdir()
        os.close(os.open(root / os.fsdecode(name), os.O_CREAT | os.O_WRONLY))


def megabytes(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000_000, help="of the generated listing")
    parser.add_argument("--files", type=int, default=1_000_000, help="of the tree, as far as there are inodes")
    parser.add_argument("--workers", type=int, default=4)
    arguments = parser.parse_args()
    print("# A folder of ten million images\n")
    print(f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores, Python {sys.version.split()[0]}.")
    print(f"- PyTorch {torch.__version__}. Load average as it started: {os.getloadavg()[0]:.1f}.")
    print(f"- `{' '.join(['python -m benchmarks.listing', *sys.argv[1:]])}`\n")

    before = memory()
    start = perf_counter()
    n_bytes = sum(map(len, names(arguments.images)))
    generated = perf_counter() - start
    with patch.object(folder, "_image_names", lambda root: names(arguments.images)), tempfile.TemporaryDirectory() as d:
        start = perf_counter()
        source = ImageFolder(d)
        listed = perf_counter() - start - generated
    after = memory()
    print(f"## {arguments.images:,} names, generated\n")
    print(f"- Kept: {listed:.1f} s beyond the {generated:.1f} s that generating them takes.")
    print(f"- Names alone: {megabytes(n_bytes)}; the process grows by {megabytes(after['Pss'] - before['Pss'])}.")
    start = perf_counter()
    for index in random.Random(1).choices(range(len(source)), k=NAMES_TO_READ):
        source.name(index)
    print(f"- A name: {(perf_counter() - start) / NAMES_TO_READ * 1e6:.1f} us.\n")
    print(
        f"Loader processes, {arguments.workers}, each after {NAMES_TO_READ:,} names at random, and without a listing:\n"
    )
    print(
        "| started by | listing | seconds | main, share of pages | loader, share of pages | loader, pages of its own |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for method in ("fork", "forkserver", "spawn"):
        for listing in (None, source):
            seconds, (main_process, *others) = loaders(listing, method, arguments.workers)
            share, own = (max(sizes[key] for sizes in others) for key in ("Pss", "Private"))
            cells = (method, "-" if listing is None else "whole", f"{seconds:.1f} s", megabytes(main_process["Pss"]))
            print("|", " | ".join((*cells, megabytes(share), megabytes(own))), "|", flush=True)
    del source
    with tempfile.TemporaryDirectory() as d:
        make_tree(Path(d), arguments.files)
        start = perf_counter()
        tree = ImageFolder(d)
        listed = perf_counter() - start
        start = perf_counter()
        fingerprint = tree.fingerprint
        sizes = perf_counter() - start
    print(f"\n## {arguments.files:,} empty files\n")
    print(f"- Listed: {listed:.1f} s, {listed / arguments.files * 1e7:.0f} s for ten million.")
    print(f"- Sizes and fingerprint ({fingerprint.partition(',')[0]}): {sizes:.1f} s.")


if __name__ == "__main__":
    multiprocessing.set_start_method("fork", force=True)
    main()
