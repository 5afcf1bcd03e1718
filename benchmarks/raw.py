"""The raw benchmark files of a machine, read together.

They are <name>.json and its parts <name>.<part>.json; where several hold one entry, the newest stands. What is known to
be wrong in them stands in <name>.notes.md.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "ours"

Row = tuple[str, tuple[tuple[str, int | str], ...], str]  # operation, shape, direction


@dataclass
class Results:
    """Everything that the raw files of one machine say."""

    name: str
    runs: list[dict]
    """The raw files, oldest first."""
    rows: dict[Row, dict[str, dict]]
    """By row and implementation: `extra_info`, with the median, of a CPU the fastest round, as `seconds`."""
    absent: list[dict]
    failed: list[dict]
    unreadable: list[str]
    """Names of raw files that hold nothing: their run was cut off."""
    notes: str

    @property
    def machine(self) -> dict:
        return self.runs[-1]["machine_info"]

    @property
    def ceilings(self) -> list[tuple[float, float]]:
        """Copy GB/s, by the size of the buffers, and matrix product TFLOP/s; none of a CPU."""
        entries = [entry["ceilings"] for row in self.rows.values() for entry in row.values() if entry["ceilings"]]
        return [(entry["copy_gb_per_second"], entry["matmul_tflop_per_second"]) for entry in entries]


def read(name: str, folder: Path = RESULTS) -> Results:
    """Reads <name>.json and <name>.<part>.json.

    Raises:
        FileNotFoundError: there are none, or none that holds anything.
    """
    runs, unreadable = [], []
    for path in sorted(path for path in folder.glob("*.json") if path.name.split(".")[0] == name):
        try:
            runs.append(json.loads(path.read_text()))
        except json.JSONDecodeError:
            unreadable.append(path.name)
    if not runs:
        raise FileNotFoundError(f"expected {folder / name}.json or {name}.<part>.json there, found none that is whole")
    runs.sort(key=lambda run: run["datetime"])
    rows: dict[Row, dict[str, dict]] = defaultdict(dict)
    absent: dict[tuple[Row, str], dict] = {}
    failed: dict[tuple[Row, str], dict] = {}
    for run in runs:
        for entry in run.get("absent", []):
            absent[row_of(entry), entry["implementation"]] = entry
        for entry in run.get("failed", []):
            key = row_of(entry), entry["implementation"]
            failed[key] = entry
            absent.pop(key, None)
            rows[key[0]].pop(key[1], None)
        for benchmark in run["benchmarks"]:
            entry = benchmark["extra_info"]
            row, implementation = row_of(entry), entry["implementation"]
            stats = benchmark["stats"]
            # Others may use a CPU too: the least disturbed round says most of it.
            seconds = stats["median" if run["machine_info"]["gpu"] else "min"]
            if "images_per_second" in entry:
                entry["images_per_second"] *= stats["median"] / seconds
            rows[row][implementation] = {**entry, "seconds": seconds}
            absent.pop((row, implementation), None)
            failed.pop((row, implementation), None)
    operations = list(dict.fromkeys(op for op, _, _ in rows))
    rows = dict(sorted(rows.items(), key=lambda item: operations.index(item[0][0])))
    path = folder / f"{name}.notes.md"
    notes = path.read_text().strip() if path.exists() else ""
    return Results(name, runs, rows, list(absent.values()), list(failed.values()), unreadable, notes)


def row_of(entry: dict) -> Row:
    """The row of the tables that a raw entry belongs to."""
    shape = {**entry["shape"], "dim": entry["dim"]} if "dim" in entry else entry["shape"]
    return entry["op"], tuple(shape.items()), entry["direction"]


def best_peer(entries: dict[str, dict]) -> str | None:
    """The fastest other implementation."""
    return min((name for name in entries if name != OURS), key=lambda name: entries[name]["seconds"], default=None)
