"""Crops of encoded images: a box of any image that Pillow reads, upright, as RGB, resized."""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from capi.data.listing import open_image
from capi.data.metadata import without_metadata
from capi.data.retry import attempt

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

_TIFF_BITS = 258  # Bits per sample.

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
    `convert("RGB")` does; 16-bit grey is scaled to 8 bits; metadata of a PNG or JPEG that Pillow cannot bear are left
    out. The result is within two grey levels of Pillow's crop and bicubic resize, rows first, but where a large JPEG is
    decoded small: there the box is rounded to whole pixels of what is decoded, which moves an edge by a quarter of an
    output pixel at most. Raises whatever Pillow raises on broken data, and ValueError for pixels of 32 bits, of which
    nothing says what is white.
    """
    if isinstance(data, Exception):
        raise data
    if isinstance(data, ndarray):
        left, top, width, height = choose_box(data.shape[1], data.shape[0])
        return _resized(data[top : top + height, left : left + width].copy(), (size, size)).numpy()
    image = _opened(data)
    white = _white(image)
    # The box is drawn on the image as stored: the law of the crop is the same under all eight orientations, and
    # turning the small result is cheap.
    left, top, width, height = choose_box(*image.size)
    reduction = 1
    if _is_reducible(image):
        while reduction < 8 and min(width, height) >= 2 * reduction * _REDUCING_GAP * size:
            reduction *= 2
        image.draft(None, (image.width // reduction, image.height // reduction))
    box = [round(edge / reduction) for edge in (left, top, left + width, top + height)]
    return _upright(_resized(np.array(_to_rgb(image.crop(box), white)), (size, size)), image)


def whole(data: bytes, longer_side: Callable[[int], int]) -> UInt8[ndarray, "height width 3"]:
    """The whole image, upright and as RGB as `crop` gives it; `longer_side` maps the length of that side to the wanted.

    Raises what `crop` raises.
    """
    image = _opened(data)
    white = _white(image)
    scale = longer_side(max(image.size)) / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image.draft(None, (_REDUCING_GAP * width, _REDUCING_GAP * height))  # of a JPEG; of another it does nothing
    pixels = np.array(_to_rgb(image, white))
    return _upright(_resized(pixels, (height, width)), image)


def _resized(
    pixels: UInt8[ndarray, "height width 3"], size: tuple[int, int]
) -> UInt8[Tensor, "new_height new_width 3"]:
    """To (height, width), in a fraction of the time that Pillow's own resize takes."""
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return interpolate(planes, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)


def _upright(pixels: UInt8[Tensor, "height width 3"], image: Image.Image) -> UInt8[ndarray, "up_height up_width 3"]:
    swap, reverse = _orientation(image)
    return (pixels.transpose(0, 1) if swap else pixels).flip(reverse).numpy()


def _opened(data: bytes) -> Image.Image:
    try:
        return _opened_as_it_is(data)
    except Exception:
        bare = without_metadata(data)
        if bare is None:
            raise
        return _opened_as_it_is(bare)


def _opened_as_it_is(data: bytes) -> Image.Image:
    image = open_image(data)
    if not _is_reducible(image):
        image.load()  # Only then has a TIFF its upright size.
    return image


def _is_reducible(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO")


def _white(image: Image.Image) -> int:
    """The value of white in the image's mode; ValueError where nothing says so."""
    if image.mode.startswith("I;16"):
        tags = image.tag_v2 if image.format == "TIFF" else {}
        return 2 ** tags.get(_TIFF_BITS, (16,))[0] - 1
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 65535  # Pillow's own choice for these.
    if image.mode in ("I", "F"):
        low, high = image.getextrema()
        kind = "integers" if image.mode == "I" else "floats"
        raise ValueError(
            f"expected pixels of 8 or 16 bits, got mode {image.mode}: {kind} of 32 bits from {low:g} to "
            f"{high:g}, of which nothing says what is black and what is white"
        )
    return 255


def _to_rgb(image: Image.Image, white: int) -> Image.Image:
    if white != 255:
        # Of wide integers, convert() would clip all above 255.
        image = Image.fromarray((np.asarray(image) / (white / 255)).round().clip(0, 255).astype(np.uint8))
    if image.mode == "La":
        image = image.convert("LA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> tuple[bool, tuple[int, ...]]:
    """What `_UPRIGHT` says of the image; broken metadata do not make it unreadable."""
    found = attempt(lambda: _UPRIGHT.get(image.getexif().get(0x0112)))
    return (False, ()) if found is None or isinstance(found, Exception) else found
