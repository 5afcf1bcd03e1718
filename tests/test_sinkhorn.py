import math
from contextlib import nullcontext

import pytest
import torch
from numerics import assert_as_accurate, peak_allocation, sums_in_blocks
from torch import Tensor

from capi_kernels import (
    Potentials,
    assignments_from_potentials,
    reference,
    sinkhorn_positionwise,
    sinkhorn_potentials,
)
from capi_kernels.sinkhorn import cpu

SHAPES = [(1, 1), (5, 1), (1, 7), (3, 4, 9), (2, 3, 8, 33), (37, 16, 24), (2, 0, 3, 4)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def draw(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (std * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.fixture(params=[1 << 8, 1 << 12, 1 << 23], ids=["row_blocks", "chunks", "one_chunk"])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams single rows, a few positions, everything at once."""
    monkeypatch.setattr(cpu, "CHUNK_BYTES", request.param)


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_assignments_and_potentials_match_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = draw(*shape, dtype=dtype)
    for n_iterations, eps, temperature in [(1, 1e-8, 1.0), (3, 1e-8, 0.06), (4, 0.1, 0.5)]:
        options = {"n_iterations": n_iterations, "eps": eps, "temperature": temperature}
        oracle = reference.sinkhorn_positionwise(logits.double(), **options)
        # In half precision the definition is run in float32, then rounded: the op computes in float32.
        wide = logits.to(torch.promote_types(dtype, torch.float32))
        same_dtype = reference.sinkhorn_positionwise(wide, **options).to(dtype)
        potentials = sinkhorn_potentials(logits, **options)
        assert {x.dtype for x in potentials} == {wide.dtype}
        for actual in (
            sinkhorn_positionwise(logits, **options),
            assignments_from_potentials(logits, potentials, temperature=temperature),
        ):
            if dtype == torch.float64:
                torch.testing.assert_close(actual, oracle, rtol=0, atol=1e-13)
            else:
                assert_as_accurate(actual, same_dtype, oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chosen_rows_of_all_logits_and_of_their_own(dtype: torch.dtype) -> None:
    """Unsorted rows with repeats; once with columns that all positions share."""
    logits = draw(5, 6, 7, dtype=dtype)
    potentials = sinkhorn_potentials(logits, temperature=0.1)
    column_max, column, row = sinkhorn_potentials(logits.flatten(0, 1), temperature=0.1)
    together = Potentials(column_max.expand(5, -1), column.expand(5, -1), row.view(5, 6))
    rows = torch.tensor([29, 0, 7, 7, 13])  # image * 5 + position
    own = logits[rows % 5, rows // 5]
    for given in (potentials, together):
        everything = assignments_from_potentials(logits, given, temperature=0.1)
        expected = everything[[4, 0, 2, 2, 3], [5, 0, 1, 1, 2]]
        for x, index in ((logits, rows), (own, rows), (own.T.contiguous().T, rows.int()), (logits, rows.int())):
            assert torch.equal(assignments_from_potentials(x, given, index, temperature=0.1), expected)
        wide = Potentials(*(x.double() for x in given))
        for x in (logits, own):
            oracle = reference.assignments_from_potentials(x.double(), wide, rows, temperature=0.1)
            torch.testing.assert_close(expected.double(), oracle, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)
        assert assignments_from_potentials(own[:0], given, rows[:0], temperature=0.1).shape == (0, 7)
    assert torch.equal(
        assignments_from_potentials(logits.flatten(0, 1), Potentials(column_max, column, row), temperature=0.1),
        assignments_from_potentials(logits, together, temperature=0.1).flatten(0, 1),
    )


@pytest.mark.usefixtures("chunk_bytes")
def test_sums() -> None:
    logits = draw(3, 12, 30, dtype=torch.float64)
    balanced = sinkhorn_positionwise(logits, 500)
    torch.testing.assert_close(balanced.sum(-1), torch.ones(3, 12).double(), rtol=0, atol=1e-6)  # eps is 1e-8
    torch.testing.assert_close(balanced.sum(-2), torch.full((3, 30), 12 / 30).double(), rtol=0, atol=1e-6)
    once = sinkhorn_positionwise(logits, 1)
    assert (once.sum(-2) - 12 / 30).abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(2, 64), (64, 2)], ids=str)
def test_many_iterations_do_not_drift(shape: tuple[int, int]) -> None:
    logits = draw(*shape, std=5)
    oracle = reference.sinkhorn_positionwise(logits.double(), 200)
    assert_as_accurate(sinkhorn_positionwise(logits, 200), reference.sinkhorn_positionwise(logits, 200), oracle)


@pytest.mark.parametrize("n_iterations", [3, 20])
@pytest.mark.parametrize("kind", ["huge", "far_entries", "far_row", "dead_row", "single_minus_inf"])
def test_extremes(kind: str, n_iterations: int) -> None:
    logits = draw(2, 6, 9, std=3)
    if kind == "huge":
        logits *= 1e4 / logits.abs().max()
    if kind == "far_entries":
        logits[:, :, ::2] -= draw(2, 6, 5).sign() * 150
    if kind == "far_row":
        logits[:, 2] -= 60  # still comes back with every division by eps
    if kind == "dead_row":
        logits[:, 2] -= 1e4
    if kind == "single_minus_inf":
        logits[0, 1, 2] = -math.inf
    oracle = reference.sinkhorn_positionwise(logits.double(), n_iterations)
    actual = sinkhorn_positionwise(logits, n_iterations)
    assert_as_accurate(actual, reference.sinkhorn_positionwise(logits, n_iterations), oracle)
    assert_as_accurate(
        assignments_from_potentials(logits, sinkhorn_potentials(logits, n_iterations)),
        reference.sinkhorn_positionwise(logits, n_iterations),
        oracle,
    )
    if kind == "dead_row":
        assert (actual[:, 2] == 0).all()
    if kind == "far_row":
        assert actual[:, 2].sum() > (1.9 if n_iterations == 20 else 0)
    if kind == "single_minus_inf":
        assert actual[0, 1, 2] == 0


@pytest.mark.parametrize("bad", ["nan", "inf", "minus_inf_column"])
def test_what_makes_a_position_nan(bad: str) -> None:
    logits = draw(3, 6, 9)
    if bad == "nan":
        logits[1, 2, 3] = math.nan
    if bad == "inf":
        logits[1, 2, 3] = math.inf
    if bad == "minus_inf_column":
        logits[1, :, 3] = -math.inf
    actual = sinkhorn_positionwise(logits)
    assert actual[1].isnan().all()
    assert reference.sinkhorn_positionwise(logits)[1].isnan().all()
    assert actual[0].isfinite().all()
    assert actual[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_strided_logits_equal_contiguous_ones_and_stay_as_they_are(dtype: torch.dtype) -> None:
    packed = draw(3, 5, 2, 8, 7, dtype=dtype)
    views = {
        "images before positions": packed[:, 0, 0].transpose(0, 1),
        "leading axes swapped": packed.permute(2, 1, 0, 3, 4),
        "prototypes before images": packed[:, :, 1].mT,
        "every other prototype": packed[..., ::2],
        "expanded": packed[:1, :1, 0].expand(4, 5, 8, 7),
    }
    for name, view in views.items():
        before = packed.clone()
        out = sinkhorn_positionwise(view, temperature=0.1)
        assert torch.equal(packed, before), name
        assert torch.equal(
            out, sinkhorn_positionwise(view.clone(memory_format=torch.contiguous_format), temperature=0.1)
        ), name


def test_properties() -> None:
    logits = draw(5, 6, 9, dtype=torch.float64)
    out = sinkhorn_positionwise(logits)
    assert torch.equal(out, sinkhorn_positionwise(logits))
    images = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(sinkhorn_positionwise(logits[:, images]), out[:, images], rtol=0, atol=1e-14)
    for position in range(5):
        torch.testing.assert_close(sinkhorn_positionwise(logits[position]), out[position], rtol=0, atol=1e-14)
    torch.testing.assert_close(sinkhorn_positionwise(logits * 0.5, temperature=0.5), out, rtol=0, atol=1e-14)


def test_no_gradient_and_no_autocast() -> None:
    logits = draw(5, 6, 9).requires_grad_()
    out = sinkhorn_positionwise(logits)
    assert not out.requires_grad
    assert not any(x.requires_grad for x in sinkhorn_potentials(logits))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn_positionwise(logits), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_memory_is_the_output_the_potentials_and_one_position(dtype: torch.dtype) -> None:
    positions, images, prototypes = 3, 512, 4096  # 8 MiB a position
    logits = draw(positions, images, prototypes, dtype=dtype)
    position = 0 if dtype == torch.float32 else images * prototypes * 4
    potentials = positions * (2 * prototypes + images) * 4
    small = 8 * (images + prototypes) * 4  # sums and scales of one position
    assert peak_allocation(lambda: sinkhorn_potentials(logits)) <= images * prototypes * 4 + potentials + small
    out_bytes = logits.numel() * logits.element_size()
    assert peak_allocation(lambda: sinkhorn_positionwise(logits)) <= out_bytes + position + potentials + small


@pytest.mark.parametrize("op", [sinkhorn_positionwise, sinkhorn_potentials])
def test_bad_arguments(op) -> None:
    logits = draw(2, 3, 4)
    cases = [
        (TypeError, "logits must be floating point, got torch.int64", logits.long(), {}),
        (ValueError, r"logits must have the axes \[..., images, prototypes\], got shape \(4,\)", logits[0, 0], {}),
        (ValueError, "at least one element on the axis images, got 0", logits[:, :0], {}),
        (ValueError, "at least one element on the axis prototypes, got 0", logits[:, :, :0], {}),
        (ValueError, "n_iterations must be at least 1, got 0", logits, {"n_iterations": 0}),
        (ValueError, "eps must be finite and at least 0, got -1e-08", logits, {"eps": -1e-8}),
        (ValueError, "eps must be finite and at least 0, got nan", logits, {"eps": math.nan}),
        (ValueError, "temperature must be positive and finite, got nan", logits, {"temperature": math.nan}),
        (ValueError, "temperature must be positive and finite, got 0.0", logits, {"temperature": 0.0}),
        (ValueError, "temperature must be positive and finite, got -0.1", logits, {"temperature": -0.1}),
        (ValueError, "temperature must be positive and finite, got inf", logits, {"temperature": math.inf}),
        (
            TypeError,
            "process_group must be \"world\", a ProcessGroup or None, got 'all'",
            logits,
            {"process_group": "all"},
        ),
    ]
    for error, message, bad_logits, options in cases:
        with pytest.raises(error, match=message):
            op(bad_logits, **options)


@pytest.mark.parametrize("blocks", [None, 1, 3])
def test_long_sums_are_exact_to_a_few_roundings(blocks: int | None) -> None:
    """In any order of a product's sums: roundings add up like a random walk, and a soft cross-entropy weighs them."""
    eps = torch.finfo(torch.float32).eps
    bound = math.sqrt(cpu.SUMMED) * eps / 2
    with nullcontext() if blocks is None else sums_in_blocks(blocks):
        long_rows = sinkhorn_positionwise(draw(2, 8, 16384), temperature=0.06)
        long_columns = sinkhorn_positionwise(draw(2, 16384, 4), 1)
    assert (long_rows.double().sum(-1) - 1).abs().max() < bound
    exact = reference.sinkhorn_positionwise(draw(2, 16384, 4).double(), 1)
    # The arguments of exponentials are rounded when they are scaled and when the headroom is added, those of an
    # element and those of the row sum that it is divided by.
    rounded_arguments = 2 * cpu.HEADROOM * eps
    assert (long_columns / exact - 1).abs().max() < bound + rounded_arguments


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_summed_in_another_order_are_as_accurate(shape: tuple[int, ...], blocks: int) -> None:
    """As another machine's library may do."""
    logits = draw(*shape)
    oracle = reference.sinkhorn_positionwise(logits.double(), temperature=0.06)
    with sums_in_blocks(blocks):
        actual = sinkhorn_positionwise(logits, temperature=0.06)
    assert_as_accurate(actual, reference.sinkhorn_positionwise(logits, temperature=0.06), oracle)


def test_ops_called_by_name_give_constants() -> None:
    logits = draw(2, 3, 4).requires_grad_()
    assignments, *potentials = torch.ops.capi_kernels.sinkhorn(logits, 3, 1e-8, 0.1, None, True)
    assert torch.equal(assignments, sinkhorn_positionwise(logits, temperature=0.1))
    again = torch.ops.capi_kernels.assignments_from_potentials(logits, *potentials, None, 0.1, torch.float32)
    assert not any(x.requires_grad for x in (assignments, *potentials, again))


@pytest.mark.usefixtures("without_annotations")
def test_bad_potentials() -> None:
    logits = draw(2, 3, 4)
    potentials = sinkhorn_potentials(logits)
    with pytest.raises(ValueError, match=r"row must have the shape \(2, 3\), got \(2, 4\)"):
        assignments_from_potentials(logits, potentials._replace(row=potentials.column))
    with pytest.raises(ValueError, match="temperature must be positive and finite, got nan"):
        assignments_from_potentials(logits, potentials, temperature=math.nan)
    with pytest.raises(TypeError, match="potentials must be column_max, column and row, got 2 values"):
        assignments_from_potentials(logits, potentials[:2])
    for dtype in (torch.float16, torch.int64, torch.bool):  # The first would have overflowed, the second been rounded.
        with pytest.raises(TypeError, match=f"column must be torch.float32 or torch.float64, got {dtype}"):
            assignments_from_potentials(logits, potentials._replace(column=potentials.column.to(dtype)))
    assert torch.equal(*(assignments_from_potentials(logits, x) for x in (potentials, tuple(potentials))))
    rows = torch.tensor([5, 0])
    flat = sinkhorn_potentials(logits.flatten(0, 1))
    cases = [
        (r"row must have the axes \[positions, images\], got shape \(6,\)", logits, flat, rows),
        (r"column must have the shape \[positions=2, prototypes=4\], got \(2, 3\)", logits, "column", rows),
        (r"logits must have the shape \[selected=2, prototypes=4\], got \(3, 4\)", logits[0], potentials, rows),
        (r"logits must have the shape \[positions=2, images=3, proto", logits[:, 1:], potentials, rows),
        (r"logits must have the axes \[positions, images, proto", logits[None], potentials, rows),
        (r"rows must be in \[0, 6\), got values from 0 to 6", logits, potentials, rows + torch.tensor([1, 0])),
        ("row must be on the device of logits, cpu, got meta", logits, "row", rows),
        ("at least one element on the axis prototypes, got 0", logits[..., :0], potentials, None),
    ]
    for message, bad, given, index in cases:
        if given == "column":
            given = potentials._replace(column=potentials.row)
        if given == "row":
            given = potentials._replace(row=potentials.row.to("meta"))
        with pytest.raises(ValueError, match=message):
            assignments_from_potentials(bad, given, index)


@pytest.mark.parametrize(("dtype", "positions"), [(torch.float32, 8), (torch.bfloat16, 2)], ids=str)
def test_more_positions_at_a_time_where_the_output_holds_them(
    dtype: torch.dtype, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads then wait for each other less often, and no memory is taken."""
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 2 * 3 * 5 * 4)
    chunks = []
    balance = cpu.balance
    monkeypatch.setattr(cpu, "balance", lambda *given: chunks.append(len(given[1])) or balance(*given))
    sinkhorn_positionwise(draw(16, 3, 5, dtype=dtype))
    assert chunks == [positions] * (16 // positions)
