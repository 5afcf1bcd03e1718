"""Every item once, in an order that looks like any other."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from capi.data.permutation import Permutation
from capi.seeding import Purpose, generator


def permutation(n: int, *key: int) -> Permutation:
    return Permutation(generator(Purpose.ORDER, *(key or (0,))), n)


def items(n: int, *key: int) -> list[int]:
    order = permutation(n, *key)
    return [order[i] for i in range(n)]


def chi_square_z(counts: np.ndarray, expected: float, freedom: int) -> float:
    """Standard deviations between Pearson's statistic of `counts` and its mean."""
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 99, 100, 101, 2047, 2048, 2049])
def test_every_item_comes_once(n: int):
    assert sorted(items(n)) == list(range(n))


def test_large_orders_have_no_repeats():
    order = permutation(2**40)
    drawn = {order[i] for i in range(1000)} | {order[2**40 - 1 - i] for i in range(1000)}
    assert len(drawn) == 2000
    assert min(drawn) >= 0 and max(drawn) < 2**40


def test_order_depends_on_every_key():
    orders = [items(50, *key) for key in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert orders == [items(50, *key) for key in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len({tuple(order) for order in orders}) == 4


def test_all_orders_of_four_are_alike():
    n_draws = 2000
    counts = Counter(tuple(items(4, seed)) for seed in range(n_draws))
    assert len(counts) == 24
    assert abs(chi_square_z(np.array([*counts.values()]), n_draws / 24, 23)) < 4


@pytest.mark.parametrize("n", [5, 12, 30])
def test_every_place_is_uniform(n: int):
    n_draws = 8000 // n
    orders = np.array([items(n, seed) for seed in range(n_draws)])
    counts = np.stack([np.bincount(place, minlength=n) for place in orders.T])
    assert abs(chi_square_z(counts, n_draws / n, (n - 1) ** 2)) < 4


@pytest.mark.parametrize("n", [1000, 4097])
def test_neighbours_are_unrelated(n: int):
    order = np.array(items(n))
    deviation = 1 / math.sqrt(n)
    for lag in (1, 2, math.isqrt(n), n // 2):
        assert abs(np.corrcoef(order[lag:], order[:-lag])[0, 1]) < 4 * deviation * math.sqrt(n / (n - lag))
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 4 * deviation
    # In a random order the next item is the next number once on average.
    assert sum(after == before + 1 for before, after in pairwise(order)) <= 6
    # The orders of two epochs agree in one place on average.
    assert sum(a == b for a, b in zip(order, items(n, 0, 1), strict=True)) <= 6


@pytest.mark.parametrize("index", [-1, 7])
def test_index_out_of_range(index: int):
    with pytest.raises(IndexError, match=rf"index must be in \[0, 7\), got {index}"):
        permutation(7)[index]


def test_takes_no_memory():
    tables = [value for value in vars(permutation(14_000_000)).values() if not isinstance(value, int)]
    assert [len(np.ravel(table)) for table in tables] == [16]
