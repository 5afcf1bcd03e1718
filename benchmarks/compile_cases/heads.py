"""The kernels of both heads and of Sinkhorn, at the sizes of the paper and at the edges of each form."""

from collections.abc import Callable, Iterator
from itertools import product

import torch

from capi_kernels._capability import TARGETS
from capi_kernels.heads.clustering_head_triton import head_rows_config, head_rows_kernel
from capi_kernels.heads.gradients_triton import CONFIG as SCALE_CONFIG
from capi_kernels.heads.gradients_triton import scale_kernel
from capi_kernels.heads.student_loss_triton import student_rows_config, student_rows_kernel
from capi_kernels.sinkhorn.assignments_triton import assignments_kernel
from capi_kernels.sinkhorn.columns_triton import column_step_kernel, columns_config
from capi_kernels.sinkhorn.common_triton import reduce_config, reduce_kernel, rows_config
from capi_kernels.sinkhorn.rows_triton import (
    first_column_sums_kernel,
    first_sums_config,
    row_step_config,
    row_step_kernel,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PROTOTYPES = (16384, 16000, 4096, 1000)
# Of every parameter that has one type, or value, wherever it occurs.
TYPES = {f"{name}_ptr": "*fp32" for name in ("column_max", "column", "row", "loss", "bias_parts", "parts")}
TYPES |= dict.fromkeys(("row_parts_ptr", "last_row_ptr", "last_row_parts_ptr", "column_parts_ptr"), "*fp32")
TYPES |= dict.fromkeys(("column_sum_ptr", "targets_ptr", "factor_ptr"), "*fp32")
TYPES |= dict.fromkeys(("positions", "images", "prototypes", "rows", "parts", "length", "elements"), "i32")
TYPES |= {
    f"{name}_stride_{axis}": "i32" for name in ("logits", "out", "targets") for axis in ("position", "image", "row")
}
TYPES |= {f"{name}_stride_prototype": 1 for name in ("logits", "out", "targets")} | {"column_stride_position": "i32"}
TYPES |= {f"{name}log2_scale": "fp32" for name in ("", "target_", "prediction_")}
TYPES |= dict.fromkeys(("eps", "limit", "temperature", "prediction_temperature", "scale"), "fp32")


def case(name: str, kernel: Callable, config: dict, *targets: tuple[int, ...], **given: object) -> tuple:
    """One configuration: each parameter's type or value, in the kernel's order, and what the compiler is told."""
    known = TYPES | given | config
    options = {key: value for key, value in config.items() if key not in kernel.arg_names}
    return name, kernel, {parameter: known[parameter] for parameter in kernel.arg_names}, options, *targets


def by_config(configs: dict[int, dict]) -> Iterator[tuple[dict, tuple[int, ...]]]:
    """Each of the configurations once, and the targets that have it."""
    distinct = {tuple(config.items()): config for config in configs.values()}
    for config in distinct.values():
        yield config, tuple(target for target in configs if configs[target] == config)


def columns() -> Iterator[tuple]:
    shapes = (512, 16384), (500, 16384), (256, 16384), (128, 1000), (64, 4096), (16, 1024), (1, 1)
    for (dtype, type_), shape in product(DTYPES.items(), shapes):
        name = f"{dtype}, {shape[0]} images, {shape[1]} prototypes"
        for first, row_sums in ((True, True), (False, True), (False, False)):
            what = f"{name}, {'first' if first else 'later'}{', row sums' if row_sums else ''}"
            configs = {target: columns_config(*shape, type_.itemsize, target, first, row_sums) for target in TARGETS}
            for config, targets in by_config(configs):
                given = {"logits_ptr": f"*{dtype}", "FIRST": first, "ROW_SUMS": row_sums}
                yield case(what, column_step_kernel, config, targets, **given)


def rows() -> Iterator[tuple]:
    for (dtype, type_), prototypes in product(DTYPES.items(), (*PROTOTYPES, 1)):
        name, logits = f"{dtype}, {prototypes} prototypes", {"logits_ptr": f"*{dtype}"}
        config = first_sums_config(512, prototypes, type_.itemsize)
        yield case(name, first_column_sums_kernel, config, **logits)
        config = row_step_config(512, prototypes, type_.itemsize)
        for sums in (True, False):
            what = f"{name}{', column sums' if sums else ''}"
            yield case(what, row_step_kernel, config, **logits, COLUMN_SUMS=sums)
        for index, gather, update in (
            (None, True, True),
            (None, True, False),
            ("*i64", True, False),
            ("*i64", False, False),
        ):
            what = f"{name}{', last row sums' if update else ''}{', chosen rows' if index else ''}"
            what += "" if gather else " given"
            given = {"rows_ptr": index, "out_ptr": "*fp32" if index else f"*{dtype}"}
            given |= {"GATHER": gather, "UPDATE_ROW": update}
            yield case(what, assignments_kernel, rows_config(prototypes), **logits, **given)
    for update in (True, False):
        what = "row potentials" if update else "column sums"
        yield case(what, reduce_kernel, reduce_config(128, 512), out_ptr="*fp32", parts_ptr="*fp32", UPDATE=update)


def heads() -> Iterator[tuple]:
    for (dtype, type_), prototypes in product(DTYPES.items(), PROTOTYPES):
        name, logits = f"{dtype}, {prototypes} prototypes", {"logits_ptr": f"*{dtype}"}
        configs = {target: head_rows_config(prototypes, type_, target) for target in TARGETS}
        for config, targets in by_config(configs):
            yield case(name, head_rows_kernel, config, targets, **logits)
        config = student_rows_config(prototypes, type_.itemsize)
        for statistics in (False, True):
            given = {"entropy_ptr": "*fp32", "most_likely_ptr": "*i64"}
            given = given if statistics else dict.fromkeys(given)
            what = f"{name}{', statistics' if statistics else ''}"
            yield case(what, student_rows_kernel, config, **logits, **given, gradient_ptr=f"*{dtype}")
    for dtype in DTYPES:
        yield case(dtype, scale_kernel, SCALE_CONFIG, x_ptr=f"*{dtype}")


CASES = [*columns(), *rows(), *heads()]
