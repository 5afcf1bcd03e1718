"""That the tests' own measure tells what it should."""

import pytest
import torch
from numerics import assert_as_accurate, least_exact, sums_in_blocks
from torch import Tensor
from torch.nn.functional import linear

GENERATOR = torch.Generator().manual_seed(0)
A, B = (torch.randn(8, 512, generator=GENERATOR) + 1 for _ in range(2))
EXACT = A.double() @ B.double().T


def in_turn(dtype: torch.dtype) -> Tensor:
    """sum_k a_ik b_jk, term after term."""
    total = torch.zeros(8, 8, dtype=torch.float32)
    for a, b in zip(A.to(dtype).float().T, B.to(dtype).float().T, strict=True):
        total = torch.addcmul(total, a[:, None], b)
    return total.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_products_are_summed_in_the_order_asked_for(dtype: torch.dtype) -> None:
    a, b = A.to(dtype), B.to(dtype)
    zero, out = torch.zeros(8, 8, dtype=dtype), torch.empty(8, 8, dtype=dtype)
    batched = (a[None], b.T[None])
    with sums_in_blocks(1):
        products = [a @ b.T, linear(a, b), torch.mm(a, b.T, out=out), torch.addmm(zero, a, b.T), zero.clone()]
        products[-1].addmm_(a, b.T)
        products += [torch.bmm(*batched)[0], torch.baddbmm(zero[None], *batched)[0], torch.einsum("ik,jk->ij", a, b)]
        doubled = torch.addmm(zero + 1, a, b.T, beta=3, alpha=2)
        products.append(torch.addmm(zero + torch.nan, a, b.T, beta=0))
    for product in products:
        assert torch.equal(product, in_turn(dtype))
    torch.testing.assert_close(doubled, 3 + 2 * in_turn(dtype))
    with sums_in_blocks(4):
        blocks = a @ b.T
    if dtype == torch.float32:
        assert not torch.equal(blocks, in_turn(dtype))
    torch.testing.assert_close(blocks.double(), EXACT, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    torch.testing.assert_close((a @ b.T).double(), EXACT, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_the_least_exact_order_sets_the_budget() -> None:
    results = least_exact(lambda: {"product": A @ B.T, "copy": A.clone()}, {"product": EXACT, "copy": A.double()})
    assert torch.equal(results["copy"], A)
    errors = [(x.double() - EXACT).abs().max() for x in (results["product"], A @ B.T, in_turn(torch.float32))]
    assert errors[0] == max(errors)


def test_an_error_of_a_thousandth_is_found() -> None:
    wide = A.double()
    assert_as_accurate(A, A, wide)
    with pytest.raises(AssertionError, match="above the budget"):
        assert_as_accurate(A * 1.001, A, wide)
