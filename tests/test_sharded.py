"""Weights sharded over ranks train as whole ones do, on every rank and on one process alone."""

from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_runs import FIXED, assert_equal_states, draw_batches, load_tiniest, tiniest
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import capi.step
from capi.config import Config
from capi.distributed import World, largest, leave_group
from capi.fp8 import fp8_obstacle
from capi.model import Backbone
from capi.progress import Rates, log_evaluation
from capi.results import Results
from capi.sharding import full_state_dict, local, whole_average
from capi.step import Trainer
from capi.train import main
from capi_kernels import StudentLoss, student_loss_with_statistics

CPU = torch.device("cpu")
# Drop-path is drawn rank by rank: with it, other numbers of ranks are other trainings.
SAME = ("--model.encoder_depth", "2", "--model.drop_path_rate", "0", "--masking.mask_ratio", "[0.2, 0.9]")
SAME += ("--optim.eps", "1e-3")  # With less AdamW divides the rounding of small gradients by their size.
FULL = ("--distributed.shard", "full")
SIZES = (4, 2)
STEPS = (2, 3, 4)  # With learning rates above zero, and a moving average that moves.


def batches(config: Config, step: int, rank: int = 0, size: int = 1) -> list:
    """The rank's part of the same eight images, in micro-batches of one: some predict more patches than others."""
    parts = draw_batches(config, step, 8)
    return parts[rank * len(parts) // size : (rank + 1) * len(parts) // size]


def trained(config: Config, rank: int, size: int) -> tuple[Trainer, list[list[float]], dict[str, Tensor]]:
    """After all steps: the losses of each, of all ranks, and the whole gradients of the first."""
    trainer, losses, gradients = Trainer(config, World(rank, size, CPU)), [], {}
    for step in STEPS:
        result = trainer.step(batches(config, step, rank, size), step)
        loss = torch.stack([result.loss, result.clustering_loss, result.target_entropy])
        if size > 1:
            dist.all_reduce(loss)
        losses.append((loss / size).tolist())
        if step == STEPS[0]:
            named = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
            gradients = {name: whole(gradient).clone() for name, gradient in named.items()}
    assert int(trainer.bad_steps) == 0
    return trainer, losses, gradients


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_state(trainer: Trainer) -> dict:
    """On every rank, with the moments of both optimisers."""
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    return {
        "model": {name: whole(x).clone() for name, x in trainer.model.state_dict().items()},
        "states": [{name: whole(x).clone() for name, x in state.items()} for state in states],
    }


def check_training(rank: int, size: int, folder: Path) -> Trainer:
    """Leaves what the trainings of the two kinds came to, for the parent to compare with one process."""
    found = {}
    for kind in ("none", "full"):
        config = load_tiniest(folder / str(rank), *SAME, "--distributed.shard", kind)
        steps = (batches(config, step, rank, size) for step in STEPS)
        counts = [sum(len(masks.predict_indices) for _, masks in of_step) for of_step in steps]
        trainer, losses, gradients = trained(config, rank, size)
        found[kind] = {"losses": losses, "gradients": gradients, "state": whole_state(trainer), "counts": counts}
    torch.save(found, folder / f"{size} {rank}.pt")
    return trainer


def check_same_bits(trainer: Trainer, rank: int, size: int, folder: Path) -> None:
    """Twice, and with the blocks recomputed."""
    expected = whole_state(trainer)
    for options in ((), ("--run.checkpoint_activations", "true")):
        again, *_ = trained(load_tiniest(folder / str(rank), *SAME, *FULL, *options), rank, size)
        assert_equal_states(whole_state(again), expected)


def check_what_a_rank_keeps(trainer: Trainer, rank: int, size: int) -> None:
    names = trainer.model.state_dict().keys()
    assert names == Trainer(trainer.config, World(0, 1, CPU)).model.state_dict().keys()
    student, average = trainer.model.student, trainer.model.student_ema
    for name, parameter in trainer.model.named_parameters():
        kept_whole = name.startswith("teacher.") or name.endswith("rope.freqs")
        assert isinstance(parameter, DTensor) != kept_whole, name
    for (name, one), other in zip(student.named_parameters(), average.parameters(), strict=True):
        assert local(one).shape == local(other).shape, name
        assert local(one).dtype == local(other).dtype == torch.float32, name
    whole_size = sum(p.numel() for p in student.parameters())
    own = torch.tensor(sum(local(p).numel() for p in student.parameters()))
    assert own < 1.5 * whole_size / size
    for group in trainer.optimizers[0].param_groups:
        for parameter in group["params"]:
            assert isinstance(parameter.grad, DTensor)
            state = trainer.optimizers[0].state[parameter]
            assert {local(state[key]).shape for key in ("exp_avg", "exp_avg_sq")} == {local(parameter).shape}


class Counted(TorchDispatchMode):
    """How often each operator is called."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


def check_gradients_travel_once(trainer: Trainer, rank: int, size: int) -> None:
    """Of several micro-batches the last alone: one sum a unit."""
    units = [module for module in trainer.model.student.modules() if isinstance(module, FSDPModule)]
    assert len(units) == 6  # patch embedding, two and one blocks, head, and what is left
    with Counted() as counted:
        trainer.step(batches(trainer.config, 5, rank, size), 5)
    assert counted.calls["c10d._reduce_scatter_base_.default"] == len(units), counted.calls


def copied(state: dict) -> dict:
    """Optimisers take what they load for their own."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, state)


def check_states_move(trainer: Trainer, rank: int, size: int) -> None:
    """Into another sharded trainer, by its own state dict and by PyTorch's distributed checkpoints' functions."""
    config, world = trainer.config, trainer.world
    own, moved = (Trainer(config, world) for _ in range(2))
    own.load_state_dict(copied(trainer.state_dict()))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    set_model_state_dict(
        moved.model,
        get_model_state_dict(trainer.model, options=options),
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    for theirs, mine in zip(trainer.optimizers, moved.optimizers, strict=True):
        saved = copied(get_optimizer_state_dict(trainer.model, theirs))
        assert {name.partition(".")[0] for name in saved["state"]} <= {"student", "teacher"}
        set_optimizer_state_dict(moved.model, mine, saved)
    for other in (trainer, own, moved):
        other.step(batches(config, 5, rank, size), 5)
    expected = whole_state(trainer)
    assert_equal_states(whole_state(own), expected)
    assert_equal_states(whole_state(moved), expected)


def check_bad_steps_are_skipped_by_all(trainer: Trainer, rank: int, size: int) -> None:
    """An infinite loss of the last rank, and a gradient of which the first alone has a part."""

    def infinite_loss(*arguments: object) -> StudentLoss:
        loss, *statistics = student_loss_with_statistics(*arguments)
        return StudentLoss(loss + torch.inf, *statistics)

    def spoil(student: torch.nn.Module, _: object) -> None:
        if student.backbone.mask_token._backward_hooks is None:
            student.backbone.mask_token.register_hook(lambda gradient: gradient * torch.nan)

    def assert_skipped(step: int) -> None:
        before = {name: local(p).clone() for name, p in trainer.model.student.named_parameters()}
        trainer.step(batches(trainer.config, step, rank, size), step)
        for name, p in trainer.model.student.named_parameters():
            assert torch.equal(local(p), before[name]), name

    if rank == size - 1:
        capi.step.student_loss_with_statistics = infinite_loss
    assert_skipped(6)
    capi.step.student_loss_with_statistics = student_loss_with_statistics
    hook = trainer.student.register_forward_pre_hook(spoil)
    assert_skipped(7)
    hook.remove()
    assert bool(local(trainer.model.student.backbone.mask_token.grad).isnan().any()) == (rank == 0)
    assert int(trainer.bad_steps) == 2


def check_readers(trainer: Trainer, rank: int, size: int, folder: Path) -> None:
    state = full_state_dict(trainer.model)
    model = whole_average(trainer.model, trainer.world)
    expected = whole_state(trainer)["model"]
    if rank:
        assert state == {}
        assert model is None
    else:
        assert_equal_states(state, expected)
        Results(trainer, folder).write(model)
        prefix = "student_ema."
        of_average = {name.removeprefix(prefix): x for name, x in expected.items() if name.startswith(prefix)}
        assert_equal_states(load_file(folder / "encoder.safetensors"), of_average)
        heads = load_file(folder / "heads.safetensors")
        assert len(heads) == 4
        assert_equal_states(heads, {name: expected[name] for name in heads})
        assert all(p.is_meta for p in model.student.parameters())
        alone = Trainer(trainer.config, World(0, 1, CPU)).model.student_ema
        alone.load_state_dict(of_average)
        images = torch.rand(2, 3, 16, 16)
        with torch.no_grad():
            assert_equal_states(model.student_ema.backbone(images), alone.backbone(images))
    evaluated = []
    evaluator = SimpleNamespace(evaluate=lambda backbone, stop: evaluated.append(backbone) or {})
    rates = Rates(trainer.config, trainer.world, trainer.host)
    log_evaluation(trainer, evaluator if rank == 0 else None, 0, rates, None, None)
    assert [type(backbone) for backbone in evaluated] == [Backbone] * (rank == 0)
    # A rank sees its own rows alone: the ranks ask each other.
    assert trainer.not_finite() is None
    rows = local(trainer.model.student.head.last_layer.weight_v.detach())
    kept = rows[0].clone()
    if rank == 1:
        rows[0] = torch.nan
    assert (trainer.not_finite() is None) == (rank != 1)
    assert largest(trainer.not_finite() is not None)
    rows[0] = kept


def check_bf16(rank: int, size: int, folder: Path) -> None:
    """What is bf16's of a replica is it here, and nothing else: the first loss and the gradients are the same."""
    losses, gradients, seen = [], [], []
    for kind in ("none", "full"):
        options = (*SAME, "--distributed.shard", kind, "--run.precision", "bf16")
        trainer = Trainer(load_tiniest(folder / str(rank), *options), World(rank, size, CPU))
        for student in (trainer.model.student, trainer.model.student_ema):
            mlp = student.backbone.encoder.blocks[0].residual2.fn
            mlp.register_forward_hook(lambda *called: seen.append(called[2].dtype))
        losses.append(trainer.step(batches(trainer.config, 2, rank, size), 2).loss)
        named = dict(trainer.model.student.named_parameters())
        assert {p.dtype for p in named.values()} == {torch.float32}
        gradients.append({name: whole(p.grad) for name, p in named.items() if p.grad is not None})
    assert torch.equal(*losses)
    assert set(seen) == {torch.bfloat16}
    for name, gradient in gradients[0].items():
        assert gradients[1][name].dtype == torch.float32
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: n + m)


def check_compiled(rank: int, folder: Path) -> None:
    """Whole graphs, of gathered weights; what code is made of them makes no difference here."""
    compile_, captured = torch.compile, []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        captured.append(graph)
        return graph.forward

    losses = []
    for how in ("off", "on"):
        options = ("--model.drop_path_rate", "0", *FIXED, *FULL, "--run.compile", how)
        config = load_tiniest(folder / str(rank), *options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", lambda fn, **options: compile_(fn, backend=backend, **options))
            trainer = Trainer(config, World(rank, 2, CPU))
        losses.append(trainer.step(batches(config, 2, rank, 2), 2).loss)
    torch.testing.assert_close(*losses)
    assert captured
    assert not torch._dynamo.utils.counters["graph_break"]


def of_four_ranks(rank: int, folder: Path) -> None:
    """All four, then the first two of them."""
    torch.set_num_threads(1)
    (folder / str(rank)).mkdir()
    for size in SIZES:
        if rank >= size:
            return
        store = f"file://{folder}/store {size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
        trainer = check_training(rank, size, folder)
        check_what_a_rank_keeps(trainer, rank, size)
        if size == 2:
            check_same_bits(trainer, rank, size, folder)
            check_gradients_travel_once(trainer, rank, size)
            check_states_move(trainer, rank, size)
            check_bad_steps_are_skipped_by_all(trainer, rank, size)
            check_readers(trainer, rank, size, folder)
            check_bf16(rank, size, folder)
            check_compiled(rank, folder)
        dist.barrier()
        leave_group()


def trained_alone(folder: Path) -> dict:
    config = load_tiniest(folder, *SAME, *FULL)
    trainer, losses, gradients = trained(config, 0, 1)
    assert not any(isinstance(x, DTensor) for x in trainer.model.state_dict().values())
    return {"losses": losses, "gradients": gradients, "state": whole_state(trainer)}


def test_ranks_train_as_one_process(tmp_path) -> None:
    """Gradients as well, as AdamW would not tell a mean from a sum."""
    run_ranks(of_four_ranks, (tmp_path,), 4)
    alone = trained_alone(tmp_path)
    for size, kind in product(SIZES, ("none", "full")):
        found = [torch.load(tmp_path / f"{size} {rank}.pt") for rank in range(size)]
        assert len({tuple(of_rank[kind]["counts"]) for of_rank in found}) > 1  # Some predict more than others.
        for of_rank in found:
            torch.testing.assert_close(of_rank[kind]["losses"], alone["losses"], rtol=1e-6, atol=1e-6)
            assert of_rank[kind]["gradients"].keys() == alone["gradients"].keys()
            for name, gradient in alone["gradients"].items():
                largest = float(gradient.abs().max())
                torch.testing.assert_close(of_rank[kind]["gradients"][name], gradient, rtol=0, atol=3e-6 * largest)
            for name, x in alone["state"]["model"].items():
                torch.testing.assert_close(of_rank[kind]["state"]["model"][name], x, rtol=1e-6, atol=1e-6)


def test_a_run_goes_on_sharded_or_not(tmp_path, caplog) -> None:
    assert main(tiniest(tmp_path)) == 0
    with caplog.at_level("INFO"):
        assert main([*tiniest(tmp_path), *FULL]) == 0
    assert "other values of distributed.shard (none -> full)" in caplog.text
    assert "nothing is sharded (distributed.shard): there is one process" in caplog.text


def test_an_fp8_teacher_is_refused_where_weights_are_sharded(tmp_path) -> None:
    config = load_tiniest(tmp_path, *FULL, "--run.teacher_precision", "fp8")
    assert "distributed.shard is full" in fp8_obstacle(config, World(1, 2, CPU))
    assert fp8_obstacle(config, World(0, 1, CPU)) is None
