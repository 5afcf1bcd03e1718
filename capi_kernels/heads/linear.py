"""The layer of the clustering head: normalise(features) weight^T + bias."""

from itertools import cycle

import torch
from torch import Tensor

from capi_kernels._checks import check_device, check_not_empty, check_shape, check_tensor


def normalised(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Features divided by their length in float32 or wider, in `dtype`, contiguous."""
    wide = torch.promote_types(features.dtype, torch.float32)
    norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True, dtype=wide).clamp_min_(1e-7)
    return torch.div(features, norm, out=torch.empty(features.shape, dtype=dtype, device=features.device))


class StreamedLinear:
    """normalise(features) weight^T + bias, a chunk of positions at a time, into so many buffers by turns."""

    def __init__(
        self, features: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, chunk: int, buffers: int = 1
    ):
        self.features, self.dtype, self.chunk = features, dtype, chunk
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.buffers = cycle(features.new_empty((buffers, chunk, features.shape[1], len(weight)), dtype=dtype))

    def __call__(self, start: int) -> tuple[Tensor, Tensor]:
        """Logits [p, images, prototypes] and normalised features [p, images, dim] of the positions from `start` on."""
        features = normalised(self.features[start : start + self.chunk], self.dtype)
        logits = next(self.buffers)[: len(features)]
        tokens = features.flatten(0, 1)
        if self.bias is None:
            torch.mm(tokens, self.weight.mT, out=logits.flatten(0, 1))
        else:
            torch.addmm(self.bias, tokens, self.weight.mT, out=logits.flatten(0, 1))
        return logits, features


def check_linear(features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor("weight", weight, "prototypes dim")
    prototypes = len(weight)
    check_not_empty("weight", prototypes=prototypes)
    check_shape("weight", weight, prototypes=prototypes, dim=features.shape[-1])
    check_device("weight", weight, ("features", features))
    if bias is not None:
        check_tensor("bias", bias, "prototypes", like=("weight", weight))
        check_shape("bias", bias, prototypes=prototypes)
