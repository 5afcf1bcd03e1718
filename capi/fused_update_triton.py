"""The updates of a step on a GPU: AdamW, moving average and copies for the next forward, in a launch a group."""

from collections.abc import Container, Iterator, Sequence

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
        parts = {} if copies is None else copies.parts
        self.groups = [
            _Group(optimizer, i, parameters, averages, parts)
            for optimizer in optimizers
            for i, group in enumerate(optimizer.param_groups)
            for parameters in _by_copies(group["params"], parts)
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
            table, aligned, gradient_dtype = group.table()
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
                gradient_dtype=gradient_dtype,
                copy_dtype=self.copy_dtype if group.copied else None,
                aligned=aligned,
            )


def _by_copies(parameters: Sequence[nn.Parameter], copies: Container[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Those with copies, whose gradients may be of the type of these, and those without, as far as there are any."""
    for copied in (True, False):
        if some := [p for p in parameters if p.numel() and (p in copies) == copied]:
            yield some


class _Group:
    """Of a parameter group those with copies or those without, and where their tensors lie."""

    def __init__(
        self,
        optimizer: torch.optim.AdamW,
        index: int,
        parameters: list[nn.Parameter],
        averages: dict[nn.Parameter, nn.Parameter],
        copies: dict[nn.Parameter, Tensor],
    ):
        self.optimizer, self.index, self.parameters = optimizer, index, parameters
        self.averaged, self.copied = parameters[0] in averages, parameters[0] in copies
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

    def table(self) -> tuple[Tensor, bool, torch.dtype]:
        """The addresses, sent anew where one has changed; whether all are aligned; the type of the gradients."""
        rows = []
        for p, (weight, ema, copy, ema_copy) in zip(self.parameters, self.fixed, strict=True):
            state = self.optimizer.state[p]
            moving = [x.data_ptr() for x in (p.grad, state["exp_avg"], state["exp_avg_sq"])]
            rows.append([weight, *moving, ema, copy, ema_copy, p.numel()])
        dtype = self.parameters[0].grad.dtype
        if rows != self.rows:
            assert all(p.grad.is_contiguous() and p.grad.dtype == dtype for p in self.parameters)
            self.rows = rows
            self.aligned = all(x % 16 == 0 for row in rows for x in row[:-1]) and all(row[-1] % 4 == 0 for row in rows)
            self.sent = sent(torch.tensor(rows), self.parameters[0].device)
        return self.sent, self.aligned, dtype
