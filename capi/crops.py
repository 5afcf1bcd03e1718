"""Crops of encoded images: a box of any image that Pillow reads, upright, as RGB, resized."""

import io
import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from capi.retry import attempt

_MAX_ASPECT = 4 / 3
# A JPEG may be decoded at 1/2, 1/4 or 1/8 while the crop stays this many times larger than the output.
_REDUCING_GAP = 2
# What the EXIF orientation asks for: whether to swap rows and columns, and which of the two to reverse then.
_UPRIGHT = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}

Box = tuple[int, int, int, int]  # left, top, width, height
Encoded = bytes | ndarray | Exception


def random_box(width: int, height: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """The box of a RandomResizedCrop: its share of the area uniform in `scale`, its aspect log-uniform in [3/4, 4/3].

    After 10 draws that do not fit, the largest centred box of an admitted aspect (as torchvision's).
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(-math.log(_MAX_ASPECT), math.log(_MAX_ASPECT)))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = rng.integers(width - box_width + 1), rng.integers(height - box_height + 1)
            return int(left), int(top), box_width, box_height
    box_width, box_height = min(width, round(height * _MAX_ASPECT)), min(height, round(width * _MAX_ASPECT))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def centre_box(width: int, height: int) -> Box:
    """The largest centred square."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def crop(data: Encoded, size: int, choose_box: Callable[[int, int], Box]) -> UInt8[ndarray, "size size 3"]:
    """The box that `choose_box(width, height)` picks, upright and as RGB, resized to `size` by bicubic interpolation.

    `data` is an encoded image, or uint8 pixels; an exception in its place is raised. Alpha is dropped, as PIL's
    `convert("RGB")` does; 16-bit grey is scaled to 8 bits. The result is within two grey levels of Pillow's crop
    and bicubic resize, rows first, but where a large JPEG is decoded small: there the box is rounded to whole pixels of
    what is decoded, which moves an edge by a quarter of an output pixel at most. Raises whatever Pillow raises on
    broken data.
    """
    if isinstance(data, Exception):
        raise data
    if isinstance(data, ndarray):
        left, top, width, height = choose_box(data.shape[1], data.shape[0])
        return _resized(data[top : top + height, left : left + width].copy(), size).numpy()
    image = Image.open(io.BytesIO(data))
    reducible = image.format in ("JPEG", "MPO")
    if not reducible:
        image.load()  # Only then has a TIFF its upright size.
    # The box is drawn on the image as stored: the law of the crop is the same under all eight orientations, and
    # turning the small result is cheap.
    left, top, width, height = choose_box(*image.size)
    reduction = 1
    if reducible:
        while reduction < 8 and min(width, height) >= 2 * reduction * _REDUCING_GAP * size:
            reduction *= 2
        image.draft(None, (image.width // reduction, image.height // reduction))
    box = [round(edge / reduction) for edge in (left, top, left + width, top + height)]
    resized = _resized(np.array(_to_rgb(image.crop(box))), size)
    swap, reverse = _UPRIGHT.get(_orientation(image), (False, ()))
    return (resized.transpose(0, 1) if swap else resized).flip(reverse).numpy()


def _resized(pixels: UInt8[ndarray, "height width 3"], size: int) -> UInt8[Tensor, "size size 3"]:
    """In a fraction of the time that Pillow's own resize takes."""
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return interpolate(planes, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey, which convert() would clip at 255.
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int | None:
    exif = attempt(image.getexif)  # Broken metadata do not make an image unreadable.
    return None if isinstance(exif, Exception) else exif.get(0x0112)
