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
KINDS = {  # name: the average, the types of gradient and copies
    "average, copies and gradient in bf16": (True, tl.bfloat16, tl.bfloat16),
    "average, copies in bf16": (True, tl.float32, tl.bfloat16),
    "average": (True, tl.float32, None),
    "alone": (False, tl.float32, None),
}
CASES = [
    (
        name if aligned else f"{name}, not aligned",
        adamw_kernel,
        TYPES | {"EMA": ema, "GRADIENT_TYPE": gradient, "COPY_TYPE": copy, "ALIGNED": aligned, "TILE": TILE},
        {"num_warps": CONFIG["num_warps"]},
    )
    for name, (ema, gradient, copy) in KINDS.items()
    for aligned in (True, False)
]
