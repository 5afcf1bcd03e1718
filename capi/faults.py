"""Which rank's numbers are not finite: where they are reduced, those of one rank become those of all."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from capi.distributed import gather
from capi.optim import all_finite

STAGES = ("teacher features", "loss", "gradients")


class Faults:
    """The first stage, in the steps since the last good one, at which numbers of this rank were not finite.

    Each is looked at before it is reduced; a later one follows from what earlier ones gave to all ranks. Stays on the
    device, until `named` is asked.
    """

    def __init__(self, device: torch.device):
        self._none = torch.tensor(len(STAGES), device=device)
        self._first = self._of_step = self._none

    def look(self, stage: str, tensors: Iterable[Tensor]) -> None:
        found = torch.where(all_finite(tensors), self._none, STAGES.index(stage))
        self._of_step = torch.minimum(self._of_step, found)

    def average(self, bucket: dist.GradBucket):  # PyTorch's own futures are not of the one annotation that it allows.
        """The mean of gradients over the ranks, on its way: a hook of DistributedDataParallel."""
        self.look("gradients", [bucket.buffer()])
        return allreduce_hook(None, bucket)

    def step_ends(self, finite: Tensor) -> None:
        """`finite`: whether all that was reduced is."""
        self._first = torch.where(finite, self._none, torch.minimum(self._first, self._of_step))
        self._of_step = self._none

    def named(self) -> str:
        """Called by all ranks: those whose numbers were not finite first, as "rank 1's gradients"; "" for none."""
        stages = gather(int(self._first))
        first = min(stages)
        if first == len(STAGES):
            return ""
        return ", ".join(f"rank {rank}'s {STAGES[first]}" for rank, stage in enumerate(stages) if stage == first)
