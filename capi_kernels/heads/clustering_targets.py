"""The targets of chosen tokens, made of the clustering head's potentials and of these tokens' features alone."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from capi_kernels._autocast import autocast_off, dtype_under_autocast
from capi_kernels._checks import check_chosen, check_not_empty, check_positive, check_shape, check_tensor
from capi_kernels.heads.linear import check_linear, normalised
from capi_kernels.reference import Potentials


@torch.no_grad()
def clustering_targets(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    potentials: Potentials,
    rows: Tensor,
    *,
    target_temperature: float = 0.06,
) -> Float[Tensor, "selected prototypes"]:
    """The assignments that `clustering_head` balanced, of chosen rows, made of its potentials and these rows' features.

    The logits are computed as in the head, in the dtype of the features (under autocast, its dtype), so that the
    targets are those of the head's loss but for the rounding of a matrix product of another shape. No gradient.

    Args:
        features: [selected, dim], those of the rows, in their order; any floating dtype and strides, of any length.
        weight, bias: [prototypes, dim] and [prototypes] or None, as the head had them.
        potentials: those that the head returned.
        rows: int32 or int64 [selected], image * positions + position of the tokens, in any order, with repeats.
        target_temperature: that of the head.

    Returns:
        Targets [selected, prototypes] in float32 (float64 for float64), in the order of `rows`.

    Raises:
        TypeError: features, weight or bias that are not floating point, potentials that are not float32 or float64,
            rows that are not int32 or int64.
        ValueError: other shapes or devices, an empty axis but the rows', rows out of range (looked at on a CPU,
            uncompiled), a temperature that is not positive and finite.
    """
    check_tensor("features", features, "selected dim")
    selected, dim = features.shape
    check_not_empty("features", dim=dim)
    check_linear(features, weight, bias)
    check_chosen("rows", rows, potentials, len(weight), ("features", features))
    check_shape("rows", rows, selected=selected)
    check_positive(target_temperature=target_temperature)
    dtype = dtype_under_autocast(features)
    with autocast_off(features.device.type):
        logits = F.linear(normalised(features, dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    wide = torch.promote_types(dtype, torch.float32)
    return torch.ops.capi_kernels.assignments_from_potentials(logits, *potentials, rows, target_temperature, wide)
