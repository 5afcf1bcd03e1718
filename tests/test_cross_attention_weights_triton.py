"""The Triton kernels of `cross_attention_weights`: in the interpreter here, and once more where there is a GPU."""

import math
from typing import NamedTuple

import pytest
import torch
from numerics import assert_as_accurate
from torch import Tensor

from capi_kernels import reference
from capi_kernels.attention import configs, operands_triton, weights_triton
from capi_kernels.attention.configs import Config
from capi_kernels.attention.weights_triton import weights_backward, weights_forward

pytestmark = pytest.mark.usefixtures("guarded_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    tables: tuple[Tensor | None, ...]
    cu_seqlens: tuple[Tensor, Tensor]
    kv_index: Tensor | None
    max_seqlens: tuple[int, int]
    dweights: Tensor

    def in_dtype(self, dtype: torch.dtype) -> "Inputs":
        tables = tuple(x if x is None or dtype != torch.float64 else x.double() for x in self.tables)
        return self._replace(q=self.q.to(dtype), k=self.k.to(dtype), tables=tables, dweights=self.dweights.to(dtype))


def inputs(queries, contexts, heads, head_dim, dtype, *, kv_index=None, rotary=(True, True), slack=0, seed=0) -> Inputs:
    """q and k are views of packed projections; the gradient of the weights is NaN at padding."""
    generator = torch.Generator().manual_seed(seed)
    projections, tables, cu_seqlens = [], [], []
    for lengths, embedded in zip((queries, contexts), rotary, strict=True):
        angle = (40 * torch.randn(sum(lengths), head_dim, generator=generator)).to(DEVICE)
        tables += [angle.cos(), angle.sin()] if embedded else [None, None]
        projection = torch.randn(sum(lengths), 2, heads, head_dim, generator=generator)
        projections.append(projection.to(DEVICE, dtype)[:, 1])
        cu_seqlens.append(torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32))
    max_seqlens = max(queries) + slack, max(contexts) + slack
    dweights = torch.randn(len(queries), heads, *max_seqlens, generator=generator)
    for group, n in enumerate(queries):
        dweights[group, :, n:] = math.nan
        dweights[group, :, :, contexts[group if kv_index is None else kv_index[group]] :] = math.nan
    index = None if kv_index is None else torch.tensor(kv_index, device=DEVICE)
    dweights = dweights.to(DEVICE, dtype)
    return Inputs(*projections, tuple(tables), tuple(cu_seqlens), index, max_seqlens, dweights)


def run(x: Inputs, scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """P, dq, dk."""
    scale = x.q.shape[-1] ** -0.5 if scale is None else scale
    operands = (x.q, x.k, *x.tables, *x.cu_seqlens, x.kv_index, *x.max_seqlens, scale)
    weights = weights_forward(*operands)
    return weights, *weights_backward(x.dweights, weights, *operands)


def defined(x: Inputs, dtype: torch.dtype, scale: float | None = None) -> tuple[Tensor, ...]:
    x = x.in_dtype(dtype)
    q, k = (part.detach().requires_grad_() for part in (x.q, x.k))
    out = reference.cross_attention_weights(
        q, k, *x.tables, *x.cu_seqlens, *x.max_seqlens, kv_index=x.kv_index, scale=scale
    )
    return out.detach(), *torch.autograd.grad(out, (q, k), x.dweights.nan_to_num(0))


def assert_accurate(x: Inputs, scale: float | None = None) -> None:
    for parts in zip(run(x, scale), defined(x, x.q.dtype, scale), defined(x, torch.float64, scale), strict=True):
        assert_as_accurate(*parts)


def assert_same_bits(actual, expected) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def kernels(monkeypatch) -> None:
    """Every dtype through the kernels, in tiles small enough for short sequences to fill some."""
    monkeypatch.setattr(configs, "weights_backward", lambda *_: Config(16, 32, 4))


# No queries, one, some, a tile, one past it; no keys, one, ragged, a tile of 32, one less.
QUERIES = (8, 0, 1, 16, 17, 2)
CONTEXTS = (21, 16, 1, 32, 31, 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 16), (1, 40), (1, 64)])
def test_weights_and_gradients(kernels, dtype, heads, head_dim, seed):
    assert_accurate(inputs(QUERIES, CONTEXTS, heads, head_dim, dtype, seed=seed))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_groups_choose_their_contexts(kernels, dtype, seed):
    """Three groups read one context, two a second out of order; two contexts are read by nobody."""
    lengths = (3, 8, 0, 17, 2, 5), (9, 20, 17, 32, 4)
    x = inputs(*lengths, 2, 16, dtype, kv_index=(3, 1, 3, 3, 0, 1), slack=1, seed=seed)
    x = x._replace(max_seqlens=(18, 32), dweights=x.dweights[..., :32])  # One query of slack, and strides.
    assert_accurate(x)
    dk = run(x)[2]
    for context in (2, 4):
        assert not dk[x.cu_seqlens[1][context] : x.cu_seqlens[1][context + 1]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_padding_is_zero_and_rows_are_aligned(kernels, dtype):
    x = inputs(QUERIES, CONTEXTS, 2, 16, dtype)
    weights = run(x)[0]
    assert torch.equal(weights == 0, x.dweights.isnan())
    assert weights.stride()[1:] == (32, 2 * 32, 1)
    rows = weights.float().sum(-1)
    torch.testing.assert_close(rows, (rows > 0).float(), rtol=0, atol=32 * torch.finfo(dtype).eps)
    assert inputs((2,), (21,), 1, 16, dtype).dweights.stride(2) == 21
    assert run(inputs((2,), (21,), 1, 16, dtype))[0].stride(2) == 32


@pytest.mark.parametrize("rotary", [(False, False), (True, False), (False, True)])
def test_tables_on_either_side(kernels, rotary):
    for seed in range(3):
        assert_accurate(inputs((3, 18), (20, 5), 1, 16, torch.float32, rotary=rotary, seed=seed), scale=0.3)


def test_odd_heads(kernels):
    assert_accurate(inputs((3,), (20,), 1, 7, torch.float32, rotary=(False, False)))


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize(("queries", "keys"), [(8, 64), (8, 65), (8, 106), (33, 128)])
def test_default_configurations(queries, keys, head_dim):
    assert configs.weights_backward(torch.float16, head_dim, keys, 90) is not None
    assert_accurate(inputs((queries, 2), (keys, 7), 1, head_dim, torch.float16))


@pytest.mark.parametrize(("keys", "dtype"), [(129, torch.float16), (20, torch.float32), (300, torch.float32)])
def test_longer_contexts_and_float32_are_left_to_pytorch(keys, dtype):
    x = inputs((3, 0, 2, 1), (keys, 0, 5), 2, 16, dtype, kv_index=(2, 0, 0, 1))
    assert configs.weights_backward(dtype, 16, keys, 90) is None
    assert_accurate(x)
    assert run(x)[0].stride(2) % 16 == 0


def test_large_scores(kernels):
    """All scores lifted by 100: exponentials must be taken after the maximum."""
    x = inputs((20, 2), (9, 31), 1, 16, torch.float32, rotary=(False, False))
    x.q[..., 0] = 20
    x.k[..., 0] = 20
    assert_accurate(x)


def test_queries_do_not_see_each_other(kernels):
    """Any subset of the queries of a group gets the same bits."""
    x = inputs((20,), (17,), 1, 16, torch.float32)
    weights, dq, _ = run(x)
    kept = torch.tensor([19, 3, 4], device=DEVICE)
    fewer = x._replace(
        q=x.q[kept],
        tables=(x.tables[0][kept], x.tables[1][kept], *x.tables[2:]),
        cu_seqlens=(torch.tensor([0, 3], dtype=torch.int32, device=DEVICE), x.cu_seqlens[1]),
        max_seqlens=(3, 17),
        dweights=x.dweights[:, :, kept],
    )
    assert_same_bits(run(fewer)[:2], (weights[:, :, kept], dq[kept]))


def test_heads_share_a_program(kernels, monkeypatch):
    x = inputs((3, 18), (9, 20), 6, 16, torch.float32, kv_index=(1, 0))
    expected = run(x)
    monkeypatch.setattr(operands_triton, "ENOUGH_PROGRAMS", 1)
    assert_same_bits(run(x), expected)


def test_kv_index_is_a_gather(kernels):
    """Reading contexts through the index gives the bits of contexts copied in its order."""
    x = inputs((3, 8), (9, 20, 17), 2, 16, torch.float32, kv_index=(2, 0))
    weights, dq, dk = run(x)
    starts = x.cu_seqlens[1].tolist()
    tokens = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in (2, 0)]).to(DEVICE)
    copied = x._replace(
        k=x.k[tokens],
        tables=(*x.tables[:2], x.tables[2][tokens], x.tables[3][tokens]),
        cu_seqlens=(x.cu_seqlens[0], torch.tensor([0, 17, 26], dtype=torch.int32, device=DEVICE)),
        kv_index=None,
    )
    assert_same_bits(run(copied), (weights, dq, dk[tokens]))


def test_any_strides_and_an_int32_index_give_the_same_bits(kernels):
    x = inputs((3, 18), (9, 20), 2, 16, torch.float32, kv_index=(1, 1))
    expected = run(x._replace(q=x.q.contiguous(), k=x.k.contiguous()))
    strided = x._replace(
        q=torch.stack([x.q, x.q + 1], -1)[..., 0],
        k=x.k.transpose(0, 1).contiguous().transpose(0, 1),
        kv_index=x.kv_index.int(),
    )
    for dweights in (x.dweights.mT.contiguous().mT, x.dweights.transpose(0, 2).contiguous().transpose(0, 2)):
        assert_same_bits(run(strided._replace(dweights=dweights)), expected)
    expanded = x._replace(dweights=x.dweights[:, :1, :1].nan_to_num(1).expand_as(x.dweights))
    assert_same_bits(run(expanded), run(expanded._replace(dweights=expanded.dweights.contiguous())))


def test_rows_too_far_apart_are_copied(monkeypatch):
    monkeypatch.undo()  # A copy of a meta tensor takes options that guarded memory has not.
    near, far = (torch.empty_strided((2, 3, 256, 8), (8, 8, n, 1), device="meta") for n in (2**23 - 1, 2**23))
    assert weights_triton.as_rows(near) is near
    assert weights_triton.as_rows(far).stride() == (3 * 256 * 8, 256 * 8, 8, 1)


def test_same_bits_twice(kernels):
    x = inputs((3, 18, 5), (9, 20), 2, 16, torch.float16, kv_index=(1, 0, 1))
    assert_same_bits(run(x), run(x))


def test_nothing_to_do(kernels):
    weights, dq, dk = run(inputs((0, 0), (5, 3), 2, 16, torch.float32))
    assert weights.shape == (2, 2, 0, 5)
    assert dq.shape == (0, 2, 16)
    assert not dk.any()
    weights, dq, dk = run(inputs((3,), (0,), 2, 16, torch.float32))
    assert weights.shape == (1, 2, 3, 0)
    assert not dq.any()
    assert dk.shape == (0, 2, 16)


def test_what_no_kernel_does_is_refused():
    with pytest.raises(ValueError, match="head_dim must be at most 128, got 144"):
        run(inputs((2,), (3,), 1, 144, torch.float32))


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128])
@pytest.mark.parametrize("queries", [1, 8, 33])
@pytest.mark.parametrize("keys", [33, 106, 128, 272])
def test_on_a_gpu(dtype, head_dim, queries, keys):
    for seed in range(3):
        x = inputs((queries,) * 4, (keys, 5, keys), 4, head_dim, dtype, kv_index=(2, 0, 0, 1), seed=seed)
        assert_accurate(x)
        assert_same_bits(run(x), run(x))
