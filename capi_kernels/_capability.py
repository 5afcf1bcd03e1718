"""Which GPUs there are configurations for: compute capabilities times ten."""

import torch

TARGETS = (80, 86, 89, 90, 100, 120)  # What is compiled offline.


def capability(device: torch.device) -> int:
    """That of a device; that of an H100 for the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def attends_as(capability: int) -> int:
    """The capability whose attention kernels a GPU takes: 12.x has the matrix unit and the shared memory of 8.x."""
    return 80 if capability // 10 == 12 else capability
