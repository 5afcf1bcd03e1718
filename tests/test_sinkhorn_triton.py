"""The Triton kernels of Sinkhorn: in the interpreter here, and once more where there is a GPU."""

import math

import pytest
import torch
from numerics import assert_as_accurate
from torch import Tensor
from torch.distributed import ProcessGroup

from capi_kernels import Potentials, _process_groups, reference, sinkhorn_positionwise
from capi_kernels.sinkhorn import balance_triton, columns_triton, common_triton, rows_triton
from capi_kernels.sinkhorn.assignments_triton import assignments
from capi_kernels.sinkhorn.balance_triton import balanced

pytestmark = pytest.mark.usefixtures("guarded_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ("columns", "rows")
# parts: row sums of the columns form that a kernel of their own adds up, and updates the rows by
with_parts = pytest.mark.parametrize("form", ("columns", "parts", "rows"), indirect=True)
DTYPES = [torch.float16, torch.float32]
# One element; one image; one prototype; several parts and tiles, the last ones ragged; a tile and one past it; several
# blocks of rows; leading axes of any number.
SHAPES = [(1, 1, 1), (2, 1, 7), (5, 1), (1, 3, 1100), (2, 2, 8, 64), (1, 9, 257), (1, 70, 20)]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use(request.param, monkeypatch)
    return request.param


def use(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "rows":
        monkeypatch.setattr(balance_triton, "MOST_IMAGES_IN_BLOCK", 0)
    if form == "parts":
        monkeypatch.setattr(columns_triton, "MOST_FOLDED_PARTS", 0)


def draw(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (std * torch.randn(shape, generator=generator, dtype=torch.float64)).to(DEVICE, dtype)


def run(logits: Tensor, n_iterations: int = 3, eps: float = 1e-8, temperature: float = 1.0) -> list[Tensor]:
    """The assignments, and those of the potentials alone."""
    out, _ = balanced(logits, n_iterations, eps, temperature, None, True)
    nothing, potentials = balanced(logits, n_iterations, eps, temperature, None, False)
    assert nothing is None
    assert {x.dtype for x in potentials} == {torch.float32}
    return [out, assignments(logits, potentials, None, temperature, logits.dtype)]


def assert_defined(logits: Tensor, *options: float) -> Tensor:
    """Compare with the definition, which for half precision runs in float32 and is then rounded, as the kernels do."""
    n_iterations, eps, temperature = (*options, *(3, 1e-8, 1.0)[len(options) :])
    oracle, wide = (
        reference.sinkhorn_positionwise(logits.to(dtype), n_iterations, eps, temperature=temperature)
        for dtype in (torch.float64, torch.float32)
    )
    for actual in run(logits, *options):
        assert_as_accurate(actual, wide.to(logits.dtype), oracle)
    return actual


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_assignments_and_potentials_match_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = draw(*shape, dtype=dtype)
    assert_defined(logits, 3, 1e-8, 0.06)
    if dtype == torch.float32 and math.prod(shape) < 1000:
        assert_defined(logits, 1)
        assert_defined(logits, 4, 0.1, 0.5)


@with_parts
@pytest.mark.parametrize("shape", [(1, 3, 1100), (2, 2, 8, 64)], ids=str)
def test_row_sums_in_parts_or_folded(form: str, shape: tuple[int, ...]) -> None:
    for n_iterations in (1, 2, 3):
        assert_defined(draw(*shape), n_iterations, 1e-8, 0.06)


@with_parts
def test_no_position(form: str) -> None:
    out, potentials = balanced(draw(0, 3, 4), 3, 1e-8, 1.0, None, True)
    assert out.shape == (0, 3, 4)
    assert [x.shape for x in potentials] == [(0, 4), (0, 4), (0, 3)]


def test_eps_is_weighed_against_exponentials_shifted_by_50(form: str) -> None:
    eps = math.exp(50)  # exp(50) / (exp(50) + eps) = 1/2, then 1/2 / (1/2 + eps)
    out, again = run(torch.zeros(1, 1, 1, device=DEVICE), 1, eps)
    assert out.item() == again.item() == pytest.approx(0.5 / (0.5 + eps), rel=1e-6, abs=0)


@pytest.mark.filterwarnings("ignore:overflow encountered in divide")  # NumPy's: the dead row, before it is clamped
@with_parts
@pytest.mark.parametrize("kind", ["huge", "far_entries", "far_row", "dead_row", "minus_inf", "equal"])
def test_extremes(kind: str, form: str) -> None:
    logits = draw(2, 6, 9, std=3)
    n_iterations = 3
    if kind == "huge":
        logits *= 1e4 / logits.abs().max()
    if kind == "far_entries":
        logits[:, :, ::2] -= draw(2, 6, 5).sign() * 150  # half of them 300 below the largest of their column
    if kind == "far_row":
        logits[:, 2] -= 60
        n_iterations = 12  # Every division by eps brings it closer.
    if kind == "dead_row":
        logits[:, 2] -= 1e4
        n_iterations = 6  # The divisions by eps would take its potential to inf.
    if kind == "minus_inf":
        logits[0, 1, 2] = logits[1, :5, 3] = -math.inf
    if kind == "equal":
        logits.fill_(-3.3)
    out = assert_defined(logits, n_iterations)
    if kind == "far_row":
        torch.testing.assert_close(out[:, 2].sum(-1), torch.ones(2, device=DEVICE))
    if kind == "dead_row":
        assert (out[:, 2] == 0).all()
    if kind == "minus_inf":
        assert out[0, 1, 2] == 0
        assert (out[1, :5, 3] == 0).all()
        assert out[1, 5, 3] > 0
    if kind == "equal":
        torch.testing.assert_close(out, torch.full_like(out, 1 / 9))


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice) encountered")  # NumPy's, of the interpreter
@pytest.mark.parametrize("bad", ["nan", "inf", "minus_inf_column"])
def test_what_makes_a_position_nan(bad: str, form: str) -> None:
    logits = draw(3, 6, 9)
    if bad == "nan":
        logits[1, 2, 3] = math.nan
    if bad == "inf":
        logits[1, 2, 3] = math.inf
    if bad == "minus_inf_column":
        logits[1, :, 3] = -math.inf
    for out in run(logits):
        assert out[1].isnan().all()
        assert out[0].isfinite().all()
        assert out[2].isfinite().all()


def test_images_at_minus_inf_before_others(form: str) -> None:
    """A whole block of images without mass must not spoil the running maximum."""
    logits = draw(1, 70, 5)
    logits[0, :66, 1] = -math.inf
    assert_defined(logits)


@pytest.mark.parametrize(
    ("form", "shape"), [("columns", (1, 1, 1024)), ("columns", (1, 512, 1)), ("rows", (1, 1, 1024))], ids=str
)
def test_many_iterations_do_not_drift(form: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each iteration moves a factor of prototypes / images between the potentials: 512^16 would overflow."""
    use(form, monkeypatch)
    out = assert_defined(draw(*shape), 16)
    torch.testing.assert_close(out.sum(-1), torch.ones(shape[:2], device=DEVICE))


@with_parts
def test_moving_a_factor_between_potentials_keeps_the_weight_of_eps(form: str) -> None:
    assert_defined(draw(1, 3, 40), 7, 0.1)


def views() -> dict[str, Tensor]:
    packed = draw(3, 3, 2, 5, 7, dtype=torch.float16)
    return {
        "images before positions": packed[:, 0, 0].transpose(0, 1),
        "images before rows and columns": packed.permute(3, 0, 1, 2, 4)[:, :, 0, 0],
        "prototypes before images": packed[0, :, 1].mT,
        "every other prototype": packed[0, ..., ::2],
        "expanded": packed[:1, 0, 0].expand(4, 5, 7),
        "leading axes in another order": packed[:2].permute(2, 1, 0, 3, 4),
        "leading axes with a gap": packed[:2, :2],
        "two of three leading axes merge": packed[::2],
        "an expanded axis before another": packed[:1, :, 0].expand(2, 3, 5, 7),
    }


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", views())
def test_strided_logits_equal_contiguous_ones_and_are_not_copied(name: str) -> None:
    view = views()[name]
    before = view.clone()
    parts = [part for (part,) in common_triton.merged(view)]
    counts = {"leading axes in another order": 6, "leading axes with a gap": 2, "two of three leading axes merge": 2}
    assert len(parts) == (counts | {"an expanded axis before another": 2}).get(name, 1)
    assert all(part.untyped_storage().data_ptr() == view.untyped_storage().data_ptr() for part in parts)
    assert torch.equal(torch.cat(parts), view.flatten(0, -3) if view.ndim > 2 else view[None])
    out, again = run(view, 2, temperature=0.1)
    assert torch.equal(view, before)
    contiguous = run(view.clone(memory_format=torch.contiguous_format), 2, temperature=0.1)
    assert torch.equal(out, contiguous[0])
    assert torch.equal(again, contiguous[1])


def test_assignments_of_chosen_rows() -> None:
    """Of all logits, and of their own, unsorted with repeats; once with columns that all positions share."""
    logits = draw(6, 5, 7).transpose(0, 1)  # [positions, images, prototypes]
    _, potentials = balanced(logits, 3, 1e-8, 0.1, None, False)
    _, (column_max, column, row) = balanced(logits.flatten(0, 1), 3, 1e-8, 0.1, None, False)
    together = Potentials(column_max.expand(5, -1), column.expand(5, -1), row.view(5, 6))
    rows = torch.tensor([29, 0, 7, 7, 13], device=DEVICE)  # image * 5 + position
    own = logits[rows % 5, rows // 5]
    strided = draw(7, 5).T.copy_(own)
    for given in (potentials, together, together._replace(column=together.column.contiguous())):
        everything = assignments(logits, given, None, 0.1, torch.float32)
        expected = everything[[4, 0, 2, 2, 3], [5, 0, 1, 1, 2]]
        oracle = reference.assignments_from_potentials(logits, given, rows, temperature=0.1)
        torch.testing.assert_close(expected, oracle)
        for index in (rows, rows.int(), rows.expand(2, 5).T[:, 0]):
            for x in (logits, own, strided):
                assert torch.equal(assignments(x, given, index, 0.1, torch.float32), expected)
    half = assignments(own.half(), potentials, rows, 0.1, torch.float32)
    torch.testing.assert_close(half, assignments(own.half().float(), potentials, rows, 0.1, torch.float32))
    assert assignments(own[:0], potentials, rows[:0], 0.1, torch.float32).shape == (0, 7)


@with_parts
def test_positions_are_independent_and_bits_repeat(form: str) -> None:
    logits = draw(2, *((33, 20) if form == "rows" else (3, 1100)), dtype=torch.float16)  # two parts to add
    first, second = run(logits, temperature=0.1), run(logits, temperature=0.1)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    for position in range(2):
        alone = run(logits[position : position + 1], temperature=0.1)
        assert all(torch.equal(x[position], y[0]) for x, y in zip(first, alone, strict=True))


def test_permutations(form: str) -> None:
    logits = draw(2, 34, 9)
    oracle = reference.sinkhorn_positionwise(logits.double(), temperature=0.1)
    single = reference.sinkhorn_positionwise(logits, temperature=0.1)
    images = torch.randperm(34, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for out in run(logits[:, images], temperature=0.1):
        assert_as_accurate(out, single[:, images], oracle[:, images])
    for out in run(logits.flip(2), temperature=0.1):
        assert_as_accurate(out, single.flip(2), oracle.flip(2))


def test_reduction_of_more_parts_than_a_block() -> None:
    parts = draw(2, 131, 70)
    out = torch.full((2, 70), math.nan, device=DEVICE)
    common_triton.reduce_parts(parts, out, 0.0, update=False)
    torch.testing.assert_close(out, parts.sum(1))
    potentials = draw(2, 70).abs()
    updated = potentials.clone()
    common_triton.reduce_parts(parts.abs(), updated, 0.25, update=True)
    torch.testing.assert_close(updated, potentials / (parts.abs().sum(1) + 0.25))


def test_images_in_several_blocks_equal_one() -> None:
    """What the clustering head does when all positions balance together: the rows form, fed in pieces."""
    logits = draw(1, 50, 20)
    whole = common_triton.new_potentials(1, 50, 20, logits.device)
    pieces = common_triton.new_potentials(1, 50, 20, logits.device)
    cuts = (slice(0, 7), slice(7, 40), slice(40, 50))
    for potentials, here in ((whole, (slice(None),)), (pieces, cuts)):
        blocks = [(logits[:, cut], potentials.row[:, cut]) for cut in here]
        assert not list(rows_triton.balance_rows(blocks, *potentials[:2], 5, 1e-8, 0.1, None))
    for one, several in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, several)


def test_a_chunk_is_reduced_while_the_next_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    events = []

    class Work:
        def __init__(self, chunk: int):
            self.chunk = chunk

        def wait(self) -> None:
            events.append(("wait", self.chunk))

    def all_reduce(x: Tensor, op, group, async_op: bool) -> Work:
        assert async_op
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        events.append(("reduce", sum(kind == "reduce" for kind, _ in events) % 3))
        return Work(events[-1][1])

    monkeypatch.setattr(_process_groups, "all_reduce", all_reduce)
    monkeypatch.setattr(balance_triton, "CHUNKS_IN_FLIGHT", 3)
    logits = draw(3, 5, 7)
    out, _ = balanced(logits, 3, 1e-8, 0.1, ProcessGroup(0, 1), True)
    # Maxima; then, for each of them, sums of every iteration but the last: three chunks in flight at every moment.
    expected = [("reduce", 0), ("reduce", 1), ("reduce", 2)]
    for _ in range(3):
        expected += [(kind, chunk) for chunk in range(3) for kind in ("wait", "reduce")]
    expected += [("wait", 0), ("wait", 1), ("wait", 2)]
    assert events == expected
    monkeypatch.undo()
    alone, _ = balanced(logits, 3, 1e-8, 0.1, None, True)
    torch.testing.assert_close(out, alone)


@pytest.mark.parametrize("stride", ["position", "image", "prototype"])
def test_offsets_beyond_two_to_the_31(stride: str, form: str) -> None:
    """Strides that take the last element past 2^31, in memory of which all but a few pages are never touched."""
    small = draw(3, 3, 3, dtype=torch.float16)
    storage = torch.UntypedStorage(2 * ((1 << 31) + (1 << 16)), device=DEVICE)
    buffer = torch.tensor([], dtype=torch.float16, device=DEVICE).set_(storage)
    strides = {"position": 64, "image": 8, "prototype": 1} | {stride: 1 << 30}
    logits = buffer.as_strided(small.shape, tuple(strides.values()))
    logits.copy_(small)
    assert torch.equal(run(logits, temperature=0.1)[0], run(small, temperature=0.1)[0])


def test_what_a_gpu_cannot_do() -> None:
    with pytest.raises(TypeError, match=r"logits must be torch.float16, torch.bfloat16 or torch.float32, got torch.f"):
        balanced(draw(1, 2, 3).double(), 3, 1e-8, 1.0, None, True)
    with pytest.raises(ValueError, match="at most 1048576 prototypes, got 1048577"):
        balanced(torch.zeros(1, 1, 1, device=DEVICE).expand(1, 1, (1 << 20) + 1), 3, 1e-8, 1.0, None, True)


@pytest.mark.gpu
def test_a_thousand_random_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(1000):
        shape = [int(2 ** (limit * torch.rand((), generator=generator))) for limit in (4.0, 10.5, 14.5)]
        with monkeypatch.context() as patch:
            use(("columns", "parts", "rows")[case % 3], patch)
            dtype = (torch.bfloat16, torch.float16, torch.float32)[case // 3 % 3]
            assert_defined(torch.randn(shape, generator=generator).to(DEVICE, dtype), 3, 1e-8, 0.06)


@pytest.mark.gpu
def test_bfloat16_is_no_worse_than_the_official_formula_in_bfloat16(form: str) -> None:
    logits = torch.randn((4, 512, 16384), generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    oracle = reference.sinkhorn_positionwise(logits.double(), temperature=0.06)
    official = reference.sinkhorn_positionwise(logits, temperature=0.06)
    for out in run(logits, temperature=0.06):
        assert (out.double() - oracle).abs().max() <= (official.double() - oracle).abs().max()


@pytest.mark.gpu
def test_two_to_the_31_elements_and_more() -> None:
    positions, images, prototypes = 257, 512, 16384
    logits = torch.randn((1, images, prototypes), device=DEVICE, dtype=torch.bfloat16)
    logits = logits.repeat(positions, 1, 1)
    first, second = (sinkhorn_positionwise(logits, temperature=0.06) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first[0], first[-1])
    assert torch.equal(first[0], sinkhorn_positionwise(logits[:1], temperature=0.06)[0])


@pytest.mark.gpu
def test_the_public_op_uses_the_kernels() -> None:
    logits = draw(3, 40, 300)
    assert torch.equal(sinkhorn_positionwise(logits), balanced(logits, 3, 1e-8, 1.0, None, True)[0])
    assert isinstance(balanced(logits, 3, 1e-8, 1.0, None, False)[1], Potentials)
