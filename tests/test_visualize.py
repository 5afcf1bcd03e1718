"""The command line of the pictures."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import tiniest

from capi import pretrained, train
from capi.export import FORMATS, export
from capi.visualize import __main__ as command
from capi.visualize.__main__ import main
from capi.visualize.masks import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert train.main([*tiniest(folder), "--model.drop_path_rate", "0"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    torch.manual_seed(0)
    paths = []
    for i, image in enumerate(
        [Image.new("RGB", (90, 60), (200, 10, 30)), Image.effect_noise((70, 83), 90), Image.new("P", (64, 64))]
    ):
        paths.append(str(folder / f"{i}.png"))
        image.save(paths[-1])
    return paths


def read(png: Path) -> np.ndarray:
    with Image.open(png) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


OPTIONS = {
    "pca": [["--size", "32"], ["--per-image"], ["--crisp"], ["--finer", "2"], ["--window", "4"]],
    "clusters": [["--size", "32"], ["--window", "4"], ["--prototypes", "3,11"], ["--nearest", "3"]],
    "masks": [["--size", "32"], ["--seed", "1"], ["--ask-all"]],
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_kind_draws_images_of_any_size_the_same_twice_and_its_options_count(
    kind, run, images, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(command, "load_model", cache(load_model))  # Most of the time goes to the configuration.
    output = tmp_path / "drawn.png"
    arguments = [kind, str(run), *images, "--output", str(output)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"wrote {output}\n"
    first = output.read_bytes()
    picture = read(output)
    assert (picture == [200, 10, 30]).all(axis=2).sum() > 5000
    assert picture.std() > 20
    assert main(arguments) == 0
    assert output.read_bytes() == first
    for options in OPTIONS[kind]:
        assert main([*arguments, *options]) == 0
        assert output.read_bytes() != first, options
    assert [path.name for path in tmp_path.iterdir()] == ["drawn.png"]


def test_curves_take_runs(run, tmp_path):
    output = tmp_path / "drawn.PNG"
    assert main(["curves", str(run), str(run / "metrics.jsonl"), "--output", str(output)]) == 0
    assert read(output).std() > 0


def test_images_have_their_own_size_up_to_a_limit(run, tmp_path):
    """The picture itself stands on the sheet, pixel by pixel."""
    pixels = np.random.default_rng(0).integers(0, 256, (61, 333, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "own.png")
    Image.new("RGB", (3000, 20), (9, 8, 7)).save(tmp_path / "large.png")
    output = tmp_path / "drawn.png"
    assert main(["pca", str(run), str(tmp_path / "own.png"), "--output", str(output)]) == 0
    sheet = read(output)
    rows, columns = np.nonzero((sheet[:, :, None] == pixels[0, :3]).all(axis=-1)[:, :, 0])
    assert any(
        (sheet[y : y + 61, x : x + 333] == pixels).all()
        for y, x in zip(rows, columns, strict=True)
        if sheet[y : y + 61, x : x + 333].shape == pixels.shape
    )
    assert main(["pca", str(run), str(tmp_path / "large.png"), "--output", str(output)]) == 0
    rows, columns = np.nonzero((read(output) == [9, 8, 7]).all(axis=2))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (7, 1024)


def test_checkpoints_and_encoders_are_taken(run, images, tmp_path):
    output = tmp_path / "drawn.png"
    checkpoint = str(next((run / "checkpoints").glob("*6")))
    for encoder in (checkpoint, str(run / "encoder.safetensors")):
        assert main(["pca", encoder, *images, "--output", str(output)]) == 0
    for encoder in (checkpoint, str(run / "checkpoints")):
        for kind in ("clusters", "masks"):
            assert main([kind, encoder, *images, "--output", str(output)]) == 0


def test_clusters_are_drawn_of_every_form_of_an_exported_encoder(run, images, tmp_path, monkeypatch):
    forms = FORMATS[:3]  # ONNX alone brings no prototypes.
    for form in forms:
        export(run, form, tmp_path / form)
    drawn = []
    monkeypatch.setattr(
        command, "draw_clusters", lambda _, *given, **__: drawn.append(given) or Image.new("RGB", (1, 1))
    )
    encoders = [run / "checkpoints", run / "encoder.safetensors", *(tmp_path / form for form in forms)]
    for encoder in encoders:
        assert main(["clusters", str(encoder), *images, "--output", str(tmp_path / "drawn.png")]) == 0
    for maps, prototypes in drawn:
        for ours, expected in zip((*maps, *prototypes), (*drawn[0][0], *drawn[0][1]), strict=True):
            assert torch.equal(ours, expected)


def faults(run: Path, images: list[str], tmp_path: Path) -> list[tuple[list[str], str]]:
    png = ["--output", str(tmp_path / "drawn.png")]
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    encoder = str(run / "encoder.safetensors")
    faulty = []
    for kind in ("pca", "clusters", "masks"):
        faulty += [
            ([kind, str(run), str(tmp_path / "text.png"), *png], "text.png cannot be read as an image"),
            ([kind, str(run), images[0], str(tmp_path / "none.png"), *png], "none.png cannot be read as an image"),
            ([kind, str(run), str(tmp_path), *png], "cannot be read as an image"),
            ([kind, str(tmp_path / "none"), *images, *png], "none"),
            ([kind, str(tmp_path / "empty"), *images, *png], "checkpoints/step_*"),
            ([kind, images[0], *images, *png], "cannot be read as weights"),
            ([kind, str(run), *images, "--output", str(tmp_path / "drawn.jpg")], "must end in .png, got"),
            ([kind, str(run), *images, "--output", str(tmp_path / "no" / "drawn.png")], "there is no folder"),
        ]
    bare = tmp_path / "bare.pth"
    torch.save({"backbone": pretrained.load(run).state_dict()}, bare)
    return [
        *faulty,
        (["clusters", str(bare), *images, *png], "bare.pth comes without prototypes"),
        (["clusters", "capi_vitl14_lvd", *images, *png], "expected a run for its student or its prototypes"),
        (["clusters", str(run / "heads.safetensors"), *images, *png], "holds no encoder of CAPI"),
        (["masks", encoder, *images, *png], "an exported encoder without the student that answers"),
        (
            ["masks", "capi_vitl14_lvd", *images, *png],
            "expected a training checkpoint, or the folder of a run with one",
        ),
        (["clusters", str(run), *images, *png, "--prototypes", "16"], "prototypes must be from 0 to 15, got 16"),
        (["pca", str(run), *images, *png, "--finer", "3"], "must divide the patch size 4, got 3"),
        (["masks", str(run), *images, *png, "--size", "30"], "multiples of the patch size 4"),
        (["curves", str(tmp_path / "empty"), *png], "expected a run's folder or its metrics.jsonl"),
        (["curves", str(run), str(tmp_path / "none"), *png], "expected a run's folder or its metrics.jsonl"),
    ]


def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(run, images, tmp_path, capsys):
    for arguments, message in faults(run, images, tmp_path):
        assert main(arguments) == 1, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: "), arguments
        assert message in error, arguments
        assert error.count("\n") == 1, error
    assert not list(tmp_path.glob("*drawn*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: KIND"),
        (["pcaa", "a", "b.png", "--output", "c.png"], "invalid choice: 'pcaa'"),
        (["pca", "a", "b.png"], "the following arguments are required: --output"),
        (["pca", "a", "--output", "c.png"], "the following arguments are required: IMAGE"),
        (["pca", "a", "b.png", "--output", "c.png", "--size", "0"], "expected a whole number of at least 1, got 0"),
        (["clusters", "a", "b.png", "--output", "c.png", "--prototypes", "3;4"], "expected numbers with commas"),
        (["curves", "--output", "c.png"], "the following arguments are required: RUN"),
    ],
)
def test_a_wrong_use_is_said_with_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_picture_that_was_there_stays_as_it_was_where_a_new_one_fails(run, images, tmp_path, monkeypatch, capsys):
    output = tmp_path / "drawn.png"
    output.write_text("the old one")

    def save_with(error: BaseException):
        def save(self, file, **_):
            Path(file).write_text("half a")
            raise error

        return save

    for error, status, word in ((KeyboardInterrupt(), 130, "interrupted"), (OSError(28, "disk full"), 1, "disk full")):
        monkeypatch.setattr(Image.Image, "save", save_with(error))
        assert main(["pca", str(run), *images, "--output", str(output)]) == status
        assert word in capsys.readouterr().err
        assert output.read_text() == "the old one"
        assert [path.name for path in tmp_path.iterdir()] == ["drawn.png"]


def test_an_interruption_on_the_way_leaves_nothing(run, images, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "feature_map", interrupt)
    assert main(["pca", str(run), *images, "--output", str(tmp_path / "drawn.png")]) == 130
    assert capsys.readouterr().err == "interrupted: no picture was written\n"
    assert not list(tmp_path.iterdir())
