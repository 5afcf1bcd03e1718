"""The official model, teacher and student restated in plain PyTorch, for where the official code is not at hand.

Dense attention after a separate rotary embedding, Sinkhorn in place with all targets kept, log-softmax. State
dictionaries are those of `capi.model.CAPI`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import official_sinkhorn, official_student_loss
from capi.config import Config

NORM_EPS = 1e-5


class Rope(nn.Module):
    def __init__(self, head_dim: int):
        super().__init__()
        self.freqs = nn.Parameter(torch.empty(2, head_dim))

    def forward(self, x: Tensor, coords: Tensor) -> Tensor:
        angle = coords @ self.freqs
        x1, x2 = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat((-x2, x1), dim=-1) * angle.sin()


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.rope = Rope(dim // heads)

    def forward(self, x: Tensor, coords: Tensor, context: Tensor | None, context_coords: Tensor | None) -> Tensor:
        if context is None:
            context, context_coords = x, coords
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.q_proj(x), self.k_proj(context), self.v_proj(context))
        )
        q, k = self.rope(q, coords[:, None]), self.rope(k, context_coords[:, None])
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor, *_: None) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Residual(nn.Module):
    def __init__(self, dim: int, fn: nn.Module, drop_path: float):
        super().__init__()
        self.norm, self.fn, self.keep = nn.RMSNorm(dim, eps=NORM_EPS), fn, 1 - drop_path

    def forward(self, x: Tensor, *others: Tensor | None) -> Tensor:
        if self.keep == 1 or not self.training:
            return x + self.fn(self.norm(x), *others)
        images = len(x)
        kept = torch.randperm(images, device=x.device)[: max(int(images * self.keep), 1)]
        others = [None if y is None else y[kept] for y in others]
        return torch.index_add(x, 0, kept, self.fn(self.norm(x[kept]), *others), alpha=images / len(kept))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, drop_path: float):
        super().__init__()
        self.residual1 = Residual(dim, Attention(dim, heads), drop_path)
        self.residual2 = Residual(dim, Mlp(dim), drop_path)

    def forward(
        self, x: Tensor, coords: Tensor, context: Tensor | None = None, context_coords: Tensor | None = None
    ) -> Tensor:
        return self.residual2(self.residual1(x, coords, context, context_coords))


class Backbone(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        model = config.model
        dim, n_registers = model.embed_dim, model.n_registers
        for name, depth in (("encoder", model.encoder_depth), ("decoder", model.predictor_depth)):
            blocks = nn.ModuleList(Block(dim, model.num_heads, model.drop_path_rate) for _ in range(depth))
            self.add_module(name, nn.ModuleDict({"blocks": blocks}))
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.registers = nn.Parameter(torch.empty(1, n_registers, dim))
        self.patch_embed = nn.Conv2d(3, dim, model.patch_size, model.patch_size)

    def forward(
        self, images: Tensor, visible: Tensor | None = None, predicted: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Encoded visible patches [images, visible, dim], and predictions [predicted, dim] where asked for."""
        x = self.patch_embed(images)
        sides = (torch.linspace(0, 1, n, device=x.device, dtype=x.dtype) for n in x.shape[-2:])
        grid = torch.cartesian_prod(*sides).expand(len(x), -1, -1)
        x, coords = x.flatten(2).transpose(1, 2), grid
        if visible is not None:
            x, coords = (y.flatten(0, 1)[visible].unflatten(0, (len(images), -1)) for y in (x, coords))
        low, high = coords.amin(1, keepdim=True), coords.amax(1, keepdim=True)
        coords = torch.cat([low + self._perimeter(x) * (high - low), coords], dim=1)
        x = torch.cat([self.registers.expand(len(x), -1, -1), x], dim=1)
        for block in self.encoder["blocks"]:
            x = block(x, coords)
        context = F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)
        patches = context[:, self.registers.shape[1] :]
        if predicted is None:
            return patches, None
        predicted_coords = grid.flatten(0, 1)[predicted].unflatten(0, (len(images), -1))
        x = self.mask_token.expand(*predicted_coords.shape[:2], -1)
        for block in self.decoder["blocks"]:
            x = block(x, predicted_coords, context, coords)
        return patches, F.rms_norm(x, x.shape[-1:], eps=NORM_EPS).flatten(0, 1)

    def _perimeter(self, x: Tensor) -> Tensor:
        """Registers walk the unit square."""
        side = self.registers.shape[1] // 4
        step = torch.arange(side, device=x.device, dtype=x.dtype) / side
        zero, one = torch.zeros_like(step), torch.ones_like(step)
        corners = [(step, zero), (one, step), (1 - step, one), (zero, 1 - step)]
        return torch.cat([torch.stack(corner, dim=1) for corner in corners])


class WeightNormLinear(nn.Module):
    def __init__(self, dim: int, prototypes: int):
        super().__init__()
        self.weight_g, self.weight_v = (nn.Parameter(torch.empty(prototypes, n)) for n in (1, dim))

    def forward(self, x: Tensor) -> Tensor:
        v = self.weight_v
        return F.linear(x, v * (self.weight_g / (v.norm(dim=1, keepdim=True) + 1e-8)))


class PredictionHead(nn.Module):
    def __init__(self, dim: int, prototypes: int):
        super().__init__()
        self.last_layer = WeightNormLinear(dim, prototypes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(x, dim=-1, eps=1e-12))


class OnlineClustering(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config.clustering
        self.layer = nn.Linear(config.model.embed_dim, config.clustering.n_prototypes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Assignments [positions, images, prototypes], all of them, and the loss."""
        config = self.config
        logits = self.layer(F.normalize(x, dim=-1, eps=1e-7))
        assignments = official_sinkhorn(logits.detach(), config.target_temperature, config.n_sinkhorn_iterations)
        log_softmax = F.log_softmax(logits.float() / config.prediction_temperature, dim=-1)
        return assignments, -(assignments.float() * log_softmax).sum(-1).mean()


def build_model(config: Config) -> nn.ModuleDict:
    dim, prototypes = config.model.embed_dim, config.clustering.n_prototypes
    sides = {
        side: nn.ModuleDict({"backbone": Backbone(config), "head": PredictionHead(dim, prototypes)})
        for side in ("student", "student_ema")
    }
    teacher = nn.ModuleDict({"backbone": sides["student_ema"]["backbone"], "head": OnlineClustering(config)})
    return nn.ModuleDict({**sides, "teacher": teacher})


def do_teacher(model: nn.ModuleDict, images: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        patches, _ = model["teacher"]["backbone"](images)
    assignments, loss = model["teacher"]["head"](patches.transpose(0, 1))
    assignments = assignments.transpose(0, 1)
    return assignments.reshape(-1, assignments.shape[-1]).index_select(0, predicted), loss


def do_student(
    model: nn.ModuleDict, images: Tensor, predicted: Tensor, visible: Tensor, targets: Tensor, temperature: float
) -> Tensor:
    _, x = model["student"]["backbone"](images, visible, predicted)
    return official_student_loss(model["student"]["head"](x), targets, temperature)


def losses() -> tuple[Callable, Callable]:
    return do_teacher, do_student


def parameter_groups(student: nn.Module, config: Config) -> list[dict]:
    """Parameters by their multipliers of learning rate and weight decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        lr = 0.0 if "rope" in name else config.optim.patch_embed_lr_multiplier if "patch_embed" in name else 1.0
        decay = 0.0 if name.endswith(".bias") else 1.0
        if "norm" in name:
            decay = config.optim.norm_weight_decay_multiplier
        groups.setdefault((lr, decay), []).append(parameter)
    return [
        {"params": parameters, "lr_multiplier": lr, "wd_multiplier": decay, "foreach": True}
        for (lr, decay), parameters in groups.items()
    ]
