"""Frozen features under k nearest neighbours: image classification and patch segmentation of held-out scenes.

`python -m capi.evaluate RUN_DIR ...` prints the table of each run folder.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from capi.config import Config, load_config
from capi.model import CAPI, normalize_images
from capi.pretrained import load
from capi.synthetic import TEXTURES, SyntheticScenes

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
    bank_labels: Int[Tensor, "bank"],
    queries: Float[Tensor, "queries dim"],
    n_classes: int,
    *,
    k: int = 10,
    temperature: float = 0.07,
) -> Int[Tensor, "queries"]:
    """argmax_c of the sum of exp(cosine similarity / temperature) over those of the k nearest that are of class c.

    The weighted vote of Wu et al. (arXiv 1805.01978), the usual measure of frozen features.
    """
    bank, votes = F.normalize(bank, dim=-1), F.one_hot(bank_labels, n_classes).float()
    predictions = []
    for chunk in F.normalize(queries, dim=-1).split(1024):
        similarities, neighbours = (chunk @ bank.T).topk(min(k, len(bank)), dim=-1)
        weights = ((similarities - 1) / temperature).exp()
        predictions.append((weights[..., None] * votes[neighbours]).sum(dim=1).argmax(dim=-1))
    return torch.cat(predictions)


def accuracy(predicted: Int[Tensor, "items"], labels: Int[Tensor, "items"]) -> float:
    """Share of the items whose prediction is the label."""
    return float((predicted == labels).float().mean())


def mean_iou(predicted: Int[Tensor, "items"], labels: Int[Tensor, "items"], n_classes: int) -> float:
    """Mean over classes of |predicted and true| / |predicted or true|; classes that never occur are left out."""
    confusion = torch.bincount(labels * n_classes + predicted, minlength=n_classes**2).reshape(n_classes, n_classes)
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - confusion.diag()
    return float((confusion.diag()[union > 0] / union[union > 0]).mean())


def patch_labels(
    pixel_labels: Int[Tensor, "images height width"], patch_size: int, n_classes: int
) -> Int[Tensor, "images rows columns"]:
    """The most frequent pixel label of every patch."""
    patches = rearrange(pixel_labels, "b (h p) (w q) -> b h w (p q)", p=patch_size, q=patch_size)
    return F.one_hot(patches, n_classes).sum(dim=-2).argmax(dim=-1)


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
            "image_accuracy": accuracy(classes, queries[1]),
            "patch_accuracy": accuracy(textures, query_patches),
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
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path, help="folder of a finished training")
    for run_dir in parser.parse_args(argv).run_dirs:
        for name in ("config.yaml", "encoder.safetensors"):
            if not (run_dir / name).is_file():
                parser.error(f"expected {name} of a finished training in {run_dir}, found none")
        config = load_config(["--config", str(run_dir / "config.yaml")])
        torch.manual_seed(config.run.seed)
        untrained = CAPI(config.model, config.clustering).init_weights().student.backbone.eval()
        results = evaluate_synthetic(config, {"trained": load(run_dir / "encoder.safetensors"), "untrained": untrained})
        print(f"{run_dir}\n\n{format_table(results)}\n")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
