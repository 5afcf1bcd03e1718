"""Tables and a roofline plot from raw benchmark files, and from nothing else.

    python -m benchmarks.report benchmarks/results/h200.json   # writes h200.md and, of a GPU, h200.png beside it
    python -m benchmarks.report --readme                       # rewrites README's performance section

README takes the GPU measured last, and the first paragraph of its notes.
"""

import argparse
from collections import defaultdict
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from benchmarks.raw import OURS, RESULTS, Results, best_peer, read, row_of

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- performance: written by `python -m benchmarks.report --readme` -->"
END = "<!-- end of performance -->"
UNMEASURED = "Speed on a GPU: not yet measured."


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


def speed(ratio: float) -> str:
    """How many times as fast: below 1, as it is shown, "slower"."""
    text = f"{ratio:.2f}x"
    return f"{text}: slower" if float(text[:-1]) < 1 else text


def _shape(shape: tuple[tuple[str, int | str], ...]) -> str:
    return ", ".join(f"{value} {axis}" if isinstance(value, int) else str(value) for axis, value in shape)


def _table(header: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines)]


def _ratio(entries: dict[str, dict]) -> float | None:
    """The best peer's time over ours."""
    peer = best_peer(entries)
    return entries[peer]["seconds"] / entries[OURS]["seconds"] if peer is not None and OURS in entries else None


def _peer_columns(entries: dict[str, dict]) -> list[str]:
    """How many times as fast as the best peer we are, and how much of its peak memory we take."""
    ratio, peer = _ratio(entries), best_peer(entries)
    if ratio is None:
        return ["", ""]
    memory, peer_memory = entries[OURS]["peak_memory_bytes"], entries[peer]["peak_memory_bytes"]
    return [f"{speed(ratio)} ({peer})", f"{memory / peer_memory:.2f}x" if memory is not None and peer_memory else ""]


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
    """Of a step or of loading: images, and where they were looked at the idle GPU and the breaks of the graph."""
    parts = []
    if "images_per_second" in entry:
        parts.append(f"{_digits(entry['images_per_second'])} images/s")
        if entry.get("mfu"):
            parts[-1] += f", MFU {entry['mfu']:.1%}"
        if entry.get("gpu_idle_share") is not None:
            parts.append(f"GPU idle {entry['gpu_idle_share']:.0%}, {entry['launches']} launches")
    if entry.get("graph_breaks"):
        parts.append(f"{entry['graph_breaks']} graph breaks")
    return f" ({'; '.join(parts)})" if parts else ""


def _host(entry: dict) -> str:
    return "" if entry.get("host_seconds") is None else duration(entry["host_seconds"])


def _provenance(results: Results) -> list[str]:
    machine, ceilings = results.machine, results.ceilings
    software = f"PyTorch {machine['torch']}, Triton {machine['triton']}"
    if machine["gpu"]:
        if machine.get("cudnn"):
            software = f"cuDNN {machine['cudnn']}, {software}"
        lines = [f"- Driver {machine['driver']}, CUDA {machine['cuda']}, {software}."]
    else:
        lines = [f"- {machine['cpu']['brand_raw']}, {machine['threads']} threads, {software}."]
    for run in results.runs:
        commit = run["commit_info"]
        dirty = " with uncommitted changes" if commit.get("dirty") else ""
        date = run["datetime"][:16].replace("T", " ")
        at = f"commit {commit['id'][:10]}{dirty}" if commit.get("id") else "an unknown commit"
        lines.append(f"- Measured {date} at {at} by `{run['machine_info']['command']}`.")
    if results.unreadable:
        lines.append(f"- Cut off, and without a figure: {', '.join(results.unreadable)}.")
    if ceilings:
        copy, product = (
            " to ".join(dict.fromkeys(f"{find(values):.0f}" for find in (min, max)))
            for values in zip(*ceilings, strict=True)
        )
        lines.append(
            f"- Ceilings of that run: copy {copy} GB/s, reads and writes counted; bf16 matrix product {product} "
            f"TFLOP/s. Floor: what must move and be computed, at these ceilings (`benchmarks/costs.py`)."
        )
    times = "Medians" if machine["gpu"] else "Fastest of at least three rounds that alternate between implementations"
    lines.append(f"- {times}; peak memory beyond what was there before the call, of training steps on a GPU in all.")
    return lines


def markdown(results: Results) -> str:
    """The report: where the figures come from, a table for each operation, what failed and what is absent."""
    lines = [f"# {results.machine['gpu'] or 'CPU'}", "", *_provenance(results)]
    if results.notes:
        lines += ["", results.notes]
    if results.ceilings:
        lines += ["", f"![roofline]({results.name}.png)"]
    for op in dict.fromkeys(op for op, _, _ in results.rows):
        lines += ["", f"## {op}", "", *_operation_table(op, results)]
    for title, entries in (("Failed", results.failed), ("Absent", results.absent)):
        if entries:
            lines += ["", f"## {title}", ""]
            where = defaultdict(list)
            for entry in entries:
                where[entry["implementation"], entry["reason"]].append(f"{entry['op']} {_shape(row_of(entry)[1])}")
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
    failed = {(row_of(entry), entry["implementation"]) for entry in results.failed}
    names = [name for row in rows.values() for name in row] + [name for row, name in failed if row in rows]
    peers = [name for name in dict.fromkeys(names) if name != OURS]
    timed_on_host = any(_host(entries.get(OURS, {})) for entries in rows.values())
    lines = []
    for row, entries in rows.items():
        times = [
            duration(entries[name]["seconds"]) + _throughput(entries[name])
            if name in entries
            else "**failed**"
            if (row, name) in failed
            else "absent"
            for name in (OURS, *peers)
        ]
        ours = entries.get(OURS)
        own = ["", "", ""]
        if ours is not None:
            own = [_rates(ours), _share(ours), _memory(ours["peak_memory_bytes"])]
        ratio, saved = _peer_columns(entries)
        host = [_host(entries.get(OURS, {}))] * timed_on_host
        lines.append([_shape(row[1]), row[2], *times, ratio, *host, *own, saved])
    header = ["shape", "direction", OURS, *peers, "speed against the best peer"]
    header += ["ours on the host"] * timed_on_host
    return _table([*header, "ours moves and computes", "share of floor", "peak memory", "of the best peer's"], lines)


def losses(results: Results) -> list[str]:
    """Where the best peer is faster: an operation a line, the furthest behind first."""
    slower: dict[str, list[str]] = defaultdict(list)
    ratios = {row: ratio for row, entries in results.rows.items() if (ratio := _ratio(entries)) is not None}
    for row, ratio in sorted(ratios.items(), key=lambda item: item[1]):
        op, shape, direction = row
        if speed(ratio).endswith("slower"):
            sizes = " x ".join(str(size) for _, size in shape)
            slower[op].append(f"{sizes} {direction} {ratio:.2f}x ({best_peer(results.rows[row])})")
    return [f"`{op}` {'; '.join(found)}" for op, found in slower.items()]


def _behind(results: Results, where: str) -> list[str]:
    found = losses(results)
    if not found:
        return [f"{where} no row is slower than the best peer."]
    return [f"{where} we are slower than the best peer here:", "", *(f"- {line}" for line in found)]


def readme_section(folder: Path = RESULTS) -> str:
    """README's performance section: the first shape of each operation and every training step, of the newest GPU."""
    machines = []
    for name in sorted({path.name.split(".")[0] for path in folder.glob("*.json")}):
        with suppress(FileNotFoundError):
            machines.append(read(name, folder))
    cpus = [results for results in machines if results.name == "cpu"]
    gpus = [results for results in machines if results.machine["gpu"]]
    lines = []
    for results in cpus:
        report = "[benchmarks/results/cpu.md](benchmarks/results/cpu.md)"
        threads = f"{results.machine['threads']} threads"
        lines += ["", *_behind(results, f"On a CPU ({report}; float32, {threads})")]
    if not gpus:
        return "\n".join([UNMEASURED, *lines])
    results = max(gpus, key=lambda results: results.runs[-1]["datetime"])
    first = {op: shape for op, shape, _ in reversed(results.rows)}
    table = []
    for (op, shape, direction), entries in results.rows.items():
        ours = entries.get(OURS)
        if ours is not None and (op == "train_step" or shape == first[op]):
            ratio, memory = _peer_columns(entries)
            time = duration(ours["seconds"]) + _throughput(ours)
            table.append([op, _shape(shape), direction, time, ratio, _share(ours), memory])
    header = ["operation", "shape", "direction", "ours", "speed against the best peer", "share of floor", "peak memory"]
    commit = results.runs[-1]["commit_info"].get("id") or "unknown"
    intro = (
        f"On one {results.machine['gpu']}, {results.runs[-1]['datetime'][:10]} at commit {commit[:7]}; all shapes and "
        f"peers: [benchmarks/results/{results.name}.md](benchmarks/results/{results.name}.md).\nFloor: what must move "
        "and be computed, at the bandwidth and matrix product measured in that run; peak memory relative to the best "
        "peer's."
    )
    notes = ["", results.notes.split("\n\n")[0]] if results.notes else []
    return "\n".join([intro, "", *_table(header, table), *notes, "", *_behind(results, "On that GPU"), *lines])


def write_readme(readme: Path = README, folder: Path = RESULTS) -> None:
    """Puts the performance section between its markers."""
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(f"{before}{BEGIN}\n\n{readme_section(folder)}\n\n{END}{after}")


def write_reports(names: dict[tuple[Path, str], None]) -> None:
    """<name>.md of each machine, and its plot where there are ceilings and matplotlib."""
    for folder, name in names:
        results = read(name, folder)
        (folder / f"{name}.md").write_text(markdown(results))
        if results.ceilings and find_spec("matplotlib") is not None:
            from benchmarks.roofline import plot_roofline

            plot_roofline(results, folder / f"{name}.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw", nargs="*", type=Path, help="raw files; the parts of a machine are read together")
    parser.add_argument("--readme", action="store_true", help="rewrite README's performance section")
    arguments = parser.parse_args(argv)
    if not arguments.raw and not arguments.readme:
        parser.error("expected raw files, or --readme")
    write_reports(dict.fromkeys((path.parent, path.name.split(".")[0]) for path in arguments.raw))
    if arguments.readme:
        write_readme()


if __name__ == "__main__":
    main()
