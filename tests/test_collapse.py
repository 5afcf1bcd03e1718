"""The alarm for positional collapse: on the runs it was calibrated on, on chance, and across a resume."""

import json
import logging
from pathlib import Path

import pytest
import torch

from capi.collapse import CollapseAlarm
from capi.metrics import positional_mutual_information, read_metrics

RECORDS = Path(__file__).parent.parent / "experiments" / "results" / "collapse.jsonl"


def reading(excess: float, tokens: int = 14080) -> dict[str, float]:
    return {"positional_mi": 0.08 + excess, "positional_mi_floor": 0.08, "assigned_tokens": tokens}


def rings(alarm: CollapseAlarm, excesses: list[float], tokens: int = 14080) -> list[bool]:
    return [bool(alarm.read(i, reading(x, tokens))["positional_alarm"]) for i, x in enumerate(excesses)]


def test_it_rings_in_every_recorded_collapse_and_in_no_healthy_run() -> None:
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    assert records
    for record in records:
        alarm = CollapseAlarm(36, 64)
        series = zip(record["series"]["positional_mi"], record["series"]["positional_mi_floor"], strict=True)
        excesses = [value - floor for (_, value), (_, floor) in series]
        assert any(rings(alarm, excesses, record["tokens_a_reading"])) == record["arm"].endswith("/standard"), record


@pytest.mark.parametrize(
    ("n_positions", "n_prototypes", "tokens"), [(36, 64, 500), (36, 64, 42240), (256, 1024, 3000), (256, 16384, 20000)]
)
def test_chance_alone_does_not_ring(n_positions, n_prototypes, tokens) -> None:
    """With few tokens for every pair of position and cluster too, where what is measured is far from 0."""
    generator = torch.Generator().manual_seed(0)
    alarm = CollapseAlarm(n_positions, n_prototypes)
    for step in range(12):
        positions = torch.randint(n_positions, (tokens,), generator=generator)
        clusters = torch.randint(n_prototypes, (tokens,), generator=generator)
        information, floor = positional_mutual_information(positions, clusters, n_positions, n_prototypes)
        values = {"positional_mi": information, "positional_mi_floor": floor, "assigned_tokens": tokens}
        assert alarm.read(step, values)["positional_alarm"] == 0


def test_the_deviation_is_that_of_independent_tokens() -> None:
    """Which the level stands on; a hundred draws tell it within a fifth."""
    n_positions, n_prototypes, tokens = 9, 16, 3000
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(n_positions, (100, tokens), generator=generator)
    clusters = torch.randint(n_prototypes, (100, tokens), generator=generator)
    drawn = [
        positional_mutual_information(p, c, n_positions, n_prototypes, n_permutations=1)[0]
        for p, c in zip(positions, clusters, strict=True)
    ]
    deviation = CollapseAlarm(n_positions, n_prototypes)._deviation / tokens
    assert torch.tensor(drawn).std().item() == pytest.approx(deviation, rel=0.2)


def test_few_tokens_raise_the_level() -> None:
    assert any(rings(CollapseAlarm(36, 64), [0.05] * 5, tokens=14080))
    assert not any(rings(CollapseAlarm(36, 64), [0.05] * 5, tokens=2000))


def test_one_reading_alone_does_not_ring_and_a_collapse_is_said_once(caplog) -> None:
    caplog.set_level(logging.WARNING, logger="capi")
    alarm = CollapseAlarm(36, 64)
    assert not any(rings(alarm, [0.12, 0.0, 0.0, 0.0, 0.0, 0.0]))
    assert rings(alarm, [0.04] * 6) == [False] * 3 + [True] * 3
    # About the level: below it, but not by much.
    assert all(rings(alarm, [0.028, 0.031, 0.027] * 3))
    (message,) = caplog.messages
    assert message.startswith("step 4: clusters come to stand for positions: 0.032 nats")
    assert rings(alarm, [-0.01] * 5)[-1] is False
    rings(alarm, [0.1] * 5)
    assert len(caplog.messages) == 2


def test_without_tokens_there_is_nothing_to_say() -> None:
    assert CollapseAlarm(36, 64).read(0, {}) == {}


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path, caplog) -> None:
    excesses = [0.01 * i for i in range(9)]
    whole = CollapseAlarm(36, 64)
    expected = [whole.read(i, reading(x)) for i, x in enumerate(excesses)]
    first = CollapseAlarm(36, 64)
    lines = [{"step": i, **reading(x), **first.read(i, reading(x))} for i, x in enumerate(excesses[:7])]
    assert first.rings
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 6, "eval_image_knn": 0.5}]))
    caplog.clear()
    second = CollapseAlarm(36, 64, read_metrics(path))
    assert [second.read(i, reading(x)) for i, x in enumerate(excesses[7:], start=7)] == expected[7:]
    assert not caplog.messages
