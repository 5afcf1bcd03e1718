"""The pages of docs/: what their examples claim holds, what they link to exists, and their tables are complete."""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pages import DOCS, run_page

PAGES = sorted(DOCS.glob("*.md"))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for what examples write; a process group that an example leaves open ends with it."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page, elsewhere) -> None:
    run_page(page)


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
