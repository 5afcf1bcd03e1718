"""The estimate of several GPUs: limits that are known, and bytes that two processes were seen to send."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_train import batch_of
from tiny_runs import FIXED, load_tiniest
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import capi.faults
from benchmarks import scaling, scaling_step
from benchmarks.scaling_plot import COLOURS, plot
from benchmarks.scaling_step import Network, Task, end, run, shape_of, step, traffic
from capi.config import load_config
from capi.distributed import World, leave_group
from capi.metrics import training_flop_per_image
from capi.step import Trainer

INSTANT = Network(nvlink=float("inf"), nic=float("inf"), start=0, nvlink_hop=0, nic_hop=0)
MODELS = list(scaling.models())


def network_seconds(tasks: list[Task]) -> float:
    return sum(task.seconds for task in tasks if task.stream == "network")


def compute_seconds(tasks: list[Task]) -> float:
    return sum(task.seconds for task in tasks if task.stream == "compute")


def test_streams_run_beside_each_other_and_wait_where_they_must() -> None:
    tasks = [
        Task("a", "compute", 2),
        Task("sum of a", "network", 5, (0,)),
        Task("b", "compute", 3),
        Task("c", "compute", 1, (1,)),
        Task("sum of b", "network", 1, (2,)),
    ]
    assert run(tasks) == [(0, 2), (2, 7), (2, 5), (7, 8), (7, 8)]
    assert end(tasks) == 8


def test_collectives_take_their_hops_and_their_share_of_the_bytes() -> None:
    network = Network(nvlink=100, nic=10, start=1, nvlink_hop=0.1, nic_hop=0.2)
    assert network.all_reduce(800, 1) == 0
    assert network.all_reduce(800, 8) == pytest.approx(1 + 2 * 3 * 0.1 + 2 * 7 / 8 * 800 / 100)
    assert network.all_reduce(800, 64) == pytest.approx(
        1 + 2 * (3 * 0.1 + 3 * 0.2) + 2 * 7 / 8 * 800 / 100 + 2 * 7 / 8 * 100 / 10
    )
    assert (
        network.all_gather(800, 8) == network.reduce_scatter(800, 8) == pytest.approx(1 + 3 * 0.1 + 7 / 8 * 800 / 100)
    )


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_known_limits(model) -> None:
    measured = scaling.MEASURED[model.name]
    alone = step(model.shape, model.seconds, INSTANT, 1, measured.batch, measured.batch)
    if measured.step is not None:
        assert end(alone) == pytest.approx(measured.step, rel=1e-6)
    latency = Network(nvlink=float("inf"), nic=float("inf"), start=1e-5, nvlink_hop=0, nic_hop=0)
    for shard in (False, True):
        instant = step(model.shape, model.seconds, INSTANT, 64, 256, 256, shard=shard)
        assert end(instant) == pytest.approx(compute_seconds(instant))
        late = step(model.shape, model.seconds, latency, 64, 256, 256, shard=shard)
        n_collectives = sum(task.stream == "network" for task in late)
        assert network_seconds(late) == pytest.approx(1e-5 * n_collectives)
        for network in scaling.NETWORKS.values():
            tasks = scaling.timeline(model, 64, network, shard=shard)
            computing, sending = compute_seconds(tasks), network_seconds(tasks)
            assert max(computing, sending) <= end(tasks) <= computing + sending
            assert end(tasks) > end(scaling.timeline(model, 64, INSTANT, shard=shard))


@pytest.mark.parametrize("images", [256, 2048, 300])
def test_a_timeline_sends_what_the_table_says(images) -> None:
    """Bytes, of a network that takes a second for each but for what stays on its rank."""
    a_second_a_byte = Network(nvlink=1, nic=float("inf"), start=0, nvlink_hop=0, nic_hop=0)
    for model in MODELS:
        tasks = step(model.shape, model.seconds, a_second_a_byte, 8, images, 256)
        assert network_seconds(tasks) == pytest.approx(2 * 7 / 8 * sum(traffic(model.shape).values()))
        sharded = step(model.shape, model.seconds, a_second_a_byte, 8, images, 256, shard=True)
        gathered = sum(task.seconds for task in sharded if task.name == "weights")
        student, teacher = (sum(b.parameters for b in blocks) for blocks in (model.shape.student, model.shape.teacher))
        assert gathered == pytest.approx(7 / 8 * 2 * (2 * student + teacher) * -(-images // 256))


def test_flop_and_parameters_are_those_of_the_model() -> None:
    for preset in ("vits14", "vitl14"):
        config = load_config(["--config", preset])
        shape = shape_of(config)
        head = 4 * shape.positions * config.model.embed_dim * shape.prototypes
        flop = 3 * sum(b.flop for b in shape.student) + sum(b.flop for b in shape.teacher) + head
        assert flop == pytest.approx(training_flop_per_image(config), rel=1e-9)


def test_the_head_takes_as_many_positions_at_a_time_as_the_kernels_do() -> None:
    pytest.importorskip("triton")
    from capi_kernels.heads.clustering_head_triton import LOGITS_BYTES
    from capi_kernels.sinkhorn.balance_triton import CHUNKS_IN_FLIGHT

    assert (scaling_step.LOGITS_BYTES, scaling_step.CHUNKS_IN_FLIGHT) == (LOGITS_BYTES, CHUNKS_IN_FLIGHT)


def count_bytes(rank: int, folder: Path) -> None:
    """Of every all-reduce in a step: by Python's calls, and by DDP's, which are C++."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    (folder / str(rank)).mkdir()
    config = load_tiniest(folder / str(rank), *FIXED)
    sent, all_reduce = Counter(), dist.all_reduce

    def counting(tensor, op=dist.ReduceOp.SUM, *arguments, **named):
        kind = "sums" if op == dist.ReduceOp.SUM else "largest"
        sent[kind if tensor.is_floating_point() else "integers"] += tensor.nbytes
        return all_reduce(tensor, op, *arguments, **named)

    def hook(group, bucket):
        sent["DDP"] += bucket.buffer().nbytes  # This goes through Python, and is counted there as well.
        return allreduce_hook(group, bucket)

    for module in [m for name, m in sys.modules.items() if name.partition(".")[0] in ("capi", "capi_kernels")]:
        if getattr(module, "all_reduce", None) is all_reduce:
            module.all_reduce = counting
    dist.all_reduce = counting
    capi.faults.allreduce_hook = hook
    trainer = Trainer(config, World(rank, 2, torch.device("cpu")))
    trainer.step([batch_of(config, range(4 * rank, 4 * rank + 4))], 0)
    expected = traffic(shape_of(config))
    largest = expected["Sinkhorn"] // (1 + config.clustering.n_sinkhorn_iterations)
    assert sent.pop("integers") <= 64  # Of hosts that agree on a size.
    assert sent == {"DDP": expected["student gradient"], "largest": largest, "sums": sum(expected.values()) - largest}
    leave_group()


def test_two_processes_send_as_many_bytes_as_the_estimate_says(tmp_path) -> None:
    run_ranks(count_bytes, (tmp_path,), 2)


def test_the_page_is_what_the_program_writes() -> None:
    assert (scaling.RESULTS / "scaling.md").read_text() == scaling.report(MODELS)
    assert "No figure below that names 8 or 64 GPUs was measured" in scaling.report(MODELS)


def test_every_task_has_a_colour(tmp_path) -> None:
    tasks = [*scaling.timeline(MODELS[0], 8, INSTANT), *scaling.timeline(MODELS[0], 8, INSTANT, shard=True)]
    assert {task.name for task in tasks} == COLOURS.keys()
    plot({"one": tasks[:3], "other": tasks[:2]}, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
