"""Weights & Biases offline and MLflow in a folder, by the packages themselves; nothing leaves the machine."""

import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from tiny_runs import load_tiniest, metrics_of, tiniest

from capi import loggers
from capi.loggers import Logger, import_loggers, start_loggers
from capi.metrics import MetricsWriter
from capi.train import main


def write_lines(config, run_dir: Path, steps: range, resume_step: int = 0, entry: dict | None = None) -> None:
    run_dir.mkdir(exist_ok=True)
    started = start_loggers(config, run_dir, entry or {"commit": "c0ffee", "packages": {"torch": "2"}})
    with closing(MetricsWriter(run_dir, resume_step, started)) as writer:
        for step in steps:
            writer.write(step, {"loss": step / 4, "time": time.time()})


def quietly(monkeypatch, **environment: str) -> None:
    for name, value in (loggers._ENVIRONMENT | environment).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def mlflow(monkeypatch, tmp_path):
    quietly(
        monkeypatch,
        MLFLOW_TRACKING_URI=f"file:{tmp_path}/store",
        MLFLOW_EXPERIMENT_NAME="of the team",
        MLFLOW_ALLOW_FILE_STORE="true",
        GIT_PYTHON_REFRESH="quiet",
    )
    return pytest.importorskip("mlflow")


def history(mlflow, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in mlflow.MlflowClient().get_metric_history(run_id, key)]


def test_mlflow_has_the_lines_the_configuration_and_the_origin_and_goes_on(tmp_path, mlflow, caplog) -> None:
    config, run_dir = load_tiniest(tmp_path, "--run.loggers", "[mlflow]"), tmp_path / "run"
    write_lines(config, run_dir, range(0, 40, 10))
    config.optim.steps = 12
    # From the checkpoint after step 20, whose later lines come again.
    write_lines(config, run_dir, range(20, 60, 10), 20, {"commit": "decaf"})
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.run_id == (run_dir / "mlflow_run_id").read_text().strip()
    assert run.info.status == "FINISHED"
    assert mlflow.get_experiment(run.info.experiment_id).name == "of the team"
    assert history(mlflow, run.info.run_id, "loss") == [(line["step"], line["loss"]) for line in metrics_of(run_dir)]
    assert run.data.params["model.embed_dim"] == "16"
    assert run.data.params["optim.steps"] == "6"
    assert (run.data.tags["capi.commit"], run.data.tags["capi.packages.torch"]) == ("decaf", "2")
    assert not caplog.records


def test_a_run_that_mlflow_has_lost_starts_anew_there(tmp_path, mlflow, monkeypatch, caplog) -> None:
    config, run_dir = load_tiniest(tmp_path, "--run.loggers", "[mlflow]"), tmp_path / "run"
    write_lines(config, run_dir, range(1))
    first = (run_dir / "mlflow_run_id").read_text()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/elsewhere")
    write_lines(config, run_dir, range(1, 2), 1)
    run_id = (run_dir / "mlflow_run_id").read_text()
    assert run_id != first
    assert history(mlflow, run_id.strip(), "loss") == [(1, 0.25)]
    assert "it starts anew" in caplog.text


def test_a_training_without_its_store_goes_on(tmp_path, mlflow, monkeypatch, caplog) -> None:
    """And one with it has there what it has in metrics.jsonl."""
    (tmp_path / "store").write_text("no folder")
    arguments = [*tiniest(tmp_path), "--run.loggers", "[mlflow]", "--optim.steps", "2"]
    assert main(arguments) == 0
    assert caplog.text.count("mlflow: the run goes on without it") == 1
    (tmp_path / "store").unlink()
    assert main([*arguments, "--run.resume", "false"]) == 0
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    for key in ("loss", "lr", "images_per_second"):
        lines = metrics_of(tmp_path / "run")
        assert history(mlflow, run.info.run_id, key) == [(line["step"], line[key]) for line in lines]
    (entry,) = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run.data.tags["capi.command"] == entry["command"]


def test_a_run_that_breaks_off_is_failed_there(tmp_path, mlflow) -> None:
    config = load_tiniest(tmp_path, "--run.loggers", "[mlflow]")
    writer = MetricsWriter(tmp_path, 0, start_loggers(config, tmp_path, {}))
    with pytest.raises(RuntimeError), closing(writer):
        raise RuntimeError("diverged")
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.status == "FAILED"


def wandb_records(run_dir: Path) -> list:
    """What offline runs wrote: blocks of 32 KiB, in them parts of records behind checksum, length and place."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        data, at, parts = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
            length, place = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            parts += data[at + 7 : at + 7 + length]
            at += 7 + length
            if place in (1, 4):  # whole, or the last part
                found.append(pb.Record.FromString(parts))
                parts = b""
    return found


def test_wandb_has_the_lines_the_configuration_and_the_origin_and_goes_on(tmp_path, monkeypatch, caplog) -> None:
    quietly(monkeypatch, WANDB_MODE="offline", WANDB_SILENT="true", WANDB_PROJECT="of the team")
    wandb = pytest.importorskip("wandb")
    config, run_dir = load_tiniest(tmp_path, "--run.loggers", "[wandb]"), tmp_path / "run"
    write_lines(config, run_dir, range(0, 30, 10))
    write_lines(config, run_dir, range(30, 50, 10), 30)
    wandb.teardown()
    records = wandb_records(run_dir)
    runs = [record.run for record in records if record.HasField("run")]
    assert {run.run_id for run in runs} == {(run_dir / "wandb_run_id").read_text().strip()}
    assert {run.project for run in runs} == {"of the team"}
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(row["_step"], row["loss"]) for row in rows] == [(n["step"], n["loss"]) for n in metrics_of(run_dir)]
    updates = [item for record in records for item in record.config.update]
    values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in updates}
    assert values["model"]["embed_dim"] == 16
    assert values["provenance"]["commit"] == "c0ffee"
    assert not caplog.records


def sink_of(write, *, opens=lambda: None):
    @contextmanager
    def sink(*_) -> Iterator:
        opens()
        yield write

    return sink


def test_a_network_that_hangs_holds_nothing_up(monkeypatch, caplog) -> None:
    monkeypatch.setattr(loggers, "SECONDS_TO_END", 0.1)
    monkeypatch.setattr(loggers, "MOST_LINES", 5)
    released = threading.Event()
    logger = Logger("wandb", sink_of(lambda *_: None, opens=lambda: released.wait(20)), Path(), {}, {})
    began = time.monotonic()
    for step in range(1000):
        logger.log(step, {"loss": 0.0})
    logger.close(failed=False)
    assert time.monotonic() - began < 5
    released.set()
    assert [record.getMessage() for record in caplog.records] == [
        "wandb: 5 lines wait already; those from step 5 on are lost",
        "wandb: left with 5 lines not written",
    ]


def test_lines_that_are_refused_are_lost_with_a_line_in_the_log(caplog) -> None:
    written = []

    def write(step: int, values) -> None:
        if 10 <= step < 20:
            raise OSError("no space\nleft")
        written.append(step)

    logger = Logger("mlflow", sink_of(write), Path(), {}, {})
    for step in range(30):
        logger.log(step, {"loss": math.nan})
    logger.close(failed=False)
    assert written == [*range(10), *range(20, 30)]
    assert [record.getMessage() for record in caplog.records] == [
        "mlflow: lines from step 10 on are lost: OSError: no space left",
        "mlflow: lines from step 20 on are written again",
    ]


@pytest.mark.parametrize("there", ["nothing", "a folder of that name"])
def test_a_missing_package_is_named_with_its_extra(there, tmp_path, monkeypatch, capsys) -> None:
    """A folder is there where wandb ran before."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    if there == "nothing":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        (tmp_path / "wandb").mkdir()
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        sys.path_importer_cache.clear()
    with pytest.raises(ImportError, match=r"run.loggers names wandb, but .*; expected pip install '.\[wandb\]'"):
        import_loggers(["wandb"])
    if there == "nothing":
        assert main([*tiniest(tmp_path), "--run.loggers", "[wandb]"]) == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "run").exists()
    sys.modules.pop("wandb", None)


def test_no_credential_leaves_with_the_configuration(tmp_path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(loggers, "_wandb", lambda run_dir, config, provenance: seen.append(config) or sink_of(print)())
    source = "wds:https://user:password@host/{000..100}.tar?signature=secret"
    config = load_tiniest(tmp_path, "--run.loggers", "[wandb]", "--data.source", source)
    for started in start_loggers(config, tmp_path, {}):
        started.close(failed=False)
    assert seen[0]["data"]["source"] == "wds:https://host/{000..100}.tar?..."
