"""Frozen features under k nearest neighbours: image classification and patch segmentation of held-out scenes."""

from collections.abc import Mapping

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from capi.config import Config
from capi.data.synthetic import TEXTURES, SyntheticScenes
from capi.evaluate.knn import knn_predict
from capi.evaluate.scores import accuracy, mean_iou, patch_labels
from capi.model import normalize_images

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
