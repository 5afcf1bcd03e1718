"""Steps of micro-batches on the device, copied there while the step before is computed."""

from collections.abc import Callable
from types import TracebackType

import torch
from jaxtyping import UInt8
from torch import Tensor

from capi.data.reading import never
from capi.data.stream import ImageStream
from capi.masking import Masks
from capi.profiling import HostTime

MicroBatch = tuple[UInt8[Tensor, "images 3 height width"], Masks]


class DevicePrefetcher:
    """The steps of an ImageStream, each the list of its micro-batches, with uint8 images and masks on `device`.

    On a GPU, `prefetch()` starts to copy one micro-batch of the next step, on a CUDA stream of its own: call it each
    time that the work of a micro-batch is launched, and the loading is spread over the step and the copies overlap with
    its work. `next` does what is left. The counts of the masks stay on the host. The device holds the images of two
    steps at most, the one being computed and the next, if the caller keeps none: before the first copy the host waits
    until the step before those two is computed. On a CPU, micro-batches are grouped, and nothing is copied or fetched
    ahead.

    Use it as a context manager, or call `close()`: that ends the loader processes. Raises as ImageStream does, and
    Interrupted when `interrupted()`, asked every second of waiting for images, says so; `state_dict()` stays right.
    In `host` the time spent waiting for the loader is `data wait`, that for the device to come after, `device wait`.
    """

    def __init__(
        self,
        stream: ImageStream,
        device: torch.device,
        interrupted: Callable[[], bool] = never,
        host: HostTime | None = None,
    ):
        self._stream, self._device = stream, device
        self._batches = stream.batches(interrupted)
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: list[MicroBatch] = []  # Of the next step.
        self._computed: torch.cuda.Event | None = None  # All that was launched before the last step was yielded.
        self._state = stream.state_dict()
        self._host = HostTime() if host is None else host

    @property
    def n_skipped(self) -> int:
        """Distinct unreadable files met so far, those met ahead among them."""
        return self._stream.n_skipped

    def state_dict(self) -> dict:
        """Where the stream stood after the last step yielded here, whatever was prefetched since."""
        return self._state

    def __iter__(self) -> "DevicePrefetcher":
        return self

    def __next__(self) -> list[MicroBatch]:
        while len(self._ahead) < self._stream.micro_batches_per_step:
            self._ahead.append(self._load())
        step, self._ahead = self._ahead, []
        self._state = self._stream.state_dict()
        if self._copy_stream is not None:
            compute_stream = torch.cuda.current_stream(self._device)
            # A blocking event leaves the core that waits for it to the loader.
            self._computed = compute_stream.record_event(torch.cuda.Event(blocking=True))
            compute_stream.wait_stream(self._copy_stream)
            for images, masks in step:
                # The memory belongs to the copying stream, which may not reuse it before this one is through with it.
                for tensor in (images, masks.visible_indices, masks.predict_indices):
                    tensor.record_stream(compute_stream)
        return step

    def prefetch(self) -> None:
        """Starts to copy one more micro-batch of the next step, as soon as the loader has it, if one is left."""
        if self._copy_stream is not None and len(self._ahead) < self._stream.micro_batches_per_step:
            self._ahead.append(self._load())

    def _load(self) -> MicroBatch:
        if self._computed is not None and not self._ahead:
            with self._host.phase("device wait"):
                self._computed.synchronize()
        with self._host.phase("data wait"):
            batch = next(self._batches)
        with torch.cuda.stream(self._copy_stream):  # On a CPU None, which changes nothing.
            # The batch may go at once: PyTorch keeps pinned memory from reuse until copies from it have ended.
            return batch.images.to(self._device, non_blocking=True), batch.masks.to(self._device)

    def close(self) -> None:
        """Ends the loader processes."""
        self._batches.close()

    def __enter__(self) -> "DevicePrefetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
