"""Images in shards that are streamed: .tar files, and Hugging Face data sets."""

import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from fnmatch import fnmatchcase
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import fsspec

from capi.data.listing import IMAGE_EXTENSIONS, SourceError, listing_fingerprint
from capi.data.retry import PersistentFile, attempt, persistent, reason

# A data set of a million loose files counts a million shards; finding one among them takes as many steps.
_MAX_HUB_SHARDS = 1024
_TAR_BUFFER = 2**20
_MOST_BYTES = 2**30
_INSTALL = "pip install '.[data]'"


class TarShards:
    """Images in .tar shards (WebDataset's layout): members whose name after its first dot is the wanted extension.

    `image_key` is that extension, which may itself have dots and the wildcards of a shell (left.jpg, *jpg), or auto:
    any that images have. Images by their last extension that no other member of their sample (of the same name up to
    the first dot) stands for are left out, and said at the end of their shard.

    The `webdataset` builder of Hugging Face `datasets` does not serve: it stops at the first broken shard, at samples
    with different members, and decodes members that nobody asked for.
    """

    def __init__(self, pattern: str, image_key: str) -> None:
        self.source = f"wds:{pattern}"
        try:
            from braceexpand import braceexpand
        except ImportError as error:
            raise ImportError(f"{self.source} needs braceexpand: {_INSTALL}") from error
        self._urls = [url for expanded in braceexpand(pattern) for url in self._matches(expanded)]
        for protocol in sorted({url.partition("://")[0] for url in self._urls if "://" in url}):
            self._check_protocol(protocol)
        self._image_key = image_key.lower().lstrip(".")

    def _matches(self, pattern: str) -> list[str]:
        if "://" in pattern:
            return [pattern]
        path = Path(pattern).expanduser()
        if path.exists():
            return [str(path)]
        matches = sorted(map(str, Path(path.anchor).glob(str(path.relative_to(path.anchor)))))
        if not matches:
            raise SourceError(f"{self.source}: expected .tar shards, found no file {pattern}")
        return matches

    def _check_protocol(self, protocol: str) -> None:
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError as error:
            package = getattr(error.__cause__, "name", None) or str(error)
            hint = _INSTALL if protocol in ("http", "https") else f"pip install {package}"
            raise ImportError(f"{self.source} needs {package}: {hint}") from error
        except ValueError as error:
            raise SourceError(f"{self.source}: expected a protocol that fsspec knows, got {protocol}") from error

    @property
    def n_shards(self) -> int:
        return len(self._urls)

    def shard_name(self, index: int) -> str:
        return self._urls[index]

    @cached_property
    def fingerprint(self) -> str:
        """Number, names below the folder that holds them all, and sizes (of local ones) of the shards."""
        return _fingerprint(self._urls)

    def shard(self, index: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """Names of the images of one shard, each with a function that reads it before the next is asked for."""
        url = self._urls[index]
        with closing(PersistentFile(url)) as file, _open_tar(file) as tar:
            n_images, sample, has_image, of_sample, left_out = 0, "", False, [], []
            for member in tar:
                folder, _, basename = member.name.rpartition("/")
                stem, _, extension = basename.partition(".")
                if not member.isfile() or not stem:
                    continue
                if (folder, stem) != sample:
                    left_out += [] if has_image else of_sample
                    sample, has_image, of_sample = (folder, stem), False, []
                if self._is_wanted(extension):
                    n_images, has_image = n_images + 1, True
                    yield f"{url}:{member.name}", partial(member_bytes, tar, member)
                elif "." in extension and self._is_wanted(extension.rpartition(".")[2]):
                    of_sample.append(member.name)
            left_out += [] if has_image else of_sample
        if left_out:
            yield f"members of {self.source}", partial(_raise, self._left_out(url, left_out, n_images))

    def _is_wanted(self, extension: str) -> bool:
        if self._image_key == "auto":
            return extension.lower() in IMAGE_EXTENSIONS
        return fnmatchcase(extension.lower(), self._image_key)

    def _left_out(self, url: str, names: list[str], n_images: int) -> SourceError:
        extensions = [name.rpartition("/")[2].partition(".")[2] for name in names]
        key = extensions[0] if len(set(extensions)) == 1 else f"*{extensions[0].rpartition('.')[2]}"
        return SourceError(
            f"{len(names)} of {len(names) + n_images} images of {url}, such as {names[0]}, whose extension is "
            f"{extensions[0]} (WebDataset's rule: from the first dot on); data.image_key '{key}' takes them"
        )


def _open_tar(file: PersistentFile) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r|*", bufsize=_TAR_BUFFER)
    except tarfile.ReadError as error:
        found = f"a file that begins with {file.start!r}" if file.start else "an empty file"
        raise SourceError(f"expected a .tar archive, got {found}") from error


def _raise(error: Exception) -> NoReturn:
    raise error


def member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """ValueError for more than a GiB, of which a compressed or sparse archive needs to hold little."""
    if member.size > _MOST_BYTES:
        raise ValueError(f"expected a member of at most 1 GiB, got {member.size} bytes")
    return tar.extractfile(member).read()


def hub_builder(name: str) -> Any:
    """The `datasets.DatasetBuilder` of a Hugging Face data set; `name` may be a folder, and end with :CONFIGURATION.

    Raises:
        ImportError: without the package `datasets`.
        SourceError: there is no such data set, or several configurations of it.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"hf:{name} needs Hugging Face datasets: {_INSTALL}") from error
    place, configuration = os.path.expanduser(name), None  # noqa: PTH111
    if ":" in place and not Path(place).exists():
        place, _, configuration = place.rpartition(":")
    try:
        return datasets.load_dataset_builder(place, configuration)
    except Exception as error:
        known = attempt(datasets.get_dataset_config_names, place)
        if isinstance(known, list) and configuration not in known and (configuration or len(known) > 1):
            raise SourceError(
                f"hf:{name}: expected hf:NAME:CONFIGURATION with one of the configurations {known}, "
                f"got {configuration or 'none'}"
            ) from error
        raise SourceError(f"hf:{name} cannot be loaded: {reason(error)}") from error


class HubShards:
    """Images of a Hugging Face data set, streamed; `name` may be a local folder, and end with :CONFIGURATION."""

    def __init__(self, name: str, split: str, image_key: str) -> None:
        self.source = f"hf:{name}"
        builder = hub_builder(name)
        import datasets

        try:
            dataset = builder.as_streaming_dataset(split)
        except Exception as error:
            raise SourceError(f"{self.source}: split {split} cannot be loaded: {reason(error)}") from error
        if dataset.column_names is not None and image_key not in dataset.column_names:
            raise SourceError(
                f"{self.source}: data.image_key must be one of the columns {dataset.column_names}, got {image_key}"
            )
        files = builder.config.data_files or {}
        self._files = [file for part in split.split("+") for file in files.get(part.strip(), ())]
        self._column = image_key
        self._dataset = dataset.select_columns([image_key]).cast_column(image_key, datasets.Image(decode=False))

    @cached_property
    def fingerprint(self) -> str | None:
        """Number, names and sizes of a local data set's files; those of the Hub are named with their revision."""
        return _fingerprint(self._files) if self._files else None

    @property
    def n_shards(self) -> int:
        return min(self._dataset.num_shards, _MAX_HUB_SHARDS)

    def shard_name(self, index: int) -> str:
        return f"{self.source} shard {index}"

    def shard(self, index: int) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """Names of the images of one shard, each with a function that reads it."""
        following, rows = 0, None

        def next_row() -> tuple[int, dict | None] | None:
            nonlocal rows
            try:
                rows = rows or islice(enumerate(self._rows(index)), following, None)
                return next(rows, None)
            except Exception:
                rows = None
                raise

        while row := persistent(next_row, self.shard_name(index)):
            position, image = row
            following = position + 1
            path = (image or {}).get("path") or "no path"
            yield f"{self.shard_name(index)} row {position} ({path})", partial(stored_bytes, image)

    def _rows(self, index: int) -> Iterator[dict | None]:
        # Plain iteration would divide the shard among the loader processes of torch once more; by batches it does not.
        for batch in self._dataset.shard(self.n_shards, index).iter(batch_size=16):
            yield from batch[self._column]


def stored_bytes(image: dict | None) -> bytes:
    """The bytes of an image that was not decoded: in its row, or where that says; ValueError if it has none."""
    if image is None:
        raise ValueError("the row has no image")
    if image.get("bytes") is not None:
        return image["bytes"]
    return persistent(partial(_file_bytes, image["path"]), image["path"])


def _file_bytes(url: str) -> bytes:
    with fsspec.open(url, "rb") as file:
        return file.read()


def _fingerprint(urls: list[str]) -> str:
    # What follows a question mark is a key that expires.
    paths = [f"/{url.partition('?')[0]}" if "://" in url else os.path.abspath(url) for url in urls]  # noqa: PTH100
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
    return listing_fingerprint(
        (os.fsencode(url if url.startswith("hf://") else os.path.relpath(path, folder)), _local_size(url))
        for url, path in zip(urls, paths, strict=True)
    )


def _local_size(url: str) -> int | None:
    if "://" in url:
        return None
    try:
        return os.path.getsize(url)  # noqa: PTH202
    except OSError:  # Reading it will say why.
        return None
