"""A whole training step against the official one: its own code with `CAPI_OFFICIAL=<checkout>`, else restated."""

import os
from pathlib import Path

import pytest

from benchmarks import official_code, peers, shapes, step_profile
from benchmarks.costs import Cost
from benchmarks.measure import OURS, Measurement
from benchmarks.timing import Contestant
from benchmarks.train_step import StepCase, configuration
from capi.metrics import peak_flops, training_flop_per_image

# Compiling the official step takes about this long on a GPU.
NEEDED_SECONDS = {"tiny": 60, "vits14": 90, "vitb14": 90, "vitl14": 150}


@pytest.mark.parametrize("implementation", [OURS, *peers.OFFICIAL_STEP])
@pytest.mark.parametrize("shape", shapes.TRAIN_STEP, ids=shapes.name)
def test_train_step(measure, shape: shapes.Step, implementation: str) -> None:
    config = configuration(*shape, shapes.DEVICE, shapes.DTYPE)
    case = StepCase(config, shape.preset, shapes.DEVICE, shapes.DTYPE, calls=4 if shapes.GPU else 1)
    flop = int(training_flop_per_image(config) * shape.batch)
    peak = peak_flops(shapes.DEVICE)

    def inspect(name: str, contestant: Contestant, seconds: float) -> dict:
        folder = Path(os.environ.get("CAPI_BENCH_OUT", "."))
        path = folder / f"{shapes.MACHINE}.step-{shape.preset}-{name}.profile.txt"
        return step_profile.inspect(contestant, seconds, path)

    def images_per_second(result: Measurement) -> float:
        return shape.batch / result.median

    def mfu(result: Measurement) -> float | None:
        return None if peak is None else flop / result.median / peak

    measure(
        case.enter,
        op="train_step",
        shape=shape._asdict(),
        direction="step",
        cost=Cost(None, flop),
        needed_seconds=NEEDED_SECONDS[shape.preset] if shapes.GPU else 0.0,
        one_at_a_time=shapes.GPU,
        inspect=inspect if shapes.GPU and "CAPI_BENCH_OUT" in os.environ else None,
        images_per_second=images_per_second,
        mfu=mfu,
        source="this repository" if implementation == OURS else official_code.source(),
    )
