"""How well predictions fit labels, and labels of patches.

Labels below 0, and 255 where there are no more than 255 classes, mark what is not labelled, and are left out.
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Int, Integer
from torch import Tensor


def accuracy(
    predicted: Integer[Tensor, "items"], labels: Integer[Tensor, "items"], n_classes: int | None = None
) -> float:
    """Share of the labelled items whose prediction is the label; without `n_classes` 255 is a class like any other.

    Raises:
        ValueError: a label that is no class, or no labelled item.
    """
    labels, labelled = classes_of(labels, n_classes)
    _check_any_labelled(labelled)
    return float((predicted == labels)[labelled].float().mean())


def mean_iou(predicted: Integer[Tensor, "items"], labels: Integer[Tensor, "items"], n_classes: int) -> float:
    """Mean over classes of |predicted and true| / |predicted or true|; classes that never occur are left out.

    Raises:
        ValueError: a label or a prediction that is no class, or no labelled item.
    """
    labels, labelled = classes_of(labels, n_classes)
    _check_any_labelled(labelled)
    predicted, labels = predicted[labelled].long(), labels[labelled]
    if int(predicted.min()) < 0 or int(predicted.max()) >= n_classes:
        low, high = int(predicted.min()), int(predicted.max())
        raise ValueError(f"predictions must be classes from 0 to {n_classes - 1}, got {low} to {high}")
    both, of_predicted, of_labels = (
        torch.bincount(classes, minlength=n_classes) for classes in (labels[predicted == labels], predicted, labels)
    )
    union = of_predicted + of_labels - both
    return float((both[union > 0] / union[union > 0]).mean())


def patch_labels(
    pixel_labels: Integer[Tensor, "images height width"], patch_size: int, n_classes: int
) -> Int[Tensor, "images rows columns"]:
    """The most frequent class among the labelled pixels of every patch, the smallest of several; -1 without any.

    Raises:
        ValueError: a label that is no class, or sides that are no multiples of the patch size.
    """
    n_images, height, width = pixel_labels.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"sides must be multiples of the patch size {patch_size}, got {height} x {width}")
    n_patches = height // patch_size * (width // patch_size)
    result = []
    # Some images at a time: counts by patch and class, and pixels as int64, take memory.
    for part in pixel_labels.split(max(1, 2**22 // max(1, n_patches * n_classes + height * width))):
        labels, labelled = classes_of(part, n_classes)
        labels, labelled = (
            rearrange(x, "b (h p) (w q) -> (b h w) (p q)", p=patch_size, q=patch_size) for x in (labels, labelled)
        )
        bins = labels + n_classes * torch.arange(len(labels), device=labels.device)[:, None]
        counts = torch.bincount(bins[labelled], minlength=len(labels) * n_classes).view(-1, n_classes)
        result.append(torch.where(counts.any(dim=1), counts.argmax(dim=1), -1))
    return torch.cat(result).view(n_images, height // patch_size, width // patch_size)


def classes_of(
    labels: Integer[Tensor, "*items"], n_classes: int | None
) -> tuple[Int[Tensor, "*items"], Bool[Tensor, "*items"]]:
    """Labels as int64, and where they are labels at all."""
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    labels = labels.long()
    labelled = labels >= 0
    if n_classes is not None:
        if n_classes <= 255:
            labelled = labelled & (labels != 255)
        if (wrong := labels[labelled & (labels >= n_classes)]).numel():
            expected = f"from 0 to {n_classes - 1}, or -1 or 255 where there is none"
            raise ValueError(f"labels must be classes {expected}; got {int(wrong[0])}")
    return labels, labelled


def _check_any_labelled(labelled: Bool[Tensor, "items"]) -> None:
    if not labelled.any():
        raise ValueError(f"expected at least one labelled item, got none of {len(labelled)}")
