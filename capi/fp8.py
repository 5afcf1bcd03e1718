"""Products in 8-bit floating point (e4m3): x W^T, the rows of x and of W each scaled by a power of two."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from capi.config import Config
from capi.distributed import World, is_sharded

DTYPE = torch.float8_e4m3fn
LARGEST = 256.0  # The largest power of two that there is.
SINCE = (8, 9)  # The compute capability that brought such products.


class Quantized(NamedTuple):
    """values * scale, the values in 8 bits."""

    values: Shaped[Tensor, "rows columns"]
    scale: Float[Tensor, "rows 1"]

    def dequantized(self) -> Float[Tensor, "rows columns"]:
        return self.values.float() * self.scale


def quantized(x: Float[Tensor, "rows columns"]) -> Quantized:
    """Each row to its own scale, so that its largest value lies above half of `LARGEST`.

    The scale is a power of two, which changes the exponents of a row alone. The last bit of another, which devices and
    compilers round in their own ways, decides how ties are rounded, a sixteenth of some rows: they differed by 2 %.
    """
    wide = x.float()
    largest = wide.abs().amax(1, keepdim=True).clamp(min=2.0**-100)
    # The next power of two: whatever there is of a fraction carries over to the exponent.
    scale = (largest.view(torch.int32) + 0x7FFFFF & 0x7F800000).view(torch.float32) / LARGEST
    return Quantized((wide / scale).to(DTYPE), scale)


def fp8_linear(x: Float[Tensor, "tokens width"], weight: Quantized) -> Float[Tensor, "tokens dim"]:
    """x weight^T in the type of x, rounded to bfloat16 on a GPU; a CPU multiplies the quantised values in float32."""
    x8 = quantized(x)
    if x.device.type == "cpu":
        return (x8.dequantized() @ weight.dequantized().mT).to(x.dtype)
    scales = {"scale_a": x8.scale, "scale_b": weight.scale.mT}
    # Sums of fewer bits, at twice the speed: what they lose is little beside the 3 bits of the factors.
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    return torch._scaled_mm(x8.values, weight.values.mT, **scales, **options).to(x.dtype)


def fp8_obstacle(config: Config, world: World) -> str | None:
    """Why the teacher cannot compute in 8 bits; None where it can."""
    if is_sharded(config, world):
        return "distributed.shard is full, which gathers weights in the compute type"
    if config.model.embed_dim % 16:
        return f"model.embed_dim {config.model.embed_dim} is no multiple of 16"
    if world.device.type == "cuda" and (found := torch.cuda.get_device_capability(world.device)) < SINCE:
        return "the GPU is of compute capability {}.{}, expected {}.{} or later".format(*found, *SINCE)
    return None
