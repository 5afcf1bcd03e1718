"""What "accurate" and "little memory" mean in these tests."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

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


@contextmanager
def sums_in_blocks(blocks: int) -> Iterator[None]:
    """Matrix products of a CPU add up their terms one after the other in each of `blocks` parts, then these.

    The order is the library's choice: by maker, instruction set and shape. One block is the least exact, and what MKL
    does with AVX-512 in some shapes; half precision is added up in float32, as everywhere.
    """

    def product(a: Tensor, b: Tensor) -> Tensor:
        wide = torch.promote_types(a.dtype, torch.float32)
        size = max(1, math.ceil(a.shape[-1] / blocks))
        total = torch.zeros((*a.shape[:-1], b.shape[-1]), dtype=wide)
        for a_part, b_part in zip(a.to(wide).split(size, -1), b.to(wide).split(size, -2), strict=True):
            part = torch.zeros_like(total)
            for k in range(a_part.shape[-1]):
                part = torch.addcmul(part, a_part[..., k : k + 1], b_part[..., k : k + 1, :])
            total = total + part
        return total.to(a.dtype)

    def added(x: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
        scaled = alpha * product(a, b)
        return scaled if beta == 0 else beta * x + scaled

    with torch.library._scoped_library("aten", "IMPL") as library, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # of other kernels than PyTorch's
        for name in ("mm", "bmm"):
            library.impl(name, product, "CPU")
            library.impl(f"{name}.out", lambda a, b, *, out: out.copy_(product(a, b)), "CPU")
        for name in ("addmm", "baddbmm"):
            library.impl(name, lambda x, a, b, *, beta=1, alpha=1: added(x, a, b, beta, alpha), "CPU")
            library.impl(f"{name}_", lambda x, a, b, *, beta=1, alpha=1: x.copy_(added(x, a, b, beta, alpha)), "CPU")
            library.impl(
                f"{name}.out", lambda x, a, b, *, beta=1, alpha=1, out: out.copy_(added(x, a, b, beta, alpha)), "CPU"
            )
        yield


def least_exact(define: Callable[[], Mapping[str, Tensor]], oracle: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each result of the definition, with PyTorch's products or with `sums_in_blocks(1)`: that with the larger error.

    A definition that has products is exact to its own rounding in any order of their sums.
    """
    own = define()
    with sums_in_blocks(1):
        in_turn = define()

    def error(name: str, result: Tensor) -> float:
        return float((result.double() - oracle[name]).abs().max()) if result.numel() else 0.0

    return {name: max(own[name], in_turn[name], key=lambda x, name=name: error(name, x)) for name in oracle}


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
