"""Frozen features under k nearest neighbours: image classification and patch segmentation of held-out scenes.

`python -m capi.evaluate ENCODER ...` prints the table of each run folder, checkpoint or encoder file. Labels below 0,
and 255 where there are no more than 255 classes, mark what is not labelled, and are left out.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Integer, UInt8
from torch import Tensor, nn

from capi import pretrained
from capi.config import Config
from capi.data.synthetic import TEXTURES, SyntheticScenes
from capi.model import CAPI, normalize_images

RAW_PIXELS = "raw pixels"

# Seeds that no training set takes by accident, so that every scene here is held out.
_BANK_SEED, _QUERY_SEED = 2**40, 2**40 + 1
_BANK_IMAGES, _QUERY_IMAGES = 2048, 2048
_BANK_PATCHES, _QUERY_PATCHES = 16384, 8192


@torch.no_grad()
def extract_features(
    backbone: nn.Module, images: UInt8[Tensor, "images 3 height width"], *, batch_size: int = 256
) -> tuple[Float[Tensor, "images dim"], Float[Tensor, "images rows columns dim"]]:
    """Global representations and feature maps of a frozen backbone, float32 on the CPU, a batch at a time."""
    device = next(backbone.parameters()).device
    outputs = [backbone(normalize_images(batch.to(device))) for batch in images.split(batch_size)]
    global_reprs, _, feature_maps = zip(*outputs, strict=True)
    return torch.cat(global_reprs).float().cpu(), torch.cat(feature_maps).float().cpu()


def knn_predict(
    bank: Float[Tensor, "bank dim"],
    bank_labels: Integer[Tensor, "bank"],
    queries: Float[Tensor, "queries dim"],
    n_classes: int,
    *,
    k: int = 10,
    temperature: float = 0.07,
) -> Int[Tensor, "queries"]:
    """argmax_c of the sum of exp(cosine similarity / temperature) over those of the k nearest that are of class c.

    The weighted vote of Wu et al. (arXiv 1805.01978), the usual measure of frozen features.

    Raises:
        ValueError: a label that is no class, no labelled item in the bank, or k below 1.
    """
    labels, labelled = _classes(bank_labels, n_classes)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not labelled.any():
        raise ValueError(f"the bank must hold at least one labelled item, got none of {len(labels)}")
    bank, labels = F.normalize(bank[labelled], dim=-1), labels[labelled]
    classes = torch.arange(n_classes, device=labels.device)
    predictions = []
    for chunk in F.normalize(queries, dim=-1).split(1024):
        similarities, neighbours = (chunk @ bank.T).topk(min(k, len(bank)), dim=-1)
        weights = ((similarities - 1) / temperature).exp()
        votes = labels[neighbours][..., None] == classes
        predictions.append((weights[..., None] * votes).sum(dim=1).argmax(dim=-1))
    return torch.cat(predictions)


def accuracy(
    predicted: Integer[Tensor, "items"], labels: Integer[Tensor, "items"], n_classes: int | None = None
) -> float:
    """Share of the labelled items whose prediction is the label; without `n_classes` 255 is a class like any other.

    Raises:
        ValueError: a label that is no class, or no labelled item.
    """
    labels, labelled = _classes(labels, n_classes)
    _check_any_labelled(labelled)
    return float((predicted == labels)[labelled].float().mean())


def mean_iou(predicted: Integer[Tensor, "items"], labels: Integer[Tensor, "items"], n_classes: int) -> float:
    """Mean over classes of |predicted and true| / |predicted or true|; classes that never occur are left out.

    Raises:
        ValueError: a label or a prediction that is no class, or no labelled item.
    """
    labels, labelled = _classes(labels, n_classes)
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
        labels, labelled = _classes(part, n_classes)
        labels, labelled = (
            rearrange(x, "b (h p) (w q) -> (b h w) (p q)", p=patch_size, q=patch_size) for x in (labels, labelled)
        )
        bins = labels + n_classes * torch.arange(len(labels), device=labels.device)[:, None]
        counts = torch.bincount(bins[labelled], minlength=len(labels) * n_classes).view(-1, n_classes)
        result.append(torch.where(counts.any(dim=1), counts.argmax(dim=1), -1))
    return torch.cat(result).view(n_images, height // patch_size, width // patch_size)


def _classes(
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


def evaluate_synthetic(config: Config, backbones: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
    """k-NN image accuracy, patch accuracy and patch mean IoU on held-out scenes, by backbone and for raw pixels.

    Bank and queries are scenes of the training resolution that no training has seen. An image is represented by its
    global representation (raw: by all its pixels), a patch by its feature (raw: by its pixels).
    """
    n_classes, patch_size = len(TEXTURES), config.model.patch_size
    bank = _scenes(_BANK_IMAGES, config.data.image_size, _BANK_SEED)
    queries = _scenes(_QUERY_IMAGES, config.data.image_size, _QUERY_SEED)
    bank_patches, query_patches = (patch_labels(s[2], patch_size, n_classes).flatten() for s in (bank, queries))
    generator = torch.Generator().manual_seed(0)
    bank_chosen = torch.randperm(len(bank_patches), generator=generator)[:_BANK_PATCHES]
    query_chosen = torch.randperm(len(query_patches), generator=generator)[:_QUERY_PATCHES]
    bank_patches, query_patches = bank_patches[bank_chosen], query_patches[query_chosen]

    results = {}
    for name, backbone in {**backbones, RAW_PIXELS: None}.items():
        features = [
            _raw_features(images, patch_size) if backbone is None else extract_features(backbone, images)
            for images in (bank[0], queries[0])
        ]
        (bank_images, bank_maps), (query_images, query_maps) = features
        classes = knn_predict(bank_images, bank[1], query_images, n_classes)
        textures = knn_predict(
            bank_maps.flatten(0, 2)[bank_chosen], bank_patches, query_maps.flatten(0, 2)[query_chosen], n_classes
        )
        results[name] = {
            "image_accuracy": accuracy(classes, queries[1], n_classes),
            "patch_accuracy": accuracy(textures, query_patches, n_classes),
            "patch_miou": mean_iou(textures, query_patches, n_classes),
        }
    return results


def _scenes(
    size: int, image_size: int, seed: int
) -> tuple[UInt8[Tensor, "images 3 height width"], Int[Tensor, "images"], Int[Tensor, "images height width"]]:
    scenes = SyntheticScenes(size, image_size, seed)
    images, classes, labels = zip(*(scenes.labelled(index) for index in range(size)), strict=True)
    images = rearrange(torch.from_numpy(np.stack(images)), "b h w c -> b c h w")
    return images, torch.tensor(classes), torch.from_numpy(np.stack(labels))


def _raw_features(
    images: UInt8[Tensor, "images 3 height width"], patch_size: int
) -> tuple[Float[Tensor, "images pixels"], Float[Tensor, "images rows columns patch_pixels"]]:
    pixels = normalize_images(images)
    return pixels.flatten(1), rearrange(pixels, "b c (h p) (w q) -> b h w (c p q)", p=patch_size, q=patch_size)


def format_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table, one row a feature."""
    lines = [
        f"| features ({_QUERY_IMAGES} held-out scenes) | image k-NN | patch k-NN | patch mIoU |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, result in results.items():
        image, patch, miou = (result[key] for key in ("image_accuracy", "patch_accuracy", "patch_miou"))
        lines.append(f"| {name} | {image:.3f} | {patch:.3f} | {miou:.3f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m capi.evaluate", description="k-NN evaluation of trained encoders.")
    parser.add_argument(
        "encoders",
        metavar="ENCODER",
        nargs="+",
        help="a run folder, finished or not, a checkpoint, an encoder file, or an official name",
    )
    parser.add_argument(
        "--image_size",
        type=int,
        help="side of the scenes in pixels; by default that of the run, or 16 patches where the run is not known",
    )
    arguments = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        for name in arguments.encoders:
            weights = pretrained.read(name)
            config = pretrained.configuration_of(weights, arguments.image_size)
            torch.manual_seed(config.run.seed)
            untrained = CAPI(config.model, config.clustering).init_weights().student.backbone.eval()
            backbones = {"trained": pretrained.build(weights), "untrained": untrained}
            results = evaluate_synthetic(config, {key: backbone.to(device) for key, backbone in backbones.items()})
            print(f"{name}\n\n{format_table(results)}\n")  # noqa: T201
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
