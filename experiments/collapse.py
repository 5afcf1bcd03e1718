"""Positional collapse, small: standard against position-wise Sinkhorn-Knopp, the same images and seeds.

`python -m experiments.collapse [--settings NAME ...]` trains both arms of the settings in collapse.yaml, and writes
results/collapse.jsonl (every reading of every run), collapse.md (how the runs ended) and collapse.png (how they went).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from capi.checkpoint import write_atomically
from capi.collapse import LEAST_NATS, CollapseAlarm
from experiments.runs import (
    LAST,
    Record,
    Run,
    chosen,
    command,
    excess,
    exit_status,
    of_arms,
    perform,
    read_records,
    read_sweep,
    seeds_of,
    spread,
    write_table,
)

SWEEP = Path(__file__).parent / "collapse.yaml"
ARMS = {"standard": {"clustering.positionwise": False}, "positionwise": {"clustering.positionwise": True}}
_COLOURS = {"standard": "C3", "positionwise": "C0"}
_LABELS = {"standard": "standard Sinkhorn", "positionwise": "position-wise"}
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
_ENDS = {
    "information over chance (nats)": "positional_excess",
    "student's loss": "loss",
    "image k-NN": "eval_image_knn",
    "image linear": "eval_image_linear",
    "patch k-NN": "eval_patch_knn",
    "patch mIoU": "eval_patch_miou",
}
_PANELS = ("positional_excess", "loss", "eval_image_knn", "eval_patch_knn")

Points = list[tuple[int, float]]


def points(record: Record, name: str) -> Points:
    """Step and value of every reading."""
    return excess(record) if name == "positional_excess" else [tuple(point) for point in record["series"][name]]


def end(record: Record, name: str) -> float:
    """How a run ended: its last score, or the mean of the last readings."""
    values = [value for _, value in points(record, name)]
    return values[-1] if name.startswith("eval_") else mean(values[-LAST:])


def rings_at(record: Record) -> int | None:
    """The first step at which the trainer's alarm rings, of the preset's 36 positions and 64 prototypes."""
    alarm, series = CollapseAlarm(36, 64), record["series"]
    for (step, information), (_, floor) in zip(series["positional_mi"], series["positional_mi_floor"], strict=True):
        reading = {"positional_mi": information, "positional_mi_floor": floor}
        alarm.judge({**reading, "assigned_tokens": record["tokens_a_reading"]})
        if alarm.rings:
            return step
    return None


def table(records: Sequence[Record]) -> str:
    """A row for each setting and arm."""
    lines = [
        f"| setting | Sinkhorn | seeds | {' | '.join(_ENDS)} | alarm from step |",
        f"| --- | --- | --- |{' ---: |' * len(_ENDS)} ---: |",
    ]
    for arm, of_arm in of_arms(records).items():
        setting, _, name = arm.partition("/")
        cells = [spread([end(record, key) for record in of_arm]) for key in _ENDS.values()]
        rings = ", ".join(str(rings_at(record) or "-") for record in of_arm)
        lines.append(f"| {setting} | {_LABELS[name]} | {seeds_of(of_arm)} | {' | '.join(cells)} | {rings} |")
    return "\n".join(lines)


def draw(records: Sequence[Record], png: Path) -> None:
    """A row of panels for each setting: the mean over seeds as a line, least and largest as a band."""
    arms = of_arms(records)
    settings = list(dict.fromkeys(arm.partition("/")[0] for arm in arms))
    titles = {key: title for title, key in _ENDS.items()}
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.7 * len(_PANELS), 2.7 * len(settings)), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(settings), len(_PANELS), squeeze=False)
        for row, setting in zip(grid, settings, strict=True):
            of_setting = {name: arms[f"{setting}/{name}"] for name in ARMS if f"{setting}/{name}" in arms}
            for axes, key in zip(row, _PANELS, strict=True):
                for name, of_arm in of_setting.items():
                    _band(axes, [points(record, key) for record in of_arm], _COLOURS[name], name)
                axes.set_title(titles[key])
                axes.set_xlabel("step")
            seeds = dict.fromkeys(f"seeds {seeds_of(of_arm)}" for of_arm in of_setting.values())
            row[0].set_ylabel(f"{setting}\n{' / '.join(seeds)}")
            row[0].axhline(0, color="0.6", linewidth=0.8)
            row[0].axhline(LEAST_NATS, color="0.6", linewidth=0.8, linestyle=":", label="alarm")
            row[0].legend(loc="upper left")
        figure.savefig(png, dpi=120, format="png")


def _band(axes: Axes, runs: Sequence[Points], colour: str, name: str) -> None:
    steps = [step for step, _ in runs[0]]
    by_step = list(zip(*([value for _, value in run] for run in runs), strict=True))
    axes.plot(steps, [mean(values) for values in by_step], color=colour, label=_LABELS[name], linewidth=1.4)
    axes.fill_between(steps, list(map(min, by_step)), list(map(max, by_step)), color=colour, alpha=0.2, linewidth=0)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command(__doc__, "collapse")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="of collapse.yaml (all)")
    arguments = parser.parse_args(argv)
    sweep = read_sweep(SWEEP)
    runs = [
        Run(f"{setting}/{name}", seed, {**options, **arm})
        for seed in arguments.seeds
        for setting, options in chosen(sweep, arguments.settings).items()
        for name, arm in ARMS.items()
    ]
    if not arguments.report:
        perform(runs, arguments.results, arguments.folder, arguments.jobs)
    order = [f"{setting}/{name}" for setting in sweep for name in ARMS]
    records = sorted(read_records(arguments.results), key=lambda record: order.index(record["arm"]))
    write_table(arguments.results, "collapse", records, table(records))
    write_atomically(arguments.results.with_suffix(".png"), lambda file: draw(records, file))


if __name__ == "__main__":
    sys.exit(exit_status(main))
