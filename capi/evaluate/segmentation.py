"""Segmentation by the frozen features of patches: k-NN and logistic regression.

The authors' protocol (their `eval_segmentation.py`): features standardised by the training set; k and distance, or C,
chosen by the mean IoU on a tenth of the training images, and the whole of it for the prediction. A patch is trained on
by the most frequent class of its pixels; logistic regression gives all its pixels one class, k-NN each of them what is
most frequent at its place in the neighbours' patches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, Int16
from numpy import ndarray
from torch import Tensor

from capi.evaluate.features import Features
from capi.evaluate.intervals import bootstrap_interval
from capi.evaluate.knn import Distance, nearest
from capi.evaluate.logistic import fit_logistic
from capi.evaluate.scores import patch_labels

PROBES = ("knn", "linear")
KNN_GRID: tuple[tuple[int, Distance], ...] = tuple(product((1, 3, 10, 30), ("cosine", "L2")))
INVERSE_PENALTIES = tuple(float(c) for c in 10 ** np.linspace(-6, 5, 8))
_VALIDATION = 0.1
_SEED = 42
_CHUNK = 1024


@dataclass(frozen=True)
class Patches:
    """Patches with a label: those without one, that is without a labelled pixel, neither teach nor count."""

    x: Float[Tensor, "patches dim"]
    """Features, standardised."""
    pixels: Int16[Tensor, "patches pixels"]
    """Classes, -1 where there is none."""
    y: Int[Tensor, "patches"]
    """The most frequent class of the pixels."""
    image: Int[Tensor, "patches"]
    """Places of their images, ascending."""

    def of_images(self, start: int, stop: int) -> "Patches":
        """Views of the patches of these images."""
        begin, end = torch.searchsorted(self.image, torch.tensor([start, stop], device=self.image.device)).tolist()
        return Patches(*(getattr(self, name)[begin:end] for name in ("x", "pixels", "y", "image")))


def segment(
    train: Features,
    test: Features,
    probes: Sequence[str],
    *,
    patch_size: int,
    names: Sequence[str],
    device: torch.device,
    watch: Callable[[], None] = lambda: None,
) -> list[dict]:
    """For every probe: mean IoU over the classes that occur, its interval over images, pixel accuracy, IoU by class.

    Raises:
        ValueError: fewer than two images or classes to train on, or no labelled pixel to test on.
    """
    n_classes = int(max(train.labels.max(), test.labels.max())) + 1
    if len(train) < 2:
        raise ValueError(f"a probe needs at least two training images, got {len(train)}")
    if not (test.labels >= 0).any():
        raise ValueError(f"the test set must have labelled pixels, got none in {len(test)} images")
    if len(torch.unique(train.labels[train.labels >= 0])) < 2:
        raise ValueError("the masks of the training set must have pixels of at least two classes")
    order = torch.from_numpy(np.random.default_rng(_SEED).permutation(len(train)))
    n_fit = len(train) - max(1, int(_VALIDATION * len(train)))
    mean, scale = _standard(train.patches[order[:n_fit], 0].flatten(0, 1).to(device))

    def patches(part: Features, images: Tensor) -> Patches:
        pixels = part.labels[images]
        y = patch_labels(pixels, patch_size, n_classes).flatten()
        pixels = rearrange(pixels, "b (h p) (w q) -> (b h w) (p q)", p=patch_size, q=patch_size)
        x = part.patches[images, 0].flatten(0, 1)
        image = torch.arange(len(images)).repeat_interleave(len(x) // len(images))
        pixels, y, x, image = (tensor[y >= 0].to(device) for tensor in (pixels, y, x, image))
        return Patches(x.float().sub_(mean).div_(scale), pixels, y, image)

    everything, queries = patches(train, order), patches(test, torch.arange(len(test)))
    to_fit, to_choose = everything.of_images(0, n_fit), everything.of_images(n_fit, len(train))
    results = []
    for probe in probes:
        watch()
        predict, grid = (_knn, KNN_GRID) if probe == "knn" else (_logistic, INVERSE_PENALTIES)
        guesses = predict(to_fit, to_choose, grid, n_classes, watch)
        scores = [_mean_iou(_counts(guess, to_choose, len(train), n_classes).sum(0)) for guess in guesses]
        best = int(np.argmax(scores))
        (predicted,) = predict(everything, queries, grid[best : best + 1], n_classes, watch)
        chosen = dict(zip(("k", "distance"), grid[best], strict=True)) if probe == "knn" else {"C": grid[best]}
        counts = _counts(predicted, queries, len(test), n_classes)
        found = {**chosen, "validation_mean_iou": scores[best], **_scores(counts, names)}
        results.append({"probe": probe, "features": "patches", **found})
    return results


def _standard(x: Float[Tensor, "patches dim"]) -> tuple[Float[Tensor, "dim"], Float[Tensor, "dim"]]:
    """Mean and standard deviation, some rows at a time, in double precision; 1 for a feature that does not vary."""
    mean = sum(chunk.double().sum(0) for chunk in x.split(_CHUNK)) / len(x)
    variance = sum((chunk.double() - mean).square().sum(0) for chunk in x.split(_CHUNK)) / len(x)
    return mean.float(), torch.where(variance > 0, variance.sqrt(), 1.0).float()


def _knn(
    bank: Patches, queries: Patches, grid: Sequence[tuple[int, Distance]], n_classes: int, watch: Callable[[], None]
) -> list[Int16[Tensor, "patches pixels"]]:
    """For every k and distance, the most frequent class at each pixel's place; the smallest of several."""
    found = {}
    for distance in dict.fromkeys(distance for _, distance in grid):
        watch()
        _, found[distance] = nearest(bank.x, queries.x, max(k for k, _ in grid), distance)
    guesses = []
    for k, distance in grid:
        parts = []
        for neighbours in found[distance][:, :k].split(max(1, 2**24 // (n_classes * bank.pixels.shape[1]))):
            votes = bank.x.new_zeros(len(neighbours), n_classes, bank.pixels.shape[1], dtype=torch.int32)
            for neighbour in neighbours.T:
                classes = bank.pixels[neighbour]
                # For pixels without a class the patch's own stands in.
                classes = torch.where(classes < 0, bank.y[neighbour, None], classes.long())[:, None]
                votes.scatter_add_(1, classes, torch.ones_like(classes, dtype=torch.int32))
            parts.append(votes.argmax(1).to(bank.pixels.dtype))
        guesses.append(torch.cat(parts))
    return guesses


def _logistic(
    bank: Patches, queries: Patches, grid: Sequence[float], n_classes: int, watch: Callable[[], None]
) -> list[Int16[Tensor, "patches pixels"]]:
    """For every C, the likeliest class of each patch at all its pixels; classes that the bank has not are not asked."""
    classes, y = bank.y.unique(return_inverse=True)
    guesses = []
    for weight, intercept in fit_logistic(bank.x, y, len(classes), grid, watch=watch):
        scores = [(chunk @ weight + intercept).argmax(1) for chunk in queries.x.split(_CHUNK)]
        guess = classes[torch.cat(scores)].to(queries.pixels.dtype)
        guesses.append(guess[:, None].expand_as(queries.pixels))
    return guesses


def _counts(
    predicted: Int16[Tensor, "patches pixels"], patches: Patches, n_images: int, n_classes: int
) -> Int[ndarray, "images three_classes"]:
    """Of the labelled pixels of every image: how many of each class are found, predicted and true."""
    labelled = patches.pixels >= 0
    truth, guess = (x[labelled].long() for x in (patches.pixels, predicted))
    first = n_classes * patches.image[:, None].expand_as(labelled)[labelled]
    found = guess == truth
    counts = [
        x.bincount(minlength=n_images * n_classes) for x in ((first + truth)[found], first + guess, first + truth)
    ]
    return torch.stack([x.view(n_images, n_classes) for x in counts], dim=1).flatten(1).cpu().numpy()


def _iou(sums: ndarray) -> Float[ndarray, "classes"]:
    """|predicted and true| / |predicted or true|; NaN for a class that does not occur."""
    both, predicted, true = sums.reshape(3, -1).astype(np.float64)
    union = predicted + true - both
    return np.divide(both, union, out=np.full_like(union, np.nan), where=union > 0)


def _mean_iou(sums: ndarray) -> float:
    iou = _iou(sums)
    return float(iou[~np.isnan(iou)].mean()) if not np.isnan(iou).all() else 0.0


def _scores(counts: Int[ndarray, "images three_classes"], names: Sequence[str]) -> dict:
    sums = counts.sum(0)
    both, _, true = sums.reshape(3, -1)
    iou = _iou(sums)
    called = [names[c] if c < len(names) else str(c) for c in range(len(iou))]
    return {
        "mean_iou": _mean_iou(sums),
        "interval": list(bootstrap_interval(counts, _mean_iou)),
        "pixel_accuracy": float(both.sum() / true.sum()),
        "per_class": {name: float(value) for name, value in zip(called, iou, strict=True) if not np.isnan(value)},
    }
