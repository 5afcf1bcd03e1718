"""The soft cross-entropy of both heads on a CPU, and its gradient, in blocks of rows that stay in a core's cache."""

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 20  # Rows that stay in a core's cache between the passes of the cross-entropy.


class SoftCrossEntropy:
    """Cross-entropy of rows in cache-sized blocks, with the buffers that it reuses."""

    def __init__(self, rows: int, prototypes: int, dtype: torch.dtype, temperature: float):
        self.rows = max(1, min(rows, BLOCK_BYTES // (prototypes * dtype.itemsize)))
        self.temperature = temperature
        self.scaled, self.log_p = torch.empty((2, self.rows, prototypes), dtype=dtype).unbind(0)

    def __call__(self, targets: Tensor, logits: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
        """Sum over at most `rows` rows of -sum(t log_softmax(z)), z = logits / temperature, in float64.

        Of its gradient in z, t - softmax(z) sum(t) times `scale` is written to `out`, which may be `logits`.
        """
        z, log_p = self.scaled[: len(logits)], self.log_p[: len(logits)]
        torch.div(logits.to(z.dtype), self.temperature, out=z)
        torch.log_softmax(z, -1, out=log_p)
        loss = -torch.mul(targets, log_p, out=z).sum().double()  # more exact than a dot product
        gradient = out if out.dtype == z.dtype else z
        torch.ops.aten._log_softmax_backward_data.out(targets, log_p, -1, z.dtype, out=gradient)
        if scale != 1:
            gradient.mul_(scale)
        if gradient is not out:
            out.copy_(gradient)
        return loss

    def entropies(self, targets: Tensor) -> Tensor:
        """-sum(t log t) of each row, in the buffer of the logits."""
        log_t = torch.clamp(targets, min=torch.finfo(targets.dtype).tiny, out=self.scaled[: len(targets)]).log_()
        return -log_t.mul_(targets).sum(-1)
