"""The attention kernels with packed tables: in the interpreter here, and once more where there is a GPU."""

import pytest
import torch
from numerics import assert_draws_as_accurate
from torch import Tensor

from capi_kernels import reference
from capi_kernels._attention_triton import operands
from capi_kernels._packed_attention_triton import PackedConfig, pack_tables, packed_backward, packed_forward

pytestmark = pytest.mark.usefixtures("guarded_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORWARD = {
    "one tile": PackedConfig(32, 32, 4),
    "kept tables": PackedConfig(32, 32, 4, heads=2, stages=2, keep=True),
    "halves": PackedConfig(32, 32, 4, heads=2, join=False),
    "unrolled": PackedConfig(16, 32, 4, unrolled=2),
    "loop": PackedConfig(16, 32, 4, unrolled=0, inner=2),
    "two pieces": PackedConfig(16, 16, 4, unrolled=0, second=16),
    "three pieces": PackedConfig(32, 16, 4, unrolled=0, tail=16),
    "tiled": PackedConfig(16, 16, 4, stages=2, by="tiles"),
    "keys first": PackedConfig(16, 32, 4, unrolled=2, heads=2, keep=True, keys_first=True),
    "keys first, halves": PackedConfig(16, 32, 4, unrolled=2, join=False, keys_first=True),
}
BACKWARD = {
    "one tile": PackedConfig(32, 32, 4, heads=2),
    "halves": PackedConfig(32, 32, 4, join=False, lean=True),
    "loop": PackedConfig(16, 32, 4, unrolled=0),
    "unrolled": PackedConfig(16, 32, 4, unrolled=2, read_o=True),
    "keys first": PackedConfig(16, 32, 4, unrolled=0, heads=2, keys_first=True),
    "keys first, halves": PackedConfig(16, 32, 4, unrolled=0, join=False, keys_first=True, read_o=True),
    "whole": PackedConfig(32, 32, 4, heads=2, stages=2, by="whole"),
    "whole, kept tables": PackedConfig(32, 32, 4, heads=2, keep=True, lean=True, by="whole"),
    "by keys": PackedConfig(32, 16, 4, by="keys"),
    "by keys, channels first": PackedConfig(32, 16, 4, by="keys", channels_first=True, lean=True, heads=2),
    "by keys, keys first": PackedConfig(32, 16, 4, by="keys", keys_first=True),
}
# One token, none, ragged tiles, exactly a tile of 16 or 32, one past it.
LENGTHS = (1, 0, 16, 17, 5, 32)


def draw(queries, keys, heads, head_dim, dtype, rotary, seed):
    """Queries of their own where keys differ; q, k, v, do, tables and where they lie."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [sum(queries), sum(keys)]
    qkv = torch.randn(max(tokens), 3, heads, head_dim, generator=generator).to(DEVICE, dtype)
    do = torch.randn(tokens[0], heads, head_dim, generator=generator).to(DEVICE, dtype)
    angles = [(40 * torch.randn(n, head_dim, generator=generator)).to(DEVICE) for n in tokens]
    if queries == keys:
        angles[1] = angles[0]
    tables = [f(angle) if rotary else None for angle in angles for f in (torch.cos, torch.sin)]
    q, k, v = qkv.unbind(1)
    cu_seqlens = [torch.tensor([0, *n]).cumsum(0).to(DEVICE, torch.int32) for n in (queries, keys)]
    return (q[: tokens[0]], k[: tokens[1]], v[: tokens[1]]), tables, cu_seqlens, (max(queries), max(keys)), do


def run(inputs, forward: PackedConfig, backward: PackedConfig) -> tuple[Tensor, ...]:
    """o, dq, dk, dv."""
    qkv, tables, cu_seqlens, lengths, do = inputs
    x = operands(*qkv, *tables, *cu_seqlens, None, *lengths, qkv[0].shape[-1] ** -0.5)
    packed = pack_tables(*tables[:2]), pack_tables(*tables[2:])
    out, stats = packed_forward(x, *packed, forward, self_attention=qkv[0].shape == qkv[1].shape)
    gradients = [torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in qkv]
    packed_backward(x, *packed, do, out, stats, *gradients, backward)
    return out, *gradients


def defined(inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    qkv, tables, cu_seqlens, lengths, do = inputs
    if dtype == torch.float64:
        tables = [x if x is None else x.double() for x in tables]
    qkv = [a.detach().to(dtype).requires_grad_() for a in qkv]
    out = reference.masked_cross_attention(*qkv, *tables, *cu_seqlens, *lengths)
    return out.detach(), *torch.autograd.grad(out, qkv, do.to(dtype))


def assert_accurate(queries, keys, head_dim, dtype, rotary, forward, backward, draws=6) -> None:
    compared = []
    for seed in range(draws):
        inputs = draw(queries, keys, 2, head_dim, dtype, rotary, seed)
        compared.append((run(inputs, forward, backward), defined(inputs, dtype), defined(inputs, torch.float64)))
    assert_draws_as_accurate(compared)


@pytest.mark.parametrize(("dtype", "rotary"), [(torch.float16, True), (torch.float32, False)])
@pytest.mark.parametrize("forward", FORWARD)
def test_forward(forward, dtype, rotary):
    assert_accurate(LENGTHS, LENGTHS, 16, dtype, rotary, FORWARD[forward], BACKWARD["one tile"])


@pytest.mark.parametrize(("dtype", "rotary"), [(torch.float16, True), (torch.float32, False)])
@pytest.mark.parametrize("backward", BACKWARD)
def test_backward(backward, dtype, rotary):
    forward = FORWARD["halves" if "halves" in backward else "one tile"]  # Scores added up in one order.
    assert_accurate(LENGTHS, LENGTHS, 16, dtype, rotary, forward, BACKWARD[backward])


@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize(
    ("forward", "backward"), [("loop", "by keys"), ("keys first", "keys first"), ("tiled", "whole")]
)
def test_head_dims(head_dim, forward, backward):
    assert_accurate((3, 20), (3, 20), head_dim, torch.float16, True, FORWARD[forward], BACKWARD[backward])


@pytest.mark.parametrize("forward", ["loop", "keys first", "three pieces", "tiled"])
@pytest.mark.parametrize("backward", ["keys first", "by keys, keys first", "loop"])
def test_other_queries_and_empty_contexts(forward, backward):
    assert_accurate((5, 32, 3, 0), (32, 7, 0, 4), 16, torch.float16, True, FORWARD[forward], BACKWARD[backward])
