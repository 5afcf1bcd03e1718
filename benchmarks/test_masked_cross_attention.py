"""Cross-attention from packed queries, rotary embedding included, against general kernels after a separate one."""

import pytest

from benchmarks import costs, peers, shapes
from benchmarks.attention import attention_case
from benchmarks.measure import OURS


@pytest.mark.parametrize("implementation", [OURS, *peers.ATTENTION])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape", shapes.MASKED_CROSS_ATTENTION, ids=shapes.name)
def test_masked_cross_attention(measure, shape: shapes.CrossAttention, direction: str, implementation: str) -> None:
    images, queries, keys, heads, head_dim = shape
    case = attention_case(images, queries, keys, heads, head_dim, shapes.DEVICE, shapes.DTYPE)
    measure(
        lambda name: case.enter(name, direction),
        op="masked_cross_attention",
        shape=shape._asdict(),
        direction=direction,
        cost=costs.attention(images, queries, keys, heads, head_dim, shapes.DTYPE.itemsize, direction),
    )
