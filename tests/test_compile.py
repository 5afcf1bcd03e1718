"""The kernels compiled for GPUs that need not be here, and the ops of the heads as torch.compile sees them."""

import os
import subprocess
import sys
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from capi_kernels import Potentials, sinkhorn_potentials
from capi_kernels._capability import AMD, capability, launch_options
from capi_kernels.attention import configs

OPS = torch.ops.capi_kernels


def run_python(*arguments: str | Path, environment: dict[str, str] | None = None) -> str:
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_no_default_configuration_spills() -> None:
    """One of each kernel and type of data, dealt to the targets; `python -m benchmarks.compile_report` compiles all."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    lines = run_python(
        "-m",
        "benchmarks.compile_report",
        "--check",
        "--sample",
        "sm_80",
        "sm_90",
        "sm_120",
        "gfx942",
        environment=environment,
    ).splitlines()
    targets = {}
    for _, kernel, name, _, *cells, _ in (line.split("|") for line in lines):
        where = targets.setdefault((kernel.strip(), name.split()[0].rstrip(",")), set())
        where.update(i for i, cell in enumerate(cells) if cell.strip())
    assert all(targets.values())
    half, every = ("bf16", "fp16"), ("bf16", "fp16", "fp32")
    for types, kernels in (
        (half, ("short_forward_kernel", "few_forward_kernel", "pack_kernel")),
        (half, ("one_tile_backward_kernel", "by_queries_backward_kernel", "resident_backward_kernel")),
        (every, ("rotate_kernel", "tiled_forward_kernel", "tiled_dq_kernel", "tiled_dkdv_kernel")),
        (every, ("column_step_kernel", "row_step_kernel", "head_rows_kernel", "student_rows_kernel")),
    ):
        assert set(product(kernels, types)) <= targets.keys()
        for kernel in kernels:
            assert len(set.union(*(targets[kernel, name] for name in types))) >= len(types)


def test_amd_gpus_get_what_their_compiler_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No limit on registers, at most 16 warps of 64 threads, no kernel that asks for more than 64 KiB on chip."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert capability(torch.device("cuda")) == AMD
    assert launch_options({"num_warps": 32, "maxnreg": 128, "BLOCK": 64}, amd=True) == {"num_warps": 16, "BLOCK": 64}
    assert launch_options({"num_warps": 1}, amd=True) == {"num_warps": 1}
    assert launch_options({"num_warps": 32, "maxnreg": 128}, amd=False) == {"num_warps": 32, "maxnreg": 128}
    assert configs.short_forward(torch.bfloat16, 64, 106, 106, AMD) is None
    assert configs.short_backward(torch.bfloat16, 64, 106, 106, False, AMD) is None


# Of torch 2.14, within its own check.
OPCHECK = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def operands() -> dict[str, tuple]:
    generator = torch.Generator().manual_seed(0)
    features, weight, bias, logits, predictions = (
        torch.randn(shape, generator=generator) for shape in ((2, 5, 4), (9, 4), (9,), (2, 5, 9), (3, 9))
    )
    rows = torch.tensor([3, 9, 3])
    potentials = sinkhorn_potentials(logits, temperature=0.1)
    leaves = weight.requires_grad_(), bias.requires_grad_()
    predictions.requires_grad_()
    head = (0.06, 0.12, 3, 1e-8)
    return {
        "sinkhorn": (OPS.sinkhorn.default, logits, 3, 1e-8, 0.1, None, True),
        "sinkhorn, potentials": (OPS.sinkhorn.default, logits.transpose(0, 1), 3, 1e-8, 0.1, None, False),
        "assignments": (
            OPS.assignments_from_potentials.default,
            logits.mT.contiguous().mT,
            *potentials,
            None,
            0.1,
            torch.float32,
        ),
        "assignments, rows": (OPS.assignments_from_potentials.default, logits, *potentials, rows, 0.1, torch.float16),
        "assignments, own logits": (
            OPS.assignments_from_potentials.default,
            *(predictions.detach().half(), *potentials, rows, 0.1, torch.float32),
        ),
        "head": (OPS.clustering_head.default, features, *leaves, *head, True, None, None, None, torch.float32),
        "head, together": (OPS.clustering_head.default, features, *leaves, *head, False, 1, None, None, torch.float32),
        "head, some scored": (
            OPS.clustering_head.default,
            features,
            *leaves,
            *head,
            True,
            1,
            1,
            None,
            torch.float32,
        ),
        "head, bfloat16": (
            OPS.clustering_head.default,
            *(features.bfloat16(), leaves[0], None),
            *(*head, True, 1, None, None, torch.bfloat16),
        ),
        "student": (OPS.student_loss.default, predictions, torch.rand(3, 9, generator=generator), 0.12, False),
        "student, statistics": (OPS.student_loss.default, predictions, torch.eye(3, 9), 0.12, True),
        "student, bfloat16": (
            OPS.student_loss.default,
            *(predictions.detach().bfloat16().requires_grad_(), torch.rand(3, 9, generator=generator), 0.12, True),
        ),
    }


@OPCHECK
@pytest.mark.parametrize("case", operands())
def test_opcheck(case: str) -> None:
    op, *arguments = operands()[case]
    torch.library.opcheck(op, tuple(arguments))


def test_shapes_on_a_gpu_without_one() -> None:
    for name, (op, *arguments) in operands().items():
        expected = op(*arguments)
        with torch._subclasses.FakeTensorMode():
            fakes = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x
                for x in arguments
            ]
            outputs = op(*fakes)
        for fake, real in zip(*((x,) if isinstance(x, Tensor) else x for x in (outputs, expected)), strict=True):
            assert fake.device.type == "cuda", name
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype), name


@pytest.mark.parametrize("device", ["CPU", "CUDA"])
@pytest.mark.parametrize("case", operands())
def test_ops_keep_autocast_off(case: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered for either autocast, on CPU tensors, turns that one off around the op."""
    op, *arguments = operands()[case]
    asked = []
    autocast = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda *args, **options: asked.append((args, options)) or autocast("cpu", enabled=False)
    )
    with autocast("cpu", dtype=torch.bfloat16):
        key = getattr(torch._C.DispatchKey, f"Autocast{device}")
        actual = op.redispatch(torch._C.DispatchKeySet(key), *arguments)
    assert asked == [((device.lower(),), {"enabled": False})]
    for x, y in zip(*((x,) if isinstance(x, Tensor) else x for x in (actual, op(*arguments))), strict=True):
        assert torch.equal(x, y)


COMPILED = """
import torch
from capi_kernels import (
    assignments_from_potentials, clustering_head, clustering_targets, sinkhorn_positionwise, sinkhorn_potentials,
    student_loss, student_loss_with_statistics
)

def step(features, weight, bias, rows, predictions, logits):
    head = clustering_head(features * 2, weight * 2, bias)
    own = features[rows % 2, rows // 2]
    again = clustering_targets(own, weight * 2, bias, head.potentials, rows)
    targets = sinkhorn_positionwise(logits, temperature=0.1)
    potentials = sinkhorn_potentials(logits, temperature=0.1)
    chosen = assignments_from_potentials(logits, potentials, rows, temperature=0.1)
    other = student_loss_with_statistics(predictions * 2, chosen)
    loss = student_loss(predictions * 3, again) + other.loss
    return head.loss + loss, targets.sum() + other.target_entropy, again, other.most_likely

def under_autocast(*arguments):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return step(*arguments)

compilations = 0
def backend(graph, inputs):
    global compilations
    compilations += 1
    from torch._dynamo.backends.debugging import aot_eager
    return aot_eager(graph, inputs)

compiled = torch.compile(under_autocast, fullgraph=True, backend=backend)
counts = []
for images in (5, 6, 7):
    generator = torch.Generator().manual_seed(images)
    shapes = (2, images, 4), (9, 4), (9,), (3, 9), (2, images, 9)
    features, weight, bias, predictions, logits = (torch.randn(shape, generator=generator) for shape in shapes)
    leaves = [x.requires_grad_() for x in (weight, bias, predictions)]
    rows = torch.tensor([3, 9, 3])
    results = []
    half = features.bfloat16()  # what autocast makes of features that bfloat16 has
    for function, given in ((step, half), (under_autocast, half.float()), (compiled, half.float())):
        loss, *others = function(given, weight, bias, rows, predictions, logits)
        results.append((loss, *others, *torch.autograd.grad(loss, leaves)))
    for without, under, actual in zip(*results):
        assert torch.equal(without, under)
        torch.testing.assert_close(actual, without)
    counts.append(compilations)
assert counts == [1, 2, 2], counts  # Sizes become symbols when they change for the first time.

from torch.testing._internal.distributed.fake_pg import FakeStore
for world_size in (1, 2):  # Of the second rank, which is none, nothing ever comes.
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    for group in ("world", torch.distributed.group.WORLD):
        over_group = lambda x: sinkhorn_positionwise(x, process_group=group)
        compiled = torch.compile(over_group, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(logits), over_group(logits))
    torch.distributed.destroy_process_group()
"""


def test_compiles_whole_and_once_for_all_batch_sizes() -> None:
    # In a process of its own: the type checks of these tests are not for the compiler.
    run_python("-c", COMPILED)


def test_torch_func_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    from capi_kernels import clustering_head, student_loss

    monkeypatch.setattr(sys.modules["capi_kernels.heads.student_loss"], "PLAIN_BYTES", 0)
    features, weight, bias = (x.detach() for x in operands()["head"][1:4])
    predictions, targets = (x.detach() for x in operands()["student"][1:3])
    for loss_of, x in (
        (lambda weight: clustering_head(features, weight, bias).loss, weight),
        (lambda predictions: student_loss(predictions, targets), predictions),
    ):
        leaf = x.clone().requires_grad_()
        assert torch.equal(torch.func.grad(loss_of)(x), torch.autograd.grad(loss_of(leaf), leaf)[0])
    assert isinstance(sinkhorn_potentials(features), Potentials)


@pytest.mark.parametrize("case", operands())
def test_what_a_gpu_runs_agrees_in_the_interpreter(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The implementation registered for CUDA, called on CPU tensors."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled for the GPU")
    op, *arguments = operands()[case]
    if "bfloat16" in case:
        pytest.skip("the interpreter has no bfloat16")
    expected = op(*arguments)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with torch.no_grad():
        actual = op.redispatch(cuda, *arguments)
    names = [output.name for output in op._schema.returns]
    for name, x, y in zip(names, *((x,) if isinstance(x, Tensor) else x for x in (actual, expected)), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        if name not in ("column", "row"):  # of which only the product is defined
            torch.testing.assert_close(x, y.detach(), rtol=1e-4, atol=1e-5)
