"""The student's loss and its gradient together, against the official cross-entropy."""

import pytest

from benchmarks import costs, peers, shapes
from benchmarks.heads import enter_student_loss
from benchmarks.measure import OURS


@pytest.mark.parametrize("implementation", [OURS, *peers.OFFICIAL])
@pytest.mark.parametrize("shape", shapes.STUDENT_LOSS, ids=shapes.name)
def test_student_loss(measure, shape: shapes.Logits, implementation: str) -> None:
    itemsize = shapes.DTYPE.itemsize
    measure(
        lambda name: enter_student_loss(name, shape, shapes.DEVICE, shapes.DTYPE),
        op="student_loss",
        shape={axis: size for axis, size in shape._asdict().items() if axis != "dim"},
        direction="step",
        cost=costs.student_loss(shape.positions * shape.images, shape.prototypes, itemsize, itemsize),
    )
