"""The Triton kernels of `visible_attention`: in the interpreter here, and once more where there is a GPU."""

import math
from itertools import product

import pytest
import torch
from numerics import assert_draws_as_accurate
from torch import Tensor

from capi_kernels import reference
from capi_kernels.attention import configs, operands_triton
from capi_kernels.attention.configs import Config
from capi_kernels.attention.launch_triton import attention_backward, attention_forward

pytestmark = pytest.mark.usefixtures("guarded_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of short images, forward and backward, where another kernel is not made to do them.
ROUTES = {
    "one tile": (Config(16, 32, 4), Config(32, 32, 4, heads=4)),
    "two tiles": (Config(16, 16, 4, tail=16), Config(16, 32, 4)),
    "resident": (Config(32, 32, 4), None),
    "tiled": (None, None),
}
# An empty image, one token, ragged tiles, exactly a tile of 16 or 32, one past it.
LENGTHS = (0, 1, 16, 17, 5, 32, 0)
DRAWS = 8


def packed_inputs(lengths, heads, head_dim, dtype, *, rotary=True, seed=0):
    """One projection, tables with an angle for each channel, cu_seqlens, max_seqlen and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    projection = torch.randn(tokens, 3, heads, head_dim, generator=generator).to(DEVICE, dtype)
    angle = 40 * torch.randn(tokens, head_dim, generator=generator)
    cos, sin = angle.cos().to(DEVICE), angle.sin().to(DEVICE)
    do = torch.randn(tokens, heads, head_dim, generator=generator).to(DEVICE, dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    tables = (cos, sin) if rotary else (None, None)
    return projection, tables, cu_seqlens, max(lengths), do


def run(projection, tables, cu_seqlens, max_seqlen, do, scale=None) -> tuple[Tensor, Tensor]:
    scale = projection.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = projection.unbind(1)
    operands = (q, k, v, *tables * 2, cu_seqlens, cu_seqlens, None, max_seqlen, max_seqlen, scale)
    out, stats = attention_forward(*operands)
    (dqkv,) = attention_backward(do, out, stats, *operands, parts=[3])
    return out, dqkv


def defined(projection, tables, cu_seqlens, max_seqlen, do, dtype, scale=None) -> tuple[Tensor, Tensor]:
    """The reference and its gradient, in a floating type."""
    projection = projection.detach().to(dtype).requires_grad_()
    if tables[0] is not None and dtype == torch.float64:
        tables = [table.double() for table in tables]
    out = reference.visible_attention(*projection.unbind(1), *tables, cu_seqlens, max_seqlen, scale=scale)
    return out.detach(), torch.autograd.grad(out, projection, do.to(dtype))[0]


def as_read(tables: tuple, dtype: torch.dtype) -> tuple:
    """The kernels read the tables of 16-bit inputs in half precision."""
    if tables[0] is None or dtype == torch.float32:
        return tables
    return tuple(table.half().to(table.dtype) for table in tables)


def draw(*arguments, draws=DRAWS, **options) -> list[tuple]:
    return [packed_inputs(*arguments, **options, seed=seed) for seed in range(draws)]


def assert_accurate(draws: list[tuple], scale=None) -> None:
    """o, dq, dk and dv, which have sizes of their own."""
    compared = []
    for inputs in draws:
        versions = [run(*inputs, scale=scale)]
        projection, tables, *rest = inputs
        versions.append(defined(projection, as_read(tables, projection.dtype), *rest, projection.dtype, scale=scale))
        versions.append(defined(*inputs, torch.float64, scale=scale))
        compared.append([(out, *dqkv.unbind(1)) for out, dqkv in versions])
    assert_draws_as_accurate(compared)


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch) -> str:
    """Every dtype and length through one set of kernels, in tiles small enough for short sequences to fill some."""
    forward, backward = ROUTES[request.param]
    resident = Config(16, 32, 4) if request.param == "resident" else None
    monkeypatch.setattr(configs, "short_forward", lambda *_: forward)
    monkeypatch.setattr(configs, "short_backward", lambda *_: backward)
    monkeypatch.setattr(configs, "resident_backward", lambda *_: resident)
    for name in ("tiled_forward", "tiled_dq", "tiled_dkdv"):
        monkeypatch.setattr(configs, name, lambda *_: Config(16, 16, 4))
    return request.param


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 16), (torch.float16, 40), (torch.float16, 64)])
def test_output_and_gradients(route, dtype, head_dim):
    """In float32 a scale off by a thousandth would show; the tables of short images are in half precision."""
    rotary = dtype == torch.float16 or route == "tiled"
    assert_accurate(draw(LENGTHS, 1, head_dim, dtype, rotary=rotary, draws=3))


@pytest.mark.parametrize("head_dim", [7, 16])
def test_without_tables(route, head_dim):
    assert_accurate(draw((3, 18), 1, head_dim, torch.float32, rotary=False), scale=0.3)


def exact(route: str) -> torch.dtype:
    """That of scores in the hundreds: to exponents of that size the kernels of half precision owe no more."""
    return torch.float16 if route in ("one tile", "two tiles") else torch.float32


def test_lifted_scores(route):
    """All scores lifted by 100: exponentials must be taken after the maximum, in the backward too."""
    draws = draw((20, 2), 1, 16, exact(route), rotary=False)
    for projection, *_ in draws:
        projection[:, 0, :, 0] = 400
        projection[:, 1, :, 0] = 1  # Not more: dq has 0 here, a sum of rounded dS times k.
    assert_accurate(draws)


def test_large_scores(route):
    """Scores of hundreds: of one image most rows have all their weight on one key, of the other on two alike."""
    draws = draw((20, 2, 31), 1, 16, exact(route), rotary=False)
    for projection, *_ in draws:
        projection[:, 0] *= 10 * (torch.arange(53, device=DEVICE) % 11)[:, None, None]
        projection[:20:2, 1] = projection[1:20:2, 1]
        for image, weight in (projection[:20, :, 0], 0.5), (projection[22:, :, 0], 1.0):
            scores = image[:, 0].float() @ image[:, 1].float().T / 4
            assert scores.max() > 100
            distance = (scores.softmax(1).amax(1) - weight).abs()
            assert (distance < 1e-6).sum() >= 4
            assert (distance > 1e-3).sum() >= 4
    assert_accurate(draws)


@pytest.mark.parametrize(("dtype", "above"), [(torch.float32, 24), (torch.float16, 7)])
def test_gradients_of_saturated_rows(route, dtype, above):
    """Nearly all weight on one key, so many nats above: of dP - rowsum(P dP) there, no rounding may be left."""
    if route == "tiled" and dtype == torch.float16:
        pytest.skip("takes rowsum(P dP) from the rounded output")
    draws = draw((16, 16), 1, 16, dtype, rotary=False)
    for projection, *_ in draws:
        for image in projection.split(16):
            image[:, 1, 0] = 4 * torch.linalg.qr(image[:, 1, 0].float())[0]
            image[:, 0] = above / 4 * image[:, 1]
    assert_accurate(draws)


@pytest.mark.parametrize(
    ("max_seqlen", "dtype"), [(n, torch.float16) for n in (20, 65, 129, 272)] + [(33, torch.float32)]
)
def test_default_configurations(max_seqlen, dtype):
    """What is launched for a bound on the lengths, whatever it is, with heads that no four divide."""
    draws = draw((max_seqlen, 4), 1, 64, dtype, draws=2)
    assert_accurate([(*tensors, max_seqlen, do) for *tensors, _, do in draws])


def test_product_shapes():
    """The default configurations of both directions for the tokens that a student's image keeps, and a full tile."""
    assert_accurate(draw((106, 128), 1, 64, torch.float16, draws=2))


def test_wide_heads():
    assert_accurate(draw((33,), 1, 80, torch.float16, draws=3))


def test_heads_share_a_program(route, monkeypatch):
    """Six heads, three a program: each as if alone."""
    monkeypatch.setattr(operands_triton, "ENOUGH_PROGRAMS", 1)
    projection, tables, cu_seqlens, max_seqlen, do = packed_inputs((9, 3), 6, 16, torch.float32)
    out, dqkv = run(projection, tables, cu_seqlens, max_seqlen, do)
    for head in (0, 2, 3, 5):
        one = slice(head, head + 1)
        alone = run(projection[:, :, one], tables, cu_seqlens, max_seqlen, do[:, one])
        assert torch.equal(out[:, one], alone[0])
        assert torch.equal(dqkv[:, :, one], alone[1])


@pytest.mark.parametrize("route", ["one tile"], indirect=True)
def test_short_forward_with_tiled_backward(route, monkeypatch):
    """As images of 129 to 320 tokens have it."""
    monkeypatch.setattr(configs, "short_backward", lambda *_: None)
    monkeypatch.setattr(configs, "resident_backward", lambda *_: None)
    assert_accurate(draw((17, 1), 1, 16, torch.float16))


def test_accurate_with_the_tables_of_many_tokens():
    """Angles up to 500: packed tables hold cosines, whatever the angle."""
    projection, _, cu_seqlens, max_seqlen, do = packed_inputs((30, 9), 2, 16, torch.float16)
    angle = 500 * torch.rand(39, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert_accurate([(projection, (angle.cos(), angle.sin()), cu_seqlens, max_seqlen, do)])


def test_packed_equals_per_image(route):
    projection, tables, cu_seqlens, max_seqlen, do = packed_inputs((17, 1, 0, 30), 2, 16, torch.float16)
    out, dqkv = run(projection, tables, cu_seqlens, max_seqlen, do)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        one = slice(start, end)
        cu_one = torch.tensor([0, end - start], dtype=torch.int32, device=DEVICE)
        alone = run(projection[one], [table[one] for table in tables], cu_one, max_seqlen, do[one])
        assert torch.equal(out[one], alone[0])
        assert torch.equal(dqkv[one], alone[1])


def test_permuting_images_permutes_outputs(route):
    lengths, order = (17, 4, 32), (2, 0, 1)
    projection, tables, cu_seqlens, max_seqlen, do = packed_inputs(lengths, 1, 16, torch.float32)
    tokens = torch.cat([torch.arange(cu_seqlens[i], cu_seqlens[i + 1]) for i in order]).to(DEVICE)
    cu_permuted = torch.tensor([0, *(lengths[i] for i in order)]).cumsum(0).to(DEVICE, torch.int32)
    out, dqkv = run(projection, tables, cu_seqlens, max_seqlen, do)
    permuted = run(projection[tokens], [table[tokens] for table in tables], cu_permuted, max_seqlen, do[tokens])
    assert torch.equal(permuted[0], out[tokens])
    assert torch.equal(permuted[1], dqkv[tokens])


def test_any_strides_give_the_same_bits(route):
    """Channels apart, heads before tokens, a gradient that is an expanded row."""
    projection, tables, cu_seqlens, max_seqlen, do = packed_inputs((17, 6), 2, 16, torch.float32)
    do = do[:1].expand_as(do)
    expected = run(projection.contiguous(), tables, cu_seqlens, max_seqlen, do.contiguous())
    apart = torch.stack([projection, torch.full_like(projection, math.nan)], -1)[..., 0]
    heads_first = projection.transpose(0, 2).contiguous().transpose(0, 2)
    for strided in (apart, heads_first):
        actual = run(strided, tables, cu_seqlens, max_seqlen, do)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


def test_same_bits_twice(route):
    inputs = packed_inputs((17, 31), 2, 16, torch.float16)
    first, second = run(*inputs), run(*inputs)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_to_do(dtype):
    out, dqkv = run(*packed_inputs((0, 0), 2, 16, dtype))
    assert out.shape == (0, 2, 16)
    assert dqkv.shape == (0, 3, 2, 16)


def test_what_no_kernel_does_is_refused():
    with pytest.raises(TypeError, match=r"torch.float16, torch.bfloat16 or torch.float32, got torch.float64"):
        run(*packed_inputs((2,), 1, 16, torch.float64))
    with pytest.raises(ValueError, match="head_dim must be at most 128, got 144"):
        run(*packed_inputs((2,), 1, 144, torch.float32))


def test_short_images_stay_on_chip():
    for dtype, head_dim, capability in product((torch.bfloat16, torch.float16), (32, 64), (90, 100)):
        for tokens in (1, 32, 64, 106, 128):
            assert configs.short_forward(dtype, head_dim, tokens, tokens, capability) is not None
            assert configs.short_backward(dtype, head_dim, tokens, tokens, False, capability) is not None
        for tokens in (192, 256, 272, 320):
            config = configs.short_forward(dtype, head_dim, tokens, tokens, capability)
            assert config.block_k + config.tail >= tokens
        assert configs.short_forward(dtype, head_dim, 321, 321, capability) is None
        assert configs.short_backward(dtype, head_dim, 129, 129, False, capability) is None
    assert configs.short_forward(torch.float32, 64, 106, 106, 90) is None
    assert configs.short_backward(torch.float32, 64, 106, 106, False, 90) is None


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("lengths", [(106,) * 8, (272, 1, 0, 128, 129, 64), (700, 321)])
def test_on_a_gpu(dtype, head_dim, lengths):
    assert_accurate(draw(lengths, 4, head_dim, dtype))


@gpu
@pytest.mark.parametrize(("heads", "head_dim"), [(16, 64), (12, 64), (6, 64), (6, 32), (16, 128)])
@pytest.mark.parametrize("tokens", [106, 272])
def test_shapes_of_vision_transformers_on_a_gpu(heads, head_dim, tokens):
    """As many images as fill a GPU: what heads share a program depends on it."""
    inputs = packed_inputs((tokens,) * 512, heads, head_dim, torch.bfloat16)
    first, second = run(*inputs), run(*inputs)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    projection, tables, cu_seqlens, max_seqlen, do = inputs
    some = 8 * tokens
    for part in (slice(some), slice(len(do) - some, len(do))):
        one = (projection[part], [x[part] for x in tables], cu_seqlens[:9], max_seqlen, do[part])
        versions = [(first[0][part], first[1][part])]
        versions += [defined(*one, dtype) for dtype in (torch.bfloat16, torch.float64)]
        assert_draws_as_accurate([[(out, *dqkv.unbind(1)) for out, dqkv in versions]])


@gpu
def test_random_ragged_batches_on_a_gpu():
    for batch in range(125):
        dtype, longest = (torch.bfloat16, torch.float16)[batch % 2], (24, 64, 128, 400)[batch // 2 % 4]
        draws = []
        for seed in range(8 * batch, 8 * batch + 8):
            generator = torch.Generator().manual_seed(seed)
            lengths = [*torch.randint(0, longest + 1, (6,), generator=generator).tolist(), 1]
            draws.append(packed_inputs(lengths, 1 + batch % 3, 64, dtype, seed=seed))
        assert_accurate(draws)
        for inputs in draws:
            for first, second in zip(run(*inputs), run(*inputs), strict=True):
                assert torch.equal(first, second)


@gpu
def test_more_elements_than_an_int32_counts():
    """The last image of a projection of 2^31 elements, against that image alone."""
    heads, head_dim, tokens = 16, 64, 100
    images = 2**31 // (3 * heads * head_dim * tokens) + 2
    projection, tables, _, _, do = packed_inputs((tokens,), heads, head_dim, torch.bfloat16)
    many = projection.repeat(images, 1, 1, 1)
    assert many.numel() > 2**31
    cu_seqlens = torch.arange(images + 1, dtype=torch.int32, device=DEVICE) * tokens
    actual = run(many, [table.repeat(images, 1) for table in tables], cu_seqlens, tokens, do.repeat(images, 1, 1))
    expected = run(projection, tables, cu_seqlens[:2], tokens, do)
    assert torch.equal(actual[0][-tokens:], expected[0])
    assert torch.equal(actual[1][-tokens:], expected[1])
