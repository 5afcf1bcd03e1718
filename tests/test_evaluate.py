import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from einops import rearrange
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from capi import pretrained
from capi.checkpoint import save_checkpoint, save_encoder
from capi.config import Config, load_config, to_yaml
from capi.evaluate import (
    accuracy,
    evaluate_synthetic,
    format_table,
    knn_predict,
    main,
    mean_iou,
    patch_labels,
    synthetic,
)
from capi.evaluate.probes import Grid
from capi.model import CAPI, normalize_images


def knn_by_hand(bank, labels, query, n_classes, k, temperature) -> int:
    similarities = [float(torch.dot(b, query) / (b.norm() * query.norm())) for b in bank]
    nearest = sorted(range(len(bank)), key=lambda i: -similarities[i])[:k]
    votes = [sum(math.exp(similarities[i] / temperature) for i in nearest if labels[i] == c) for c in range(n_classes)]
    return votes.index(max(votes))


@pytest.mark.parametrize("k", [1, 7, 100])
def test_knn_votes_as_defined(k):
    generator = torch.Generator().manual_seed(k)
    bank, queries = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (60, 40))
    labels = torch.randint(4, (60,), generator=generator)
    predicted = knn_predict(bank, labels, queries, 4, k=k, temperature=0.1)
    assert predicted.tolist() == [knn_by_hand(bank, labels, query, 4, min(k, 60), 0.1) for query in queries]


def test_knn_goes_by_direction_and_weighs_by_similarity():
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    labels = torch.tensor([0, 1, 1])
    query = torch.tensor([[5.0, 0.0]])
    # One neighbour at similarity 1 against two at 0.8: the near one wins if exp(0.2 / temperature) > 2.
    assert knn_predict(bank, labels, query, 2, k=3, temperature=0.2).item() == 0
    assert knn_predict(bank, labels, query, 2, k=3, temperature=0.4).item() == 1
    lengths = torch.tensor([[0.1], [100.0], [1.0]])
    assert knn_predict(bank * lengths, labels, query, 2, k=3, temperature=0.2).item() == 0


def test_knn_takes_many_queries():
    bank = torch.eye(3)
    queries = bank.repeat(1000, 1)
    assert torch.equal(knn_predict(bank, torch.arange(3), queries, 3), torch.arange(3).repeat(1000))


def test_accuracy_and_mean_iou_of_a_worked_example():
    labels, predicted = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 0, 1, 1, 1, 0])
    assert accuracy(predicted, labels) == pytest.approx(4 / 6)
    # Class 0: 2 of 4, class 1: 2 of 3, class 3: 0 of 1; class 2 never occurs.
    assert mean_iou(predicted, labels, 4) == pytest.approx((2 / 4 + 2 / 3 + 0) / 3)
    assert mean_iou(labels, labels, 4) == 1


def test_patch_labels_are_majorities():
    labels = torch.zeros(1, 4, 6, dtype=torch.int64)
    labels[0, :2, 2:4] = torch.tensor([[1, 1], [2, 1]])
    labels[0, 2:, 4:] = 2
    labels[0, 3, 0] = 1
    assert patch_labels(labels, 2, 3).tolist() == [[[0, 1, 0], [0, 0, 2]]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type(dtype):
    labels = torch.tensor([0, 130, 199, 130]).to(torch.uint8)
    bank = torch.eye(4)
    assert knn_predict(bank, labels.to(dtype), bank, 200, k=1).tolist() == [0, 130, 199, 130]
    assert mean_iou(labels.to(dtype), labels.to(dtype), 200) == 1
    assert accuracy(labels.to(dtype), labels.to(dtype), 200) == 1
    assert patch_labels(labels.to(dtype).view(1, 2, 2), 2, 200).tolist() == [[[130]]]


@pytest.mark.parametrize("mark", [-1, 255])
def test_what_is_not_labelled_is_left_out(mark):
    labels, predicted = torch.tensor([0, 1, mark, 1]), torch.tensor([0, 1, 1, 0])
    assert accuracy(predicted, labels, 2) == pytest.approx(2 / 3)
    assert mean_iou(predicted, labels, 2) == pytest.approx((1 / 2 + 1 / 2) / 2)
    bank = torch.tensor([[0.9, 0.1], [0.0, 1.0], [1.0, 0.0]])
    # The nearest item has no label, and neither votes nor takes the place of one that has.
    assert knn_predict(bank, torch.tensor([1, 0, mark]), bank[2:], 2, k=1).item() == 1
    pixels = torch.tensor([[[mark, mark, mark, mark], [mark, 1, mark, mark]]])
    assert patch_labels(pixels, 2, 2).tolist() == [[[1, -1]]]


def test_255_is_a_class_where_there_are_more():
    labels = torch.tensor([255, 3])
    assert accuracy(torch.tensor([255, 0]), labels, 300) == 0.5
    assert mean_iou(labels, labels, 300) == 1
    assert knn_predict(torch.eye(2), labels, torch.eye(2), 300, k=1).tolist() == [255, 3]


def test_labels_and_predictions_that_are_no_class():
    labels, wrong = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3])
    features = torch.eye(3)
    for refused in (
        lambda: mean_iou(labels, wrong, 3),
        lambda: knn_predict(features, wrong, features, 3),
        lambda: accuracy(labels, wrong, 3),
        lambda: patch_labels(wrong.view(1, 1, 3), 1, 3),
    ):
        with pytest.raises(ValueError, match=r"labels must be classes from 0 to 2, or -1 or 255 .*; got 3"):
            refused()
    for predicted in (wrong, wrong - 1):
        with pytest.raises(ValueError, match="predictions must be classes from 0 to 2, got"):
            mean_iou(predicted, labels, 3)
    for refused in (
        lambda: mean_iou(labels, labels * 0 - 1, 3),
        lambda: accuracy(labels, labels * 0 - 1),
        lambda: knn_predict(features, labels * 0 + 255, features, 3),
    ):
        with pytest.raises(ValueError, match="at least one labelled item"):
            refused()
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        knn_predict(features, labels, features, 3, k=0)


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that an operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


def test_labels_of_patches_take_the_memory_of_some_images():
    """Of all at once, one-hot, these would take 0.6 GB, and 2048 images 13 GB."""
    pixels = torch.randint(0, 16, (100, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with LargestTensor() as largest:
        labels = patch_labels(pixels, 14, 16)
    assert largest.bytes < 2**26
    first = pixels[90, 14:28, 28:42].flatten().long().bincount(minlength=16)
    assert labels.shape == (100, 16, 16)
    assert labels[90, 1, 2] == first.argmax()


class Patches(nn.Module):
    """Maps images to their own patches, as a backbone does to features."""

    def __init__(self, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images, resize=None):
        p = self.patch_size
        feature_map = self.scale * rearrange(normalize_images(images), "b c (h p) (w q) -> b h w (c p q)", p=p, q=p)
        return feature_map.mean((1, 2)), feature_map[:, 0], feature_map


@pytest.fixture
def small(monkeypatch) -> Config:
    """A small evaluation of small images."""
    for name, value in {"BANK_IMAGES": 256, "QUERY_IMAGES": 128, "BANK_PATCHES": 1024, "QUERY_PATCHES": 512}.items():
        monkeypatch.setattr(synthetic, f"_{name}", value)
    monkeypatch.setattr(synthetic, "_GRID", Grid((1e-1,), (0.0,), iterations=25))
    size = ["--data.image_size", "16", "--model.patch_size", "4", "--model.embed_dim", "16", "--model.num_heads", "1"]
    return load_config(["--config", "tiny", *size])


class Constant(Patches):
    def forward(self, images, resize=None):
        return tuple(torch.ones_like(feature) for feature in super().forward(images))


def test_evaluation_tells_good_features_from_none(small):
    results = evaluate_synthetic(small, {"patches": Patches(4), "constant": Constant(4)})
    assert list(results) == ["patches", "constant", "raw pixels"]
    assert results["patches"]["patch_accuracy"] == results["raw pixels"]["patch_accuracy"]
    assert results["patches"]["patch_miou"] == results["raw pixels"]["patch_miou"]
    for key in ("image_accuracy", "patch_accuracy", "patch_miou"):
        assert results["constant"][key] < 0.25
        assert results["raw pixels"][key] > results["constant"][key] + 0.05
        assert results["patches"][key] == evaluate_synthetic(small, {"again": Patches(4)})["again"][key]


class ColouredScenes:
    """Stripes of labels, each shown in a colour of its own."""

    def __init__(self, size: int, image_size: int, seed: int):
        self.image_size, self.seed = image_size, seed

    def labelled(self, index: int):
        rng = np.random.default_rng((self.seed, index))
        labels = np.repeat(rng.integers(8, size=(self.image_size // 4, 1)), 4, axis=0).repeat(self.image_size, axis=1)
        colours = np.array([[255 * (label >> bit & 1) for bit in range(3)] for label in range(8)], dtype=np.uint8)
        return colours[labels], int(labels[0, 0]), labels


def test_a_patch_is_compared_with_its_own_label(small, monkeypatch):
    monkeypatch.setattr(synthetic, "SyntheticScenes", ColouredScenes)
    results = evaluate_synthetic(small, {"patches": Patches(4), "constant": Constant(4)})
    for name in ("patches", "raw pixels"):
        assert results[name]["patch_accuracy"] == 1
        assert results[name]["patch_miou"] == 1
    assert results["constant"]["patch_accuracy"] < 0.25


def test_held_out_scenes_are_no_training_scenes(small):
    bank, queries, training = (
        synthetic._scenes(32, 16, seed)[0] for seed in (synthetic._BANK_SEED, synthetic._QUERY_SEED, small.run.seed)
    )
    for one, other in (bank, queries), (bank, training), (queries, training):
        assert not (one[:, None] == other[None]).all(dim=(2, 3, 4)).any()


def test_table_has_a_row_a_feature():
    row = {"image_accuracy": 0.5, "image_linear": 0.75, "patch_accuracy": 0.25, "patch_miou": 0.125}
    table = format_table({"trained": row, "raw pixels": dict.fromkeys(row, 1.0)}).splitlines()
    assert len(table) == 4
    assert table[2] == "| trained | 0.500 | 0.750 | 0.250 | 0.125 |"
    assert table[3] == "| raw pixels | 1.000 | 1.000 | 1.000 | 1.000 |"


@pytest.fixture
def smallest(small, monkeypatch) -> Config:
    for name, value in {"BANK_IMAGES": 48, "QUERY_IMAGES": 32, "BANK_PATCHES": 256, "QUERY_PATCHES": 128}.items():
        monkeypatch.setattr(synthetic, f"_{name}", value)
    return small


def write_run(run_dir: Path, config: Config) -> tuple[CAPI, str]:
    """A checkpoint and a configuration as training leaves them, and the table of its moving average."""
    torch.manual_seed(5)
    model = CAPI(config.model, config.clustering).init_weights()
    with torch.no_grad():
        for parameter in model.student_ema.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = {"step": 3, "trainer": {"model": model.state_dict()}, "config": yaml.safe_load(to_yaml(config))}
    save_checkpoint(run_dir, 3, state, keep=1)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    torch.manual_seed(config.run.seed)
    untrained = CAPI(config.model, config.clustering).init_weights().student.backbone.eval()
    return model, format_table(
        evaluate_synthetic(config, {"trained": model.student_ema.backbone.eval(), "untrained": untrained})
    )


def test_a_run_folder_a_checkpoint_and_an_encoder_give_one_table(smallest, tmp_path, capsys):
    model, table = write_run(tmp_path, smallest)
    assert main([str(tmp_path), str(tmp_path / "checkpoints" / "step_000000003")]) == 0
    assert capsys.readouterr().out.count(table) == 2
    assert len(set(table.splitlines()[2:4])) == 2
    save_encoder(tmp_path / "encoder.safetensors", model.student_ema, smallest.model)
    shutil.rmtree(tmp_path / "checkpoints" / "step_000000003")
    assert main([str(tmp_path), str(tmp_path / "encoder.safetensors")]) == 0
    assert capsys.readouterr().out.count(table) == 2


def test_an_encoder_alone_is_evaluated_at_the_size_that_is_asked_for(smallest, tmp_path, capsys):
    model, table = write_run(tmp_path / "run", smallest)
    save_encoder(tmp_path / "moved.safetensors", model.student_ema, smallest.model)
    assert main([str(tmp_path / "moved.safetensors"), "--image_size", "16"]) == 0
    printed = capsys.readouterr().out.splitlines()
    # The untrained encoder is another: the run's seed and prototypes, which decide on its weights, are not known.
    rows = [row for row in table.splitlines() if "untrained" not in row]
    assert [row for row in printed if row in rows] == rows
    weights = pretrained.read(tmp_path / "moved.safetensors")
    assert pretrained.configuration_of(weights).data.image_size == 16 * smallest.model.patch_size


def test_what_cannot_be_evaluated_is_one_line(smallest, tmp_path, capsys):
    model, _ = write_run(tmp_path / "run", smallest)
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.pth").write_text("<html>")
    other, text = tmp_path / "other", tmp_path / "text"
    for folder, config in (other, to_yaml(load_config([]))), (text, "no configuration"):
        folder.mkdir()
        save_encoder(folder / "encoder.safetensors", model.student_ema, smallest.model)
        (folder / "config.yaml").write_text(config)
    for arguments, message in (
        ([tmp_path / "empty"], f"expected encoder.safetensors or checkpoints/step_* in {tmp_path / 'empty'}, found"),
        ([tmp_path / "page.pth"], "an HTML or XML page"),
        ([tmp_path / "run", "--image_size", "18"], "the image size must be a multiple of the patch size 4, got 18"),
        ([other], "do not fit the model configuration: it says patch_size 8, they have 4"),
        ([text], "must hold the configuration of a run, got no configuration"),
    ):
        assert main([str(argument) for argument in arguments]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
