import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from capi.checkpoint import save_encoder
from capi.config import ModelConfig
from capi.metrics import read_metrics
from capi.model import Student
from capi.visualize import _curves, _principal_colours, main, plot_curves, plot_pca_maps


def read(png: Path) -> np.ndarray:
    with Image.open(png) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def write_metrics(path: Path, **changed: list[float | None]) -> Path:
    columns = {
        "loss": [4.0, 3.0, 2.0],
        "clustering_loss": [3.0, 2.0, 1.0],
        "target_entropy": [0.5, 0.6, 0.5],
        "target_entropy_floor": [0.1, 0.1, 0.1],
        "positional_mi": [0.02, 0.03, 0.02],
        "positional_mi_floor": [0.02, 0.02, 0.02],
        "lr": [0.0, 1e-3, 5e-4],
        "clustering_lr": [0.0, 5e-4, 2e-4],
        "momentum": [1.0, 0.99, 0.995],
        "images_per_second": [100.0, 120.0, 110.0],
        **changed,
    }
    lines = [{"step": 10 * i, **{key: values[i] for key, values in columns.items()}} for i in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_every_curve_is_drawn_once(tmp_path):
    lines = read_metrics(write_metrics(tmp_path / "m.jsonl"))
    drawn = [line for axes in _curves(lines).axes for line in axes.get_lines()]
    expected = [[line[key] for line in lines] for key in lines[0] if key != "step"]
    assert sorted(list(line.get_ydata()) for line in drawn) == sorted(expected)
    assert all(list(line.get_xdata()) == [0, 10, 20] for line in drawn)


def test_what_is_missing_or_was_not_finite_is_left_out(tmp_path):
    lines = read_metrics(write_metrics(tmp_path / "m.jsonl", loss=[4.0, None, 2.0], positional_mi=[None] * 3))
    losses, _, information = _curves(lines).axes[:3]
    assert list(losses.get_lines()[0].get_ydata()) == [4.0, 2.0]
    assert list(losses.get_lines()[0].get_xdata()) == [0, 20]
    assert len(information.get_lines()) == 1


def test_the_picture_of_the_curves_is_written(tmp_path):
    plot_curves(write_metrics(tmp_path / "m.jsonl"), tmp_path / "curves.png")
    picture = read(tmp_path / "curves.png")
    assert min(picture.shape[:2]) >= 600
    # The default blue and orange of matplotlib.
    for colour in [31, 119, 180], [255, 127, 14]:
        assert (picture == colour).all(axis=2).sum() > 200


def test_curves_need_a_line(tmp_path):
    (tmp_path / "m.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no line of metrics"):
        plot_curves(tmp_path / "m.jsonl", tmp_path / "curves.png")


def test_colours_are_joint_over_the_images_and_fill_the_range():
    features = np.random.default_rng(0).normal(size=(2, 4, 5, 8)).astype(np.float32)
    features[1, 0, 0] = features[0, 3, 4]
    colours = _principal_colours(features)
    assert colours.shape == (2, 4, 5, 3)
    assert colours.min() == 0
    assert colours.max() == 1
    np.testing.assert_allclose(colours[1, 0, 0], colours[0, 3, 4], rtol=0, atol=1e-12)


def test_colours_follow_the_directions_of_largest_spread():
    rng = np.random.default_rng(1)
    latent = rng.uniform(-1, 1, size=(200, 3)) * [9, 3, 1]
    directions, _ = np.linalg.qr(rng.normal(size=(16, 16)))
    features = latent @ directions[:, :3].T + rng.normal(size=16) + 0.01 * rng.normal(size=(200, 16))
    colours = _principal_colours(features.reshape(1, 10, 20, 16)).reshape(200, 3)
    for channel in range(3):
        # The sign of a component is arbitrary.
        assert abs(np.corrcoef(colours[:, channel], latent[:, channel])[0, 1]) > 0.98


@pytest.mark.parametrize("dim", [1, 2, 3, 8])
def test_constant_features_are_grey(dim):
    features = np.full((2, 3, 3, dim), 7.3, dtype=np.float32)
    np.testing.assert_array_equal(_principal_colours(features), np.full((2, 3, 3, 3), 0.5))


def test_fewer_dimensions_than_colours():
    colours = _principal_colours(np.arange(8, dtype=np.float32).reshape(1, 2, 4, 1))
    assert colours[..., 0].min() == 0
    assert colours[..., 0].max() == 1
    np.testing.assert_array_equal(colours[..., 1:], np.full((1, 2, 4, 2), 0.5))


@pytest.mark.parametrize("n_images", [1, 5])
def test_every_image_stands_beside_its_map(tmp_path, n_images):
    images = torch.zeros(n_images, 3, 8, 8, dtype=torch.uint8)
    images[:, 0], images[:, 1] = 200, torch.arange(n_images, dtype=torch.uint8)[:, None, None] * 40
    images[:, 2, :4] = 90
    maps = torch.zeros(n_images, 2, 2, 4)
    maps[..., 0] = torch.arange(n_images).square()[:, None, None]
    maps[:, 0, 1, 1] = 40
    plot_pca_maps(images, maps, tmp_path / "maps.png")
    picture = read(tmp_path / "maps.png")
    colours = np.round(_principal_colours(maps.numpy()) * 255)
    for i in range(n_images):
        upper, lower = ((picture == [200, 40 * i, blue]).all(axis=2) for blue in (90, 0))
        rows, columns = np.nonzero(upper | lower)
        top, left, height, width = rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1
        assert abs(height - width) <= 2
        assert (upper | lower)[top : top + height, left : left + width].mean() > 0.95
        assert np.nonzero(upper)[0].max() <= np.nonzero(lower)[0].min()
        # The map is as large as the image and follows it after a small gap.
        beside = picture[:, left + width + 20 : left + 2 * width - 2]
        for row, column in (0, 0), (0, 1), (1, 0), (1, 1):
            shown = beside[top + height // 4 + row * height // 2, width // 4 - 10 + column * width // 2]
            assert np.abs(shown - colours[i, row, column]).max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_maps_of_any_precision_also_with_a_gradient(tmp_path, dtype):
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    plot_pca_maps(images, torch.randn(1, 2, 2, 4).to(dtype).requires_grad_(), tmp_path / "maps.png")
    assert read(tmp_path / "maps.png").std() > 0


def test_what_cannot_be_drawn(tmp_path):
    images, maps = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.randn(2, 2, 2, 4)
    with pytest.raises(TypeError, match=r"images must be torch.uint8, got torch.float32"):
        plot_pca_maps(images.float(), maps, tmp_path / "maps.png")
    with pytest.raises(ValueError, match="as many images as feature maps, got 0 and 0"):
        plot_pca_maps(images[:0], maps[:0], tmp_path / "maps.png")
    maps[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="must be finite"):
        plot_pca_maps(images, maps, tmp_path / "maps.png")
    assert not (tmp_path / "maps.png").exists()


SHAPE = ModelConfig(patch_size=4, embed_dim=16, num_heads=2, encoder_depth=2, predictor_depth=1, n_registers=4)


def test_the_command_line_draws_images_of_any_size(tmp_path, capsys):
    torch.manual_seed(0)
    student = Student(SHAPE, 8)
    student.backbone.init_weights()
    student.head.init_weights()
    save_encoder(tmp_path / "encoder.safetensors", student, SHAPE)
    images = [Image.new("RGB", (90, 60), (200, 10, 30)), Image.effect_noise((70, 80), 90), Image.new("P", (64, 64))]
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    arguments = [str(tmp_path), *paths, "--output", str(tmp_path / "maps.png")]
    assert main(arguments) == 0
    assert "wrote" in capsys.readouterr().out
    picture = read(tmp_path / "maps.png")
    assert (picture == [200, 10, 30]).all(axis=2).sum() > 5000
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 300
    first = (tmp_path / "maps.png").read_bytes()
    assert main([*arguments, "--image_size", "64"]) == 0
    assert (tmp_path / "maps.png").read_bytes() == first
    assert main([*arguments, "--image_size", "32"]) == 0
    assert (tmp_path / "maps.png").read_bytes() != first

    (tmp_path / "3.png").write_text("no image")
    for faulty, message in (
        ([str(tmp_path), str(tmp_path / "3.png"), *arguments[-2:]], "3.png cannot be read as an image"),
        ([str(tmp_path), str(tmp_path / "4.png"), *arguments[-2:]], "4.png"),
        ([str(tmp_path / "none"), *arguments[1:]], "expected the path of"),
        ([*arguments, "--image_size", "30"], "must be a multiple of the patch size 4, got 30"),
        ([*arguments[:-1], str(tmp_path / "no" / "maps.png")], "maps.png"),
    ):
        assert main(faulty) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
