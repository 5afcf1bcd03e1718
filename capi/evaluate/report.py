"""What an evaluation leaves: its numbers as JSON, a Markdown table, and a picture of the results of every class."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from capi.checkpoint import write_atomically

_SCORES = {"classification": ("accuracy", "accuracy"), "segmentation": ("mean_iou", "IoU")}
_MOST_CLASSES = 60
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def write_report(evaluations: Mapping[str, dict], folder: Path) -> list[Path]:
    """Writes results.json, results.md and results.png of evaluations, by the encoders' names, each file whole or not.

    Raises OSError as `write_atomically` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(evaluations, indent=2, allow_nan=False) + "\n"
    paths = [folder / f"results.{kind}" for kind in ("json", "md", "png")]
    write_atomically(paths[0], lambda file: file.write_text(text))
    write_atomically(paths[1], lambda file: file.write_text(table(evaluations) + "\n"))
    write_atomically(paths[2], lambda file: plot_classes(evaluations, file))
    return paths


def table(evaluations: Mapping[str, dict]) -> str:
    """A row for every encoder, probe and kind of features."""
    first = next(iter(evaluations.values()))
    n_train, n_test = first["train"]["images"], first["test"]["images"]
    key, _ = _SCORES[first["task"]]
    scores = ["accuracy"] if key == "accuracy" else ["mean IoU", "pixel accuracy"]
    header = ["encoder", "probe", "features", scores[0], "95 % interval", *scores[1:], "chosen"]
    lines = [
        f"{first['task'].capitalize()} at {first['image_size']} px: {n_train} images of `{first['train']['source']}` "
        f"to learn from, {n_test} of `{first['test']['source']}` to predict.",
        "",
        f"| {' | '.join(header)} |",
        "| --- | --- | --- | ---: | :---: |" + " ---: |" * len(scores[1:]) + " --- |",
    ]
    for name, evaluation in evaluations.items():
        for result in evaluation["results"]:
            low, high = result["interval"]
            more = [f"{result['pixel_accuracy']:.3f}"] if key == "mean_iou" else []
            cells = [name, result["probe"], result["features"], f"{result[key]:.3f}", f"{low:.3f} to {high:.3f}", *more]
            lines.append(f"| {' | '.join([*cells, _chosen(result)])} |")
    lines += [
        "",
        "The interval is of a bootstrap over the test images: another training set, or another start of the probes, is "
        "not in it.",
    ]
    for part in ("train", "test"):
        if n := first[part]["unreadable"]:
            lines.append(f"Of the {part} set {n} images could not be read and are left out.")
    return "\n".join(lines)


def _chosen(result: dict) -> str:
    short = {"learning_rate": "lr", "weight_decay": "wd"}
    keys = ("k", "temperature", "distance", "C", "learning_rate", "weight_decay")
    values = [(short.get(key, key), result[key]) for key in keys if key in result]
    return ", ".join(f"{key} {value:g}" if not isinstance(value, str) else value for key, value in values)


def plot_classes(evaluations: Mapping[str, dict], png: Path) -> None:
    """Draws the score of every class by every probe, the worst class at the bottom; of many the best and the worst."""
    import matplotlib as mpl  # A third of a second, which nothing waits for that draws nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = next(iter(evaluations.values()))
    key, label = _SCORES[first["task"]]
    series = []
    for name, evaluation in evaluations.items():
        for probe in dict.fromkeys(result["probe"] for result in evaluation["results"]):
            best = max((r for r in evaluation["results"] if r["probe"] == probe), key=lambda r: r[key])
            what = f"{probe}, {best['features']}" if key == "accuracy" else probe
            title = f"{what}: {best[key]:.3f}"
            series.append((title if len(evaluations) == 1 else f"{name}, {title}", best["per_class"]))
    mean = {c: sum(s.get(c, 0.0) for _, s in series) / len(series) for _, s in series for c in s}
    classes = sorted(mean, key=lambda c: (mean[c], c))
    shown, half = _shown(classes), _MOST_CLASSES // 2
    with mpl.rc_context(_STYLE):
        legend = 0.22 * len(series) + 0.4
        figure = Figure(figsize=(7.5, max(2.5, 0.21 * len(shown) + 0.9 + legend)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for marker, (title, scores) in zip(_markers(len(series)), series, strict=True):
            points = [(scores[c], place) for place, c in enumerate(shown) if c in scores]
            axes.plot(*zip(*points, strict=True), marker, label=title, markersize=5.5, alpha=0.85, clip_on=False)
        axes.set_yticks(range(len(shown)), [str(c)[:40] for c in shown])
        axes.set_ylim(-0.7, len(shown) - 0.3)
        axes.set_xlim(0, 1)
        axes.set_xlabel(f"{label} of the class on the test set")
        what = f"{label} by class, {first['test']['source'][-60:]}"
        if len(shown) < len(classes):
            what += f"\n{half} best and {half} worst of {len(classes)} classes"
            axes.axhline(half - 0.5, color="0.6", linewidth=0.8)
        axes.set_title(what, fontsize=10, loc="left", fontweight="bold")
        figure.legend(loc="outside lower left")
        figure.savefig(png, dpi=120, format="png")


def _shown(classes: Sequence[str]) -> Sequence[str]:
    half = _MOST_CLASSES // 2
    return classes if len(classes) <= _MOST_CLASSES else [*classes[:half], *classes[-half:]]


def _markers(n: int) -> list[str]:
    shapes = "osD^vP*Xph"
    return [shapes[i % len(shapes)] for i in range(n)]
