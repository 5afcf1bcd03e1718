import math

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import nn

from capi import evaluate
from capi.checkpoint import save_encoder
from capi.config import Config, load_config, to_yaml
from capi.evaluate import (
    accuracy,
    evaluate_synthetic,
    extract_features,
    format_table,
    knn_predict,
    main,
    mean_iou,
    patch_labels,
)
from capi.model import CAPI


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


class Patches(nn.Module):
    """Maps images to their own patches, as a backbone does to features."""

    def __init__(self, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        p = self.patch_size
        feature_map = self.scale * rearrange(images, "b c (h p) (w q) -> b h w (c p q)", p=p, q=p)
        return feature_map.mean((1, 2)), feature_map[:, 0], feature_map


def test_features_are_those_of_normalised_images_whatever_the_batch():
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    global_repr, feature_map = extract_features(Patches(4), images, batch_size=2)
    pixels = (images.double() / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None].double()) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None].double()
    # The corner pixel of patch (1, 0), in all channels.
    torch.testing.assert_close(feature_map[:, 1, 0, ::16].double(), pixels[:, :, 4, 0], rtol=1e-5, atol=1e-6)
    assert feature_map.shape == (5, 2, 2, 48)
    assert not feature_map.requires_grad
    torch.testing.assert_close(global_repr, feature_map.mean((1, 2)))
    torch.testing.assert_close(extract_features(Patches(4), images)[1], feature_map)


@pytest.fixture
def small(monkeypatch) -> Config:
    """A small evaluation of small images."""
    for name, value in {"BANK_IMAGES": 256, "QUERY_IMAGES": 128, "BANK_PATCHES": 1024, "QUERY_PATCHES": 512}.items():
        monkeypatch.setattr(evaluate, f"_{name}", value)
    size = ["--data.image_size", "16", "--model.patch_size", "4", "--model.embed_dim", "16", "--model.num_heads", "1"]
    return load_config(["--config", "tiny", *size])


class Constant(Patches):
    def forward(self, images):
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
    monkeypatch.setattr(evaluate, "SyntheticScenes", ColouredScenes)
    results = evaluate_synthetic(small, {"patches": Patches(4), "constant": Constant(4)})
    for name in ("patches", "raw pixels"):
        assert results[name]["patch_accuracy"] == 1
        assert results[name]["patch_miou"] == 1
    assert results["constant"]["patch_accuracy"] < 0.25


def test_held_out_scenes_are_no_training_scenes(small):
    bank, queries, training = (
        evaluate._scenes(32, 16, seed)[0] for seed in (evaluate._BANK_SEED, evaluate._QUERY_SEED, small.run.seed)
    )
    for one, other in (bank, queries), (bank, training), (queries, training):
        assert not (one[:, None] == other[None]).all(dim=(2, 3, 4)).any()


def test_table_has_a_row_a_feature():
    row = {"image_accuracy": 0.5, "patch_accuracy": 0.25, "patch_miou": 0.125}
    table = format_table({"trained": row, "raw pixels": dict.fromkeys(row, 1.0)}).splitlines()
    assert len(table) == 4
    assert table[2] == "| trained | 0.500 | 0.250 | 0.125 |"
    assert table[3] == "| raw pixels | 1.000 | 1.000 | 1.000 |"


def test_a_run_folder_is_evaluated_from_its_files(small, tmp_path, capsys):
    torch.manual_seed(5)
    trained = CAPI(small.model, small.clustering).init_weights()
    with torch.no_grad():
        for parameter in trained.student_ema.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_encoder(tmp_path / "encoder.safetensors", trained.student_ema, small.model)
    (tmp_path / "config.yaml").write_text(to_yaml(small))
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    torch.manual_seed(small.run.seed)
    untrained = CAPI(small.model, small.clustering).init_weights().student.backbone
    backbones = {"trained": trained.student_ema.backbone.eval(), "untrained": untrained.eval()}
    assert format_table(evaluate_synthetic(small, backbones)) in printed
    assert len(set(printed.splitlines()[4:6])) == 2


def test_an_unfinished_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert f"expected config.yaml of a finished training in {tmp_path}, found none" in capsys.readouterr().err
