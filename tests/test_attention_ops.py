"""The attention ops as PyTorch sees them: schemas, fakes, gradients, torch.compile, torch.func, checkpointing."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from capi_kernels import (
    apply_rotary,
    cross_attention_weights,
    masked_cross_attention,
    masked_cross_attention_kvpacked,
    visible_attention,
    visible_attention_qkvpacked,
)

OPS = torch.ops.capi_kernels
# Of torch 2.14, within its own check.
OPCHECK = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def visible_operands(lengths: list[int], *, rotary: bool = True) -> tuple:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(sum(lengths), 3, 2, 8, generator=generator).unbind(1)
    tables = torch.randn(2, sum(lengths), 8, generator=generator).unbind(0) if rotary else (None, None)
    where = (cumulative(lengths), None, None, max(lengths), max(lengths))
    return *(x.requires_grad_() for x in (q, k, v)), *tables, None, None, *where, 0.3


def cross_operands(queries: list[int], contexts: list[int], kv_index: list[int] | None) -> tuple:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(sum(queries), 2, 8, generator=generator)
    k, v = torch.randn(sum(contexts), 2, 2, 8, generator=generator).unbind(1)
    q_tables = torch.randn(2, sum(queries), 8, generator=generator).unbind(0)
    k_tables = torch.randn(2, sum(contexts), 8, generator=generator).unbind(0)
    index = None if kv_index is None else torch.tensor(kv_index)
    leaves = (x.requires_grad_() for x in (q, k, v))
    lengths = (cumulative(queries), cumulative(contexts), index, max(queries), max(contexts))
    return *leaves, *q_tables, *k_tables, *lengths, 0.3


def weights_operands(*lengths) -> tuple:
    q, k, _, *rest = cross_operands(*lengths)
    return q, k, *rest


CASES = {
    "ragged": (OPS.attention.default, visible_operands([3, 0, 5])),
    "full": (OPS.attention.default, visible_operands([4, 4], rotary=False)),
    "cross": (OPS.attention.default, cross_operands([3, 1], [5, 2], None)),
    "indexed": (OPS.attention.default, cross_operands([3, 1, 2], [5, 2], [1, 0, 1])),
    "weights": (OPS.cross_attention_weights.default, weights_operands([3, 1], [5, 2], None)),
    "indexed weights": (OPS.cross_attention_weights.default, weights_operands([3, 1, 2], [5, 2], [1, 0, 1])),
}


def visible(*operands) -> Tensor:
    q, k, v, cos, sin, _, _, cu_seqlens, _, _, max_seqlen, _, scale = operands
    return visible_attention(q, k, v, cos, sin, cu_seqlens, max_seqlen, scale=scale)


def cross(*operands) -> Tensor:
    *tensors, kv_index, max_seqlen_q, max_seqlen_k, scale = operands
    return masked_cross_attention(*tensors, max_seqlen_q, max_seqlen_k, kv_index=kv_index, scale=scale)


def weights(*operands) -> Tensor:
    *tensors, kv_index, max_seqlen_q, max_seqlen_k, scale = operands
    return cross_attention_weights(*tensors, max_seqlen_q, max_seqlen_k, kv_index=kv_index, scale=scale)


def visible_packed(q, k, v, *operands) -> Tensor:
    return visible_of(torch.stack([q, k, v], 1), *operands)


def visible_of(qkv, cos, sin, _k_cos, _k_sin, cu_seqlens, _cu_seqlens_k, _kv_index, max_seqlen, _, scale) -> Tensor:
    return visible_attention_qkvpacked(qkv, cos, sin, cu_seqlens, max_seqlen, scale=scale)


def cross_packed(q, k, v, *operands) -> Tensor:
    *tensors, kv_index, max_seqlen_q, max_seqlen_k, scale = operands
    kv = torch.stack([k, v], 1)
    return masked_cross_attention_kvpacked(q, kv, *tensors, max_seqlen_q, max_seqlen_k, kv_index=kv_index, scale=scale)


# The public functions on the operands of their ops, with q, k and v apart and packed.
FUNCTIONS = {
    "ragged": (visible, visible_packed),
    "full": (visible, visible_packed),
    "cross": (cross, cross_packed),
    "indexed": (cross, cross_packed),
    "weights": (weights,),
    "indexed weights": (weights,),
}
# What the tests below run: a case, and how it is called.
CALLS = [("ragged", False), ("ragged", True), ("indexed", False), ("indexed", True), ("indexed weights", False)]


def leaves_of(case: str) -> int:
    """How many operands have gradients."""
    return 2 if "weights" in case else 3


def check_ops(op, operands: tuple) -> None:
    torch.library.opcheck(op, operands)
    operands = [x.detach() if isinstance(x, Tensor) else x for x in operands]
    results = op(*operands)
    out, *saved = (results,) if isinstance(results, Tensor) else results
    backward = getattr(OPS, f"{op._opname}_backward").default
    kinds = [[3]] * (operands[-5] is None) + [[1, 2]] + [[1, 1, 1]] * (out.device.type == "cpu")
    for parts in kinds if saved else [None]:
        more = () if parts is None else (parts,)
        torch.library.opcheck(backward, (torch.randn_like(out), out, *saved, *operands, *more))


@OPCHECK
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str) -> None:
    check_ops(*CASES[case])


@OPCHECK
@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck_on_a_gpu(case: str, dtype: torch.dtype) -> None:
    op, operands = CASES[case]
    leaves = [x.detach().to("cuda", dtype).requires_grad_() for x in operands[: leaves_of(case)]]
    rest = [x.to("cuda") if isinstance(x, Tensor) else x for x in operands[leaves_of(case) :]]
    check_ops(op, (*leaves, *rest))


def test_shapes_on_a_gpu_without_one() -> None:
    """The fakes of the Triton kernels save two numbers a row, and not the weights."""
    _, operands = CASES["ragged"]
    with torch._subclasses.FakeTensorMode():
        fakes = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x
            for x in operands
        ]
        out, (saved,) = OPS.attention(*fakes)
        (dqkv,) = OPS.attention_backward(out, out, [saved], *fakes, [3])
        dq, dkv = OPS.attention_backward(out, out, [saved], *fakes, [1, 2])
    assert out.device.type == "cuda"
    assert out.shape == (8, 2, 8)
    assert saved.shape == (2, 2, 8)
    assert saved.dtype == torch.float32
    assert dqkv.shape == (8, 3, 2, 8)
    assert (dq.shape, dkv.shape) == ((8, 2, 8), (8, 2, 2, 8))

    _, operands = CASES["indexed weights"]
    with torch._subclasses.FakeTensorMode():
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in operands[:9]]
        out = OPS.cross_attention_weights(*fakes, *operands[9:])
        dq, dk = OPS.cross_attention_weights_backward(out, out, *fakes, *operands[9:])
    assert out.shape == (3, 2, 3, 5)
    assert out.stride() == (3 * 2 * 16, 16, 2 * 16, 1)  # Rows are aligned, and those of a query's heads together.
    assert (dq.shape, dk.shape) == ((6, 2, 8), (7, 2, 8))


@pytest.mark.parametrize(("case", "packed"), CALLS)
def test_torch_func_grad(case: str, packed: bool) -> None:
    leaves, rest = CASES[case][1][: leaves_of(case)], CASES[case][1][leaves_of(case) :]

    def loss(*leaves: Tensor) -> Tensor:
        return FUNCTIONS[case][packed](*leaves, *rest).square().sum()

    actual = torch.func.grad(loss, tuple(range(len(leaves))))(*(x.detach() for x in leaves))
    for dx, expected in zip(actual, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert torch.equal(dx, expected)


@pytest.mark.parametrize(("case", "packed"), CALLS)
def test_a_call_is_bound_to_no_signature_and_asks_no_op_for_its_gradient(
    case: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch.func alone needs it; each would take a tenth of a call with few tokens."""
    monkeypatch.setattr(torch.autograd.function, "inspect", None)
    monkeypatch.setattr(torch._library.autograd, "_C", None)
    FUNCTIONS[case][packed](*CASES[case][1]).sum().backward()


class Recorder(TorchDispatchMode):
    """Keeps the ops that run, and what the backward ops of attention return."""

    def __init__(self) -> None:
        super().__init__()
        self.ops, self.gradients = [], ()

    def __torch_dispatch__(self, op, types, arguments=(), options=None):
        result = op(*arguments, **(options or {}))
        self.ops.append(op)
        if op == OPS.attention_backward.default:
            self.gradients = result
        return result


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("case", ["ragged", "full", "cross", "indexed"])
def test_packed_gradients_are_the_buffer_of_the_backward(case: str, strided: bool) -> None:
    """The bits of the function of three inputs, whatever the strides; the backward is one op and nothing else."""
    operands = CASES[case][1]
    separate = FUNCTIONS[case][0](*operands)
    do = torch.randn(separate.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(separate, operands[:3], do)

    q, k, v = (x.detach() for x in operands[:3])
    packed = [torch.stack([q, k, v], 1)] if case in ("ragged", "full") else [q, torch.stack([k, v], 1)]
    if strided:
        packed = [x.transpose(0, -2).contiguous().transpose(0, -2) for x in packed]
    for x in packed:
        x.requires_grad_()
    if len(packed) == 1:
        out = visible_of(*packed, *operands[3:])
    else:
        *given, kv_index, max_q, max_k, scale = operands[3:]
        out = masked_cross_attention_kvpacked(*packed, *given, max_q, max_k, kv_index=kv_index, scale=scale)
    assert torch.equal(out, separate)
    with Recorder() as recorder:
        gradients = torch.autograd.grad(out, packed, do)
    views = torch.ops.aten.unbind.int, torch.ops.aten.detach.default
    assert len([op for op in recorder.ops if op not in views]) == 1, recorder.ops
    for dx, buffer in zip(gradients, recorder.gradients, strict=True):
        assert dx.data_ptr() == buffer.data_ptr()
        assert dx.is_contiguous()
    parts = [part for dx in gradients for part in (dx.unbind(1) if dx.ndim == 4 else [dx])]
    for part, dx in zip(parts, expected, strict=True):
        assert torch.equal(part, dx)


@pytest.mark.parametrize(("case", "packed"), CALLS)
def test_selective_checkpointing_by_name(case: str, packed: bool) -> None:
    """A policy that saves the op by name runs it once; one that does not runs it twice; the gradients are the same."""
    op, operands = CASES[case]
    calls = []

    def policy(save: bool, context, called, *args, **kwargs) -> CheckpointPolicy:
        if called == op:
            calls.append(context.is_recompute)
        return CheckpointPolicy.MUST_SAVE if save and called == op else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(q: Tensor) -> Tensor:
        return FUNCTIONS[case][packed](q.sin(), *operands[1:]).cos().sum()

    q = operands[0]
    expected = torch.autograd.grad(layer(q), q)[0]
    for save in (True, False):
        calls.clear()
        contexts = partial(create_selective_checkpoint_contexts, partial(policy, save))
        out = checkpoint(layer, q, use_reentrant=False, context_fn=contexts)
        assert torch.equal(torch.autograd.grad(out, q)[0], expected)
        assert calls.count(False) == 1


@pytest.mark.parametrize(
    ("case", "called"),
    [
        *((case, ("function", "packed")[packed]) for case, packed in CALLS),
        ("ragged", "op"),
        ("indexed", "op"),
        ("indexed weights", "op"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_a_cast_of_q_k_and_v_alone(case: str, called: str, dtype: torch.dtype) -> None:
    op, operands = CASES[case]
    leaves, rest = operands[: leaves_of(case)], operands[leaves_of(case) :]

    def function(*operands) -> Tensor:
        out = op(*operands) if called == "op" else FUNCTIONS[case][called == "packed"](*operands)
        return out if isinstance(out, Tensor) else out[0]

    cast = [x.detach().to(dtype).requires_grad_() for x in leaves]
    expected = function(*cast, *rest)
    do = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(expected, cast, do)
    with torch.autocast("cpu", dtype=dtype):
        out = function(*leaves, *rest)
        mixed = FUNCTIONS[case][0](cast[0], *leaves[1:], *rest)
        within = torch.autograd.grad(mixed, leaves[1:], do)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    assert torch.equal(mixed, expected)
    actual = *torch.autograd.grad(out, leaves, do), *within
    for dx, gradient in zip(actual, gradients + gradients[1:], strict=True):
        assert dx.dtype == torch.float32
        assert torch.equal(dx, gradient.float())
    # Tables that were cast would show.
    rounded = [x.to(dtype).float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in rest]
    assert not torch.equal(function(*cast, *rounded), expected)


@pytest.mark.parametrize("case", ["ragged", "indexed", "indexed weights"])
def test_autocast_leaves_float64_and_the_backward_alone(case: str) -> None:
    _, operands = CASES[case]
    given, rest = operands[: leaves_of(case)], operands[leaves_of(case) :]
    wide = [x.detach().double().requires_grad_() for x in given]
    for leaves in (wide, given):
        expected = FUNCTIONS[case][0](*leaves, *rest)
        gradients = torch.autograd.grad(expected.square().sum(), leaves)
        out = FUNCTIONS[case][0](*leaves, *rest)
        loss = out.square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = torch.autograd.grad(loss, leaves)
            if leaves is wide:
                assert torch.equal(FUNCTIONS[case][0](*leaves, *rest), expected)
        for a, e in zip(actual, gradients, strict=True):
            assert torch.equal(a, e)


COMPILED = """
import torch
from capi_kernels import (
    cross_attention_weights,
    masked_cross_attention,
    masked_cross_attention_kvpacked,
    visible_attention,
    visible_attention_qkvpacked,
)

def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

def layer(x, context, tables, context_tables, cu_seqlens, cu_context, kv_index, max_seqlen, max_context):
    q, k, v = (x * 1.5).unbind(1)
    x = visible_attention(q, k, v, *tables, cu_seqlens, max_seqlen).sin()
    k, v = context.unbind(1)
    return masked_cross_attention(
        x, k, v, *tables, *context_tables, cu_seqlens, cu_context, max_seqlen, max_context, kv_index=kv_index
    )

def packed(x, context, tables, context_tables, cu_seqlens, cu_context, kv_index, max_seqlen, max_context):
    x = visible_attention_qkvpacked(x * 1.5, *tables, cu_seqlens, max_seqlen).sin()
    return masked_cross_attention_kvpacked(
        x, context, *tables, *context_tables, cu_seqlens, cu_context, max_seqlen, max_context, kv_index=kv_index
    )

def weights(x, context, tables, context_tables, cu_seqlens, cu_context, kv_index, max_seqlen, max_context):
    q, k = (x * 1.5)[:, 0], context[:, 1]
    return cross_attention_weights(
        q, k, *tables, *context_tables, cu_seqlens, cu_context, max_seqlen, max_context, kv_index=kv_index
    ).sin()

def under_autocast(*operands):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(*operands)

def op_under_autocast(x, context, tables, context_tables, cu_seqlens, cu_context, kv_index, max_seqlen, max_context):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = (x * 1.5).unbind(1)
        where = (cu_seqlens, None, None, max_seqlen, max_seqlen, 0.3)
        return torch.ops.capi_kernels.attention(q, k, v, *tables, None, None, *where)[0].sin()

compilations = 0
def backend(graph, inputs):
    global compilations
    compilations += 1
    from torch._dynamo.backends.debugging import aot_eager
    return aot_eager(graph, inputs)

batches = ([3, 5], [4, 6]), ([7, 2, 4], [5, 9, 3]), ([6, 6], [9, 8]), ([5, 0, 9, 8], [7, 6, 11, 2])
for function in (layer, packed, weights, under_autocast, op_under_autocast):
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    counts, compilations = [], 0
    for lengths, contexts in batches:
        generator = torch.Generator().manual_seed(len(counts))
        x = torch.randn(sum(lengths), 3, 2, 8, generator=generator, requires_grad=True)
        context = torch.randn(sum(contexts), 2, 2, 8, generator=generator, requires_grad=True)
        tables = torch.randn(2, sum(lengths), 8, generator=generator).unbind(0)
        context_tables = torch.randn(2, sum(contexts), 8, generator=generator).unbind(0)
        rest = (tables, context_tables, cumulative(lengths), cumulative(contexts))
        rest += (torch.arange(len(lengths)).flip(0), max(lengths), max(contexts))
        results = []
        for run in (function, compiled):
            out = run(x, context, *rest)
            gradients = torch.autograd.grad(out.square().sum(), (x, context), materialize_grads=True)
            results.append((out, *gradients))
        for actual, expected in zip(*results):
            torch.testing.assert_close(actual, expected)
        assert out.dtype == (torch.float32 if function in (layer, packed, weights) else torch.bfloat16)
        counts.append(compilations)
    print(function.__name__, counts)
"""


def test_compiles_whole_and_once_for_all_token_counts() -> None:
    # In a process of its own: the type checks of these tests are not for the compiler.
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr
    # Sizes become symbols when they change for the first time.
    assert run.stdout.splitlines() == [
        f"{name} [1, 2, 2, 2]" for name in ("layer", "packed", "weights", "under_autocast", "op_under_autocast")
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cpu_keeps_no_weights_for_the_backward(dtype: torch.dtype) -> None:
    """Beside its operands and the output one number a row and, in float32, the rotated keys."""
    qkv = torch.randn(64, 3, 4, 32).to(dtype).requires_grad_()
    tables = torch.randn(2, 64, 32).unbind()
    cu_seqlens = cumulative([16] * 4)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        outs = [
            visible_attention_qkvpacked(qkv, *tables, cu_seqlens, 16),
            visible_attention(*qkv.unbind(1), *tables, cu_seqlens, 16),
            masked_cross_attention_kvpacked(qkv[:, 0], qkv[:, 1:], *tables * 2, cu_seqlens, cu_seqlens, 16, 16),
        ]
    known = {x.untyped_storage().data_ptr() for x in (qkv, *tables, cu_seqlens, *outs)}
    others = [x for x in kept if x.untyped_storage().data_ptr() not in known]
    assert len(kept) > 9
    assert [x.shape for x in others] == ([(64, 4)] + [(64, 4, 32)] * (dtype == torch.float32)) * 3


@pytest.mark.parametrize("keys", [9, 300])  # Below and above what the backward takes from PyTorch.
@pytest.mark.parametrize("case", ["visible", "visible, op", "packed", "cross", "cross, packed", "weights", "rotary"])
def test_gradcheck(case: str, keys: int) -> None:
    """Finite differences, the same bits twice, and gradients that nobody asked for."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    cu_q, cu_k = cumulative([1, 2]), cumulative([keys - 1, 1])
    q_tables, k_tables = draw(2, 3, 2).unbind(), draw(2, keys, 2).unbind()
    q, k, v = (x.requires_grad_() for x in (draw(3, 1, 2), draw(keys, 1, 2), draw(keys, 1, 2)))
    here, where = (*k_tables, cu_k, keys), (*q_tables, *k_tables, cu_q, cu_k, 2, keys - 1)
    own = (*k_tables, None, None, cu_k, None, None, keys, keys, 0.5)
    index = torch.tensor([1, 1 if keys == 9 else 0])
    function, inputs = {
        "visible": (lambda k, v: visible_attention(k, k.sin(), v, *here), (k, v)),
        "visible, op": (lambda k, v: OPS.attention(k, k.sin(), v, *own)[0], (k, v)),
        "packed": (lambda k, v: visible_attention_qkvpacked(torch.stack([k, k.sin(), v], 1), *here), (k, v)),
        "cross": (lambda q, k, v: masked_cross_attention(q, k, v, *where, kv_index=index), (q, k, v)),
        "cross, packed": (
            lambda q, k, v: masked_cross_attention_kvpacked(q, torch.stack([k, v], 1), *where),
            (q, k, v),
        ),
        "weights": (lambda q, k: cross_attention_weights(q, k, *where), (q, k)),
        "rotary": (lambda q: apply_rotary(q, *q_tables), (q,)),
    }[case]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=keys == 300)


NO_TENSORS = """
import capi_kernels as ck
import numpy as np
import torch

def cumulative(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

q, k = torch.randn(4, 2, 8), torch.randn(7, 2, 8)
q_tables, k_tables = torch.randn(2, 4, 8).unbind(), torch.randn(2, 7, 8).unbind()
here = {"cos": q_tables[0], "sin": q_tables[1], "cu_seqlens": cumulative(3, 1), "max_seqlen": 3}
where = {"q_cos": q_tables[0], "q_sin": q_tables[1], "k_cos": k_tables[0], "k_sin": k_tables[1]}
where |= {"cu_seqlens_q": cumulative(3, 1), "cu_seqlens_k": cumulative(5, 2), "kv_index": torch.tensor([1, 0])}
where |= {"max_seqlen_q": 3, "max_seqlen_k": 5}
logits, features, weight, rows = torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(5, 4), torch.tensor([0, 5])
potentials = ck.sinkhorn_potentials(logits)
calls = [
    (ck.visible_attention, {"q": q, "k": q, "v": q, **here}),
    (ck.visible_attention_qkvpacked, {"qkv": torch.randn(4, 3, 2, 8), **here}),
    (ck.masked_cross_attention, {"q": q, "k": k, "v": k, **where}),
    (ck.masked_cross_attention_kvpacked, {"q": q, "kv": torch.randn(7, 2, 2, 8), **where}),
    (ck.cross_attention_weights, {"q": q, "k": k, **where}),
    (ck.apply_rotary, {"x": q, "cos": q_tables[0], "sin": q_tables[1]}),
    (ck.rotary_tables, {"coords": torch.rand(4, 2), "freqs": torch.rand(2, 8)}),
    (ck.sinkhorn_positionwise, {"logits": logits}),
    (ck.sinkhorn_potentials, {"logits": logits}),
    (ck.assignments_from_potentials, {"logits": logits, "potentials": potentials, "rows": rows}),
    (ck.clustering_head, {"features": features, "weight": weight, "bias": weight[:, 0]}),
    (ck.clustering_targets, {"features": features[0, :2], "weight": weight, "bias": None, "rows": rows,
                             "potentials": potentials}),
    (ck.student_loss, {"logits": logits[0], "targets": logits[0]}),
    (ck.student_loss_with_statistics, {"logits": logits[0], "targets": logits[0]}),
]
for autocast in (False, True):
    for op, given in calls:
        op(**given)
        for name, x in given.items():
            if not isinstance(x, torch.Tensor):
                continue
            for wrong, kind in ((x.numpy(), "numpy.ndarray"), (x.tolist(), "list")):
                try:
                    with torch.autocast("cpu", enabled=autocast):
                        op(**(given | {name: wrong}))
                except TypeError as error:
                    assert str(error) == f"{name} must be a torch.Tensor, got {kind}", (op.__name__, error)
                else:
                    raise AssertionError(f"{op.__name__} took {name} as {kind}")
"""


def test_what_is_no_tensor_is_refused_by_name() -> None:
    # In a process of its own: the type checks of these tests would be first.
    run = subprocess.run([sys.executable, "-c", NO_TENSORS], capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr
