from pathlib import Path

import numpy as np
import pytest
import torch
from images import PHOTOGRAPH, encoded, gradient
from PIL import Image
from torch import nn

from capi.data.listing import SourceError
from capi.evaluate import features
from capi.evaluate.features import Wanted, cached_features, encoder_fingerprint, extract_labelled
from capi.evaluate.labelled import open_labelled
from capi.model import normalize_images

SIZE = 28


class Pixels(nn.Module):
    """The mean of an image as its global vector, and its patches of one pixel."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        maps = self.scale * images.permute(0, 2, 3, 1)
        return maps.mean((1, 2)) + 1, maps[:, 0], maps


@pytest.fixture
def folder(tmp_path) -> Path:
    for index, name in enumerate(("cat", "dog", "cat", "owl")):
        (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
        picture = gradient(60 + 8 * index, 50)
        (tmp_path / "set" / name / f"{index}.png").write_bytes(encoded(picture))
    return tmp_path / "set"


def wanted(**options) -> Wanted:
    return Wanted(SIZE, **options)


def test_features_are_those_of_the_middle_of_the_images_normalised(folder):
    source = open_labelled(f"folder:{folder}", "train")
    found = extract_labelled(Pixels(), source, wanted(patches=True))
    assert found.labels == ["cat", "cat", "dog", "owl"]
    assert found.unreadable == 0
    for place, (index, name) in enumerate([(0, "cat"), (2, "cat"), (1, "dog"), (3, "owl")]):
        with Image.open(folder / name / f"{index}.png") as image:
            shorter = 32  # 28 * 256 / 224
            size = (round(image.width * shorter / image.height), shorter)
            left, top = (size[0] - SIZE) // 2, (size[1] - SIZE) // 2
            resized = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + SIZE, top + SIZE))
        expected = normalize_images(torch.from_numpy(np.array(resized)).permute(2, 0, 1)).permute(1, 2, 0).flatten(0, 1)
        # Pillow resizes first and crops then: at an edge half a pixel of a gradient of two levels, and rounding.
        torch.testing.assert_close(found.patches[place, 0].float(), expected, rtol=0, atol=4 / 255 / 0.224)
        torch.testing.assert_close(
            found.patch_means[place, 0], found.patches[place, 0].float().mean(0), rtol=0, atol=1e-3
        )
        torch.testing.assert_close(found.global_reprs[place, 0], found.patch_means[place, 0] + 1)


def test_crops_are_drawn_by_the_place_of_an_image_alone(folder):
    source = open_labelled(f"folder:{folder}", "train")
    two, three = (extract_labelled(Pixels(), source, wanted(crops=n)).global_reprs for n in (2, 3))
    assert two.shape == (4, 3, 3)
    assert torch.equal(two, three[:, :3])
    assert len({tuple(view.tolist()) for view in three.flatten(0, 1)}) == 16


def test_half_of_the_crops_are_flipped(folder, tmp_path):
    """Red grows to the right: of a crop too, unless it is flipped."""
    source = open_labelled(f"folder:{folder}", "train")
    maps = extract_labelled(Pixels(), source, wanted(crops=50, patches=True)).patches.unflatten(2, (SIZE, SIZE))
    rising = maps[:, 1:, :, -1, 0].float().mean(2) > maps[:, 1:, :, 0, 0].float().mean(2)
    assert 0.4 < rising.float().mean() < 0.6
    assert (maps[:, 0, :, -1, 0] > maps[:, 0, :, 0, 0]).all()


def test_a_mask_is_stretched_as_its_image(tmp_path):
    half = np.zeros((20, 40), dtype=np.uint8)
    half[:, 20:] = 255
    half[10:, :20] = 3
    for name, picture in (("images", Image.fromarray(half).convert("RGB")), ("masks", Image.fromarray(half))):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "a.png")
    found = extract_labelled(Pixels(), open_labelled(f"folder:{tmp_path}", "train"), wanted(patches=True))
    labels = found.labels[0]
    assert labels.shape == (SIZE, SIZE)
    assert (labels[:, 14:] == -1).all()
    assert (labels[14:, :14] == 3).all()
    assert (labels[:14, :14] == 0).all()
    red = found.patches[0, 0, :, 0].view(SIZE, SIZE)
    assert (red[:, 16:] > 2).all()
    assert (red[:, :12] < 0).all()


def cached(encoder, folder, cache, **options):
    source = open_labelled(f"folder:{folder}", "train")
    return cached_features(encoder, source, wanted(**options), cache, encoder_fingerprint(encoder))


def test_features_are_computed_once(folder, tmp_path):
    encoder, cache = Pixels(), tmp_path / "cache"
    first = cached(encoder, folder, cache, crops=1, patches=True)
    fresh = extract_labelled(Pixels(), open_labelled(f"folder:{folder}", "train"), wanted(crops=1, patches=True))
    calls = encoder.calls
    again, without = (cached(encoder, folder, cache, crops=1, patches=p) for p in (True, False))
    assert encoder.calls == calls == 1
    for found in (first, again, without):
        assert found.labels == fresh.labels
        assert torch.equal(found.global_reprs, fresh.global_reprs)
        assert torch.equal(found.patches, fresh.patches)
    assert len(list(cache.iterdir())) == 1


def test_other_weights_images_or_views_are_computed_anew(folder, tmp_path):
    encoder, cache = Pixels(), tmp_path / "cache"
    cached(encoder, folder, cache)
    for options in ({"crops": 1}, {"patches": True}, {"limit": 2}):
        calls = encoder.calls
        cached(encoder, folder, cache, **options)
        assert encoder.calls == calls + 1
    for change in (
        lambda: encoder.scale.data.fill_(2.0),
        lambda: (folder / "owl" / "9.png").write_bytes(PHOTOGRAPH),
        lambda: (folder / "owl" / "9.png").rename(folder / "cat" / "9.png"),
    ):
        change()
        calls = encoder.calls
        found = cached(encoder, folder, cache)
        assert encoder.calls == calls + 1
        fresh = extract_labelled(encoder, open_labelled(f"folder:{folder}", "train"), wanted())
        assert torch.equal(found.global_reprs, fresh.global_reprs)
        assert found.labels == fresh.labels


def test_a_damaged_entry_is_made_anew(folder, tmp_path, caplog):
    encoder, cache = Pixels(), tmp_path / "cache"
    first = cached(encoder, folder, cache).global_reprs.clone()
    (entry,) = cache.iterdir()
    for damage in (
        lambda: (entry / "meta.json").write_text("{"),
        lambda: (entry / "global_reprs.bin").write_bytes(b""),
    ):
        damage()
        assert torch.equal(cached(encoder, folder, cache).global_reprs, first)
        assert "is made anew" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_stays_of_features_that_were_broken_off(folder, tmp_path, error, monkeypatch):
    monkeypatch.setattr(features, "_BATCH", 1)
    encoder, cache = Pixels(), tmp_path / "cache"

    def fail(images):
        if encoder.calls == 2:
            raise error
        return Pixels.forward(encoder, images)

    encoder.forward = fail
    with pytest.raises(error):
        cached(encoder, folder, cache)
    assert encoder.calls == 2
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("batch", [1, 128])
def test_unreadable_images_are_left_out_and_counted(folder, tmp_path, batch, caplog, monkeypatch):
    monkeypatch.setattr(features, "_BATCH", batch)
    (folder / "cat" / "9.jpg").write_bytes(b"no image")
    (folder / "owl" / "8.png").write_bytes(encoded(gradient(40, 40))[:100])
    source = open_labelled(f"folder:{folder}", "train")
    found = extract_labelled(Pixels(), source, wanted())
    assert found.labels == ["cat", "cat", "dog", "owl"]
    assert found.unreadable == 2
    assert cached(Pixels(), folder, tmp_path / "cache").unreadable == 2
    assert f"left out {folder / 'cat' / '9.jpg'}: UnidentifiedImageError" in caplog.text
    for path in folder.rglob("*.*"):
        path.write_bytes(b"no image")
    with pytest.raises(SourceError, match=r"expected readable images with labels, none of 6 has both; .*0\.png: Unid"):
        extract_labelled(Pixels(), source, wanted())


def test_a_limit_takes_images_from_everywhere(tmp_path):
    for index in range(20):
        path = tmp_path / "set" / f"{index // 5}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
    source = open_labelled(f"folder:{tmp_path / 'set'}", "train")
    for limit, expected in ((4, ["0", "1", "2", "3"]), (8, ["0", "0", "1", "1", "2", "2", "3", "3"])):
        assert extract_labelled(Pixels(), source, wanted(limit=limit)).labels == expected
    assert len(extract_labelled(Pixels(), source, wanted(limit=50))) == 20


def test_whoever_watches_can_end_it(folder):
    def watch():
        raise TimeoutError("over")

    with pytest.raises(TimeoutError, match="over"):
        extract_labelled(Pixels(), open_labelled(f"folder:{folder}", "train"), wanted(), watch)
