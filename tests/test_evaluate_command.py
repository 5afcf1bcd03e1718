import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from images import encoded
from PIL import Image

from capi import pretrained
from capi.checkpoint import save_encoder
from capi.config import load_config
from capi.evaluate import features, main, segmentation
from capi.evaluate.segmentation import Patches, _knn
from capi.model import CAPI

SIZE = ["--data.image_size", "16", "--model.patch_size", "4", "--model.embed_dim", "64", "--model.num_heads", "2"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """An untrained encoder, which sees colours."""
    config = load_config(["--config", "tiny", *SIZE])
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "small.safetensors"
    save_encoder(path, CAPI(config.model, config.clustering).init_weights().student_ema, config.model)
    return path


COLOURS = {f"colour {n}": tuple(60 + 130 * (n >> bit & 1) for bit in range(3)) for n in range(8)}


def picture(colour: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.array(colour) + rng.normal(0, 30, (20, 24, 3)), 0, 255).astype(np.uint8)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(Image.fromarray(pixels)))


@pytest.fixture
def colours(tmp_path) -> Path:
    """Folders of pictures by their colour, in `train` and `test`."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 80), ("test", 48)):
        for index in range(n):
            name = list(COLOURS)[index % 8]
            write(tmp_path / part / name / f"{index}.png", picture(COLOURS[name], rng))
    return tmp_path


@pytest.fixture
def halves(tmp_path) -> Path:
    """Pictures of two colours and their masks; a line between is not labelled."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("test", 8)):
        for index in range(n):
            left, right = rng.permutation(3)[:2]
            columns = np.where(np.arange(24) < 12, left, right)
            pixels = np.array([(200, 40, 40), (40, 180, 40), (40, 40, 200)])[columns][None].repeat(20, 0) + rng.normal(
                0, 30, (20, 24, 3)
            )
            write(tmp_path / part / "images" / f"{index}.png", np.clip(pixels, 0, 255).astype(np.uint8))
            mask = columns[None].repeat(20, 0).astype(np.uint8)
            mask[:, 11:13] = 255
            write(tmp_path / part / "masks" / f"{index}.png", mask)
    return tmp_path


def arguments(encoder: Path, root: Path, *more: str) -> list[str]:
    sources = ["--train", f"folder:{root / 'train'}", "--test", f"folder:{root / 'test'}"]
    return [str(encoder), *sources, "--output", str(root / "out"), "--image_size", "16", "--steps", "60", *more]


def results(root: Path, encoder: Path) -> list[dict]:
    return json.loads((root / "out" / "results.json").read_text())[str(encoder)]["results"]


def test_the_classes_of_coloured_pictures_are_found(encoder, colours, capsys):
    assert main(arguments(encoder, colours, "--probes", "knn,linear,attentive")) == 0
    found = results(colours, encoder)
    kinds = ["global", "patch mean", "global + patch mean"]
    assert [(r["probe"], r["features"]) for r in found] == [
        *(("knn", kind) for kind in kinds),
        *(("linear", kind) for kind in kinds),
        ("attentive", "patches"),
    ]
    for result in found:
        assert result["accuracy"] > 0.8, result
        low, high = result["interval"]
        assert low <= result["accuracy"] <= high
        assert set(result["per_class"]) == set(COLOURS)
        assert np.mean(list(result["per_class"].values())) == pytest.approx(result["accuracy"])
    table = (colours / "out" / "results.md").read_text()
    assert table.count(f"| {encoder} |") == 7
    assert table.rstrip() in capsys.readouterr().out
    assert (colours / "out" / "results.png").read_bytes()[:4] == b"\x89PNG"


def test_labels_at_random_give_no_more_than_chance(encoder, colours):
    """Were the labels of the test set, or what follows from them, in the features, this would tell."""
    pictures = sorted(path for path in (colours / "train").rglob("*.png"))
    order = np.random.default_rng(5).permutation(len(pictures))
    contents = [path.read_bytes() for path in pictures]
    for path, other in zip(pictures, order, strict=True):
        path.write_bytes(contents[other])
    assert main(arguments(encoder, colours)) == 0
    assert all(result["accuracy"] < 0.35 for result in results(colours, encoder))


def test_two_evaluations_are_the_same_and_the_second_computes_no_features(encoder, colours, monkeypatch):
    brief = ["--probes", "knn,linear,attentive", "--steps", "10"]
    assert main(arguments(encoder, colours, *brief)) == 0
    first = (colours / "out" / "results.json").read_bytes()
    monkeypatch.setattr(features, "_prepare", lambda *_: pytest.fail("computed again"))
    assert main(arguments(encoder, colours, *brief)) == 0
    assert (colours / "out" / "results.json").read_bytes() == first
    monkeypatch.undo()
    cache = ["--cache", str(colours / "anew")]
    assert main(arguments(encoder, colours, *brief, *cache)) == 0
    assert (colours / "out" / "results.json").read_bytes() == first
    assert len(list((colours / "anew").iterdir())) == 2


def test_masks_are_found(encoder, halves):
    assert main(arguments(encoder, halves)) == 0
    found = results(halves, encoder)
    assert [r["probe"] for r in found] == ["knn", "linear"]
    for result in found:
        assert result["mean_iou"] > 0.7, result
        assert result["pixel_accuracy"] > 0.8
        assert set(result["per_class"]) == {"0", "1", "2"}
        assert np.mean(list(result["per_class"].values())) == pytest.approx(result["mean_iou"])
        low, high = result["interval"]
        assert low <= result["mean_iou"] <= high
    first = (halves / "out" / "results.json").read_bytes()
    assert main(arguments(encoder, halves)) == 0
    assert (halves / "out" / "results.json").read_bytes() == first


def test_scores_of_masks_are_those_of_all_labelled_pixels(encoder, halves, monkeypatch):
    """Predicting one class everywhere has an IoU that can be counted by hand."""
    monkeypatch.setattr(
        segmentation, "_logistic", lambda bank, queries, grid, *_: [torch.full_like(queries.pixels, 1) for _ in grid]
    )
    assert main(arguments(encoder, halves, "--probes", "linear")) == 0
    (result,) = results(halves, encoder)
    counts = np.zeros(256)
    for path in (halves / "test" / "masks").iterdir():
        with Image.open(path) as image:
            resized = np.asarray(image.resize((16, 16), Image.Resampling.NEAREST))
        counts += np.bincount(resized.ravel(), minlength=256)
    labelled = counts[:255].sum()
    assert counts[255] > 0
    assert result["pixel_accuracy"] == pytest.approx(counts[1] / labelled)
    assert result["mean_iou"] == pytest.approx(counts[1] / labelled / 3)


def test_neighbours_vote_pixel_by_pixel():
    pixels = torch.tensor([[0, 1], [0, 2], [2, 2], [1, -1]], dtype=torch.int16)
    x, y = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3], [-1.0, 0.0]]), torch.tensor([0, 0, 2, 1])
    bank, queries = Patches(x, pixels, y, y), Patches(x[:1], pixels[:1], y[:1], y[:1])
    grid = [(1, "cosine"), (3, "cosine"), (30, "L2")]
    one, three, everyone = _knn(bank, queries, grid, 3, lambda: None)
    assert one.tolist() == [[0, 1]]
    assert three.tolist() == [[0, 2]]
    # Of equally frequent classes the smallest; where a pixel has none, that of its patch.
    assert everyone.tolist() == [[0, 1]]


def test_patches_are_taken_by_their_images():
    image = torch.tensor([0, 0, 2, 3])  # None of image 1 has a label.
    patches = Patches(torch.eye(4), torch.zeros(4, 1, dtype=torch.int16), torch.zeros(4, dtype=torch.int64), image)
    assert patches.of_images(0, 2).x.tolist() == torch.eye(4)[:2].tolist()
    assert patches.of_images(2, 4).image.tolist() == [2, 3]


def test_several_encoders_stand_in_one_table(encoder, colours, tmp_path):
    weights = pretrained.read(encoder)
    other = tmp_path / "other.pth"
    torch.save({f"backbone.{name}": 1.1 * tensor for name, tensor in weights.state.items()}, other)
    assert main([str(other), *arguments(encoder, colours, "--probes", "knn")]) == 0
    found = json.loads((colours / "out" / "results.json").read_text())
    assert list(found) == [str(other), str(encoder)]
    assert len({evaluation["encoder_sha256"] for evaluation in found.values()}) == 2
    assert (colours / "out" / "results.md").read_text().count("| knn |") == 6


def test_many_classes_are_drawn(encoder, tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for index in range(70):
            write(tmp_path / part / f"class {index}" / "a.png", picture((3 * index, 90, 255 - 3 * index), rng))
    assert main(arguments(encoder, tmp_path, "--probes", "knn")) == 0
    with Image.open(tmp_path / "out" / "results.png") as png:
        assert png.height < 2000  # Of 70 classes the 30 best and the 30 worst.


def test_what_cannot_be_evaluated_is_one_line(encoder, colours, capsys):
    def fails(message: str, *more: str, train: str | None = None, test: str | None = None) -> None:
        command = arguments(encoder, colours, *more)
        command[2], command[4] = train or command[2], test or command[4]
        assert main(command) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert re.search(message, error), error
        assert not (colours / "out" / "results.json").exists()

    (colours / "train" / "black").mkdir()
    write(colours / "one" / "colour 4" / "a.png", picture(COLOURS["colour 4"], np.random.default_rng(1)))
    write(colours / "new" / "pink" / "a.png", picture((200, 100, 100), np.random.default_rng(1)))
    (colours / "text").mkdir()
    (colours / "text" / "a.txt").write_text("no picture")
    (colours / "bad" / "red").mkdir(parents=True)
    (colours / "bad" / "red" / "a.png").write_text("no picture")
    missing = f"folder:{colours / 'missing'}"
    fails("expected a folder, got no such path", train=missing)
    fails("expected images of a format that Pillow reads, found none", test=f"folder:{colours / 'text'}")
    fails("at least two classes, got colour 4 alone", train=f"folder:{colours / 'one'}")
    fails("1 of the 1 classes of the test set are none of the training set's 8: pink", test=f"folder:{colours / 'new'}")
    fails("none of 1 has both; .*a.png: UnidentifiedImageError", test=f"folder:{colours / 'bad'}")
    fails("of a classification must be of knn, linear, attentive, got svm", "--probes", "svm")
    fails("the image size must be a multiple of the patch size 4, got 18", "--image_size", "18")
    fails("must be folder:PATH, hf:NAME or wds:PATTERN, got photos", train="photos")


def test_masks_that_cannot_be_evaluated_are_one_line(encoder, halves, capsys):
    def fails(message: str, *more: str) -> None:
        assert main(arguments(encoder, halves, *more)) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.search(message, error), error

    fails("of a segmentation must be of knn, linear, got attentive", "--probes", "attentive")
    masks = sorted((halves / "test" / "masks").iterdir())
    for path in masks:
        write(path, np.full((20, 24), 255, dtype=np.uint8))
    fails("the test set must have labelled pixels, got none in 8 images")
    masks[0].unlink()
    fails(r"found no 0 in .*masks \(1 of 8 are missing\)")
    for path in masks:
        write(path, np.zeros((21, 25, 3), dtype=np.uint8))
    fails("none of 8 has both; .*a mask must have one channel")
    (halves / "test" / "masks").rename(halves / "test" / "other")
    fails("expected masks in both sets or in none; folder:.*train has them, folder:.*test none")


def test_options_go_together(encoder, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([str(encoder), "--train", "folder:photos"])
    assert exit_.value.code == 2
    assert "--train, --test and --output go together, got --train alone" in capsys.readouterr().err


def test_what_is_no_encoder_is_one_line(colours, capsys):
    for name in ("missing", str(colours / "train" / "colour 2" / "2.png")):
        assert main(arguments(Path(name), colours)) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_ctrl_c_leaves_nothing_half_written(encoder, colours):
    """While the features are computed, by a command of its own."""
    slow = "import time\nfrom capi.evaluate import features, main\n"
    slow += "prepare = features._prepare\n"
    slow += "features._prepare = lambda *a: (print('begun', flush=True), time.sleep(0.5), prepare(*a))[2]\n"
    slow += "import sys\nsys.exit(main(sys.argv[1:]))\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", slow, *arguments(encoder, colours)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout.readline() == "begun\n"
        time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        _, error = run.communicate(timeout=60)
    assert run.returncode == 130
    assert error.splitlines()[-1] == "stopped"
    assert "Traceback" not in error
    assert not list((colours / "out").rglob("*.*"))
    assert not list((colours / "out" / "features").iterdir())
