"""Batches of cropped images and their masks: the same bits for any number of loader processes, resumable."""

import io
import logging
import math
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count, cycle, islice
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from capi.config import Config, micro_batch_size
from capi.masking import Masks, sample_masks
from capi.permutation import Permutation
from capi.retry import attempt, reason
from capi.seeding import Purpose, generator
from capi.sources import (
    Cursor,
    IndexedSource,
    ShardedSource,
    ShardReader,
    SourceError,
    in_order,
    open_source,
)

logger = logging.getLogger(__name__)

_MAX_ASPECT = 4 / 3
# A JPEG may be decoded at 1/2, 1/4 or 1/8 while the crop stays this many times larger than the output.
_REDUCING_GAP = 2
_MAX_REASONS = 3
_FEWER_THAN_A_BATCH = "%s has fewer images than optim.batch_size, %d: a step shows some of them more than once"
# What the EXIF orientation asks for: whether to swap rows and columns, and which of the two to reverse then.
_UPRIGHT = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}

Box = tuple[int, int, int, int]  # left, top, width, height
Encoded = bytes | ndarray | Exception


def random_box(width: int, height: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """The box of a RandomResizedCrop: its share of the area uniform in `scale`, its aspect log-uniform in [3/4, 4/3].

    After 10 draws that do not fit, the largest centred box of an admitted aspect (as torchvision's).
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(-math.log(_MAX_ASPECT), math.log(_MAX_ASPECT)))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = rng.integers(width - box_width + 1), rng.integers(height - box_height + 1)
            return int(left), int(top), box_width, box_height
    box_width, box_height = min(width, round(height * _MAX_ASPECT)), min(height, round(width * _MAX_ASPECT))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def centre_box(width: int, height: int) -> Box:
    """The largest centred square."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def crop(data: Encoded, size: int, choose_box: Callable[[int, int], Box]) -> UInt8[ndarray, "size size 3"]:
    """The box that `choose_box(width, height)` picks, upright and as RGB, resized to `size` by bicubic interpolation.

    `data` is an encoded image, or uint8 pixels; an exception in its place is raised. Alpha is dropped, as PIL's
    `convert("RGB")` does; 16-bit grey is scaled to 8 bits. The result is within two grey levels of Pillow's crop
    and bicubic resize, rows first, but where a large JPEG is decoded small: there the box is rounded to whole pixels of
    what is decoded, which moves an edge by a quarter of an output pixel at most. Raises whatever Pillow raises on
    broken data.
    """
    if isinstance(data, Exception):
        raise data
    if isinstance(data, ndarray):
        left, top, width, height = choose_box(data.shape[1], data.shape[0])
        return _resized(data[top : top + height, left : left + width].copy(), size).numpy()
    image = Image.open(io.BytesIO(data))
    reducible = image.format in ("JPEG", "MPO")
    if not reducible:
        image.load()  # Only then has a TIFF its upright size.
    # The box is drawn on the image as stored: the law of the crop is the same under all eight orientations, and
    # turning the small result is cheap.
    left, top, width, height = choose_box(*image.size)
    reduction = 1
    if reducible:
        while reduction < 8 and min(width, height) >= 2 * reduction * _REDUCING_GAP * size:
            reduction *= 2
        image.draft(None, (image.width // reduction, image.height // reduction))
    box = [round(edge / reduction) for edge in (left, top, left + width, top + height)]
    resized = _resized(np.array(_to_rgb(image.crop(box))), size)
    swap, reverse = _UPRIGHT.get(_orientation(image), (False, ()))
    return (resized.transpose(0, 1) if swap else resized).flip(reverse).numpy()


def _resized(pixels: UInt8[ndarray, "height width 3"], size: int) -> UInt8[Tensor, "size size 3"]:
    """In a fraction of the time that Pillow's own resize takes."""
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return interpolate(planes, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey, which convert() would clip at 255.
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int | None:
    exif = attempt(image.getexif)  # Broken metadata do not make an image unreadable.
    return None if isinstance(exif, Exception) else exif.get(0x0112)


@dataclass
class Batch:
    """Images of one rank that pass through the model together, and their masks."""

    images: UInt8[Tensor, "images 3 height width"]
    masks: Masks
    skipped: list[str]
    """Names of the unreadable files met while making this batch."""

    def pin_memory(self) -> "Batch":
        return Batch(self.images.pin_memory(), self.masks.pin_memory(), self.skipped)


class _Delivery(NamedTuple):
    """What a loader process sends: a batch, why files were skipped, and where its stream now stands."""

    batch: Batch
    reasons: dict[str, str]
    cursor: Cursor | None


class ImageStream:
    """Endless micro-batches of images with their masks, for one rank; `micro_batches_per_step` in a row make a step.

    Folders and synthetic scenes: image i of micro-batch j of a step is sample g = step * batch_size + rank * local
    batch + j * micro-batch + i of the run, which is image Permutation(seed, g // n)[g % n] of n. So neither ranks nor
    loader processes nor micro-batches change what a step sees, and a step number is all that resuming takes. An
    unreadable file is replaced by the next readable one of the listing.

    Streamed sources (hf, wds): every loader process of every rank reads its own share, and micro-batch m of the run is
    made by process m mod num_workers; the processes of a rank divide the shuffle buffer. Resuming is exact with equal
    ranks, processes, micro-batches and shuffle buffer; otherwise a warning says so and the epoch starts again. An
    unreadable file is left out.

    The crop and the mask of a sample depend on its key alone: (seed, epoch, index), or (seed, epoch, shard, position in
    the shard) where streamed.

    Args:
        start_step: number of the first step.
        state: `state_dict()` of an earlier stream of the same rank, to go on from; it brings its own step.

    Raises:
        ValueError: batch_size does not divide by world_size, or a rank's share of it by the micro-batch size, or the
            source's name is of no known form.
        SourceError: the source is missing, empty or (from the iterator) has no readable image.
    """

    def __init__(
        self,
        config: Config,
        *,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        state: dict | None = None,
    ):
        if config.optim.batch_size % world_size:
            raise ValueError(
                f"optim.batch_size must divide by the number of ranks, got {config.optim.batch_size} on {world_size}"
            )
        local, micro = config.optim.batch_size // world_size, micro_batch_size(config, world_size)
        if micro < 1 or local % micro:
            raise ValueError(f"run.micro_batch_size must divide the {local} images of a rank, got {micro}")
        self.micro_batches_per_step = local // micro
        self._config, self._rank, self._world_size = config, rank, world_size
        self._source = open_source(config)
        step = start_step if state is None else state["step"]
        self._micro_batch = step * self.micro_batches_per_step
        self._skipped: set[str] = set()
        self._n_processes = max(config.data.num_workers, 1)
        self._layout = {
            "rank": rank,
            "world_size": world_size,
            "num_workers": self._n_processes,
            "micro_batch_size": micro,
            "shuffle_buffer": config.data.shuffle_buffer,
        }
        self._cursors: dict[int, Cursor] = {}
        if rank == 0:
            self._say_what_was_found()
        if isinstance(self._source, ShardedSource):
            self._layout["content"] = self._source.fingerprint
            self._cursors = self._first_cursors(step, state)
            self._epoch, self._is_small = min(cursor.epoch for cursor in self._cursors.values()), False
        self._note_step()

    def _say_what_was_found(self) -> None:
        source, batch_size = self._source, self._config.optim.batch_size
        if isinstance(source, ShardedSource):
            logger.info("%s: %d shards", source.source, source.n_shards)
            return
        logger.info("%s: %d images", source.source, len(source))
        if len(source) < batch_size:
            logger.warning(_FEWER_THAN_A_BATCH, source.source, batch_size)

    def _first_cursors(self, step: int, state: dict | None) -> dict[int, Cursor]:
        n_readers = self._world_size * self._n_processes
        if n_readers > self._source.n_shards and self._rank == 0:
            logger.warning(
                "%s has %d shards for %d loader processes, so several read each of them; more shards load faster",
                *(self._source.source, self._source.n_shards, n_readers),
            )
        if state is not None and state["layout"] == self._layout:
            return {process: Cursor(*cursor) for process, cursor in state["cursors"].items()}
        epoch = 0
        if state is not None:
            epoch = min((cursor[0] for cursor in state["cursors"].values()), default=0)
            logger.warning(
                "the stream was left with %s and is resumed with %s, so it cannot go on from there: epoch %d restarts",
                *(state["layout"], self._layout, epoch),
            )
        elif step > 0:
            logger.warning("no position of the stream is known at step %d: epoch 0 restarts", step)
        return {process: Cursor(epoch) for process in range(self._n_processes)}

    @property
    def fingerprint(self) -> str | None:
        """What tells the source's files from others wherever they lie: number, names and sizes; None if unknown.

        A folder asks its file system for every size, once: minutes for many millions of files.
        """
        return self._source.fingerprint

    @property
    def n_skipped(self) -> int:
        """Distinct unreadable files met so far by this stream."""
        return len(self._skipped)

    def state_dict(self) -> dict:
        """Where the stream stood after the last whole step that it yielded: plain numbers and strings."""
        return self._state

    def _note_step(self) -> None:
        cursors = {process: tuple(cursor) for process, cursor in self._cursors.items()}
        step = self._micro_batch // self.micro_batches_per_step
        self._state = {"step": step, "layout": self._layout, "cursors": cursors}
        if cursors and self._rank == 0 and not self._is_small:
            epoch = min(cursor[0] for cursor in cursors.values())
            self._is_small = epoch > self._epoch + 1  # An epoch began and ended in this step.
            self._epoch = epoch
            if self._is_small:
                logger.warning(_FEWER_THAN_A_BATCH, self._source.source, self._config.optim.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        config = self._config
        batches = _Batches(config, self._source, self._rank, self._world_size, self._micro_batch, dict(self._cursors))
        loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=config.data.num_workers,
            collate_fn=_unchanged,
            pin_memory=config.run.device != "cpu" and torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_training,
            generator=torch.Generator(),  # Else the loader would draw from the global one.
        )
        with warnings.catch_warnings():
            # Python 3.12 warns of threads at a fork; the processes use neither those threads nor the GPU.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            deliveries = iter(loader)
        for delivery in deliveries:
            if isinstance(delivery, SourceError):
                break
            for name, why in delivery.reasons.items():
                if name not in self._skipped:
                    self._skipped.add(name)
                    logger.warning("skipped unreadable %s: %s", name, why)
            if delivery.cursor is not None:
                self._cursors[self._micro_batch % self._n_processes] = Cursor(*delivery.cursor)
            self._micro_batch += 1
            if self._micro_batch % self.micro_batches_per_step == 0:
                self._note_step()
            yield delivery.batch
        del deliveries  # Ends the loader processes: the traceback would keep them.
        raise delivery


class _Batches(IterableDataset):
    """The micro-batches of one rank from number `micro_batch` on; of n loader processes, each makes every n-th."""

    def __init__(
        self,
        config: Config,
        source: IndexedSource | ShardedSource,
        rank: int,
        world_size: int,
        micro_batch: int,
        cursors: dict[int, Cursor],
    ):
        self._config, self._source, self._rank, self._world_size = config, source, rank, world_size
        self._micro_batch, self._cursors = micro_batch, cursors
        self._n_images = micro_batch_size(config, world_size)
        self._reasons: dict[str, str] = {}

    def __iter__(self) -> Iterator[_Delivery | SourceError]:
        worker = get_worker_info()
        process, n_processes = (worker.id, worker.num_workers) if worker else (0, 1)
        first = self._micro_batch + process
        reader = None
        if isinstance(self._source, ShardedSource):
            reader = self._reader(first % n_processes, n_processes)
            samples = self._streamed(reader)
        else:
            samples = chain.from_iterable(self._indexed(number) for number in count(first, n_processes))
        while True:
            # A returned error, unlike a raised one, arrives without the traceback of a loader process.
            try:
                batch = self._next_batch(samples)
            except SourceError as error:
                yield error
                return
            reasons, self._reasons = self._reasons, {}
            yield _Delivery(batch, reasons, reader.cursor if reader else None)

    def _next_batch(self, samples: Iterator[tuple[tuple[int, ...], ndarray]]) -> Batch:
        size, patch_size = self._config.data.image_size, self._config.model.patch_size
        images = torch.empty(self._n_images, 3, size, size, dtype=torch.uint8)
        keys = []
        with warnings.catch_warnings():
            # Pillow warns of odd metadata and of large images; neither may end a run whose warnings are errors.
            warnings.simplefilter("ignore")
            # zip asks for an image first, so that no sample is taken beyond the last one.
            for image, (key, pixels) in zip(images.numpy(), samples, strict=False):
                image[...] = pixels.transpose(2, 0, 1)
                keys.append(key)
        rngs = [self._rng(Purpose.MASK, key) for key in keys]
        side = size // patch_size
        return Batch(images, sample_masks(self._config.masking, (side, side), rngs), list(self._reasons))

    def _indexed(self, micro_batch: int) -> Iterator[tuple[tuple[int, ...], ndarray]]:
        """Keys and pixels of the samples of one micro-batch."""
        n, batch_size = len(self._source), self._config.optim.batch_size
        local = batch_size // self._world_size
        step, place = divmod(micro_batch, local // self._n_images)
        first = step * batch_size + self._rank * local + place * self._n_images
        for sample in range(first, first + self._n_images):
            epoch = sample // n
            index = _permutation(self._config.run.seed, epoch, n)[sample % n]
            for candidate in chain(range(index, n), range(index)):
                name, data = self._source.name(candidate), attempt(self._source.read, candidate)
                pixels = self._pixels((epoch, index), name, data)
                if pixels is not None:
                    yield (epoch, index), pixels
                    break
            else:
                raise SourceError(
                    f"{self._source.source}: expected images, found none readable among {n} files "
                    f"({name}: {self._reasons[name]})"
                )

    def _reader(self, process: int, n_processes: int) -> ShardReader:
        return ShardReader(
            self._source,
            seed=self._config.run.seed,
            reader=self._rank * n_processes + process,
            n_readers=self._world_size * n_processes,
            buffer=max(1, self._config.data.shuffle_buffer // n_processes),
            cursor=self._cursors[process],
        )

    def _streamed(self, reader: ShardReader) -> Iterator[tuple[tuple[int, ...], ndarray]]:
        """Keys and pixels of a reader's samples, endlessly."""
        while True:
            epoch, found = reader.cursor.epoch, False
            for sample in reader.rest_of_epoch():
                key = (epoch, sample.shard, sample.position)
                pixels = self._pixels(key, sample.name, sample.data)
                if pixels is not None:
                    found = True
                    yield key, pixels
            if not found:
                # This reader's share may hold nothing; that the whole source does must not go unnoticed.
                next(_readable(self._source, self._config.data.image_size))

    def _pixels(self, key: tuple[int, ...], name: str, data: Encoded) -> UInt8[ndarray, "size size 3"] | None:
        """A random crop of one image; None, and a note of the reason, where it is unreadable."""
        data_config = self._config.data
        rng = self._rng(Purpose.CROP, key)
        pixels = attempt(crop, data, data_config.image_size, lambda w, h: random_box(w, h, data_config.crop_scale, rng))
        if isinstance(pixels, Exception):
            self._reasons[name] = reason(pixels)
            return None
        # NumPy would reverse byte by byte.
        return torch.from_numpy(pixels).flip(1).numpy() if data_config.hflip and rng.random() < 0.5 else pixels

    def _rng(self, purpose: Purpose, key: tuple[int, ...]) -> np.random.Generator:
        return generator(purpose, self._config.run.seed, *key)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> Permutation:
    return Permutation(generator(Purpose.ORDER, seed, epoch), n)


def _unchanged(delivery: _Delivery | SourceError) -> _Delivery | SourceError:
    return delivery


def _leave_signals_to_training(_: int) -> None:
    """A signal that a terminal or a scheduler sends to every process must not end a loader before its last batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if multiprocessing.get_start_method() != "spawn":  # Its full clean-up at exit does not bear a waiting thread.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_parent_asks, daemon=True).start()


def _exit_when_parent_asks() -> None:
    # At its own exit the training process terminates its loaders by this very signal, and waits for them.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def evaluation_images(config: Config, n: int) -> UInt8[Tensor, "n 3 size size"]:
    """`n` images of the source, always the same, centre-cropped and resized, for pictures.

    Evenly spaced over a folder or the synthetic scenes, the first of a streamed source; again from the start where
    there are fewer than `n`. Raises as ImageStream does.
    """
    source, size = open_source(config), config.data.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(source, ShardedSource):
            images = islice(cycle(_readable(source, size)), n)
        else:
            images = (next(_readable(source, size, i * len(source) // n)) for i in range(n))
        return torch.from_numpy(np.stack(list(images)).transpose(0, 3, 1, 2).copy())


def _readable(
    source: IndexedSource | ShardedSource, size: int, start: int = 0
) -> Iterator[UInt8[ndarray, "size size 3"]]:
    """Centre crops of the readable images, in order, an indexed source's from `start`; SourceError if there is none."""
    n_read, found, reasons = 0, False, []
    for name, data in in_order(source, start):
        pixels = attempt(crop, data, size, centre_box)
        n_read += 1
        if not isinstance(pixels, Exception):
            found = True
            yield pixels
        elif len(reasons) < _MAX_REASONS:
            reasons.append(f"{name}: {reason(pixels)}")
    if not found:
        why = "; ".join(reasons) or "see data.image_key"
        raise SourceError(f"{source.source}: expected images, found none readable among {n_read} ({why})")
