"""Images as the encoder takes them: normalised, and of sides that divide by the patch."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_images(
    images: Shaped[Tensor, "*images channels height width"],
) -> Float[Tensor, "*images 3 height width"]:
    """Maps bytes [..., 3, height, width] to fp32 of ImageNet's mean 0 and standard deviation 1.

    Raises:
        TypeError: the images are not uint8; of floats it cannot be told whether they reach to 1 or to 255.
        ValueError: they have not three channels.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a tensor of torch.uint8, with values from 0 to 255, got {got}")
    if images.ndim < 3 or images.shape[-3] != 3:
        raise ValueError(f"images must have the shape [..., 3, height, width], got {tuple(images.shape)}")
    mean, std = (_channels(values, images).unsqueeze(2) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images / 255 - mean) / std


def resized(
    images: Shaped[Tensor, "images 3 height width"],
    patch_size: int,
    size: int | tuple[int, int] | Literal["multiple"],
) -> Shaped[Tensor, "images 3 new_height new_width"]:
    """Bicubic with antialiasing, as the official evaluation resizes; in the type that came, bytes rounded.

    Args:
        images: of any size.
        patch_size: what the new sides divide by.
        size: (height, width) in pixels; or the pixels of the shorter side, to which the longer one keeps its proportion
            up to the nearest multiple; or "multiple": both sides to the nearest multiple, and at least one patch.

    Raises:
        ValueError: sizes that do not divide by the patch, or images without pixels.
    """
    height, width = images.shape[-2:]
    if not (height and width):
        raise ValueError(f"images must have pixels to be resized, got {tuple(images.shape)}")
    if size == "multiple":
        new = tuple(_multiple(side, patch_size) for side in (height, width))
    elif isinstance(size, int):
        new = tuple(
            size if side == min(height, width) else _multiple(side * size / min(height, width), patch_size)
            for side in (height, width)
        )
    else:
        new = tuple(size) if isinstance(size, tuple | list) else ()
    if len(new) != 2 or any(not isinstance(side, int) or side < 1 or side % patch_size for side in new):
        raise ValueError(
            f"resize must be multiples of the patch size {patch_size}: (height, width), one number for the shorter "
            f'side, or "multiple"; got {size}'
        )
    if new == (height, width):
        return images
    fine = F.interpolate(images.float(), new, mode="bicubic", antialias=True)
    return fine.round().clamp(0, 255).to(images.dtype) if images.dtype == torch.uint8 else fine.to(images.dtype)


def _multiple(side: int | float, patch_size: int) -> int:
    return max(1, round(side / patch_size)) * patch_size


def _channels(values: tuple[float, ...], like: Tensor) -> Float[Tensor, "3 1"]:
    # Made on the device: torch.tensor would copy from memory that is not pinned, and wait for the GPU.
    channel = torch.arange(3, device=like.device).unsqueeze(1)
    first, second, third = values
    return torch.where(channel == 0, first, torch.where(channel == 1, second, third))
