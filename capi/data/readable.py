"""Centre crops of the images of a source that can be read."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import cycle, islice

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from torch import Tensor

from capi.config import Config
from capi.data.crops import centre_box, crop
from capi.data.reading import Reads
from capi.data.retry import attempt, reason
from capi.data.sources import IndexedSource, ShardedSource, SourceError, in_order, open_source

_MAX_REASONS = 3


def evaluation_images(config: Config, n: int) -> UInt8[Tensor, "n 3 size size"]:
    """`n` images of the source, always the same, centre-cropped and resized, for pictures.

    Evenly spaced over a folder or the synthetic scenes, the first of a streamed source; again from the start where
    there are fewer than `n`. Raises as ImageStream does.
    """
    source, size = open_source(config), config.data.image_size
    with warnings.catch_warnings(), closing(Reads(config.data.read_timeout)) as reads:
        warnings.simplefilter("ignore")
        if isinstance(source, ShardedSource):
            images = islice(cycle(readable(source, size, reads)), n)
        else:
            images = (next(readable(source, size, reads, i * len(source) // n)) for i in range(n))
        return torch.from_numpy(np.stack(list(images)).transpose(0, 3, 1, 2).copy())


def readable(
    source: IndexedSource | ShardedSource, size: int, reads: Callable, start: int = 0
) -> Iterator[UInt8[ndarray, "size size 3"]]:
    """Centre crops of the readable images, in order, an indexed source's from `start`; SourceError if there is none."""
    n_read, found, reasons = 0, False, []
    for name, data in in_order(source, start, reads):
        pixels = attempt(crop, data, size, centre_box)
        n_read += 1
        if not isinstance(pixels, Exception):
            found = True
            yield pixels
        elif len(reasons) < _MAX_REASONS:
            reasons.append(f"{name}: {reason(pixels)}")
    if not found:
        why = "; ".join(reasons) or "see data.image_key"
        raise SourceError(f"{source.source}: expected images, found none readable among {n_read} ({why})")
