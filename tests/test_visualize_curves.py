"""The curves of runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capi.visualize.curves import _curves, _names, _read, plot_curves


def write_run(folder: Path, **changed: list[float | None]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    columns = {
        "loss": [4.0, 3.0, 2.0],
        "clustering_loss": [3.0, 2.0, 1.0],
        "target_entropy": [0.5, 0.6, 0.5],
        "target_entropy_floor": [0.1, 0.1, 0.1],
        "positional_mi": [0.02, 0.03, 0.02],
        "positional_mi_floor": [0.02, 0.02, 0.02],
        "dead_prototypes": [0.3, 0.1, 0.0],
        "lr": [0.0, 1e-3, 5e-4],
        "clustering_lr": [0.0, 5e-4, 2e-4],
        "momentum": [1.0, 0.99, 0.995],
        "images_per_second": [100.0, 120.0, 110.0],
        **changed,
    }
    lines = [{"step": 10 * i, **{key: values[i] for key, values in columns.items()}} for i in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def curves_of(*runs: Path):
    return _curves({run.name: _read(run / "metrics.jsonl") for run in runs})


def drawn(figure) -> list[list[float]]:
    return [list(line.get_ydata()) for axes in figure.axes for line in axes.get_lines()]


def test_every_curve_is_drawn_once(tmp_path):
    run = write_run(tmp_path / "run")
    lines = _read(run / "metrics.jsonl")
    figure = curves_of(run)
    assert sorted(drawn(figure)) == sorted([line[key] for line in lines] for key in lines[0] if key != "step")
    assert all(list(line.get_xdata()) == [0, 10, 20] for axes in figure.axes for line in axes.get_lines())
    assert figure.get_suptitle() == "run"


def test_several_runs_lie_over_each_other_in_colours_that_are_named(tmp_path):
    runs = [write_run(tmp_path / name, loss=[value] * 3) for name, value in (("a", 4.0), ("b", 3.0), ("c", 2.0))]
    figure = curves_of(*runs)
    losses = figure.axes[0].get_lines()
    assert [list(line.get_ydata()) for line in losses[:3]] == [[4.0] * 3, [3.0] * 3, [2.0] * 3]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c"]
    assert [line.get_color() for line in legend.get_lines()] == [line.get_color() for line in losses[:3]]
    assert len({line.get_color() for line in losses[:3]}) == 3
    # A second metric of a panel has the runs' colours too, and another stroke.
    assert [line.get_color() for line in losses[3:]] == [line.get_color() for line in losses[:3]]
    assert {line.get_linestyle() for line in losses[:3]} == {"-"}
    assert {line.get_linestyle() for line in losses[3:]} == {"--"}


def test_scores_of_evaluations_have_a_panel(tmp_path):
    runs = [write_run(tmp_path / name, eval_knn_global=[None, 0.4, 0.5], eval_linear=[None, 0.6, 0.7]) for name in "ab"]
    titles = [axes.get_title() for axes in curves_of(write_run(tmp_path / "without")).axes]
    assert not any("scores" in title for title in titles)
    (scores,) = (axes for axes in curves_of(*runs).axes if axes.get_title() == "scores (run.evaluate_every)")
    assert [list(line.get_ydata()) for line in scores.get_lines()] == [[0.4, 0.5]] * 2 + [[0.6, 0.7]] * 2
    assert [text.get_text() for text in scores.get_legend().get_texts()] == ["knn global", "linear"]
    assert [line.get_linestyle() for line in scores.get_lines()] == ["-", "-", "--", "--"]


def test_more_runs_than_the_palette_has_colours_still_differ(tmp_path):
    losses = curves_of(*(write_run(tmp_path / f"{i:02d}") for i in range(13))).axes[0].get_lines()[:13]
    assert len({tuple(line.get_color()) for line in losses}) == 13


def test_what_is_missing_or_was_not_finite_is_left_out(tmp_path):
    nothing = [None] * 3
    run = write_run(tmp_path / "run", loss=[4.0, None, 2.0], positional_mi_floor=nothing, momentum=nothing)
    figure = curves_of(run)
    titles = [axes.get_title() for axes in figure.axes]
    losses = figure.axes[titles.index("losses (nats)")].get_lines()[0]
    assert list(losses.get_ydata()) == [4.0, 2.0]
    assert list(losses.get_xdata()) == [0, 20]
    assert len(figure.axes[titles.index("position-cluster information (nats)")].get_lines()) == 1
    assert "teacher momentum" not in titles


def test_runs_are_named_by_as_many_folders_as_tell_them_apart(tmp_path):
    def names(*parts: str) -> list[str]:
        return _names([tmp_path / part / "metrics.jsonl" for part in parts])

    assert names("a", "b") == ["a", "b"]
    assert names("x/a", "y/a", "b") == ["x/a", "y/a", f"{tmp_path.name}/b"]
    assert names("a", "a") == ["a (1)", "a (2)"]


def test_the_picture_of_the_curves_is_written(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", loss=[1.0, 2.0, 3.0])]
    for given in (runs, [runs[0] / "metrics.jsonl"]):
        plot_curves(given, tmp_path / "curves.png")
        first = (tmp_path / "curves.png").read_bytes()
        with Image.open(tmp_path / "curves.png") as image:
            picture = np.asarray(image.convert("RGB")).astype(int)
        assert min(picture.shape[:2]) >= 600
        # The default blue and orange of matplotlib.
        for colour in [31, 119, 180], [255, 127, 14]:
            assert (picture == colour).all(axis=2).sum() > 200
        plot_curves(given, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").read_bytes() == first


def test_an_unfinished_line_is_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "loss": 1')
    assert list(curves_of(run).axes[0].get_lines()[0].get_xdata()) == [0, 10, 20]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a run's folder or its metrics.jsonl, found no"),
        (b"", "holds no line of metrics"),
        (b'{"loss": 1}\n', "line 1 of .* is no object with a step"),
        (b'{"step": 0}\nno json\n', "line 2 of .* is not JSON: no json"),
        (b"\xff\xfe\x00", "is no text"),
    ],
)
def test_what_is_no_run(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        plot_curves([tmp_path], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
