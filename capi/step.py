"""One training step: the losses of teacher and student, their backward passes, the three updates.

The host draws drop-path and reads the schedules. What follows, `Trainer.losses_and_gradients`, is a function of buffers
on the device, which a GPU replays as one CUDA graph; the updates behind it are few launches, which the host issues
while the device still computes.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Lock

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from capi.casting import WeightCopies, cast_weights
from capi.config import Config
from capi.distributed import GradientAverage, World, average, is_sharded, mean_over_ranks
from capi.drop_path import draw, received, send
from capi.faults import Faults
from capi.model import CAPI
from capi.optim import all_finite, build_optimizers, schedule_value, set_learning_rates, update_ema
from capi.profiling import HostTime
from capi.seeding import Purpose, generator
from capi.sharding import local, shard
from capi.step_graph import Losses, MicroBatch, StepGraph, StepInputs, graphs_obstacle
from capi_kernels import student_loss_with_statistics

logger = logging.getLogger("capi")

WARM_UP_STEPS = 3  # In which kernels are compiled and loaded, and libraries allocate what they keep.


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
        self.compute_dtype = _compute_dtype(config.run.precision, world.device)
        self.model = CAPI(config.model, config.clustering).init_weights()
        self.sharded = is_sharded(config, world)
        if self.sharded:
            shard(self.model, self.compute_dtype, world)
        self.model.to(world.device)
        self.optimizers = build_optimizers(self.model, config.optim)
        if config.clustering.queue_size > 0:
            n_positions = (config.data.image_size // config.model.patch_size) ** 2
            self.model.teacher["head"].add_queue(n_positions, self.compute_dtype)
        self.copies: WeightCopies | None = None
        self.fused_update: Callable[[float, Tensor], None] | None = None
        if world.device.type == "cuda" and not self.sharded:
            self.fuse_updates()
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=world.device)
        self.steps_done: int | None = 0
        """Steps that the state has taken, wholly; None where an update broke off."""
        self.host = HostTime()
        self.updating = Lock()
        """Held while the state changes: who holds it finds it whole."""
        self._graph: StepGraph | None = None
        self.share_tables()
        # On a CPU the product and the sum are as fast apart.
        self.model.student_ema.backbone.encoder.in_place = world.device.type == "cuda"
        for backbone in (self.model.student.backbone, self.model.student_ema.backbone):
            for transformer in (backbone.encoder, backbone.decoder):
                transformer.checkpoint_activations = config.run.checkpoint_activations
        if config.run.compile == "on" or (config.run.compile == "auto" and world.device.type == "cuda"):
            self.model.student.compile_pointwise()
            self.model.student_ema.compile_pointwise()
        self.uses_graphs = config.run.cuda_graphs != "off" and graphs_obstacle(config, world) is None
        self.student: nn.Module = self.model.student
        self.faults = Faults(world.device) if world.size > 1 else None
        if world.size > 1 and not self.sharded:
            self.student = DistributedDataParallel(self.student, gradient_as_bucket_view=True)
            self.student.register_comm_hook(self.faults, Faults.average)

    def step(
        self,
        batches: Sequence[MicroBatch],
        step: int,
        launched: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Clustering loss of the whole batch and its backward, the student's of each micro-batch, the three updates.

        Sinkhorn balances over all micro-batches of all ranks; the student's targets are made anew of its potentials,
        micro-batch by micro-batch. A step in which a loss or a gradient is not finite, on any rank, leaves student and
        clustering as they are. `launched` is called each time that the work of a micro-batch is handed to the device.
        """
        optim = self.config.optim
        lr, momentum, clustering_lr = (
            schedule_value(schedule, step, optim.steps) for schedule in (optim.lr, optim.momentum, optim.clustering_lr)
        )
        student_optimizer, clustering_optimizer = self.optimizers
        set_learning_rates(student_optimizer, clustering_optimizer, lr, clustering_lr)
        with self.host.phase("draw and send"):
            inputs = self._inputs(batches, step)
        with self.host.phase("launch"):
            if self.copies is not None:
                self.copies.refresh()
            graph = self._graph_of(inputs)
            losses = self.losses_and_gradients(inputs, launched) if graph is None else graph.replay(inputs)
            # Of any rank: one alone that skipped the update would train another model.
            finite = average((losses.loss + losses.clustering_loss).where(losses.finite, torch.nan)).isfinite()
        with self.host.phase("update"), self.updating:
            self.steps_done = None
            self.bad_steps = torch.where(finite, 0, self.bad_steps + 1)
            if self.faults is not None:
                self.faults.step_ends(finite)
            self._update(momentum, 1 - finite.float())
            self.model.follow_average()
            self.model.teacher["head"].store(finite)
            self.steps_done = step + 1
        if graph is not None:  # Behind the updates, which then are launched while the device computes.
            for _ in batches:
                launched()
        return StepResult(
            loss=losses.loss,
            clustering_loss=losses.clustering_loss,
            target_entropy=losses.target_entropy,
            clusters=losses.clusters,
            lr=lr,
            momentum=momentum,
            clustering_lr=clustering_lr,
        )

    def fuse_updates(self) -> None:
        """Has the updates made in one pass over the parameters, by Triton, with the copies that layers compute with."""
        from capi.fused_update_triton import FusedUpdate  # Without a GPU there need be no Triton.

        if self.compute_dtype != torch.float32:
            self.copies = WeightCopies([self.model.student, self.teacher_modules()], self.compute_dtype)
        self.fused_update = FusedUpdate(self.model, self.optimizers, self.copies)

    def _update(self, momentum: float, found_inf: Float[Tensor, ""]) -> None:
        """Of weights and their moving average; of the average alone where `found_inf` is 1."""
        if self.fused_update is not None:
            self.fused_update(momentum, found_inf)
            return
        student_optimizer, clustering_optimizer = self.optimizers
        for optimizer in self.optimizers:
            optimizer.found_inf = found_inf  # the fused kernels skip the update where it is 1
        student_optimizer.step()
        update_ema(self.model, momentum)
        clustering_optimizer.step()

    def teacher_modules(self) -> nn.ModuleList:
        """What of the moving average the teacher computes with."""
        teacher = self.model.student_ema.backbone
        return nn.ModuleList([teacher.patch_embed, teacher.encoder])

    def losses_and_gradients(self, inputs: StepInputs, launched: Callable[[], None] = lambda: None) -> Losses:
        """The device part of a step: copies nothing from the host, and reads nothing back.

        The gradients are those of the parameters. What a CUDA graph captures of it are its launches: all that the host
        decides here depends on the shapes alone.
        """
        config, head = self.config, self.model.teacher["head"]
        student_optimizer, clustering_optimizer = self.optimizers
        # Those of DDP stay parts of its buckets.
        student_optimizer.zero_grad(set_to_none=self.world.size == 1 or self.sharded)
        clustering_optimizer.zero_grad()
        if self.copies is not None:
            # The update reads them as they come; sums, over micro-batches or ranks, are of float32.
            alone = self.world.size == len(inputs.batches) == 1
            self.copies.set_gradient_dtype(self.compute_dtype if alone else torch.float32)

        fp8 = config.run.teacher_precision == "fp8"
        with self._casts(self.teacher_modules(), fp8=fp8):
            features = self._teacher_features([images for images, _ in inputs.batches])
        clustering_loss, potentials = head(features)
        clustering_loss.backward()
        if self.faults is not None:
            self.faults.look("teacher features", [features])
            self.faults.look("gradients", [p.grad for p in head.parameters()])
        clustering_gradients = GradientAverage(head.parameters())

        losses, entropies, clusters, first_image = [], [], [], 0
        with self._casts(self.model.student):
            for i, ((images, masks), drop_path) in enumerate(zip(inputs.batches, inputs.drop_path, strict=True)):
                with torch.no_grad():
                    here = features[first_image : first_image + len(images)]
                    targets = head.targets(here, potentials, masks.predict_indices, first_image)
                    first_image += len(images)
                with self._gradients_are_averaged(i == len(inputs.batches) - 1):
                    logits = self.student(images, masks, drop_path)
                    loss, entropy, most_likely = student_loss_with_statistics(
                        logits, targets, config.clustering.student_temperature
                    )
                    loss = loss * (len(logits) / inputs.n_predicted)
                    loss.backward()
                losses.append(loss.detach())
                entropies.append(entropy * (len(logits) / inputs.n_predicted))
                clusters.append(most_likely)
                launched()
        clustering_gradients.wait()
        if self.faults is not None:
            self.faults.look("loss", losses)
        gradients = all_finite(p.grad for p in self.model.parameters() if p.grad is not None)
        return Losses(
            loss=torch.stack(losses).sum(),
            clustering_loss=clustering_loss.detach(),
            target_entropy=torch.stack(entropies).sum(),
            finite=gradients,
            clusters=torch.cat(clusters),
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
        # Of what is sharded a rank looks at its own rows, which may be none.
        parts = ((name, local(tensor)) for name, tensor in _named_tensors(self.state_dict()))
        tensors = {name: part for name, part in parts if part.numel()}
        if all_finite(tensors.values()):
            return None
        return next(name for name, tensor in tensors.items() if not all_finite([tensor]))

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        student, clustering = self.optimizers
        student.load_state_dict(state["student_optimizer"])
        clustering.load_state_dict(state["clustering_optimizer"])
        self.share_tables()

    def share_tables(self) -> None:
        """Has the teacher make one pair of rotary tables for all images and layers, as far as its weights allow."""
        encoder = self.model.student_ema.backbone.encoder
        if (same := encoder.have_equal_frequencies()) != encoder.shares_tables:
            encoder.shares_tables = same
            self._graph = None  # What it was captured with.

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

    def _inputs(self, batches: Sequence[MicroBatch], step: int) -> StepInputs:
        """With drop-path as this step draws it, from a generator of its own: a resumed run draws what the first did."""
        # The ranks' gradients are averaged: with a range of mask ratios they predict different numbers of patches.
        ragged = isinstance(self.config.masking.mask_ratio, tuple)
        n_predicted = mean_over_ranks(sum(len(masks.predict_indices) for _, masks in batches), ragged)
        model = self.config.model
        if model.drop_path_rate == 0:
            return StepInputs(batches, [None] * len(batches), None, n_predicted)
        rng = generator(Purpose.DROP_PATH, self.config.run.seed, step, self.world.rank)
        n_images, depths = [len(images) for images, _ in batches], (model.encoder_depth, model.predictor_depth)
        host = [draw(model.drop_path_rate, depths, n, rng) for n in n_images]
        drawn = send(host, n_images, self.world.device)
        return StepInputs(batches, received(drawn, host, n_images), drawn, n_predicted)

    def _graph_of(self, inputs: StepInputs) -> StepGraph | None:
        """The graph that computes such inputs, captured now if that many steps have run without; None before."""
        if not self.uses_graphs:
            return None
        if self._graph is None or self._graph.shape != inputs.shape():
            self._graph = StepGraph(inputs.shape())
        if self._graph.warmed_up < WARM_UP_STEPS:
            self._graph.warmed_up += 1
            return None
        if not self._graph.captured:
            self._graph.capture(self.losses_and_gradients, inputs, list(self.model.parameters()))
            logger.info("the step is a CUDA graph from now on (run.cuda_graphs)")
        return self._graph

    def _casts(self, module: nn.Module, *, fp8: bool = False) -> AbstractContextManager:
        """Inside, the module computes in `compute_dtype`: sharded weights are gathered in it, and need no copies."""
        return nullcontext() if self.sharded else cast_weights(module, self.compute_dtype, self.copies, fp8=fp8)

    def _gradients_are_averaged(self, last: bool) -> AbstractContextManager:
        """Over the ranks, once a step: in the backward of the last micro-batch."""
        if self.sharded:  # Until then each rank adds up its own gradients of all weights.
            self.student.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last or self.world.size == 1 else self.student.no_sync()


def _named_tensors(state: dict, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _named_tensors(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value


def _compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
