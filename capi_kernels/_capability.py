"""Which GPUs there are configurations for: compute capabilities times ten, and AMD's."""

import torch

AMD = 0  # Stands for gfx942 and gfx950 alike; none of the kernels has run on either yet.
TARGETS = (80, 86, 89, 90, 100, 120, AMD)  # What is compiled offline.


def capability(device: torch.device) -> int:
    """That of a device; that of an H100 for the interpreter."""
    if device.type != "cuda":
        return 90
    if torch.version.hip is not None:
        return AMD
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def attends_as(capability: int) -> int:
    """The capability whose attention kernels a GPU takes: 12.x has the matrix unit and the shared memory of 8.6."""
    return 86 if capability // 10 == 12 else capability


def launch_options(options: dict, amd: bool = torch.version.hip is not None) -> dict:
    """How a kernel is launched: AMD's warps have 64 threads, so that half as many do, and no limit on registers."""
    if not amd:
        return options
    return {name: x for name, x in options.items() if name != "maxnreg"} | {
        "num_warps": max(1, options["num_warps"] // 2)
    }
