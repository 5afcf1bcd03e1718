"""Self-attention over packed tokens, rotary embedding included, against general kernels after a separate one."""

import pytest

from benchmarks import costs, peers, shapes
from benchmarks.attention import attention_case
from benchmarks.measure import OURS


@pytest.mark.parametrize("implementation", [OURS, *peers.ATTENTION])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape", shapes.VISIBLE_ATTENTION, ids=shapes.name)
def test_visible_attention(measure, shape: shapes.SelfAttention, direction: str, implementation: str) -> None:
    images, tokens, heads, head_dim = shape
    case = attention_case(images, None, tokens, heads, head_dim, shapes.DEVICE, shapes.DTYPE)
    measure(
        lambda name: case.enter(name, direction),
        op="visible_attention",
        shape=shape._asdict(),
        direction=direction,
        cost=costs.attention(images, tokens, tokens, heads, head_dim, shapes.DTYPE.itemsize, direction),
    )
