"""What a run finds in its folder when it starts, and what it goes on from."""

import os
import shutil
import signal
import tarfile
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from ranks import train_ranks
from tiny_runs import as_earlier_version, assert_equal_states, metrics_of, tiniest

from capi.checkpoint import checkpoints, load_newest_checkpoint
from capi.data import ImageStream
from capi.step import Trainer
from capi.train import main


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    return tiniest(tmp_path)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return tmp_path / "run"


def stopped_in_step(step: int, arguments: list[str]) -> None:
    """Trains until SIGTERM arrives in this step."""
    original = Trainer.step

    def with_signal(self, batches, number, *launched):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches, number, *launched)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "step", with_signal)
        assert main(arguments) == 128 + signal.SIGTERM


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> Path:
    """A run of six steps, and one stopped after two."""
    folder = tmp_path_factory.mktemp("templates")
    arguments = tiniest(folder)
    assert main([*arguments, "--run.output_dir", str(folder / "finished")]) == 0
    stopped_in_step(1, [*arguments, "--run.output_dir", str(folder / "stopped")])
    return folder


@pytest.fixture
def finished(templates, run_dir) -> None:
    shutil.copytree(templates / "finished", run_dir)


@pytest.fixture
def stopped(templates, run_dir) -> None:
    shutil.copytree(templates / "stopped", run_dir)


def steps_of(run_dir: Path) -> list[int]:
    return [int(path.stem.removeprefix("step_")) for path in checkpoints(run_dir)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(checkpoint: Path) -> None:
    """One bit, in the middle of the weights."""
    path = max(checkpoint.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove_checkpoints(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "encoder.safetensors").unlink()


# A folder in which an earlier run lies.


@pytest.mark.usefixtures("finished")
def test_a_fresh_run_moves_the_earlier_one_aside_whole(arguments, run_dir, tmp_path, caplog) -> None:
    (run_dir / "notes.txt").write_text("a good run")
    before = contents(run_dir)
    fresh = [*arguments, "--run.resume", "false", "--run.seed", "7"]
    assert main(fresh) == 0
    assert contents(tmp_path / "run.1") == before
    assert "notes.txt" not in contents(run_dir)
    assert len(list(run_dir.glob("events.out.tfevents.*"))) == 1
    assert f"moved the earlier run in {run_dir} to {tmp_path / 'run.1'}" in caplog.text
    before = contents(run_dir)
    assert main(fresh) == 0
    assert contents(tmp_path / "run.2") == before


@pytest.mark.usefixtures("finished")
def test_a_fresh_run_keeps_its_own_checkpoints_and_is_gone_on_with(arguments, run_dir, tmp_path) -> None:
    other_run = [*arguments, "--run.seed", "7", "--run.checkpoint_every", "1", "--run.keep_checkpoints", "2"]
    stopped_in_step(3, [*other_run, "--run.resume", "false"])
    assert steps_of(run_dir) == [3, 4]
    assert main(other_run) == 0
    assert main([*other_run, "--run.output_dir", str(tmp_path / "whole")]) == 0
    assert_equal_states(
        load_newest_checkpoint(run_dir)["trainer"], load_newest_checkpoint(tmp_path / "whole")["trainer"]
    )
    assert contents(run_dir)["encoder.safetensors"] == contents(tmp_path / "whole")["encoder.safetensors"]
    assert [line["step"] for line in metrics_of(run_dir)] == list(range(6))


def test_a_run_all_of_whose_checkpoints_are_damaged_starts_anew_beside_it(arguments, run_dir, tmp_path) -> None:
    assert main([*arguments, "--run.keep_checkpoints", "1"]) == 0
    damage(checkpoints(run_dir)[0])
    before = contents(run_dir)
    stopped_in_step(1, [*arguments, "--run.keep_checkpoints", "1"])
    assert steps_of(run_dir) == [2]
    assert contents(tmp_path / "run.1") == before


@pytest.mark.usefixtures("finished")
def test_checkpoints_that_cannot_be_read_for_another_reason_are_no_fresh_start(arguments, run_dir, capsys, monkeypatch):
    """As when the file system does not answer: a run that began anew would be nobody's wish."""

    def fail(*_, **__) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("capi.sharded_checkpoint.hashlib.file_digest", fail)
    before = contents(run_dir)
    assert main(arguments) == 1
    assert "error: [Errno 5] Input/output error" in capsys.readouterr().err
    assert contents(run_dir) == before


def test_a_damaged_newest_checkpoint_costs_no_later_one(arguments, run_dir, caplog) -> None:
    often = [*arguments, "--run.checkpoint_every", "1", "--run.keep_checkpoints", "2"]
    stopped_in_step(3, often)
    damage(checkpoints(run_dir)[-1])
    damaged = contents(checkpoints(run_dir)[-1])
    stopped_in_step(3, [*arguments, "--run.checkpoint_every", "5", "--run.keep_checkpoints", "1"])
    assert steps_of(run_dir) == [4]
    assert load_newest_checkpoint(run_dir) is not None
    assert contents(run_dir / "checkpoints" / "step_000000004.damaged") == damaged
    assert "step_000000004 cannot be read" in caplog.text


@pytest.mark.usefixtures("finished")
def test_a_fresh_run_that_diverges_is_told_of_no_other_runs_checkpoint(arguments, run_dir, capsys, monkeypatch) -> None:
    original = Trainer.step
    monkeypatch.setattr(
        Trainer,
        "step",
        lambda self, batches, *rest: original(self, [(images * float("nan"), m) for images, m in batches], *rest),
    )
    assert main([*arguments, "--run.resume", "false"]) == 1
    assert "last good checkpoint: none" in capsys.readouterr().err


@pytest.mark.usefixtures("finished")
@pytest.mark.parametrize("option", [["--data.source", "folder:/no/such/place"], ["--optim.batch_size", "0"]])
def test_a_run_that_cannot_start_moves_nothing(arguments, run_dir, option, tmp_path) -> None:
    before = contents(run_dir)
    assert main([*arguments, "--run.resume", "false", *option]) == 1
    assert contents(run_dir) == before
    assert not (tmp_path / "run.1").exists()


@pytest.mark.usefixtures("finished")
def test_a_run_killed_before_its_first_checkpoint_starts_again_in_its_folder(arguments, run_dir, tmp_path) -> None:
    remove_checkpoints(run_dir)
    assert main(arguments) == 0
    assert not (tmp_path / "run.1").exists()
    remove_checkpoints(run_dir)
    before = metrics_of(run_dir)
    assert main([*arguments, "--run.seed", "3"]) == 0
    assert metrics_of(tmp_path / "run.1") == before


def test_a_linked_run_folder_stays_a_link(arguments, run_dir, tmp_path) -> None:
    (tmp_path / "disk" / "run").mkdir(parents=True)
    run_dir.symlink_to(tmp_path / "disk" / "run")
    assert main(arguments) == 0
    assert main([*arguments, "--run.resume", "false"]) == 0
    assert run_dir.is_symlink()
    assert steps_of(tmp_path / "disk" / "run") == steps_of(tmp_path / "disk" / "run.1") == [3, 6]


@pytest.mark.usefixtures("finished")
def test_a_run_that_cannot_be_moved_aside_stays_and_a_line_says_so(arguments, run_dir, capsys, monkeypatch) -> None:
    before = contents(run_dir)
    capsys.readouterr()

    def busy(*_) -> None:
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", busy)
        assert main([*arguments, "--run.resume", "false"]) == 1
    assert "cannot be moved to" in capsys.readouterr().err
    monkeypatch.chdir(run_dir)
    assert main([*arguments, "--run.resume", "false"]) == 1
    assert "is the working directory" in capsys.readouterr().err
    assert contents(run_dir) == before


# What may have changed since.


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(
    ("option", "change"),
    [
        (["--run.seed", "1"], "run.seed (0 -> 1)"),
        (["--run.precision", "bf16"], "run.precision (fp32 -> bf16)"),
        (["--optim.lr.base", "0.002"], "optim.lr.base (0.001 -> 0.002)"),
        (["--optim.steps", "12"], "optim.steps (6 -> 12)"),
        (["--optim.clustering_betas", "[0.5, 0.6]"], "optim.clustering_betas (null -> [0.5, 0.6])"),
        (["--data.shuffle_buffer", "5"], "data.shuffle_buffer (10000 -> 5)"),
    ],
)
def test_a_change_is_refused_with_its_values_until_it_is_allowed(
    arguments, run_dir, option, change, capsys, caplog
) -> None:
    name = change.partition(" ")[0]
    capsys.readouterr()
    assert main([*arguments, *option]) == 1
    message = capsys.readouterr().err
    assert f"holds a run with other values of {change};" in message
    assert f"--run.allow_changes '[{name}]'" in message
    assert message.count("\n") == 1
    assert not (run_dir / "changes.yaml").exists()
    assert main([*arguments, *option, "--run.allow_changes", f"[{name}]"]) == 0
    assert f"going on after step 2 with other values of {change}, as allowed" in caplog.text
    (entry,) = yaml.safe_load((run_dir / "changes.yaml").read_text())
    assert entry["step"] == 2
    assert list(entry["changes"]) == [name]
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["run"]["allow_changes"] == [name]
    assert main([*arguments, *option]) == 0, "the new values are the run's own by now"


@pytest.mark.usefixtures("stopped")
def test_all_changes_are_named_at_once_and_a_group_may_be_allowed(arguments, capsys) -> None:
    options = ["--optim.lr.base", "0.002", "--optim.lr.final", "0.0001", "--optim.weight_decay", "0"]
    assert main([*arguments, *options, "--run.allow_changes", "[optim.weight_decay]"]) == 1
    message = capsys.readouterr().err
    assert "optim.lr.base (0.001 -> 0.002), optim.lr.final (0.0 -> 0.0001);" in message
    assert "'[optim.weight_decay, optim.lr.base, optim.lr.final]'" in message
    assert main([*arguments, *options, "--run.allow_changes", "[optim.weight_decay, optim.lr]"]) == 0


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize("earlier", [False, True])
def test_allowed_changes_of_the_optimiser_take_effect(arguments, run_dir, earlier, monkeypatch) -> None:
    """The optimiser in a file of an earlier version brings the settings that it was saved with."""
    if earlier:
        as_earlier_version(run_dir)
    groups, step = [], Trainer.step

    def look(self, *rest):
        groups.extend(self.optimizers[0].param_groups)
        return step(self, *rest)

    monkeypatch.setattr(Trainer, "step", look)
    options = ["--optim.weight_decay", "0.7", "--optim.betas", "[0.5, 0.6]"]
    assert main([*arguments, *options, "--run.allow_changes", "[optim]"]) == 0
    assert {group["betas"] for group in groups} == {(0.5, 0.6)}
    assert max(group["weight_decay"] for group in groups) == 0.7


def test_what_changes_no_result_needs_no_permission(arguments, run_dir, caplog) -> None:
    caplog.set_level("INFO")
    stopped_in_step(1, arguments)
    free = ["--run.log_every", "2", "--run.checkpoint_every", "1", "--run.precision", "fp32", "--data.num_workers", "1"]
    assert main([*arguments, *free, "--run.micro_batch_size", "4"]) == 0
    assert "run.log_every (1 -> 2), run.micro_batch_size (null -> 4)" in caplog.text
    assert not (run_dir / "changes.yaml").exists()


@pytest.mark.usefixtures("stopped")
def test_a_field_that_an_upgrade_brought_is_no_change_at_its_default(arguments, run_dir, capsys) -> None:
    path = as_earlier_version(run_dir)
    state = torch.load(path, weights_only=True)
    del state["config"]["masking"]["roll"], state["config"]["run"]["allow_changes"], state["data_fingerprint"]
    state["config"]["run"]["precision"] = "auto"
    torch.save(state, path)
    assert main([*arguments, "--masking.roll", "false"]) == 1
    assert "masking.roll (true -> false)" in capsys.readouterr().err
    assert main(arguments) == 0


@pytest.mark.parametrize("entry", ["optim.stepz", "steps", "optim.step"])
def test_a_permission_for_no_field_is_refused(arguments, entry, capsys) -> None:
    assert main([*arguments, "--run.allow_changes", f"[{entry}]"]) == 1
    assert f"run.allow_changes must name fields such as optim.steps, got {entry}" in capsys.readouterr().err


@pytest.mark.usefixtures("stopped")
def test_another_model_cannot_be_allowed(arguments, capsys) -> None:
    assert main([*arguments, "--model.embed_dim", "32", "--run.allow_changes", "[model.embed_dim]"]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: the checkpoint of step 2 does not fit this model: ")
    assert len(message) < 400


# The images of a resumed run.


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "job1" / "pictures"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def test_a_path_may_be_written_in_other_ways(arguments, pictures, monkeypatch) -> None:
    stopped_in_step(1, [*arguments, "--data.source", f"folder:{pictures}"])
    stopped_in_step(3, [*arguments, "--data.source", f"folder:{pictures}/"])
    monkeypatch.chdir(pictures.parent)
    assert main([*arguments, "--data.source", "folder:pictures"]) == 0


def test_the_same_images_elsewhere_are_gone_on_with(arguments, run_dir, pictures, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    stopped_in_step(1, [*arguments, "--data.source", f"folder:{pictures}"])
    moved = tmp_path / "job2"
    pictures.rename(moved)
    assert main([*arguments, "--data.source", f"folder:{moved}"]) == 0
    assert f"data.source folder:{moved} holds the images that were in folder:{pictures}" in caplog.text
    moved.rename(pictures)
    assert main([*arguments, "--data.source", f"folder:{pictures}"]) == 0, "it is finished, and they are the same"
    assert not (run_dir / "changes.yaml").exists()


def test_a_source_that_is_not_known_to_be_the_same_needs_permission(
    arguments, pictures, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(ImageStream, "fingerprint", None)
    stopped_in_step(1, [*arguments, "--data.source", f"folder:{pictures}"])
    pictures.rename(tmp_path / "job2")
    moved = [*arguments, "--data.source", f"folder:{tmp_path / 'job2'}"]
    assert main(moved) == 1
    assert f"data.source (folder:{pictures} -> folder:{tmp_path / 'job2'})" in capsys.readouterr().err
    assert main([*moved, "--run.allow_changes", "[data.source]"]) == 0


def test_other_images_under_the_same_path_are_refused_until_allowed(
    arguments, run_dir, pictures, capsys, caplog
) -> None:
    arguments = [*arguments, "--data.source", f"folder:{pictures}"]
    stopped_in_step(1, arguments)
    (pictures / "000.png").write_bytes((pictures / "00.png").read_bytes())
    assert main(arguments) == 1
    message = capsys.readouterr().err
    source = f"folder:{pictures}"
    assert f"data.source ({source} as it was -> {source} with other images)" in message
    assert main([*arguments, "--run.allow_changes", "[data.source]"]) == 0
    assert "images of the epoch that was broken off may come twice or not at all" in caplog.text
    (entry,) = yaml.safe_load((run_dir / "changes.yaml").read_text())
    assert "data.source" in entry["changes"]
    assert main(arguments) == 0


def test_a_stream_goes_on_in_shards_that_moved_and_starts_again_in_others(
    arguments, run_dir, pictures, tmp_path, caplog
) -> None:
    pytest.importorskip("braceexpand")
    (tmp_path / "a").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "a" / f"{shard}.tar", "w") as archive:
            for path in sorted(pictures.glob(f"*{shard}.png")) + sorted(pictures.glob(f"*{shard + 2}.png")):
                archive.add(path, path.name)
    arguments = [*arguments, "--data.shuffle_buffer", "3"]
    whole = [*arguments, "--run.output_dir", str(tmp_path / "whole"), "--data.source", f"wds:{tmp_path / 'a'}/*.tar"]
    assert main(whole) == 0
    stopped_in_step(1, [*arguments, "--data.source", f"wds:{tmp_path / 'a'}/*.tar"])
    (tmp_path / "a").rename(tmp_path / "b")
    moved = [*arguments, "--data.source", f"wds:{tmp_path / 'b'}/*.tar"]
    stopped_in_step(3, moved)
    (tmp_path / "b" / "2.tar").write_bytes((tmp_path / "b" / "0.tar").read_bytes())
    caplog.clear()
    assert main([*moved, "--run.allow_changes", "[data.source]"]) == 0
    assert "so it cannot go on from there: epoch" in caplog.text
    one, other = (load_newest_checkpoint(folder) for folder in (tmp_path / "whole", run_dir))
    assert [line["loss"] for line in metrics_of(run_dir)][:4] == [
        line["loss"] for line in metrics_of(tmp_path / "whole")
    ][:4]
    assert one["streams"] != other["streams"]


# Memory.


@pytest.mark.usefixtures("stopped")
def test_a_resumed_run_keeps_nothing_of_the_file_of_an_earlier_version(arguments, run_dir, monkeypatch) -> None:
    as_earlier_version(run_dir)
    loaded, kept = [], []
    load, step = torch.load, Trainer.step

    def remember(*args, **options) -> dict:
        state = load(*args, **options)
        loaded.extend(weakref.ref(tensor.untyped_storage()) for tensor in state["trainer"]["model"].values())
        loaded.extend(
            weakref.ref(tensor)
            for tensors in state["trainer"]["student_optimizer"]["state"].values()
            for tensor in tensors.values()
        )
        return state

    def look(*args):
        kept.append(sum(reference() is not None for reference in loaded))
        kept.append("step_000000002.pt" in Path("/proc/self/maps").read_text())
        return step(*args)

    monkeypatch.setattr(torch, "load", remember)
    monkeypatch.setattr(Trainer, "step", look)
    assert main(arguments) == 0
    assert loaded
    assert kept == [0, False] * 4


@pytest.mark.usefixtures("stopped")
def test_a_resumed_run_has_no_file_of_the_checkpoint_open(arguments, monkeypatch) -> None:
    maps, step = [], Trainer.step

    def look(*args):
        maps.append(Path("/proc/self/maps").read_text())
        return step(*args)

    monkeypatch.setattr(Trainer, "step", look)
    assert main(arguments) == 0
    assert len(maps) == 4
    assert not any("step_000000002" in text for text in maps)


# Files of earlier versions.


@pytest.mark.usefixtures("stopped")
def test_a_checkpoint_of_an_earlier_version_is_gone_on_with_bit_for_bit(arguments, run_dir, tmp_path) -> None:
    assert as_earlier_version(run_dir).name == "step_000000002.pt"
    assert main([*arguments, "--run.keep_checkpoints", "1"]) == 0
    assert [path.name for path in checkpoints(run_dir)] == ["step_000000006"]
    assert main([*arguments, "--run.output_dir", str(tmp_path / "whole")]) == 0
    assert_equal_states(*(load_newest_checkpoint(tmp_path / name)["trainer"] for name in ("run", "whole")))


@pytest.mark.usefixtures("stopped")
def test_a_damaged_checkpoint_of_an_earlier_version_gives_way(arguments, run_dir, caplog) -> None:
    path = as_earlier_version(run_dir)
    path.with_name("step_000000005.pt").write_bytes(path.read_bytes()[:500])
    assert main(arguments) == 0
    assert "step_000000005.pt cannot be read, trying the one before: it is damaged" in caplog.text
    assert path.with_name("step_000000005.pt.damaged").is_file()


# Several processes.


def test_all_ranks_go_on_from_what_lies_on_rank_0s_disk(arguments, run_dir, tmp_path) -> None:
    """A run folder on each node's own disk; on that of rank 1 lies another run, with a checkpoint of more steps."""
    options = ["--model.drop_path_rate", "0", "--masking.mask_ratio", "0.6"]
    whole = [*arguments, *options, "--run.output_dir", str(tmp_path / "whole")]
    assert main(whole) == 0
    for rank in (0, 1):
        (tmp_path / f"node{rank}").mkdir()
    stopped_in_step(2, [*arguments, *options, "--run.output_dir", str(tmp_path / "node0" / "run")])
    other = ["--run.seed", "5", "--run.output_dir", str(tmp_path / "node1" / "run")]
    stopped_in_step(3, [*arguments, *options, *other])
    before = contents(tmp_path / "node1" / "run")
    local = [*arguments, *options, "--run.output_dir", "run"]
    for status, errors in train_ranks(tmp_path, [local, local]):
        assert status == 0, errors
    assert contents(tmp_path / "node1" / "run") == before
    one, two = (load_newest_checkpoint(folder) for folder in (tmp_path / "whole", tmp_path / "node0" / "run"))
    for name, tensor in one["trainer"]["model"].items():
        torch.testing.assert_close(two["trainer"]["model"][name], tensor, rtol=0, atol=2e-5)
    assert [line["step"] for line in metrics_of(tmp_path / "node0" / "run")] == list(range(6))
    for a, b in zip(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "node0" / "run"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_ranks_that_were_started_differently_end_with_one_line(arguments, tmp_path) -> None:
    started = [arguments, [*arguments, "--optim.steps", "7"]]
    (status, errors), (other_status, other_errors) = train_ranks(tmp_path, started)
    assert status == other_status == 1
    expected = "error: rank 1 was started with optim.steps 7, not 6 as rank 0; expected the same on all ranks"
    assert expected.removeprefix("error: ") in errors
    assert "Traceback" not in errors + other_errors
    assert "error" not in other_errors
