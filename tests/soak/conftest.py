"""The table of faults and outcomes: every test adds its row, and a run in which all passed writes docs/faults.md."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faulty_runs import Run

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
HEAD = """# Faults and what comes of them

Written by `make soak`, which brings each of them about in trainings of a tiny model on a CPU, and checks what comes of
it. "Bit for bit": the final weights and optimiser states are those of a training without the fault.

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
    if exitstatus == 0 and len(ROWS) == sum("row" in item.fixturenames for item in session.items):
        lines = [f"| {' | '.join((fault, *columns))} |" for fault, columns in ROWS.items()]
        PAGE.write_text(HEAD + "\n".join(lines) + "\n")
