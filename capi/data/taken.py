"""What readers of shards have taken of an epoch, so that other readers, however many, can share the rest of it."""

import base64
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import count, islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from capi.seeding import Purpose, generator


class Cursor(NamedTuple):
    """Where a reader stands: in `block` of `epoch`, which starts at (unit, position) and of which `taken` are gone."""

    epoch: int
    block: int = 0
    unit: int = 0
    position: int = 0
    taken: int = 0
    counts: tuple[int, ...] = ()
    """How many samples of the block each unit gave, from `unit` on; ~n of a unit that broke after n, which adds one."""


class Unit(NamedTuple):
    """What one reader reads of a shard: every `n_parts`-th sample from position `part` on."""

    shard: int
    part: int
    n_parts: int


class Taken:
    """The samples of one epoch that are gone: whole units of shards, and single samples by shard and position."""

    def __init__(self, units: Sequence[Sequence[int]] = (), flags: Mapping[str, str] | None = None) -> None:
        self._flags = {int(shard): text for shard, text in (flags or {}).items()}
        self._units: dict[int, set[tuple[int, int]]] = {}
        for unit in units:
            self.add(Unit(*unit))

    def state_dict(self) -> dict:
        """The arguments that make an equal one: lists, strings and integers, some ten bytes a shard.

        A shard of which single samples are gone takes a bit for each of its positions, compressed.
        """
        units = [[shard, part, n] for shard, parts in sorted(self._units.items()) for part, n in sorted(parts)]
        return {"units": units, "flags": {str(shard): text for shard, text in sorted(self._flags.items())}}

    def add(self, unit: Unit) -> None:
        parts = self._units.setdefault(unit.shard, set())
        parts.add((unit.part, unit.n_parts))
        if all((part, unit.n_parts) in parts for part in range(unit.n_parts)):
            self._units[unit.shard] = {(0, 1)}
            self._flags.pop(unit.shard, None)

    def add_samples(self, shard: int, positions: Int[ndarray, "samples"]) -> None:
        if len(positions):
            flags = _unpacked(self._flags.get(shard, ""))
            flags = np.pad(flags, (0, max(0, positions.max() + 1 - len(flags))))
            flags[positions] = True
            self._flags[shard] = _packed(flags)

    def holds(self, unit: Unit) -> bool:
        """Whether all of a unit is known to be gone."""
        parts = self._units.get(unit.shard, ())
        return any(unit.n_parts % n == 0 and unit.part % n == part for part, n in parts)

    def leaves(self, unit: Unit) -> Callable[[int], bool]:
        """Of a position of the unit's shard, whether the unit has it and it is not gone."""
        flags, parts = _unpacked(self._flags.get(unit.shard, "")), self._units.get(unit.shard, ())

        def is_left(position: int) -> bool:
            return (
                position % unit.n_parts == unit.part
                and not (position < len(flags) and flags[position])
                and not (parts and any(position % n == part for part, n in parts))
            )

        return is_left


def _packed(flags: Bool[ndarray, "positions"]) -> str:
    return base64.b64encode(zlib.compress(np.packbits(flags).tobytes())).decode()


def _unpacked(text: str) -> Bool[ndarray, "positions"]:
    data = zlib.decompress(base64.b64decode(text)) if text else b""
    return np.unpackbits(np.frombuffer(data, dtype=np.uint8)).view(bool)


class Progress(NamedTuple):
    """Where all readers of a source stand, and what was gone of these epochs before any of them began."""

    seed: int
    n_readers: int
    buffer: int
    """Samples that each reader shuffles among."""
    cursors: list[Cursor]
    """Of the readers in the order of their numbers, as far as they are known."""
    taken: dict[int, Taken]

    @classmethod
    def of(cls, states: Sequence[dict], seed: int) -> "Progress":
        """That of what the streams of all ranks saved, in the order of the ranks; `seed` of an older version's."""
        layout = states[0]["layout"]
        n_processes = layout["num_workers"]
        cursors = []
        for state in states:
            saved = state["cursors"]
            saved = saved.values() if isinstance(saved, dict) else saved  # As older versions have them.
            cursors += [Cursor(*cursor[:5], *map(tuple, cursor[5:])) for cursor in saved]
        taken = {int(epoch): Taken(**gone) for epoch, gone in states[0].get("taken", {}).items()}
        buffer = reader_buffer(layout["shuffle_buffer"], n_processes)
        return cls(layout.get("seed", seed), layout["world_size"] * n_processes, buffer, cursors, taken)

    def shared_by(self, seed: int, n_readers: int, buffer: int, n_shards: int) -> "Progress | None":
        """The start of other readers, whose samples are all that these have not taken; itself for equal readers.

        None where a reader's place is unknown, or is an older version's, which says too little for other readers.
        """
        if len(self.cursors) != self.n_readers:
            return None
        if (self.seed, self.n_readers, self.buffer) == (seed, n_readers, buffer):
            return self
        if not all(cursor.counts or cursor == Cursor(cursor.epoch) for cursor in self.cursors):
            return None
        first = min(cursor.epoch for cursor in self.cursors)
        last = max([*(cursor.epoch for cursor in self.cursors), *self.taken])
        taken = {epoch: self._taken_of(epoch, n_shards) for epoch in range(first, last + 1)}
        return Progress(seed, n_readers, buffer, [Cursor(first)] * n_readers, taken)

    def _taken_of(self, epoch: int, n_shards: int) -> Taken:
        before = self.taken.get(epoch, Taken())
        now, units = Taken(**before.state_dict()), units_of(self.seed, epoch, n_shards, self.n_readers, before)
        for reader, cursor in enumerate(self.cursors):
            share = units[reader :: self.n_readers]
            for unit in share if cursor.epoch > epoch else share[: cursor.unit] if cursor.epoch == epoch else ():
                now.add(unit)
            if cursor.epoch == epoch and cursor.counts:
                self._add_block(now, before, reader, share[cursor.unit :])
        return now

    def _add_block(self, now: Taken, before: Taken, reader: int, share: Sequence[Unit]) -> None:
        """Adds what a reader has taken of its block and, in the unit where that starts, before it."""
        cursor = self.cursors[reader]
        n_samples = list(map(abs, cursor.counts))
        order = shuffled(self.seed, cursor.epoch, reader, cursor.block, sum(n_samples))
        is_taken = np.zeros(len(order), dtype=bool)
        is_taken[order[: cursor.taken]] = True
        now.add_samples(share[0].shard, np.arange(share[0].part, cursor.position, share[0].n_parts))
        end = 0
        for i, (unit, n) in enumerate(zip(share, cursor.counts, strict=False)):
            start, end = end, end + n_samples[i]
            first = cursor.position if i == 0 else 0
            positions = islice(filter(before.leaves(unit), count(first)), n if n >= 0 else ~n)
            positions = np.fromiter(positions, dtype=np.int64)
            # Of a unit that broke the last sample stands for what is lost, and has no position.
            now.add_samples(unit.shard, positions[is_taken[start:end][: len(positions)]])
            if is_taken[start:end].all() and i + 1 < len(n_samples):
                now.add(unit)


def units_of(seed: int, epoch: int, n_shards: int, n_readers: int, taken: Taken) -> list[Unit]:
    """What is left of an epoch, in the order of that epoch; reader r reads units r, r + n_readers and so on.

    Where readers outnumber shards, several share a shard.
    """
    n_parts = -(-n_readers // n_shards)
    order = generator(Purpose.ORDER, seed, epoch).permutation(n_shards * n_parts)
    units = (Unit(*divmod(i, n_parts), n_parts) for i in order.tolist())
    return [unit for unit in units if not taken.holds(unit)]


def shuffled(seed: int, epoch: int, reader: int, block: int, n: int) -> ndarray:
    """The order in which a reader hands out the `n` samples of a block."""
    return generator(Purpose.SHUFFLE, seed, epoch, reader, block).permutation(n)


def reader_buffer(shuffle_buffer: int, n_processes: int) -> int:
    """Samples that each of the loader processes of a rank shuffles among."""
    return max(1, shuffle_buffer // n_processes)
