import math
from functools import partial

import pytest
import torch
from numerics import assert_draws_as_accurate, least_exact
from torch import Tensor

from capi_kernels import masked_cross_attention, reference, rotary_tables

# lengths of the query groups, of the contexts, which context each group reads
CASES = {
    "one": ([1], [1], None),
    "uniform": ([2, 2, 2], [5, 5, 5], None),
    "ragged": ([3, 1, 2], [4, 7, 2], None),
    "ragged queries": ([3, 1, 2], [4, 4, 4], None),
    "ragged context": ([2, 2, 2], [4, 7, 2], None),
    "empty group and context": ([2, 0, 3, 1], [3, 2, 0, 1], None),
    "a group without queries": ([2, 0, 2], [3, 3, 3], None),
    "shared contexts": ([2, 2, 2, 2], [3, 3, 3], [1, 1, 2, 1]),
    "ragged shared contexts": ([2, 0, 1, 3], [4, 6, 0, 3, 1], [3, 1, 1, 2]),
    "nothing": ([0, 0], [0, 0], None),
}


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def arguments(
    case: str, dtype: torch.dtype, heads: int = 2, head_dim: int = 6, rotary: bool = True, seed: int = 0
) -> dict:
    lengths_q, lengths_k, kv_index = CASES[case]
    queries, context = sum(lengths_q), sum(lengths_k)
    generator = torch.Generator().manual_seed(queries + context + 1000 * seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q = draw(queries, heads, head_dim)
    k, v = draw(context, 2, heads, head_dim).unbind(1)
    table = torch.promote_types(dtype, torch.float32)
    names, tables = ("q_cos", "q_sin", "k_cos", "k_sin"), [None] * 4
    if rotary:
        freqs = 4 * draw(2, head_dim)
        tables = (*rotary_tables(draw(queries, 2), freqs), *rotary_tables(draw(context, 2), freqs))
        tables = [x.to(table) for x in tables]
    return {
        "q": q.to(dtype),
        "k": k.to(dtype),
        "v": v.to(dtype),
        **dict(zip(names, tables, strict=True)),
        "cu_seqlens_q": cumulative(lengths_q),
        "cu_seqlens_k": cumulative(lengths_k),
        "max_seqlen_q": max(lengths_q),
        "max_seqlen_k": max(lengths_k),
        "kv_index": None if kv_index is None else torch.tensor(kv_index),
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_output_and_gradients_match_the_definition(case: str, dtype: torch.dtype) -> None:
    for options in ({}, {"scale": 0.7, "rotary": False}, {"slack": 3, "head_dim": 16}):
        slack, scale = options.pop("slack", 0), options.pop("scale", None)
        draws = []
        for seed in range(4):
            given = arguments(case, dtype, **options, seed=seed) | {"scale": scale}
            given["max_seqlen_q"] += slack
            given["max_seqlen_k"] += slack
            oracle, actual = (
                run(reference.masked_cross_attention, in_float64(given)),
                run(masked_cross_attention, given),
            )
            if dtype == torch.float64:
                torch.testing.assert_close(actual, oracle, rtol=0, atol=1e-12)
                continue
            same_dtype = least_exact(partial(run, reference.masked_cross_attention, given), oracle)
            draws.append([list(x.values()) for x in (actual, same_dtype, oracle)])
        assert_draws_as_accurate(draws)


@pytest.mark.parametrize("case", ["uniform", "ragged", "shared contexts"])
def test_a_backward_may_run_twice(case: str) -> None:
    """It leaves what the forward kept as it was."""
    given = arguments(case, torch.float32)
    leaves = {name: given[name].requires_grad_() for name in ("q", "k", "v")}
    out = masked_cross_attention(**given)
    first, second = (torch.autograd.grad(out.sin().sum(), list(leaves.values()), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_group_reads_the_context_it_names() -> None:
    given = arguments("ragged shared contexts", torch.float64)
    results = run(masked_cross_attention, given)
    starts_q, starts_k = given["cu_seqlens_q"].tolist(), given["cu_seqlens_k"].tolist()
    for group, context in enumerate(given["kv_index"].tolist()):
        part_q = slice(starts_q[group], starts_q[group + 1])
        part_k = slice(starts_k[context], starts_k[context + 1])
        alone = given | {name: given[name][part_q] for name in ("q", "q_cos", "q_sin")}
        alone |= {name: given[name][part_k] for name in ("k", "v", "k_cos", "k_sin")}
        lengths = {"cu_seqlens_q": cumulative([len(alone["q"])]), "cu_seqlens_k": cumulative([len(alone["k"])])}
        expected = masked_cross_attention(**(alone | lengths | {"kv_index": None}))
        torch.testing.assert_close(results["out"][part_q], expected, rtol=0, atol=1e-14)
    for name in ("dk", "dv"):  # contexts 0 and 4 are read by nobody
        assert (results[name][:4] == 0).all()
        assert (results[name][-1:] == 0).all()
        assert (results[name][4:10] != 0).any()
    same = run(masked_cross_attention, given | {"kv_index": given["kv_index"].int()})
    assert all(torch.equal(same[name], results[name]) for name in results)


def test_queries_without_context_get_zero() -> None:
    given = arguments("empty group and context", torch.float32)
    out = masked_cross_attention(**given)
    assert (out[2:5] == 0).all()
    assert (out[:2] != 0).all()


@pytest.mark.parametrize("lengths", [([2, 2], [5, 5], None), ([2, 3], [1, 20], None)])
@pytest.mark.parametrize("name", ["q", "k"])
def test_no_nan_is_lost(lengths, name, monkeypatch) -> None:
    """PyTorch's own attention makes zeros of rows of NaN where keys are few."""
    monkeypatch.setitem(CASES, "nan", lengths)
    given = arguments("nan", torch.float32)
    given[name] = given[name].index_fill(0, torch.arange(len(given[name]))[: 1 if name == "q" else None], math.nan)
    out, expected = masked_cross_attention(**given), reference.masked_cross_attention(**given)
    assert expected.isnan().any()
    assert torch.equal(out.isnan(), expected.isnan())


def test_properties() -> None:
    given = arguments("ragged", torch.float32)
    before = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}
    first, second = run(masked_cross_attention, given), run(masked_cross_attention, given)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(given[name], x) for name, x in before.items())
    contiguous = run(masked_cross_attention, given | {name: given[name].contiguous() for name in ("k", "v")})
    assert all(torch.equal(first[name], contiguous[name]) for name in first)

    # Queries never see each other: without the first query of group 0 nothing else changes.
    fewer = (
        given | {name: given[name][1:] for name in ("q", "q_cos", "q_sin")} | {"cu_seqlens_q": cumulative([2, 1, 2])}
    )
    torch.testing.assert_close(masked_cross_attention(**fewer), first["out"][1:], rtol=0, atol=1e-6)


def test_bad_arguments() -> None:
    good = arguments("ragged", torch.float32)  # 6 queries in 3 groups, 13 tokens in 3 contexts, 2 heads of 6
    q, k, v, cu_q = (good[name] for name in ("q", "k", "v", "cu_seqlens_q"))
    int32 = torch.int32
    cases = [
        (TypeError, "q must be floating point, got torch.int32", {"q": q.int()}),
        (ValueError, r"q must have the axes \[queries, heads, head_dim\], got shape \(6, 2\)", {"q": q[..., 0]}),
        (TypeError, "k must have the dtype of q, torch.float32, got torch.float16", {"k": k.half()}),
        (ValueError, "k must be on the device of q, cpu, got meta", {"k": k.to("meta")}),
        (ValueError, r"k must have the shape \[context=13, heads=2, head_dim=6\], got \(13, 1, 6\)", {"k": k[:, :1]}),
        (ValueError, r"v must have the shape \[context=13, heads=2, head_dim=6\], got \(12, 2, 6\)", {"v": v[1:]}),
        (ValueError, "q_cos and q_sin must both be given or both be None, got q_sin = None", {"q_sin": None}),
        (ValueError, r"k_cos must have the shape \[tokens=13, head_dim=6\], got \(6, 6\)", {"k_cos": good["q_cos"]}),
        (TypeError, "k_sin must be torch.float32, got torch.float16", {"k_sin": good["k_sin"].half()}),
        (TypeError, "cu_seqlens_q must be torch.int32, got torch.int64", {"cu_seqlens_q": cu_q.long()}),
        (ValueError, "cu_seqlens_q must end at the token count 6, got 5", {"cu_seqlens_q": cu_q.clamp(max=5)}),
        (ValueError, "cu_seqlens_k must end at the token count 13, got 6", {"cu_seqlens_k": cu_q}),
        (ValueError, "max_seqlen_q must be at least 3, the longest sequence, got 2", {"max_seqlen_q": 2}),
        (ValueError, "max_seqlen_k must be at least 5 for 13 tokens, got 4", {"max_seqlen_k": 4}),
        (
            ValueError,
            "without kv_index every group needs a context: got 2 groups",
            {"cu_seqlens_q": cumulative([3, 3])},
        ),
        (TypeError, "kv_index must be torch.int32 or torch.int64, got torch.float32", {"kv_index": torch.ones(3)}),
        (
            ValueError,
            r"kv_index must have the shape \[groups=3\], got \(2,\)",
            {"kv_index": torch.zeros(2, dtype=int32)},
        ),
        (ValueError, r"kv_index must be in \[0, 3\), got values from 0 to 3", {"kv_index": torch.tensor([0, 3, 1])}),
        (ValueError, "scale must be positive and finite, got nan", {"scale": math.nan}),
    ]
    for error, message, bad in cases:
        with pytest.raises(error, match=message):
            masked_cross_attention(**(good | bad))
