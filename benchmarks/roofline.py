"""The roofline plot of a GPU's results."""

from pathlib import Path

from benchmarks.raw import OURS, Results, best_peer


def plot_roofline(results: Results, path: Path) -> None:
    """Achieved TFLOP/s over FLOP a byte, ours and the best peer's, under the highest measured ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    copies, products = zip(*results.ceilings, strict=True)
    bandwidth, peak = max(copies) / 1e3, max(products)
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
