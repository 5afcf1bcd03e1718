"""A choice of tests that leaves no kind of them out."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

T = TypeVar("T")


def stratified(items: Sequence[T], count: int, kind: Callable[[T], Hashable]) -> list[T]:
    """`count` items in their order: of each kind as many as of any other, where it has so many, spread over it."""
    kinds: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        kinds[kind(item)].append(item)
    shares = dict.fromkeys(kinds, 0)
    left = min(count, len(items))
    while left:
        open_kinds = [name for name in kinds if shares[name] < len(kinds[name])]
        for i in range(min(left, len(open_kinds))):
            # Fewer than there are kinds: not the first ones only.
            shares[open_kinds[i * len(open_kinds) // min(left, len(open_kinds))]] += 1
        left = min(count, len(items)) - sum(shares.values())
    chosen = set()
    for name, members in kinds.items():
        share = shares[name]
        chosen.update(id(members[(2 * i + 1) * len(members) // (2 * share)]) for i in range(share))
    return [item for item in items if id(item) in chosen]
