"""Features of labelled images, computed once: prepared, sent through the encoder, and kept on disk."""

import hashlib
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int16, UInt8
from numpy import ndarray
from torch import Tensor, nn
from tqdm import tqdm

from capi.data.crops import Box, crop, random_box
from capi.data.listing import SourceError
from capi.data.retry import reason
from capi.evaluate.labelled import Item, LabelledSource
from capi.model import normalize_images
from capi.seeding import Purpose, generator

logger = logging.getLogger(__name__)

_SHORTER_SIDE = 256 / 224  # Of which the middle is taken.
_CROP_SCALE = (0.08, 1.0)
_SEED = 42
_BATCH = 128
_FORMAT = 1
_SHOWN_FAULTS = 5


@dataclass(frozen=True)
class Features:
    """What an encoder says of labelled images, on the CPU; arrays may lie in mapped files."""

    global_reprs: Float[Tensor, "images views dim"]
    """View 0 is the centre (of a segmentation, all) of the image, the others are random crops."""
    patch_means: Float[Tensor, "images views dim"]
    patches: Float[Tensor, "images views patches dim"] | None
    """In half precision; where they were wanted."""
    labels: list[str] | Int16[Tensor, "images height width"]
    """Names of classes, or the classes of pixels, -1 where there is none."""
    unreadable: int
    """Images left out because they could not be read."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Wanted:
    """How images are prepared, and which features of them are kept."""

    image_size: int
    """Side of a view in pixels."""
    crops: int = 0
    """Random crops of every image, besides its centre."""
    patches: bool = False
    """Whether to keep the features of every patch, in half precision."""
    limit: int | None = None
    """Most images that are taken: evenly spread over a source that tells how many it has, else the first."""


def encoder_fingerprint(encoder: nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def cached_features(
    encoder: nn.Module, source: LabelledSource, wanted: Wanted, cache: Path, fingerprint: str
) -> Features:
    """The features of `extract_labelled`, from the folder `cache` or into it.

    `fingerprint` is the encoder's. The images' is made of names and sizes of their files: of one that changed and kept
    both, the old features are taken.
    """
    of_data = {"source": source.fingerprint, "masks": repr(source.masks), "size": wanted.image_size}
    key = {"format": _FORMAT, "encoder": fingerprint, **of_data, "crops": wanted.crops, "limit": wanted.limit}
    entry = cache / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
    features = _load(entry)
    if features is not None and (features.patches is not None or not wanted.patches):
        logger.info("%s: features of %d images are there already, in %s", source.source, len(features), entry)
        return features
    faults = []
    with _new_entry(entry) as folder:
        _write(folder, _batches(encoder, source, wanted, faults), wanted.patches, faults)
    return _load(entry)


def extract_labelled(
    encoder: nn.Module, source: LabelledSource, wanted: Wanted, watch: Callable[[], None] = lambda: None
) -> Features:
    """Features of labelled images in the order of their source; `watch` is called after every batch and may raise.

    A view is normalised as in training. The centre of an image is what `Resize(size * 256 / 224)` and
    `CenterCrop(size)` leave, a crop what `RandomResizedCrop(size)` and a flip by chance, both drawn by the image's
    place alone; an image with a mask is stretched to the square, as its mask is.

    Raises:
        SourceError: no image has a label, or none can be read.
    """
    parts, faults = [], []
    for part in _batches(encoder, source, wanted, faults):
        watch()
        parts.append(part)
    if source.masks is None:
        labels = [label for part in parts for label in part.labels]
    else:
        labels = torch.cat([part.labels for part in parts])
    patches = torch.cat([part.patches for part in parts]) if wanted.patches else None
    vectors = (torch.cat([getattr(part, name) for part in parts]) for name in ("global_reprs", "patch_means"))
    return Features(*vectors, patches, labels, len(faults))


def _batches(encoder: nn.Module, source: LabelledSource, wanted: Wanted, faults: list[str]) -> Iterator[Features]:
    """Features of some images at a time; `faults` gets a line for each that cannot be read."""
    device = next(encoder.parameters()).device
    n_views, n_images, unlabelled = 1 + wanted.crops, 0, 0
    prepared = _prepared(source, wanted)
    while batch := list(islice(prepared, max(1, _BATCH // n_views))):
        bad = [fault for fault in batch if isinstance(fault, str)]
        for fault in bad[: max(0, _SHOWN_FAULTS - len(faults))]:
            logger.warning("left out %s", fault)
        faults += bad
        unlabelled += sum(item is None for item in batch)
        good = [item for item in batch if isinstance(item, tuple)]
        if not good:
            continue
        views = torch.from_numpy(np.concatenate([views for views, _ in good])).permute(0, 3, 1, 2)
        with torch.no_grad():
            global_reprs, _, maps = encoder(normalize_images(views.to(device)))
            patches = maps.flatten(1, 2).float()
            global_reprs, patch_means = (
                x.float().cpu().unflatten(0, (len(good), n_views)) for x in (global_reprs, patches.mean(1))
            )
            kept = patches.half().cpu().unflatten(0, (len(good), n_views)) if wanted.patches else None
        labels = [label for _, label in good]
        if source.masks is not None:
            labels = torch.from_numpy(np.stack(labels))
        n_images += len(good)
        yield Features(global_reprs, patch_means, kept, labels, unreadable=0)
    if len(faults) > _SHOWN_FAULTS:
        logger.warning("%s: left out %d images that cannot be read", source.source, len(faults))
    if unlabelled:
        logger.warning("%s: left out %d images without a label", source.source, unlabelled)
    if n_images == 0:
        found = f"none of {len(faults) + unlabelled} has both"
        why = f"; {faults[0]}" if faults else ""
        raise SourceError(f"{source.source}: expected readable images with labels, {found}{why}")


Prepared = tuple[UInt8[ndarray, "views size size 3"], str | Int16[ndarray, "size size"]]


def _prepared(source: LabelledSource, wanted: Wanted) -> Iterator[Prepared | str | None]:
    """Views and label of every item, in order; a line where they cannot be read, None where there is no label."""
    total = len(source) if hasattr(source, "__len__") else None
    n_threads = min(16, os.cpu_count() or 1)
    pending: deque[Future] = deque()
    shown = {"desc": source.source, "unit": "image", "disable": None, "dynamic_ncols": True, "leave": False}
    with tqdm(total=_taken(total, wanted.limit), **shown) as bar, ThreadPoolExecutor(n_threads) as threads:
        try:
            for index, item in _chosen(source, total, wanted.limit):
                pending.append(threads.submit(_prepare, source, wanted, index, item))
                if len(pending) >= 8 * n_threads:
                    yield pending.popleft().result()
                    bar.update()
            while pending:
                yield pending.popleft().result()
                bar.update()
        finally:
            threads.shutdown(cancel_futures=True)


def _taken(total: int | None, limit: int | None) -> int | None:
    return limit if total is None else min(total, limit or total)


def _chosen(source: LabelledSource, total: int | None, limit: int | None) -> Iterator[tuple[int, Item]]:
    items = enumerate(source.items())
    if limit is None or total is None:
        return islice(items, limit)
    return ((index, item) for index, item in items if index * limit // total != (index - 1) * limit // total)


def _prepare(source: LabelledSource, wanted: Wanted, index: int, item: Item) -> Prepared | str | None:
    if item.label is None:
        return None
    size = wanted.image_size
    try:
        data = item.read()
        if source.masks is not None:
            return crop(data, size, _everything)[None], source.masks.labels(item.label(), size)
        views = [crop(data, size, _centre)]
        for view in range(wanted.crops):
            rng = generator(Purpose.CROP, _SEED, index, view)
            image = crop(data, size, lambda width, height, rng=rng: random_box(width, height, _CROP_SCALE, rng))
            views.append(image[:, ::-1] if rng.random() < 0.5 else image)
        return np.stack(views), item.label
    except Exception as error:  # whatever Pillow raises on broken data
        return f"{item.name}: {reason(error)[:200]}"


def _everything(width: int, height: int) -> Box:
    return 0, 0, width, height


def _centre(width: int, height: int) -> Box:
    side = max(1, round(min(width, height) / _SHORTER_SIDE))
    return (width - side) // 2, (height - side) // 2, side, side


_ARRAYS = {"global_reprs": np.float32, "patch_means": np.float32, "patches": np.float16, "labels": np.int16}


@contextmanager
def _new_entry(entry: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `entry` at the end, and is nowhere if it does not come to that."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    for stale in entry.parent.glob(f".{entry.name}.*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = entry.with_name(f".{entry.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir()
        yield folder
        shutil.rmtree(entry, ignore_errors=True)  # Damaged, or without what is wanted now.
        folder.replace(entry)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, batches: Iterator[Features], with_patches: bool, faults: list[str]) -> None:
    """Appends batch after batch, so that no more than one lies in memory."""
    names, shapes = None, {}
    wanted = [name for name in _ARRAYS if with_patches or name != "patches"]
    files = {name: (folder / f"{name}.bin").open("wb") for name in wanted}
    try:
        for batch in batches:
            if isinstance(batch.labels, list):
                names = (names or []) + batch.labels
            for name, file in files.items():
                array = getattr(batch, name)
                if isinstance(array, Tensor):
                    n, *rest = array.shape
                    shapes[name] = [shapes.get(name, [0])[0] + n, *rest]
                    file.write(array.contiguous().numpy())
    finally:
        for file in files.values():
            file.close()
    meta = {"shapes": shapes, "names": names, "unreadable": len(faults)}
    (folder / "meta.json").write_text(json.dumps(meta))


def _load(entry: Path) -> Features | None:
    """None where there is no entry, or it is damaged."""
    if not entry.is_dir():
        return None
    try:
        meta = json.loads((entry / "meta.json").read_text())
        arrays = {}
        for name, shape in meta["shapes"].items():
            # Copied on write, of which there is none: PyTorch knows no array that only can be read.
            arrays[name] = torch.from_numpy(np.memmap(entry / f"{name}.bin", _ARRAYS[name], "c", shape=tuple(shape)))
        labels = arrays.pop("labels") if meta["names"] is None else meta["names"]
        return Features(
            arrays["global_reprs"], arrays["patch_means"], arrays.get("patches"), labels, meta["unreadable"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s cannot be read and is made anew: %s", entry, reason(error))
        return None
