"""The experiments: their sweeps are configurations, their runs repeat, and their tables say what was run."""

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import TINIEST

from capi import pretrained, train
from capi.config import load_config
from capi.config_check import check_config
from experiments import ablations, collapse, drawings, pictures
from experiments.runs import Run, argv, chosen, exit_status, of_arms, perform, read_records, read_sweep, spread

SWEEPS = {"collapse": collapse.SWEEP, "drawings": drawings.SWEEP, **ablations.SWEEPS}


@pytest.mark.parametrize(
    "options",
    [options for path in SWEEPS.values() for options in read_sweep(path).values()],
    ids=lambda options: list(options)[-1],
)
def test_every_arm_is_a_configuration(options) -> None:
    check_config(load_config(argv(options)))


def test_a_sweep_gives_every_arm_what_is_under_all(tmp_path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("all: {optim.steps: 3, run.evaluate: false}\none:\ntwo: {optim.steps: 4}\n")
    sweep = read_sweep(path)
    assert sweep == {
        "one": {"optim.steps": 3, "run.evaluate": False},
        "two": {"optim.steps": 4, "run.evaluate": False},
    }
    assert chosen(sweep, ["two"]) == {"two": sweep["two"]}
    with pytest.raises(ValueError, match="expected names of one, two, got three"):
        chosen(sweep, ["three"])
    path.write_text("- one\n")
    with pytest.raises(ValueError, match="expected a mapping of options for each arm"):
        read_sweep(path)


@pytest.fixture
def run(tmp_path) -> Run:
    """Of a fraction of a second."""
    (tmp_path / "tiniest.yaml").write_text(TINIEST)
    return Run("set/arm", 3, {"config": "tiniest.yaml", "masking.mask_ratio": 0.6}, {"data.num_workers": 0})


def test_a_second_run_gives_the_same_numbers_bit_for_bit(run, tmp_path, monkeypatch) -> None:
    """In another process too, beside another."""
    monkeypatch.chdir(tmp_path)
    perform([run], tmp_path / "one.jsonl", tmp_path / "one", score=lambda run_dir: {"folder": run_dir.name})
    perform([run, Run(run.arm, 4, run.options)], tmp_path / "two.jsonl", tmp_path / "two", jobs=2)
    (one,), both = (read_records(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    two, other = sorted(both, key=lambda record: record["seed"])
    assert one["scores"] == {"folder": "arm-seed-3"}
    assert [step for step, _ in one["series"]["loss"]] == list(range(1, 7))
    assert one["series"] == two["series"]
    assert other["series"]["loss"] != one["series"]["loss"]


def test_what_is_done_is_not_repeated_nor_mixed_with_other_options(run, tmp_path, monkeypatch) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({"arm": run.arm, "seed": run.seed, "options": run.options}) + "\n")
    monkeypatch.setattr(train, "main", lambda argv: pytest.fail("trained again"))
    perform([run], results, tmp_path)
    with pytest.raises(ValueError, match=r"has set/arm, seed 3, with other options.*'optim.steps': 9"):
        perform([Run(run.arm, run.seed, {**run.options, "optim.steps": 9})], results, tmp_path)


def test_a_training_that_fails_leaves_no_line(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train, "main", lambda argv: 130)
    with pytest.raises(RuntimeError, match="set/arm, seed 3, ended with status 130"):
        perform([run], tmp_path / "results.jsonl", tmp_path)
    assert read_records(tmp_path / "results.jsonl") == []


def record(arm: str, seed: int, excess: float, score: float) -> dict:
    steps = range(20, 201, 20)
    series = {
        "loss": [[step, 4 - step / 100] for step in steps],
        "positional_mi": [[step, 0.03 + excess * step / 200] for step in steps],
        "positional_mi_floor": [[step, 0.03] for step in steps],
        **{f"eval_{name}": [[100, 0.3], [200, score]] for name in ("image_knn", "image_linear", "patch_knn")},
        "eval_patch_miou": [[100, 0.2], [200, 0.4]],
    }
    scores = {name: points[-1][1] for name, points in series.items() if name.startswith("eval_")}
    made = {"date": "2026-11-27", "commit": "abc", "tokens_a_reading": 42240}
    return {"arm": arm, "seed": seed, "options": {}, "scores": scores, "series": series, **made}


def test_the_report_of_the_collapse_says_how_runs_ended_and_which(tmp_path) -> None:
    results = tmp_path / "collapse.jsonl"
    for seed in (1, 0):
        for arm, excess in ("standard", 0.12), ("positionwise", -0.01):
            with results.open("a") as file:
                file.write(json.dumps(record(f"few-scenes/{arm}", seed, excess, 0.5 + seed / 10)) + "\n")
    collapse.main(["--report", "--results", str(results)])
    rows = [line for line in (tmp_path / "collapse.md").read_text().splitlines() if line.startswith("| few-scenes")]
    assert rows[0].startswith(
        "| few-scenes | standard Sinkhorn | 0, 1 | 0.096 ± 0.000 | 2.400 ± 0.000 | 0.550 ± 0.071 |"
    )
    assert rows[0].endswith("| 100, 100 |")
    assert rows[1].startswith("| few-scenes | position-wise | 0, 1 | -0.008 ± 0.000 |")
    assert rows[1].endswith("| -, - |")
    with Image.open(tmp_path / "collapse.png") as figure:
        assert figure.width > 4 * figure.height
        assert np.asarray(figure.convert("L")).std() > 10


def test_the_table_of_the_ablations_has_the_papers_figures_beside() -> None:
    records = [record("base", seed, 0.0, 0.5) for seed in (0, 1)] + [record("random masks", 0, 0.0, 0.4)]
    _, _, base, random = ablations.table(records, ablations._PAPER).splitlines()
    assert base.startswith("| base | 0, 1 | 0.500 ± 0.000 | 0.500 ± 0.000 |")
    assert base.endswith("| 29.1 / 81.4 |")
    assert random.startswith("| random masks | 0 | 0.400 |")
    assert random.endswith("| 23.6 / 76.4 |")
    assert set(ablations._PAPER) < set(read_sweep(SWEEPS["ablations"]))
    assert "paper" not in ablations.table(records, {})


def test_what_a_user_can_set_right_is_said_in_one_line(capsys) -> None:
    assert exit_status(lambda: ablations.main(["--arms", "base", "neither"])) == 1
    _, errors = capsys.readouterr()
    assert errors.startswith("error: expected names of base, random masks,")
    assert errors.count("\n") == 1
    assert exit_status(lambda: None) == 0


def test_spread() -> None:
    assert spread([0.5]) == "0.500"
    assert spread([0.25, 0.75]) == "0.500 ± 0.354"
    assert [r["seed"] for r in of_arms([{"arm": "a", "seed": s} for s in (2, 0, 1)])["a"]] == [0, 1, 2]


def test_pictures_are_distinct_split_and_the_same_at_every_call(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pictures, "_FEWEST", 4)
    monkeypatch.setattr(pictures, "_MOST_PIXELS", 1000)
    rng = np.random.default_rng(0)
    root = tmp_path / "share" / "openclipart" / "png"
    for category, n in ("food", 8), ("tools", 7), ("rare", 3), ("shapes", 9):
        (root / category / "deeper").mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 256, (20, 30, 4), np.uint8)
            Image.fromarray(pixels).save(root / category / "deeper" / f"{i}.png")
    (root / "food" / "again.png").write_bytes((root / "food" / "deeper" / "0.png").read_bytes())
    Image.new("L", (40, 40)).save(root / "food" / "large.png")
    for name in ("one", "two"):
        pictures.write_pictures("clipart", tmp_path / "share", tmp_path / name)
    files = {name: sorted((tmp_path / name).rglob("*.png")) for name in ("one", "two")}
    assert len(files["one"]) == 15
    tested = [path for path in files["one"] if path.relative_to(tmp_path / "one").parts[:2] == ("test", "clipart")]
    assert [path.parent.name for path in tested] == ["food", "food", "tools", "tools"]
    assert {path.parent.name for path in files["one"]} == {"food", "tools"}
    for one, two in zip(files["one"], files["two"], strict=True):
        assert one.relative_to(tmp_path / "one") == two.relative_to(tmp_path / "two")
        assert one.read_bytes() == two.read_bytes()
    with Image.open(files["one"][0]) as picture:
        assert (picture.mode, picture.size) == ("RGB", (64, 64))
        assert picture.getpixel((0, 0)) == (255, 255, 255)
    pictures.write_pictures("clipart", tmp_path / "nowhere", tmp_path / "one")


def test_poses_of_a_unit_are_all_trained_on_or_none(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pictures, "_FEWEST", 10)
    rng = np.random.default_rng(0)
    root = tmp_path / "share" / "games" / "wesnoth" / "1.16" / "data" / "core" / "images" / "units"
    of_elves = [f"{unit}{pose}" for unit in ("archer", "scout", "hero", "druid") for pose in ("", "+female", "-bow-1")]
    for name in (*(f"elves/{name}" for name in (*of_elves, "rider/rider-se-1", "rider/rider-ne-1")), "ogres/ogre"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (72, 72, 4), np.uint8)).save(root / f"{name}.png")
    Image.new("RGBA", (400, 72)).save(root / "elves" / "druid-all.png")
    pictures.write_pictures("units", tmp_path / "share", tmp_path / "pictures")
    train, test = ({f.stem for f in (tmp_path / "pictures" / part).rglob("*.png")} for part in ("train", "test"))
    assert train | test == {*of_elves, "rider-rider-se-1", "rider-rider-ne-1"}
    assert not train & test
    assert len({name.split("-")[0].split("+")[0] for name in test}) == 1
    assert len(test) in (2, 3)
    second = tmp_path / "share" / "games" / "wesnoth" / "1.18" / "data" / "core" / "images" / "units"
    second.mkdir(parents=True)
    for other in ("none", "share"):
        with pytest.raises(FileNotFoundError, match=r"expected one version of Wesnoth's data below .*, got [02]$"):
            pictures.write_pictures("units", tmp_path / other, tmp_path / "elsewhere")


def test_an_evaluation_of_drawings_knows_pixels_and_an_encoder(run, tmp_path, monkeypatch) -> None:
    """Where it is bright even pixels tell."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawings, "_GRID", drawings.Grid(learning_rates=(1e-2,), weight_decays=(0.0,), iterations=20))
    rng = np.random.default_rng(0)
    folder, sets = tmp_path / "pictures", ["emoji", "clipart"]
    for name, (part, n) in product(sets, (("train", 12), ("test", 4))):
        for label, rows in ("above", slice(12)), ("below", slice(12, 24)):
            (folder / part / name / label).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 60, (24, 24, 3), np.uint8)
                pixels[rows] += 190
                Image.fromarray(pixels).save(folder / part / name / label / f"{i}.png")
    of_pixels = drawings.evaluate(drawings.Pixels(), 16, folder, sets)
    assert of_pixels["clipart: knn, global"] == of_pixels["clipart: knn, all patches"] == 1
    (of_one,) = drawings.runs({"arm": run.options}, [0], folder, ["clipart"])
    assert of_one.places == {"data.source": f"folder:{folder / 'train' / 'clipart'}"}
    (of_both,) = drawings.runs({"arm": {**run.options, "optim.steps": 2}}, [0], folder, sets)
    perform([of_both], tmp_path / "results.jsonl", tmp_path, score=lambda path: drawings.score(path, folder, sets))
    (made,) = read_records(tmp_path / "results.jsonl")
    assert set(made["scores"]) == {f"{name}: {key}" for name in sets for key in drawings._COLUMNS.values()}
    assert all(0 <= score <= 1 for score in made["scores"].values())
    rows = drawings.table([made]).splitlines()[2:]
    assert [row.split(" | ")[:4] for row in rows] == [["| emoji+clipart", "arm", "0", name] for name in sets]
    encoder = pretrained.build(pretrained.read(tmp_path / "emoji+clipart" / "arm-seed-0")).eval()
    vector, _, only = drawings.AllPatches(encoder)(torch.zeros(2, 3, 16, 16))
    assert torch.equal(vector, encoder(torch.zeros(2, 3, 16, 16))[2].flatten(1))
    assert only.shape == (2, 1, 1, vector.shape[1])
    assert "data.source" not in made["options"]


@pytest.mark.parametrize("name", pictures.SETS)
def test_a_package_that_is_not_there_is_named(name: str, tmp_path) -> None:
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        pictures.write_pictures(name, tmp_path, tmp_path / "pictures")


def test_the_list_of_emoji_is_read_without_other_skins(tmp_path) -> None:
    listing = tmp_path / "emoji-test.txt"
    listing.write_text(
        "# group: Smileys & Emotion\n1F600  ; fully-qualified # grin\n263A ; unqualified # face\n"
        "# group: People & Body\n1F44B 1F3FB ; fully-qualified # hand\n1F9D1 200D 1F33E ; fully-qualified # farmer\n"
    )
    assert list(pictures.listed(listing)) == [
        ("Smileys-and-Emotion", "\U0001f600"),
        ("People-and-Body", "\U0001f9d1\u200d\U0001f33e"),
    ]


def test_results_are_of_the_sweeps_as_they_are() -> None:
    """A committed line with other options would not be repeated, nor belong to its row."""
    results = Path(collapse.__file__).parent / "results"
    arms = {"drawings": lambda arm: arm.rpartition("/")[2], "collapse": lambda arm: arm.split("/")[0]}
    for name, path in SWEEPS.items():
        sweep, of_arm = read_sweep(path), arms.get(name, str)
        for made in read_records(results / f"{name}.jsonl"):
            if made["options"]:  # Pixels have none.
                assert sweep[of_arm(made["arm"])].items() <= made["options"].items(), made["arm"]
