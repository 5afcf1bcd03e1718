"""Checkpoints that several ranks write and read together, and what becomes of damaged and hostile ones."""

import json
import logging
import os
import pickle
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from threading import Event

import pytest
import torch
import torch.distributed as dist
from tiny_runs import assert_equal_states, free_port, load_tiniest, metrics_of, tiniest
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from capi import saving, sharded_checkpoint
from capi.checkpoint import (
    checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    remove_stale_temporaries,
    save_checkpoint,
)
from capi.data import ImageStream
from capi.distributed import World
from capi.restore import _hand_out, all_see, check_fits, find_newest, restore
from capi.results import Results
from capi.resume import Start
from capi.saving import Checkpoints
from capi.sharded_checkpoint import check, load_into, part_of_rank, tensors_of
from capi.step import Trainer
from capi.train import main

LONG = 100.0  # Seconds in which everything here has ended, on the busiest machine.


class Ranks:
    """Processes, forks of this one, that join in a group and do the same work."""

    def __init__(self, folder: Path, n: int, work: Callable[[int], object], *, join: bool = True):
        self.logs = [folder / f"rank{rank}of{n}.{time.monotonic_ns()}.log" for rank in range(n)]
        meeting = f"file://{folder}/meeting{time.monotonic_ns()}"
        self.pids = []
        for rank in range(n):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of the threads of pytest-xdist.
                self.pids.append(os.fork())
            if self.pids[-1] == 0:
                self._be(rank, n, meeting, work, join)

    def _be(self, rank: int, n: int, meeting: str, work: Callable[[int], object], join: bool) -> None:
        status = 70
        try:
            file = os.open(self.logs[rank], os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
            logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
            torch.set_num_threads(1)
            if join:
                dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=n)
            status = work(rank) or 0
            if join:
                dist.barrier()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def said(self) -> str:
        return "\n".join(log.read_text() for log in self.logs if log.exists())

    def statuses(self) -> list[int]:
        deadline, ended = time.monotonic() + LONG, {}
        try:
            while len(ended) < len(self.pids):
                assert time.monotonic() < deadline, self.said()
                for pid in self.pids:
                    if pid not in ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                        ended[pid] = os.waitstatus_to_exitcode(found[1])
                time.sleep(0.01)
        finally:
            for pid in self.pids:
                if pid not in ended:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
        return [ended[pid] for pid in self.pids]


def together(folder: Path, n: int, work: Callable[[int], object]) -> None:
    ranks = Ranks(folder, n, work)
    assert ranks.statuses() == [0] * n, ranks.said()


def trained(n: int, steps: int) -> dict[str, torch.Tensor]:
    """All tensors of a small training, sharded over the ranks if there are several: of 3 rows not all have some."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 3), nn.BatchNorm1d(3))
    if n > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (n,)))
    optimizers = [
        torch.optim.AdamW(model[:2].parameters(), lr=0.1, fused=True),
        torch.optim.AdamW(model[2].parameters(), lr=0.01, fused=True),
    ]
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return tensors_of(model, optimizers)


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in tensors.items()}


def save(run_dir: Path, step: int, tensors: dict[str, torch.Tensor], rank: int, n: int, **rest: object) -> None:
    group = dist.new_group(backend="gloo") if n > 1 else None
    part, files = part_of_rank(tensors, rank, n)
    save_checkpoint(run_dir, step, {"step": step, **rest, "trainer": part}, 3, files=files, group=group)


# Ranks.


@pytest.mark.parametrize("few_bytes", [False, True])
def test_what_four_ranks_saved_two_and_one_load_and_the_other_way_round(few_bytes, tmp_path, monkeypatch) -> None:
    if few_bytes:
        monkeypatch.setattr(sharded_checkpoint, "_BYTES_PER_FILE", 100)

    def four(rank: int) -> None:
        tensors = trained(4, steps=2)
        if rank == 0:
            (tmp_path / "checkpoints").mkdir()
        expected = whole(tensors)
        save(tmp_path, 2, tensors, rank, 4)
        if rank == 0:
            torch.save(expected, tmp_path / "expected.pt")

    def load(rank: int, n: int) -> None:
        tensors = trained(n, steps=0)
        check(path, rank, n)
        load_into(path, tensors, alone=n == 1)
        assert_equal_states(whole(tensors), expected)
        assert sum(isinstance(x, DTensor) for x in tensors.values()) == (18 if n > 1 else 0)

    together(tmp_path, 4, four)
    path, expected = checkpoints(tmp_path)[0], torch.load(tmp_path / "expected.pt")
    assert len({file.name[:11] for file in path.glob("*.safetensors")}) == 4, "every rank writes its part"
    assert (len(list(path.glob("*.safetensors"))) > 4) == few_bytes
    together(tmp_path, 2, lambda rank: load(rank, 2))
    load(0, 1)
    read = load_checkpoint(path)["trainer"]
    assert_equal_states({f"{group}.{name}": x for group in read for name, x in read[group].items()}, expected)
    save(tmp_path, 3, expected, 0, 1)
    path = checkpoints(tmp_path)[1]
    together(tmp_path, 3, lambda rank: load(rank, 3))


def test_whole_tensors_are_handed_out_to_ranks_that_hold_parts(tmp_path) -> None:
    """As those of an earlier version's file."""
    expected = trained(1, steps=2)

    def work(rank: int) -> None:
        tensors = trained(3, steps=0)
        with torch.no_grad():
            _hand_out(expected if rank == 0 else {}, tensors, World(rank, 3, torch.device("cpu")))
        assert_equal_states(whole(tensors), expected)

    together(tmp_path, 3, work)


def test_tensors_that_all_ranks_have_are_written_once_in_equal_parts() -> None:
    tensors = {f"{i}": torch.zeros(100 + i) for i in range(40)}
    parts = [part_of_rank(tensors, rank, 4) for rank in range(4)]
    assert sorted(name for part, _ in parts for name in part) == sorted(tensors)
    assert all(files == parts[0][1] for _, files in parts)
    sizes = [sum(x.numel() for x in part.values()) for part, _ in parts]
    assert max(sizes) - min(sizes) <= 140


def test_ranks_know_whether_they_see_one_folder(tmp_path) -> None:
    def work(rank: int) -> None:
        world = World(rank, 2, torch.device("cpu"))
        for place in (tmp_path, tmp_path / f"{rank}", tmp_path / "none" if rank else tmp_path):
            place.mkdir(exist_ok=True) if place.name != "none" else None
            dist.barrier()
            print(all_see(place, world))
            dist.barrier()
            assert not list(place.glob(".*"))

    ranks = Ranks(tmp_path, 2, work)
    assert ranks.statuses() == [0, 0], ranks.said()
    assert ranks.said().split() == ["True", "False", "False"] * 2


@pytest.mark.parametrize(("sizes", "left_out"), [((3, 3), False), ((3, 4), True), ((3, 0), True), ((0, 3), True)])
def test_a_queue_of_another_size_begins_anew(sizes, left_out, tmp_path) -> None:
    trainers = []
    for size in sizes:
        trainers.append(Trainer(load_tiniest(tmp_path), World(0, 1, torch.device("cpu"))))
        if size:
            trainers[-1].model.teacher["head"].queue = nn.Module()
            trainers[-1].model.teacher["head"].queue.register_buffer("features", torch.full((size,), float(size)))
    save(tmp_path, 1, tensors_of(trainers[0].model, trainers[0].optimizers), 0, 1)
    found = find_newest(tmp_path, trainers[1].world, shared=True)
    names = check_fits(found, trainers[1], shared=True)
    assert names == ({"model.teacher.head.queue.features"} if left_out else set())
    restore(found, trainers[1], names, shared=True)
    if sizes[1]:
        assert (trainers[1].model.teacher["head"].queue.features == sizes[1]).all()


def test_a_restored_model_shares_the_rotary_tables_that_its_own_weights_allow(tmp_path) -> None:
    config = load_tiniest(tmp_path, "--model.encoder_depth", "2")
    trainers = [Trainer(config, World(0, 1, torch.device("cpu"))) for _ in range(2)]
    assert trainers[1].model.student_ema.backbone.encoder.shares_tables
    with torch.no_grad():
        trainers[0].model.student_ema.backbone.encoder.blocks[1].residual1.fn.rope.freqs.add_(1)
    save(tmp_path, 1, tensors_of(trainers[0].model, trainers[0].optimizers), 0, 1)
    restore(find_newest(tmp_path, trainers[1].world, shared=True), trainers[1], set(), shared=True)
    assert not trainers[1].model.student_ema.backbone.encoder.shares_tables


@contextmanager
def files_of_at_most(n_bytes: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_rank_whose_disk_is_full_is_named_on_all_and_nothing_is_left(tmp_path) -> None:
    def work(rank: int) -> None:
        tensors = {f"{i}": torch.zeros(5000) for i in range(4)}
        with files_of_at_most(1000 if rank == 1 else 10**9), pytest.raises(OSError) as error:
            save(tmp_path, 2, tensors, rank, 2)
        print(error.value)
        dist.barrier()
        assert not list((tmp_path / "checkpoints").iterdir())
        save(tmp_path, 3, tensors, rank, 2)

    ranks = Ranks(tmp_path, 2, work)
    assert ranks.statuses() == [0, 0], ranks.said()
    path = tmp_path / "checkpoints" / "step_000000002"
    assert ranks.said().count(f"{path} could not be written: rank 1: File too large") == 2
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000000003"]


def test_a_folder_that_rank_0_cannot_make_is_an_error_on_all(tmp_path) -> None:
    (tmp_path / "checkpoints").touch()

    def work(rank: int) -> None:
        with pytest.raises(OSError, match="step_000000002 could not be written: rank 0: File exists"):
            save(tmp_path, 2, {"x": torch.zeros(5)}, rank, 2)

    together(tmp_path, 2, work)


def test_a_rank_that_is_killed_while_it_saves_costs_that_checkpoint_alone(tmp_path, monkeypatch) -> None:
    save(tmp_path, 1, {"x": torch.zeros(5)}, 0, 1)
    original = sharded_checkpoint._described

    def die(path: Path) -> dict:
        if dist.is_initialized() and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path)

    monkeypatch.setattr(sharded_checkpoint, "_described", die)

    def work(rank: int) -> int:
        with pytest.raises(OSError, match="step_000000002 could not be written: "):
            save(tmp_path, 2, {"x": torch.zeros(5), "y": torch.zeros(5)}, rank, 2)
        os._exit(0)

    assert Ranks(tmp_path, 2, work).statuses() == [0, -signal.SIGKILL]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000000001"]


def test_a_kill_before_the_manifest_leaves_the_checkpoint_before(tmp_path, monkeypatch) -> None:
    save(tmp_path, 1, {"x": torch.zeros(5)}, 0, 1)
    monkeypatch.setattr(sharded_checkpoint, "_write", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    ranks = Ranks(tmp_path, 1, lambda _: save(tmp_path, 2, {"x": torch.zeros(5)}, 0, 1), join=False)
    assert ranks.statuses() == [-signal.SIGKILL]
    assert len(list((tmp_path / "checkpoints" / ".step_000000002.alone.tmp").iterdir())) == 1
    assert load_newest_checkpoint(tmp_path)["step"] == 1
    remove_stale_temporaries(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000000001"]


def runs(folder: Path, n: int, *options: str, stop_in: int | None = None) -> tuple[list[int], str]:
    """A training by so many processes, which gets SIGTERM in this step."""
    world = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}

    def work(rank: int) -> int:
        os.environ.update(world | {"RANK": str(rank)})
        original = Trainer.step

        def step(self, batches, number, *launched):
            if number == stop_in:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, batches, number, *launched)

        Trainer.step = step
        return main([*tiniest(folder), *options])

    ranks = Ranks(folder, n, work, join=False)
    return ranks.statuses(), ranks.said()


def test_a_run_goes_on_with_other_numbers_of_ranks_and_all_leave_a_damaged_checkpoint(tmp_path) -> None:
    options = ["--model.drop_path_rate", "0", "--run.checkpoint_every", "1"]
    assert main([*tiniest(tmp_path), *options, "--run.output_dir", str(tmp_path / "whole")]) == 0
    statuses, said = runs(tmp_path, 2, *options, stop_in=2)
    assert statuses == [143, 143], said
    newest = checkpoints(tmp_path / "run")[-1]
    assert newest.name == "step_000000003"
    damaged = sorted(newest.glob("shard-00002-*"))[0]  # rank 1's
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    statuses, said = runs(tmp_path, 4, *options, stop_in=3)
    assert statuses == [143] * 4, said
    assert f"trying the one before: it is damaged: {damaged.name} has another checksum" in said
    assert "resuming after step 2" in said
    assert (tmp_path / "run" / "checkpoints" / "step_000000003.damaged").is_dir()
    statuses, said = runs(tmp_path, 1, *options)
    assert statuses == [0], said
    one, other = (load_newest_checkpoint(tmp_path / name)["trainer"] for name in ("whole", "run"))
    for name, tensor in one["model"].items():
        torch.testing.assert_close(other["model"][name], tensor, rtol=0, atol=2e-5)
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(6))


# Damage and hostile files.


def rewritten(path: Path, name: str, data: bytes) -> None:
    """A file of the checkpoint with other content, and the manifest with it."""
    (path / name).write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(data), "sha256": sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


SHARD = "shard-00001-model-00001-of-00001.safetensors"


def cut(path: Path) -> None:
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:-1])


def flip(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[len(data) // 2] ^= 1
        (path / name).write_bytes(data)

    return change


def change_manifest(**values: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | values))

    return change


DAMAGE = {
    "a file cut off": (cut, f"{SHARD} has "),
    "a bit of the weights": (flip(SHARD), f"{SHARD} has another checksum"),
    "a bit of the rest": (flip("state.json"), "state.json has another checksum"),
    "a file gone": (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
    "half a manifest": (lambda path: (path / "manifest.json").write_text('{"format": 1,'), "its manifest.json is none"),
    "another's manifest": (change_manifest(step=1), "its manifest.json is that of step 1"),
    "a newer format": (change_manifest(format=2), "it has the format 2, and this version reads 1"),
    "files elsewhere": (change_manifest(files={"../x": {"size": 0, "sha256": ""}}), "its manifest.json is none"),
    "no files": (change_manifest(files={}), "its manifest.json is none"),
    "files that are none": (change_manifest(files=["state.json"]), "its manifest.json is none"),
    "a file too many": (lambda path: (path / "other.safetensors").touch(), "other.safetensors is none of its files"),
    "no safetensors": (lambda path: rewritten(path, SHARD, b"\0" * 100), f"{SHARD} is no file of safetensors"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(kind, tmp_path, caplog) -> None:
    damage, message = DAMAGE[kind]
    for step in (1, 2):
        save(tmp_path, step, {"x": torch.arange(100)}, 0, 1)
    damage(checkpoints(tmp_path)[-1])
    assert load_newest_checkpoint(tmp_path)["step"] == 1
    assert "step_000000002 cannot be read, trying the one before: " in caplog.text
    assert message in caplog.text


class Hostile:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def test_loading_runs_no_code_of_a_file(tmp_path, caplog) -> None:
    victim = tmp_path / "victim"
    attack = pickle.dumps(Hostile(victim))
    for step in range(1, 6):
        save(tmp_path, step, {"x": torch.arange(100)}, 0, 1)
    one, two, three = checkpoints(tmp_path)
    (one / ".metadata").write_bytes(attack)  # of PyTorch's own format, which it unpickles
    (one / "__0_0.distcp").write_bytes(attack)
    rewritten(two, SHARD, attack)
    rewritten(three, "state.json", attack)
    foreign = tmp_path / "checkpoints" / "step_000000007"
    foreign.mkdir()
    (foreign / ".metadata").write_bytes(attack)
    torch.save({"step": 8, "trainer": Hostile(victim)}, tmp_path / "checkpoints" / "step_000000008.pt")
    assert load_newest_checkpoint(tmp_path)["step"] == 3
    assert not victim.exists()
    for name in ("step_000000004", "step_000000005", "step_000000007", "step_000000008.pt"):
        assert f"{name} cannot be read, trying the one before: it" in caplog.text
    pickle.loads(attack)
    assert victim.exists(), "the attack is none"


# Saving while training goes on.


@pytest.fixture
def checkpoints_of(tmp_path) -> Checkpoints:
    trainer = Trainer(load_tiniest(tmp_path), World(0, 1, torch.device("cpu")))
    (tmp_path / "run").mkdir()

    run_dir = tmp_path / "run"
    start = Start(0, ImageStream(trainer.config), None, True)
    saves = Checkpoints(trainer, start, run_dir, Results(trainer, run_dir))
    saves.streams = [{"step": step, "cursors": {0: [1, 2], 1: [3, 4]}} for step in range(5)]
    return saves


def test_training_goes_on_while_a_checkpoint_is_written_of_the_state_as_it_was(
    checkpoints_of, tmp_path, monkeypatch
) -> None:
    go_on, original = Event(), saving.save_checkpoint
    monkeypatch.setattr(saving, "save_checkpoint", lambda *a, **k: (go_on.wait(LONG), original(*a, **k))[1])
    parameter = next(checkpoints_of.trainer.model.parameters())
    before = parameter.detach().clone()
    checkpoints_of.save(1)
    with torch.no_grad():
        parameter.add_(1)
    assert not (tmp_path / "run" / "checkpoints").exists()
    go_on.set()
    checkpoints_of.save(2)  # which waits for the first
    assert checkpoints(tmp_path / "run")[0].name == "step_000000001"
    checkpoints_of.finish()
    one, two = (load_checkpoint(path) for path in checkpoints(tmp_path / "run"))
    name = next(name for name, _ in checkpoints_of.trainer.model.named_parameters())
    assert torch.equal(one["trainer"]["model"][name], before)
    assert torch.equal(two["trainer"]["model"][name], before + 1)
    assert one["streams"] == [checkpoints_of.streams[1]], "keys that are numbers stay numbers"


def test_the_last_whole_step_is_saved_alone_behind_the_one_that_is_being_written(checkpoints_of, tmp_path) -> None:
    checkpoints_of.save(1)
    checkpoints_of.trainer.steps_done = 1
    checkpoints_of.save_alone()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_000000001"]
    checkpoints_of.trainer.steps_done = 2
    checkpoints_of.save_alone()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_000000001", "step_000000002"]


def test_a_rank_that_has_but_a_part_of_the_weights_saves_nothing_alone(
    checkpoints_of, tmp_path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(checkpoints_of.trainer, "sharded", True)
    checkpoints_of.trainer.steps_done = 2
    checkpoints_of.save_alone()
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert "step 2 is not saved: no rank by itself has all of its weights" in caplog.text


def test_a_step_that_all_ranks_failed_to_save_is_saved_alone(checkpoints_of, tmp_path, monkeypatch, caplog) -> None:
    def fail(*_, **__) -> None:
        raise OSError("step_000000001 could not be written: rank 1: gone")

    with monkeypatch.context() as patched:
        patched.setattr(saving, "save_checkpoint", fail)
        checkpoints_of.save(1)
        checkpoints_of.finish()
    assert "rank 1: gone; the newest checkpoint: none" in caplog.text
    checkpoints_of.trainer.steps_done = 1
    checkpoints_of.save_alone()
    assert load_newest_checkpoint(tmp_path / "run")["step"] == 1
