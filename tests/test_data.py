"""Real files in, exact pixels out: decoding, order, sharing among ranks and processes, resuming, broken input."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import fields
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from images import PHOTOGRAPH, encoded, gradient
from PIL import Image
from torch import Tensor

from capi.config import Config
from capi.data import Batch, ImageStream, evaluation_images
from capi.data.crops import crop, random_box
from capi.data.permutation import Permutation
from capi.data.sources import Cursor, ShardReader, SourceError, open_source
from capi.data.synthetic import SyntheticScenes
from capi.masking import Masks, sample_masks
from capi.seeding import Purpose, generator

os.environ["HF_HUB_OFFLINE"] = "1"

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # More processes than cores, on purpose.

SIZE = 8


def make_config(
    source: str, *, batch_size: int = 6, micro_batch_size: int | None = None, seed: int = 0, **data
) -> Config:
    config = Config()
    config.model.patch_size = 2
    config.masking.prediction_subsampling = 0.5
    config.optim.batch_size = batch_size
    config.run.seed, config.run.device, config.run.micro_batch_size = seed, "cpu", micro_batch_size
    config.data.source, config.data.image_size, config.data.num_workers = source, SIZE, 0
    config.data.image_key = "png" if source.startswith("wds:") else "image"
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


def numbered(number: int) -> bytes:
    """A PNG of one colour, which tells its number after any crop."""
    return encoded(Image.new("RGB", (12, 10), (number, 255 - number, 7 * number % 256)))


def numbers(batch: Batch) -> list[int]:
    assert torch.equal(batch.images, batch.images[:, :, :1, :1].expand_as(batch.images))
    assert torch.equal(batch.images[:, 1], 255 - batch.images[:, 0])
    return batch.images[:, 0, 0, 0].tolist()


def joined(lists: Iterable[list]) -> list:
    return list(chain.from_iterable(lists))


def take(config: Config, n: int, **options) -> list[Batch]:
    return list(islice(ImageStream(config, **options), n))


def mask_tensors(batch: Batch) -> list[Tensor]:
    values = [getattr(batch.masks, field.name) for field in fields(batch.masks)]
    return [value if isinstance(value, Tensor) else torch.tensor(value) for value in values]


def assert_equal(actual: list[Batch], expected: list[Batch]) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.images, e.images)
        assert all(map(torch.equal, mask_tensors(a), mask_tensors(e)))


def joined_batches(batches: list[Batch]) -> Batch:
    """One batch of the images and masks of several."""
    n_tokens, offset, visible, predicted = (SIZE // 2) ** 2, 0, [], []
    for batch in batches:
        visible.append(batch.masks.visible_indices + offset)
        predicted.append(batch.masks.predict_indices + offset)
        offset += len(batch.images) * n_tokens
    masks = Masks(
        torch.cat(visible),
        torch.cat(predicted),
        sum((batch.masks.visible_counts for batch in batches), ()),
        sum((batch.masks.predict_counts for batch in batches), ()),
    )
    return Batch(torch.cat([b.images for b in batches]), masks, joined(b.skipped for b in batches))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(20):
        path = tmp_path / "images" / f"class{number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(numbered(number))
    return tmp_path / "images"


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_shards(root: Path, n_shards: int, n_images: int) -> None:
    for shard in range(n_shards):
        members = {}
        for i in range(n_images):
            members[f"{i:03d}.json"] = json.dumps({"label": i}).encode()
            members[f"{i:03d}.png"] = numbered(shard * n_images + i)
        write_tar(root / f"{shard:03d}.tar", members)


@pytest.fixture(params=["wds", "hf parquet", "hf imagefolder"])
def streamed(request, tmp_path: Path) -> str:
    """A streamed source of images 0 to 23: 4 shards of 6, or one of 24."""
    root = tmp_path / "stream"
    root.mkdir()
    if request.param == "wds":
        write_shards(root, 4, 6)
        return f"wds:{root}/{{000..003}}.tar"
    if request.param == "hf imagefolder":
        for number in range(24):
            (root / f"{number:02d}.png").write_bytes(numbered(number))
        return f"hf:{root}"
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for shard in range(4):
        images = [{"bytes": numbered(6 * shard + i), "path": f"{i}.png"} for i in range(6)]
        table = pa.table({"image": images, "label": list(range(6))})
        pq.write_table(table, root / f"train-{shard}.parquet", row_group_size=4)
    return f"hf:{root}"


class TestFolder:
    def test_listing(self, tmp_path: Path):
        root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
        files = [
            "b/2.JPEG",
            "b/1.png",
            "a/deep/er/0.Webp",
            "z.jpg",
            "b/notes.txt",
            "b/.hidden.png",
            ".git/x.png",
            "png",
        ]
        for file in files:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(b"")
        elsewhere.mkdir()
        (elsewhere / "linked.tif").write_bytes(b"")
        (root / "c").symlink_to(elsewhere)
        (root / "a" / "loop").symlink_to(root)
        source = open_source(make_config(f"folder:{root}"))
        names = [str(Path(source.name(i)).relative_to(root)) for i in range(len(source))]
        assert names == ["a/deep/er/0.Webp", "b/1.png", "b/2.JPEG", "c/linked.tif", "z.jpg"]

    def test_names_in_any_encoding(self, tmp_path: Path):
        path = os.fsencode(tmp_path) + b"/caf\xe9 \xe2\x82\xac.png"
        Path(os.fsdecode(path)).write_bytes(numbered(3))
        (tmp_path / "a much longer name than the other.png").write_bytes(numbered(4))
        batch = take(make_config(f"folder:{tmp_path}"), 1)[0]
        assert set(numbers(batch)) == {3, 4}

    def test_each_epoch_shows_every_image_once_in_its_own_order(self, folder: Path):
        config = make_config(f"folder:{folder}", batch_size=5)
        shown = [number for batch in take(config, 8) for number in numbers(batch)]
        assert sorted(shown[:20]) == sorted(shown[20:]) == list(range(20))
        assert len({tuple(shown[:20]), tuple(shown[20:]), tuple(range(20))}) == 3
        other = make_config(f"folder:{folder}", batch_size=5, seed=1)
        assert numbers(take(other, 1)[0]) != shown[:5]

    def test_batch_larger_than_the_source(self, folder: Path):
        shown = numbers(take(make_config(f"folder:{folder}", batch_size=60), 1)[0])
        assert all(sorted(shown[i : i + 20]) == list(range(20)) for i in (0, 20, 40))

    @pytest.mark.parametrize(
        ("broken", "num_workers"),
        [("truncated.jpg", 0), ("truncated.png", 2), ("text.jpg", 0), ("empty.png", 0), ("dangling.png", 0)],
    )
    def test_unreadable_file_is_replaced_and_named_once(self, folder: Path, caplog, broken: str, num_workers: int):
        path = folder / "class1" / f"04-{broken}"  # Just before class1/04.png.
        photograph = Image.open(io.BytesIO(PHOTOGRAPH))
        if broken.startswith("dangling"):
            path.symlink_to(folder / "nowhere")
        else:
            contents = {
                "truncated.jpg": encoded(photograph, "JPEG")[:20000],
                "truncated.png": encoded(photograph)[:20000],
                "text.jpg": b"no image",
                "empty.png": b"",
            }
            path.write_bytes(contents[broken])
        stream = ImageStream(make_config(f"folder:{folder}", batch_size=7, num_workers=num_workers))
        batches = list(islice(stream, 6))
        shown = [numbers(batch) for batch in batches]
        for epoch in (joined(shown[:3]), joined(shown[3:])):
            assert sorted(epoch) == sorted([*range(20), 4])
        assert [batch.skipped for batch in batches].count([str(path)]) == 2
        assert sum(len(batch.skipped) for batch in batches) == 2
        assert stream.n_skipped == 1
        assert sum(str(path) in record.getMessage() for record in caplog.records) == 1

    def test_last_file_is_replaced_by_the_first(self, folder: Path):
        (folder / "zz.png").write_bytes(b"")
        shown = [n for batch in take(make_config(f"folder:{folder}", batch_size=7), 3) for n in numbers(batch)]
        assert sorted(shown) == sorted([*range(20), 0])

    def test_warnings_and_bombs_do_not_end_the_run(self, folder: Path, monkeypatch):
        # 12 x 10 pixels are above the limit of a warning; 30 x 30 above twice that, an error.
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        (folder / "bomb.png").write_bytes(encoded(Image.new("RGB", (30, 30))))
        batches = take(make_config(f"folder:{folder}", batch_size=7), 3)
        assert joined(batch.skipped for batch in batches) == [str(folder / "bomb.png")]
        assert set(joined(numbers(batch) for batch in batches)) == set(range(20))


class TestDeterminism:
    """The bits of a batch depend on the seed and the step alone."""

    @pytest.fixture
    def photographs(self, tmp_path: Path) -> str:
        image = Image.open(io.BytesIO(PHOTOGRAPH)).resize((60, 70))
        for i in range(13):
            (tmp_path / f"{i}.jpg").write_bytes(encoded(image.rotate(20 * i), "JPEG"))
        (tmp_path / "5.jpg").write_bytes(b"broken")
        return f"folder:{tmp_path}"

    @pytest.mark.parametrize("kind", ["folder", "synthetic"])
    def test_number_of_processes_and_ranks(self, photographs: str, kind: str):
        source = photographs if kind == "folder" else "synthetic"
        config = make_config(source, synthetic_size=13)
        expected = take(config, 7)
        for num_workers in (1, 3):
            assert_equal(take(make_config(source, synthetic_size=13, num_workers=num_workers), 7), expected)
        ranks = [take(config, 7, rank=rank, world_size=2) for rank in range(2)]
        assert_equal([joined_batches(list(parts)) for parts in zip(*ranks, strict=True)], expected)

    @pytest.mark.parametrize("mask_ratio", [0.65, (0.3, 0.8)])
    @pytest.mark.parametrize("kind", ["folder", "synthetic"])
    def test_micro_batches_make_the_same_step(self, photographs: str, kind: str, mask_ratio: float | tuple):
        source, data = photographs if kind == "folder" else "synthetic", {"synthetic_size": 13}
        whole = make_config(source, batch_size=24, **data)
        whole.masking.mask_ratio = mask_ratio
        expected = take(whole, 3)
        assert [len(batch.images) for batch in expected] == [24] * 3
        for micro, num_workers, world_size in ((4, 0, 1), (4, 3, 2), (3, 3, 2), (12, 1, 2), (100, 2, 2)):
            config = make_config(source, batch_size=24, micro_batch_size=micro, num_workers=num_workers, **data)
            config.masking.mask_ratio = mask_ratio
            n = 24 // world_size // min(micro, 24 // world_size)
            ranks = [take(config, 3 * n, rank=rank, world_size=world_size) for rank in range(world_size)]
            assert {len(batch.images) for batches in ranks for batch in batches} == {24 // world_size // n}
            steps = [joined(batches[step * n : (step + 1) * n] for batches in ranks) for step in range(3)]
            assert_equal([joined_batches(parts) for parts in steps], expected)

    @pytest.mark.parametrize("num_workers", [0, 3])
    def test_resume_with_other_micro_batches(self, photographs: str, num_workers: int):
        expected = take(make_config(photographs, batch_size=12), 5)
        stream = ImageStream(make_config(photographs, batch_size=12, micro_batch_size=4, num_workers=num_workers))
        assert stream.micro_batches_per_step == 3
        batches = iter(stream)
        assert_equal([joined_batches(list(islice(batches, 6)))], [joined_batches(expected[:2])])
        state = stream.state_dict()
        assert state["step"] == 2
        assert_equal(take(make_config(photographs, batch_size=12), 3, states=[state]), expected[2:])
        other = make_config(photographs, batch_size=12, micro_batch_size=2, num_workers=num_workers)
        assert_equal([joined_batches(take(other, 18, states=[state]))], [joined_batches(expected[2:])])
        # Within a step, the state is that of its beginning.
        list(islice(batches, 2))
        assert stream.state_dict() == state
        next(batches)
        assert stream.state_dict()["step"] == 3

    def test_crop_flip_and_mask_follow_from_seed_epoch_and_index(self, photographs: str):
        config = make_config(photographs, batch_size=13, seed=5)
        config.data.crop_scale = (0.2, 0.9)
        source = open_source(config)
        for epoch, batch in enumerate(take(config, 2)):
            permutation = Permutation(generator(Purpose.ORDER, 5, epoch), 13)
            order = [permutation[i] for i in range(13)]
            for image, index in zip(batch.images, order, strict=True):
                rng = generator(Purpose.CROP, 5, epoch, int(index))
                name = source.name(int(index))
                data = source.read(int(index) + 1) if name.endswith("5.jpg") else source.read(int(index))
                expected = crop(data, SIZE, lambda w, h, rng=rng: random_box(w, h, (0.2, 0.9), rng))
                expected = expected[:, ::-1] if rng.random() < 0.5 else expected
                assert np.array_equal(image.permute(1, 2, 0), expected)
            rngs = [generator(Purpose.MASK, 5, epoch, int(index)) for index in order]
            masks = sample_masks(config.masking, (SIZE // 2, SIZE // 2), rngs)
            assert torch.equal(batch.masks.visible_indices, masks.visible_indices)
            assert torch.equal(batch.masks.predict_indices, masks.predict_indices)

    def test_half_of_the_crops_are_flipped(self, tmp_path: Path):
        (tmp_path / "0.png").write_bytes(encoded(gradient(40, 40)))
        config = make_config(f"folder:{tmp_path}", batch_size=200)
        images = take(config, 1)[0].images[:, 0].int()
        flipped = int((images[:, :, 0] > images[:, :, -1]).all(1).sum())
        upright = int((images[:, :, 0] < images[:, :, -1]).all(1).sum())
        assert flipped + upright == 200
        assert abs(flipped - 100) < 4 * np.sqrt(50)
        images = take(make_config(f"folder:{tmp_path}", batch_size=200, hflip=False), 1)[0].images[:, 0].int()
        assert (images[:, :, 0] < images[:, :, -1]).all()

    @pytest.mark.parametrize("num_workers", [0, 3])
    def test_resume(self, photographs: str, num_workers: int):
        config = make_config(photographs, num_workers=num_workers)
        expected = take(config, 9)
        assert_equal(take(config, 5, start_step=4), expected[4:])
        stream = ImageStream(config)
        iterator = iter(stream)
        assert_equal(list(islice(iterator, 4)), expected[:4])
        state = pickle.loads(pickle.dumps(stream.state_dict()))
        assert_equal(take(config, 5, states=[state]), expected[4:])
        assert_equal([next(iterator)], expected[4:5])
        iterator.close()
        # A second loop over the same stream goes on as well.
        assert_equal(list(islice(stream, 2)), expected[5:7])

    def test_global_generators_are_left_alone(self, photographs: str):
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        for num_workers in (0, 1):
            take(make_config(photographs, num_workers=num_workers), 2)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


class TestSynthetic:
    def test_shows_the_scenes(self):
        config = make_config("synthetic", batch_size=10, synthetic_size=10, crop_scale=(1.0, 1.0), hflip=False, seed=3)
        scenes = SyntheticScenes(10, SIZE, 3)
        expected = {scenes.image(i).tobytes() for i in range(10)}
        for batch in take(config, 2):  # The second epoch comes from memory.
            full = [image.permute(1, 2, 0).numpy().tobytes() for image in batch.images]
            # Aspects other than 1 do not fit the full area, and ten tries may all miss it.
            assert set(full) == expected


class TestStreamed:
    def readers(self, source: str, n_readers: int, buffer: int = 5) -> list[ShardReader]:
        opened = open_source(make_config(source))
        options = {"seed": 0, "n_readers": n_readers, "buffer": buffer, "cursor": Cursor(0)}
        return [ShardReader(opened, reader=reader, **options) for reader in range(n_readers)]

    def number(self, data: bytes) -> int:
        return Image.open(io.BytesIO(data)).getpixel((0, 0))[0]

    @pytest.mark.parametrize("n_readers", [1, 2, 3, 4, 30])
    def test_readers_share_every_epoch(self, streamed: str, n_readers: int):
        readers = self.readers(streamed, n_readers)
        orders = []
        for epoch in range(2):
            shares = [[self.number(sample.data) for sample in reader.rest_of_epoch()] for reader in readers]
            orders.append(joined(shares))
            assert sorted(orders[-1]) == list(range(24))
            assert all(reader.cursor == Cursor(epoch + 1) for reader in readers)
            if n_readers in (2, 4):
                assert {len(share) for share in shares} == {24 // n_readers}
        assert orders[0] != orders[1]

    def test_shuffles_within_the_buffer(self, tmp_path: Path):
        write_shards(tmp_path, 1, 60)
        source = f"wds:{tmp_path}/*.tar"
        for buffer in (1, 10, 60, 1000):
            order = [self.number(s.data) for s in self.readers(source, 1, buffer)[0].rest_of_epoch()]
            assert sorted(order) == list(range(60))
            moved = np.abs(np.array(order) - np.arange(60)).max()
            assert moved < buffer
            # A random order of 60 leaves no sample 30 places from its own less than once in a million times.
            assert moved >= {1: 0, 10: 5}.get(buffer, 30)

    def test_processes_divide_the_buffer(self, tmp_path: Path):
        write_shards(tmp_path, 1, 12)
        config = make_config(f"wds:{tmp_path}/*.tar", num_workers=2, shuffle_buffer=2)
        assert sorted(numbers(batch) for batch in take(config, 2)) == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]

    @pytest.mark.parametrize(("n_readers", "buffer"), [(1, 1), (1, 4), (3, 4), (3, 100)])
    def test_reader_goes_on_from_any_cursor(self, streamed: str, n_readers: int, buffer: int):
        def walk(reader: ShardReader) -> list[tuple]:
            return [
                (epoch, sample.shard, sample.position, sample.data, reader.cursor)
                for epoch in range(reader.cursor.epoch, 2)
                for sample in reader.rest_of_epoch()
            ]

        for reader in self.readers(streamed, n_readers, buffer):
            whole = walk(reader)
            for i, (*_, cursor) in list(enumerate(whole))[::3]:
                reader.cursor = cursor
                assert walk(reader) == whole[i + 1 :]

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_ranks_and_processes_share_an_epoch(self, streamed: str, num_workers: int):
        config = make_config(streamed, batch_size=6, num_workers=num_workers, shuffle_buffer=4)
        shown = [numbers(batch) for rank in range(2) for batch in take(config, 4, rank=rank, world_size=2)]
        assert {len(batch) for batch in shown} == {3}
        assert sorted(joined(shown)) == list(range(24))

    @pytest.mark.parametrize("num_workers", [0, 3])
    def test_resume(self, streamed: str, num_workers: int):
        config = make_config(streamed, batch_size=10, num_workers=num_workers, shuffle_buffer=8)
        options = {"rank": 1, "world_size": 2}
        expected = take(config, 13, **options)
        streams = [ImageStream(config, rank=rank, world_size=2) for rank in range(2)]
        done = 0
        for stop in (1, 3, 10):
            # Each link of the chain resumes from the states of the one before.
            _, shown = (list(islice(stream, stop - done)) for stream in streams)
            assert_equal(shown, expected[done:stop])
            states = torch.load(_saved([stream.state_dict() for stream in streams]), weights_only=True)
            streams = [ImageStream(config, rank=rank, world_size=2, states=states) for rank in range(2)]
            done = stop
        assert_equal(list(islice(streams[1], 3)), expected[10:])

    @pytest.mark.parametrize("num_workers", [0, 3])
    def test_resume_with_micro_batches(self, streamed: str, num_workers: int):
        # Four micro-batches a step over three processes: a step never begins twice in a row with the same process.
        config = make_config(streamed, batch_size=4, micro_batch_size=1, num_workers=num_workers, shuffle_buffer=8)
        expected = take(config, 28)
        stream = ImageStream(config)
        assert_equal(list(islice(stream, 6)), expected[:6])
        state = stream.state_dict()
        assert state["step"] == 1
        assert_equal(take(config, 24, states=[state]), expected[4:])
        # The stream itself goes on in the middle of the step.
        assert_equal(list(islice(stream, 6)), expected[6:12])
        assert_equal(take(config, 16, states=[stream.state_dict()]), expected[12:])

    def test_micro_batches_are_dealt_to_the_processes_in_turn(self, tmp_path: Path):
        write_shards(tmp_path, 3, 6)
        config = make_config(f"wds:{tmp_path}/*.tar", batch_size=8, micro_batch_size=2, num_workers=3)
        shards = [{number // 6 for number in numbers(batch)} for batch in take(config, 9)]
        assert shards[:3] == shards[3:6] == shards[6:]
        assert sorted(joined(shards[:3])) == [0, 1, 2]

    def test_zero_and_one_process_are_alike(self, streamed: str):
        zero, one = (make_config(streamed, num_workers=n) for n in (0, 1))
        stream = ImageStream(zero)
        list(islice(stream, 2))
        assert_equal(take(one, 6)[2:], take(one, 4, states=[stream.state_dict()]))

    def test_one_process_goes_on_with_what_four_have_left(self, streamed: str):
        config = make_config(streamed, batch_size=4, num_workers=2, shuffle_buffer=8)
        streams = [ImageStream(config, rank=rank, world_size=2) for rank in range(2)]
        shown = [numbers(batch) for stream in streams for batch in islice(stream, 3)]
        states = [stream.state_dict() for stream in streams]
        config = make_config(streamed, batch_size=6, shuffle_buffer=5)
        stream = ImageStream(config, states=states)
        assert stream.state_dict()["samples"] == 12
        shown += [numbers(batch) for batch in islice(stream, 2)]
        assert sorted(joined(shown)) == list(range(24))

    def test_unknown_position_warns(self, tmp_path: Path, caplog):
        write_shards(tmp_path, 1, 6)
        ImageStream(make_config(f"wds:{tmp_path}/*.tar"), start_step=3)
        assert "no position of the stream is known at step 3" in caplog.text

    def test_few_shards_warn(self, tmp_path: Path, caplog):
        write_shards(tmp_path, 1, 6)
        ImageStream(make_config(f"wds:{tmp_path}/*.tar", num_workers=3))
        assert "has 1 shards for 3 loader processes" in caplog.text

    def test_share_may_be_empty(self, tmp_path: Path):
        write_shards(tmp_path, 1, 1)
        config = make_config(f"wds:{tmp_path}/*.tar", batch_size=2, num_workers=3)
        assert [numbers(batch) for batch in take(config, 6)] == [[0, 0]] * 6

    def test_crops_and_masks_do_not_depend_on_the_reader(self, tmp_path: Path):
        for shard in range(2):
            write_tar(tmp_path / f"{shard}.tar", {f"{i}.png": encoded(gradient(30, 20)) for i in range(4)})
        one = make_config(f"wds:{tmp_path}/*.tar", batch_size=8)
        two = make_config(f"wds:{tmp_path}/*.tar", batch_size=4, num_workers=2)
        expected = take(one, 1)[0]
        together = take(two, 2)
        crops = {image.numpy().tobytes() for image in expected.images}
        assert len(crops) == 8
        assert {image.numpy().tobytes() for batch in together for image in batch.images} == crops

    def test_broken_image_is_left_out_and_named_once(self, tmp_path: Path, caplog):
        write_tar(tmp_path / "0.tar", {f"{i}.png": numbered(i)[: 40 if i == 2 else None] for i in range(6)})
        stream = ImageStream(make_config(f"wds:{tmp_path}/*.tar", batch_size=5, num_workers=1))
        batches = list(islice(stream, 3))
        assert all(sorted(numbers(batch)) == [0, 1, 3, 4, 5] for batch in batches)
        name = f"{tmp_path}/0.tar:2.png"
        assert stream.n_skipped == 1
        assert sum(name in record.getMessage() for record in caplog.records) == 1
        assert joined(batch.skipped for batch in batches).count(name) in (2, 3)

    @pytest.mark.parametrize("kind", ["wds", "hf"])
    def test_broken_shard_ends_alone(self, tmp_path: Path, caplog, kind: str):
        if kind == "wds":
            write_shards(tmp_path, 3, 6)
            paths, source = sorted(tmp_path.glob("*.tar")), f"wds:{tmp_path}/*.tar"
        else:
            pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            paths, source = [tmp_path / f"train-{shard}.parquet" for shard in range(3)], f"hf:{tmp_path}"
            for shard, path in enumerate(paths):
                pq.write_table(pa.table({"image": [{"bytes": numbered(6 * shard + i)} for i in range(6)]}), path)
        data = paths[1].read_bytes()
        paths[1].write_bytes(data[: data.index(numbered(9)) + 20 if kind == "wds" else -20])
        shown = set(joined(numbers(batch) for batch in take(make_config(source, batch_size=12), 3)))
        assert {*range(6), *range(12, 18)} <= shown
        # Of a .tar what comes before the break is used, of a Parquet file, whose index is at its end, nothing.
        assert shown & set(range(6, 12)) == ({6, 7, 8} if kind == "wds" else set())
        assert (f"{paths[1]}:003.png" if kind == "wds" else f"{source} shard 1: ArrowInvalid") in caplog.text

    def test_tar_members(self, tmp_path: Path):
        image = numbered(9)
        members = {
            "a.jpg": numbered(1),  # The content decides how it is decoded.
            "sub.d/b.PNG": numbered(2),
            "a.seg.png": image,
            "._a.png": image,
            "a.json": b"{",
            "noextension": image,
        }
        write_tar(tmp_path / "0.tar", members)
        with tarfile.open(tmp_path / "1.tar.gz", "w:gz") as tar:
            info = tarfile.TarInfo("c.webp")
            info.size = len(numbered(3))
            tar.addfile(info, io.BytesIO(numbered(3)))
        pattern = f"wds:{tmp_path}/{{0.tar,1.tar.gz}}"
        assert sorted(numbers(take(make_config(pattern, image_key="auto", batch_size=3), 1)[0])) == [1, 2, 3]
        assert numbers(take(make_config(pattern, image_key="seg.png", batch_size=1), 1)[0]) == [9]

    def test_missing_rows_and_paths_elsewhere(self, tmp_path: Path):
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        (tmp_path / "x.png").write_bytes(numbered(5))
        rows = [{"bytes": None, "path": str(tmp_path / "x.png")}, None, {"bytes": numbered(6), "path": None}]
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        (tmp_path / "data").mkdir()
        pq.write_table(pa.table({"photo": pa.array(rows, kind)}), tmp_path / "data" / "train.parquet")
        stream = ImageStream(make_config(f"hf:{tmp_path / 'data'}", image_key="photo", batch_size=2))
        assert sorted(numbers(next(iter(stream)))) == [5, 6]


class TestErrors:
    @pytest.mark.parametrize("num_workers", [0, 1])
    @pytest.mark.parametrize("kind", ["folder", "wds"])
    def test_no_readable_image(self, tmp_path: Path, kind: str, num_workers: int):
        if kind == "folder":
            source = f"folder:{tmp_path}"
            for i in range(3):
                (tmp_path / f"{i}.png").write_bytes(b"broken")
        else:
            source = f"wds:{tmp_path}/0.tar"
            write_tar(tmp_path / "0.tar", {f"{i}.png": b"broken" for i in range(3)})
        config = make_config(source, num_workers=num_workers)
        with pytest.raises(SourceError, match="none readable among 3") as caught:
            take(config, 1)
        assert source in str(caught.value)
        assert "Traceback" not in str(caught.value)
        with pytest.raises(SourceError, match="none readable among 3"):
            evaluation_images(config, 2)

    def test_no_member_of_that_name(self, tmp_path: Path):
        write_shards(tmp_path, 2, 2)
        with pytest.raises(SourceError, match=r"none readable among 0 .*data.image_key"):
            take(make_config(f"wds:{tmp_path}/*.tar", image_key="jpg"), 1)

    def test_missing_or_empty(self, tmp_path: Path, folder: Path):
        cases = {
            f"folder:{tmp_path}/nowhere": "expected a folder, got no such path",
            f"folder:{folder}/class0/00.png": "expected a folder, got a file",
            f"folder:{tmp_path / 'empty'}": "expected images .* found none",
            f"wds:{tmp_path}/*.tar": "expected .tar shards, found no file",
            f"hf:{tmp_path}/nowhere": "cannot be loaded",
            f"hf:{tmp_path / 'empty'}": "cannot be loaded",
        }
        (tmp_path / "empty" / ".cache").mkdir(parents=True)
        (tmp_path / "empty" / ".cache" / "0.png").write_bytes(numbered(0))
        (tmp_path / "empty" / "readme.txt").write_text("nothing here")
        for source, message in cases.items():
            if source == f"hf:{tmp_path / 'empty'}":
                (tmp_path / "empty" / "readme.txt").unlink()
            with pytest.raises(SourceError, match=message) as caught:
                ImageStream(make_config(source))
            assert str(caught.value).startswith(source)

    def test_missing_shard_of_a_range(self, tmp_path: Path):
        write_shards(tmp_path, 2, 1)
        with pytest.raises(SourceError, match=r"found no file .*002\.tar"):
            ImageStream(make_config(f"wds:{tmp_path}/{{000..002}}.tar"))

    def test_wrong_column(self, tmp_path: Path):
        (tmp_path / "0.png").write_bytes(numbered(0))
        with pytest.raises(SourceError, match=r"data.image_key must be one of the columns \['image'\], got photo"):
            ImageStream(make_config(f"hf:{tmp_path}", image_key="photo"))

    @pytest.mark.parametrize("source", ["", "folder:", "s3:x", "synthetic:x", "Folder:/tmp"])
    def test_unknown_source(self, source: str):
        message = "data.source must be synthetic, folder:PATH, hf:NAME or wds:PATTERN, got "
        with pytest.raises(ValueError, match=message):
            ImageStream(make_config(source))

    @pytest.mark.parametrize(("source", "package"), [("hf:x", "datasets"), ("wds:x.tar", "braceexpand")])
    def test_missing_package(self, monkeypatch, source: str, package: str):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"{package}: pip install '\.\[data\]'"):
            ImageStream(make_config(source))

    def test_indivisible_batch(self):
        with pytest.raises(ValueError, match=r"optim\.batch_size must divide by the number of ranks, got 6 on 4"):
            ImageStream(make_config("synthetic"), world_size=4)

    @pytest.mark.parametrize("micro", [2, 0, -3])
    def test_indivisible_micro_batch(self, micro: int):
        with pytest.raises(ValueError, match=rf"run\.micro_batch_size must divide the 3 images of a rank, got {micro}"):
            ImageStream(make_config("synthetic", micro_batch_size=micro), world_size=2)


class TestEvaluationImages:
    def test_folder_is_sampled_evenly(self, folder: Path):
        config = make_config(f"folder:{folder}")
        images = evaluation_images(config, 4)
        assert images.shape == (4, 3, SIZE, SIZE)
        assert images.dtype == torch.uint8
        names = [open_source(config).name(i) for i in (0, 5, 10, 15)]
        assert images[:, 0, 0, 0].tolist() == [int(Path(name).stem) for name in names]
        assert (
            evaluation_images(config, 40)[::2, 0, 0, 0].tolist() == evaluation_images(config, 20)[:, 0, 0, 0].tolist()
        )

    def test_streamed_gives_the_first(self, streamed: str):
        images = evaluation_images(make_config(streamed), 30)
        assert images[:, 0, 0, 0].tolist() == [*range(24), *range(6)]

    def test_centre(self, tmp_path: Path):
        (tmp_path / "0.png").write_bytes(b"broken")
        (tmp_path / "1.png").write_bytes(encoded(gradient(40, 16)))
        image = evaluation_images(make_config(f"folder:{tmp_path}"), 1)[0]
        expected = gradient(40, 16).resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(12, 0, 28, 16))
        assert np.array_equal(image.permute(1, 2, 0), expected)


SIGNALLED = """
import signal, sys, time
from capi.config import Config
from capi.data import ImageStream
config = Config()
config.data.num_workers, config.optim.batch_size, config.run.device = 2, 4, "cpu"
config.data.source, config.data.image_size, config.data.synthetic_size = "synthetic", 28, 16
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append("SIGTERM"))
batches = iter(ImageStream(config))
next(batches), next(batches)  # One of each process.
print("ready", flush=True)
while not stopped:
    next(batches)
for _ in range(20):
    next(batches)
try:
    print("went on after", *stopped, flush=True)
    time.sleep(30)
except KeyboardInterrupt:
    sys.exit("interrupted")
"""


def test_signals_to_every_process_are_the_training_process_own():
    command = [sys.executable, "-W", "ignore", "-c", SIGNALLED]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, start_new_session=True, cwd=root, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == "went on after SIGTERM\n"
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert errors == "interrupted\n"
    assert process.returncode == 1


def _saved(state: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file
