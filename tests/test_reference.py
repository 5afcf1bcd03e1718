"""The definitions against hand-made figures and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from capi_kernels import reference


def draw(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_one_sinkhorn_iteration_by_hand() -> None:
    # exp(logits) = [[1, 2], [3, 2]]: columns sum to 4 and 4, then rows to 3/4 and 5/4.
    logits = torch.tensor([[1.0, 2.0], [3.0, 2.0]], dtype=torch.float64).log()
    expected = torch.tensor([[1 / 3, 2 / 3], [3 / 5, 2 / 5]], dtype=torch.float64)
    torch.testing.assert_close(reference.sinkhorn_positionwise(logits, 1, 0.0), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(
        reference.sinkhorn_positionwise(2 * logits, 1, 0.0, temperature=2.0), expected, rtol=0, atol=1e-15
    )


def test_eps_is_weighed_against_exponentials_shifted_by_50() -> None:
    eps = math.exp(50)
    logits = torch.zeros(1, 1, dtype=torch.float64)  # exp(50) / (exp(50) + eps) = 1/2; 1/2 / (1/2 + eps)
    expected = 0.5 / (0.5 + eps)
    assert reference.sinkhorn_positionwise(logits, 1, eps).item() == pytest.approx(expected, rel=1e-12, abs=0)
    # float16 has no shift: 1 / (1 + 1) and 0.5 / (0.5 + 1).
    assert reference.sinkhorn_positionwise(logits.half(), 1, 1.0).item() == pytest.approx(1 / 3, rel=1e-3)


def test_potentials_give_the_assignments() -> None:
    logits = draw(2, 3, 5, 7)
    for options in ({"n_iterations": 1, "eps": 0.3}, {"n_iterations": 4, "temperature": 0.2}):
        potentials = reference.sinkhorn_potentials(logits, **options)
        temperature = options.get("temperature", 1.0)
        actual = reference.assignments_from_potentials(logits, potentials, temperature=temperature)
        torch.testing.assert_close(actual, reference.sinkhorn_positionwise(logits, **options), rtol=0, atol=1e-14)


def test_rotary_embedding_by_hand() -> None:
    # Halves (x1, x2) with angles (a1, a2): y1 = x1 cos a1 - x2 sin a1, y2 = x2 cos a2 + x1 sin a2. Not a rotation.
    cos, sin = reference.rotary_tables(torch.tensor([[0.5, 0.25]]), torch.tensor([[2.0, 0.0], [0.0, 8.0]]))
    torch.testing.assert_close(torch.atan2(sin, cos), torch.tensor([[1.0, 2.0]]))
    y1, y2 = reference.apply_rotary(torch.tensor([[[3.0, 5.0]]]), cos, sin)[0, 0].tolist()
    assert y1 == pytest.approx(3 * math.cos(1) - 5 * math.sin(1), rel=1e-6)
    assert y2 == pytest.approx(5 * math.cos(2) + 3 * math.sin(2), rel=1e-6)


def test_attention_is_pytorchs_image_by_image() -> None:
    q, k, v = draw(9, 2, 8), draw(9, 2, 8) + 1, draw(9, 2, 8) - 1
    cu_seqlens = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
    out = reference.visible_attention(q, k, v, None, None, cu_seqlens, 6, scale=0.7)
    for start, stop in [(0, 3), (3, 8), (8, 9)]:
        image = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        expected = F.scaled_dot_product_attention(*image, scale=0.7).transpose(0, 1)
        torch.testing.assert_close(out[start:stop], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("positionwise", [True, False])
def test_clustering_head_is_linear_sinkhorn_and_cross_entropy(positionwise: bool) -> None:
    features, weight, bias, rows = draw(3, 4, 5), draw(6, 5), draw(6), torch.tensor([11, 0, 4])
    loss, potentials = reference.clustering_head(features, weight, bias, positionwise=positionwise)
    logits = F.normalize(features, dim=-1) @ weight.T + bias
    slices = logits if positionwise else logits.flatten(0, 1)
    assignments = reference.sinkhorn_positionwise(slices / 0.06).view_as(logits)
    cross_entropy = F.cross_entropy((logits / 0.12).flatten(0, 1), assignments.flatten(0, 1))
    assert float(loss) == pytest.approx(float(cross_entropy), rel=1e-12)
    assert [x.shape for x in potentials] == [(3, 6), (3, 6), (3, 4)]
    position, image = [2, 0, 1], [3, 0, 1]
    targets = reference.clustering_targets(features[position, image], weight, bias, potentials, rows)
    torch.testing.assert_close(targets, assignments[position, image], rtol=0, atol=1e-14)


def test_statistics_of_targets_by_hand() -> None:
    """Half, half and nothing; all of one; equal ones."""
    targets = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 1.0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    loss, entropy, most_likely = reference.student_loss_with_statistics(torch.zeros(3, 3).double(), targets)
    assert loss.item() == pytest.approx(math.log(3))
    assert entropy.item() == pytest.approx((math.log(2) + math.log(3)) / 3)
    assert most_likely.tolist() == [1, 2, 0]


def test_gradients_by_finite_differences() -> None:
    cu_q, cu_k = torch.tensor([0, 2, 2, 3], dtype=torch.int32), torch.tensor([0, 3, 4, 4], dtype=torch.int32)
    kv_index = torch.tensor([1, 0, 0])
    tables = [*reference.rotary_tables(draw(3, 2), draw(2, 4)), *reference.rotary_tables(draw(4, 2), draw(2, 4))]
    packed = [x.requires_grad_() for x in (draw(3, 2, 4), draw(4, 2, 4), draw(4, 2, 4) + 1)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: reference.masked_cross_attention(q, k, v, *tables, cu_q, cu_k, 2, 4, kv_index=kv_index), packed
    )
    assert torch.autograd.gradcheck(
        lambda x: reference.sinkhorn_positionwise(x, eps=0.1), draw(2, 3, 4).requires_grad_()
    )
    features, weight, bias = draw(2, 3, 4).requires_grad_(), draw(5, 4).requires_grad_(), draw(5).requires_grad_()
    loss = reference.clustering_head(features, weight, bias).loss
    gradients = torch.autograd.grad(loss, (features, weight, bias), allow_unused=True)
    assert [gradient is None for gradient in gradients] == [True, False, False]
