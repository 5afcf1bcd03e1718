"""Benchmarks as tests: one test an implementation, those of one operation and shape measured in turn.

The first test of a group measures all that were selected of it; each test then hands its own rounds to
pytest-benchmark, whose timer is a clock that stands still but for the measured seconds.
"""

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch

from benchmarks import shapes
from benchmarks.costs import Cost
from benchmarks.measure import OURS, Deadline, Failed, Unavailable, machine, race, release
from benchmarks.timing import CeilingMeter, Contestant

# What matters most comes first, in case time runs out: the first shape of each operation, then the second.
ORDER = (
    "sinkhorn_positionwise",
    "visible_attention",
    "masked_cross_attention",
    "clustering_head",
    "student_loss",
    "train_step",
    "data_loading",
)
GROUPS = pytest.StashKey[dict[str, list[str]]]()
ABSENT = pytest.StashKey[list[dict]]()
FAILED = pytest.StashKey[list[dict]]()


class Clock:
    """A timer for pytest-benchmark that shows the sum of the seconds it was given."""

    def __init__(self):
        self.now = 0.0

    def measured_seconds(self) -> float:
        return self.now


CLOCK = Clock()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[GROUPS], config.stash[ABSENT], config.stash[FAILED] = defaultdict(list), [], []


def _operation(item: pytest.Item) -> str:
    return item.originalname.removeprefix("test_")


def _group(item: pytest.Item) -> str:
    """The operation and what its implementations share: the test's name without the implementation."""
    shared = [value for name, value in item.callspec.params.items() if name != "implementation"]
    names = [value if isinstance(value, str) else shapes.name(value) for value in shared]
    return " ".join([_operation(item), *names])


def _importance(items: list[pytest.Item]) -> dict[pytest.Item, tuple[int, int]]:
    """The place of an item's shape among those of its operation, then the place of the operation."""
    shapes_of, importance = defaultdict(list), {}
    for item in items:
        shape, seen = item.callspec.params.get("shape"), shapes_of[_operation(item)]
        if shape not in seen:
            seen.append(shape)
        importance[item] = seen.index(shape), ORDER.index(_operation(item))
    return importance


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.path.parent.name == "benchmarks"]
    for item in ours:
        config.stash[GROUPS][_group(item)].append(item.callspec.params["implementation"])
        item.add_marker(pytest.mark.benchmark(group=_group(item), timer=CLOCK.measured_seconds))
        item.add_marker(pytest.mark.filterwarnings("default"))  # A peer's warning is not our error.
    others = [item for item in items if item not in ours]
    items[:] = others + sorted(ours, key=_importance(ours).get)


@pytest.fixture(scope="session")
def meter() -> CeilingMeter | None:
    """Of the ceilings of this GPU, in this run; none on a CPU."""
    return CeilingMeter(shapes.DEVICE, shapes.MATMUL_SIZE) if shapes.GPU else None


@pytest.fixture(scope="session")
def deadline() -> Deadline:
    return Deadline()


@pytest.fixture(scope="session")
def races() -> dict:
    """By group its ceilings and, of every implementation, the Measurement or what kept it; "shape" is the last one."""
    return {"shape": None}


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark, meter, deadline, races) -> Callable[..., None]:
    """Measures this test's implementation, and with it at the first time the others of its group."""
    group = _group(request.node)
    implementation = request.node.callspec.params["implementation"]

    def measure(
        enter: Callable[[str], Contestant],
        *,
        op: str,
        shape: dict[str, int | str],
        direction: str,
        cost: Cost,
        dtype: object = shapes.DTYPE,
        needed_seconds: float = 0.0,
        one_at_a_time: bool = False,
        inspect: Callable[[str, Contestant, float], dict] | None = None,
        **more: object,
    ) -> None:
        def entrant(name: str) -> Contestant:
            deadline.check(0 if name == OURS else needed_seconds)
            return enter(name)

        if group not in races:
            if races["shape"] != (op, shape):
                # Else the compiler would in time refuse to compile one function for yet another shape.
                torch.compiler.reset()
                races["shape"] = (op, shape)
            entrants = {name: lambda name=name: entrant(name) for name in request.config.stash[GROUPS][group]}
            rounds, seconds = (20, 3.0) if shapes.GPU else (60, 6.0)
            races[group] = None, {}  # What fails is not tried again.
            release(shapes.DEVICE)
            ceilings = meter and meter.at(max(cost.copied_bytes or shapes.COPIED_BYTES, shapes.LEAST_COPIED_BYTES))
            races[group] = ceilings, race(entrants, shapes.DEVICE, rounds, seconds, one_at_a_time, inspect)
        ceilings, results = races[group]
        result = results.get(implementation)
        assert result is not None, "see the first failure of this group"
        key = {"op": op, "shape": shape, "direction": direction, "implementation": implementation}
        if "dim" in more:
            key["dim"] = more["dim"]
        if isinstance(result, Unavailable):
            request.config.stash[ABSENT].append({**key, "reason": str(result)})
            pytest.skip(str(result))
        if isinstance(result, Failed):
            request.config.stash[FAILED].append({**key, "reason": str(result)})
            pytest.fail(str(result), pytrace=False)
        floor = cost.floor_seconds(ceilings)
        benchmark.extra_info |= {
            **key,
            "dtype": str(dtype).removeprefix("torch."),
            "bytes": cost.bytes,
            "flop": cost.flop,
            "floor_seconds": floor,
            "share_of_floor": None if floor is None else floor / result.median,
            "peak_memory_bytes": result.peak_memory_bytes,
            "ceilings": None if ceilings is None else ceilings._asdict(),
            "host_seconds": result.host_seconds,
            "timing": result.timing,
            "graphs": result.compiled.graphs,
            "graph_breaks": result.compiled.breaks if result.compiled.graphs else None,
            **result.inspected,
            **{name: value(result) if callable(value) else value for name, value in more.items()},
        }
        seconds = iter(result.seconds)

        def advance() -> None:
            CLOCK.now += next(seconds)

        benchmark.pedantic(advance, rounds=len(result.seconds))

    return measure


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    command = ["python -m pytest", *map(str, config.invocation_params.args)]
    machine_info |= {**machine(shapes.DEVICE), "command": " ".join(command)}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    output_json["absent"], output_json["failed"] = config.stash[ABSENT], config.stash[FAILED]


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """How many times our time, and our peak memory, each peer takes; times as in the report."""
    statistic = "median" if shapes.GPU else "min"
    groups = defaultdict(dict)
    for entry in config._benchmarksession.benchmarks:
        groups[entry.group][entry.extra_info.get("implementation")] = entry
    lines = []
    for group, entries in groups.items():
        ours = entries.pop(OURS, None)
        for name, entry in entries.items() if ours else ():
            memory, our_memory = (x.extra_info["peak_memory_bytes"] for x in (entry, ours))
            time, our_time = (getattr(x.stats, statistic) for x in (entry, ours))
            slower = "; we are slower" if time < our_time else ""
            line = f"{group}: {name} takes {time / our_time:.2f} times our time{slower}"
            lines.append(f"{line}, {memory / our_memory:.2f} times our peak memory" if memory and our_memory else line)
    if lines:
        terminalreporter.section("ours and peers")
        terminalreporter.write("\n".join(lines) + "\n")
