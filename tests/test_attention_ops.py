"""The attention ops as PyTorch sees them: schemas, fakes, gradients, torch.compile, torch.func, checkpointing."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from capi_kernels import masked_cross_attention, visible_attention

OPS = torch.ops.capi_kernels


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def visible_operands(lengths: list[int], *, rotary: bool = True) -> tuple:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(sum(lengths), 3, 2, 8, generator=generator).unbind(1)
    tables = torch.randn(2, sum(lengths), 8, generator=generator).unbind(0) if rotary else (None, None)
    return *(x.requires_grad_() for x in (q, k, v)), *tables, cumulative(lengths), max(lengths), 0.3


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


CASES = {
    "ragged": (OPS.visible_attention.default, visible_operands([3, 0, 5])),
    "full": (OPS.visible_attention.default, visible_operands([4, 4], rotary=False)),
    "cross": (OPS.masked_cross_attention.default, cross_operands([3, 1], [5, 2], None)),
    "indexed": (OPS.masked_cross_attention.default, cross_operands([3, 1, 2], [5, 2], [1, 0, 1])),
}


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str) -> None:
    op, operands = CASES[case]
    torch.library.opcheck(op, operands)
    out, saved = op(*operands)
    backward = getattr(OPS, f"{op._opname}_backward").default
    operands = [x.detach() if isinstance(x, Tensor) else x for x in operands]
    saved = [x.detach() for x in saved]
    torch.library.opcheck(backward, (torch.randn_like(out), out.detach(), saved, *operands))


def test_shapes_on_a_gpu_without_one() -> None:
    """The fakes of the Triton kernels save two numbers a row, and not the weights."""
    _, operands = CASES["ragged"]
    with torch._subclasses.FakeTensorMode():
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in operands[:6]]
        out, (saved,) = OPS.visible_attention(*fakes, *operands[6:])
        (dqkv,) = OPS.visible_attention_backward(out, out, [saved], *fakes, *operands[6:])
    assert out.device.type == "cuda"
    assert out.shape == (8, 2, 8)
    assert saved.shape == (2, 2, 8)
    assert saved.dtype == torch.float32
    assert dqkv.shape == (8, 3, 2, 8)


def test_torch_func_grad() -> None:
    q, k, v, cos, sin, cu_seqlens, max_seqlen, scale = CASES["ragged"][1]

    def loss(q: Tensor) -> Tensor:
        return visible_attention(q, k, v, cos, sin, cu_seqlens, max_seqlen, scale=scale).square().sum()

    assert torch.equal(torch.func.grad(loss)(q.detach()), torch.autograd.grad(loss(q), q)[0])


@pytest.mark.parametrize("case", ["ragged", "indexed"])
def test_selective_checkpointing_by_name(case: str) -> None:
    """A policy that saves the op by name runs it once; one that does not runs it twice; the gradients are the same."""
    op, operands = CASES[case]
    calls = []

    def policy(save: bool, context, called, *args, **kwargs) -> CheckpointPolicy:
        if called == op:
            calls.append(context.is_recompute)
        return CheckpointPolicy.MUST_SAVE if save and called == op else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(q: Tensor) -> Tensor:
        q, k, v, *rest = q.sin(), *operands[1:]
        if case == "ragged":
            return visible_attention(q, k, v, *rest[:-1], scale=rest[-1]).cos().sum()
        *tensors, kv_index, max_seqlen_q, max_seqlen_k, scale = rest
        return (
            masked_cross_attention(q, k, v, *tensors, max_seqlen_q, max_seqlen_k, kv_index=kv_index, scale=scale)
            .cos()
            .sum()
        )

    q = operands[0]
    expected = torch.autograd.grad(layer(q), q)[0]
    for save in (True, False):
        calls.clear()
        contexts = partial(create_selective_checkpoint_contexts, partial(policy, save))
        out = checkpoint(layer, q, use_reentrant=False, context_fn=contexts)
        assert torch.equal(torch.autograd.grad(out, q)[0], expected)
        assert calls.count(False) == 1


COMPILED = """
import torch
from capi_kernels import masked_cross_attention, visible_attention

def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

def layer(x, context, tables, context_tables, cu_seqlens, cu_context, kv_index, max_seqlen, max_context):
    q, k, v = (x * 1.5).unbind(1)
    x = visible_attention(q, k, v, *tables, cu_seqlens, max_seqlen).sin()
    k, v = context.unbind(1)
    return masked_cross_attention(
        x, k, v, *tables, *context_tables, cu_seqlens, cu_context, max_seqlen, max_context, kv_index=kv_index
    )

compilations = 0
def backend(graph, inputs):
    global compilations
    compilations += 1
    from torch._dynamo.backends.debugging import aot_eager
    return aot_eager(graph, inputs)

compiled = torch.compile(layer, fullgraph=True, backend=backend)
counts = []
for lengths, contexts in (([3, 5], [4, 6]), ([7, 2, 4], [5, 9, 3]), ([6, 6], [9, 8]), ([5, 0, 9, 8], [7, 6, 11, 2])):
    generator = torch.Generator().manual_seed(len(counts))
    x = torch.randn(sum(lengths), 3, 2, 8, generator=generator, requires_grad=True)
    context = torch.randn(sum(contexts), 2, 2, 8, generator=generator, requires_grad=True)
    tables = torch.randn(2, sum(lengths), 8, generator=generator).unbind(0)
    context_tables = torch.randn(2, sum(contexts), 8, generator=generator).unbind(0)
    rest = (tables, context_tables, cumulative(lengths), cumulative(contexts))
    rest += (torch.arange(len(lengths)).flip(0), max(lengths), max(contexts))
    results = []
    for function in (layer, compiled):
        out = function(x, context, *rest)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, context))))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)
    counts.append(compilations)
print(counts)
"""


def test_compiles_whole_and_once_for_all_token_counts() -> None:
    # In a process of its own: the type checks of these tests are not for the compiler.
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr
    first, second, *later = eval(run.stdout)
    assert first == 1
    assert second == 2  # Sizes become symbols when they change for the first time.
    assert later == [2, 2]
