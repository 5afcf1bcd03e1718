"""What a step asks of a GPU and of its host, counted without one: `python -m benchmarks.step_launches [PRESET ...]`.

For each preset: the operations of the device part of a step that launch a kernel, and the bytes that they read and
write, on tensors without values, as the host of a GPU would launch them without a compiler, which fuses many of them;
how many bytes of gradients are left to the update; and a step's milliseconds on the host at the preset's depth, with
layers so small that arithmetic is negligible. An operation of `capi_kernels` counts as one, with its operands.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.step_graph import BATCHES
from benchmarks.train_step import configuration, draw_batch
from capi.casting import WeightCopies
from capi.distributed import World
from capi.step import Trainer

CPU, META = torch.device("cpu"), torch.device("meta")
WITHOUT_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view")
SMALL = (
    "--model.embed_dim",
    "64",
    "--model.num_heads",
    "2",
    "--data.image_size",
    "112",
    "--clustering.n_prototypes",
    "16",
)
STEPS = 12


class Launches(TorchDispatchMode):
    """Counts the operations that compute, and the bytes of their operands and results, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op._schema.name.split("::")[1]
        tensors = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        if tensors and not op.is_view and name not in WITHOUT_KERNEL:
            here = self.of[name]
            here[0] += 1
            here[1] += sum(map(_bytes, tensors.values()))
        return out

    def total(self) -> tuple[int, int]:
        """Launches and bytes."""
        return sum(n for n, _ in self.of.values()), sum(moved for _, moved in self.of.values())


def _bytes(x: Tensor) -> int:
    """Of what there is in memory: a number expanded to many is one."""
    return x.itemsize * torch.Size(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride).numel()


def count(preset: str, batch: int, parts: int = 1) -> tuple[Launches, int]:
    """The launches of the device part of a step of `parts` micro-batches, and the bytes of gradients that it leaves."""
    config = configuration(preset, batch, CPU, torch.bfloat16, "--run.compile", "off")
    config.optim.batch_size = batch // parts
    trainer = Trainer(config, World(0, 1, CPU))
    trainer.model.to(META)
    trainer.world = World(0, 1, META)
    trainer.copies = WeightCopies([trainer.model.student, trainer.teacher_modules()], torch.bfloat16)
    trainer.model.student_ema.backbone.encoder.in_place = True
    inputs = trainer._inputs([draw_batch(config, part, META) for part in range(parts)], 0)
    with Launches() as launches:
        trainer.losses_and_gradients(inputs)
    return launches, sum(p.grad.nbytes for p in trainer.model.parameters() if p.grad is not None)


def host_seconds(preset: str) -> float:
    """Of a CPU in the median of some steps of two images, with the preset's depths and layers of a few channels."""
    config = configuration(preset, 2, CPU, torch.float32, "--run.compile", "off", *SMALL)
    trainer, batch = Trainer(config, World(0, 1, CPU)), draw_batch(config, 0, CPU)
    seconds = []
    for step in range(STEPS):
        start = time.process_time()  # Whatever else the machine does.
        trainer.step([batch], step)
        seconds.append(time.process_time() - start)
    return median(seconds[2:])


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="*", default=["vits14", "vitl14"], metavar="PRESET")
    parser.add_argument("--parts", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--top", type=int, default=12, help="operations to name, those that move the most")
    arguments = parser.parse_args(given)
    for preset in arguments.presets:
        launches, gradients = count(preset, BATCHES[preset], arguments.parts)
        total, moved = launches.total()
        print(f"[{preset} x {BATCHES[preset]}] {total} launches, {moved / 1e9:.2f} GB; ", end="")
        print(f"gradients of {gradients / 1e9:.3f} GB; host {host_seconds(preset) * 1e3:.1f} ms a step")
        largest = sorted(launches.of.items(), key=lambda item: -item[1][1])[: arguments.top]
        for name, (n, of_name) in largest:
            print(f"    {n:5}  {of_name / 1e9:8.3f} GB  {name}")


if __name__ == "__main__":
    main()
