"""What the device part of a step reads and leaves, and the CUDA graph that replays it."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from capi.config import Config
from capi.distributed import World
from capi.drop_path import DropPath, received
from capi.masking import Masks

INDICES = ("visible_indices", "predict_indices")

MicroBatch = tuple[Shaped[Tensor, "images 3 height width"], Masks]


@dataclass
class StepInputs:
    """All that the device part of a step reads beside the state: tensors on the device, and shapes."""

    batches: Sequence[MicroBatch]
    drop_path: Sequence[DropPath | None]
    drawn: Int[Tensor, "_"] | None
    """What the branches of `drop_path` are views of."""
    n_predicted: float
    """Predictions of a rank, in the mean over the ranks."""

    def tensors(self) -> list[Tensor]:
        parts = [x for images, masks in self.batches for x in (images, masks.visible_indices, masks.predict_indices)]
        return parts if self.drawn is None else [*parts, self.drawn]

    def shape(self) -> tuple:
        """What a CUDA graph that reads such inputs depends on."""
        counts = [(masks.visible_counts, masks.predict_counts) for _, masks in self.batches]
        return tuple((tuple(x.shape), x.dtype, x.device) for x in self.tensors()), tuple(counts)

    def buffers(self) -> "StepInputs":
        """Inputs of the same values and shape, in memory of their own."""
        batches = [
            (images.clone(), replace(masks, **{name: getattr(masks, name).clone() for name in INDICES}))
            for images, masks in self.batches
        ]
        if self.drawn is None:
            return replace(self, batches=batches)
        drawn = self.drawn.clone()
        host = [tuple(branches.drawn for branches in drop_path) for drop_path in self.drop_path]
        return replace(self, batches=batches, drop_path=received(drawn, host, self.n_images()), drawn=drawn)

    def n_images(self) -> list[int]:
        return [len(images) for images, _ in self.batches]

    def fill(self, other: "StepInputs") -> None:
        """Takes the values of inputs of the same shape; the addresses stay."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)


class Losses(NamedTuple):
    """What the device part of a step leaves beside the gradients."""

    loss: Float[Tensor, ""]
    clustering_loss: Float[Tensor, ""]
    target_entropy: Float[Tensor, ""]
    finite: Bool[Tensor, ""]
    """Whether losses and gradients are, on this rank."""
    clusters: Int[Tensor, "predicted"]


class StepGraph:
    """The device part of a step in a CUDA graph, which reads inputs of one shape from buffers of its own.

    What a replay leaves, gradients among it, is overwritten by the next.
    """

    def __init__(self, shape: tuple):
        self.shape = shape
        self.warmed_up = 0
        self.captured = False

    def capture(
        self, function: Callable[[StepInputs], Losses], inputs: StepInputs, parameters: Sequence[nn.Parameter]
    ) -> None:
        """Records the launches of `function`, without running them.

        Raises:
            RuntimeError: something in it cannot be captured, or memory is short.
        """
        self.inputs = inputs.buffers()
        for parameter in parameters:
            parameter.grad = None
        gc.collect()  # An autograd graph that is still alive would keep gradients on the stream of the steps before.
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Relaxed, as a kernel may be loaded that no warm-up met; and other threads pin memory meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="relaxed"):
                self.losses = function(self.inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # As the context manager leaves it on success alone.
            reason = " ".join(str(error.__context__ or error).split())[:300]
            raise RuntimeError(
                f"the step cannot be captured in a CUDA graph ({reason}): set run.cuda_graphs off"
            ) from error
        self.gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        self.captured = True

    def replay(self, inputs: StepInputs) -> Losses:
        """The losses in memory of their own; the gradients, until the next replay, those of the parameters."""
        self.inputs.fill(inputs)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return Losses(*(x.clone() for x in self.losses))


def graphs_obstacle(config: Config, world: World) -> str | None:
    """Why the step cannot be a CUDA graph; None where it can."""
    if world.device.type != "cuda":
        return f"the device is {world.device.type}"
    if world.size > 1:
        return f"there are {world.size} processes"
    if isinstance(config.masking.mask_ratio, tuple):
        return "masking.mask_ratio is a range"
    if config.clustering.queue_size > 0:
        return "clustering.queue_size is set"
    return None
