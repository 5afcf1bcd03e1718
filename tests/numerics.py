"""What "accurate" and "little memory" mean in these tests."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def assert_as_accurate(actual: Tensor, same_dtype: Tensor, oracle: Tensor) -> None:
    """The largest error against the float64 definition is at most twice that of the definition in the same dtype."""
    assert actual.dtype == same_dtype.dtype
    assert actual.shape == same_dtype.shape == oracle.shape
    assert oracle.dtype == torch.float64
    if oracle.numel() == 0:
        return
    error = (actual.double() - oracle).abs().max()
    budget = 2 * (same_dtype.double() - oracle).abs().max() + torch.finfo(actual.dtype).eps * oracle.abs().max()
    assert error <= budget, f"error {error:.3g} above the budget {budget:.3g}"


def assert_draws_as_accurate(draws: Iterable[tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]]) -> None:
    """The same of several outputs, each over all draws (actual, same_dtype, oracle) of the random inputs together.

    In one draw the definition's own error may be small by chance: it is the largest of few numbers that count.
    """
    for versions in zip(*(zip(*draw, strict=True) for draw in draws), strict=True):
        for actual, same_dtype, oracle in versions:
            assert actual.shape == same_dtype.shape == oracle.shape
        assert_as_accurate(*(torch.cat([x.flatten() for x in version]) for version in zip(*versions, strict=True)))


def peak_allocation(run: Callable[[], object]) -> int:
    """The most bytes of CPU tensors alive at once while `run` runs, its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
