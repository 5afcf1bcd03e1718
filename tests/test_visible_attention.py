import math
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_accurate, assert_draws_as_accurate, least_exact, peak_allocation
from torch import Tensor

from capi_kernels import (
    apply_rotary,
    masked_cross_attention,
    reference,
    rotary_tables,
    visible_attention,
    visible_attention_qkvpacked,
)
from capi_kernels.attention import cpu

LENGTHS = {
    "one": [1],
    "one image": [7],
    "uniform": [4, 4, 4],
    "ragged": [3, 9, 1, 8],
    "empty images": [0, 5, 0, 0, 2, 0],
    "nothing": [0, 0],
}


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def arguments(
    lengths: list[int], dtype: torch.dtype, heads: int = 3, head_dim: int = 8, rotary: bool = True, seed: int = 0
) -> dict:
    """q, k and v are strided views of one packed buffer."""
    tokens = sum(lengths)
    generator = torch.Generator().manual_seed(tokens + 1000 * seed)
    packed = torch.randn(tokens, 3, heads, head_dim, generator=generator, dtype=torch.float64)
    coords = torch.rand(tokens, 2, generator=generator, dtype=torch.float64)
    tables = rotary_tables(coords, 20 * torch.rand(2, head_dim, generator=generator, dtype=torch.float64))
    cos, sin = (x.to(torch.promote_types(dtype, torch.float32)) for x in tables) if rotary else (None, None)
    q, k, v = packed.to(dtype).unbind(1)
    return {
        "q": q,
        "k": k,
        "v": v,
        "cos": cos,
        "sin": sin,
        "cu_seqlens": cumulative(lengths),
        "max_seqlen": max(lengths),
    }


def in_float64(arguments: dict) -> dict:
    return {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}


def run(op, arguments: dict) -> dict[str, Tensor]:
    """Output and gradients."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in ("q", "k", "v")}
    out = op(**(arguments | leaves))
    doutput = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    out.backward(doutput)
    return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_output_and_gradients_match_the_definition(lengths: str, dtype: torch.dtype) -> None:
    for options in ({}, {"heads": 1, "head_dim": 5, "rotary": False, "scale": 0.7}, {"slack": 4}):
        slack, scale = options.pop("slack", 0), options.pop("scale", None)
        draws = []
        for seed in range(4):
            given = arguments(LENGTHS[lengths], dtype, **options, seed=seed) | {"scale": scale}
            given["max_seqlen"] += slack
            oracle, actual = run(reference.visible_attention, in_float64(given)), run(visible_attention, given)
            if dtype == torch.float64:
                torch.testing.assert_close(actual, oracle, rtol=0, atol=1e-12)
                continue
            same_dtype = least_exact(partial(run, reference.visible_attention, given), oracle)
            draws.append([list(x.values()) for x in (actual, same_dtype, oracle)])
        assert_draws_as_accurate(draws)


def from_a_buffer(q, k, v, *operands, **options) -> Tensor:
    return visible_attention_qkvpacked(torch.stack([q, k, v], 1), *operands, **options)


def to_itself(q, k, v, cos, sin, cu_seqlens, max_seqlen) -> Tensor:
    """Cross-attention, which keeps what it rotated, in the place of self-attention."""
    return masked_cross_attention(q, k, v, *(cos, sin) * 2, *(cu_seqlens,) * 2, *(max_seqlen,) * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("cut", [{"CACHED": 64}, {"TOGETHER": 64}, {"CACHED": 2**12, "TOGETHER": 2**12}], ids=str)
@pytest.mark.parametrize("small", [0, 2**20])
def test_any_cut_matches_the_definition(
    small: int, cut: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows, heads and images at a time, the same of each or not; PyTorch's backward of 300 tokens in float32."""
    for name, value in (cut | {"SMALL": small}).items():
        monkeypatch.setattr(cpu, name, value)
    draws = [arguments([40, 40, 3, 40, 0, 70], dtype), arguments([300, 1, 300], dtype, 2, 16)]
    draws += [arguments([40] * 5, dtype), arguments([300, 300], dtype, 2, 16)]
    for given, op in product(draws, (visible_attention, to_itself, from_a_buffer)):
        definition = reference.visible_attention
        runs = (op, given), (definition, given), (definition, in_float64(given))
        for parts in zip(*(run(function, x).values() for function, x in runs), strict=True):
            assert_as_accurate(*parts)


def saturated(projection: Tensor) -> None:
    """All weight on one key, 24 nats above the others."""
    for image in projection.split(16):
        image[:, 1, 0] = 4 * torch.linalg.qr(image[:, 1, 0])[0]
        image[:, 0] = 6 * image[:, 1]


def large(projection: Tensor) -> None:
    projection[:, 0] *= 10 * (torch.arange(len(projection)) % 11)[:, None, None]


def lifted(projection: Tensor) -> None:
    projection[:, :2, :, 0] = 20


@pytest.mark.parametrize("scores", [saturated, large, lifted])
def test_hard_scores(scores) -> None:
    """Of dP - rowsum(P dP) no rounding may be left where P is one; exponentials come after the maximum."""
    versions = []
    for seed in range(4):
        projection = torch.randn(32, 3, 1, 16, generator=torch.Generator().manual_seed(seed))
        scores(projection)
        given = dict(zip(("q", "k", "v"), projection.unbind(1), strict=True))
        given |= {"cos": None, "sin": None, "cu_seqlens": cumulative([16, 16]), "max_seqlen": 16}
        definition = reference.visible_attention
        runs = (visible_attention, given), (definition, given), (definition, in_float64(given))
        versions.append([run(op, x).values() for op, x in runs])
    assert_draws_as_accurate(versions)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_no_less_exact_than_pytorchs(dtype: torch.dtype, rotary: bool) -> None:
    """Scores in the tens; what is rotated beforehand is rounded beforehand."""
    given = arguments([106, 106], dtype, heads=2, head_dim=64, rotary=rotary)
    given["q"] = 6 * given["q"]

    def pytorch(q, k, v, cos, sin, **_) -> Tensor:
        rotated = (q, k) if cos is None else (apply_rotary(q, cos, sin), apply_rotary(k, cos, sin))
        images = (x.unflatten(0, (2, -1)).transpose(1, 2) for x in (*rotated, v))
        return F.scaled_dot_product_attention(*images).transpose(1, 2).flatten(0, 1)

    oracle = run(reference.visible_attention, in_float64(given))
    ours, theirs, definition = (run(op, given) for op in (visible_attention, pytorch, reference.visible_attention))
    for name, x in oracle.items():
        error, limit, defined = ((y[name].double() - x).abs().max() for y in (ours, theirs, definition))
        one_rounding = 0.51 * torch.finfo(dtype).eps * x.abs().max()
        assert error <= min(limit, one_rounding)
        assert defined <= (2 * limit if rotary else one_rounding)


@pytest.mark.parametrize("op", [visible_attention, reference.visible_attention])
def test_scores_may_be_larger_than_float16_holds(op) -> None:
    given = arguments([5, 3], torch.float16, rotary=False)
    given |= {"q": 200 * given["q"], "k": 200 * given["k"], "scale": 1.0}
    assert (given["q"].float().flatten(1) @ given["k"].float().flatten(1).T).abs().max() > 65504
    oracle, actual = run(reference.visible_attention, in_float64(given)), run(op, given)
    for name, x in oracle.items():
        assert (actual[name].double() - x).abs().max() <= torch.finfo(torch.float16).eps * x.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_memory_is_that_of_pytorchs_attention(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotated beforehand in plain PyTorch; weights, 17 MB of each head, are never whole."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # As many heads are held at a time.
    tokens, heads, head_dim = 2048, 4, 64
    given = arguments([tokens], dtype, heads, head_dim)
    do = torch.randn(tokens, heads, head_dim).to(dtype)

    def pytorch(q, k, v, cos, sin, **_) -> Tensor:
        rotated = reference.apply_rotary(q, cos, sin), reference.apply_rotary(k, cos, sin), v
        return F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in rotated))[0].transpose(0, 1)

    def forward(op) -> Tensor:
        with torch.no_grad():
            return op(**given)

    def both(op) -> tuple[Tensor, ...]:
        leaves = {name: given[name].detach().requires_grad_() for name in ("q", "k", "v")}
        return torch.autograd.grad(op(**(given | leaves)), list(leaves.values()), do)

    for direction in (forward, both):
        ours, theirs = (peak_allocation(partial(direction, op)) for op in (visible_attention, pytorch))
        assert ours <= 1.1 * theirs, (direction, ours, theirs)


def test_memory_of_small_images_is_that_of_pytorchs_attention() -> None:
    """Each gradient takes the memory of what the one before needed."""
    given = arguments([33] * 8, torch.float32, heads=6, head_dim=64)
    do = torch.randn(given["q"].shape)

    def pytorch(q, k, v, cos, sin, **_) -> Tensor:
        rotated = reference.apply_rotary(q, cos, sin), reference.apply_rotary(k, cos, sin), v
        images = (x.unflatten(0, (8, -1)).transpose(1, 2) for x in rotated)
        return F.scaled_dot_product_attention(*images).transpose(1, 2).flatten(0, 1)

    def both(op) -> tuple[Tensor, ...]:
        leaves = {name: given[name].detach().requires_grad_() for name in ("q", "k", "v")}
        return torch.autograd.grad(op(**(given | leaves)), list(leaves.values()), do)

    ours, theirs = (peak_allocation(partial(both, op)) for op in (visible_attention, pytorch))
    assert ours <= 1.04 * theirs, (ours, theirs)


def test_packed_equals_image_by_image() -> None:
    given = arguments(LENGTHS["ragged"], torch.float64)
    results = run(visible_attention, given)
    packed = ("q", "k", "v", "cos", "sin")
    parts = {name: given[name].split(LENGTHS["ragged"]) for name in packed}
    images = []
    for image, length in enumerate(LENGTHS["ragged"]):
        alone = {name: parts[name][image] for name in packed}
        images.append(visible_attention(**alone, cu_seqlens=cumulative([length]), max_seqlen=length))
    torch.testing.assert_close(results["out"], torch.cat(images), rtol=0, atol=1e-14)

    order = [2, 0, 3, 1]
    moved = {name: torch.cat([parts[name][image] for image in order]) for name in packed}
    lengths = [LENGTHS["ragged"][image] for image in order]
    permuted = visible_attention(**moved, cu_seqlens=cumulative(lengths), max_seqlen=9)
    expected = torch.cat([results["out"].split(LENGTHS["ragged"])[image] for image in order])
    torch.testing.assert_close(permuted, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("lengths", ["uniform", "ragged"])
def test_properties(lengths: str) -> None:
    given = arguments(LENGTHS[lengths], torch.float32)
    before = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}
    first, second = run(visible_attention, given), run(visible_attention, given)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(given[name], x) for name, x in before.items())
    contiguous = run(visible_attention, given | {name: given[name].contiguous() for name in ("q", "k", "v")})
    assert all(torch.equal(first[name], contiguous[name]) for name in first)

    # Another image's tokens, were they read, would show.
    poisoned = given | {"q": given["q"].clone(), "k": given["k"].clone(), "v": given["v"].clone()}
    start = int(given["cu_seqlens"][-2])
    for name in ("q", "k", "v"):
        poisoned[name][start:] = math.nan
    assert torch.equal(visible_attention(**poisoned)[:start], first["out"][:start])


def test_rotary_embedding_and_its_gradient() -> None:
    given = arguments([9], torch.float64)
    x, cos, sin = given["q"], given["cos"], given["sin"]
    results = {}
    for op in (apply_rotary, reference.apply_rotary):
        leaf = x.detach().requires_grad_()
        out = op(leaf, cos, sin)
        out.backward(given["k"])
        results[op] = out.detach(), leaf.grad
    for actual, expected in zip(results[apply_rotary], results[reference.apply_rotary], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-15)
    half = apply_rotary(x.half(), cos.float(), sin.float())
    assert_as_accurate(half, reference.apply_rotary(x.half(), cos.float(), sin.float()), results[apply_rotary][0])


def test_rotary_tables_are_formed_in_float32() -> None:
    coords, freqs = torch.tensor([[0.3, 0.9], [1.0, 0.1]]), torch.tensor([[44.0, 0.0, 1.0], [0.0, 44.0, 2.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cos, sin = rotary_tables(coords, freqs)
    angle = coords.double() @ freqs.double()
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos.double(), angle.cos(), rtol=0, atol=44 * 1.2e-7)
    torch.testing.assert_close(sin.double(), angle.sin(), rtol=0, atol=44 * 1.2e-7)
    assert rotary_tables(coords.double(), freqs.double())[0].dtype == torch.float64


@pytest.mark.usefixtures("without_annotations")
def test_bad_arguments() -> None:
    good = arguments([3, 4], torch.float32)  # 7 tokens, 3 heads of 8
    q, k, v, cos, cu = (good[name] for name in ("q", "k", "v", "cos", "cu_seqlens"))

    def offsets(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    odd = {name: good[name][..., :7] for name in ("q", "k", "v", "cos", "sin")}
    cases = [
        (TypeError, "q must be floating point, got torch.int64", {"q": q.long()}),
        (TypeError, "q must have 16 bits or more, got torch.float8_e5m2", {"q": q.to(torch.float8_e5m2)}),
        (TypeError, "sin must be dense, got the layout torch.sparse_coo", {"sin": cos.to_sparse()}),
        (ValueError, r"q must have the axes \[tokens, heads, head_dim\], got shape \(7, 24\)", {"q": q.flatten(1)}),
        (ValueError, "q must have at least one element on the axis heads, got 0", {"q": q[:, :0]}),
        (ValueError, "q must have at least one element on the axis head_dim, got 0", {"q": q[..., :0]}),
        (TypeError, "k must have the dtype of q, torch.float32, got torch.float64", {"k": k.double()}),
        (ValueError, r"k must have the shape \[tokens=7, heads=3, head_dim=8\], got \(7, 2, 8\)", {"k": k[:, :2]}),
        (ValueError, r"v must have the shape \[tokens=7, heads=3, head_dim=8\], got \(7, 3, 4\)", {"v": v[..., :4]}),
        (ValueError, "v must be on the device of q, cpu, got meta", {"v": v.to("meta")}),
        (ValueError, "cos and sin must both be given or both be None, got cos = None", {"cos": None}),
        (ValueError, r"cos must have the shape \[tokens=7, head_dim=8\], got \(6, 8\)", {"cos": cos[:6]}),
        (TypeError, "sin must be torch.float32, got torch.bfloat16", {"sin": cos.bfloat16()}),
        (ValueError, "cos must be on the device of q, cpu, got meta", {"cos": cos.to("meta")}),
        (ValueError, "head_dim must be even for a rotary embedding, got 7", odd),
        (TypeError, "cu_seqlens must be torch.int32, got torch.int64", {"cu_seqlens": cu.long()}),
        (ValueError, r"cu_seqlens must have the shape \[groups \+ 1\] .*, got \(1, 3\)", {"cu_seqlens": cu[None]}),
        (ValueError, r"cu_seqlens must have the shape \[groups \+ 1\] .*, got \(1,\)", {"cu_seqlens": cu[:1]}),
        (ValueError, "cu_seqlens must be on the device of q, cpu, got meta", {"cu_seqlens": cu.to("meta")}),
        (ValueError, "cu_seqlens must start at 0, got 1", {"cu_seqlens": offsets(1, 3, 7)}),
        (ValueError, "cu_seqlens must not decrease, got a step of -1", {"cu_seqlens": offsets(0, 4, 3, 7)}),
        (ValueError, "cu_seqlens must end at the token count 7, got 6", {"cu_seqlens": offsets(0, 3, 6)}),
        (ValueError, "cu_seqlens must end at the token count 7, got 8", {"cu_seqlens": offsets(0, 4, 8)}),
        (ValueError, "max_seqlen must be at least 4 for 7 tokens, got 3", {"max_seqlen": 3}),
        (ValueError, "max_seqlen must be at least 5, the longest sequence, got 4", {"cu_seqlens": offsets(0, 5, 7)}),
        (TypeError, "max_seqlen must be an integer, got 4.0", {"max_seqlen": 4.0}),
        (ValueError, r"max_seqlen must be below 2\^31, got 9223372036854775808", {"max_seqlen": 2**63}),
        (ValueError, "scale must be positive and finite, got 0.0", {"scale": 0.0}),
        (ValueError, "scale must be positive and finite, got -1.0", {"scale": -1.0}),
    ]
    for error, message, bad in cases:
        with pytest.raises(error, match=message):
            visible_attention(**(good | bad))
    with pytest.raises(ValueError, match=r"freqs must have the shape \[coordinates=2, head_dim=8\], got \(3, 8\)"):
        rotary_tables(torch.rand(7, 2), torch.rand(3, 8))
    with pytest.raises(TypeError, match=r"coords must be floating point, got torch.int64"):
        rotary_tables(torch.ones(7, 2, dtype=torch.int64), torch.rand(2, 8))
    with pytest.raises(ValueError, match="freqs must be on the device of coords, cpu, got meta"):
        rotary_tables(torch.rand(7, 2), torch.rand(2, 8, device="meta"))
    with pytest.raises(ValueError, match="head_dim must be even for a rotary embedding, got 7"):
        apply_rotary(odd["q"], odd["cos"], odd["sin"])
