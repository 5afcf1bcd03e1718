"""Steps of micro-batches on the device, copied there while the step before is computed."""

import time
from types import TracebackType
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from capi.data import ImageStream
from capi.masking import Masks

MicroBatch = tuple[UInt8[Tensor, "images 3 height width"], Masks]


class _Step(NamedTuple):
    micro_batches: list[MicroBatch]
    copied: torch.cuda.Event | None  # None on a CPU, where nothing is copied.


class DevicePrefetcher:
    """The steps of an ImageStream, each the list of its micro-batches, with uint8 images and masks on `device`.

    On a GPU, `prefetch()` starts to copy the next step, on a CUDA stream of its own: call it once the work of a step is
    launched, and the copies overlap with that work. Where it was not called, `next` begins with it. The counts of the
    masks stay on the host. The device holds the images of two steps at most, the one being computed and the next, if
    the caller keeps none: before it copies, `prefetch` waits until the step before those two is computed, while the
    device still has one to do. On a CPU, micro-batches are grouped, and nothing is copied or fetched ahead.

    Use it as a context manager, or call `close()`: that ends the loader processes. Raises as ImageStream does.
    """

    def __init__(self, stream: ImageStream, device: torch.device):
        self._stream, self._device = stream, device
        self._batches = iter(stream)
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: _Step | None = None
        self._computed: torch.cuda.Event | None = None  # All that was launched before the last step was yielded.
        self._state = stream.state_dict()
        self.waited_seconds = 0.0
        """Time spent waiting for the loader since the start."""

    @property
    def n_skipped(self) -> int:
        """Distinct unreadable files met so far, those of a step ahead among them."""
        return self._stream.n_skipped

    def state_dict(self) -> dict:
        """Where the stream stood after the last step yielded here, whatever was prefetched since."""
        return self._state

    def __iter__(self) -> "DevicePrefetcher":
        return self

    def __next__(self) -> list[MicroBatch]:
        step, self._ahead = self._ahead or self._load(), None
        self._state = self._stream.state_dict()
        if step.copied is not None:
            compute_stream = torch.cuda.current_stream(self._device)
            # A blocking event leaves the core that waits for it to the loader.
            self._computed = compute_stream.record_event(torch.cuda.Event(blocking=True))
            compute_stream.wait_event(step.copied)
            for images, masks in step.micro_batches:
                # The memory belongs to the copying stream, which may not reuse it before this one is through with it.
                for tensor in (images, masks.visible_indices, masks.predict_indices):
                    tensor.record_stream(compute_stream)
        return step.micro_batches

    def prefetch(self) -> None:
        """Starts to copy the next step, as soon as the loader has it."""
        if self._copy_stream is not None and self._ahead is None:
            self._ahead = self._load()

    def _load(self) -> _Step:
        if self._computed is not None:
            self._computed.synchronize()
        micro_batches = []
        for _ in range(self._stream.micro_batches_per_step):
            began = time.perf_counter()
            batch = next(self._batches)
            self.waited_seconds += time.perf_counter() - began
            with torch.cuda.stream(self._copy_stream):  # On a CPU None, which changes nothing.
                # The batch may go at once: PyTorch keeps pinned memory from reuse until copies from it have ended.
                images = batch.images.to(self._device, non_blocking=True)
                micro_batches.append((images, batch.masks.to(self._device)))
        return _Step(micro_batches, self._copy_stream.record_event() if self._copy_stream is not None else None)

    def close(self) -> None:
        """Ends the loader processes."""
        self._batches.close()

    def __enter__(self) -> "DevicePrefetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
