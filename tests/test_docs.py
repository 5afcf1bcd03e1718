"""The pages of docs/: what their examples claim holds, what they link to exists, and their tables are complete."""

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import asdict
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import pytest
import yaml
from pages import DOCS, run_page

from capi.config import Config, load_config

PAGES = sorted(DOCS.glob("*.md"))


def test_the_examples_run(tmp_path) -> None:
    """Without a warning, in a process of their own: annotations that are checked cannot be traced by the compiler."""
    program = "import pages\nfor page in sorted(pages.DOCS.glob('*.md')): pages.run_page(page)"
    paths = os.pathsep.join([str(DOCS.parent), str(DOCS.parent / "tests")])
    command, environment = [sys.executable, "-c", program], {**os.environ, "PYTHONPATH": paths}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert not re.search(r"\w+Warning: ", run.stderr), run.stderr


def test_a_wrong_example_fails_at_its_line(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\ntwo = 2\n```\n\ntext\n\n```python\nassert two == 3\n```\n")
    with pytest.raises(AssertionError) as caught:
        run_page(page)
    assert caught.traceback[-1].lineno + 1 == 10


def test_an_example_that_would_not_be_found_is_refused(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text("- one:\n" + textwrap.indent("```python\nassert False\n```\n", "  "))
    with pytest.raises(ValueError, match="does not start at the margin"):
        run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_files_resolve(page) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert (DOCS / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist(page) -> None:
    for module in re.findall(r"python -m ([\w.]+)", page.read_text()):
        assert find_spec(module), module


def test_every_official_key_has_a_row_that_says_what_it_is_here() -> None:
    lines = (Path(__file__).parent / "goldens" / "official_config_keys.txt").read_text().splitlines()
    keys = {line for line in lines if not line.startswith("#")}
    rows = official_rows()
    matched = {row: {key for key in keys if re.fullmatch(pattern(row), key)} for row in rows}
    assert keys == set().union(*matched.values())
    for row, (_, here, note) in rows.items():
        assert matched[row], f"{row} is no official key"
        assert here != "-" or note, f"{row} has no counterpart, and no reason for it"


def test_a_row_without_a_note_has_the_default_of_the_preset() -> None:
    values = leaves(asdict(load_config(["--config", "vitl14"])))
    for row, (default, here, note) in official_rows().items():
        if not note:
            ours = values[here.strip("`")]
            assert (list(ours) if isinstance(ours, tuple) else ours) == yaml.safe_load(default.strip("`")), row


def test_every_option_of_ours_is_set_beside_an_official_one_or_said_to_be_ours_alone() -> None:
    beside = {option for _, here, _ in official_rows().values() for option in re.findall(r"`([^`]+)`", here)}
    alone = {option.strip("`") for option, _ in tables("official.md")["Ours alone"]}
    assert beside | alone == set(leaves(asdict(Config())))
    assert not beside & alone


def test_no_feature_is_without_a_counterpart_or_a_reason() -> None:
    for feature, official, here, note in chain(*tables("features.md").values()):
        assert feature and official and here, feature
        assert here != "-" or note, f"{feature} has no counterpart, and no reason for it"


def tables(page: str) -> dict[str, list[list[str]]]:
    """The rows of the table below each heading, without its head; each row as its cells."""
    rows: dict[str, list[list[str]]] = {}
    for line in (DOCS / page).read_text().splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        elif line.startswith("|"):
            rows.setdefault(heading, []).append([cell.strip() for cell in line[1:-1].split("|")])
    return {heading: found[2:] for heading, found in rows.items()}


def official_rows() -> dict[str, tuple[str, str, str]]:
    """Default, counterpart and note of each official key, or of several that a row with stars stands for."""
    rows = chain(*(rows for heading, rows in tables("official.md").items() if heading != "Ours alone"))
    return {key.strip("`"): (default, here, note) for key, default, here, note in rows}


def pattern(row: str) -> str:
    """A star is one part of a name, at the end all parts that follow."""
    inner = re.escape(row).replace(r"\*\.", r"[^.]+\.")
    return inner.replace(r"\*", ".+")


def leaves(values: dict, prefix: str = "") -> dict[str, object]:
    """Every value of a nested configuration by its dotted name."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
