"""The student's loss on a CPU, a few rows at a time, which stay in a core's cache."""

import torch
from torch import Tensor

from capi_kernels.heads.cross_entropy_cpu import SoftCrossEntropy


def student_loss(
    logits: Tensor, targets: Tensor, temperature: float, scale: float, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean loss, scale (t - softmax(z) sum(t)), and the targets' statistics.

    These are their mean entropy and their most likely prototypes, or empty.
    """
    predicted, prototypes = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    gradient = torch.empty((predicted, prototypes), dtype=logits.dtype)
    entropy = torch.empty(predicted if statistics else 0, dtype=wide)
    most_likely = torch.empty(predicted if statistics else 0, dtype=torch.int64)
    loss = torch.zeros((), dtype=torch.float64)
    cross_entropy = SoftCrossEntropy(predicted, prototypes, wide, temperature)
    for start in range(0, predicted, cross_entropy.rows):
        here = slice(start, start + cross_entropy.rows)
        t = targets[here].to(wide).contiguous()
        loss += cross_entropy(t, logits[here], gradient[here], scale)
        if statistics:
            entropy[here] = cross_entropy.entropies(t)
            most_likely[here] = t.argmax(-1)
    return (loss / predicted).to(wide), gradient, entropy.mean() if statistics else entropy, most_likely
