"""The Sinkhorn queue: what takes part in the balancing, what a checkpoint holds of it, and how it begins."""

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from tiny_runs import FIXED, assert_equal_states, draw_batches, load_tiniest, metrics_of, tiniest
from torch import Tensor

import capi.step
from capi.checkpoint import load_newest_checkpoint, save_heads
from capi.config import ClusteringConfig, Config
from capi.config_check import check_config
from capi.distributed import World
from capi.heads import OnlineClustering
from capi.metrics import entropy_floor
from capi.step import Trainer
from capi.step_graph import graphs_obstacle
from capi.train import main
from capi_kernels import StudentLoss, reference, student_loss_with_statistics

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
POSITIONS, BATCH, QUEUE, DIM = 5, 4, 8, 6


def head_with_queue(**options) -> OnlineClustering:
    torch.manual_seed(0)
    head = OnlineClustering(DIM, ClusteringConfig(n_prototypes=7, queue_size=QUEUE, **options)).init_weights()
    head.add_queue(POSITIONS, torch.float32)
    return head


def features_of(step: int) -> Tensor:
    return torch.randn((BATCH, POSITIONS, DIM), generator=torch.Generator().manual_seed(step))


def balanced_and_sliced(head: OnlineClustering, features: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the targets [images, positions, prototypes], as one would write them."""
    logits = F.linear(F.normalize(torch.cat([features, earlier]).transpose(0, 1), dim=-1), *head.parameters())
    slices = logits.detach() if head.config.positionwise else logits.detach().flatten(0, 1)
    targets = reference.sinkhorn_positionwise(slices, temperature=0.06, process_group=None).view_as(logits)
    logits, targets = logits[:, : len(features)], targets[:, : len(features)]
    return -(targets * F.log_softmax(logits / 0.12, dim=-1)).sum(-1).mean(), targets.transpose(0, 1)


@pytest.mark.parametrize("positionwise", [True, False], ids=["positionwise", "together"])
def test_the_batch_is_balanced_with_the_images_of_the_steps_before(positionwise: bool) -> None:
    head = head_with_queue(positionwise=positionwise)
    rows = torch.arange(BATCH * POSITIONS)
    for step in range(7):
        features = features_of(step)
        # The batch alone, until there are as many images as the queue holds.
        earlier = torch.cat([features_of(step - 2), features_of(step - 1)]) if step >= 2 else features[:0]
        loss, potentials = head(features)
        head.zero_grad()
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in head.parameters()]
        expected, targets = balanced_and_sliced(head, features, earlier)
        head.zero_grad()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for parameter, gradient in zip(head.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
        actual = head.targets(features, potentials, rows)
        torch.testing.assert_close(actual, targets.flatten(0, 1))
        second_half = head.targets(features[2:], potentials, rows[: 2 * POSITIONS], first_image=2)
        torch.testing.assert_close(second_half, actual[2 * POSITIONS :])
        assert head.images_of_queue == len(earlier)
        with torch.no_grad():  # The prototypes are those of the step, not of the one that stored the features.
            head.layer.weight.mul_(1.1)
        head.store(torch.tensor(True))


def test_a_batch_that_does_not_divide_the_queue_takes_the_place_of_the_oldest() -> None:
    head = head_with_queue()
    images = [torch.full((3, POSITIONS, DIM), 0.0) + torch.arange(3).view(3, 1, 1) + 3 * step for step in range(5)]
    for features in images:
        head(features)
        head.store(torch.tensor(True))
    assert sorted(head.queue.features[:, 0, 0].tolist()) == list(range(7, 15))


def test_a_step_that_is_not_finite_leaves_the_queue_as_it_is() -> None:
    head = head_with_queue()
    for step in range(3):
        head(features_of(step))
        head.store(torch.tensor(True))
    before = {name: x.clone() for name, x in head.queue.state_dict().items()}
    head(features_of(3) * torch.nan)
    head.store(torch.tensor(False))
    assert_equal_states(dict(head.queue.state_dict()), before)


def train(config: Config, steps: range, trainer: Trainer | None = None, parts: int = 1) -> Trainer:
    trainer = trainer or Trainer(config, ALONE)
    for step in steps:
        trainer.step(draw_batches(config, step, parts), step)
    return trainer


QUEUED = (*FIXED, "--clustering.queue_size", "16")


def test_a_run_without_a_queue_is_the_run_of_before_until_one_is_full(tmp_path) -> None:
    without, queued = load_tiniest(tmp_path, *FIXED), load_tiniest(tmp_path, *QUEUED)
    first, second = train(without, range(2)), train(queued, range(2))
    plain = first.state_dict()["model"]
    assert not [name for name in plain if "queue" in name]
    with_queue = second.state_dict()["model"]
    assert set(with_queue) - set(plain) == {"teacher.head.queue.features", "teacher.head.queue.stored"}
    assert_equal_states(dict(plain), {name: with_queue[name] for name in plain})
    name = "teacher.head.layer.weight"
    third, fourth = (train(c, range(2, 4), t).state_dict()["model"] for c, t in ((without, first), (queued, second)))
    assert not torch.equal(third[name], fourth[name])
    save_heads(tmp_path / "heads.safetensors", second.model)
    assert (tmp_path / "heads.safetensors").stat().st_size < 20000


def test_micro_batches_are_queued_whole(tmp_path) -> None:
    config = load_tiniest(tmp_path, *QUEUED, "--model.drop_path_rate", "0")
    trainer = train(config, range(3), parts=2)
    queue = trainer.model.teacher["head"].queue
    assert int(queue.stored) == 24
    assert trainer.not_finite() is None
    assert queue.features.dtype == trainer.compute_dtype == torch.float32
    assert queue.features.abs().amin(0).amin() > 0


@pytest.mark.parametrize("saved_at", [1, 3])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, saved_at: int) -> None:
    config = load_tiniest(tmp_path, *QUEUED)
    whole = train(config, range(5))
    state = train(config, range(saved_at)).state_dict()
    torch.save(state, tmp_path / "state.pt")
    resumed = Trainer(config, ALONE)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_equal_states(train(config, range(saved_at, 5), resumed).state_dict(), whole.state_dict())


def test_the_floor_of_the_entropy_is_that_of_batch_and_queue(tmp_path, caplog) -> None:
    options = [*tiniest(tmp_path), "--clustering.queue_size", "8", "--clustering.n_prototypes", "64"]
    with caplog.at_level(logging.WARNING, "capi"):
        assert main(options) == 0
    assert "the Sinkhorn batch of 16 is smaller than the 64 prototypes" in caplog.text
    floors = [line["target_entropy_floor"] for line in metrics_of(tmp_path / "run")]
    assert floors == pytest.approx([entropy_floor(8, 64)] + [entropy_floor(16, 64)] * 5)
    state = load_newest_checkpoint(tmp_path / "run")["trainer"]["model"]
    assert int(state["teacher.head.queue.stored"]) == 48


@pytest.mark.parametrize(("saved", "now", "lines"), [(0, 16, 1), (24, 16, 1), (16, 0, 0), (16, 16, 0)])
def test_a_queue_of_another_size_begins_empty(tmp_path, caplog, saved: int, now: int, lines: int) -> None:
    before, after = (load_tiniest(tmp_path, *FIXED, "--clustering.queue_size", str(n)) for n in (saved, now))
    state = train(before, range(4)).state_dict()
    trainer = train(after, range(3))  # Whose own queue is full.
    with caplog.at_level(logging.INFO, "capi"):
        trainer.load_state_dict(state)
    assert caplog.text.count("the Sinkhorn queue of 16 images begins empty") == lines
    head = trainer.model.teacher["head"]
    if now:
        assert int(head.queue.stored) == (0 if lines else 32)
        assert (head.queue.share() is None) == bool(lines)
    train(after, range(4, 5), trainer)


@pytest.mark.parametrize("size", [-8, 7, 9])
def test_a_queue_is_no_smaller_than_the_batch_and_the_same_on_all_ranks(tmp_path, size: int) -> None:
    config = load_tiniest(tmp_path)
    config.clustering.queue_size = size
    with pytest.raises(ValueError, match=f"clustering.queue_size must be 0, or at least .* 8 .* got {size}"):
        check_config(config, world_size=4)


def test_a_queue_stands_in_the_way_of_a_graph(tmp_path) -> None:
    gpu = World(0, 1, torch.device("cuda"))
    assert graphs_obstacle(load_tiniest(tmp_path, *FIXED), gpu) is None
    assert graphs_obstacle(load_tiniest(tmp_path, *QUEUED), gpu) == "clustering.queue_size is set"


def infinite_loss(*arguments) -> StudentLoss:
    loss, *statistics = student_loss_with_statistics(*arguments)
    return StudentLoss(loss + torch.inf, *statistics)


def of_two_ranks(rank: int, folder: Path) -> None:
    """As `alone` below, each rank with half of the images; in step 3 the loss of rank 1 is infinite."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    config = load_tiniest(folder, *QUEUED, "--model.drop_path_rate", "0")
    trainer = Trainer(config, World(rank, 2, CPU))
    for step in range(6):
        capi.step.student_loss_with_statistics = (
            infinite_loss if (rank, step) == (1, 3) else student_loss_with_statistics
        )
        trainer.step([draw_batches(config, step, 2)[rank]], step)
    torch.save(trainer.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process_and_hold_the_same(tmp_path) -> None:
    config = load_tiniest(tmp_path, *QUEUED, "--model.drop_path_rate", "0")
    run_ranks(of_two_ranks, (tmp_path,), 2)
    trainer = Trainer(config, ALONE)
    for step in range(6):
        with pytest.MonkeyPatch.context() as patch:
            if step == 3:
                patch.setattr(capi.step, "student_loss_with_statistics", infinite_loss)
            trainer.step(draw_batches(config, step, 2), step)
    ours = trainer.state_dict()["model"]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True)["model"] for rank in range(2))
    assert_equal_states(dict(first), dict(second))
    alone = Trainer(config, ALONE)
    alone.model.load_state_dict(first)
    assert torch.equal(alone.model.teacher["head"].queue.share(), first["teacher.head.queue.features"])
    assert int(ours["teacher.head.queue.stored"]) == int(first["teacher.head.queue.stored"]) == 40
    for name in ("queue.features", "layer.weight", "layer.bias"):
        torch.testing.assert_close(first[f"teacher.head.{name}"], ours[f"teacher.head.{name}"], rtol=1e-4, atol=1e-5)
