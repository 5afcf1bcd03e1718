"""Every public operation, called with what may come: it refuses in one line, or its results are the definition's."""

from collections.abc import Callable

import pytest
import torch
from fuzzing import FLOATING, fuzz, strange, tensors, within
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

import capi_kernels
from capi_kernels import reference

pytestmark = pytest.mark.usefixtures("without_annotations")

SIZES = st.integers(0, 9)
MOST = 1e24  # On a CPU exponentials carry exp(32), and potentials of images without mass stop growing before inf.
TEMPERATURES = st.sampled_from((0.06, 0.12, 1.0, 3))


@st.composite
def sinkhorn(draw) -> dict:
    shape = (*draw(st.lists(st.integers(0, 4), max_size=2)), draw(SIZES), draw(SIZES))
    return {
        "logits": draw(tensors(shape, draw(st.sampled_from(FLOATING)), grad=True)),
        "n_iterations": draw(st.integers(1, 4)),
        "eps": draw(st.sampled_from((0, 1e-8, 1e-3))),
        "temperature": draw(TEMPERATURES),
        "process_group": draw(st.sampled_from(("world", None))),
    }


@st.composite
def chosen_rows(draw, rows: int) -> Tensor:
    chosen = draw(st.lists(st.integers(0, rows - 1), max_size=9)) if rows else []
    return torch.tensor(chosen, dtype=draw(st.sampled_from((torch.int32, torch.int64))))


@st.composite
def assignments(draw) -> dict:
    positions, images, prototypes = draw(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 9)))
    logits = draw(tensors((positions, images, prototypes), draw(st.sampled_from(FLOATING))))
    temperature = draw(TEMPERATURES)
    potentials = capi_kernels.sinkhorn_potentials(logits, temperature=temperature)
    rows = draw(st.none() | chosen_rows(positions * images))
    if rows is not None and draw(st.booleans()):
        logits = logits[rows.long() % max(1, positions), rows.long() // max(1, positions)]
    return {"logits": logits, "potentials": potentials, "rows": rows, "temperature": temperature}


@st.composite
def linear(draw, dim: int, dtype: torch.dtype) -> dict:
    prototypes = draw(st.integers(1, 9))
    other = draw(st.sampled_from((dtype, torch.float32)))
    bias = draw(st.none() | tensors((prototypes,), other, grad=True))
    return {"weight": draw(tensors((prototypes, dim), other, grad=True)), "bias": bias}


@st.composite
def head(draw) -> dict:
    positions, images, dim = draw(st.tuples(SIZES, SIZES, SIZES))
    dtype = draw(st.sampled_from(FLOATING))
    return {
        "features": draw(tensors((positions, images, dim), dtype, grad=True)),
        **draw(linear(dim, dtype)),
        "target_temperature": draw(TEMPERATURES),
        "prediction_temperature": draw(TEMPERATURES),
        "n_iterations": draw(st.integers(1, 4)),
        "eps": draw(st.sampled_from((0.0, 1e-8))),
        "positionwise": draw(st.booleans()),
        "position_chunk": draw(st.none() | st.integers(1, 12)),
    }


@st.composite
def head_targets(draw) -> dict:
    positions, images, dim = draw(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9)))
    dtype = draw(st.sampled_from(FLOATING))
    features, layer = draw(tensors((positions, images, dim), dtype)), draw(linear(dim, dtype))
    potentials = capi_kernels.clustering_head(features, **layer).potentials
    rows = draw(chosen_rows(positions * images))
    chosen = features[rows.long() % positions, rows.long() // positions]
    return {"features": chosen, **layer, "potentials": potentials, "rows": rows, "target_temperature": 0.06}


@st.composite
def student(draw) -> dict:
    shape = draw(st.tuples(SIZES, SIZES))
    logits = draw(tensors(shape, draw(st.sampled_from(FLOATING)), grad=True))
    targets = draw(tensors(shape, draw(st.sampled_from(FLOATING)))).softmax(-1)
    return {"logits": logits, "targets": targets, "temperature": draw(TEMPERATURES)}


@st.composite
def tables(draw) -> dict:
    tokens, head_dim = draw(SIZES), draw(SIZES)
    dtypes = st.sampled_from(FLOATING)
    return {"coords": draw(tensors((tokens, 2), draw(dtypes))), "freqs": draw(tensors((2, head_dim), draw(dtypes)))}


@st.composite
def of_tokens(draw, x: Tensor, names: tuple[str, str], *, always: bool = False) -> dict:
    """Tables of a rotary embedding, or none."""
    tokens, _, head_dim = x.shape
    if not always and draw(st.booleans()):
        return dict.fromkeys(names)
    wide = draw(st.sampled_from((torch.float32, torch.promote_types(x.dtype, torch.float32))))
    return {name: draw(tensors((tokens, head_dim), wide)) for name in names}


@st.composite
def rotary(draw) -> dict:
    shape = draw(st.tuples(SIZES, st.integers(1, 3), st.integers(1, 5).map(lambda half: 2 * half)))
    x = draw(tensors(shape, draw(st.sampled_from(FLOATING)), grad=True))
    return {"x": x, **draw(of_tokens(x, ("cos", "sin"), always=True))}


def sequences(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


LENGTHS = st.lists(st.integers(0, 7), min_size=1, max_size=4)
HEADS = st.tuples(st.integers(1, 3), st.sampled_from((1, 2, 4, 6, 8, 16)))


@st.composite
def self_attention(draw, *, packed: bool = False) -> dict:
    lengths, (heads, head_dim) = draw(LENGTHS), draw(HEADS)
    dtype, tokens = draw(st.sampled_from(FLOATING)), sum(lengths)
    shape = (tokens, *([3] if packed else []), heads, head_dim)
    names = ("qkv",) if packed else ("q", "k", "v")
    operands = {name: draw(tensors(shape, dtype, grad=True)) for name in names}
    x = operands["qkv"][:, 0] if packed else operands["q"]
    tables = dict.fromkeys(("cos", "sin")) if head_dim % 2 else draw(of_tokens(x, ("cos", "sin")))
    longest = max(lengths) + draw(st.integers(0, 2))
    scale = draw(st.none() | st.sampled_from((0.5, 1)))
    return {**operands, **tables, "cu_seqlens": sequences(lengths), "max_seqlen": longest, "scale": scale}


@st.composite
def cross_attention(draw, operands: tuple[str, ...]) -> dict:
    groups, contexts, (heads, head_dim) = draw(LENGTHS), draw(LENGTHS), draw(HEADS)
    dtype = draw(st.sampled_from(FLOATING))
    index = draw(st.lists(st.integers(0, len(contexts) - 1), min_size=len(groups), max_size=len(groups)))
    kv_index = torch.tensor(index, dtype=draw(st.sampled_from((torch.int32, torch.int64))))
    if draw(st.booleans()):
        groups, kv_index = (groups * len(contexts))[: len(contexts)], None
    shapes = {"q": (sum(groups), heads, head_dim), "kv": (sum(contexts), 2, heads, head_dim)}
    shapes["k"] = shapes["v"] = (sum(contexts), heads, head_dim)
    call = {name: draw(tensors(shapes[name], dtype, grad=True)) for name in operands}
    k = call["k"] if "k" in call else call["kv"][:, 0]
    for x, names in (call["q"], ("q_cos", "q_sin")), (k, ("k_cos", "k_sin")):
        call |= dict.fromkeys(names) if head_dim % 2 else draw(of_tokens(x, names))
    call |= {"cu_seqlens_q": sequences(groups), "cu_seqlens_k": sequences(contexts)}
    call |= {"max_seqlen_q": max(groups) + draw(st.integers(0, 2)), "max_seqlen_k": max(contexts)}
    return call | {"kv_index": kv_index, "scale": draw(st.none() | st.sampled_from((0.5, 1)))}


def reference_of_packed(qkv: Tensor, *arguments, **options) -> Tensor:
    return reference.visible_attention(*qkv.unbind(1), *arguments, **options)


def reference_of_packed_context(q: Tensor, kv: Tensor, *arguments, **options) -> Tensor:
    return reference.masked_cross_attention(q, *kv.unbind(1), *arguments, **options)


OPERATIONS = {
    "sinkhorn_positionwise": sinkhorn(),
    "sinkhorn_potentials": sinkhorn(),
    "assignments_from_potentials": assignments(),
    "clustering_head": head(),
    "clustering_targets": head_targets(),
    "student_loss": student(),
    "student_loss_with_statistics": student(),
    "rotary_tables": tables(),
    "apply_rotary": rotary(),
    "visible_attention": self_attention(),
    "visible_attention_qkvpacked": self_attention(packed=True),
    "masked_cross_attention": cross_attention(("q", "k", "v")),
    "masked_cross_attention_kvpacked": cross_attention(("q", "kv")),
    "cross_attention_weights": cross_attention(("q", "k")),
}
OF_TOKENS = [name for name in OPERATIONS if "attention" in name]
DEFINITIONS = {
    "visible_attention_qkvpacked": reference_of_packed,
    "masked_cross_attention_kvpacked": reference_of_packed_context,
}
# What the caller asks for by them is as large.
UNBOUNDED = {"n_iterations", "max_seqlen_q", "max_seqlen_k"}


def widened(x: object) -> object:
    """In float64, apart from whatever it is part of."""
    if isinstance(x, Tensor):
        return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
    return type(x)(*map(widened, x)) if isinstance(x, tuple) and hasattr(x, "_fields") else x


def flat(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for part in result for x in flat(part)]


def products(potentials: reference.Potentials) -> tuple[Tensor, Tensor]:
    """Only the product of column and row is defined."""
    return potentials.column_max, potentials.column.unsqueeze(-2) * potentials.row.unsqueeze(-1)


def comparable(result: object) -> object:
    if isinstance(result, reference.Potentials):
        return products(result)
    if isinstance(result, reference.ClusteringHead):
        return result.loss, products(result.potentials)
    return result


def assert_same(actual: Tensor, same_dtype: Tensor, oracle: Tensor, dtype: torch.dtype) -> None:
    """To nearly half of the digits, or four times the error of the definition in the same dtype, where both are finite.

    Another answer is looked for, not its rounding, which other tests judge.
    """
    assert actual.shape == oracle.shape
    assert actual.dtype == same_dtype.dtype
    if actual.is_meta:
        return
    if not actual.is_floating_point():
        assert torch.equal(actual, same_dtype) or torch.equal(actual, oracle)
        return
    actual, same_dtype = actual.detach().double(), same_dtype.detach().double()
    assert actual[oracle.isnan() & same_dtype.isnan()].isnan().all()
    finite = (oracle.abs() < MOST) & same_dtype.isfinite()
    if finite.any():
        actual, same_dtype, oracle = actual[finite], same_dtype[finite], oracle[finite]
        budget = 4 * torch.finfo(dtype).eps ** 0.5 * (1 + oracle.abs().max()) + 4 * (same_dtype - oracle).abs().max()
        error = (actual - oracle).abs().max()
        assert error <= budget, f"error {error:.3g} above the budget {budget:.3g}"


def saturates(call: dict) -> bool:
    """Whether an image lies so far below the others that without eps its potential has no number."""
    if call.get("eps") != 0:
        return False
    logits, temperature = call.get("logits"), call.get("temperature")
    if logits is None:
        temperature = call["target_temperature"]
        logits = normalize(call["features"].double(), dim=-1, eps=1e-7) @ call["weight"].double().mT
        logits = logits if call["bias"] is None else logits + call["bias"]
        logits = logits if call["positionwise"] else logits.flatten(0, 1)
    below = (logits.double() - logits.double().amax(-2, keepdim=True)) / temperature
    return not (below.is_meta or bool((below.amax(-1) > -65).all()))


def finite(call: dict) -> bool:
    """Whether all numbers are; a query whose scores are all -inf is 0 for PyTorch's softmax, and NaN here."""
    operands = [x for x in call.values() if isinstance(x, Tensor) and not x.is_meta]
    return all(bool(x.isfinite().all()) for x in operands)


def narrowest(call: dict) -> torch.dtype:
    operands = [x for value in call.values() for x in (value if isinstance(value, tuple) else (value,))]
    dtypes = [x.dtype for x in operands if isinstance(x, Tensor) and x.is_floating_point()]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def gradients(result: object, call: dict) -> dict[str, Tensor]:
    """Of the sum of everything that has one."""
    sums = [x.double().sum() for x in flat(result) if x.requires_grad]
    names = [name for name, x in call.items() if isinstance(x, Tensor) and x.requires_grad]
    if not sums or not names:
        return {}
    found = torch.autograd.grad(sum(sums), [call[name] for name in names], allow_unused=True)
    return {name: x for name, x in zip(names, found, strict=True) if x is not None}


def judged(name: str, call: dict) -> None:
    """Calls an operation. Raises what it does, or AssertionError where the result is not the definition's."""
    result = getattr(capi_kernels, name)(**call)
    define: Callable = DEFINITIONS.get(name, getattr(reference, name, None))
    wide = {argument: widened(value) for argument, value in call.items()}
    same_dtype, oracle = define(**call), define(**wide)
    if saturates(call) or (name in OF_TOKENS and not finite(call)):
        return
    dtype = narrowest(call)
    for versions in zip(*(flat(comparable(x)) for x in (result, same_dtype, oracle)), strict=True):
        assert_same(*versions, dtype)
    ours, *theirs = gradients(result, call), gradients(same_dtype, call), gradients(oracle, wide)
    for argument, gradient in ours.items():
        assert gradient.dtype == call[argument].dtype
        assert_same(gradient, *(others[argument] for others in theirs), dtype)


@pytest.mark.parametrize("name", OPERATIONS)
@fuzz(20)
@given(data=st.data())
def test_what_an_operation_accepts_it_computes_as_it_is_defined(name, data) -> None:
    call = data.draw(OPERATIONS[name])
    with within(10):
        try:
            judged(name, call)
        except (ValueError, TypeError) as error:
            assert "\n" not in str(error)
            # Nothing is wrong with these calls but an axis without an element.
            assert any(isinstance(x, Tensor) and not x.numel() for x in call.values())


@pytest.mark.parametrize("name", OPERATIONS)
@fuzz(30)
@given(data=st.data())
def test_a_strange_argument_is_refused_in_one_line_or_computed_with(name, data) -> None:
    call = data.draw(OPERATIONS[name])
    for argument in data.draw(st.lists(st.sampled_from(sorted(call)), min_size=1, max_size=2, unique=True)):
        value = data.draw(strange(call[argument]))
        if not (argument in UNBOUNDED and isinstance(value, int | float) and 100 < value < 2**31):
            call[argument] = value
    note(f"{name} of {call}")
    with within(10):
        try:
            judged(name, call)
        except (ValueError, TypeError) as error:
            assert "\n" not in str(error)
