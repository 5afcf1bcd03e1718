"""What ranks do together, in processes of their own."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_train import batch_of
from tiny_runs import assert_equal_states, load_tiniest
from torch import nn

import capi.step
from capi.checkpoint import load_newest_checkpoint
from capi.distributed import GradientAverage, World, _first_host, _launched, leave_group
from capi.metrics import AssignmentStatistics, positional_mutual_information
from capi.step import Trainer
from capi.train import main
from capi_kernels import StudentLoss, student_loss_with_statistics
from capi_kernels._process_groups import resolve_group


def check_statistics(rank: int) -> None:
    """One line of all ranks' tokens; nothing stays on the others."""
    statistics = AssignmentStatistics(6, 8)
    positions, clusters = torch.arange(50) % 6, torch.arange(50) % 5
    for _ in range(3):
        for part in (slice(0, 20), slice(20, 30)) if rank == 0 else (slice(30, 33), slice(33, 50)):
            statistics.update(positions[part], clusters[part])
        result = statistics.read()
        assert not statistics._tokens
        if rank == 1:
            assert result == {}
            continue
        assert result["assigned_tokens"] == 50
        assert result["positional_mi"] == positional_mutual_information(positions, clusters, 6, 8)[0]
        assert result["dead_prototypes"] == pytest.approx(3 / 8)


def infinite_loss(*arguments) -> StudentLoss:
    loss, *statistics = student_loss_with_statistics(*arguments)
    return StudentLoss(loss + torch.inf, *statistics)


def check_steps(rank: int, folder: Path) -> None:
    """One rank's infinite loss or NaN gradient lets both skip the step, and their models stay the same."""
    config = load_tiniest(folder / str(rank))
    trainer = Trainer(config, World(rank, 2, torch.device("cpu")))
    parameters = dict(trainer.model.named_parameters())
    for step in range(1, 6):
        images, masks = batch_of(config, range(8 * rank, 8 * rank + 4))
        second = batch_of(config, range(8 * rank + 4, 8 * rank + 8))
        hooks = []
        # Its gradients are finite.
        infinite = rank == 1 and step == 2
        capi.step.student_loss_with_statistics = infinite_loss if infinite else student_loss_with_statistics
        if rank == step - 3:
            name = ("student.backbone.mask_token", "teacher.head.layer.weight")[rank]
            hooks.append(parameters[name].register_hook(lambda gradient: gradient * torch.nan))
        before = {name: p.clone() for name, p in parameters.items() if p.requires_grad}
        trainer.step([(images, masks), second], step)
        for hook in hooks:
            hook.remove()
        assert int(trainer.bad_steps) == (step - 1 if step in (2, 3, 4) else 0), step
        changed = {name: not torch.equal(parameters[name], before[name]) for name in before}
        assert any(changed.values()) == (step not in (2, 3, 4)), (step, changed)
    for name, parameter in parameters.items():
        other = parameter.detach().clone()
        dist.broadcast(other, 0)
        assert torch.equal(parameter, other), name
    gradients = [p.grad for p in trainer.model.student.parameters() if p.requires_grad]
    buckets = {gradient.untyped_storage().data_ptr() for gradient in gradients}
    assert len(buckets) < len(gradients) / 4, "gradients are no views of DDP's buckets"


def check_gradients(rank: int) -> None:
    """AdamW would not tell a mean from a sum."""
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,))]
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, 1.0 + i + 4 * rank)
    GradientAverage(parameters).wait()
    for i, parameter in enumerate(parameters):
        assert torch.equal(parameter.grad, torch.full_like(parameter, 3.0 + i))


def check_the_group_outlives_ddp() -> None:
    """DDP would wait for gloo's threads with the GIL, which one of them may need."""
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    group = weakref.ref(dist.group.WORLD)
    leave_group()
    assert not dist.is_initialized()
    del model
    gc.collect()
    assert group() is not None


def of_two_ranks(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    (folder / str(rank)).mkdir()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    check_statistics(rank)
    check_gradients(rank)
    check_steps(rank, folder)
    check_the_group_outlives_ddp()


def test_two_ranks_share_statistics_and_gradients_and_skip_bad_steps_together(tmp_path) -> None:
    run_ranks(of_two_ranks, (tmp_path,), 2)


def test_torchrun_with_one_process_trains_as_none(tmp_path, monkeypatch) -> None:
    """Bit for bit, and without a process group."""
    load_tiniest(tmp_path)
    command = ["--config", str(tmp_path / "tiniest.yaml"), "--run.output_dir"]
    assert main([*command, str(tmp_path / "alone")]) == 0
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():  # and no address to meet at
        monkeypatch.setenv(name, value)
    assert main([*command, str(tmp_path / "torchrun")]) == 0
    states = (load_newest_checkpoint(tmp_path / name)["trainer"] for name in ("alone", "torchrun"))
    assert_equal_states(*states)


def test_a_group_of_one_is_no_group() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert resolve_group("world") is resolve_group(dist.group.WORLD) is None
    finally:
        dist.destroy_process_group()


TASK = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}


def test_a_task_of_a_slurm_step_meets_the_others_on_the_first_host() -> None:
    step = TASK | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[03-04]"}
    place = _launched(step)
    assert (place.rank, place.size, place.local_rank) == (3, 4, 1)
    assert place.meeting.startswith("tcp://gpu03:")
    assert _launched(step | {"SLURM_STEP_ID": "2"}).meeting != place.meeting
    assert _launched(step | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}).meeting == "tcp://10.0.0.1:29500"
    assert _launched(step | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}).size == 2  # torchrun, a task a node


def test_what_is_no_task_of_a_slurm_step_is_alone() -> None:
    interactive = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "gpu[03-04]"}
    for environment in ({}, {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, TASK, TASK | interactive):
        assert _launched(environment).size == 1


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_of_another_launcher_are_refused(name) -> None:
    with pytest.raises(ValueError, match=f"{name} is 2.*; expected torchrun or srun"):
        _launched({name: "2"})
    assert _launched({name: "1"}).size == 1


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("localhost", "localhost"),
        ("a-1.example,b", "a-1.example"),
        ("node[003-006,9],other", "node003"),
        ("node[7,9-12]", "node7"),
        ("rack[2-3]n[01-04]-ib,x", "rack2n01-ib"),
    ],
)
def test_the_first_host_of_a_list(hosts, first) -> None:
    assert _first_host(hosts) == first
