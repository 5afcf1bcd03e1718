"""The report of raw benchmark files, made up here, and README's section of them."""

import json
from pathlib import Path

import pytest

from benchmarks import costs, report
from benchmarks.report import OURS

H200 = costs.Ceilings(4300.0, 790.0, 1 << 30)


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


def raw(
    folder: Path,
    file: str,
    date: str,
    benchmarks: list[dict],
    absent: list[dict] = (),
    gpu: str | None = None,
    failed: list[dict] = (),
):
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
        "failed": list(failed),
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
    """`python -m benchmarks.report --readme` writes what stands there."""
    text = report.README.read_text()
    assert text.split(report.BEGIN)[1].split(report.END)[0] == f"\n\n{report.readme_section()}\n\n"


def test_the_reports_are_those_of_the_raw_files() -> None:
    """`python -m benchmarks.report benchmarks/results/*.json` writes what stands there."""
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


def test_a_ratio_below_one_reads_slower() -> None:
    assert [report.speed(x) for x in (0.6667, 0.994, 0.996, 1.0, 1.5)] == [
        "0.67x: slower",
        "0.99x: slower",
        "1.00x",
        "1.00x",
        "1.50x",
    ]


def cells(text: str, begins: str) -> list[str]:
    row = next(line for line in text.splitlines() if line.startswith(begins))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_where_we_lose_is_said_plainly(tmp_path: Path) -> None:
    raw(tmp_path, "h100.json", "2026-12-01T10:00:00", [entry(OURS, 3e-4), entry("sdpa_cudnn", 2e-4)], gpu="H100")
    wins = [entry(OURS, 1.0, ceilings=None), entry("sdpa", 2.0, ceilings=None)]
    raw(tmp_path, "cpu.json", "2026-12-02T10:00:00", wins)
    assert "0.67x: slower (sdpa_cudnn)" in report.markdown(report.read("h100", tmp_path))
    section = report.readme_section(tmp_path)
    assert "| 300 us | 0.67x: slower (sdpa_cudnn) |" in section
    assert (
        "On that GPU we are slower than the best peer here:\n\n"
        "- `visible_attention` 512 x 106 x 16 x 64 forward 0.67x (sdpa_cudnn)\n" in section
    )
    assert "float32, 2 threads) no row is slower than the best peer." in section


def test_a_benchmark_that_failed_has_a_row_that_says_so(tmp_path: Path) -> None:
    failed = [absent("sdpa_cudnn", "off by 3")]
    raw(tmp_path, "h100.json", "2026-12-01T10:00:00", [entry(OURS, 3e-4)], gpu="H100", failed=failed)
    text = report.markdown(report.read("h100", tmp_path))
    assert cells(text, "| 512 images")[2:5] == ["300 us", "**failed**", ""]
    assert (
        "## Failed\n\n- sdpa_cudnn, visible_attention 512 images, 106 tokens, 16 heads, 64 head_dim: off by 3" in text
    )


def test_of_a_row_nothing_but_failures_may_be_known(tmp_path: Path) -> None:
    raw(tmp_path, "cpu.json", "2026-12-01T10:00:00", [], failed=[absent(OURS, "wrong")])
    text = report.markdown(report.read("cpu", tmp_path))
    assert cells(text, "| 512 images")[2] == "**failed**"
    assert report.readme_section(tmp_path)


def test_the_newer_of_a_failure_and_a_figure_stands(tmp_path: Path) -> None:
    failure = [absent(OURS, "wrong")]
    raw(tmp_path, "cpu.json", "2026-12-02T10:00:00", [entry(OURS, 1.0, ceilings=None)])
    raw(tmp_path, "cpu.part.json", "2026-12-01T10:00:00", [], failed=failure)
    assert not report.read("cpu", tmp_path).failed
    raw(tmp_path, "cpu.part.json", "2026-12-03T10:00:00", [], failed=failure)
    (row,) = report.read("cpu", tmp_path).rows.values()
    assert OURS not in row


def test_heads_of_two_widths_have_a_row_each(tmp_path: Path) -> None:
    """Their shape is that of the logits."""
    widths = [entry(OURS, seconds, "clustering_head", dim=dim) for seconds, dim in ((2e-4, 1024), (1e-4, 384))]
    raw(tmp_path, "h100.json", "2026-12-01T10:00:00", widths, gpu="H100")
    text = report.markdown(report.read("h100", tmp_path))
    assert cells(text, "| 512 images, 106 tokens, 16 heads, 64 head_dim, 1024 dim")[2] == "200 us"
    assert cells(text, "| 512 images, 106 tokens, 16 heads, 64 head_dim, 384 dim")[2] == "100 us"


def test_a_run_that_was_cut_off_is_named_and_the_others_are_reported(tmp_path: Path) -> None:
    raw(tmp_path, "h100.json", "2026-12-01T10:00:00", [entry(OURS, 3e-4)], gpu="H100")
    (tmp_path / "h100.attention.json").write_text("")
    text = report.markdown(report.read("h100", tmp_path))
    assert "- Cut off, and without a figure: h100.attention.json." in text
    assert "| 300 us |" in text
    (tmp_path / "h100.json").unlink()
    with pytest.raises(FileNotFoundError, match="none that is whole"):
        report.read("h100", tmp_path)


def test_a_machine_of_which_nothing_is_whole_is_left_out_of_the_readme(tmp_path: Path) -> None:
    (tmp_path / "h100.json").write_text("")
    raw(tmp_path, "cpu.json", "2026-12-02T10:00:00", [entry(OURS, 1.0, ceilings=None)])
    assert report.readme_section(tmp_path).startswith("Speed on a GPU: not yet measured.")


def test_what_is_known_to_be_wrong_stands_beside_the_figures(folder: Path) -> None:
    (folder / "h200.notes.md").write_text("Launches are charged.\n\nMore of it.\n")
    assert "\nLaunches are charged.\n\nMore of it.\n" in report.markdown(report.read("h200", folder))
    section = report.readme_section(folder)
    assert "\nLaunches are charged.\n" in section
    assert "More of it" not in section


def test_a_step_shows_the_idle_gpu_and_a_peer_its_breaks(tmp_path: Path) -> None:
    step = {"shape": {"preset": "vits14", "batch": 512}, "direction": "step", "images_per_second": 2048.0, "mfu": 0.31}
    ours = entry(OURS, 0.25, "train_step", bytes=None, gpu_idle_share=0.466, launches=1694, **step)
    theirs = entry("official_compiled", 0.5, "train_step", bytes=None, graph_breaks=7, **step)
    raw(tmp_path, "h100.json", "2026-12-01T10:00:00", [ours, theirs], gpu="H100")
    text = report.markdown(report.read("h100", tmp_path))
    assert "| 250 ms (2048 images/s, MFU 31.0%; GPU idle 47%, 1694 launches) |" in text
    assert "7 graph breaks" in text


def test_the_hosts_time_has_a_column_of_its_own(tmp_path: Path) -> None:
    entries = [entry(OURS, 3e-4, host_seconds=9e-5), entry("sdpa_cudnn", 2e-4, host_seconds=4e-5)]
    raw(tmp_path, "h100.json", "2026-12-01T10:00:00", entries, gpu="H100")
    text = report.markdown(report.read("h100", tmp_path))
    header, row = cells(text, "| shape"), cells(text, "| 512 images")
    assert row[header.index("ours on the host")] == "90.0 us"


def test_without_matplotlib_there_is_a_report_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    report.main([str(folder / "h200.json")])
    assert (folder / "h200.md").exists()
    assert not (folder / "h200.png").exists()
