"""Random generators, each for one purpose and one key: no two share their numbers."""

from enum import IntEnum, auto

import numpy as np


class Purpose(IntEnum):
    """What random numbers are drawn for."""

    CROP = auto()
    MASK = auto()
    ORDER = auto()
    SHUFFLE = auto()
    DROP_PATH = auto()
    SCENE = auto()


def generator(purpose: Purpose, seed: int, *key: int) -> np.random.Generator:
    """The generator of this purpose, seed and key (integers in [0, 2^64)); another key of any length gives others.

    Raises:
        OverflowError: an integer is negative or larger.
    """
    # NumPy itself takes (0, 7, 3) for (0, 7, 3, 0), and (2^32,) for (0, 1): here every integer has two words, and the
    # length of the key is part of it.
    words = np.array([purpose, len(key), seed, *key], dtype=np.uint64).view(np.uint32)
    return np.random.default_rng(words)
