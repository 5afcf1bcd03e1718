"""`python -m capi.train` with the fault that CAPI_FAULT names: `python tests/soak/injected.py ARGUMENTS`."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from capi.step import Trainer
from capi.train import main

RANK = int(os.environ.get("RANK", "0"))


def before_step(act: Callable[[Trainer, list, int], list]) -> None:
    """`act` gives the batches that the step takes."""
    original = Trainer.step

    def step(self, batches, number, *launched):
        return original(self, act(self, batches, number), number, *launched)

    Trainer.step = step


def slow_save() -> None:
    """Half a checkpoint, a tenth of a second, the other half."""
    original = torch.save

    def save(state: object, stream: object) -> None:
        original(state, stream)
        stream.flush()
        whole = stream.tell()
        os.ftruncate(stream.fileno(), whole // 2)
        time.sleep(0.1)
        stream.seek(0)
        original(state, stream)

    torch.save = save


def nan_images(steps: range) -> Callable[[], None]:
    """Of rank 0."""

    def nan(trainer: Trainer, batches: list, number: int) -> list:
        return [(x.float() * torch.nan, masks) for x, masks in batches] if number in steps and RANK == 0 else batches

    return lambda: before_step(nan)


def nan_gradient() -> None:
    """In one number of rank 1, in step 3, after its own backward."""

    def poison(trainer: Trainer, batches: list, number: int) -> list:
        registers = trainer.model.student.backbone.registers
        if number == 3 and RANK == 1:
            handle = registers.register_hook(lambda gradient: (handle.remove(), gradient * torch.nan)[1])
        return batches

    before_step(poison)


def clock_set_back() -> None:
    """By a day, from step 3 on."""
    original, back = time.time, [0.0]
    time.time = lambda: original() - back[0]

    def turn(trainer: Trainer, batches: list, number: int) -> list:
        back[0] = 86400.0 * (number >= 3)
        return batches

    before_step(turn)


def data_gone() -> None:
    """The folder of images is renamed in step 3."""

    def rename(trainer: Trainer, batches: list, number: int) -> list:
        images = Path(trainer.config.data.source.removeprefix("folder:"))
        if number == 3 and images.exists():
            images.rename(images.with_name("gone"))
        return batches

    before_step(rename)


def slow_steps() -> None:
    """A twentieth of a second each, in which a fault from without finds the run."""
    before_step(lambda trainer, batches, number: (time.sleep(0.05), batches)[1])


FAULTS = {
    "slow save": slow_save,
    "nan in images once": nan_images(range(3, 4)),
    "nan in images": nan_images(range(3, 100)),
    "nan in a gradient": nan_gradient,
    "clock": clock_set_back,
    "data gone": data_gone,
    "slow steps": slow_steps,
}

if __name__ == "__main__":
    FAULTS[os.environ["CAPI_FAULT"]]()
    sys.exit(main())
