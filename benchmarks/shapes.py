"""What is timed: the shapes of CAPI and, where general kernels do better, others, on a GPU; small ones on a CPU."""

import re
from typing import NamedTuple

import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
# Of the results files: "h200" of "NVIDIA H200".
MACHINE = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).removeprefix("nvidia-") if GPU else "cpu"


class Logits(NamedTuple):
    """Of a clustering head; `dim` is the width of the features before it."""

    positions: int
    images: int
    prototypes: int
    n_iterations: int
    dim: int


class SelfAttention(NamedTuple):
    images: int
    tokens: int
    heads: int
    head_dim: int


class CrossAttention(NamedTuple):
    images: int
    queries: int
    keys: int
    heads: int
    head_dim: int


class Step(NamedTuple):
    preset: str
    batch: int


def name(shape: tuple[int | str, ...]) -> str:
    """Its sizes, for the name of a test."""
    return "x".join(map(str, shape))


if GPU:
    SINKHORN = [
        Logits(256, 512, 16384, 3, 1024),
        Logits(8, 16384, 16384, 3, 1024),  # A position chunk of the paper's whole batch.
        Logits(256, 64, 4096, 3, 384),
    ]
    CLUSTERING_HEAD = [Logits(256, 512, 16384, 3, 1024), Logits(256, 512, 16384, 3, 384)]
    STUDENT_LOSS = [Logits(8, 512, 16384, 3, 1024), Logits(33, 512, 16384, 3, 1024)]
    VISIBLE_ATTENTION = [
        SelfAttention(512, 106, 16, 64),
        SelfAttention(512, 272, 16, 64),
        SelfAttention(512, 106, 6, 64),
        SelfAttention(512, 33, 16, 64),
        SelfAttention(256, 160, 16, 64),
        SelfAttention(64, 1024, 16, 64),
        SelfAttention(16, 4096, 16, 64),
    ]
    MASKED_CROSS_ATTENTION = [
        CrossAttention(512, 8, 106, 16, 64),
        CrossAttention(512, 33, 106, 16, 64),
        CrossAttention(512, 166, 106, 16, 64),
        CrossAttention(512, 1, 106, 16, 64),
        CrossAttention(256, 8, 272, 16, 64),
    ]
    # Batches that the official step takes without recomputation on a GPU of 80 GB, or parts of them.
    MEMORY = torch.cuda.get_device_properties(DEVICE).total_memory
    PART = 1 if MEMORY > 70e9 else 2 if MEMORY > 36e9 else 4
    TRAIN_STEP = [Step(preset, batch // PART) for preset, batch in (("vits14", 512), ("vitl14", 256), ("vitb14", 512))]
else:
    SINKHORN = [Logits(64, 64, 4096, 3, 384), Logits(256, 64, 1024, 3, 384), Logits(4, 256, 16384, 3, 384)]
    CLUSTERING_HEAD = [Logits(16, 64, 4096, 3, 192), Logits(32, 8, 16384, 3, 384)]
    STUDENT_LOSS = [Logits(8, 64, 4096, 3, 384), Logits(8, 8, 16384, 3, 384)]
    VISIBLE_ATTENTION = [SelfAttention(8, n, 6, 64) for n in (33, 106, 272)] + [SelfAttention(1, 1024, 6, 64)]
    MASKED_CROSS_ATTENTION = [CrossAttention(16, n, 106, 6, 64) for n in (1, 8, 33, 166)]
    TRAIN_STEP = [Step("tiny", 192), Step("vits14", 8)]

COPIED_BYTES = 1 << 30  # Of the copy ceiling where an operation has no size of its own.
LEAST_COPIED_BYTES = 1 << 27  # Smaller buffers would be copied within the L2 cache.
MATMUL_SIZE = 8192
JPEG_SIZE = (500, 375)  # width and height, as of most ImageNet images
CROP_SIZE = 224
