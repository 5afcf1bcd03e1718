"""Tables and a roofline plot from raw benchmark files, and from nothing else.

    python benchmarks/report.py benchmarks/results/h200.json   # writes h200.md and, of a GPU, h200.png beside it
    python benchmarks/report.py --readme                       # rewrites README's performance section

The raw files of a machine are <name>.json and its parts <name>.<part>.json; where several hold one entry, the newest
stands. README takes the GPU measured last.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN = "<!-- performance: written by `python benchmarks/report.py --readme` -->"
END = "<!-- end of performance -->"
OURS = "ours"
UNMEASURED = "Speed on a GPU: not yet measured."

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

    @property
    def machine(self) -> dict:
        return self.runs[-1]["machine_info"]

    @property
    def ceilings(self) -> dict[str, float] | None:
        return next((e["ceilings"] for row in self.rows.values() for e in row.values() if e["ceilings"]), None)


def read(name: str, folder: Path = RESULTS) -> Results:
    """Reads <name>.json and <name>.<part>.json.

    Raises:
        FileNotFoundError: there are none.
    """
    paths = [path for path in folder.glob("*.json") if path.name.split(".")[0] == name]
    if not paths:
        raise FileNotFoundError(f"expected {folder / name}.json or {name}.<part>.json there, found none")
    runs = sorted((json.loads(path.read_text()) for path in paths), key=lambda run: run["datetime"])
    rows: dict[Row, dict[str, dict]] = defaultdict(dict)
    absent: dict[tuple[Row, str], dict] = {}
    for run in runs:
        for entry in run.get("absent", []):
            absent[_row(entry), entry["implementation"]] = entry
        for benchmark in run["benchmarks"]:
            entry = benchmark["extra_info"]
            row, implementation = _row(entry), entry["implementation"]
            stats = benchmark["stats"]
            # Others may use a CPU too: the least disturbed round says most of it.
            seconds = stats["median" if run["machine_info"]["gpu"] else "min"]
            if "images_per_second" in entry:
                entry["images_per_second"] *= stats["median"] / seconds
            rows[row][implementation] = {**entry, "seconds": seconds}
            absent.pop((row, implementation), None)
    return Results(name, runs, dict(rows), list(absent.values()))


def _row(entry: dict) -> Row:
    return entry["op"], tuple(entry["shape"].items()), entry["direction"]


def best_peer(entries: dict[str, dict]) -> str | None:
    """The fastest other implementation."""
    return min((name for name in entries if name != OURS), key=lambda name: entries[name]["seconds"], default=None)


def duration(seconds: float) -> str:
    """With three significant digits."""
    for unit, scale in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale or unit == "us":
            return f"{_digits(seconds / scale)} {unit}"
    raise AssertionError


def _digits(value: float) -> str:
    """Three significant digits, more before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def _memory(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def _shape(shape: tuple[tuple[str, int | str], ...]) -> str:
    return ", ".join(f"{value} {axis}" if isinstance(value, int) else str(value) for axis, value in shape)


def _table(header: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines)]


def _peer_columns(entries: dict[str, dict]) -> list[str]:
    """How many times as fast as the best peer we are, and how much of its peak memory we take."""
    ours, peer = entries.get(OURS), best_peer(entries)
    if ours is None or peer is None:
        return ["", ""]
    memory, peer_memory = ours["peak_memory_bytes"], entries[peer]["peak_memory_bytes"]
    speed = f"{_times(entries[peer]['seconds'] / ours['seconds'])} ({peer})"
    return [speed, _times(memory / peer_memory) if memory is not None and peer_memory else ""]


def _share(entry: dict) -> str:
    return "" if entry["share_of_floor"] is None else f"{entry['share_of_floor']:.0%}"


def _rates(entry: dict) -> str:
    """What is known to move and be computed, by the second."""
    rates = []
    if entry["bytes"]:
        rates.append(f"{_digits(entry['bytes'] / entry['seconds'] / 1e9)} GB/s")
    if entry["flop"]:
        tera = entry["flop"] / entry["seconds"] / 1e12
        rates.append(f"{_digits(tera)} TFLOP/s" if tera >= 1 else f"{_digits(tera * 1e3)} GFLOP/s")
    return ", ".join(rates)


def _throughput(entry: dict) -> str:
    if "images_per_second" not in entry:
        return ""
    mfu = f", MFU {entry['mfu']:.1%}" if entry.get("mfu") else ""
    return f" ({_digits(entry['images_per_second'])} images/s{mfu})"


def markdown(results: Results) -> str:
    """The report: where the figures come from, a table for each operation, and what is absent."""
    machine, ceilings = results.machine, results.ceilings
    lines = [f"# {machine['gpu'] or 'CPU'}", ""]
    software = f"PyTorch {machine['torch']}, Triton {machine['triton']}"
    if machine["gpu"]:
        lines.append(f"- Driver {machine['driver']}, CUDA {machine['cuda']}, {software}.")
    else:
        lines.append(f"- {machine['cpu']['brand_raw']}, {machine['threads']} threads, {software}.")
    for run in results.runs:
        commit = run["commit_info"]
        dirty = " with uncommitted changes" if commit.get("dirty") else ""
        date = run["datetime"][:16].replace("T", " ")
        lines.append(f"- Measured {date} at commit {commit['id'][:10]}{dirty} by `{run['machine_info']['command']}`.")
    if ceilings:
        lines.append(
            f"- Ceilings of that run: copy {ceilings['copy_gb_per_second']:.0f} GB/s, reads and writes counted; bf16 "
            f"matrix product {ceilings['matmul_tflop_per_second']:.0f} TFLOP/s. Floor: what must move and be computed, "
            f"at these ceilings (`benchmarks/costs.py`)."
        )
    times = "Medians" if machine["gpu"] else "Fastest of at least three rounds that alternate between implementations"
    lines.append(f"- {times}; peak memory beyond what was there before the call, of training steps on a GPU in all.")
    if ceilings:
        lines += ["", f"![roofline]({results.name}.png)"]
    for op in dict.fromkeys(op for op, _, _ in results.rows):
        lines += ["", f"## {op}", "", *_operation_table(op, results)]
    if results.absent:
        lines += ["", "## Absent", ""]
        where = defaultdict(list)
        for entry in results.absent:
            where[entry["implementation"], entry["reason"]].append(f"{entry['op']} {_shape(_row(entry)[1])}")
        lines += [f"- {name}, {'; '.join(dict.fromkeys(at))}: {reason}" for (name, reason), at in where.items()]
    sources = {
        entry["source"]: None
        for row in results.rows.values()
        for name, entry in row.items()
        if name != OURS and entry.get("source")
    }
    if sources:
        lines += ["", f"Peers of whole steps and of data loading: {'; '.join(sources)}."]
    return "\n".join(lines) + "\n"


def _operation_table(op: str, results: Results) -> list[str]:
    rows = {row: entries for row, entries in results.rows.items() if row[0] == op}
    peers = [name for name in dict.fromkeys(name for row in rows.values() for name in row) if name != OURS]
    lines = []
    for (_, shape, direction), entries in rows.items():
        times = [
            duration(entries[name]["seconds"]) + _throughput(entries[name]) if name in entries else "absent"
            for name in (OURS, *peers)
        ]
        ours = entries.get(OURS)
        own = ["", "", ""]
        if ours is not None:
            own = [_rates(ours), _share(ours), _memory(ours["peak_memory_bytes"])]
        speed, saved = _peer_columns(entries)
        lines.append([_shape(shape), direction, *times, speed, *own, saved])
    header = ["shape", "direction", OURS, *peers, "faster than the best peer", "ours moves and computes"]
    return _table([*header, "share of floor", "peak memory", "of the best peer's"], lines)


def readme_section(folder: Path = RESULTS) -> str:
    """README's performance section: the first shape of each operation and every training step, of the newest GPU."""
    machines = [read(name, folder) for name in sorted({path.name.split(".")[0] for path in folder.glob("*.json")})]
    gpus = [results for results in machines if results.machine["gpu"]]
    cpu = "On a CPU: [benchmarks/results/cpu.md](benchmarks/results/cpu.md)."
    lines = [cpu] if any(results.name == "cpu" for results in machines) else []
    if not gpus:
        return "\n".join([UNMEASURED, *lines])
    results = max(gpus, key=lambda results: results.runs[-1]["datetime"])
    first = {op: shape for op, shape, _ in reversed(results.rows)}
    table = []
    for (op, shape, direction), entries in results.rows.items():
        ours = entries.get(OURS)
        if ours is not None and (op == "train_step" or shape == first[op]):
            speed, memory = _peer_columns(entries)
            time = duration(ours["seconds"]) + _throughput(ours)
            table.append([op, _shape(shape), direction, time, speed, _share(ours), memory])
    header = ["operation", "shape", "direction", "ours", "faster than the best peer", "share of floor", "peak memory"]
    intro = (
        f"On one {results.machine['gpu']}, {results.runs[-1]['datetime'][:10]} (`make gpu`); all shapes and peers: "
        f"[benchmarks/results/{results.name}.md](benchmarks/results/{results.name}.md). Floor: what must move and be "
        "computed, at the bandwidth and matrix product measured in that run; peak memory relative to the best peer's."
    )
    return "\n".join([intro, "", *_table(header, table), "", *lines])


def write_readme(readme: Path = README, folder: Path = RESULTS) -> None:
    """Puts the performance section between its markers."""
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(f"{before}{BEGIN}\n\n{readme_section(folder)}\n\n{END}{after}")


def plot_roofline(results: Results, path: Path) -> None:
    """Achieved TFLOP/s over FLOP a byte, ours and the best peer's, under the two measured ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ceilings = results.ceilings
    bandwidth, peak = ceilings["copy_gb_per_second"] / 1e3, ceilings["matmul_tflop_per_second"]
    figure, axes = plt.subplots(figsize=(10, 6.5), constrained_layout=True)
    rows = [
        (row, entries)
        for row, entries in results.rows.items()
        if OURS in entries and entries[OURS]["bytes"] and entries[OURS]["flop"]
    ]
    operations = list(dict.fromkeys(row[0] for row, _ in rows))
    intensities = [entries[OURS]["flop"] / entries[OURS]["bytes"] for _, entries in rows]
    low, high = min(intensities) / 2, max([*intensities, peak / bandwidth]) * 2
    ridge = peak / bandwidth
    axes.plot([low, ridge, high], [low * bandwidth, peak, peak], color="black", linewidth=1.5, zorder=1)
    for (row, entries), intensity in zip(rows, intensities, strict=True):
        colour = f"C{operations.index(row[0])}"
        ours, peer = entries[OURS], best_peer(entries)
        achieved = ours["flop"] / ours["seconds"] / 1e12
        axes.scatter(intensity, achieved, s=60, color=colour, marker="v" if row[2] == "backward" else "o", zorder=3)
        if peer is not None:
            other = ours["flop"] / entries[peer]["seconds"] / 1e12
            axes.plot([intensity, intensity], [other, achieved], color=colour, linewidth=0.8, zorder=2)
            axes.scatter(intensity, other, s=40, facecolors="white", edgecolors=colour, zorder=3)
    for i, op in enumerate(operations):
        axes.scatter([], [], s=60, color=f"C{i}", label=op)
    axes.scatter([], [], s=60, color="grey", marker="v", label="backward")
    axes.scatter([], [], s=40, facecolors="white", edgecolors="grey", label="best peer")
    axes.plot([], [], color="black", label=f"copy {bandwidth * 1e3:.0f} GB/s, matrix product {peak:.0f} TFLOP/s")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="achieved TFLOP/s")
    axes.set_xlim(low, high)
    axes.set_title(results.machine["gpu"])
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw", nargs="*", type=Path, help="raw files; the parts of a machine are read together")
    parser.add_argument("--readme", action="store_true", help="rewrite README's performance section")
    arguments = parser.parse_args(argv)
    if not arguments.raw and not arguments.readme:
        parser.error("expected raw files, or --readme")
    for folder, name in dict.fromkeys((path.parent, path.name.split(".")[0]) for path in arguments.raw):
        results = read(name, folder)
        (folder / f"{name}.md").write_text(markdown(results))
        if results.ceilings:
            plot_roofline(results, folder / f"{name}.png")
    if arguments.readme:
        write_readme()


if __name__ == "__main__":
    main()
