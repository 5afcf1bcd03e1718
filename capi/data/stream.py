"""Batches of cropped images and their masks: the same bits for any number of loader processes, resumable."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count, repeat
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from capi.config import Config, micro_batch_size
from capi.data.crops import Encoded, crop, random_box
from capi.data.loader import affordable_prefetch, loaded, share
from capi.data.permutation import Permutation
from capi.data.readable import readable
from capi.data.reading import Reads, at_once, never
from capi.data.retry import attempt, reason
from capi.data.sources import (
    Cursor,
    IndexedSource,
    ShardedSource,
    ShardReader,
    SourceError,
    SyntheticImages,
    open_source,
)
from capi.data.taken import Progress, Taken, reader_buffer
from capi.masking import Masks, sample_masks
from capi.seeding import Purpose, generator

logger = logging.getLogger(__name__)

_FEWER_THAN_A_BATCH = "%s has fewer images than optim.batch_size, %d: a step shows some of them more than once"


@dataclass
class Batch:
    """Images of one rank that pass through the model together, and their masks."""

    images: UInt8[Tensor, "images 3 height width"]
    masks: Masks
    skipped: list[str]
    """Names of the unreadable files met while making this batch."""

    def pin_memory(self) -> "Batch":
        return Batch(self.images.pin_memory(), self.masks.pin_memory(), self.skipped)

    def share_memory(self) -> "Batch":
        """Itself, moved to where other processes read it; LoaderError where that has no room."""
        share([self.images, self.masks.visible_indices, self.masks.predict_indices])
        return self


class _Delivery(NamedTuple):
    """What a loader process sends: a batch, why files were skipped, and where its stream now stands."""

    batch: Batch
    reasons: dict[str, str]
    cursor: Cursor | None


class ImageStream:
    """Endless micro-batches of images with their masks, for one rank; `micro_batches_per_step` in a row make a step.

    Folders and synthetic scenes: a step that begins after s images shows image i of micro-batch j of a rank as sample
    g = s + rank * local batch + j * micro-batch + i of the run, which is image Permutation(seed, g // n)[g % n] of n.
    So neither ranks nor loader processes nor micro-batches change what a step sees, every image comes once in each n
    samples, and the number of samples shown is all that resuming takes, whatever the batch size becomes. An unreadable
    file is replaced by the next readable one of the listing.

    Streamed sources (hf, wds): every loader process of every rank reads its own share of each epoch, and micro-batch m
    of the run is made by process m mod num_workers; the processes of a rank divide the shuffle buffer. A process that
    is through with its share begins the next epoch, so an image belongs to an epoch by its key, not by the step that
    shows it: once all processes have left an epoch, every readable image of it was shown once, and never is one shown
    twice. An unreadable file is left out.

    Resuming shows exactly the images that whole steps have not shown: what processes had made ahead is made again.
    With equal ranks, processes, micro-batches and batch size the steps are those of an uninterrupted run, bit for bit.
    With others, folders and scenes go on with the same order of images. Of streamed sources, other ranks, processes,
    shuffle buffer or seed divide what is left of the epochs begun among the new processes, as often as they change
    within an epoch; it comes in another order, but still every image once. Where that cannot be - the content of the
    source has changed, the places of some ranks are missing, or an older version saved the state - a warning says so,
    and the epoch starts again.

    The crop and the mask of a sample depend on its key alone: (seed, epoch, index), or (seed, epoch, shard, position).

    Args:
        start_step: number of the first step.
        states: `state_dict()` of the streams of all ranks of an earlier run, in their order, to go on from; the first
            brings the step.

    Raises:
        ValueError: batch_size does not divide by world_size, or a rank's share of it by the micro-batch size, or the
            source's name is of no known form, or data.read_timeout is not positive.
        SourceError: the source is missing, empty or (from the iterator) has no readable image.
        LoaderError: shared memory does not hold a micro-batch, or (from the iterator) a loader process died.
        HungError: (from the iterator) reads did not return in time, eight in a row.
    """

    def __init__(
        self,
        config: Config,
        *,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        states: Sequence[dict] | None = None,
    ):
        if config.optim.batch_size % world_size:
            raise ValueError(
                f"optim.batch_size must divide by the number of ranks, got {config.optim.batch_size} on {world_size}"
            )
        local, micro = config.optim.batch_size // world_size, micro_batch_size(config, world_size)
        if micro < 1 or local % micro:
            raise ValueError(f"run.micro_batch_size must divide the {local} images of a rank, got {micro}")
        if not config.data.read_timeout > 0:
            raise ValueError(f"data.read_timeout must be positive, got {config.data.read_timeout}")
        self.micro_batches_per_step = local // micro
        self._prefetch = affordable_prefetch(
            3 * config.data.image_size**2 * micro,
            config.data.num_workers,
            self.micro_batches_per_step,  # On a CPU, those of the step that is computed.
            min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
        )
        self._config, self._rank, self._world_size = config, rank, world_size
        self._source = open_source(config)
        step = start_step if states is None else states[0]["step"]
        self._micro_batch = step * self.micro_batches_per_step
        # Samples shown before step 0, had all steps been of this batch size: not 0 where it has changed.
        self._offset = 0 if states is None else states[0]["samples"] - step * config.optim.batch_size
        self._skipped: set[str] = set()
        self._n_processes = max(config.data.num_workers, 1)
        self._layout = {
            "seed": config.run.seed,
            "rank": rank,
            "world_size": world_size,
            "num_workers": self._n_processes,
            "micro_batch_size": micro,
            "shuffle_buffer": config.data.shuffle_buffer,
        }
        self._cursors: list[Cursor] = []
        self._taken: dict[int, Taken] = {}
        if rank == 0:
            self._say_what_was_found()
        if isinstance(self._source, ShardedSource):
            self._layout["content"] = self._source.fingerprint
            progress = self._progress(step, states)
            self._cursors = progress.cursors[rank * self._n_processes :][: self._n_processes]
            self._taken = progress.taken
            self._epoch, self._is_small = min(cursor.epoch for cursor in self._cursors), False
        # All ranks have the same, and one of them saves it.
        self._taken_state = {str(epoch): gone.state_dict() for epoch, gone in self._taken.items()} if rank == 0 else {}
        self._note_step()

    def _say_what_was_found(self) -> None:
        source, batch_size = self._source, self._config.optim.batch_size
        if isinstance(source, ShardedSource):
            logger.info("%s: %d shards", source.source, source.n_shards)
            n_readers = self._world_size * self._n_processes
            if n_readers > source.n_shards:
                message = "%s has %d shards for %d loader processes, so several read each; more shards load faster"
                logger.warning(message, source.source, source.n_shards, n_readers)
            return
        logger.info("%s: %d images", source.source, len(source))
        if len(source) < batch_size:
            logger.warning(_FEWER_THAN_A_BATCH, source.source, batch_size)

    def _progress(self, step: int, states: Sequence[dict] | None) -> Progress:
        n_readers, seed, epoch = self._world_size * self._n_processes, self._config.run.seed, 0
        buffer, say = reader_buffer(self._config.data.shuffle_buffer, self._n_processes), self._rank == 0
        if states is not None:
            saved, layout = Progress.of(states, seed), states[0]["layout"]
            if layout.get("content") == self._layout["content"]:
                progress = saved.shared_by(seed, n_readers, buffer, self._source.n_shards)
                if progress not in (None, saved) and say:
                    message = "%d loader processes share what %d have left of the epochs from %d on"
                    logger.info(message, n_readers, saved.n_readers, progress.cursors[0].epoch)
                if progress is not None:
                    return progress
            epoch = min((cursor.epoch for cursor in saved.cursors), default=0)
            if say:
                message = "the stream was left with %s and is resumed with %s, so it cannot go on from there: "
                logger.warning(f"{message}epoch %d restarts", layout, self._layout, epoch)
        elif step > 0 and say:
            logger.warning("no position of the stream is known at step %d: epoch 0 restarts", step)
        return Progress(seed, n_readers, buffer, [Cursor(epoch)] * n_readers, {})

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
        """Where the stream stood after the last whole step that it yielded: numbers, strings, lists and dicts of them.

        Some ten numbers a loader process; where readers have changed, that of rank 0 says as well what had been taken
        of the epochs begun: some ten bytes a shard, and a bit a sample of shards of which single samples are gone.
        """
        return self._state

    def _note_step(self) -> None:
        step = self._micro_batch // self.micro_batches_per_step
        self._state = {
            "step": step,
            "samples": self._offset + step * self._config.optim.batch_size,
            "layout": self._layout,
            "cursors": [[*cursor[:-1], list(cursor.counts)] for cursor in self._cursors],
            "taken": self._taken_state,
        }
        if self._cursors and self._rank == 0 and not self._is_small:
            epoch = min(cursor.epoch for cursor in self._cursors)
            # An epoch began and ended in this step, and was no rest of one.
            self._is_small = epoch > self._epoch + 1 and self._epoch + 1 not in self._taken
            self._epoch = epoch
            if self._is_small:
                logger.warning(_FEWER_THAN_A_BATCH, self._source.source, self._config.optim.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, interrupted: Callable[[], bool] = never) -> Iterator[Batch]:
        """As iterating, for a caller that may have to stop while it waits.

        `interrupted()` is asked every second of waiting for a loader process or for a file, here, between two bytecodes
        of whose code a signal handler may have run. If it says so, Interrupted is raised and the iterator is over;
        `state_dict()` still says where the stream stood after the last whole step.
        """
        config = self._config
        batches = _Batches(
            *(config, self._source, self._rank, self._world_size, self._micro_batch, self._offset),
            *(list(self._cursors), self._taken),
            never if config.data.num_workers else interrupted,
        )
        deliveries = loaded(
            batches,
            num_workers=config.data.num_workers,
            prefetch_factor=self._prefetch,
            pin_memory=config.run.device != "cpu" and torch.cuda.is_available(),
            interrupted=interrupted,
        )
        with closing(deliveries):
            for delivery in deliveries:
                if isinstance(delivery, Exception):
                    raise delivery
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


class _Batches(IterableDataset):
    """The micro-batches of one rank from number `micro_batch` on; of n loader processes, each makes every n-th."""

    def __init__(
        self,
        config: Config,
        source: IndexedSource | ShardedSource,
        rank: int,
        world_size: int,
        micro_batch: int,
        offset: int,
        cursors: list[Cursor],
        taken: Mapping[int, Taken],
        interrupted: Callable[[], bool],
    ):
        self._config, self._source, self._rank, self._world_size = config, source, rank, world_size
        self._micro_batch, self._offset, self._interrupted = micro_batch, offset, interrupted
        self._cursors, self._taken = cursors, taken
        self._n_images = micro_batch_size(config, world_size)
        self._reasons: dict[str, str] = {}

    def __iter__(self) -> Iterator[_Delivery | SourceError | OSError]:
        with closing(Reads(self._config.data.read_timeout, self._interrupted)) as reads:
            yield from self._deliveries(at_once if isinstance(self._source, SyntheticImages) else reads)

    def _deliveries(self, reads: Callable) -> Iterator[_Delivery | SourceError | OSError]:
        worker = get_worker_info()
        process, n_processes = (worker.id, worker.num_workers) if worker else (0, 1)
        first = self._micro_batch + process
        reader = None
        if isinstance(self._source, ShardedSource):
            reader = self._reader(first % n_processes, n_processes, reads)
            samples = self._streamed(reader, reads)
        else:
            samples = chain.from_iterable(self._indexed(number, reads) for number in count(first, n_processes))
        while True:
            try:
                batch = self._next_batch(samples)
                if worker is not None:
                    batch = batch.share_memory()
            except (SourceError, OSError) as error:
                # A returned error, unlike a raised one, arrives without the traceback of a loader process.
                yield from repeat(error)
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

    def _indexed(self, micro_batch: int, reads: Callable) -> Iterator[tuple[tuple[int, ...], ndarray]]:
        """Keys and pixels of the samples of one micro-batch."""
        n, batch_size = len(self._source), self._config.optim.batch_size
        local = batch_size // self._world_size
        step, place = divmod(micro_batch, local // self._n_images)
        first = self._offset + step * batch_size + self._rank * local + place * self._n_images
        for sample in range(first, first + self._n_images):
            epoch = sample // n
            index = _permutation(self._config.run.seed, epoch, n)[sample % n]
            for candidate in chain(range(index, n), range(index)):
                name = self._source.name(candidate)
                data = reads(name, self._source.read, candidate)
                pixels = self._pixels((epoch, index), name, data)
                if pixels is not None:
                    yield (epoch, index), pixels
                    break
            else:
                raise SourceError(
                    f"{self._source.source}: expected images, found none readable among {n} files "
                    f"({name}: {self._reasons[name]})"
                )

    def _reader(self, process: int, n_processes: int, reads: Callable) -> ShardReader:
        return ShardReader(
            self._source,
            seed=self._config.run.seed,
            reader=self._rank * n_processes + process,
            n_readers=self._world_size * n_processes,
            buffer=reader_buffer(self._config.data.shuffle_buffer, n_processes),
            cursor=self._cursors[process],
            taken=self._taken,
            reads=reads,
        )

    def _streamed(self, reader: ShardReader, reads: Callable) -> Iterator[tuple[tuple[int, ...], ndarray]]:
        """Keys and pixels of a reader's samples, endlessly."""
        while True:
            epoch, found = reader.cursor.epoch, False
            for sample in reader.rest_of_epoch():
                key = (epoch, sample.shard, sample.position)
                pixels = self._pixels(key, sample.name, sample.data)
                if pixels is not None:
                    found = True
                    yield key, pixels
            if not found and epoch not in self._taken:
                # This reader's share may hold nothing; that the whole source does must not go unnoticed.
                next(readable(self._source, self._config.data.image_size, reads))

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
