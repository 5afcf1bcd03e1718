"""What a teacher in 8 bits changes: `python -m benchmarks.fp8_teacher [--steps N] [--config PRESET] [OPTION ...]`.

Trains twice from the same seed on the same images, with the teacher as it is and in 8 bits (emulated on a CPU), and
prints both losses. Every hundred steps the first run's weights give the targets of one batch both ways: how many of its
patches keep their most likely cluster, and the entropies.
"""

import argparse
import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from capi.casting import cast_weights
from capi.config import Config, load_config
from capi.data import ImageStream
from capi.data.prefetch import DevicePrefetcher, MicroBatch
from capi.distributed import World, join_world
from capi.fp8 import fp8_obstacle
from capi.step import Trainer

EVERY = 100


@torch.no_grad()
def targets_of(trainer: Trainer, batches: Sequence[MicroBatch], *, fp8: bool) -> Tensor:
    """Of every patch of the images, [patches, prototypes]."""
    head = trainer.model.teacher["head"]
    teacher = trainer.teacher_modules()
    with cast_weights(teacher, trainer.compute_dtype, fp8=fp8):
        features = torch.cat([trainer.model.teacher_features(images) for images, _ in batches])
    _, potentials = head(features)
    rows = torch.arange(features.shape[0] * features.shape[1], device=features.device)
    return head.targets(features, potentials, rows)


def compared(trainer: Trainer, batches: Sequence[MicroBatch]) -> str:
    plain, fp8 = (targets_of(trainer, batches, fp8=fp8).float() for fp8 in (False, True))
    same = (plain.argmax(1) == fp8.argmax(1)).float().mean()
    entropies = (torch.special.entr(targets).sum(-1).mean() for targets in (plain, fp8))
    return " | ".join(f"{x:.4f}" for x in (same, *entropies))


def run(config: Config, world: World, steps: int) -> None:
    trainers = []
    for precision in ("auto", "fp8"):
        one = copy.deepcopy(config)
        one.run.teacher_precision = precision
        trainers.append(Trainer(one, world))
    columns = ["entropy", "loss", "clustering loss"]
    print("|", " | ".join(["steps", "same cluster", *(x for name in columns for x in (name, f"{name}, fp8"))]), "|")
    print("|" + "---|" * 8, flush=True)
    losses = []
    with DevicePrefetcher(ImageStream(config), world.device) as stream:
        for step in range(steps):
            batches = next(stream)
            plain, fp8 = (trainer.step(batches, step) for trainer in trainers)
            losses.append(torch.stack([plain.loss, fp8.loss, plain.clustering_loss, fp8.clustering_loss]))
            if (step + 1) % EVERY == 0 or step == 0:
                means = " | ".join(f"{x:.4f}" for x in torch.stack(losses).mean(0).tolist())
                print(f"| {step + 1} | {compared(trainers[0], batches)} | {means} |", flush=True)
                losses.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--config", default="tiny")
    arguments, options = parser.parse_known_args()
    config = load_config(["--config", arguments.config, *options])
    with join_world(config.run.device) as world:
        if (obstacle := fp8_obstacle(config, world)) is not None:
            parser.error(obstacle)
        run(config, world, arguments.steps)


if __name__ == "__main__":
    main()
