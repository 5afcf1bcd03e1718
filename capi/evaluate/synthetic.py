"""Frozen features under k-NN and a linear probe: image classification and patch segmentation of held-out scenes."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from capi.config import Config
from capi.data.synthetic import TEXTURES, SyntheticScenes
from capi.evaluate.classification import fit_and_predict
from capi.evaluate.knn import knn_predict
from capi.evaluate.probes import Grid
from capi.evaluate.scores import accuracy, mean_iou, patch_labels
from capi.model import normalize_images

RAW_PIXELS = "raw pixels"

# Seeds that no training set takes by accident, so that every scene here is held out.
_BANK_SEED, _QUERY_SEED = 2**40, 2**40 + 1
_BANK_IMAGES, _QUERY_IMAGES = 2048, 2048
_BANK_PATCHES, _QUERY_PATCHES = 16384, 8192
# Of the thousands of pixels of an image a probe of the authors' grid would take minutes.
_GRID = Grid(learning_rates=(1e-3, 1e-2, 1e-1), weight_decays=(5e-4,), iterations=500)


@torch.no_grad()
def extract_features(
    backbone: nn.Module, images: UInt8[Tensor, "images 3 height width"], *, batch_size: int = 256
) -> tuple[Float[Tensor, "images dim"], Float[Tensor, "images rows columns dim"]]:
    """Global representations and feature maps of a frozen backbone, float32 on the CPU, a batch at a time."""
    device = next(backbone.parameters()).device
    outputs = [backbone(normalize_images(batch.to(device))) for batch in images.split(batch_size)]
    global_reprs, _, feature_maps = zip(*outputs, strict=True)
    return torch.cat(global_reprs).float().cpu(), torch.cat(feature_maps).float().cpu()


class HeldOutScenes:
    """Scenes of the training resolution that no training has seen: a bank to learn from, and queries."""

    def __init__(self, config: Config):
        self._patch_size = config.model.patch_size
        self._bank = _scenes(_BANK_IMAGES, config.data.image_size, _BANK_SEED)
        self._queries = _scenes(_QUERY_IMAGES, config.data.image_size, _QUERY_SEED)
        generator = torch.Generator().manual_seed(0)
        self._patches = []
        for scenes, n in (self._bank, _BANK_PATCHES), (self._queries, _QUERY_PATCHES):
            labels = patch_labels(scenes[2], self._patch_size, len(TEXTURES)).flatten()
            chosen = torch.randperm(len(labels), generator=generator)[:n]
            self._patches.append((chosen, labels[chosen]))

    def evaluate(self, backbone: nn.Module | None, watch: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Accuracy of images by k-NN and by a linear probe, accuracy and mean IoU of patches by k-NN.

        An image is represented by its global representation (without a backbone: by all its pixels), a patch by its
        feature (its pixels). `watch` is called on the way and may raise.
        """
        n_classes, features = len(TEXTURES), []
        for images, _, _ in (self._bank, self._queries):
            watch()
            raw = backbone is None
            features.append(_raw_features(images, self._patch_size) if raw else extract_features(backbone, images))
        (bank, bank_maps), (queries, query_maps) = features
        (bank_chosen, bank_patches), (query_chosen, query_patches) = self._patches
        y, truth = self._bank[1], self._queries[1]
        watch()
        by_neighbours = knn_predict(bank, y, queries, n_classes)
        of_probe = (lambda indices, _: bank[indices], lambda indices, _: queries[indices])
        by_probe, _ = fit_and_predict("linear", *of_probe, y, len(truth), n_classes, _GRID, watch)
        textures = knn_predict(
            bank_maps.flatten(0, 2)[bank_chosen], bank_patches, query_maps.flatten(0, 2)[query_chosen], n_classes
        )
        return {
            "image_accuracy": accuracy(by_neighbours, truth, n_classes),
            "image_linear": accuracy(by_probe, truth, n_classes),
            "patch_accuracy": accuracy(textures, query_patches, n_classes),
            "patch_miou": mean_iou(textures, query_patches, n_classes),
        }


def evaluate_synthetic(config: Config, backbones: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
    """What `HeldOutScenes.evaluate` gives, by backbone and for raw pixels."""
    scenes = HeldOutScenes(config)
    return {name: scenes.evaluate(backbone) for name, backbone in {**backbones, RAW_PIXELS: None}.items()}


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
        f"| features ({_QUERY_IMAGES} held-out scenes) | image k-NN | image linear | patch k-NN | patch mIoU |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, result in results.items():
        scores = (f"{result[key]:.3f}" for key in ("image_accuracy", "image_linear", "patch_accuracy", "patch_miou"))
        lines.append(f"| {name} | {' | '.join(scores)} |")
    return "\n".join(lines)
