"""No two purposes, seeds or keys share their random numbers."""

from itertools import product

import pytest

from capi.seeding import Purpose, generator


def test_keys_of_any_length_and_size_draw_numbers_of_their_own():
    integers = (0, 1, 7, 2**32, 2**32 + 7)
    keys = [key for length in range(4) for key in product(integers, repeat=length)]
    streams = [(purpose, seed, *key) for purpose in Purpose for seed in (0, 1, 2**32) for key in keys]
    drawn = [generator(*stream).integers(2**63) for stream in streams]
    assert len(set(drawn)) == len(drawn)


def test_the_same_key_draws_the_same_numbers():
    first, again = (generator(Purpose.MASK, 5, 1, 2).random(4) for _ in range(2))
    assert (first == again).all()


def test_integers_out_of_range_are_refused():
    for key in ((-1,), (0, -3), (0, 2**64)):
        with pytest.raises(OverflowError):
            generator(Purpose.CROP, *key)
