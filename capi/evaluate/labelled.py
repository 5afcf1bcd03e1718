"""Labelled images: classes by sub-folder, column or `cls`, and masks beside images, in a column or in known layouts."""

import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int16
from numpy import ndarray
from PIL import Image

from capi.data.folder import ImageFolder
from capi.data.listing import IMAGE_EXTENSIONS, SourceError, listing_fingerprint, open_image
from capi.data.retry import PersistentFile, reason
from capi.data.shards import HubShards, TarShards, hub_builder, member_bytes, stored_bytes

Part = Literal["train", "test"]
Read = Callable[[], bytes]

_LABEL_COLUMNS = ("label", "labels", "cls", "mask", "annotation", "segmentation_mask")
_SPLITS = {"train": ("train", "training"), "test": ("validation", "val", "test")}
_PARTS_OF_ADE = {"train": "training", "test": "validation"}
_PARTS_OF_VOC = {"train": "train", "test": "val"}
_VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class Item(NamedTuple):
    """An image, which `read` fetches, and the name of its class or what fetches its mask; None where it has none."""

    name: str
    read: Read
    label: str | Read | None


@dataclass(frozen=True)
class Masks:
    """How the pixels of a source's masks are read."""

    ignored: Sequence[int] = (255,)
    """Values of pixels that have no label."""
    first: int = 0
    """The value of class 0."""
    names: Sequence[str] = ()
    """Of the classes; where there are none, their numbers serve."""

    def labels(self, data: bytes, size: int) -> Int16[ndarray, "size size"]:
        """The classes of a mask's pixels, stretched to a square by nearest neighbours; -1 where there is none.

        Raises whatever Pillow raises on broken data, and ValueError for a picture that is no mask.
        """
        image = open_image(data)
        if image.mode not in ("1", "L", "P", "I", "I;16"):
            raise ValueError(f"a mask must have one channel of classes (grey or palette), got mode {image.mode}")
        values = np.asarray(image.resize((size, size), Image.Resampling.NEAREST)).astype(np.int64)
        labels = np.where(np.isin(values, self.ignored), -1, values - self.first)
        if labels.max() > np.iinfo(np.int16).max:
            raise ValueError(f"classes of a mask must be below 32768, got {labels.max()}")
        return labels.clip(-1).astype(np.int16)


class LabelledFolder:
    """Images whose class is the first folder in their path."""

    masks = None

    def __init__(self, path: str):
        self.source, self._images = f"folder:{path}", ImageFolder(path)
        self._start = len(os.path.join(Path(path).expanduser(), ""))  # noqa: PTH118

    @property
    def fingerprint(self) -> str:
        return self._images.fingerprint

    def __len__(self) -> int:
        return len(self._images)

    def items(self) -> Iterator[Item]:
        for index in range(len(self)):
            name = self._images.name(index)
            label, slash, _ = name[self._start :].partition(os.sep)
            if not slash:
                raise SourceError(f"{self.source}: expected images in sub-folders, one a class, found {name}")
            yield Item(name, partial(self._images.read, index), label)


class MaskedFolder:
    """Images with a mask of the same name each, but for the extension; or those that `names` tells."""

    def __init__(self, source: str, images: Path, annotations: Path, masks: Masks, names: Sequence[str] | None = None):
        self.source, self.masks = source, masks
        self._images, self._annotations = ImageFolder(str(images)), ImageFolder(str(annotations))
        of_images, of_masks = _by_stem(self._images, images), _by_stem(self._annotations, annotations)
        wanted = list(of_images) if names is None else names
        for found, folder in (of_images, images), (of_masks, annotations):
            if lacking := [name for name in wanted if name not in found]:
                raise SourceError(
                    f"{source}: expected an image and a mask of each name, found no {lacking[0]} in {folder} "
                    f"({len(lacking)} of {len(wanted)} are missing)"
                )
        self._names, self._pairs = wanted, [(of_images[name], of_masks[name]) for name in wanted]

    @property
    def fingerprint(self) -> str:
        names = listing_fingerprint(
            (self._images.name(image).encode(errors="surrogateescape"), None) for image, _ in self._pairs
        )
        return f"{self._images.fingerprint}; {self._annotations.fingerprint}; {names}"

    def __len__(self) -> int:
        return len(self._pairs)

    def items(self) -> Iterator[Item]:
        for image, mask in self._pairs:
            name = self._images.name(image)
            yield Item(name, partial(self._images.read, image), partial(self._annotations.read, mask))


def _by_stem(folder: ImageFolder, root: Path) -> dict[str, int]:
    start = len(os.path.join(root, ""))  # noqa: PTH118
    return {os.path.splitext(folder.name(i)[start:])[0]: i for i in range(len(folder))}  # noqa: PTH122


class LabelledShards:
    """Samples of .tar shards in WebDataset's layout: an image, and the text of `cls` (or of another extension)."""

    masks = None

    def __init__(self, pattern: str, image_key: str, label_key: str):
        self.source, self._shards = f"wds:{pattern}", TarShards(pattern, image_key)
        self._image_key = image_key.lower().lstrip(".")
        self._label_key = "cls" if label_key == "auto" else label_key
        self.fingerprint = f"{self._shards.fingerprint}; {image_key}, {label_key}"

    def items(self) -> Iterator[Item]:
        for shard in range(self._shards.n_shards):
            url = self._shards.shard_name(shard)
            try:
                yield from self._samples(url)
            except (OSError, ValueError, tarfile.TarError) as error:
                raise SourceError(f"{self.source}: {url} cannot be read: {reason(error)}") from error

    def _samples(self, url: str) -> Iterator[Item]:
        key, members = None, {}
        with closing(PersistentFile(url)) as file, tarfile.open(fileobj=file, mode="r|*") as tar:
            for member in tar:
                folder, _, basename = member.name.rpartition("/")
                stem, _, extension = basename.partition(".")
                if not member.isfile() or not stem:
                    continue
                if (folder, stem) != key:
                    yield from self._sample(url, key, members)
                    key, members = (folder, stem), {}
                members[extension.lower()] = member_bytes(tar, member)
        yield from self._sample(url, key, members)

    def _sample(self, url: str, key: tuple[str, str] | None, members: dict[str, bytes]) -> Iterator[Item]:
        wanted = IMAGE_EXTENSIONS if self._image_key == "auto" else {self._image_key}
        label = members.get(self._label_key)
        for data in (members[extension] for extension in members.keys() & wanted):
            name = label.decode(errors="replace").strip() if label is not None else None
            yield Item(f"{url}:{'/'.join(filter(None, key))}", partial(bytes, data), name)


class LabelledHub:
    """Rows of a Hugging Face data set, streamed: an image, and a column of classes, of their names, or of masks."""

    def __init__(
        self, name: str, part: Part, split: str | None, image_key: str, label_key: str, ignored: Sequence[int]
    ):
        self.source, self._name = f"hf:{name}", name
        builder = hub_builder(name)
        import datasets

        try:
            splits = list(builder.info.splits or builder.as_streaming_dataset())
            self.split = split or next(
                (known for known in _SPLITS[part] if known in splits), splits[0] if len(splits) == 1 else None
            )
            if self.split is None:
                raise SourceError(f"{self.source}: expected --{part}_split to name one of the splits {splits}")
            self._rows = builder.as_streaming_dataset(self.split)
            features = self._rows.features or self._rows._resolve_features().features
        except SourceError:
            raise
        except Exception as error:  # whatever a foreign data set raises
            raise SourceError(f"{self.source} cannot be loaded: {reason(error)}") from error
        pictures = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
        classes = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        self._image = self._column("image_key", image_key, ["image", *pictures], features)
        others = [column for column in (*_LABEL_COLUMNS, *classes) if column != self._image]
        self._label = self._column("label_key", label_key, others, features)
        self.masks = Masks(ignored) if self._label in pictures else None
        self._rows = self._rows.select_columns([self._image, self._label])
        for column in (self._image, self._label) if self.masks else (self._image,):
            self._rows = self._rows.cast_column(column, datasets.Image(decode=False))
        self._names = getattr(features[self._label], "names", None)
        self.source = f"hf:{name}, split {self.split}"

    def _column(self, option: str, key: str, candidates: Sequence[str], features: Mapping) -> str:
        for column in candidates if key == "auto" else (key,):
            if column in features:
                return column
        raise SourceError(f"{self.source}: expected --{option} to name one of the columns {list(features)}, got {key}")

    @cached_property
    def fingerprint(self) -> str:
        shards = HubShards(self._name, self.split, self._image)
        return f"{shards.fingerprint or self.source}; {self._image}, {self._label}"

    def items(self) -> Iterator[Item]:
        for index, row in enumerate(self._rows):
            label = row[self._label]
            if self.masks is not None:
                label = None if label is None else partial(stored_bytes, label)
            elif self._names is not None:
                label = None if label is None or label < 0 else self._names[label]
            elif label is not None:
                label = str(label)
            yield Item(f"{self.source}, row {index}", partial(stored_bytes, row[self._image]), label)


LabelledSource = LabelledFolder | MaskedFolder | LabelledShards | LabelledHub


def open_labelled(
    source: str,
    part: Part,
    *,
    split: str | None = None,
    image_key: str = "auto",
    label_key: str = "auto",
    ignored: Sequence[int] = (255,),
) -> LabelledSource:
    """Labelled images of a source; `part` picks the split where the source holds both.

    `folder:PATH` is a folder of classes; or of `images` and `masks`, a file of the same name in each; or ADE20K's
    `ADEChallengeData2016` or VOC's `VOCdevkit/VOC2012`, or a folder that holds one of these. Pixels of a mask are
    classes; those of a value in `ignored` have none (ADE20K: those of value 0, and 1 is class 0).
    `hf:NAME[:CONFIGURATION]` is streamed; `image_key` and `label_key` name its columns, `split` its split.
    `wds:PATTERN` has an image and the text `cls` in every sample.

    Raises:
        ValueError: the name is of no known form.
        SourceError: there is nothing of that name, no image or no label in it, or images and masks do not match.
        ImportError: the source needs the extra `data`.
    """
    kind, _, place = source.partition(":")
    if kind == "folder" and place:
        return _open_folder(place, part, ignored)
    if kind == "wds" and place:
        return LabelledShards(place, image_key, label_key)
    if kind == "hf" and place:
        return LabelledHub(place, part, split, image_key, label_key, ignored)
    raise ValueError(f"labelled images must be folder:PATH, hf:NAME or wds:PATTERN, got {source}")


def _open_folder(place: str, part: Part, ignored: Sequence[int]) -> LabelledFolder | MaskedFolder:
    root, source = Path(place).expanduser(), f"folder:{place}"
    for ade in (root, root / "ADEChallengeData2016"):
        images, annotations = (ade / name / _PARTS_OF_ADE[part] for name in ("images", "annotations"))
        if images.is_dir() and annotations.is_dir():
            return MaskedFolder(source, images, annotations, Masks((0, 255), 1, _ade_classes(ade)))
    for voc in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        listing = voc / "ImageSets" / "Segmentation" / f"{_PARTS_OF_VOC[part]}.txt"
        if listing.is_file():
            masks = Masks((255,), names=_VOC_CLASSES)
            return MaskedFolder(
                source, voc / "JPEGImages", voc / "SegmentationClass", masks, listing.read_text().split()
            )
    if (root / "images").is_dir() and (root / "masks").is_dir():
        return MaskedFolder(source, root / "images", root / "masks", Masks(tuple(ignored)))
    return LabelledFolder(place)


def _ade_classes(root: Path) -> tuple[str, ...]:
    """Names of the classes, where the list of them lies beside the images: the last of tab-separated columns."""
    listing = root / "objectInfo150.txt"
    lines = listing.read_text(errors="replace").splitlines()[1:] if listing.is_file() else []
    synonyms = [line.rpartition("\t")[2].strip() for line in lines if "\t" in line]
    short = [names.partition(",")[0] for names in synonyms]
    return tuple(one if short.count(one) == 1 else names for one, names in zip(short, synonyms, strict=True))
