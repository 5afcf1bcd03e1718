"""Timelines of steps as a picture: what the GPU computes above what the network sends."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.scaling_step import Task, run

COLOURS = {
    "teacher": "tab:blue",
    "clustering products": "tab:purple",
    "Sinkhorn": "tab:pink",
    "clustering loss": "tab:pink",
    "student": "tab:green",
    "update": "black",
    "largest logits": "tab:red",
    "column sums": "tab:red",
    "clustering gradient": "tab:brown",
    "student gradient": "tab:orange",
    "weights": "tab:cyan",
    "whether all is finite": "grey",
}


def plot(timelines: Mapping[str, Sequence[Task]], path: Path, title: str) -> None:
    """A panel a timeline, three a row, each with two lanes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = 3
    rows = -(-len(timelines) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(15, 1.6 * rows + 1.2), constrained_layout=True, squeeze=False)
    for axis in axes.flat[len(timelines) :]:
        axis.set_axis_off()
    for axis, (name, tasks) in zip(axes.flat, timelines.items(), strict=False):
        times = run(tasks)
        for colour in dict.fromkeys(COLOURS.values()):
            for stream, height in (("compute", 1.0), ("network", 0.0)):
                spans = [
                    (start * 1e3, (stop - start) * 1e3)
                    for task, (start, stop) in zip(tasks, times, strict=True)
                    if task.stream == stream and COLOURS[task.name] == colour
                ]
                axis.broken_barh(spans, (height, 0.8), facecolors=colour, edgecolors=colour, linewidth=0.4)
        last = max(stop for _, stop in times) * 1e3
        axis.set(xlim=(0, last), ylim=(-0.1, 1.9), yticks=[0.4, 1.4], yticklabels=["network", "GPU"])
        axis.set_title(f"{name}: {last:.0f} ms", fontsize=10)
        axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("ms")
    labels: dict[str, str] = {}
    for name, colour in COLOURS.items():
        labels[colour] = f"{labels[colour]}, {name}" if colour in labels else name
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in labels]
    figure.legend(handles, labels.values(), loc="outside lower center", ncols=5, fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
