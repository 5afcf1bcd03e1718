"""Which GPUs there are configurations for: compute capabilities times ten."""

import torch

TARGETS = (80, 86, 89, 90, 100, 120)  # What is compiled offline.


def configured_as(capability: int) -> int:
    """The capability whose configurations a GPU takes: 12.x has the registers and the matrix unit of 8.x."""
    return 80 if capability // 10 == 12 else capability


def capability(device: torch.device) -> int:
    """The one that a device is configured as; that of an H100 for the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return configured_as(10 * major + minor)
