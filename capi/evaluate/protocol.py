"""The evaluation of one encoder on one training and one test set of labelled images."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from capi.evaluate import classification, segmentation
from capi.evaluate.features import Features, Wanted, cached_features, encoder_fingerprint, extract_labelled
from capi.evaluate.labelled import LabelledSource
from capi.evaluate.probes import Grid

_MAX_CROPS = 4


def evaluate_labelled(
    encoder: nn.Module,
    train: LabelledSource,
    test: LabelledSource,
    *,
    image_size: int,
    probes: Sequence[str] = ("knn", "linear"),
    grid: Grid | None = None,
    crops: int | None = None,
    cache: Path | None = None,
    limits: tuple[int | None, int | None] = (None, None),
    watch: Callable[[], None] = lambda: None,
) -> dict:
    """What k-NN and probes make of a backbone's features: the task, both sets in numbers, and the results.

    Args:
        encoder: as `pretrained.load` gives it; its device does the work.
        train: what the probes learn from, and the neighbours.
        test: what is predicted. Both have classes (classification), or both masks (segmentation).
        image_size: side in pixels of the views that the encoder sees.
        probes: of knn, linear and, for classification, attentive.
        grid: how linear and attentive probes are trained; the authors' way by default.
        crops: random crops of each training image that these probes see in turn; 0: its centre; by default as many as
            the training comes to, at most four.
        cache: folder that keeps the features; without one they are not kept.
        limits: the most images of the training and of the test set.
        watch: called between batches and steps; what it raises ends the evaluation.

    Raises:
        ValueError: the sets do not fit the task or each other, or a probe is none of the task's.
    """
    task = "classification" if train.masks is None else "segmentation"
    if (train.masks is None) != (test.masks is None):
        with_masks, without = (train, test) if test.masks is None else (test, train)
        raise ValueError(f"expected masks in both sets or in none; {with_masks.source} has them, {without.source} none")
    known = classification.PROBES if task == "classification" else segmentation.PROBES
    for probe in probes:
        if probe not in known:
            raise ValueError(f"probes of a {task} must be of {', '.join(known)}, got {probe}")
    grid = grid or Grid()
    with_patches = task == "segmentation" or "attentive" in probes
    fingerprint = encoder_fingerprint(encoder)
    parts = []
    for source, limit in zip((train, test), limits, strict=True):
        trains_on_crops = source is train and task == "classification" and {*probes} - {"knn"}
        n_crops = _n_crops(source, limit, grid, crops) if trains_on_crops else 0
        wanted = Wanted(image_size, n_crops, with_patches, limit)
        if cache is None:
            parts.append(extract_labelled(encoder, source, wanted, watch))
        else:
            parts.append(cached_features(encoder, source, wanted, cache, fingerprint))
    device = next(encoder.parameters()).device
    if task == "classification":
        results = classification.classify(*parts, probes, grid, device=device, watch=watch)
    else:
        patch_size = encoder.config.patch_size
        of_names = {"patch_size": patch_size, "names": train.masks.names}
        results = segmentation.segment(*parts, probes, **of_names, device=device, watch=watch)
    return {
        "task": task,
        "image_size": image_size,
        "encoder_sha256": fingerprint,
        "train": _described(train, parts[0]),
        "test": _described(test, parts[1]),
        "results": results,
    }


def _n_crops(source: LabelledSource, limit: int | None, grid: Grid, crops: int | None) -> int:
    """So many that no crop is seen twice, if four are enough; four where the number of images is not known."""
    if crops is not None:
        return crops
    if not hasattr(source, "__len__"):
        return _MAX_CROPS
    n_images = min(len(source), limit or len(source))
    return min(_MAX_CROPS, max(1, -(-grid.iterations * grid.batch_size // n_images)))


def _described(source: LabelledSource, features: Features) -> dict:
    return {"source": source.source, "images": len(features), "unreadable": features.unreadable}
