"""How each attention kernel is tiled and compiled, by dtype, head_dim, lengths and what GPU there is.

`capability` is the one that a GPU attends as (`capi_kernels._capability`). None: the kernel does not do this.
"""

from typing import NamedTuple

import torch

from capi_kernels._capability import AMD, launch_options

HEAD_DIMS = (16, 32, 64, 80, 96, 128)  # What is compiled offline; any up to 128 runs.
RESIDENT_KEYS = 128  # The longest context that one tile of keys holds.
FEW = 16  # Queries that one instruction takes.


class Config(NamedTuple):
    """Tile sizes, and how a kernel is compiled.

    tail: a second tile of keys. heads: that share a program. keys_first: scores are [keys, queries].
    """

    block_q: int
    block_k: int
    num_warps: int
    max_registers: int | None = None
    num_stages: int = 1
    tail: int = 0
    heads: int = 1
    keys_first: bool = False

    @property
    def options(self) -> dict:
        # Fused multiply-adds are wanted: every product here is summed in float32 right away.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return launch_options(options if self.max_registers is None else {**options, "maxnreg": self.max_registers})


def short_forward(
    dtype: torch.dtype, head_dim: int, max_seqlen_q: int, max_seqlen_k: int, capability: int
) -> Config | None:
    """None where the keys do not fit: too many, or float32, whose products take no matrix unit; and on AMD."""
    wide = head_dim > 64
    if dtype == torch.float32 or capability == AMD or max_seqlen_k > (128 if wide else 192 if capability < 90 else 320):
        return None
    if max_seqlen_q <= FEW and max_seqlen_k <= 128:
        # Eight warps: with four, an H100 has taken kernels of this kind (Triton 3.6.0) to wrong results.
        if max_seqlen_k > 64:
            return Config(FEW, 128, 8, keys_first=True)
        # A limit keeps the assembler of Triton 3.8 from one of its own, 48, which would spill.
        return Config(FEW, 64, 8, max_registers=64 if head_dim == 32 and capability < 90 else None, keys_first=True)
    if max_seqlen_k <= 64:
        return Config(64, 64, 8 if wide else 4)
    if wide:
        return Config(64, 128, 8)
    if max_seqlen_k <= 128:
        # 128 registers let four programs share a processor: one loads while the others compute.
        return Config(64, 128, 4, max_registers=128 if capability == 90 else None)
    if max_seqlen_k <= 192:
        return Config(64, 128, 4, tail=64)
    # The 256 patches of a whole image, then with its class token and registers.
    tail = next(n for n in (0, 16, 64) if max_seqlen_k <= 256 + n)
    return Config(64, 256, 4 if capability == 90 else 8, tail=tail)


def tiled_forward(dtype: torch.dtype, head_dim: int, max_seqlen_q: int) -> Config:
    wide = head_dim > 64
    if dtype == torch.float32:
        return Config(32, 32, 8 if wide else 4)
    if max_seqlen_q <= 16:
        return Config(16, 64, 4, num_stages=2)
    stages = 2 if wide else 3
    if max_seqlen_q <= 320:  # 272 tokens fill 5 tiles of 64, or 3 of 128.
        return Config(64, 64, 4, num_stages=stages)
    return Config(128, 64, 8, num_stages=stages)


def short_backward(
    dtype: torch.dtype, head_dim: int, max_seqlen_q: int, max_seqlen_k: int, has_index: bool, capability: int
) -> Config | None:
    """None where this is not the kernel: contexts that several groups read, keys that do not fit, float32, or AMD."""
    if dtype == torch.float32 or has_index or head_dim > 64 or max_seqlen_k > 128 or capability == AMD:
        return None
    block_k = 64 if max_seqlen_k <= 64 else 128
    if max_seqlen_q <= FEW:
        # 128 registers let two programs share a processor: one loads while the other computes. 8.6 and its like spill.
        return Config(FEW, block_k, 8, max_registers=168 if capability in (86, 89) else 128, keys_first=True)
    if block_k == 64:
        return None if capability in (86, 89) and head_dim > 32 and max_seqlen_q > 64 else Config(64, 64, 8)
    if capability < 90:
        return Config(128, 128, 8) if head_dim <= 32 and max_seqlen_q <= 128 else None
    if max_seqlen_q > 128:  # Where it has run, on an H100, with tiles of 128.
        return Config(128 if capability == 90 else 64, 128, 8)
    if capability != 90:
        return Config(128, 128, 8)
    # One program fills a processor: it loads the tiles of the next head while it computes, in 225 of an H100's 227 KiB.
    return Config(128, 128, 8, num_stages=2, heads=4)


def resident_backward(dtype: torch.dtype, head_dim: int, max_seqlen_k: int, capability: int) -> Config | None:
    """None where the keys do not fit: too many, heads too wide, or float32, whose products take no matrix unit."""
    wide = head_dim > 64
    if dtype == torch.float32 or max_seqlen_k > RESIDENT_KEYS:
        return None
    if max_seqlen_k > 64 and head_dim > 32 and capability < 90:
        return None
    if max_seqlen_k <= 64:
        return Config(16, 64, 8 if wide else 4)
    return Config(16, 128, 8)


def tiled_dq(dtype: torch.dtype, head_dim: int, capability: int) -> Config:
    wide = head_dim > 64
    if dtype == torch.float32:
        return Config(16, 16, 8) if wide else Config(16, 32, 4)
    return Config(64, 32 if wide else 64, 8 if wide and capability < 90 else 4, num_stages=2)


def tiled_dkdv(dtype: torch.dtype, head_dim: int, capability: int) -> Config:
    wide = head_dim > 64
    if dtype == torch.float32:
        return Config(32, 16, 8 if wide else 4, max_registers=255 if capability in (86, 89) else 168 if wide else 128)
    if wide:
        return Config(16, 32 if capability < 90 else 64, 8, num_stages=2)
    # A limit of 255 keeps the assembler from a lower one of its own, which would spill.
    if head_dim <= 32:
        return Config(32, 64, 4, max_registers=255, num_stages=2)
    if capability == 90:
        return Config(32, 64, 4, num_stages=2)
    return Config(32, 64, 8, max_registers=255 if capability >= 100 else None, num_stages=2)


def weights_backward(dtype: torch.dtype, head_dim: int, max_seqlen_k: int, capability: int) -> Config | None:
    """None where the keys do not fit: too many, or float32."""
    if dtype == torch.float32 or max_seqlen_k > RESIDENT_KEYS:
        return None
    # Warps that compile without spills on every target; where registers are short, no limit but that of the hardware.
    most = 255 if capability < 90 else None
    if max_seqlen_k <= 64:
        return Config(16, 64, 4 if 32 < head_dim <= 64 else 8, most)
    return Config(16, 128, 4 if head_dim <= 32 else 8, most)


def weights_forward(dtype: torch.dtype, head_dim: int, max_seqlen_k: int, capability: int) -> Config | None:
    """That of the backward but for registers: 128 let two programs share a processor."""
    config = weights_backward(dtype, head_dim, max_seqlen_k, capability)
    if config is None:
        return None
    fits = max_seqlen_k > 64 and 32 < head_dim <= 64
    return config._replace(max_registers=128 if fits else config.max_registers)
