"""An order of n items that no table holds."""

import math

import numpy as np

_ROUNDS = 8
_MASK = 2**64 - 1


class Permutation:
    """A random permutation of 0 to n - 1, item by item: a Feistel network keyed by `rng`.

    The items are the first n cells of a table of about sqrt(n) rows and columns. Each round turns every line of one
    kind by an offset hashed from the other coordinate, which can be undone, so rounds are a permutation of all cells;
    a cell past n goes through them again until one below n comes out. An item takes microseconds whatever n is, and
    nothing is kept but the keys.
    """

    def __init__(self, rng: np.random.Generator, n: int) -> None:
        self._n = n
        self._n_columns = math.isqrt(max(n - 1, 0)) + 1
        self._n_rows = -(-n // self._n_columns)
        self._keys = rng.integers(2**64, size=(_ROUNDS, 2), dtype=np.uint64).tolist()

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> int:
        """Raises IndexError unless 0 <= index < n."""
        if not 0 <= index < self._n:
            raise IndexError(f"index must be in [0, {self._n}), got {index}")
        while True:
            row, column = divmod(index, self._n_columns)
            for row_key, column_key in self._keys:
                row = (row + _hash(column ^ row_key)) % self._n_rows
                column = (column + _hash(row ^ column_key)) % self._n_columns
            index = row * self._n_columns + column
            if index < self._n:
                return index


def _hash(x: int) -> int:
    """The mixing function of SplitMix64: 64 bits that each depend on all of `x`."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31
