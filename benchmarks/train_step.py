"""Cases of the training step: ours, and the official one from the same weights on the same batches."""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from benchmarks import official_step
from benchmarks.gate import Gate
from benchmarks.measure import OURS
from benchmarks.timing import Contestant
from capi.config import Config, load_config
from capi.distributed import World
from capi.masking import Masks, sample_masks
from capi.step import Trainer

LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}  # relative; see StepCase.check


def configuration(preset: str, batch: int, device: torch.device, dtype: torch.dtype, *options: str) -> Config:
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    run = ["--run.device", device.type, "--run.precision", precision]
    return load_config(["--config", preset, "--optim.batch_size", str(batch), *run, *options])


def draw_batch(config: Config, seed: int, device: torch.device) -> tuple[Tensor, Masks]:
    """Random bytes, and masks by the law of training, on the device."""
    size, batch = config.data.image_size, config.optim.batch_size
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
    side = size // config.model.patch_size
    rngs = [np.random.default_rng((seed, image)) for image in range(batch)]
    return images.to(device), sample_masks(config.masking, (side, side), rngs).to(device)


def our_step(trainer: Trainer, images: Tensor, masks: Masks, step: int) -> tuple[Tensor, Tensor]:
    """The student's and the clustering loss of one step of ours."""
    result = trainer.step([(images, masks)], step)
    return result.loss, result.clustering_loss


class StepCase:
    """One configuration, and batches that are on the device already: uint8 for us, normalised for the official step."""

    def __init__(self, config: Config, preset: str, device: torch.device, dtype: torch.dtype, calls: int = 1):
        self.config, self.preset, self.device, self.dtype, self.calls = config, preset, device, dtype, calls
        self.first_step = config.optim.lr.warmup_steps // 2  # where the learning rates are not zero
        self.batches = cache(lambda: [draw_batch(config, seed, device) for seed in range(2)])
        self.first_losses: dict[str, list[float]] = {}

    def enter(self, name: str) -> Contestant:
        gate = Gate(f"{self.preset}-{name}")
        trainer = Trainer(self.config, World(0, 1, self.device))
        if name == OURS:
            batches = self.batches()

            def step(images: Tensor, masks: Masks, number: int) -> tuple[Tensor, Tensor]:
                return our_step(trainer, images, masks, number)
        else:
            state = trainer.model.state_dict()
            step = official_step.OfficialStep(
                self.config,
                state,
                self.device,
                self.dtype,
                # The second graph is the student's: by then all is compiled, and what takes memory has yet to run.
                backend=None if name == "official_eager" else gate.behind(lookup_backend("inductor"), graph=2),
                recompute=name == "official_recomputed",
            )
            del trainer, state
            batches = [(step.prepare(images), masks) for images, masks in self.batches()]
        self.first_losses[name] = [float(loss) for loss in step(*batches[0], self.first_step)]
        gate.wait()
        self.check(name, gate)

        def run() -> None:
            for call in range(self.calls):
                step(*batches[call % len(batches)], self.first_step + 1)

        return Contestant(run, calls=self.calls)

    def check(self, name: str, gate: Gate) -> None:
        """The first losses of a peer are ours: from equal weights, but with a drop-path of its own.

        Without drop-path in float32 they agree to rounding; drop-path moves the student's loss alone, by little as the
        untrained student predicts almost nothing. Ours may come from another process, through the gate.
        """
        losses = self.first_losses[name]
        if name == OURS:
            assert all(map(math.isfinite, losses)), f"expected finite losses, got {losses}"
            gate.leave_losses(self.preset, losses)
            return
        expected = self.first_losses.get(OURS) or gate.losses(self.preset)
        if expected is None:
            return
        drop_path = self.config.model.drop_path_rate > 0
        for loss, ours, dropped in zip(losses, expected, (drop_path, False), strict=True):
            tolerance = 0.05 if dropped else LOSS_TOLERANCE[self.dtype]
            assert abs(loss - ours) <= tolerance * abs(ours), f"expected {ours}, got {loss}"
