"""The kernels of the update."""

import triton.language as tl

from capi_kernels.adamw_triton import CONFIG, TILE, adamw_kernel

TYPES = {
    "table_ptr": "*i64",
    "tiles_ptr": "*i64",
    "found_inf_ptr": "*fp32",
    "corrections_ptr": "*fp64",
    "lr": "fp32",
    "weight_decay": "fp32",
    "beta1": "fp32",
    "one_minus_beta1": "fp32",
    "beta2": "fp32",
    "one_minus_beta2": "fp32",
    "eps": "fp32",
    "ema_weight": "fp32",
}
CASES = [
    (
        f"{'average' if ema else 'alone'}{', copies in bf16' if copy else ''}{'' if aligned else ', not aligned'}",
        adamw_kernel,
        TYPES | {"EMA": ema, "COPY_TYPE": copy, "ALIGNED": aligned, "TILE": TILE},
        {"num_warps": CONFIG["num_warps"]},
    )
    for ema, copy in ((True, tl.bfloat16), (True, None), (False, None))
    for aligned in (True, False)
]
