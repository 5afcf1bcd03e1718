"""Images in shards that are streamed: .tar files, and Hugging Face data sets."""

import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import fsspec

from capi.listing import IMAGE_EXTENSIONS, SourceError, listing_fingerprint
from capi.retry import PersistentFile, persistent, reason

# A data set of a million loose files counts a million shards; finding one among them takes as many steps.
_MAX_HUB_SHARDS = 1024
_TAR_BUFFER = 2**20
_INSTALL = "pip install '.[data]'"


class TarShards:
    """Images in .tar shards (WebDataset's layout): members whose name after its first dot is the wanted extension.

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
        self._extensions = IMAGE_EXTENSIONS if image_key == "auto" else {image_key.lower().lstrip(".")}

    def _matches(self, pattern: str) -> list[str]:
        if "://" in pattern:
            return [pattern]
        path = Path(pattern).expanduser()
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
            for member in tar:
                basename = member.name.rpartition("/")[2]
                hidden = basename.startswith(".")
                if member.isfile() and not hidden and basename.partition(".")[2].lower() in self._extensions:
                    yield f"{url}:{member.name}", partial(_member_bytes, tar, member)


def _open_tar(file: PersistentFile) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r|*", bufsize=_TAR_BUFFER)
    except tarfile.ReadError as error:
        found = f"a file that begins with {file.start!r}" if file.start else "an empty file"
        raise SourceError(f"expected a .tar archive, got {found}") from error


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    return tar.extractfile(member).read()


class HubShards:
    """Images of a Hugging Face data set, streamed; `name` may be a local folder."""

    def __init__(self, name: str, split: str, image_key: str) -> None:
        self.source = f"hf:{name}"
        try:
            import datasets
        except ImportError as error:
            raise ImportError(f"{self.source} needs Hugging Face datasets: {_INSTALL}") from error
        try:
            builder = datasets.load_dataset_builder(os.path.expanduser(name))  # noqa: PTH111
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
            yield f"{self.shard_name(index)} row {position} ({path})", partial(_stored_bytes, image)

    def _rows(self, index: int) -> Iterator[dict | None]:
        # Plain iteration would divide the shard among the loader processes of torch once more; by batches it does not.
        for batch in self._dataset.shard(self.n_shards, index).iter(batch_size=16):
            yield from batch[self._column]


def _stored_bytes(image: dict | None) -> bytes:
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
