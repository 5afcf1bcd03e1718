"""However ranks, loader processes and micro-batches change on the way, each epoch shows every readable image once."""

import io
import json
import logging
import random
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import chain, count
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from images import encoded
from PIL import Image
from tiny_runs import tiniest

from capi.checkpoint import load_newest_checkpoint
from capi.config import Config
from capi.data import ImageStream, stream
from capi.data.permutation import Permutation
from capi.data.retry import attempt
from capi.data.shards import TarShards
from capi.data.sources import IndexedSource, ShardedSource, ShardReader, SyntheticImages
from capi.data.taken import Cursor, Progress, Taken
from capi.distributed import World
from capi.resume import _open_stream
from capi.seeding import Purpose, generator
from capi.train import main

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # More processes than cores, on purpose.

SIZE = 8
IMAGE = encoded(Image.new("RGB", (SIZE, SIZE)))
Key = tuple[int, int, int]


class Layout(NamedTuple):
    """How a run is spread out; `micro` is the number of micro-batches that a rank makes of its share of a step."""

    ranks: int
    workers: int
    micro: int = 1
    images: int = 2
    """Of a micro-batch."""
    buffer: int = 8
    seed: int = 0

    @property
    def config(self) -> Config:
        config = Config()
        config.model.patch_size, config.masking.prediction_subsampling = 4, 0.5
        config.optim.batch_size = self.ranks * self.micro * self.images
        config.run.device, config.run.micro_batch_size, config.run.seed = "cpu", self.images, self.seed
        config.data.source, config.data.image_size, config.data.num_workers = "wds:shards", SIZE, self.workers
        config.data.shuffle_buffer = self.buffer
        return config


class Shards(TarShards):
    """Shards of so many images, in memory; of a negative number, ~n: n images, and then a break."""

    def __init__(self, sizes: list[int], unreadable: set[tuple[int, int]] = frozenset()) -> None:
        self.source, self.sizes, self.unreadable = "wds:shards", sizes, unreadable
        self.fingerprint = f"{sizes}"

    @property
    def n_shards(self) -> int:
        return len(self.sizes)

    def shard_name(self, index: int) -> str:
        return f"shard {index}"

    def shard(self, index: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
        size = self.sizes[index]
        for position in range(size if size >= 0 else ~size):
            yield f"{index}:{position}", partial(self.read, index, position)
        if size < 0:
            raise OSError("broken")

    def read(self, index: int, position: int) -> bytes:
        if (index, position) in self.unreadable:
            raise ValueError("no image")
        return IMAGE

    @property
    def readable(self) -> set[tuple[int, int]]:
        sizes = [size if size >= 0 else ~size for size in self.sizes]
        return {(shard, i) for shard, size in enumerate(sizes) for i in range(size)} - self.unreadable


def loaded_here(dataset, *, num_workers: int, prefetch_factor: int, **_) -> Iterator:
    """As loader processes make them, each some items ahead, in this process."""
    workers = [SimpleNamespace(id=worker, num_workers=num_workers) for worker in range(num_workers)] or [None]
    makers, made = [iter(dataset) for _ in workers], [deque() for _ in workers]
    for turn in count():
        for worker, maker, items in zip(workers, makers, made, strict=True):
            stream.get_worker_info = lambda worker=worker: worker
            while len(items) < prefetch_factor:
                items.append(next(maker))
        yield made[turn % len(made)].popleft()


class AtOnce:
    def __init__(self, *_) -> None:
        pass

    def __call__(self, _: str, read: Callable, *args) -> object:
        return attempt(read, *args)

    def close(self) -> None:
        pass


def key_as_pixels(_, key: Key, name: str, data: bytes | Exception) -> np.ndarray | None:
    return None if isinstance(data, Exception) else np.full((SIZE, SIZE, 3), (*key, 0)[:3], dtype=np.uint8)


@pytest.fixture
def shown_keys(monkeypatch) -> None:
    """Images show the key of their sample."""
    monkeypatch.setattr("capi.data.stream._Batches._pixels", key_as_pixels)


@pytest.fixture
def in_process(monkeypatch, shown_keys) -> None:
    monkeypatch.setattr(stream, "loaded", loaded_here)
    monkeypatch.setattr(stream, "get_worker_info", lambda: None)
    monkeypatch.setattr(stream, "Reads", AtOnce)
    monkeypatch.setattr(stream, "share", lambda _: None)


def least_epoch(states: list[dict]) -> int:
    return min(cursor[0] for state in states for cursor in state["cursors"])


def go_on(
    monkeypatch,
    source: IndexedSource | ShardedSource,
    layout: Layout,
    states: list[dict] | None,
    *,
    n_steps: int | None = None,
    n_epochs: int = 0,
) -> tuple[list[list[Key]], list[dict]]:
    """The keys of each step's images, and where the streams are left: after so many steps, or when epochs are over."""
    monkeypatch.setattr(stream, "open_source", lambda _: source)
    streams = [ImageStream(layout.config, rank=r, world_size=layout.ranks, states=states) for r in range(layout.ranks)]
    batches, shown, states = list(map(iter, streams)), [], [s.state_dict() for s in streams]
    while len(shown) < n_steps if n_steps is not None else least_epoch(states) < n_epochs:
        step = [next(of_rank) for of_rank in batches for _ in range(layout.micro)]
        shown.append([tuple(image[:, 0, 0].tolist()) for batch in step for image in batch.images])
        states = [s.state_dict() for s in streams]
    if layout.micro > 1:
        next(batches[0])  # Of a step that the run does not live to end.
        assert streams[0].state_dict() == states[0]
    for of_rank in batches:
        of_rank.close()
    return shown, json.loads(json.dumps(states))


def assert_each_once(shown: list[Key], source: Shards, n_epochs: int) -> None:
    """So often in every epoch that is over, and no more than that in the others."""
    assert max(Counter(shown).values()) == 1
    for epoch in range(n_epochs):
        assert {key[1:] for key in shown if key[0] == epoch} == source.readable, epoch
    assert {key[1:] for key in shown} <= source.readable


SOURCES = {
    "uneven": Shards([9, 1, 4, 17, 3, 6, 2, 11, 5, 8]),
    "fewer than readers": Shards([23, 14]),
    "one": Shards([40]),
    "empty and broken": Shards([7, 0, ~6, 12, ~0, 5, 0, 9], {(0, 0), (3, 5), (3, 6), (5, 4), (2, 5)}),
    "all sizes one": Shards([1] * 30, {(4, 0)}),
}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("draw", range(12))
@pytest.mark.parametrize("name", SOURCES)
def test_every_epoch_shows_each_image_once_whatever_changes(name: str, draw: int, monkeypatch, caplog) -> None:
    rng, source = random.Random(f"{name} {draw}"), SOURCES[name]
    caplog.set_level(logging.ERROR)
    shown, states, n_images = [], None, 0
    for _ in range(rng.randint(1, 3)):
        layout = Layout(
            ranks=rng.randint(1, 4),
            workers=rng.randint(0, 3),
            micro=rng.randint(1, 3),
            images=rng.randint(1, 3),
            buffer=rng.choice([1, 6, 20, 100]),
            seed=rng.randint(0, 1),
        )
        # Two stops or so an epoch.
        n_steps = rng.randint(1, 2 + len(source.readable) // (2 * layout.config.optim.batch_size))
        part, states = go_on(monkeypatch, source, layout, states, n_steps=n_steps)
        shown += chain.from_iterable(part)
        n_images += n_steps * layout.config.optim.batch_size
        assert {state["samples"] for state in states} == {n_images}
    last = 1 + max(cursor[0] for state in states for cursor in state["cursors"])
    layout = Layout(ranks=rng.randint(1, 4), workers=rng.randint(0, 3))
    part, _ = go_on(monkeypatch, source, layout, states, n_epochs=last + 1)
    assert_each_once([*shown, *chain.from_iterable(part)], source, last + 1)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("changing", [False, True])
@pytest.mark.parametrize("draw", range(6))
def test_shards_that_break_and_mend_between_show_no_image_twice(draw: int, changing: bool, monkeypatch, caplog) -> None:
    rng, shown, states = random.Random(draw), [], None
    caplog.set_level(logging.ERROR)
    layout = Layout(2, 2, 2, 1, buffer=12)
    for _ in range(8):
        source = Shards([~rng.randrange(n) if rng.random() < 0.4 else n for n in SOURCES["uneven"].sizes])
        source.fingerprint = "the same"
        if changing:
            layout = Layout(rng.randint(1, 3), rng.randint(0, 3), 2, 1, buffer=rng.choice([4, 12]))
        part, states = go_on(monkeypatch, source, layout, states, n_steps=rng.randint(1, 4))
        shown += chain.from_iterable(part)
    assert max(Counter(shown).values()) == 1


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("name", SOURCES)
def test_equal_readers_go_on_bit_for_bit(name: str, monkeypatch) -> None:
    """At the start of a run, and in an epoch that other readers began."""
    source, before = SOURCES[name], None
    for layout in (Layout(2, 2, 3, 1), Layout(3, 1, 2, 1, buffer=5)):
        whole, after = go_on(monkeypatch, source, layout, before, n_steps=6)
        pieces, states = [], before
        for n_steps in (1, 3, 2):
            part, states = go_on(monkeypatch, source, layout, states, n_steps=n_steps)
            pieces += part
        assert pieces == whole
        assert states == after
        before = after
    assert any(state["taken"] for state in states)


@pytest.mark.usefixtures("shown_keys")
def test_loader_processes_share_what_others_left(monkeypatch) -> None:
    source, shown, states = SOURCES["uneven"], [], None
    for layout in (Layout(2, 2), Layout(1, 3, 2), Layout(3, 1)):
        part, states = go_on(monkeypatch, source, layout, states, n_steps=3)
        shown += chain.from_iterable(part)
    part, _ = go_on(monkeypatch, source, Layout(1, 2, 1, 4), states, n_epochs=1)
    assert_each_once([*shown, *chain.from_iterable(part)], source, 1)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("draw", range(6))
@pytest.mark.parametrize("n_images", [5, 37, 64])
def test_folders_and_scenes_keep_their_order_whatever_changes(n_images: int, draw: int, monkeypatch) -> None:
    """Batches divide the number of images or do not; their size may change."""
    rng, source = random.Random(draw), SyntheticImages(n_images, SIZE, 0)
    shown, states = [], None
    for _ in range(4):
        layout = Layout(rng.randint(1, 4), rng.randint(0, 3), rng.randint(1, 3), rng.randint(1, 4))
        n_steps = rng.randint(1, 4)
        part, states = go_on(monkeypatch, source, layout, states, n_steps=n_steps)
        shown += chain.from_iterable(part)
    orders = [Permutation(generator(Purpose.ORDER, 0, epoch), n_images) for epoch in range(1 + len(shown) // n_images)]
    assert shown == [(i // n_images, orders[i // n_images][i % n_images], 0) for i in range(len(shown))]


def test_what_a_break_has_lost_is_no_sample() -> None:
    """Its place in the shard is not known to be gone; here none is left to be."""
    taken = {0: Taken([[0, 1, 4], [0, 3, 4]])}  # Together they are part 1 of 2, which this reader's share is.
    reader = ShardReader(Shards([~8]), seed=0, reader=0, n_readers=2, buffer=4, cursor=Cursor(0), taken=taken)
    sample = next(reader.rest_of_epoch())
    assert isinstance(sample.data, OSError)
    assert reader.cursor == Cursor(0, 0, 0, 8, 1, (~0,))
    progress = Progress(0, 2, 4, [reader.cursor, Cursor(0)], taken).shared_by(0, 1, 4, 1)
    assert progress.taken[0].state_dict()["units"] == [[0, 1, 4], [0, 3, 4]]


@pytest.mark.usefixtures("in_process")
def test_what_cannot_go_on_starts_its_epoch_again_with_a_warning(monkeypatch, caplog) -> None:
    source, layout = SOURCES["uneven"], Layout(2, 2, 2, 1)
    _, states = go_on(monkeypatch, source, layout, None, n_epochs=1)
    whole, _ = go_on(monkeypatch, source, layout, states, n_steps=3)
    older = [
        {
            "step": state["step"],
            "samples": state["samples"],
            "layout": {key: value for key, value in state["layout"].items() if key != "seed"},
            "cursors": {process: tuple(cursor[:5]) for process, cursor in enumerate(state["cursors"])},
        }
        for state in states
    ]
    assert not caplog.records
    part, _ = go_on(monkeypatch, source, layout, older, n_steps=3)
    assert part == whole
    assert not caplog.records
    changed = Shards([*source.sizes, 3])
    for name, saved, now, then in (
        ("an older version", older, source, Layout(1, 2)),
        ("a rank is missing", states[:1], source, layout),
        ("other shards", states, changed, layout),
    ):
        caplog.clear()
        part, after = go_on(monkeypatch, now, then, saved, n_steps=1)
        assert "so it cannot go on from there: epoch 1 restarts" in caplog.text, name
        assert {key[0] for key in part[0]} == {1}, name
        assert after[0]["step"] == states[0]["step"] + 1
        assert not after[0]["taken"]


@pytest.mark.usefixtures("in_process")
def test_the_rest_of_an_epoch_is_no_small_source(monkeypatch, caplog) -> None:
    source = Shards([2, 20])
    _, states = go_on(monkeypatch, source, Layout(2, 0, seed=1), None, n_steps=8)
    caplog.set_level(logging.INFO)
    _, (state,) = go_on(monkeypatch, source, Layout(1, 0, images=20, seed=1), states, n_steps=1)
    assert state["cursors"][0][0] == 2, "the rests of epochs 0 and 1 came in one step"
    assert "1 loader processes share what 2 have left of the epochs from 0 on" in caplog.text
    assert "fewer images" not in caplog.text


def test_the_state_of_many_readers_is_small() -> None:
    """8 ranks of 8 loader processes with 10,000 samples to shuffle among, in shards of 1000; others grow with them."""
    rng, n_readers, buffer = random.Random(0), 64, 1250
    counts = [(1000 - (start := rng.randrange(1000)), 250 + start) for _ in range(n_readers)]
    cursors = [Cursor(7, 0, 1, 1000 - n[0], rng.randrange(1250), n) for n in counts]
    progress = Progress(0, n_readers, buffer, cursors, {}).shared_by(0, 32, buffer, 512)
    taken = json.dumps({epoch: taken.state_dict() for epoch, taken in progress.taken.items()})
    assert len(taken) < 500 * n_readers
    assert len(json.dumps(cursors)) < 50 * n_readers


@pytest.mark.usefixtures("in_process")
def test_a_checkpoint_of_other_positions_or_of_an_older_version(monkeypatch, caplog) -> None:
    config, source = Layout(1, 2, 2).config, SOURCES["uneven"]
    _, (state,) = go_on(monkeypatch, source, Layout(1, 2, 2), None, n_steps=3)
    saved = {"step": 3, "streams": [state], "config": json.loads(json.dumps(asdict(config))), "data_fingerprint": "1"}
    world = World(0, 1, torch.device("cpu"))
    assert _open_stream(config, world, saved).state_dict() == state
    assert not caplog.records
    config.data.image_key = "png"
    assert _open_stream(config, world, saved).state_dict()["cursors"] == [[0, 0, 0, 0, 0, []]] * 2
    assert "epoch 0 restarts" in caplog.text
    # It counted steps, of the batch size that it was left with.
    del state["samples"]
    config.optim.batch_size = 8
    monkeypatch.setattr(stream, "open_source", lambda _: SyntheticImages(5, SIZE, 0))
    assert _open_stream(config, world, saved).state_dict()["samples"] == 3 * 4


def test_a_run_goes_on_with_other_processes_and_another_batch_size(tmp_path, caplog) -> None:
    pytest.importorskip("braceexpand")
    caplog.set_level(logging.INFO)
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(7):
                info = tarfile.TarInfo(f"{i}.png")
                info.size = len(IMAGE)
                tar.addfile(info, io.BytesIO(IMAGE))
    arguments = [*tiniest(tmp_path), "--data.source", f"wds:{tmp_path}/*.tar", "--optim.steps", "5"]
    allowed = ["--run.allow_changes", "[optim]"]
    assert main([*arguments, "--optim.steps", "1"]) == 0
    assert main([*arguments, *allowed, "--data.num_workers", "2", "--optim.batch_size", "4"]) == 0
    assert "2 loader processes share what 1 have left of the epochs from 0 on" in caplog.text
    (state,) = load_newest_checkpoint(tmp_path / "run")["streams"]
    assert state["samples"] == 8 + 4 * 4
