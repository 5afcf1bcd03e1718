"""Position-wise Sinkhorn against the official formula, both from the logits before their temperature."""

import pytest

from benchmarks import costs, peers, shapes
from benchmarks.heads import enter_sinkhorn
from benchmarks.measure import OURS


@pytest.mark.parametrize("implementation", [OURS, *peers.OFFICIAL])
@pytest.mark.parametrize("shape", shapes.SINKHORN, ids=shapes.name)
def test_sinkhorn_positionwise(measure, shape: shapes.Logits, implementation: str) -> None:
    *sizes, _ = shape
    measure(
        lambda name: enter_sinkhorn(name, shape, shapes.DEVICE, shapes.DTYPE),
        op="sinkhorn_positionwise",
        shape={axis: size for axis, size in shape._asdict().items() if axis != "dim"},
        direction="forward",
        cost=costs.sinkhorn_positionwise(*sizes, shapes.DTYPE.itemsize),
    )
