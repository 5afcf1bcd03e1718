import json
import math
import resource
from contextlib import closing

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from capi import heads, transformer
from capi.config import load_config
from capi.data import ImageStream
from capi.distributed import World
from capi.metrics import (
    AssignmentStatistics,
    MetricsWriter,
    entropy_floor,
    peak_flops,
    positional_mutual_information,
    read_metrics,
    training_flop_per_image,
)
from capi.step import Trainer
from capi_kernels import reference


def test_entropy_floor_is_reached_by_balanced_rows():
    """16 rows over 64 prototypes, each prototype used equally: at best every row spreads over 4 of its own."""
    targets = torch.eye(16, dtype=torch.float64).repeat_interleave(4, dim=1) / 4
    torch.testing.assert_close(targets.sum(0), torch.full((64,), 1 / 4, dtype=torch.float64))
    entropy = -torch.xlogy(targets, targets).sum(1).mean()
    assert entropy_floor(16, 64) == pytest.approx(float(entropy), rel=1e-12)
    assert entropy_floor(64, 64) == 0
    assert entropy_floor(128, 64) == 0


def dense_mutual_information(positions: torch.Tensor, clusters: torch.Tensor, shape: tuple[int, int]) -> float:
    """H(position) + H(cluster) - H(position, cluster)."""
    joint = torch.zeros(shape, dtype=torch.float64).index_put((positions, clusters), torch.ones(()).double(), True)
    joint /= joint.sum()
    entropies = [-torch.xlogy(p, p).sum() for p in (joint.sum(1), joint.sum(0), joint)]
    return float(entropies[0] + entropies[1] - entropies[2])


def test_mutual_information_of_random_counts():
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(9, (500,), generator=generator)
    clusters = (positions + torch.randint(5, (500,), generator=generator)) % 12
    information, floor = positional_mutual_information(positions, clusters, 9, 12)
    assert information == pytest.approx(dense_mutual_information(positions, clusters, (9, 12)), rel=1e-12)
    assert 0 < floor < information / 4


def test_mutual_information_of_a_function_and_of_a_product():
    positions = torch.arange(8).repeat(40)
    information, floor = positional_mutual_information(positions, positions, 8, 16)
    assert information == pytest.approx(math.log(8), rel=1e-12)
    assert floor < 0.5
    product = torch.cartesian_prod(torch.arange(8), torch.arange(16))
    information, _ = positional_mutual_information(product[:, 0], product[:, 1], 8, 16)
    assert information < 1e-12


def test_the_floor_is_what_independent_tokens_show():
    """256 positions and 16384 prototypes: few tokens a pair make nats of information that mean nothing."""
    generator = torch.Generator().manual_seed(1)
    positions = torch.randint(256, (40_000,), generator=generator)
    clusters = torch.randint(16384, (40_000,), generator=generator)
    information, floor = positional_mutual_information(positions, clusters, 256, 16384)
    assert information > 3
    assert abs(information - floor) < 0.01
    collapsed = (clusters // 256) * 256 + positions
    information, floor = positional_mutual_information(positions, collapsed, 256, 16384)
    assert information - floor > 1
    assert positional_mutual_information(positions, collapsed, 256, 16384) == (information, floor)


def test_mutual_information_needs_tokens():
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least one token, got none"):
        positional_mutual_information(none, none, 4, 4)


def test_statistics_add_up_and_start_again():
    positions, clusters = torch.arange(60) % 6, torch.arange(60) % 4
    statistics = AssignmentStatistics(n_positions=6, n_prototypes=10)
    statistics.update(positions[:25], clusters[:25])
    statistics.update(positions[25:], clusters[25:])
    information, floor = positional_mutual_information(positions, clusters, 6, 10)
    assert statistics.read() == {
        "positional_mi": information,
        "positional_mi_floor": floor,
        "dead_prototypes": pytest.approx(0.6),
        "assigned_tokens": 60,
    }
    assert statistics.read() == {}
    statistics.update(torch.tensor([0]), torch.tensor([9]))
    assert statistics.read() == {
        "positional_mi": 0,
        "positional_mi_floor": 0,
        "dead_prototypes": pytest.approx(0.9),
        "assigned_tokens": 1,
    }


def test_statistics_keep_what_they_were_given():
    positions, clusters = torch.arange(4, dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    statistics = AssignmentStatistics(4, 4)
    statistics.update(positions, clusters)
    clusters.zero_()
    assert statistics.read()["dead_prototypes"] == 0


def test_statistics_keep_the_newest_tokens_only():
    statistics = AssignmentStatistics(4, 4, max_tokens=50)
    for cluster in range(1000):
        statistics.update(torch.arange(20) % 4, torch.full((20,), cluster % 4))
    assert len(statistics._tokens) == 2
    result = statistics.read()
    assert result["assigned_tokens"] == 40
    assert result["dead_prototypes"] == 0.5


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with closing(MetricsWriter(tmp_path)) as writer:
        writer.write(0, {"loss": 2.5, "assigned_tokens": 7})
        writer.write(20, {"loss": math.nan, "lr": math.inf})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "loss": 2.5, "assigned_tokens": 7},
        {"step": 20, "loss": None, "lr": None},
    ]


def test_resuming_drops_what_comes_again_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with closing(MetricsWriter(tmp_path)) as writer:
        for step in (0, 10, 20, 30):
            writer.write(step, {"loss": float(step)})
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    assert [line["step"] for line in read_metrics(path)] == [0, 10, 20, 30]
    with closing(MetricsWriter(tmp_path, resume_step=20)) as writer:
        assert [line["step"] for line in read_metrics(path)] == [0, 10]
        writer.write(20, {"loss": -1.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(0, 0), (10, 10), (20, -1)]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 0), (10, 10), (20, -1)]


def test_a_new_run_in_the_same_folder_starts_its_own_lines(tmp_path):
    for loss in (1.0, 2.0):
        with closing(MetricsWriter(tmp_path)) as writer:
            writer.write(0, {"loss": loss})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 2.0}]


def test_lines_that_a_full_disk_refuses_are_lost_whole(tmp_path, caplog):
    """A limit on the size of files stands for the full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(MetricsWriter(tmp_path)) as writer:
        writer.write(0, {"loss": 0.0})
        try:
            # Neither the next line nor the next events fit whole.
            resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 5, before[1]))
            writer.write(10, {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        writer.write(20, {"loss": 2.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == [(0, 0), (20, 2)]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 0), (20, 2)]
    assert caplog.text.count("what was measured now is lost: File too large") == 2


def test_a_bad_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"ste\n{"step": 20}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl is not JSON"):
        read_metrics(path)


def test_flop_of_the_large_model():
    """PERFORMANCE.md: student encoder 65, teacher 172, predictor 7.4, heads 8.9, step 407 GFLOP an image."""
    assert training_flop_per_image(load_config(["--config", "vitl14"])) == pytest.approx(407e9, rel=2e-3)


@pytest.mark.parametrize("other", [(), ("--model.predictor_dim", "96", "--model.out_layer", "1")])
def test_flop_equal_what_pytorch_counts_in_a_step(other, monkeypatch):
    """Of the algorithm as published: the values projected first, the targets taken from the clustering head."""
    batch_size = 4
    # PyTorch sees into the definitions, but not into the ops that compute them.
    packed_ops = {"visible_attention_qkvpacked": 0, "masked_cross_attention_kvpacked": 1}
    for name, before in packed_ops.items():
        definition = getattr(reference, name.removesuffix("_qkvpacked").removesuffix("_kvpacked"))

        def unpacked(*operands, definition=definition, before=before):
            return definition(*operands[:before], *operands[before].unbind(1), *operands[before + 1 :])

        monkeypatch.setattr(transformer, name, unpacked)
    monkeypatch.setattr(transformer, "_values_come_last", lambda *_: False)
    monkeypatch.setattr(heads, "clustering_head", reference.clustering_head)
    monkeypatch.setattr(
        heads, "clustering_targets", lambda features, weight, *_, **__: torch.ones(len(features), len(weight))
    )
    options = ["--data.synthetic_size", "4", "--optim.batch_size", str(batch_size), "--run.device", "cpu"]
    config = load_config(["--config", "tiny", *options, *other])
    batch = next(iter(ImageStream(config, rank=0, world_size=1)))
    trainer = Trainer(config, World(rank=0, size=1, device=torch.device("cpu")))
    with FlopCounterMode(display=False) as counter:
        trainer.step([(batch.images, batch.masks)], 0)
    counted = counter.get_total_flops() / batch_size
    # PyTorch also counts the outer products that form rotary angles.
    assert 0.999 * counted < training_flop_per_image(config) <= counted


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA RTX A4000", None),
        ("Tesla T4", None),
    ],
)
def test_peak_by_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_a_cpu_has_no_stated_peak():
    assert peak_flops(torch.device("cpu")) is None
