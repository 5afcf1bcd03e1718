"""Schedules, AdamW parameter groups, and the exponential moving average."""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from capi.config import OptimConfig, ScheduleConfig
from capi.model import CAPI
from capi.sharding import local


def schedule_value(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The schedule's value at a step of `steps`: frozen at 0, linear warm-up, truncated cosine, then `final`."""
    if step >= steps:
        return float(schedule.final)
    if step < schedule.freeze_steps:
        return 0.0
    step -= schedule.freeze_steps
    if step < schedule.warmup_steps:
        return schedule.start + (schedule.base - schedule.start) * step / max(schedule.warmup_steps - 1, 1)
    progress = (step - schedule.warmup_steps) / (steps - schedule.freeze_steps - schedule.warmup_steps)
    cosine = 1 + math.cos(math.pi * schedule.truncate * progress)
    return schedule.final + 0.5 * (schedule.base - schedule.final) * cosine


def build_optimizers(model: CAPI, config: OptimConfig) -> tuple[torch.optim.AdamW, torch.optim.AdamW]:
    """AdamW of the student, in groups of (learning rate, weight decay) multipliers, and of the clustering layer."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.student.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(_multipliers(name, config), []).append(parameter)
    student = torch.optim.AdamW(
        [
            {"params": params, "lr_multiplier": lr, "weight_decay": config.weight_decay * decay}
            for (lr, decay), params in groups.items()
        ],
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    clustering = torch.optim.AdamW(
        model.teacher["head"].parameters(),
        betas=config.betas if config.clustering_betas is None else config.clustering_betas,
        eps=config.eps if config.clustering_eps is None else config.clustering_eps,
        weight_decay=config.clustering_weight_decay,
        fused=True,
    )
    return student, clustering


def _multipliers(name: str, config: OptimConfig) -> tuple[float, float]:
    """Learning-rate and weight-decay multipliers of a student parameter."""
    lr = config.patch_embed_lr_multiplier if "patch_embed" in name else 1.0
    if name.endswith(".bias"):
        return lr, 0.0
    return lr, config.norm_weight_decay_multiplier if "norm.weight" in name else 1.0


def set_learning_rates(
    student: torch.optim.Optimizer, clustering: torch.optim.Optimizer, lr: float, clustering_lr: float
) -> None:
    for group in student.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
    for group in clustering.param_groups:
        group["lr"] = clustering_lr


def allocate_states(optimizer: torch.optim.Optimizer) -> None:
    """Makes the moments, zeros, of a fused optimiser before its first step rather than in it.

    There they would lie between activations, whose memory could then not be given back.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.found_inf = torch.ones((), device=parameters[0].device)  # A step that updates nothing.
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> Bool[Tensor, ""]:
    """Whether every value is, on the device: one pass over the tensors, which must be of one device. Integers are.

    Of sharded tensors, those of this rank.
    """
    of_type: dict[torch.dtype, list[Tensor]] = {}
    for x in map(local, tensors):
        if x.numel() and x.is_floating_point():
            of_type.setdefault(x.dtype, []).append(x)
    # Of the largest value: squares of values above 1e19 would overflow.
    norms = [torch.stack(torch._foreach_norm(same, torch.inf)) for same in of_type.values()]
    return torch.cat(norms).isfinite().all()


def trained_pairs(model: CAPI) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Parameters of the moving average with those of the student that they follow."""
    pairs = zip(model.student_ema.parameters(), model.student.parameters(), strict=True)
    return [(ema, student) for ema, student in pairs if student.requires_grad]


@torch.no_grad()
def update_ema(model: CAPI, momentum: float) -> None:
    """Moves the moving average towards the student: ema <- momentum * ema + (1 - momentum) * student."""
    # Both sharded in the same way, if they are: each rank moves its own rows.
    ema, student = (list(map(local, side)) for side in zip(*trained_pairs(model), strict=True))
    torch._foreach_lerp_(ema, student, 1 - momentum)
