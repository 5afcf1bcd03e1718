"""The benchmark of processes that train together."""

from benchmarks import distributed_overhead
from benchmarks.distributed_overhead import ARRANGEMENTS, started, train


def test_all_arrangements_take_as_many_images_on_as_many_cores() -> None:
    assert {arrangement.processes * arrangement.threads for arrangement in ARRANGEMENTS} == {2}


def test_processes_train_together_and_end(monkeypatch) -> None:
    monkeypatch.setattr(distributed_overhead, "ANSWER_SECONDS", 120.0)
    (together,) = (arrangement for arrangement in ARRANGEMENTS if arrangement.together)
    with started(together, "tiny", 4) as pipes:
        assert len(pipes) == 2
        assert train(pipes, 1) > 0
