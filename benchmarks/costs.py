"""The least that an operation moves and computes, and the time that this takes at the measured ceilings.

Bytes: inputs read once and outputs written once, but Sinkhorn's logits read once an iteration and once more at the end.
FLOP: two per multiply-add of a matrix product.
"""

from typing import NamedTuple

POTENTIAL_BYTES = 4  # float32, as are the log-sum-exps of attention


class Ceilings(NamedTuple):
    """What a device was measured to reach."""

    copy_gb_per_second: float
    """Of a device copy, reads and writes counted."""
    matmul_tflop_per_second: float
    """Of a bf16 matrix product of random numbers."""
    copied_bytes: int
    """Size of each of the two buffers between which was copied: of larger ones a copy is slower."""


class Cost(NamedTuple):
    """Bytes that must move, where that is known, and FLOP."""

    bytes: int | None
    flop: int | None
    copied_bytes: int | None = None
    """Buffers of this size, two of them, take the memory that the operation reads and writes."""

    def floor_seconds(self, ceilings: Ceilings | None) -> float | None:
        """The longer of the time to move the bytes and the time to compute; None where nothing is known of them."""
        if ceilings is None or (self.bytes is None and self.flop is None):
            return None
        move = (self.bytes or 0) / (ceilings.copy_gb_per_second * 1e9)
        return max(move, (self.flop or 0) / (ceilings.matmul_tflop_per_second * 1e12))


def sinkhorn_positionwise(positions: int, images: int, prototypes: int, n_iterations: int, itemsize: int) -> Cost:
    """n_iterations + 1 reads of the logits, one write of the assignments, the potentials written once."""
    elements = positions * images * prototypes
    potentials = positions * (2 * prototypes + images) * POTENTIAL_BYTES
    moved = (n_iterations + 2) * elements * itemsize + potentials
    return Cost(moved, 4 * n_iterations * elements, elements * itemsize)


def clustering_head(positions: int, images: int, prototypes: int, n_iterations: int, dim: int, itemsize: int) -> Cost:
    """Sinkhorn's bytes, with the gradient of the logits in the place of the assignments, and two matrix products."""
    sinkhorn = sinkhorn_positionwise(positions, images, prototypes, n_iterations, itemsize)
    return sinkhorn._replace(flop=4 * positions * images * prototypes * dim)


def student_loss(predicted: int, prototypes: int, itemsize: int, target_itemsize: int) -> Cost:
    """Logits and targets read, the gradient of the logits written."""
    elements = predicted * prototypes
    moved = elements * (2 * itemsize + target_itemsize)
    return Cost(moved, 2 * elements, moved // 2)


def attention(images: int, queries: int, keys: int, heads: int, head_dim: int, itemsize: int, direction: str) -> Cost:
    """q, k, v and o, or with do in the place of o their three gradients too; a log-sum-exp a query and head."""
    query_bytes, key_bytes = (images * n * heads * head_dim * itemsize for n in (queries, keys))
    lse = images * queries * heads * POTENTIAL_BYTES
    product = 2 * images * heads * queries * keys * head_dim
    if direction == "forward":
        moved, products = 2 * query_bytes + 2 * key_bytes + lse, 2
    else:
        moved, products = 3 * query_bytes + 4 * key_bytes + lse, 5
    return Cost(moved, products * product, moved // 2)
