"""Images from JPEG bytes to a random 224-pixel crop on one core, against torchvision's PIL pipeline.

The official loader goes on to normalised floats on the CPU (`torchvision_float`); we send bytes to the GPU, as
`torchvision_uint8` would.
"""

import io
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from numpy import ndarray
from PIL import Image
from torch import Tensor

from benchmarks import shapes
from benchmarks.costs import Cost
from benchmarks.measure import OURS, Measurement
from benchmarks.timing import Contestant
from capi.data.crops import Box, crop, random_box
from capi.images import IMAGENET_MEAN, IMAGENET_STD

IMAGES = 32
CROP_SCALE = (0.6, 1.0)


@cache
def photographs() -> list[bytes]:
    """JPEGs with the spectrum of natural images, 1/f, and edges across it; about as large as ImageNet's."""
    return [_photograph(seed) for seed in range(IMAGES)]


def _photograph(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    width, height = shapes.JPEG_SIZE
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / width)
    y, x = np.mgrid[:height, :width]
    layers = []
    for _ in range(2):
        phases = np.exp(2j * np.pi * rng.random((4, *amplitude.shape)))
        fields = np.fft.irfft2(amplitude * phases, (height, width))
        grey, *colours = fields / fields.std(axis=(1, 2), keepdims=True)
        layers.append(np.stack([grey + 0.3 * colour for colour in colours]) * 45 + rng.uniform(80, 170, (3, 1, 1)))
    inside = sum(
        np.hypot(x - rng.uniform(0, width), y - rng.uniform(0, height)) < rng.uniform(30, 120) for _ in range(4)
    )
    pixels = np.where(inside > 0, *layers).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def ours(data: bytes, choose_box: Callable[[int, int], Box], flip: bool) -> ndarray:
    pixels = crop(data, shapes.CROP_SIZE, choose_box)
    return np.ascontiguousarray((pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1))


if find_spec("torchvision"):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    SOURCE = "torchvision " + version("torchvision")

    def torchvision_pil(data: bytes, choose_box: Callable[[int, int], Box], flip: bool) -> Image.Image:
        """RandomResizedCrop and RandomHorizontalFlip, with the box and the flip given."""
        image = Image.open(io.BytesIO(data)).convert("RGB")
        left, top, width, height = choose_box(*image.size)
        size = [shapes.CROP_SIZE, shapes.CROP_SIZE]
        image = transforms.resized_crop(image, top, left, height, width, size, InterpolationMode.BICUBIC)
        return transforms.hflip(image) if flip else image

    to_uint8, to_float, normalize = transforms.pil_to_tensor, transforms.to_tensor, transforms.normalize
else:
    SOURCE = "torchvision's PIL pipeline restated"

    def torchvision_pil(data: bytes, choose_box: Callable[[int, int], Box], flip: bool) -> Image.Image:
        """Decode the whole image, cut the box out of it, resize it, flip it."""
        image = Image.open(io.BytesIO(data)).convert("RGB")
        left, top, width, height = choose_box(*image.size)
        size = (shapes.CROP_SIZE, shapes.CROP_SIZE)
        image = image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image

    def to_uint8(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def to_float(image: Image.Image) -> Tensor:
        return to_uint8(image).contiguous().to(torch.float32).div(255)

    def normalize(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        mean, std = (torch.tensor(x)[:, None, None] for x in (mean, std))
        return image.clone().sub_(mean).div_(std)


def torchvision_uint8(data: bytes, choose_box: Callable[[int, int], Box], flip: bool) -> Tensor:
    return to_uint8(torchvision_pil(data, choose_box, flip)).contiguous()


def torchvision_float(data: bytes, choose_box: Callable[[int, int], Box], flip: bool) -> Tensor:
    """ToTensor and Normalize, as in the official loader."""
    return normalize(to_float(torchvision_pil(data, choose_box, flip)), IMAGENET_MEAN, IMAGENET_STD)


PIPELINES = {OURS: ours, "torchvision_uint8": torchvision_uint8, "torchvision_float": torchvision_float}


def load(name: str, round_number: int) -> list[ndarray | Tensor]:
    """All photographs through one pipeline, with the boxes and flips of a round."""
    rng = np.random.default_rng(round_number)
    return [
        PIPELINES[name](data, partial(random_box, scale=CROP_SCALE, rng=rng), bool(rng.random() < 0.5))
        for data in photographs()
    ]


def enter(name: str) -> Contestant:
    """The pipeline on one thread, once it gave the images of torchvision's but for how the box's border is resized."""
    expected, images = (
        np.stack([np.asarray(x) for x in load(pipeline, 0)]) for pipeline in ("torchvision_uint8", name)
    )
    if name == "torchvision_float":
        std, mean = (np.array(x, np.float32)[:, None, None] for x in (IMAGENET_STD, IMAGENET_MEAN))
        images = (images * std + mean) * 255
    difference = np.abs(images.astype(np.float32) - expected).mean()
    assert difference < 1, f"expected the images of torchvision's pipeline, got {difference} grey levels of difference"

    def run(round_number: int) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            load(name, round_number)
        finally:
            torch.set_num_threads(threads)

    return Contestant(run, lambda round_number: (round_number,))


@pytest.mark.parametrize("implementation", list(PIPELINES))
def test_data_loading(measure, implementation: str) -> None:
    width, height = shapes.JPEG_SIZE

    def images_per_second(result: Measurement) -> float:
        return IMAGES / result.median

    measure(
        enter,
        op="data_loading",
        shape={"images": IMAGES, "width": width, "height": height, "crop": shapes.CROP_SIZE},
        direction="forward",
        cost=Cost(None, None),
        dtype="uint8" if implementation != "torchvision_float" else "float32",
        peak_memory_bytes=None,  # Pillow's is not seen.
        images_per_second=images_per_second,
        source="this repository" if implementation == OURS else SOURCE,
    )
