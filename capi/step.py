"""One training step: the losses of teacher and student, their backward passes, the three updates."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Lock

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from capi.config import Config
from capi.distributed import GradientAverage, World, average, mean_over_ranks
from capi.masking import Masks
from capi.model import CAPI, target_entropy
from capi.optim import all_finite, build_optimizers, schedule_value, set_learning_rates, update_ema
from capi.seeding import Purpose, generator
from capi.transformer import DropPath, cast_weights
from capi_kernels import student_loss


@dataclass
class StepResult:
    """What one training step measured; tensors stay on the device."""

    loss: Float[Tensor, ""]
    clustering_loss: Float[Tensor, ""]
    target_entropy: Float[Tensor, ""]
    clusters: Int[Tensor, "predicted"]
    """Most likely prototype of every prediction's target, micro-batch after micro-batch."""
    lr: float
    momentum: float
    clustering_lr: float


class Trainer:
    """Model and optimisers, and the step that updates them."""

    def __init__(self, config: Config, world: World):
        self.config = config
        self.world = world
        torch.manual_seed(config.run.seed)
        self.model = CAPI(config.model, config.clustering).init_weights().to(world.device)
        self.optimizers = build_optimizers(self.model, config.optim)
        self.compute_dtype = _compute_dtype(config.run.precision, world.device)
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=world.device)
        self.steps_done: int | None = 0
        """Steps that the state has taken, wholly; None where an update broke off."""
        self.updating = Lock()
        """Held while the state changes: who holds it finds it whole."""
        self.statistics = _target_statistics
        for backbone in (self.model.student.backbone, self.model.student_ema.backbone):
            for transformer in (backbone.encoder, backbone.decoder):
                transformer.checkpoint_activations = config.run.checkpoint_activations
        if config.run.compile == "on" or (config.run.compile == "auto" and world.device.type == "cuda"):
            self.statistics = torch.compile(_target_statistics)
            self.model.student.compile_pointwise()
            self.model.student_ema.compile_pointwise()
        self.student: nn.Module = self.model.student
        if world.size > 1:
            self.student = DistributedDataParallel(self.student, gradient_as_bucket_view=True)

    def step(
        self,
        batches: Sequence[tuple[Shaped[Tensor, "images 3 height width"], Masks]],
        step: int,
        launched: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Clustering loss of the whole batch and its backward, the student's of each micro-batch, the three updates.

        Sinkhorn balances over all micro-batches of all ranks; the student's targets are made anew of its potentials,
        micro-batch by micro-batch. A step in which a loss or a gradient is not finite, on any rank, leaves student and
        clustering as they are. `launched` is called each time that the work of a micro-batch is handed to the device.
        """
        config, head = self.config, self.model.teacher["head"]
        lr, momentum, clustering_lr = (
            schedule_value(schedule, step, config.optim.steps)
            for schedule in (config.optim.lr, config.optim.momentum, config.optim.clustering_lr)
        )
        student_optimizer, clustering_optimizer = self.optimizers
        set_learning_rates(student_optimizer, clustering_optimizer, lr, clustering_lr)
        student_optimizer.zero_grad(set_to_none=self.world.size == 1)  # else they stay parts of DDP's buckets
        clustering_optimizer.zero_grad()

        with cast_weights(self.model.student_ema, self.compute_dtype):
            features = self._teacher_features([images for images, _ in batches])
        clustering_loss, potentials = head(features)
        clustering_loss.backward()
        clustering_gradients = GradientAverage(head.parameters())

        drop_path = self._drop_path(step)
        # The ranks' gradients are averaged: with a range of mask ratios they predict different numbers of patches.
        n_predicted = mean_over_ranks(sum(len(masks.predict_indices) for _, masks in batches), self._ragged)
        losses, entropies, clusters, first_image = [], [], [], 0
        with cast_weights(self.model.student, self.compute_dtype):
            for i, (images, masks) in enumerate(batches):
                with torch.no_grad():
                    here = features[first_image : first_image + len(images)]
                    targets = head.targets(here, potentials, masks.predict_indices, first_image)
                    entropy, most_likely = self.statistics(targets)
                    first_image += len(images)
                with self._gradients_are_averaged(i == len(batches) - 1):
                    logits = self.student(images, masks, drop_path)
                    loss = student_loss(logits, targets, config.clustering.student_temperature)
                    loss = loss * (len(logits) / n_predicted)
                    loss.backward()
                losses.append(loss.detach())
                entropies.append(entropy * (len(logits) / n_predicted))
                clusters.append(most_likely)
                launched()
        loss, entropy = torch.stack(losses).sum(), torch.stack(entropies).sum()

        clustering_gradients.wait()
        gradients = all_finite(p.grad for p in self.model.parameters() if p.grad is not None)
        # Of any rank: one alone that skipped the update would train another model.
        finite = average((loss + clustering_loss.detach()).where(gradients, torch.nan)).isfinite()
        with self.updating:
            self.steps_done = None
            self.bad_steps = torch.where(finite, 0, self.bad_steps + 1)
            for optimizer in self.optimizers:
                optimizer.found_inf = 1 - finite.float()  # the fused kernels skip the update where it is 1
            student_optimizer.step()
            update_ema(self.model, momentum)
            clustering_optimizer.step()
            self.steps_done = step + 1
        return StepResult(
            loss=loss,
            clustering_loss=clustering_loss.detach(),
            target_entropy=entropy,
            clusters=torch.cat(clusters),
            lr=lr,
            momentum=momentum,
            clustering_lr=clustering_lr,
        )

    def state_dict(self) -> dict:
        student, clustering = self.optimizers
        return {
            "model": self.model.state_dict(),
            "student_optimizer": student.state_dict(),
            "clustering_optimizer": clustering.state_dict(),
        }

    def not_finite(self) -> str | None:
        """Which tensor of the state has values that are not finite, the first of them; waits for the device."""
        tensors = dict(_named_tensors(self.state_dict()))
        if all_finite(tensors.values()):
            return None
        return next(name for name, tensor in tensors.items() if not all_finite([tensor]))

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        student, clustering = self.optimizers
        student.load_state_dict(state["student_optimizer"])
        clustering.load_state_dict(state["clustering_optimizer"])

    def _teacher_features(
        self, images: Sequence[Shaped[Tensor, "_ 3 height width"]]
    ) -> Float[Tensor, "images positions dim"]:
        """Of all micro-batches, each written to its place: of the paper's batch they are gigabytes."""
        if len(images) == 1:
            return self.model.teacher_features(images[0])
        features, start = None, 0
        for part in map(self.model.teacher_features, images):
            if features is None:
                features = part.new_empty((sum(map(len, images)), *part.shape[1:]))
            features[start : start + len(part)] = part
            start += len(part)
        return features

    @property
    def _ragged(self) -> bool:
        return isinstance(self.config.masking.mask_ratio, tuple)

    def _gradients_are_averaged(self, last: bool) -> AbstractContextManager:
        """Over the ranks, once a step: in the backward of the last micro-batch."""
        return nullcontext() if last or self.world.size == 1 else self.student.no_sync()

    def _drop_path(self, step: int) -> DropPath | None:
        """Every step draws from a generator of its own, so that a resumed run draws what the first would have."""
        rate = self.config.model.drop_path_rate
        if rate == 0:
            return None
        return DropPath(rate, generator(Purpose.DROP_PATH, self.config.run.seed, step, self.world.rank))


def _named_tensors(state: dict, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _named_tensors(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value


def _target_statistics(targets: Float[Tensor, "predicted prototypes"]) -> tuple[Tensor, Tensor]:
    return target_entropy(targets), targets.argmax(-1)


def _compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
