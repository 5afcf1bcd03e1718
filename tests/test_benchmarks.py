"""The benchmarks' own parts: counts, peers, the clock, the race, and the report of raw files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_as_accurate

pytest.importorskip("pytest_benchmark")

from benchmarks import costs, measure, official_model, peers, report
from benchmarks.attention import AttentionCase
from benchmarks.heads import HeadCase, enter_sinkhorn, enter_student_loss
from benchmarks.measure import OURS, Contestant, Measurement, Unavailable, race
from benchmarks.official_step import OfficialStep, cast_parameters
from benchmarks.shapes import Logits
from benchmarks.train_step import configuration, draw_batch, our_step
from capi.distributed import World
from capi.step import Trainer

CPU = torch.device("cpu")
peers_rotate = peers._rotate
H200 = costs.Ceilings(4300.0, 790.0)


# The figures of the floors: bytes, FLOP and microseconds on one H200, batch 512, 16 heads of 64, bf16.
@pytest.mark.parametrize(
    ("queries", "keys", "direction", "megabytes", "gigaflop", "microseconds"),
    [
        (106, 106, "forward", 448, 23.6, 104),
        (106, 106, "backward", 782, 58.9, 182),
        (272, 272, "forward", 1150, 155, 267),
        (8, 106, "forward", 239, None, 56),
        (8, 106, "backward", 470, None, 109),
        (166, 106, "forward", None, None, 133),
        (166, 106, "backward", None, None, 225),
    ],
)
def test_attention_moves_and_computes_what_the_shapes_say(
    queries: int,
    keys: int,
    direction: str,
    megabytes: float | None,
    gigaflop: float | None,
    microseconds: float,
) -> None:
    cost = costs.attention(512, queries, keys, 16, 64, 2, direction)
    if megabytes is not None:
        assert cost.bytes / 1e6 == pytest.approx(megabytes, rel=0.002)
    if gigaflop is not None:
        assert cost.flop / 1e9 == pytest.approx(gigaflop, rel=0.005)
    assert cost.floor_seconds(H200) * 1e6 == pytest.approx(microseconds, rel=0.01)


def test_the_head_moves_ten_bytes_an_element_and_its_products_take_longer() -> None:
    """Three reads, then a row pass that reads and writes: 10.1 bytes with what else is small."""
    cost = costs.clustering_head(256, 512, 16384, 3, 1024, 2)
    assert cost.bytes / 2**31 == pytest.approx(10.1, abs=0.1)
    assert cost.bytes / (0.9 * 4.8e12) == pytest.approx(5.0e-3, rel=0.01)
    assert cost.flop == 2 * 2 * 256 * 512 * 1024 * 16384
    assert cost.floor_seconds(H200) == pytest.approx(cost.flop / 790e12)
    assert costs.sinkhorn_positionwise(256, 512, 16384, 3, 2).bytes == cost.bytes


def test_a_floor_is_the_longer_of_the_two_times() -> None:
    ceilings = costs.Ceilings(1000.0, 1.0)
    assert costs.Cost(10**12, 10**11).floor_seconds(ceilings) == 1.0
    assert costs.Cost(10**11, 3 * 10**12).floor_seconds(ceilings) == 3.0
    assert costs.Cost(None, 3 * 10**12).floor_seconds(ceilings) == 3.0
    assert costs.Cost(None, None).floor_seconds(ceilings) is None
    assert costs.Cost(10**12, 10**11).floor_seconds(None) is None


@pytest.mark.parametrize("name", [OURS, "sdpa"])
@pytest.mark.parametrize("queries", [None, 3])
def test_attention_entrants_compute_the_definition(name: str, queries: int | None) -> None:
    """Entering checks output and gradients; both directions then run."""
    case = AttentionCase(5, queries, 29, 2, 8, CPU, torch.float32)
    for direction in ("forward", "backward"):
        contestant = case.enter(name, direction)
        contestant.run(*contestant.arguments(0))


@pytest.mark.parametrize("queries", [None, 3])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_definition(queries: int | None) -> None:
    """Forward only: on a CPU it has no gradient."""
    case = AttentionCase(5, queries, 29, 2, 8, CPU, torch.float32)
    q, k, v, _, *tables = case.inputs()[0]
    same_dtype, oracle = case.references()
    assert_as_accurate(case.implementation("flex_attention")(q, k, v, *tables), same_dtype[0], oracle[0])


@pytest.mark.parametrize(
    "wrong",
    [lambda q, k, *tables: (q, k), lambda q, k, *tables: peers_rotate(q, 2 * k - k.detach(), *tables)],
    ids=["no rotary embedding", "twice the gradient of k"],
)
def test_a_wrong_peer_does_not_enter(monkeypatch: pytest.MonkeyPatch, wrong: Callable) -> None:
    case = AttentionCase(2, None, 7, 2, 8, CPU, torch.float32)
    monkeypatch.setattr(peers, "_rotate", wrong)
    with pytest.raises(AssertionError, match="above the budget"):
        case.enter("sdpa", "forward")


@pytest.mark.parametrize("keys", [8, 9])
def test_the_document_mask_visits_the_blocks_that_hold_pairs_of_one_image(keys: int) -> None:
    mask = peers.document_mask(peers.Layout(images=7, queries=5, keys=keys, device=CPU), block=16)
    image_of_query, image_of_key = (np.arange(7).repeat(n) for n in (5, keys))
    pairs = np.zeros((48, 64), dtype=bool)
    pairs[:35, : 7 * keys] = image_of_query[:, None] == image_of_key
    expected = pairs.reshape(3, 16, 4, 16).any(axis=(1, 3))
    assert (mask.to_dense()[0, 0].bool().numpy() == expected).all()
    assert mask.mask_mod(0, 0, torch.tensor(34), torch.tensor(7 * keys - 1))
    assert not mask.mask_mod(0, 0, torch.tensor(34), torch.tensor(6 * keys - 1))


def test_peers_that_need_a_gpu_say_so() -> None:
    layout = peers.Layout(2, 3, 3, CPU)
    for name in ("varlen_attn", "xformers"):
        with pytest.raises(Unavailable, match=r"GPU only|not installed|has no"):
            peers.attention(name, layout)


@pytest.mark.parametrize("name", [OURS, "official_eager"])
def test_head_entrants_compute_the_definition(name: str) -> None:
    shape = Logits(3, 5, 40, 3, 8)
    enters = (
        lambda: enter_sinkhorn(name, shape, CPU, torch.float32),
        lambda: HeadCase(shape, CPU, torch.float32).enter(name),
        lambda: enter_student_loss(name, shape, CPU, torch.float32),
    )
    for enter in enters:
        contestant = enter()
        contestant.run(*contestant.arguments(0))


def test_the_official_head_gives_our_targets() -> None:
    case = HeadCase(Logits(3, 5, 40, 3, 8), CPU, torch.float32)
    ours, theirs = (case.enter(name) for name in (OURS, "official_eager"))
    torch.testing.assert_close(ours.run(*ours.arguments(0))[0], theirs.run(*theirs.arguments(0))[0])


def test_the_official_step_is_ours() -> None:
    """The same losses for three steps, so the same updates: restated, or with CAPI_OFFICIAL the code itself."""
    options = ["--model.drop_path_rate", "0", "--masking.prediction_subsampling", "0.3"]
    config = configuration("tiny", 6, CPU, torch.float32, *options)
    config.model.embed_dim, config.model.n_registers = 32, 8
    trainer = Trainer(config, World(0, 1, CPU))
    official = OfficialStep(config, trainer.model.state_dict(), CPU, torch.float32, compiled=False)
    for step in range(100, 103):
        images, masks = draw_batch(config, step, CPU)
        ours = our_step(trainer, images, masks, step)
        theirs = official(official.prepare(images), masks, step)
        for our_loss, their_loss in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our_loss.double(), their_loss.double(), rtol=1e-5, atol=0)


def test_the_restated_step_groups_parameters_as_ours() -> None:
    config = configuration("tiny", 6, CPU, torch.float32)
    model, trainer = official_model.build_model(config), Trainer(config, World(0, 1, CPU))

    def multipliers(student: torch.nn.Module, groups: list[dict], decay: str) -> dict[str, tuple[float, float]]:
        names = {parameter: name for name, parameter in student.named_parameters()}
        return {names[x]: (group["lr_multiplier"], group[decay]) for group in groups for x in group["params"]}

    ours = multipliers(trainer.model.student, trainer.optimizers[0].param_groups, "weight_decay")
    ours = {name: (lr, pytest.approx(decay / config.optim.weight_decay)) for name, (lr, decay) in ours.items()}
    theirs = multipliers(model["student"], official_model.parameter_groups(model["student"], config), "wd_multiplier")
    assert {lr for name, (lr, _) in theirs.items() if "rope" in name} == {0.0}
    assert {name: x for name, x in theirs.items() if "rope" not in name} == ours


def test_cast_parameters_compute_in_another_type_and_keep_their_own() -> None:
    layer = torch.nn.Linear(3, 2)
    weight = layer.weight
    cast_parameters(layer, torch.bfloat16)
    out = layer(torch.ones(1, 3, dtype=torch.bfloat16))
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert weight.dtype == weight.grad.dtype == torch.float32


def test_a_race_alternates_and_leaves_out_what_cannot_run() -> None:
    calls = []

    def entrant(name: str) -> Contestant:
        if name == "absent":
            raise Unavailable("not installed")
        return Contestant(calls.append, lambda round_number: ((name, round_number),))

    names = ("ours", "absent", "peer")
    results = race({name: lambda name=name: entrant(name) for name in names}, CPU, 4, 60)
    assert str(results["absent"]) == "not installed"
    assert [len(results[name].seconds) for name in ("ours", "peer")] == [4, 4]
    timed = [(name, i) for i in range(4) for name in ("ours", "peer")]
    assert calls == [("ours", 0), ("peer", 0), *timed]  # First for the memory.


def test_a_race_ends_early_but_not_before_three_rounds() -> None:
    results = race({"ours": lambda: Contestant(lambda: None)}, CPU, 9, 0.0)
    assert len(results["ours"].seconds) == 3


def test_a_race_measures_the_peak_of_a_call() -> None:
    results = race({"ours": lambda: Contestant(lambda: torch.zeros(1000).sum())}, CPU, 3, 60)
    assert 4000 <= results["ours"].peak_memory_bytes < 4200


@pytest.mark.parametrize("name", ["ours", "peer"])
def test_nothing_fails_quietly_on_a_cpu(name: str) -> None:
    def fail() -> Contestant:
        raise AssertionError("wrong result")

    with pytest.raises(AssertionError, match="wrong result"):
        race({name: fail}, CPU, 3, 60)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for a GPU whose every timed call takes 8 ms, and notes what it is asked."""
    asked: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            asked.append("record")

        def synchronize(self) -> None:
            asked.append("synchronize event")

        def elapsed_time(self, end: "Event") -> float:
            return 8.0

    for name in ("synchronize", "_sleep", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: asked.append(name))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 350)
    return asked


def test_a_gpu_is_timed_by_its_events(gpu: list[str]) -> None:
    contestant = Contestant(lambda: gpu.append("run"))
    assert measure.seconds_of(contestant, 0, torch.device("cuda")) == 8e-3
    assert gpu == ["synchronize", "_sleep", "record", "run", "record", "synchronize event"]
    gpu.clear()
    assert measure.seconds_of(Contestant(lambda: gpu.append("run"), calls=4), 0, torch.device("cuda")) == 2e-3
    assert gpu == ["synchronize", "record", "run", "record", "synchronize event"]


@pytest.mark.parametrize("one_at_a_time", [False, True])
@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_a_peer_that_fails_is_left_out_and_we_are_not(one_at_a_time: bool) -> None:
    def fail(*_: object) -> Contestant:
        raise RuntimeError("no kernel image\nfor this device")

    def race_of(ours: Contestant | None) -> dict:
        entrants = {
            "enters": fail,
            "runs": lambda: Contestant(fail),
            "ours": fail if ours is None else lambda: ours,
            "peer": lambda: Contestant(lambda: None),
        }
        return race(entrants, torch.device("cuda"), 3, 60, one_at_a_time)

    results = race_of(Contestant(lambda: None))
    assert str(results["enters"]) == str(results["runs"]) == "RuntimeError: no kernel image"
    assert results["ours"] == results["peer"] == Measurement([8e-3] * 3, 250)
    with pytest.raises(RuntimeError, match="no kernel image"):
        race_of(None)


def test_inputs_rotate_past_the_cache_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = type("Properties", (), {"L2_cache_size": 1000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    for numbers, copies in ((25, 16), (100, 6), (500, 2), (600, 1)):
        inputs = measure.rotated(
            lambda seed, numbers=numbers: (torch.full((numbers,), float(seed)),), torch.device("cuda")
        )
        expected = [[i] * numbers for i in range(copies)]
        assert [x.tolist() for (x,) in inputs] == expected
    assert len(measure.rotated(lambda seed: (torch.zeros(1),), CPU)) == 1


def test_the_deadline_leaves_out_what_needs_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPI_BENCH_SECONDS", "100")
    deadline = measure.Deadline()
    deadline.check(50)
    with pytest.raises(Unavailable, match="it needs 200"):
        deadline.check(200)
    monkeypatch.delenv("CAPI_BENCH_SECONDS")
    measure.Deadline().check(1e9)


def test_ceilings_are_measured_in_the_units_they_are_named_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "seconds_of", lambda *_: 1e-3)
    ceilings = measure.measure_ceilings(CPU, copied_bytes=10**6, matmul_size=100)
    assert ceilings == costs.Ceilings(2.0, 2e-3)


# The report, from raw files made up here.


def entry(implementation: str, seconds: float, op: str = "visible_attention", **more: object) -> dict:
    shape = {"images": 512, "tokens": 106, "heads": 16, "head_dim": 64}
    cost, ceilings = costs.attention(512, 106, 106, 16, 64, 2, "forward"), more.pop("ceilings", H200._asdict())
    floor = None if ceilings is None else cost.floor_seconds(H200)
    extra = {
        "op": op,
        "shape": shape,
        "direction": "forward",
        "implementation": implementation,
        "dtype": "bfloat16",
        "bytes": cost.bytes,
        "flop": cost.flop,
        "floor_seconds": floor,
        "share_of_floor": None if floor is None else floor / seconds,
        "peak_memory_bytes": 3 * 2**20,
        "ceilings": ceilings,
        **more,
    }
    return {"extra_info": extra, "stats": {"median": seconds, "min": seconds / 2}}


def raw(folder: Path, file: str, date: str, benchmarks: list[dict], absent: list[dict] = (), gpu: str | None = None):
    machine = {
        "gpu": gpu,
        "driver": "580.1",
        "cuda": "13.0",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "threads": 2,
        "command": "python -m pytest benchmarks --benchmark-only",
        "cpu": {"brand_raw": "Some CPU"},
    }
    content = {
        "machine_info": machine,
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": date,
        "benchmarks": benchmarks,
        "absent": list(absent),
    }
    (folder / file).write_text(json.dumps(content))


def absent(implementation: str, reason: str) -> dict:
    return {key: entry(implementation, 1.0)["extra_info"][key] for key in ("op", "shape", "direction")} | {
        "implementation": implementation,
        "reason": reason,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    step = {"shape": {"preset": "vits14", "batch": 512}, "direction": "step", "images_per_second": 2048.0, "mfu": 0.31}
    raw(
        tmp_path,
        "h200.json",
        "2026-12-01T10:00:00",
        [
            entry(OURS, 130e-6),
            entry("sdpa_cudnn", 390e-6, peak_memory_bytes=6 * 2**20),
            entry("sdpa_flash", 400e-6),
            entry("varlen_attn", 260e-6, peak_memory_bytes=2 * 2**20),
        ],
        [absent("xformers", "xformers is not installed"), absent("flex_attention", "out of time")],
        gpu="NVIDIA H200",
    )
    raw(
        tmp_path,
        "h200.train_step.json",
        "2026-12-01T11:00:00",
        [
            entry(OURS, 0.25, "train_step", bytes=None, **step),
            entry("flex_attention", 520e-6),
            entry(OURS, 125e-6),
        ],
        gpu="NVIDIA H200",
    )
    raw(tmp_path, "cpu.json", "2026-12-02T10:00:00", [entry(OURS, 1.5, ceilings=None)])
    return tmp_path


def test_parts_of_one_machine_make_one_report(folder: Path) -> None:
    """The newest of equal entries stands, and what ran in any part is not absent."""
    text = report.markdown(report.read("h200", folder))
    lines = text.splitlines()
    assert lines[0] == "# NVIDIA H200"
    assert "copy 4300 GB/s" in text
    assert "790 TFLOP/s" in text
    assert "2026-12-01 10:00 at commit 0123456789" in text
    assert "2026-12-01 11:00 at commit 0123456789" in text
    row = next(line for line in lines if line.startswith("| 512 images, 106 tokens"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "512 images, 106 tokens, 16 heads, 64 head_dim",
        "forward",
        "125 us",
        "390 us",
        "400 us",
        "260 us",
        "520 us",
        "2.08x (varlen_attn)",
        "3585 GB/s, 189 TFLOP/s",
        "83%",
        "3.0 MiB",
        "1.50x",
    ]
    assert "| vits14, 512 batch | step | 250 ms (2048 images/s, MFU 31.0%) |" in text
    assert (
        "- xformers, visible_attention 512 images, 106 tokens, 16 heads, 64 head_dim: xformers is not installed" in text
    )
    assert "out of time" not in text


def test_the_report_of_a_cpu_names_no_floor(folder: Path) -> None:
    report.main([str(folder / "cpu.json")])
    text = (folder / "cpu.md").read_text()
    assert text.startswith("# CPU\n\n- Some CPU, 2 threads, PyTorch 2.11.0")
    assert "Ceilings" not in text
    assert "| 750 ms |" in text  # The fastest round.
    assert "- Fastest of" in text
    assert not (folder / "cpu.png").exists()


def test_a_gpu_report_comes_with_a_roofline(folder: Path) -> None:
    report.main([str(folder / "h200.json"), str(folder / "h200.train_step.json")])
    assert "![roofline](h200.png)" in (folder / "h200.md").read_text()
    assert (folder / "h200.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "h200.train_step.md").exists()


def test_the_readme_takes_the_gpu_measured_last(folder: Path, tmp_path: Path) -> None:
    raw(folder, "a100.json", "2026-11-30T10:00:00", [entry(OURS, 1.0)], gpu="NVIDIA A100")
    section = report.readme_section(folder)
    assert "NVIDIA H200" in section
    assert "A100" not in section
    assert "| visible_attention | 512 images, 106 tokens, 16 heads, 64 head_dim | forward | 125 us | 2.08x" in section
    assert "(benchmarks/results/cpu.md)" in section
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_readme(readme, folder)
    report.write_readme(readme, folder)
    assert readme.read_text() == f"before\n{report.BEGIN}\n\n{section}\n\n{report.END}\nafter\n"


def test_without_a_gpu_the_readme_says_so(tmp_path: Path) -> None:
    raw(tmp_path, "cpu.json", "2026-12-02T10:00:00", [entry(OURS, 1.0, ceilings=None)])
    assert report.readme_section(tmp_path).startswith("Speed on a GPU: not yet measured.")


def test_the_readme_shows_the_newest_raw_file() -> None:
    """`python benchmarks/report.py --readme` writes what stands there."""
    text = report.README.read_text()
    assert text.split(report.BEGIN)[1].split(report.END)[0] == f"\n\n{report.readme_section()}\n\n"


def test_the_reports_are_those_of_the_raw_files() -> None:
    """`python benchmarks/report.py benchmarks/results/*.json` writes what stands there."""
    for name in {path.name.split(".")[0] for path in report.RESULTS.glob("*.json")}:
        assert (report.RESULTS / f"{name}.md").read_text() == report.markdown(report.read(name))


def test_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"h100\.json"):
        report.read("h100", tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234, "1.23 s"), (0.99951, "1000 ms"), (0.0123, "12.3 ms"), (56e-6, "56.0 us"), (2e-7, "0.200 us")],
)
def test_durations_keep_three_digits(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_measurements_have_a_median() -> None:
    assert Measurement([3.0, 1.0, 2.0], 0).median == 2.0
