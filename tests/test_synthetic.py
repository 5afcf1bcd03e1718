import numpy as np
import pytest
import torch

from capi.data import synthetic
from capi.data.synthetic import TEXTURES, SyntheticScenes
from capi.evaluate import accuracy, knn_predict

N_CLASSES = len(TEXTURES)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, int, np.ndarray]]:
    source = SyntheticScenes(1536, 32, seed=3)
    return [source.labelled(i) for i in range(len(source))]


def knn_accuracy(features: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Accuracy of standardised `features` on their second half, and the largest that chance makes likely."""
    features = torch.from_numpy((features - features.mean(0)) / features.std(0)).float()
    # A constant and the square make nearest by cosine the same as nearest by distance.
    features = torch.cat([features, torch.ones(len(features), 1), -features.square().sum(1, keepdim=True) / 2], dim=1)
    labels, half = torch.from_numpy(labels), len(labels) // 2
    chance = float(torch.bincount(labels[half:]).max()) / (len(labels) - half)
    predicted = knn_predict(features[:half], labels[:half], features[half:], N_CLASSES)
    return accuracy(predicted, labels[half:]), chance + 4 * (chance * (1 - chance) / half) ** 0.5


def test_a_scene_depends_on_seed_and_index_alone():
    few, many = SyntheticScenes(10, 24, seed=5), SyntheticScenes(1000, 24, seed=5)
    many.labelled(999)
    for index in (9, 0):
        for one, other in zip(few.labelled(index), many.labelled(index), strict=True):
            np.testing.assert_array_equal(one, other)
    assert (few.image(1) != few.image(2)).mean() > 0.5
    assert (few.image(1) != SyntheticScenes(10, 24, seed=6).image(1)).mean() > 0.5


def test_shapes_types_and_ranges(scenes):
    image, class_label, pixel_labels = scenes[0]
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert type(class_label) is int
    assert pixel_labels.shape == (32, 32)
    assert pixel_labels.dtype == np.int64
    assert len(SyntheticScenes(7, 16)) == 7
    np.testing.assert_array_equal(SyntheticScenes(1536, 32, seed=3).image(0), image)


def test_classes_are_balanced_and_every_scene_has_objects(scenes):
    classes = np.bincount([s[1] for s in scenes], minlength=N_CLASSES)
    # Four standard deviations of a uniform draw.
    expected = len(scenes) / N_CLASSES
    assert np.abs(classes - expected).max() < 4 * np.sqrt(expected)
    n_textures = np.array([len(np.unique(s[2])) for s in scenes])
    assert n_textures.min() >= 1
    assert n_textures.max() == 5
    assert 2.5 < n_textures.mean() < 4


def test_the_class_is_the_texture_of_the_large_central_object(scenes):
    assert all((labels[15:17, 15:17] == label).all() for _, label, labels in scenes)
    shares = [(labels == label).mean() for _, label, labels in scenes]
    assert min(shares) > 0.25
    assert np.mean(shares) > 0.4


def test_the_central_object_is_never_covered(monkeypatch):
    def shape(x, y, radius, rng):
        """A small disc in the centre, and other objects that cover everything."""
        return x * x + y * y < 36 if radius > 10 else np.ones(x.shape, dtype=bool)

    monkeypatch.setattr(synthetic, "_shape", shape)
    scenes = SyntheticScenes(32, 32)
    for _, label, labels in map(scenes.labelled, range(32)):
        assert (labels[15:17, 15:17] == label).all()
        assert (labels == label).sum() >= 100


def test_a_scene_looks_the_same_at_every_resolution():
    small, large = SyntheticScenes(64, 24, seed=1), SyntheticScenes(64, 48, seed=1)
    agreement, correlations = [], []
    for index in range(64):
        image, label, labels = small.labelled(index)
        large_image, large_label, large_labels = large.labelled(index)
        assert label == large_label
        agreement.append((labels == large_labels[::2, ::2]).mean())
        coarse = large_image[..., 0].reshape(24, 2, 24, 2).mean(axis=(1, 3))
        correlations.append(np.corrcoef(coarse.ravel(), image[..., 0].ravel())[0, 1])
    assert np.mean(agreement) > 0.9
    assert np.mean(correlations) > 0.5


def test_mean_and_spread_of_grey_do_not_tell_the_class(scenes):
    """Over an image, and over what each texture covers of one."""
    images = np.stack([s[0] for s in scenes]).astype(np.float64)
    classes = np.array([s[1] for s in scenes])
    of_images = np.concatenate([images.mean((1, 2))[:, :1], images.std((1, 2))[:, :1]], axis=1)
    parts = [(image[labels == t], t) for image, _, labels in scenes for t in np.unique(labels)]
    parts = [(grey, t) for grey, t in parts if len(grey) >= 3 * 64]
    of_parts = np.array([[grey.mean(), grey.std()] for grey, _ in parts])
    for features, labels in (
        (of_images[:, :1], classes),
        (of_images, classes),
        (of_parts, np.array([t for _, t in parts])),
    ):
        measured, likely = knn_accuracy(features, labels)
        print(measured, likely)
        assert measured < likely


def test_mean_grey_of_a_patch_hardly_tells_its_texture(scenes):
    """The pixels of a 4-pixel patch are correlated, so its mean says a little; its pattern says far more."""
    patches, labels = [], []
    for image, _, pixel_labels in scenes[:512]:
        rows = image[..., 0].reshape(8, 4, 8, 4).swapaxes(1, 2).reshape(64, 16)
        textures = pixel_labels.reshape(8, 4, 8, 4).swapaxes(1, 2).reshape(64, 16)
        pure = (textures == textures[:, :1]).all(axis=1)
        patches.append(rows[pure])
        labels.append(textures[pure, 0])
    patches, labels = np.concatenate(patches).astype(np.float64), np.concatenate(labels)
    by_mean, _ = knn_accuracy(patches.mean(axis=1, keepdims=True), labels)
    by_pattern, _ = knn_accuracy(patches, labels)
    assert by_mean < 0.25
    assert by_pattern > 0.4


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_is_refused(index):
    with pytest.raises(IndexError, match=rf"scene index must be in \[0, 4\), got {index}"):
        SyntheticScenes(4, 16).image(index)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        SyntheticScenes(0, 16)
    with pytest.raises(ValueError, match="image_size must be at least 8 pixels, got 4"):
        SyntheticScenes(4, 4)
