"""The updates of a step on a GPU: AdamW, moving average and copies for the next forward, in a launch a group."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from capi.casting import WeightCopies
from capi.drop_path import sent
from capi.model import CAPI
from capi.optim import allocate_states, trained_pairs
from capi_kernels.adamw_triton import TILE, adamw_


class FusedUpdate:
    """What `AdamW.step` of both optimisers and `update_ema` between them do; states and settings are the optimisers'.

    Where an update is skipped, the moving average goes on, as there.
    """

    def __init__(
        self,
        model: CAPI,
        optimizers: tuple[torch.optim.AdamW, torch.optim.AdamW],
        copies: WeightCopies | None,
    ):
        averages = {student: ema for ema, student in trained_pairs(model)}
        for optimizer in optimizers:
            allocate_states(optimizer)
        self.copy_dtype = None if copies is None else copies.dtype
        self.groups = [
            _Group(optimizer, i, averages, {} if copies is None else copies.parts)
            for optimizer in optimizers
            for i in range(len(optimizer.param_groups))
        ]
        device = next(model.parameters()).device
        betas = [optimizer.param_groups[0]["betas"] for optimizer in optimizers]
        self.betas = {
            optimizer: torch.tensor(beta, dtype=torch.float64, device=device)
            for optimizer, beta in zip(optimizers, betas, strict=True)
        }

    @torch.no_grad()
    def __call__(self, momentum: float, found_inf: Float[Tensor, ""]) -> None:
        """Updates nothing but the average where `found_inf` is 1."""
        corrections = {}
        for optimizer, betas in self.betas.items():
            steps = [state["step"] for state in optimizer.state.values()]
            # As a list: a single tensor would be read for the number that it is, and the host wait for the GPU.
            torch._foreach_add_(steps, [1 - found_inf] * len(steps))
            corrections[optimizer] = 1 - betas ** steps[0].double()  # All parameters have taken the same steps.
        for group in self.groups:
            table, aligned = group.table()
            settings = group.settings()
            adamw_(
                table,
                group.tiles,
                found_inf,
                corrections[group.optimizer],
                lr=settings["lr"],
                weight_decay=settings["weight_decay"],
                betas=settings["betas"],
                eps=settings["eps"],
                ema_weight=1 - momentum if group.averaged else None,
                copy_dtype=self.copy_dtype if group.averaged else None,
                aligned=aligned,
            )


class _Group:
    """A parameter group, and where its tensors lie."""

    def __init__(
        self,
        optimizer: torch.optim.AdamW,
        index: int,
        averages: dict[nn.Parameter, nn.Parameter],
        copies: dict[nn.Parameter, Tensor],
    ):
        self.optimizer, self.index = optimizer, index
        self.parameters = [p for p in self.settings()["params"] if p.numel()]
        self.averaged = self.parameters[0] in averages
        average = [averages.get(p) for p in self.parameters]
        # Of the moving average none is kept but what the teacher computes with.
        self.fixed = [
            [x.data_ptr() if x is not None else 0 for x in (p, ema, copies.get(p), copies.get(ema))]
            for p, ema in zip(self.parameters, average, strict=True)
        ]
        self.rows: list[list[int]] = []
        counts = [-(-p.numel() // TILE) for p in self.parameters]
        tensor = np.repeat(np.arange(len(counts)), counts)
        tile = np.concatenate([np.arange(n) for n in counts])
        self.tiles = torch.from_numpy(np.stack([tensor, tile], 1)).to(self.parameters[0].device)

    def settings(self) -> dict:
        return self.optimizer.param_groups[self.index]  # Another after the state has been loaded.

    def table(self) -> tuple[Tensor, bool]:
        """The addresses, which are sent anew where one has changed, and whether all are aligned."""
        rows = []
        for p, (weight, ema, copy, ema_copy) in zip(self.parameters, self.fixed, strict=True):
            state = self.optimizer.state[p]
            moving = [x.data_ptr() for x in (p.grad, state["exp_avg"], state["exp_avg_sq"])]
            rows.append([weight, *moving, ema, copy, ema_copy, p.numel()])
        if rows != self.rows:
            assert all(p.grad.is_contiguous() and p.grad.dtype == torch.float32 for p in self.parameters)
            self.rows = rows
            self.aligned = all(x % 16 == 0 for row in rows for x in row[:-1]) and all(row[-1] % 4 == 0 for row in rows)
            self.sent = sent(torch.tensor(rows), self.parameters[0].device)
        return self.sent, self.aligned
