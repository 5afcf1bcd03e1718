"""The official training step on one device, as the peer of ours.

With CAPI_OFFICIAL set to a checkout of facebookresearch/capi, its model, its do_teacher and do_student, its parameter
groups and its settings of torch.compile and of recomputation run inside its loop, restated here; FSDP, which on one
device comes down to casting every parameter, is a cast parametrisation. Without it the model is restated too: dense
attention after a separate rotary embedding, Sinkhorn in place with all targets kept, log-softmax. State dictionaries
are those of `capi.model.CAPI` either way.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from benchmarks.peers import official_sinkhorn, official_student_loss
from capi.config import Config
from capi.masking import Masks
from capi.model import normalize_images
from capi.optim import schedule_value

NORM_EPS = 1e-5

# ------------------------------------------------------------------------------------------- the model, restated


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


def restated_model(config: Config) -> nn.ModuleDict:
    dim, prototypes = config.model.embed_dim, config.clustering.n_prototypes
    sides = {
        side: nn.ModuleDict({"backbone": Backbone(config), "head": PredictionHead(dim, prototypes)})
        for side in ("student", "student_ema")
    }
    teacher = nn.ModuleDict({"backbone": sides["student_ema"]["backbone"], "head": OnlineClustering(config)})
    return nn.ModuleDict({**sides, "teacher": teacher})


def restated_teacher(model: nn.ModuleDict, images: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        patches, _ = model["teacher"]["backbone"](images)
    assignments, loss = model["teacher"]["head"](patches.transpose(0, 1))
    assignments = assignments.transpose(0, 1)
    return assignments.reshape(-1, assignments.shape[-1]).index_select(0, predicted), loss


def restated_student(
    model: nn.ModuleDict, images: Tensor, predicted: Tensor, visible: Tensor, targets: Tensor, temperature: float
) -> Tensor:
    _, x = model["student"]["backbone"](images, visible, predicted)
    return official_student_loss(model["student"]["head"](x), targets, temperature)


def restated_groups(student: nn.Module, config: Config) -> list[dict]:
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


# ---------------------------------------------------------------------------------------------- the official code


class _Stub(ModuleType, Loader, MetaPathFinder):
    """Stands in for packages that the official code imports for what a training step does not use."""

    def __init__(self, packages: set[str]):
        super().__init__("stub")
        self.packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = lambda name: type(name, (), {"__init__": lambda self, *_, **__: None})
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _importable(checkout: Path) -> Iterator[None]:
    """Lets the checkout's modules be imported, without fsdp.py, which sets the compiler up for every model."""
    packages = {"torchvision", "omegaconf", "xformers", "rich", "sklearn", "scipy", "datasets", "filelock", "submitit"}
    stub = _Stub({"fsdp", *(package for package in packages if find_spec(package) is None)})
    before, path = set(sys.modules), list(sys.path)
    sys.meta_path.insert(0, stub)
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        sys.meta_path.remove(stub)
        sys.path[:] = path
        # The checkout's own modules stay: torch.compile looks them up by name.
        for name in set(sys.modules) - before:
            if name.split(".")[0] in stub.packages:
                del sys.modules[name]


def checkout_path() -> Path | None:
    """Where the official code lies, if CAPI_OFFICIAL says so."""
    path = os.environ.get("CAPI_OFFICIAL")
    return Path(path).resolve() if path else None


def source() -> str:
    """What the peer is, for the results file."""
    path = checkout_path()
    if path is None:
        return "restated in plain PyTorch"
    command = ["git", "-C", str(path), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return f"facebookresearch/capi {commit or 'of an unknown commit'}"


def official_model(config: Config, modules: ModuleType) -> nn.ModuleDict:
    model, clustering = config.model, config.clustering
    block = {"attn_kwargs": {"num_heads": model.num_heads}}
    common = {"embed_dim": model.embed_dim, "drop_path_rate": model.drop_path_rate, "block_kwargs": block}
    sides = {}
    for side in ("student", "student_ema"):
        backbone = modules.EncoderDecoder(
            patch_size=model.patch_size,
            n_registers=model.n_registers,
            transformers_kwargs=common,
            encoder_kwargs={"depth": model.encoder_depth},
            decoder_kwargs={"depth": model.predictor_depth},
        )
        head = modules.L2NormLinear(model.embed_dim, clustering.n_prototypes)
        sides[side] = nn.ModuleDict({"backbone": backbone, "head": head})
    head = modules.OnlineClustering(
        model.embed_dim,
        clustering.n_prototypes,
        bias=True,
        n_sk_iter=clustering.n_sinkhorn_iterations,
        target_temp=clustering.target_temperature,
        pred_temp=clustering.prediction_temperature,
    )
    teacher = nn.ModuleDict({"backbone": sides["student_ema"]["backbone"], "head": head})
    return nn.ModuleDict({**sides, "teacher": teacher})


class _Recomputed(nn.Module):
    """A block of which only what the official policy keeps is kept: results of products and of flash attention."""

    KEPT = ("aten.mm.default", "aten.addmm.default", "aten._scaled_dot_product_flash_attention.default")

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    @classmethod
    def _policy(cls, context: object, op: object, *_: object, **__: object) -> CheckpointPolicy:
        kept = str(op) in cls.KEPT
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def forward(self, *arguments: Tensor, **options: Tensor | None) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, self._policy)
        return checkpoint(self.block, *arguments, use_reentrant=False, context_fn=contexts, **options)


# ------------------------------------------------------------------------------------------------------ the step


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Computes with every parameter cast to `dtype`, gradients reaching it in its own type."""
    for module in list(model.modules()):
        for name in list(module._parameters):
            if module._parameters[name] is not None:
                parametrize.register_parametrization(module, name, _Cast(dtype), unsafe=True)


class OfficialStep:
    """The official step: teacher and its backward, student and its backward, AdamW, moving average, AdamW.

    Args:
        state: of a `capi.model.CAPI`, to start from.
        compiled: teacher and student under torch.compile, as in the official settings.
        recompute: blocks recompute in the backward pass what the official settings do (official code only).
    """

    def __init__(
        self,
        config: Config,
        state: dict[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        *,
        compiled: bool,
        recompute: bool = False,
    ):
        self.config, self.dtype = config, dtype
        checkout = checkout_path()
        if checkout is None:
            model, groups = restated_model(config), restated_groups
            teacher, student = restated_teacher, restated_student
        else:
            with _importable(checkout):
                modules = importlib.import_module("train_capi")
            model, teacher, student = official_model(config, modules), modules.do_teacher, modules.do_student
            groups = partial(_official_groups, modules.get_params_groups)
        missing, unexpected = model.load_state_dict(state, strict=False)
        # The teacher's backbone is the moving average once more.
        missing = [name for name in missing if not name.startswith("teacher.backbone")]
        assert not missing and not unexpected, f"other weights than ours: {missing} missing, {unexpected} unexpected"
        model.to(device)
        model["student_ema"].requires_grad_(False)
        self.optimizer = torch.optim.AdamW(groups(model["student"], config), betas=config.optim.betas)
        self.clustering_optimizer = torch.optim.AdamW(
            model["teacher"]["head"].parameters(),
            betas=config.optim.betas,
            weight_decay=config.optim.clustering_weight_decay,
        )
        self.student_parameters = list(model["student"].parameters())
        self.ema_parameters = list(model["student_ema"].parameters())
        if dtype != torch.float32:
            cast_parameters(model, dtype)
        if recompute and checkout is not None:
            for transformer in (model["student"]["backbone"].encoder, model["student"]["backbone"].decoder):
                transformer.blocks = nn.ModuleList(_Recomputed(block) for block in transformer.blocks)
        model["student"].train()
        model["teacher"].eval()
        self.model = model
        self.do_teacher: Callable = torch.compile(teacher, dynamic=False) if compiled else teacher
        self.do_student: Callable = torch.compile(student, dynamic=False) if compiled else student

    def prepare(self, images: Tensor) -> Tensor:
        """What the official loader sends: normalised images in the type of the computation."""
        return normalize_images(images).to(self.dtype)

    def __call__(self, images: Tensor, masks: Masks, step: int) -> tuple[Tensor, Tensor]:
        """One step on prepared images; the student's and the clustering loss."""
        optim = self.config.optim
        lr, momentum, clustering_lr = (
            schedule_value(schedule, step, optim.steps) for schedule in (optim.lr, optim.momentum, optim.clustering_lr)
        )
        for group in self.optimizer.param_groups:
            group["weight_decay"] = optim.weight_decay * group["wd_multiplier"]
            group["lr"] = lr * group["lr_multiplier"]
        for group in self.clustering_optimizer.param_groups:
            group["lr"] = clustering_lr
        self.optimizer.zero_grad(set_to_none=True)
        self.clustering_optimizer.zero_grad(set_to_none=True)
        targets, clustering_loss = self.do_teacher(self.model, images, masks.predict_indices)
        clustering_loss.backward()
        temperature = self.config.clustering.student_temperature
        loss = self.do_student(self.model, images, masks.predict_indices, masks.visible_indices, targets, temperature)
        loss.bfloat16().backward()
        target_entropy = -torch.xlogy(targets, targets).sum(dim=-1).mean()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_mul_(self.ema_parameters, momentum)
            torch._foreach_add_(self.ema_parameters, self.student_parameters, alpha=1 - momentum)
        self.clustering_optimizer.step()
        self.target_entropy = target_entropy
        return loss.detach(), clustering_loss.detach()


def _official_groups(get_params_groups: Callable, student: nn.Module, config: Config) -> list[dict]:
    return get_params_groups(
        student,
        patch_embed_lr_mult=config.optim.patch_embed_lr_multiplier,
        rope_lr_mult=0.0,
        layernorm_wd_mult=config.optim.norm_weight_decay_multiplier,
    )
