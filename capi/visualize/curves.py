"""The curves of a run's metrics, or of several runs' one over the other."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from capi.metrics import read_metrics

if TYPE_CHECKING:
    import matplotlib.figure

_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}
# Of each panel its title, its metrics with their names, and whether it begins at zero.
_PANELS = (
    ("losses (nats)", {"loss": "student", "clustering_loss": "clustering"}, True),
    ("target entropy (nats)", {"target_entropy": "targets", "target_entropy_floor": "floor ln(K/B)"}, True),
    ("position-cluster information (nats)", {"positional_mi": "measured", "positional_mi_floor": "by chance"}, True),
    ("prototypes that no token takes (share)", {"dead_prototypes": "dead"}, True),
    ("learning rates", {"lr": "student", "clustering_lr": "clustering"}, True),
    ("teacher momentum", {"momentum": "momentum"}, False),
    ("images per second", {"images_per_second": "images/s"}, True),
)
_COLUMNS = 4
_STROKES = ("-", "--", ":", "-.")  # Of a panel's metrics where colours are the runs'.

Lines = list[dict[str, int | float | None]]


def plot_curves(runs: Sequence[str | Path], png: str | Path) -> None:
    """Draws losses, target entropy, positional information, dead prototypes, schedules and speed over the steps.

    What a run did not measure, or what was not finite, is left out; so is a last line that was not finished.

    Args:
        runs: folders with a metrics.jsonl, or such files. Several are told apart by colour, and named by their folders.

    Raises:
        ValueError: a run holds no metrics, or what is no line of metrics.
        OSError: a file cannot be read, or the picture cannot be written.
    """
    import matplotlib as mpl  # A third of a second, which nothing waits for that draws nothing.

    files = [path / "metrics.jsonl" if path.is_dir() else path for path in (Path(run).expanduser() for run in runs)]
    lines = {name: _read(file) for name, file in zip(_names(files), files, strict=True)}
    with mpl.rc_context(_STYLE):
        _curves(lines).savefig(png, dpi=120, format="png")


def _read(file: Path) -> Lines:
    if not file.is_file():
        raise ValueError(f"expected a run's folder or its metrics.jsonl, found no {file}")
    try:
        lines = read_metrics(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text: expected a run's metrics.jsonl") from error
    if not lines:
        raise ValueError(f"{file} holds no line of metrics")
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"line {number} of {file} is no object with a step: {str(line)[:80]}")
    return lines


def _names(files: Sequence[Path]) -> list[str]:
    """The runs' folders, with as many of those above as tell them apart; the same file twice is numbered."""
    folders = [file.resolve().parent.parts for file in files]
    depth = 1
    while depth < max(map(len, folders)) and len({x[-depth:] for x in folders}) < len(set(folders)):
        depth += 1
    names = ["/".join(parts[-depth:]) for parts in folders]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, start=1)]


def _curves(runs: dict[str, Lines]) -> "matplotlib.figure.Figure":
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    def points(lines: Lines, key: str) -> list[tuple[int, float]]:
        return [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]

    scores = sorted({key for lines in runs.values() for line in lines for key in line if key.startswith("eval_")})
    evaluation = ("scores (run.evaluate_every)", {key: key[5:].replace("_", " ") for key in scores}, False)
    every = (*_PANELS, evaluation) if scores else _PANELS
    panels = [panel for panel in every if any(points(lines, next(iter(panel[1]))) for lines in runs.values())]
    rows = max(1, -(-len(panels) // _COLUMNS))
    figure = Figure(figsize=(3.9 * _COLUMNS, 3.1 * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    several = len(runs) > 1
    colours = mpl.colormaps["tab10" if len(runs) <= 10 else "turbo"]
    of_run = {name: colours(i if len(runs) <= 10 else i / (len(runs) - 1)) for i, name in enumerate(runs)}
    for axes, (title, series, from_zero) in zip(grid, panels, strict=False):
        axes.set_title(title)
        axes.set_xlabel("step")
        for i, (key, label) in enumerate(series.items()):
            style = {"linestyle": _STROKES[i % len(_STROKES) if several else "floor" in key]}
            for name, lines in runs.items():
                if several:
                    style["color"] = of_run[name]
                else:
                    style["color"] = "0.5" if "floor" in key else f"C{i}"
                if drawn := points(lines, key):
                    marker = "o" if len(drawn) == 1 else ""  # One point alone would be a line of no length.
                    # Not clipped, for a line at zero to be whole.
                    axes.plot(*zip(*drawn, strict=True), label=label, marker=marker, clip_on=False, **style)
        if from_zero:
            axes.set_ylim(bottom=0)
        if several and len(series) > 1:
            axes.legend(
                handles=[
                    Line2D([], [], color="0.3", linestyle=_STROKES[i % len(_STROKES)], label=label)
                    for i, label in enumerate(series.values())
                ]
            )
        elif len(series) > 1:
            axes.legend()
    for axes in grid[len(panels) :]:
        axes.axis("off")
    if several:
        handles = [Line2D([], [], color=colour, label=name) for name, colour in of_run.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(len(runs), 5))
    else:
        figure.suptitle(next(iter(runs)), x=0.005, ha="left", fontsize=12)
    return figure
