"""Autocast for ops of which some operands take its dtype (q, k and v) and others stay (rotary tables)."""

import torch
from torch import Tensor

KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
LIBRARY = torch.library.Library("capi_kernels", "FRAGMENT")  # What it registers lasts as long as it.


def cast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast where it is on for their device; float64 stays, as PyTorch has it."""
    if not all(isinstance(x, Tensor) for x in tensors):
        return tensors  # For the checks to refuse.
    device_type = tensors[0].device.type
    if device_type not in KEYS or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    # Others than floating tensors stay for the checks to refuse.
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def register_autocast(op: str, count: int) -> None:
    """Called under autocast, the op finds its first `count` operands cast, and autocast off."""
    _, name = op.split("::")
    for device_type, key in KEYS.items():

        def kernel(*operands, device_type: str = device_type):
            tensors = cast_inputs(*operands[:count])
            with torch.autocast(device_type, enabled=False):
                return getattr(torch.ops.capi_kernels, name)(*tensors, *operands[count:])

        LIBRARY.impl(name, kernel, key)
