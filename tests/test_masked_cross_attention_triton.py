"""The Triton kernels of `masked_cross_attention`: in the interpreter here, and once more where there is a GPU."""

from typing import NamedTuple

import pytest
import torch
import triton
from numerics import assert_draws_as_accurate
from torch import Tensor

from capi_kernels import reference
from capi_kernels.attention import configs, operands_triton
from capi_kernels.attention.configs import Config
from capi_kernels.attention.launch_triton import attention_backward, attention_forward
from capi_kernels.attention.memory_triton import count_readers, next_reader

pytestmark = pytest.mark.usefixtures("guarded_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRAWS = 8


class Inputs(NamedTuple):
    q: Tensor
    kv: Tensor  # [context, 2, heads, head_dim]
    tables: tuple[Tensor | None, ...]
    cu_seqlens: tuple[Tensor, Tensor]
    max_seqlens: tuple[int, int]
    kv_index: Tensor | None
    do: Tensor

    def in_dtype(self, dtype: torch.dtype) -> "Inputs":
        """Tables as the kernels read them: those of 16-bit inputs in half precision."""
        half = dtype in (torch.float16, torch.bfloat16)
        tables = [x if x is None else x.half().float() if half else x.to(dtype) for x in self.tables]
        return self._replace(q=self.q.to(dtype), kv=self.kv.to(dtype), tables=tables, do=self.do.to(dtype))


def packed_inputs(queries, contexts, heads, head_dim, dtype, *, kv_index=None, rotary=(True, True), seed=0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for lengths, embedded in zip((queries, contexts), rotary, strict=True):
        angle = (40 * torch.randn(sum(lengths), head_dim, generator=generator)).to(DEVICE)
        tables += [angle.cos(), angle.sin()] if embedded else [None, None]
    q, do = torch.randn(2, sum(queries), heads, head_dim, generator=generator).to(DEVICE, dtype).unbind(0)
    kv = torch.randn(sum(contexts), 2, heads, head_dim, generator=generator).to(DEVICE, dtype)
    cu_seqlens = [torch.tensor([0, *n]).cumsum(0).to(DEVICE, torch.int32) for n in (queries, contexts)]
    index = None if kv_index is None else torch.tensor(kv_index, device=DEVICE)
    return Inputs(q, kv, tuple(tables), tuple(cu_seqlens), (max(queries), max(contexts)), index, do)


def run(x: Inputs, scale: float | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, dq, dk, dv."""
    scale = x.q.shape[-1] ** -0.5 if scale is None else scale
    given = (x.q, *x.kv.unbind(1), *x.tables)
    where = (*x.cu_seqlens, x.kv_index, *x.max_seqlens, scale)
    out, stats = attention_forward(*given, *where)
    dq, dkv = attention_backward(x.do, out, stats, *given, *where, parts=[1, 2])
    return out, dq.squeeze(1), *dkv.unbind(1)


def defined(x: Inputs, dtype: torch.dtype, scale: float | None = None) -> tuple[Tensor, ...]:
    x = x.in_dtype(dtype)
    q, k, v = (part.detach().requires_grad_() for part in (x.q, *x.kv.unbind(1)))
    out = reference.masked_cross_attention(
        q, k, v, *x.tables, *x.cu_seqlens, *x.max_seqlens, kv_index=x.kv_index, scale=scale
    )
    return out.detach(), *torch.autograd.grad(out, (q, k, v), x.do)


def draw(*arguments, draws=DRAWS, **options) -> list[Inputs]:
    return [packed_inputs(*arguments, **options, seed=seed) for seed in range(draws)]


def assert_accurate(draws: list[Inputs], scale: float | None = None) -> None:
    """o, dq, dk and dv."""
    types = ((x, x.q.dtype, torch.float64) for x in draws)
    assert_draws_as_accurate((run(x, scale), *(defined(x, dtype, scale) for dtype in pair)) for x, *pair in types)


def assert_same_bits(actual, expected) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


# Of short contexts, forward and backward, where another kernel is not made to do them.
ROUTES = {
    "few": (Config(32, 32, 4, keys_first=True), Config(32, 32, 4, keys_first=True)),
    "one tile": (Config(16, 32, 4), Config(16, 32, 4)),
    "tiled": (None, None),
}


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch) -> str:
    """Every dtype and length through one set of kernels, in tiles small enough for short sequences to fill some."""
    forward, backward = ROUTES[request.param]
    resident = Config(16, 32, 4) if forward else None
    monkeypatch.setattr(configs, "short_forward", lambda *_: forward)
    monkeypatch.setattr(configs, "short_backward", lambda *x: None if x[4] else backward)
    monkeypatch.setattr(configs, "resident_backward", lambda *_: resident)
    for name in ("tiled_forward", "tiled_dq", "tiled_dkdv"):
        monkeypatch.setattr(configs, name, lambda *_: Config(16, 16, 4))
    return request.param


# No queries, one, some, a tile, one past it; no keys, one, ragged, a tile of 16 or 32, one past it.
QUERIES = (8, 0, 1, 16, 17, 2)
CONTEXTS = (21, 16, 1, 32, 17, 0)


def tables_of(route: str, dtype: torch.dtype) -> tuple[bool, bool]:
    """Short contexts read them in half precision, which in float32 would show."""
    return (dtype == torch.float16 or route == "tiled",) * 2


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 16), (torch.float16, 40), (torch.float16, 64)])
def test_output_and_gradients(route, dtype, head_dim):
    rotary = tables_of(route, dtype)
    assert_accurate(draw(QUERIES, CONTEXTS, 1, head_dim, dtype, rotary=rotary, draws=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_groups_choose_their_contexts(route, dtype):
    """Three groups read one context, two a second out of order; two contexts are read by nobody."""
    draws = draw(
        (3, 8, 0, 17, 2, 5),
        (9, 20, 17, 32, 4),
        1,
        16,
        dtype,
        kv_index=(3, 1, 3, 3, 0, 1),
        rotary=tables_of(route, dtype),
        draws=3,
    )
    assert_accurate(draws)
    x = draws[0]
    _, _, dk, dv = run(x)
    for context in (2, 4):
        unread = slice(x.cu_seqlens[1][context], x.cu_seqlens[1][context + 1])
        assert not dk[unread].any()
        assert not dv[unread].any()


@pytest.mark.parametrize("rotary", [(False, False), (True, False), (False, True)])
def test_tables_on_either_side(route, rotary):
    assert_accurate(draw((15, 18), (20, 5), 1, 16, torch.float16, rotary=rotary, draws=4), scale=0.3)


def test_odd_heads(route):
    assert_accurate(draw((16,), (20,), 1, 7, torch.float32, rotary=(False, False)))


@pytest.mark.parametrize(("queries", "keys"), [(8, 33), (8, 106), (33, 65), (166, 128), (3, 129)])
def test_default_configurations(queries, keys):
    """Those of the product among them: 8 or 166 queries over 106 or 128 keys."""
    assert_accurate(draw((queries, 2), (keys, 7), 1, 64, torch.float16, draws=2))


def test_wide_heads():
    assert_accurate(draw((8,), (33,), 1, 80, torch.float16, draws=4))


def exact(route: str) -> torch.dtype:
    """That of scores in the hundreds: to exponents of that size the kernels of half precision owe no more."""
    return torch.float32 if route == "tiled" else torch.float16


def test_lifted_scores(route):
    """All scores lifted by 100: exponentials must be taken after the maximum, in the backward too."""
    draws = draw((20, 2), (9, 31), 1, 16, exact(route), rotary=(False, False))
    for x in draws:
        x.q[..., 0] = 400
        x.kv[:, 0, :, 0] = 1  # Not more: dq has 0 here, a sum of rounded dS times k.
    assert_accurate(draws)


def test_large_scores(route):
    """Scores of hundreds: of one group most rows have all their weight on one key, of the other on two alike."""
    draws = draw((20, 31), (32, 17), 1, 16, exact(route), rotary=(False, False))
    for x in draws:
        x.q.mul_(10 * (torch.arange(51, device=DEVICE) % 11)[:, None, None])
        x.kv[:32:2, 0] = x.kv[1:32:2, 0]
        for q, k, weight in (x.q[:20, 0], x.kv[:32, 0, 0], 0.5), (x.q[20:, 0], x.kv[32:, 0, 0], 1.0):
            scores = q.float() @ k.float().T / 4
            assert scores.max() > 100
            distance = (scores.softmax(1).amax(1) - weight).abs()
            assert (distance < 1e-6).sum() >= 4
            assert (distance > 1e-3).sum() >= 4
    assert_accurate(draws)


def test_queries_do_not_see_each_other(route):
    """Any subset of the queries of a group gets the same bits."""
    x = packed_inputs((20,), (17,), 1, 16, torch.float32)
    out, dq, *_ = run(x)
    kept = torch.tensor([19, 3, 4], device=DEVICE)
    fewer = x._replace(
        q=x.q[kept],
        tables=(x.tables[0][kept], x.tables[1][kept], *x.tables[2:]),
        cu_seqlens=(torch.tensor([0, 3], dtype=torch.int32, device=DEVICE), x.cu_seqlens[1]),
        do=x.do[kept],
    )
    assert_same_bits(run(fewer)[:2], (out[kept], dq[kept]))


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(("dtype", "above"), [(torch.float32, 24), (torch.float16, 7)])
def test_gradients_of_saturated_rows(route, dtype, above, indexed):
    """Nearly all weight on one key, so many nats above: of dP - rowsum(P dP) there, no rounding may be left."""
    if route == "tiled" and dtype == torch.float16:
        pytest.skip("takes rowsum(P dP) from the rounded output")
    draws = draw((16, 16), (16, 16), 1, 16, dtype, rotary=(False, False), kv_index=(0, 1) if indexed else None)
    for x in draws:
        for q, k in zip(x.q.split(16), x.kv[:, 0].split(16), strict=True):
            k[:, 0] = 4 * torch.linalg.qr(k[:, 0].float())[0]
            q.copy_(above / 4 * k)
    assert_accurate(draws)


def test_short_forward_with_the_tiled_backward(monkeypatch):
    """As contexts of 129 to 320 tokens have it; one group has none."""
    monkeypatch.setattr(configs, "short_forward", lambda *_: Config(16, 32, 4))
    monkeypatch.setattr(configs, "short_backward", lambda *_: None)
    monkeypatch.setattr(configs, "resident_backward", lambda *_: None)
    assert_accurate(draw((17, 1), (9, 0), 1, 16, torch.float16))


def test_heads_share_a_program(monkeypatch):
    """Four heads a program, of queries and keys in one place, give the bits of one."""
    config = Config(32, 32, 4, heads=4, num_stages=2)
    monkeypatch.setattr(configs, "short_backward", lambda *_: config)
    x = packed_inputs((9, 20), (9, 20), 4, 16, torch.float16)
    x = x._replace(tables=x.tables[:2] * 2, cu_seqlens=x.cu_seqlens[:1] * 2)
    assert operands_triton.ENOUGH_PROGRAMS > 8
    expected = run(x)
    monkeypatch.setattr(operands_triton, "ENOUGH_PROGRAMS", 1)
    assert_same_bits(run(x), expected)


def test_kv_index_is_a_gather(route, monkeypatch):
    """Reading contexts through the index gives the bits of contexts copied in its order, by the same kernels."""
    monkeypatch.setattr(configs, "short_backward", lambda *_: None)
    x = packed_inputs((3, 8), (9, 20, 17), 2, 16, torch.float32, kv_index=(2, 0))
    out, dq, dk, dv = run(x)
    starts = x.cu_seqlens[1].tolist()
    tokens = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in (2, 0)]).to(DEVICE)
    copied = x._replace(
        kv=x.kv[tokens],
        tables=(*x.tables[:2], x.tables[2][tokens], x.tables[3][tokens]),
        cu_seqlens=(x.cu_seqlens[0], torch.tensor([0, 17, 26], dtype=torch.int32, device=DEVICE)),
        kv_index=None,
    )
    assert_same_bits(run(copied), (out, dq, dk[tokens], dv[tokens]))


def test_permuting_groups_permutes_outputs(route):
    x = packed_inputs((3, 8, 1), (9, 20, 17), 1, 16, torch.float16, kv_index=(2, 0, 1))
    out, dq, dk, dv = run(x)
    tokens = torch.tensor([*range(3, 11), 11, *range(3)], device=DEVICE)
    permuted = x._replace(
        q=x.q[tokens],
        tables=(x.tables[0][tokens], x.tables[1][tokens], *x.tables[2:]),
        cu_seqlens=(torch.tensor([0, 8, 9, 12], dtype=torch.int32, device=DEVICE), x.cu_seqlens[1]),
        kv_index=x.kv_index[[1, 2, 0]],
        do=x.do[tokens],
    )
    assert_same_bits(run(permuted), (out[tokens], dq[tokens], dk, dv))


def test_int32_index_and_any_strides_give_the_same_bits(route):
    x = packed_inputs((3, 18), (9, 20), 2, 16, torch.float32, kv_index=(1, 1))
    strided = x._replace(
        q=torch.stack([x.q, x.q + 1], -1)[..., 0],
        kv=x.kv.transpose(0, 2).contiguous().transpose(0, 2),
        do=torch.cat([x.do, x.do], -1)[..., :16],
        kv_index=x.kv_index.int(),
    )
    assert_same_bits(run(strided), run(x._replace(kv=x.kv.contiguous())))


def test_same_bits_twice(route):
    x = packed_inputs((3, 18, 5), (9, 20), 2, 16, torch.float16, kv_index=(1, 0, 1))
    assert_same_bits(run(x), run(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_to_do(dtype):
    x = packed_inputs((0, 0), (5, 3), 2, 16, dtype)
    out, dq, dk, dv = run(x)
    assert out.shape == dq.shape == (0, 2, 16)
    assert not dk.any()
    assert not dv.any()


def test_short_contexts_stay_on_chip():
    for queries, keys in ((1, 1), (8, 106), (166, 106), (256, 128)):
        assert configs.short_forward(torch.bfloat16, 64, queries, keys, 90) is not None
        assert configs.short_backward(torch.bfloat16, 64, queries, keys, False, 90) is not None
        assert configs.short_backward(torch.bfloat16, 64, queries, keys, True, 90) is None
        assert configs.resident_backward(torch.bfloat16, 64, keys, 90) is not None


@triton.jit
def readers_kernel(kv_index_ptr, out_ptr, groups, context):
    """Lists the groups that read a context, in order, and how many they are."""
    readers = count_readers(kv_index_ptr, groups, context)
    group = -1
    for i in range(readers):
        group = next_reader(kv_index_ptr, groups, context, group)
        triton.language.store(out_ptr + 1 + i, group)
    triton.language.store(out_ptr, readers)


def test_readers_of_many_groups():
    """More groups than one block of indices."""
    kv_index = torch.randint(0, 300, (2500,), generator=torch.Generator().manual_seed(0))
    kv_index[[0, 1023, 1024, 2048, 2499]] = 7
    expected = (kv_index == 7).nonzero().flatten()
    out = torch.full((100,), -1, dtype=torch.int32, device=DEVICE)
    readers_kernel[(1,)](kv_index.to(DEVICE), out, 2500, 7)
    assert out[0] == len(expected)
    assert torch.equal(out[1 : 1 + len(expected)].cpu().long(), expected)
    assert (out[1 + len(expected) :] == -1).all()


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("queries", [1, 8, 33, 166, 256])
@pytest.mark.parametrize("keys", [33, 106, 272])
def test_on_a_gpu(dtype, head_dim, queries, keys):
    assert_accurate(draw((queries,) * 4, (keys, 5, keys), 4, head_dim, dtype, kv_index=(2, 0, 0, 1)))


@gpu
@pytest.mark.parametrize(("heads", "head_dim"), [(16, 64), (12, 64), (6, 64), (12, 32), (16, 128)])
@pytest.mark.parametrize("queries", [8, 100, 166])
def test_shapes_of_the_predictor_on_a_gpu(heads, head_dim, queries):
    """As many images as fill a GPU, the first and the last against the definition."""
    x = packed_inputs((queries,) * 512, (106,) * 512, heads, head_dim, torch.bfloat16)
    first = run(x)
    assert_same_bits(run(x), first)
    for start in (0, 504):
        of_q, of_k = (slice(start * n, (start + 8) * n) for n in (queries, 106))
        one = x._replace(
            q=x.q[of_q],
            kv=x.kv[of_k],
            tables=(x.tables[0][of_q], x.tables[1][of_q], x.tables[2][of_k], x.tables[3][of_k]),
            cu_seqlens=(x.cu_seqlens[0][:9], x.cu_seqlens[1][:9]),
            do=x.do[of_q],
        )
        actual = [a[part] for a, part in zip(first, (of_q, of_q, of_k, of_k), strict=True)]
        assert_draws_as_accurate([(actual, *(defined(one, dtype) for dtype in (torch.bfloat16, torch.float64)))])


@gpu
def test_more_elements_than_an_int32_counts():
    """The last group over a context of 2^31 elements, against that group alone."""
    heads, head_dim, keys = 16, 64, 100
    count = 2**31 // (2 * heads * head_dim * keys) + 2
    for n in (8, 40):
        few = packed_inputs((n,), (keys,), heads, head_dim, torch.bfloat16)
        expected = run(few)
        steps = torch.arange(count + 1, dtype=torch.int32, device=DEVICE)
        many = few._replace(
            q=few.q.repeat(count, 1, 1),
            kv=few.kv.repeat(count, 1, 1, 1),
            tables=[t.repeat(count, 1) for t in few.tables],
            cu_seqlens=(steps * n, steps * keys),
            do=few.do.repeat(count, 1, 1),
        )
        assert many.kv.numel() > 2**31
        for a, b in zip(run(many), expected, strict=True):
            assert torch.equal(a[-len(b) :], b)


@gpu
def test_random_ragged_batches_on_a_gpu():
    for batch in range(125):
        most_queries, most_keys = ((16, 64), (16, 128), (100, 128), (100, 300))[batch % 4]
        dtype, indexed = (torch.bfloat16, torch.float16)[batch // 4 % 2], batch % 3
        draws = []
        for seed in range(8 * batch, 8 * batch + 8):
            generator = torch.Generator().manual_seed(seed)
            queries = [*torch.randint(0, most_queries + 1, (6,), generator=generator).tolist(), 1]
            contexts = [*torch.randint(0, most_keys + 1, (6,), generator=generator).tolist(), 1]
            kv_index = torch.randint(0, 7, (7,), generator=generator).tolist() if indexed else None
            draws.append(packed_inputs(queries, contexts, 1 + seed % 3, 64, dtype, kv_index=kv_index, seed=seed))
        assert_accurate(draws)
        for x in draws:
            assert_same_bits(run(x), run(x))
