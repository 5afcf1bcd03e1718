"""The table of faults and outcomes: every test writes its row of docs/faults.md, if all of the run passed."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from faulty_runs import Run

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
HEAD = """# Faults and what comes of them

Written by `make soak` on {date}. It brings each of them about in trainings of a tiny model on a CPU, and checks what
comes of it. "Bit for bit": the final weights and optimiser states are those of a training without the fault.

| fault | how it is brought about | what must come of it | exit status | what came of it | what to do |
| --- | --- | --- | --- | --- | --- |
"""
ROWS: dict[str, tuple[str, ...]] = {}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs = []

    def begin(*options: str, **how) -> Run:
        runs.append(Run(tmp_path, *options, **how))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes a fault: how it is brought about, what must come of it, the status, what came of it, what to do."""

    def note(fault: str, *columns: str) -> None:
        ROWS[fault] = columns

    return note


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Replaces the rows of what ran, where all of it passed; others stay as they were."""
    if exitstatus == 0 and ROWS:
        lines = PAGE.read_text().splitlines() if PAGE.exists() else []
        table = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}
        table = dict(list(table.items())[2:]) | {
            fault: f"| {' | '.join((fault, *columns))} |" for fault, columns in ROWS.items()
        }
        PAGE.write_text(HEAD.format(date=f"{datetime.now(UTC):%F}") + "\n".join(table.values()) + "\n")
