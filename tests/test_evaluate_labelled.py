import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from images import encoded, gradient
from PIL import Image

from capi.data.listing import SourceError
from capi.evaluate.labelled import Masks, open_labelled

os.environ["HF_HUB_OFFLINE"] = "1"
PICTURE = encoded(gradient(12, 10))


def write(path: Path, data: bytes = PICTURE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def mask(values: list[list[int]], mode: str = "L") -> bytes:
    image = Image.fromarray(np.array(values, dtype=np.uint8))
    if mode == "P":
        image.putpalette([value % 251 for value in range(768)])
    return encoded(image)


def labels_of(source) -> list[str | None]:
    return [item.label for item in source.items()]


def test_the_class_is_the_first_folder(tmp_path):
    for name in ("cat/a.png", "dog/deep/deeper/b.jpg", "dog/c.png", "owl/notes.txt"):
        write(tmp_path / name)
    source = open_labelled(f"folder:{tmp_path}", "train")
    assert source.masks is None
    assert [(Path(item.name).name, item.label) for item in source.items()] == [
        ("a.png", "cat"),
        ("c.png", "dog"),
        ("b.jpg", "dog"),
    ]
    assert next(source.items()).read() == PICTURE
    write(tmp_path / "stray.png")
    with pytest.raises(SourceError, match=r"expected images in sub-folders, one a class, found .*stray\.png$"):
        labels_of(open_labelled(f"folder:{tmp_path}", "train"))


def test_places_that_hold_no_labelled_images(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, message in (
        (f"folder:{tmp_path / 'none'}", "expected a folder, got no such path"),
        (f"folder:{tmp_path / 'empty'}", "found none at any depth"),
        ("folder:", "must be folder:PATH, hf:NAME or wds:PATTERN, got folder:"),
        ("photos", "must be folder:PATH, hf:NAME or wds:PATTERN, got photos"),
        ("synthetic", "must be folder:PATH, hf:NAME or wds:PATTERN, got synthetic"),
        (f"wds:{tmp_path}/*.tar", "found no file"),
        (f"hf:{tmp_path / 'none'}", "cannot be loaded: "),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            open_labelled(source, "train")
        assert "\n" not in str(raised.value)


def test_images_and_masks_of_the_same_names(tmp_path):
    write(tmp_path / "images" / "deep" / "a.jpg")
    write(tmp_path / "images" / "b.png")
    write(tmp_path / "masks" / "deep" / "a.png", mask([[0, 7], [255, 9]]))
    write(tmp_path / "masks" / "b.png", mask([[1, 1], [1, 1]], "P"))
    write(tmp_path / "masks" / "more.png", mask([[1]]))
    source = open_labelled(f"folder:{tmp_path}", "test", ignored=(255, 9))
    assert len(source) == 2
    found = {Path(item.name).name: source.masks.labels(item.label(), 2).tolist() for item in source.items()}
    assert found == {"a.jpg": [[0, 7], [-1, -1]], "b.png": [[1, 1], [1, 1]]}
    before = source.fingerprint
    write(tmp_path / "masks" / "b.png", mask([[1, 1, 0], [1, 1, 1]], "P"))
    assert open_labelled(f"folder:{tmp_path}", "test").fingerprint != before
    write(tmp_path / "images" / "lonely.png")
    with pytest.raises(SourceError, match=rf"found no lonely in {tmp_path / 'masks'} \(1 of 3 are missing\)"):
        open_labelled(f"folder:{tmp_path}", "test")


@pytest.mark.parametrize("above", ["", "ADEChallengeData2016"])
def test_ade20k_as_it_is_distributed(tmp_path, above):
    root = tmp_path / above
    for part in ("training", "validation"):
        write(root / "images" / part / f"{part}.jpg")
        write(root / "annotations" / part / f"{part}.png", mask([[0, 1], [150, 2]]))
    rows = ["1\t0.1\t1\t1\t\twall", "2\t0.1\t1\t1\t\tscreen, silver screen", "3\t0.1\t1\t1\t\tscreen, CRT screen"]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\t\tName", *rows]))
    for part, expected in (("train", "training"), ("test", "validation")):
        source = open_labelled(f"folder:{tmp_path}", part)
        (item,) = source.items()
        assert Path(item.name).stem == expected
        assert source.masks.labels(item.label(), 2).tolist() == [[-1, 0], [149, 1]]
        assert source.masks.names == ("wall", "screen, silver screen", "screen, CRT screen")


@pytest.mark.parametrize("above", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_as_it_is_distributed(tmp_path, above):
    root = tmp_path / above
    for name in ("a", "b", "unlabelled"):
        write(root / "JPEGImages" / f"{name}.jpg")
    for name in ("a", "b"):
        write(root / "SegmentationClass" / f"{name}.png", mask([[0, 255], [20, 1]], "P"))
    for part, name in (("train", "a"), ("val", "b")):
        write(root / "ImageSets" / "Segmentation" / f"{part}.txt", f"{name}\n".encode())
    for part, name in (("train", "a"), ("test", "b")):
        source = open_labelled(f"folder:{tmp_path}", part)
        (item,) = source.items()
        assert Path(item.name).stem == name
        assert source.masks.labels(item.label(), 2).tolist() == [[0, -1], [20, 1]]
        assert len(source.masks.names) == 21
        assert source.masks.names[15] == "person"


@pytest.mark.parametrize("mode", ["P", "L", "1", "I;16"])
def test_masks_of_all_kinds_with_one_channel(mode):
    values = np.array([[0, 1], [1, 0]])
    kinds = {"P": np.uint8, "L": np.uint8, "1": bool, "I;16": np.uint16}
    image = Image.fromarray(values.astype(kinds[mode]))
    if mode == "P":
        image.putpalette([9, 9, 9, 200, 0, 0])
    assert Image.open(io.BytesIO(encoded(image))).mode == mode
    assert np.array_equal(Masks().labels(encoded(image), 2), values)


def test_pictures_that_are_no_masks():
    with pytest.raises(ValueError, match=r"must have one channel of classes \(grey or palette\), got mode RGB"):
        Masks().labels(PICTURE, 2)
    far = encoded(Image.fromarray(np.full((2, 2), 40_000, dtype=np.uint16)))
    with pytest.raises(ValueError, match="classes of a mask must be below 32768, got 40000"):
        Masks().labels(far, 2)


def test_a_mask_keeps_its_classes_when_it_is_made_smaller():
    values = np.repeat(np.repeat(np.array([[0, 200], [100, 3]]), 8, axis=0), 8, axis=1)
    assert np.array_equal(np.unique(Masks().labels(mask(values), 6)), [0, 3, 100, 200])


def tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_shards_with_cls(tmp_path):
    first = {"x/a.png": PICTURE, "x/a.cls": b"3\n", "x/b.cls": b"12", "x/b.JPG": PICTURE, "x/b.json": b"{}"}
    tar(tmp_path / "0.tar", first)
    tar(tmp_path / "1.tar", {"c.png": PICTURE, "d.cls": b"1"})
    source = open_labelled(f"wds:{tmp_path}/{{0..1}}.tar", "train")
    assert [(item.name.rpartition("/")[2], item.label) for item in source.items()] == [
        ("a", "3"),
        ("b", "12"),
        ("1.tar:c", None),
    ]
    assert next(source.items()).read() == PICTURE
    assert source.masks is None
    (tmp_path / "1.tar").write_bytes(b"<html>")
    with pytest.raises(SourceError, match=r"1\.tar cannot be read: ReadError"):
        labels_of(source)


@pytest.fixture
def hub(tmp_path):
    datasets = pytest.importorskip("datasets")

    def make(split: str, feature: object, values: list, column: str = "label") -> str:
        features = datasets.Features({"image": datasets.Image(), column: feature})
        images = [{"bytes": PICTURE, "path": None} for _ in values]
        rows = datasets.Dataset.from_dict({"image": images, column: values}, features=features)
        (tmp_path / "hub").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "hub" / f"{split}-00000.parquet")
        return f"hf:{tmp_path / 'hub'}"

    return make


def test_columns_of_classes_of_their_names_and_of_numbers(hub):
    import datasets

    for feature, values, expected in (
        (datasets.ClassLabel(names=["cat", "dog"]), [1, 0, -1], ["dog", "cat", None]),
        (datasets.Value("string"), ["owl", None, "cat"], ["owl", None, "cat"]),
        (datasets.Value("int64"), [3, 12, 3], ["3", "12", "3"]),
    ):
        source = open_labelled(hub("train", feature, values), "train")
        assert labels_of(source) == expected
        assert next(source.items()).read() == PICTURE
        assert source.masks is None


def test_a_column_of_masks(hub):
    import datasets

    place = hub("train", datasets.Image(), [{"bytes": mask([[0, 2], [255, 1]]), "path": None}], "annotation")
    source = open_labelled(place, "train")
    (item,) = source.items()
    assert source.masks.labels(item.label(), 2).tolist() == [[0, 2], [-1, 1]]


def test_the_split_and_the_columns_are_found_or_named(hub):
    import datasets

    kind = datasets.Value("int64")
    place = hub("train", kind, [0])
    assert labels_of(open_labelled(place, "test")) == ["0"]  # There is no other.
    hub("test", kind, [1])
    assert labels_of(open_labelled(place, "test")) == ["1"]
    hub("validation", kind, [2])
    test = open_labelled(place, "test")
    assert labels_of(test) == ["2"]
    assert test.fingerprint != open_labelled(place, "train").fingerprint
    assert labels_of(open_labelled(place, "test", split="test")) == ["1"]
    for options, message in (
        ({"split": "other"}, "cannot be loaded: "),
        ({"label_key": "species"}, r"expected --label_key to name one of the columns \['image', 'label'\]"),
        ({"image_key": "jpg"}, r"expected --image_key to name one of the columns \['image', 'label'\]"),
    ):
        with pytest.raises(SourceError, match=message):
            open_labelled(place, "test", **options)
