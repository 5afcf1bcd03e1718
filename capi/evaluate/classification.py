"""Image classification by frozen features: k-NN, linear and attentive probes.

The probes are the authors' (their `eval_classification.py`): trained on random crops of nine tenths of the training
images, chosen among by the accuracy on the last tenth, and scored on the centres of the test images. Their k-NN is of
patches alone; ours of images is Wu et al.'s weighted vote.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from capi.evaluate.features import Features
from capi.evaluate.intervals import bootstrap_interval
from capi.evaluate.knn import knn_predict
from capi.evaluate.probes import Batch, Grid, predict, train_probes, validate

PROBES = ("knn", "linear", "attentive")
_VALIDATION = 0.1
_SEED = 42


def classify(
    train: Features,
    test: Features,
    probes: Sequence[str],
    grid: Grid,
    *,
    device: torch.device,
    k: int = 10,
    temperature: float = 0.07,
    watch: Callable[[], None] = lambda: None,
) -> list[dict]:
    """For every probe and kind of features: top-1 accuracy, its interval, accuracy by class, and what was chosen.

    Raises:
        ValueError: fewer than two classes or images, or a class of the test set that the training set has not.
    """
    classes = sorted(set(train.labels), key=_in_order)
    if len(classes) < 2:
        raise ValueError(f"the training set must have at least two classes, got {classes[0]} alone")
    if unknown := sorted(set(test.labels) - set(classes)):
        some = ", ".join(unknown[:5])
        raise ValueError(
            f"{len(unknown)} of the {len(set(test.labels))} classes of the test set are none of the training set's "
            f"{len(classes)}: {some}"
        )
    places = {name: place for place, name in enumerate(classes)}
    y, truth = (torch.tensor([places[name] for name in part.labels], device=device) for part in (train, test))
    results = []
    for name, kind in _tasks(probes):
        of_train, of_test = (_batches(part, kind, device) for part in (train, test))
        if name == "knn":
            bank, queries = (_centres(of, len(p), device) for of, p in ((of_train, train), (of_test, test)))
            watch()
            predicted = knn_predict(bank, y, queries, len(classes), k=k, temperature=temperature)
            chosen = {"k": k, "temperature": temperature}
        else:
            predicted, chosen = fit_and_predict(name, of_train, of_test, y, len(truth), len(classes), grid, watch)
        results.append({"probe": name, "features": kind, **chosen, **_scores(predicted, truth, classes)})
    return results


def _in_order(name: str) -> tuple[bool, int, str]:
    """Numbers by their value, before names."""
    return (False, int(name), name) if name.isdecimal() else (True, 0, name)


def _tasks(probes: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in probes:
        for kind in ("patches",) if name == "attentive" else ("global", "patch mean", "global + patch mean"):
            yield name, kind


def _batches(features: Features, kind: str, device: torch.device) -> Batch:
    """Features by place and epoch: epoch after epoch the next crop; where there are no crops, the centre."""
    if kind == "patches":
        source = features.patches
    else:
        parts = {"global": features.global_reprs, "patch mean": features.patch_means}
        source = torch.cat([parts[name] for name in kind.split(" + ")], dim=-1).to(device)
    n_crops = source.shape[1] - 1

    def batch(indices: Int[Tensor, "batch"], epoch: int) -> Tensor:
        view = 1 + epoch % n_crops if n_crops and epoch >= 0 else 0
        return source[indices.to(source.device), view].to(device).float()

    return batch


def _centres(batch: Batch, n_images: int, device: torch.device) -> Tensor:
    return batch(torch.arange(n_images, device=device), -1)


def fit_and_predict(
    name: str,
    of_train: Batch,
    of_test: Batch,
    y: Int[Tensor, "train"],
    n_test: int,
    n_classes: int,
    grid: Grid,
    watch: Callable[[], None] = lambda: None,
) -> tuple[Int[Tensor, "test"], dict]:
    """What the best probe predicts: right most often on the held-out tenth and, of several, with the least loss."""
    order = torch.from_numpy(np.random.default_rng(_SEED).permutation(len(y))).to(y.device)
    n_kept = min(round((1 - _VALIDATION) * len(y)), len(y) - 1)
    if n_kept < 1:
        raise ValueError(f"a probe needs at least two training images, got {len(y)}")
    kept, held_out = order[:n_kept], order[n_kept:]
    trained = train_probes(name, lambda i, epoch: of_train(kept[i], epoch), y[kept], n_classes, grid, watch)
    right, loss = validate(name, trained, lambda i, epoch: of_train(held_out[i], epoch), y[held_out])
    best = int(torch.where(right == right.max(), loss, torch.inf).argmin())
    trained = {key: tensor[best : best + 1] for key, tensor in trained.items()}
    rate, decay = grid.pairs()[best]
    chosen = {"learning_rate": rate, "weight_decay": decay, "validation_accuracy": float(right[best])}
    return predict(name, trained, of_test, n_test)[0], chosen


def _scores(predicted: Int[Tensor, "test"], truth: Int[Tensor, "test"], classes: Sequence[str]) -> dict:
    predicted, truth = predicted.cpu().numpy(), truth.cpu().numpy()
    right = predicted == truth
    counts = np.stack([right, np.ones_like(right)], axis=1).astype(np.float64)
    occurring = [c for c in range(len(classes)) if (truth == c).any()]
    return {
        "accuracy": float(right.mean()),
        "interval": list(bootstrap_interval(counts, lambda sums: sums[0] / sums[1])),
        "per_class": {classes[c]: float(right[truth == c].mean()) for c in occurring},
    }
