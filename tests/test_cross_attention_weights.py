import math
from functools import partial

import pytest
import torch
from numerics import assert_draws_as_accurate, least_exact
from test_masked_cross_attention import CASES, cumulative, in_float64
from test_masked_cross_attention import arguments as attention_arguments
from torch import Tensor

from capi_kernels import cross_attention_weights, masked_cross_attention, reference


def arguments(case: str, dtype: torch.dtype, **options) -> dict:
    given = attention_arguments(case, dtype, **options)
    del given["v"]
    return given


def run(op, arguments: dict, padding: float = 0.0) -> dict[str, Tensor]:
    """Weights and gradients; their own holds `padding` where a query or a key is padding."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in ("q", "k")}
    out = op(**(arguments | leaves))
    doutput = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    doutput[padding_of(arguments).expand_as(out)] += padding
    out.backward(doutput)
    return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def padding_of(arguments: dict) -> Tensor:
    """[groups, 1, max_seqlen_q, max_seqlen_k]"""
    queries, keys = (arguments[f"cu_seqlens_{name}"].diff() for name in ("q", "k"))
    if arguments["kv_index"] is not None:
        keys = keys[arguments["kv_index"]]
    is_query = torch.arange(arguments["max_seqlen_q"]) < queries[:, None]
    is_key = torch.arange(arguments["max_seqlen_k"]) < keys[:, None]
    return ~(is_query[:, :, None] & is_key[:, None, :])[:, None]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weights_and_gradients_match_the_definition(case: str, dtype: torch.dtype) -> None:
    for options in ({}, {"scale": 0.7, "rotary": False}, {"slack": 3, "head_dim": 16}):
        slack, scale = options.pop("slack", 0), options.pop("scale", None)
        draws = []
        for seed in range(4):
            given = arguments(case, dtype, **options, seed=seed) | {"scale": scale}
            given["max_seqlen_q"] += slack
            given["max_seqlen_k"] += slack
            oracle, actual = (
                run(reference.cross_attention_weights, in_float64(given)),
                run(cross_attention_weights, given),
            )
            if dtype == torch.float64:
                torch.testing.assert_close(actual, oracle, rtol=0, atol=1e-12)
                continue
            same_dtype = least_exact(partial(run, reference.cross_attention_weights, given), oracle)
            draws.append([list(x.values()) for x in (actual, same_dtype, oracle)])
        assert_draws_as_accurate(draws)


@pytest.mark.parametrize("op", [cross_attention_weights, reference.cross_attention_weights])
@pytest.mark.parametrize("case", ["one", "ragged", "empty group and context", "ragged shared contexts"])
def test_rows_sum_to_one_and_padding_is_zero(op, case: str) -> None:
    given = arguments(case, torch.float64)
    given["max_seqlen_q"] += 2
    given["max_seqlen_k"] += 1
    results, padding = run(op, given), padding_of(given)
    heads = results["out"].shape[1]
    assert (results["out"][padding.expand(-1, heads, -1, -1)] == 0).all()
    filled = (~padding).any(-1, keepdim=True).double().expand(-1, heads, -1, -1)
    torch.testing.assert_close(results["out"].sum(-1, keepdim=True), filled, rtol=0, atol=1e-14)


def test_what_the_gradient_holds_at_padding_is_not_read() -> None:
    for case in ("ragged", "empty group and context", "ragged shared contexts"):
        given = arguments(case, torch.float32)
        clean, poisoned = run(cross_attention_weights, given), run(cross_attention_weights, given, padding=math.nan)
        assert all(torch.equal(clean[name], poisoned[name]) for name in clean)


@pytest.mark.parametrize("case", ["uniform", "ragged", "empty group and context", "ragged shared contexts"])
def test_values_may_be_projected_after_the_weighted_sum(case: str) -> None:
    """o = (P X) W_v^T per head is masked_cross_attention with v = X W_v^T, and so are all gradients."""
    given = attention_arguments(case, torch.float64)
    del given["v"]
    lengths = CASES[case][1]
    heads, head_dim, channels = *given["q"].shape[1:], 10
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(given["k"]), channels, generator=generator, dtype=torch.float64)
    weight = torch.randn(heads * head_dim, channels, generator=generator, dtype=torch.float64)
    do = torch.randn(given["q"].shape, generator=generator, dtype=torch.float64)

    def values_first(q: Tensor, k: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        v = (x @ weight.T).unflatten(1, (heads, head_dim))
        return masked_cross_attention(**(given | {"q": q, "k": k, "v": v}))

    def sum_first(q: Tensor, k: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        weights = cross_attention_weights(**(given | {"q": q, "k": k}))
        padded = torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True)
        if given["kv_index"] is not None:
            padded = padded[given["kv_index"]]
        summed = torch.bmm(weights.flatten(1, 2), padded).unflatten(1, weights.shape[1:3])
        out = torch.einsum("ghqc,hdc->gqhd", summed, weight.unflatten(0, (heads, head_dim)))
        return torch.cat([image[:n] for image, n in zip(out, CASES[case][0], strict=True)])

    results = []
    for attention in (values_first, sum_first):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in (given["q"], given["k"], x, weight)]
        out = attention(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, do)))
    for actual, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_properties() -> None:
    given = arguments("ragged shared contexts", torch.float32)
    before = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}
    first, second = run(cross_attention_weights, given), run(cross_attention_weights, given)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(given[name], x) for name, x in before.items())
    strided = {name: torch.stack([given[name], given[name] + 1], -1)[..., 0] for name in ("q", "k")}
    strided["kv_index"] = given["kv_index"].int()
    assert all(torch.equal(x, first[name]) for name, x in run(cross_attention_weights, given | strided).items())
    assert (first["dk"][:4] == 0).all()  # contexts 0 and 4 are read by nobody
    assert (first["dk"][-1:] == 0).all()
    assert (first["dk"][4:10] != 0).any()


def test_bad_arguments() -> None:
    good = arguments("ragged", torch.float32)  # 6 queries in 3 groups, 13 tokens in 3 contexts, 2 heads of 6
    q, k = good["q"], good["k"]
    cases = [
        (TypeError, "q must be floating point, got torch.int32", {"q": q.int()}),
        (ValueError, r"q must have the axes \[queries, heads, head_dim\], got shape \(6, 2\)", {"q": q[..., 0]}),
        (TypeError, "k must have the dtype of q, torch.float32, got torch.float16", {"k": k.half()}),
        (ValueError, r"k must have the shape \[context=13, heads=2, head_dim=6\], got \(13, 1, 6\)", {"k": k[:, :1]}),
        (ValueError, "q_cos and q_sin must both be given or both be None, got q_sin = None", {"q_sin": None}),
        (ValueError, "max_seqlen_k must be at least 7, the longest sequence, got 6", {"max_seqlen_k": 6}),
        (ValueError, "without kv_index every group needs a context", {"cu_seqlens_q": cumulative([3, 3])}),
        (ValueError, r"kv_index must be in \[0, 3\), got values from 0 to 3", {"kv_index": torch.tensor([0, 3, 1])}),
        (ValueError, "scale must be positive and finite, got 0.0", {"scale": 0.0}),
    ]
    for error, message, bad in cases:
        with pytest.raises(error, match=message):
            cross_attention_weights(**(good | bad))
