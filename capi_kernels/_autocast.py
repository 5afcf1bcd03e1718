"""Autocast for ops of which some operands take its dtype (q, k and v, features) and others stay (rotary tables)."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
LIBRARY = torch.library.Library("capi_kernels", "FRAGMENT")  # What it registers lasts as long as it.


def dtype_under_autocast(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives x where it is on for its device; float64 stays, as PyTorch has it."""
    device_type = x.device.type
    if device_type not in KEYS or x.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return x.dtype
    return torch.get_autocast_dtype(device_type)


def cast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast; what is no floating tensor stays for the checks to refuse."""
    if not any(torch.is_autocast_enabled(device_type) for device_type in KEYS):
        return tensors
    return tuple(
        x.to(dtype_under_autocast(x)) if isinstance(x, Tensor) and x.is_floating_point() else x for x in tensors
    )


def autocast_off(device_type: str) -> AbstractContextManager:
    """Autocast off for a device that has it."""
    return torch.autocast(device_type, enabled=False) if device_type in KEYS else nullcontext()


def register_autocast(op: str, count: int = 0) -> None:
    """Called under autocast, the op finds its first `count` operands cast, and autocast off."""
    _, name = op.split("::")
    for device_type, key in KEYS.items():

        def kernel(*operands, device_type: str = device_type):
            tensors = cast_inputs(*operands[:count])
            with autocast_off(device_type):
                return getattr(torch.ops.capi_kernels, name)(*tensors, *operands[count:])

        LIBRARY.impl(name, kernel, key)
