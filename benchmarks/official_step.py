"""The official training step on one device, as the peer of ours.

With CAPI_OFFICIAL set to a checkout of facebookresearch/capi, its model, its do_teacher and do_student, its parameter
groups and its settings of torch.compile and of recomputation run inside its loop, restated here; FSDP, which on one
device comes down to casting every parameter, is a cast parametrisation. Without it the model is restated too
(`official_model`). State dictionaries are those of `capi.model.CAPI` either way.
"""

from collections.abc import Callable
from functools import partial
from logging import Logger

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from benchmarks import official_code, official_model
from capi.config import Config
from capi.masking import Masks
from capi.model import normalize_images
from capi.optim import schedule_value

KEPT = ("aten.mm.default", "aten.addmm.default", "aten._scaled_dot_product_flash_attention.default")
LOGGERS = (Logger.debug, Logger.info, Logger.warning)


def _policy(context: object, op: object, *_: object, **__: object) -> CheckpointPolicy:
    """Of recomputation: what the official policy keeps. A plain function, as Dynamo takes no method for a constant."""
    return CheckpointPolicy.MUST_SAVE if str(op) in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


class _Recomputed(nn.Module):
    """A block that recomputes in the backward pass all but the results of products and of flash attention."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *arguments: Tensor, **options: Tensor | None) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        return checkpoint(self.block, *arguments, use_reentrant=False, context_fn=contexts, **options)


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
        backend: of torch.compile, for teacher and student, with the official settings; None runs them as they are.
        recompute: blocks recompute in the backward pass what the official settings do.
    """

    def __init__(
        self,
        config: Config,
        state: dict[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        *,
        backend: str | Callable | None,
        recompute: bool = False,
    ):
        self.config, self.dtype = config, dtype
        code = official_model if official_code.checkout_path() is None else official_code
        model = code.build_model(config)
        missing, unexpected = model.load_state_dict(state, strict=False)
        # The teacher's backbone is the moving average once more.
        missing = [name for name in missing if not name.startswith("teacher.backbone")]
        assert not missing and not unexpected, f"other weights than ours: {missing} missing, {unexpected} unexpected"
        model.to(device)
        model["student_ema"].requires_grad_(False)
        self.optimizer = torch.optim.AdamW(code.parameter_groups(model["student"], config), betas=config.optim.betas)
        self.clustering_optimizer = torch.optim.AdamW(
            model["teacher"]["head"].parameters(),
            betas=config.optim.betas,
            weight_decay=config.optim.clustering_weight_decay,
        )
        self.student_parameters = list(model["student"].parameters())
        self.ema_parameters = list(model["student_ema"].parameters())
        if dtype != torch.float32:
            cast_parameters(model, dtype)
        if recompute:
            for transformer in (model["student"]["backbone"].encoder, model["student"]["backbone"].decoder):
                transformer.blocks = nn.ModuleList(_Recomputed(block) for block in transformer.blocks)
        model["student"].train()
        model["teacher"].eval()
        self.model = model
        self.do_teacher, self.do_student = code.losses()
        if backend is not None:
            # Log lines would break the graphs.
            torch._dynamo.config.ignore_logging_functions.update(LOGGERS)
            self.do_teacher, self.do_student = (
                torch.compile(function, dynamic=False, backend=backend)
                for function in (self.do_teacher, self.do_student)
            )

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
