"""Where images come from: sources with random access, and sources of shards that are streamed."""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, groupby, islice, repeat, zip_longest
from typing import NamedTuple

from jaxtyping import UInt8
from numpy import ndarray

from capi.config import Config
from capi.data.folder import ImageFolder
from capi.data.listing import IMAGE_EXTENSIONS as IMAGE_EXTENSIONS
from capi.data.listing import SourceError as SourceError
from capi.data.reading import HungError, StuckError, at_once
from capi.data.shards import HubShards, TarShards
from capi.data.synthetic import SyntheticScenes
from capi.data.taken import Cursor, Taken, Unit, shuffled, units_of

_SCENE_CACHE_BYTES = 2**28


class SyntheticImages:
    """The embedded scenes, kept in memory as far as they fit in 256 MiB."""

    def __init__(self, size: int, image_size: int, seed: int) -> None:
        self.source = "synthetic"
        self._scenes = SyntheticScenes(size, image_size, seed)
        self._cache: dict[int, ndarray] = {}
        self._cache_size = _SCENE_CACHE_BYTES // (3 * image_size**2)
        self.fingerprint = f"{size} scenes of {image_size} pixels, seed {seed}"

    def __len__(self) -> int:
        return len(self._scenes)

    def name(self, index: int) -> str:
        return f"scene {index}"

    def read(self, index: int) -> UInt8[ndarray, "height width 3"]:
        image = self._cache.get(index)
        if image is None:
            image = self._scenes.image(index)
            if len(self._cache) < self._cache_size:
                self._cache[index] = image
        return image


IndexedSource = SyntheticImages | ImageFolder
ShardedSource = TarShards | HubShards


def open_source(config: Config) -> IndexedSource | ShardedSource:
    """The source that `config.data.source` names.

    Raises:
        ValueError: the name is of no known form.
        SourceError: there is nothing of that name, or no image in it.
        ImportError: the source needs the extra `data`.
    """
    data = config.data
    kind, _, place = (data.source or "").partition(":")
    if data.source == "synthetic":
        return SyntheticImages(data.synthetic_size, data.image_size, config.run.seed)
    if kind == "folder" and place:
        return ImageFolder(place)
    if kind == "wds" and place:
        return TarShards(place, data.image_key)
    if kind == "hf" and place:
        return HubShards(place, data.hf_split, "image" if data.image_key == "auto" else data.image_key)
    raise ValueError(f"data.source must be synthetic, folder:PATH, hf:NAME or wds:PATTERN, got {data.source}")


class Sample(NamedTuple):
    """An image of a sharded source, as it was read: its bytes, or why there are none."""

    unit: int
    shard: int
    position: int
    name: str
    data: bytes | Exception
    ends_shard: bool = False
    """Whether it stands for what a broken shard has lost from `position` on."""


class ShardReader:
    """Reader `reader` of `n_readers`, which share the samples of every epoch without overlap.

    An epoch visits the shards in an order of its own; where readers outnumber shards, several share a shard, each
    taking every n-th sample. Samples are shuffled in blocks of `buffer`: as one block is handed out, the next is read,
    so a position in the stream is a few integers, and going back to it reads at most two blocks again.

    Args:
        taken: what other readers, who shared these epochs before, have taken of them.
    """

    def __init__(
        self,
        source: ShardedSource,
        *,
        seed: int,
        reader: int,
        n_readers: int,
        buffer: int,
        cursor: Cursor,
        taken: Mapping[int, Taken] | None = None,
        reads: Callable = at_once,
    ):
        self.cursor, self._reads = cursor, reads
        self._source, self._seed, self._buffer = source, seed, buffer
        self._reader, self._n_readers, self._taken = reader, n_readers, taken or {}

    def rest_of_epoch(self) -> Iterator[Sample]:
        """The samples of the cursor's epoch from the cursor on, which moves along and ends at the next epoch."""
        epoch, number, unit, position, taken, counts = self.cursor
        samples = self._in_reading_order(epoch, unit, position, counts)
        block = list(islice(samples, sum(map(abs, counts)) or self._buffer))
        while block:
            unit, position, counts = block[0].unit, block[0].position, _counts(block)
            following = []
            for count, i in enumerate(shuffled(self._seed, epoch, self._reader, number, len(block)), start=1):
                following += islice(samples, 1)
                if count > taken:
                    self.cursor = Cursor(epoch, number, unit, position, count, counts)
                    yield block[i]
                block[i] = None  # Frees the bytes.
            block, number, taken = following, number + 1, 0
        self.cursor = Cursor(epoch + 1)

    def _in_reading_order(
        self, epoch: int, first_unit: int, first_position: int, counts: tuple[int, ...]
    ) -> Iterator[Sample]:
        """The samples from a position on, the first of them as many of each unit as `Cursor.counts` has."""
        taken = self._taken.get(epoch, Taken())
        units = units_of(self._seed, epoch, self._source.n_shards, self._n_readers, taken)
        share = islice(enumerate(units[self._reader :: self._n_readers]), first_unit, None)
        for (number, unit), n in zip_longest(share, counts):
            start = first_position if number == first_unit else 0
            samples = self._of_unit(number, unit, taken, start)
            if n is not None:
                # By now the shard may break elsewhere, or not at all: with more or fewer samples of it, the order in
                # which the block was handed out would be that of others.
                name, error = self._source.shard_name(unit.shard), SourceError("has fewer images than when read before")
                again = chain(samples, repeat(Sample(number, unit.shard, start, name, error, ends_shard=True)))
                yield from (sample._replace(ends_shard=n < 0 and sample.ends_shard) for sample in islice(again, abs(n)))
            if n is None or number + 1 == first_unit + len(counts):
                yield from samples

    def _of_unit(self, number: int, unit: Unit, taken: Taken, start: int) -> Iterator[Sample]:
        is_left, position = taken.leaves(unit), -1
        try:
            for position, (name, read) in enumerate(_members(self._source, unit.shard, self._reads)):
                if position >= start and is_left(position):
                    data = self._reads(name, read)
                    yield Sample(number, unit.shard, position, name, data)
                    if isinstance(data, StuckError):
                        raise data  # The shard cannot be read on beside it.
        except HungError:
            raise
        except Exception as error:
            # Whatever a broken shard makes its reader raise ends that shard alone.
            name = _broken(self._source, unit.shard, position + 1)
            yield Sample(number, unit.shard, max(position + 1, start), name, error, ends_shard=True)


def _counts(block: list[Sample]) -> tuple[int, ...]:
    """`Cursor.counts` of the samples of a block."""
    counts = [0] * (block[-1].unit + 1 - block[0].unit)
    for unit, samples in groupby(block, lambda sample: sample.unit):
        *_, last = samples = list(samples)
        counts[unit - block[0].unit] = ~(len(samples) - 1) if last.ends_shard else len(samples)
    return tuple(counts)


def _members(source: ShardedSource, shard: int, reads: Callable) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """What `source.shard(shard)` yields; to find the next is a read too."""
    members = source.shard(shard)
    while (member := reads(source.shard_name(shard), next, members, None)) is not None:
        if isinstance(member, Exception):
            raise member
        yield member


def _broken(source: ShardedSource, shard: int, n_images: int) -> str:
    """A name for what is lost of a shard."""
    return f"{source.shard_name(shard)} after {n_images} images" if n_images else source.shard_name(shard)


def in_order(
    source: IndexedSource | ShardedSource, start: int = 0, reads: Callable = at_once
) -> Iterator[tuple[str, bytes | ndarray | Exception]]:
    """Name and `Sample.data` of every image of the source once; an indexed source from `start` on and round to it."""
    if isinstance(source, IndexedSource):
        for index in chain(range(start, len(source)), range(start)):
            yield source.name(index), reads(source.name(index), source.read, index)
        return
    for shard in range(source.n_shards):
        n_images = 0
        try:
            for name, read in _members(source, shard, reads):
                data = reads(name, read)
                yield name, data
                n_images += 1
                if isinstance(data, StuckError):
                    raise data
        except HungError:
            raise
        except Exception as error:
            yield _broken(source, shard, n_images), error
