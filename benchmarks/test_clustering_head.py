"""The clustering head, loss and gradients of its layer together, against the official one."""

import pytest

from benchmarks import costs, peers, shapes
from benchmarks.heads import HeadCase
from benchmarks.measure import OURS


@pytest.mark.parametrize("implementation", [OURS, *peers.OFFICIAL])
@pytest.mark.parametrize("shape", shapes.CLUSTERING_HEAD, ids=shapes.name)
def test_clustering_head(measure, shape: shapes.Logits, implementation: str) -> None:
    case = HeadCase(shape, shapes.DEVICE, shapes.DTYPE)
    measure(
        case.enter,
        op="clustering_head",
        shape={axis: size for axis, size in shape._asdict().items() if axis != "dim"},
        direction="step",
        cost=costs.clustering_head(*shape, shapes.DTYPE.itemsize),
        dim=shape.dim,
    )
