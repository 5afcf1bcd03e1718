"""The teacher's features of earlier images, which are balanced with those of a batch that is small for Sinkhorn."""

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn


class FeatureQueue(nn.Module):
    """Features of the last `size` images of all ranks, in the order in which they came.

    Each rank balances its share, but holds all: the state is the same on every rank, so that what one of them saves is
    whole, and any number of ranks goes on from it.
    """

    features: Float[Tensor, "size positions dim"]
    stored: Tensor  # int64: images that have ever been stored

    def __init__(self, size: int, n_positions: int, dim: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.register_buffer("features", torch.zeros((size, n_positions, dim), dtype=dtype, device=device))
        self.register_buffer("stored", torch.zeros((), dtype=torch.int64, device=device))
        self._full = False
        self._work: dist.Work | None = None

    def share(self) -> Float[Tensor, "share positions dim"] | None:
        """This rank's part; None while there are fewer images than the queue holds."""
        # Of all steps only those until then have the host wait for the device.
        self._full = self._full or bool(self.stored >= len(self.features))
        if not self._full:
            return None
        if not dist.is_initialized():
            return self.features
        return self.features.chunk(dist.get_world_size())[dist.get_rank()]

    def send(self, features: Float[Tensor, "images positions dim"]) -> None:
        """Brings the features of all ranks' images, as many of each, on their way to all ranks."""
        self._arriving = features = features.detach().contiguous()
        if dist.is_initialized():
            n = dist.get_world_size() * len(features)
            self._arriving = features.new_empty((n, *features.shape[1:]))
            self._work = dist.all_gather_into_tensor(self._arriving, features, async_op=True)

    def store(self, finite: Bool[Tensor, ""]) -> None:
        """Puts what was sent in the place of the oldest; where the step is not `finite`, the queue stays as it is."""
        if self._work is not None:
            self._work.wait()
        new, self._arriving, self._work = self._arriving, None, None
        place = (self.stored + torch.arange(len(new), device=new.device)) % len(self.features)
        self.features[place] = new.to(self.features.dtype).where(finite, self.features[place])
        self.stored += finite * len(new)

    def forget(self) -> None:
        """Begins anew, with no image."""
        self.features.zero_()
        self.stored.zero_()
        self._full = False
