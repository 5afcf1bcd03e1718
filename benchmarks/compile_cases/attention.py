"""The kernels of attention, with the types that launchers give them of packed, 16-byte aligned projections."""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch

from capi_kernels._capability import TARGETS, attends_as
from capi_kernels.attention import configs
from capi_kernels.attention.configs import FEW, HEAD_DIMS, Config
from capi_kernels.attention.memory_triton import Heads, Sequences
from capi_kernels.attention.packed_rotary_triton import PACK_TOKENS, pack_kernel
from capi_kernels.attention.resident_backward_triton import resident_backward_kernel
from capi_kernels.attention.rotary_triton import ROTATE_TOKENS, Tables, rotate_kernel
from capi_kernels.attention.short_backward_triton import by_queries_backward_kernel, one_tile_backward_kernel
from capi_kernels.attention.short_forward_triton import few_forward_kernel, short_forward_kernel
from capi_kernels.attention.tiled_backward_triton import tiled_dkdv_kernel, tiled_dq_kernel
from capi_kernels.attention.tiled_forward_triton import tiled_forward_kernel
from capi_kernels.attention.weights_triton import Weights, weights_backward_kernel, weights_forward_kernel

TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
HALF = (torch.bfloat16, torch.float16)


def type_of(parameter: str, dtype: str, indexed: bool) -> str | tuple:
    """What a kernel gets of this name, if it is no constant."""
    if (parameter.endswith("heads") and parameter != "heads") or parameter in ("x", "out"):
        return Heads(f"*{dtype}", "i32", "i32")
    if parameter.endswith("tables"):
        return Tables("*fp32", "*fp32")
    if parameter == "sequences":
        return Sequences("*i32", "*i32", "*i32" if indexed else None)
    if parameter in ("weights", "dweights"):  # The rows of dP are as long as there are keys.
        return Weights(f"*{dtype}", *["i32" if parameter == "weights" else "i32?"] * 3)
    if parameter.endswith("_ptr"):
        return "*i32" if parameter.endswith("table_ptr") else "*fp32"
    return "fp32" if parameter.startswith("scale") else "i32?"


def case(
    kernel: Callable, dtype: torch.dtype, head_dim: int, config: Config, indexed: bool = False, own: bool = False
) -> tuple[str, Callable, dict, dict]:
    keys = "+".join(str(n) for n in (config.block_k, config.tail) if n)
    name = f"{TYPES[dtype]} head_dim={head_dim} {config.block_q} x {keys}" + indexed * " kv_index"
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_Q": config.block_q,
        "BLOCK_K": config.block_k,
        "BLOCK_TOKENS": config.block_q,
        "TAIL": config.tail,
        "HEADS": config.heads,
        "STAGES": config.num_stages,
        "SELF": own,
        "KEYS_FIRST": config.keys_first,
    }
    types = {x: constants[x] if x in constants else type_of(x, TYPES[dtype], indexed) for x in kernel.arg_names}
    return name, kernel, types, config.options


def cases(
    kernel: Callable, dtype: torch.dtype, head_dim: int, config_of: Callable[[int], Config | None], **more: bool
) -> list[tuple]:
    """One for each configuration that some capabilities have, with the capabilities that it is launched on."""
    chosen = {target: config_of(attends_as(target)) for target in TARGETS}
    return [
        (*case(kernel, dtype, head_dim, config, **more), [x for x in chosen if chosen[x] == config])
        for config in dict.fromkeys(chosen.values())
        if config is not None
    ]


def short_forward() -> list[tuple]:
    found = []
    for dtype, head_dim in product(HALF, HEAD_DIMS):
        found.append(case(pack_kernel, dtype, head_dim, Config(PACK_TOKENS, 1, 4)))
        for kernel, queries, lengths in (
            (short_forward_kernel, 128, (64, 128, 192, 256, 272, 320)),
            (few_forward_kernel, FEW, (64, 128)),
        ):
            for keys, indexed in product(lengths, (False, True)):
                config_of = partial(configs.short_forward, dtype, head_dim, queries, keys)
                found += cases(kernel, dtype, head_dim, config_of, indexed=indexed)
    return found


def short_backward() -> list[tuple]:
    found = []

    def sharing(config_of: Callable, heads: int, capability: int) -> Config | None:
        config = config_of(False, capability)
        if config is None or heads > config.heads:
            return None
        return config._replace(heads=heads, num_stages=config.num_stages if heads > 1 else 1)

    for dtype, head_dim, keys in product(HALF, HEAD_DIMS, (64, 128)):
        config_of = partial(configs.short_backward, dtype, head_dim, 1024, keys, False)
        found += cases(by_queries_backward_kernel, dtype, head_dim, config_of)
        for queries, own in ((FEW, False), (keys, False), (keys, True)):
            for heads in (1, 2, 3, 4) if own else (1,):
                config_of = partial(sharing, partial(configs.short_backward, dtype, head_dim, queries, keys), heads)
                found += cases(one_tile_backward_kernel, dtype, head_dim, config_of, own=own)
    return found


def resident() -> list[tuple]:
    found = []
    for dtype, head_dim, keys, indexed in product(HALF, HEAD_DIMS, (64, 128), (False, True)):
        config_of = partial(configs.resident_backward, dtype, head_dim, keys)
        found += cases(resident_backward_kernel, dtype, head_dim, config_of, indexed=indexed)
    return found


def weights() -> list[tuple]:
    found = []
    for dtype, head_dim, keys, indexed in product(HALF, HEAD_DIMS, (64, 128), (False, True)):
        for kernel, config_of in (
            (weights_forward_kernel, configs.weights_forward),
            (weights_backward_kernel, configs.weights_backward),
        ):
            found += cases(kernel, dtype, head_dim, partial(config_of, dtype, head_dim, keys), indexed=indexed)
    return found


def tiled() -> list[tuple]:
    found = []
    for dtype, head_dim in product((*HALF, torch.float32), HEAD_DIMS):
        found.append(case(rotate_kernel, dtype, head_dim, Config(ROTATE_TOKENS, 1, 4)))
        for indexed in (False, True):
            for queries in (16, 320, 4096)[: 1 if dtype == torch.float32 else None]:
                config = configs.tiled_forward(dtype, head_dim, queries)
                found.append(case(tiled_forward_kernel, dtype, head_dim, config, indexed))
            for kernel, config_of in ((tiled_dq_kernel, configs.tiled_dq), (tiled_dkdv_kernel, configs.tiled_dkdv)):
                found += cases(kernel, dtype, head_dim, partial(config_of, dtype, head_dim), indexed=indexed)
    return found


CASES = [*short_forward(), *short_backward(), *resident(), *weights(), *tiled()]
