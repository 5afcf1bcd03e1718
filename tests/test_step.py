"""The device part of a step: nothing of it waits for the host, and a CUDA graph of it is the step itself."""

import copy
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from shutil import which

import pytest
import torch
from tiny_runs import FIXED, assert_equal_states, draw_batches, load_tiniest, tiniest
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import step_graph, step_launches
from benchmarks.gate import Gate
from capi import drop_path, fp8, model, transformer
from capi import images as image_ops
from capi.casting import WeightCopies
from capi.config import Config
from capi.distributed import World
from capi.masking import Masks
from capi.progress import announce
from capi.step import StepResult, Trainer
from capi.step_graph import StepGraph, StepInputs, graphs_obstacle
from capi.train import main
from capi_kernels import StudentLoss, student_loss_with_statistics

CPU = torch.device("cpu")
META = torch.device("meta")
# What is not at its default in the published models.
OTHER = ("--model.predictor_dim", "32", "--model.predictor_heads", "1", "--model.register_coordinates", "zeros")
OTHER += ("--model.scale_registers", "false", "--model.out_layer", "0", "--clustering.bias", "false")
HOST = ("_local_scalar_dense", "lift_fresh", "lift_fresh_copy", "_pin_memory", "is_pinned", "item")
SIZED_BY_VALUES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount")


class OnDeviceAlone(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: tensors of the host, values read back, sizes that depend on values."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = op._schema.name.split("::")[1].rstrip("_")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in (*HOST, *SIZED_BY_VALUES):
            raise AssertionError(f"{op} needs the host")
        if any(x.device != META for x in tensors):
            raise AssertionError(f"{op} reads a tensor of the host")
        # PyTorch 2.11 starts a checkpoint with an empty tensor of the host.
        if kwargs.get("device", META) != META and (name, args) != ("empty", ([0],)):
            raise AssertionError(f"{op} makes a tensor on {kwargs['device']}")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise AssertionError(f"{op} has to read the size of its result")
        if name in ("index", "index_put") and any(x.dtype == torch.bool for x in args[1] if x is not None):
            raise AssertionError(f"{op} has to count the places of its mask")
        if "generator" in kwargs or "rand" in name or "normal" in name:
            raise AssertionError(f"{op} draws random numbers")
        return op(*args, **kwargs)


class NothingOfTheHost(TorchFunctionMode):
    """Refuses tensors made of numbers of the host on the device, which the mode above does not see made."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy):
            raise AssertionError(f"{function.__name__} needs the host")
        return function(*args, **(kwargs or {}))


@contextmanager
def guarded() -> Iterator[None]:
    with OnDeviceAlone(), NothingOfTheHost():
        yield


def on_meta(config: Config, parts: int, kept: bool = False) -> tuple[Trainer, StepInputs]:
    """A trainer and inputs without values, as a GPU would have them."""
    trainer = Trainer(config, World(0, 1, CPU))
    trainer.model.to(META)
    trainer.model.student_ema.backbone.encoder.in_place = True
    trainer.world, trainer.compute_dtype = World(0, 1, META), torch.bfloat16
    if kept:
        trainer.copies = WeightCopies([trainer.model], torch.bfloat16)
    batches = [(images.to(META), masks.to(META)) for images, masks in draw_batches(config, 0, parts)]
    return trainer, trainer._inputs(batches, 3)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("rate", ["0", "0.3"])
@pytest.mark.parametrize(
    ("checkpointed", "kept", "teacher", "other"),
    [
        ("false", True, "auto", ()),
        ("true", True, "fp8", ()),
        ("false", False, "fp8", ()),
        ("true", True, "auto", OTHER),
    ],
)
def test_the_device_part_is_on_the_device_alone(parts, rate, checkpointed, kept, teacher, other, tmp_path) -> None:
    options = ("--model.drop_path_rate", rate, "--run.checkpoint_activations", checkpointed)
    options += ("--run.teacher_precision", teacher, *other)
    trainer, inputs = on_meta(load_tiniest(tmp_path, *FIXED, *options), parts, kept)
    with guarded():
        losses = trainer.losses_and_gradients(inputs)
    assert {x.device for x in losses} == {META}
    assert all(p.grad is not None for p in trainer.model.student.parameters() if p.requires_grad)
    if kept:  # Sums over micro-batches are of float32.
        dtypes = {weight.grad.dtype for weight in trainer.copies.trained}
        assert dtypes == {torch.bfloat16 if parts == 1 else torch.float32}


def read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def subsets(*given):
        return [x for x in drop_path.subsets(*given) if x.place.sum() > 0]

    monkeypatch.setattr(transformer, "subsets", subsets)


def made_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_ops, "_channels", lambda values, like: torch.tensor(values, device=like.device)[:, None])


def copied_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(counts, coords):
        cu_seqlens = torch.arange(len(counts) + 1, dtype=torch.int32) * counts[0]
        return transformer.Packed(cu_seqlens.to(coords.device), coords, counts[0])

    monkeypatch.setattr(model, "pack", pack)


def sized_by_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss_of(logits: Tensor, targets: Tensor, temperature: float) -> StudentLoss:
        loss = student_loss_with_statistics(logits, targets, temperature)
        return loss._replace(loss=logits[logits > 0].sum())

    monkeypatch.setattr("capi.step.student_loss_with_statistics", loss_of)


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (read_back, "local_scalar_dense.*needs the host"),
        (made_on_the_host, "tensor needs the host"),
        (copied_over, "(makes|reads) a tensor"),
        (sized_by_values, "count the places"),
    ],
)
def test_what_would_wait_for_the_host_is_found(plant: Callable, found: str, tmp_path, monkeypatch) -> None:
    trainer, inputs = on_meta(load_tiniest(tmp_path, *FIXED), 1)
    plant(monkeypatch)
    with guarded(), pytest.raises(AssertionError, match=found):
        trainer.losses_and_gradients(inputs)


COMPILED_TEACHER = """
import torch
from numerics import assert_as_accurate
from torch._inductor.utils import run_and_get_code
from capi.casting import cast_weights
from capi.transformer import SelfAttention, Transformer, pack
encoder = Transformer(64, 2, 1, SelfAttention)
(block,) = encoder.blocks
with torch.no_grad():
    block.residual1.fn.rope.init_weights()
eager = block.forward
block.forward = torch.compile(eager, fullgraph=True)
encoder.in_place = True
x, packed = torch.randn(80, 64, dtype=torch.bfloat16), pack((20,) * 4, torch.rand(80, 2))
with cast_weights(encoder, torch.bfloat16), torch.no_grad():
    given = x.clone()
    out, (code,) = run_and_get_code(encoder, given, packed, (20,) * 4)
    encoder.in_place, block.forward = False, eager
    expected = encoder(x, packed, (20,) * 4)
with torch.no_grad():
    oracle = encoder.double()(x.double(), packed, (20,) * 4)
assert out.data_ptr() == given.data_ptr()
assert_as_accurate(out, expected, oracle)
for call, times in (("torch.ops.capi.add_product_", 2), ("addmm(", 0), ("copy_(", 0), ("clone", 0)):
    assert code.count(call) == times, (call, code)
"""


def test_the_compiled_teacher_copies_no_residual(tmp_path) -> None:
    if which("g++") is None:
        pytest.skip("no compiler")
    # In a process of its own: the type checks of these tests are not for the compiler.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPILED_TEACHER]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr


def losses_of(result: StepResult) -> list[Tensor]:
    return [result.loss, result.clustering_loss, result.target_entropy, result.clusters]


def gradients_of(trainer: Trainer) -> dict[str, Tensor | None]:
    named = trainer.model.named_parameters()
    return {name: None if p.grad is None else p.grad.clone() for name, p in named}


def steps(trainer: Trainer, batches: dict[int, list[tuple[Tensor, Masks]]]) -> list[list[Tensor]]:
    return [losses_of(trainer.step(of_step, step)) for step, of_step in batches.items()]


class CpuGraph:
    """In place of torch.cuda.CUDAGraph: what is captured leaves no number, and a replay calls it again."""

    def replay(self) -> None:
        losses = self.function(self.of.inputs)
        torch._foreach_copy_(list(self.of.losses), list(losses))
        for parameter, gradient in self.of.gradients:
            gradient.copy_(parameter.grad)


@pytest.fixture
def cpu_graphs(monkeypatch) -> list[StepGraph]:
    """Lets trainers on a CPU use graphs; the graphs captured."""
    captured = []
    capture = StepGraph.capture

    def capture_on_cpu(self: StepGraph, function: Callable, *given) -> None:
        capture(self, function, *given)
        self.graph.function, self.graph.of = function, self
        for x in (*self.losses, *(gradient for _, gradient in self.gradients)):
            x.fill_(torch.nan if x.is_floating_point() else 0)
        captured.append(self)

    monkeypatch.setattr(StepGraph, "capture", capture_on_cpu)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CpuGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr("capi.step.graphs_obstacle", lambda *_: None)
    return captured


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("rate", ["0", "0.3"])
def test_a_step_of_fixed_buffers_is_the_step_itself(parts, rate, tmp_path, cpu_graphs) -> None:
    """Losses, gradients and weights over six steps, three of them replays, to the bit; no buffer moves."""
    trainers, results, gradients, states = [], [], [], []
    for graphs in ("off", "on"):
        config = load_tiniest(tmp_path, *FIXED, "--model.drop_path_rate", rate, "--run.cuda_graphs", graphs)
        trainers.append(trainer := Trainer(config, World(0, 1, CPU)))
        results.append(steps(trainer, {step: draw_batches(config, step, parts) for step in range(4)}))
        (graph,) = cpu_graphs or [None]
        if graph is not None:
            buffers = [*graph.inputs.tensors(), *graph.losses, *(gradient for _, gradient in graph.gradients)]
            before = [(x.data_ptr(), x.shape) for x in buffers]
        results[-1] += steps(trainer, {step: draw_batches(config, step, parts) for step in range(4, 6)})
        gradients.append(gradients_of(trainer))
        states.append(trainer.state_dict())
    assert [(x.data_ptr(), x.shape) for x in buffers] == before
    assert_equal_states(*results)
    assert_equal_states(*states)
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None), name
        assert gradient is None or torch.equal(gradient, gradients[1][name]), name
    assert all(x.isfinite().all() for x in results[0][-1])


def test_a_graph_outlives_a_step_of_another_shape_and_a_loaded_state(tmp_path, cpu_graphs) -> None:
    states, results = [], []
    for graphs in ("off", "on"):
        config = load_tiniest(tmp_path, *FIXED, "--run.cuda_graphs", graphs)
        trainer = Trainer(config, World(0, 1, CPU))
        batches = {step: draw_batches(config, step) for step in range(20)}
        results.append(steps(trainer, {step: batches[step] for step in range(5)}))
        saved = copy.deepcopy(trainer.state_dict())
        results[-1] += steps(trainer, {5: batches[5], 6: draw_batches(config, 6, 2), 7: batches[7]})
        trainer.load_state_dict(saved)
        results[-1] += steps(trainer, {step: batches[step] for step in range(8, 14)})
        states.append(trainer.state_dict())
    assert len(cpu_graphs) == 2
    assert_equal_states(*results)
    assert_equal_states(*states)


def test_a_loaded_layer_with_frequencies_of_its_own_keeps_them(tmp_path, cpu_graphs) -> None:
    """In a graph as well, which was captured with those that layers had in common."""
    config = load_tiniest(tmp_path, *FIXED, "--model.encoder_depth", "2")
    trainer = Trainer(config, World(0, 1, CPU))
    encoder = trainer.model.student_ema.backbone.encoder
    assert encoder.shares_tables
    steps(trainer, {step: draw_batches(config, step) for step in range(4)})
    state = copy.deepcopy(trainer.state_dict())
    trainer.load_state_dict(state)
    assert trainer._graph is not None
    state["model"]["student_ema.backbone.encoder.blocks.1.residual1.fn.rope.freqs"] *= 2
    trainer.load_state_dict(state)
    assert (encoder.shares_tables, trainer._graph) == (False, None)


def test_steps_that_are_not_finite_are_counted_behind_a_graph(tmp_path, cpu_graphs) -> None:
    config = load_tiniest(tmp_path, *FIXED)
    trainer = Trainer(config, World(0, 1, CPU))
    steps(trainer, {step: draw_batches(config, step) for step in range(5)})
    assert len(cpu_graphs) == 1
    weight = trainer.model.student.head.last_layer.weight_g
    kept = weight[0].clone()
    for bad_steps in (1, 2):
        weight.data[0] = torch.nan
        trainer.step(draw_batches(config, 5), 5)
        assert int(trainer.bad_steps) == bad_steps
    weight.data[0] = kept
    trainer.step(draw_batches(config, 5), 5)
    assert int(trainer.bad_steps) == 0
    assert trainer.steps_done == 6


def test_what_cannot_be_captured_is_said(tmp_path, cpu_graphs, monkeypatch) -> None:
    @contextmanager
    def invalidated(*_, **__) -> Iterator[None]:
        try:
            yield
        finally:  # As the real one does.
            raise RuntimeError("capture was invalidated")

    monkeypatch.setattr(torch.cuda, "graph", invalidated)
    streams = []
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    config = load_tiniest(tmp_path, *FIXED)
    trainer = Trainer(config, World(0, 1, CPU))
    steps(trainer, {step: draw_batches(config, step) for step in range(3)})
    monkeypatch.setattr("capi.step.student_loss_with_statistics", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph \(division by zero\)") as raised:
        trainer.step(draw_batches(config, 3), 3)
    assert "run.cuda_graphs off" in str(raised.value)
    assert streams == [None]


def test_where_there_are_no_graphs(tmp_path, capsys) -> None:
    gpu = torch.device("cuda")
    fixed, ragged = load_tiniest(tmp_path, *FIXED), load_tiniest(tmp_path)
    assert graphs_obstacle(fixed, World(0, 1, gpu)) is None
    assert graphs_obstacle(fixed, World(0, 1, CPU)) == "the device is cpu"
    assert graphs_obstacle(fixed, World(0, 2, gpu)) == "there are 2 processes"
    assert graphs_obstacle(ragged, World(0, 1, gpu)) == "masking.mask_ratio is a range"
    assert not Trainer(fixed, World(0, 1, CPU)).uses_graphs
    assert main([*tiniest(tmp_path), "--run.cuda_graphs", "on"]) == 1
    assert "run.cuda_graphs is on, but the device is cpu; expected auto or off" in capsys.readouterr().err


def test_several_ranks_launch_their_steps_and_say_so(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    config = load_tiniest(tmp_path, *FIXED)
    trainer = Trainer(config, World(0, 1, CPU))
    said = []
    for size in (1, 2):
        trainer.world = World(0, size, torch.device("cuda"))
        caplog.clear()
        with caplog.at_level("INFO", "capi"):
            announce(config, trainer, 0)
        said.append("launches every step anew, without a CUDA graph: there are 2 processes" in caplog.text)
    assert said == [False, True]


def test_the_script_tells_a_graph_from_a_step(tmp_path, cpu_graphs, monkeypatch, capsys) -> None:
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("max_memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1 << 30)
    monkeypatch.setattr(step_graph.step_profile, "inspect", lambda *_: {"launches": 3})
    monkeypatch.setitem(step_graph.BATCHES, "tiny", 2)
    monkeypatch.setattr(step_graph, "TIMED", 1)
    case = step_graph.Case("tiny", tmp_path, CPU, fp8=True)
    assert case.run(Gate("tiny"))
    out = capsys.readouterr().out
    assert len(cpu_graphs) == 2
    assert re.search(r"in 8 bits \d+\.\d\d% of the most likely clusters are the same", out)
    assert "graph_fp8: {'launches': 3}" in out
    assert "eager: peak 1.00 GiB" in out
    assert "graph: {'launches': 3}" in out
    assert "180 of 180 tensors are equal to the bit\n" in out

    replay = StepGraph.replay
    monkeypatch.setattr(StepGraph, "replay", lambda self, inputs: replay(self, inputs)._replace(loss=torch.zeros(())))
    assert not case.run(Gate("tiny"))
    assert "loss of step 3 differs by" in capsys.readouterr().out


def test_launches_and_their_bytes_are_counted(capsys) -> None:
    with step_launches.Launches() as launches:
        x = torch.empty(4, 8, device=META)
        x.view(8, 4).T.add_(torch.empty((), device=META).expand(4, 8))
        (x[0] * 2).to(torch.bfloat16)
    assert launches.of == {"add_": [1, 132], "mul": [1, 64], "_to_copy": [1, 48]}
    assert launches.total() == (3, 244)
    step_launches.main(["tiny", "--top", "1"])
    line, *_ = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[tiny x 256\] \d+ launches, .* GB; gradients of 0.\d+ GB; host \d+.\d ms a step", line)
    one, two = (step_launches.count("tiny", 8, parts) for parts in (1, 2))
    assert one[0].total() < two[0].total()
    assert one[1] < two[1]  # Gradients of float32.


CASES = {
    "other": (*OTHER, "--run.precision", "bf16", "--run.compile", "off"),
    "compiled other": (*OTHER, "--run.precision", "bf16", "--run.compile", "on"),
    "plain": ("--model.drop_path_rate", "0", "--run.precision", "fp32", "--run.compile", "off"),
    "dropped": ("--run.precision", "bf16", "--run.compile", "off"),
    "recomputed": ("--run.checkpoint_activations", "true", "--run.precision", "bf16", "--run.compile", "off"),
    "together": ("--clustering.positionwise", "false", "--run.precision", "bf16", "--run.compile", "off"),
    "fp8": ("--run.teacher_precision", "fp8", "--run.precision", "bf16", "--run.compile", "off"),
    "compiled fp8": ("--run.teacher_precision", "fp8", "--run.precision", "bf16", "--run.compile", "on"),
    "compiled": ("--run.precision", "bf16", "--run.compile", "on"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_replays_the_steps_that_it_takes(case, parts, tmp_path) -> None:
    """Losses, entropy, clusters, gradients and weights over seven steps, to the bit; and so after a resumption."""
    gpu = torch.device("cuda")
    if "fp8" in case and torch.cuda.get_device_capability() < fp8.SINCE:
        pytest.skip("no products in 8 bits")
    results, gradients, states, resumed = [], [], [], []
    for graphs in ("off", "on"):
        options = (*FIXED, "--run.device", "cuda", "--model.embed_dim", "64", "--run.cuda_graphs", graphs)
        config = load_tiniest(tmp_path, *options, *CASES[case])
        batches = {
            step: [(images.to(gpu), masks.to(gpu)) for images, masks in draw_batches(config, step, parts)]
            for step in range(12)
        }
        trainer = Trainer(config, World(0, 1, gpu))
        results.append(steps(trainer, {step: batches[step] for step in range(7)}))
        assert (trainer._graph is not None and trainer._graph.captured) == (graphs == "on")
        gradients.append(gradients_of(trainer))
        saved = copy.deepcopy(trainer.state_dict())
        states.append(saved)
        results[-1] += steps(trainer, {step: batches[step] for step in range(7, 12)})
        other = Trainer(config, World(0, 1, gpu))
        other.load_state_dict(saved)
        resumed.append(steps(other, {step: batches[step] for step in range(7, 12)}))
        assert_equal_states(trainer.state_dict(), other.state_dict())
        assert_equal_states(results[-1][7:], resumed[-1])
    assert_equal_states(*results)
    assert_equal_states(*states)
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None), name
        assert gradient is None or torch.equal(gradient, gradients[1][name]), name


@pytest.mark.gpu
def test_a_graph_takes_hardly_more_memory(tmp_path) -> None:
    gpu, peaks = torch.device("cuda"), []
    for graphs in ("off", "on"):
        options = ("--run.device", "cuda", "--run.compile", "off", "--run.cuda_graphs", graphs)
        shape = ("--model.embed_dim", "64", "--model.encoder_depth", "6", "--optim.batch_size", "512")
        config = load_tiniest(tmp_path, *FIXED, *options, *shape)
        trainer = Trainer(config, World(0, 1, gpu))
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for step in range(6):
            trainer.step([(images.to(gpu), masks.to(gpu)) for images, masks in draw_batches(config, step)], step)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del trainer
    assert peaks[1] < 1.1 * peaks[0]
