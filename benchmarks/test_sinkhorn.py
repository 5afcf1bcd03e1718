"""Sinkhorn against the official formula on a CPU, in one run: `python -m pytest benchmarks/test_sinkhorn.py -s`.

Every entry of `--benchmark-json` names op, shape, direction and implementation in its `extra_info`. The last test
prints how many times faster we are and fails where the geometric mean is below 1.
"""

from collections.abc import Callable, Iterator
from statistics import geometric_mean
from time import perf_counter

import pytest
import torch
from torch import Tensor

from capi_kernels import sinkhorn_positionwise

SHAPES = [(64, 128, 4096), (16, 512, 4096), (256, 64, 1024), (8, 512, 16384)]
N_ITERATIONS, EPS, THREADS = 3, 1e-8, 2


def official_eager(M: Tensor) -> Tensor:
    """The official formula, which needs no copy of its argument because it may overwrite it."""
    M += 50 - M.max(dim=-2, keepdim=True).values
    M = M.exp()
    for _ in range(N_ITERATIONS):
        M /= M.sum(dim=-2, keepdim=True) + EPS
        M /= M.sum(dim=-1, keepdim=True) + EPS
    return M


def ours(M: Tensor) -> Tensor:
    return sinkhorn_positionwise(M, N_ITERATIONS, EPS)


IMPLEMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {"official_eager": official_eager, "ours": ours}


def draw(shape: tuple[int, ...]) -> Tensor:
    """Unit features on standard normal prototypes give standard normal logits, divided by the temperature 0.06."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 0.06


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sinkhorn(benchmark, shape: tuple[int, ...], implementation: str) -> None:
    run = IMPLEMENTATIONS[implementation]
    logits = draw(shape)
    oracle = official_eager(logits[:1].double())
    error, official_error = ((f(logits[:1].clone()).double() - oracle).abs().max() for f in (run, official_eager))
    assert error <= 2 * official_error + torch.finfo(torch.float32).eps * oracle.abs().max()

    positions, images, prototypes = shape
    benchmark.extra_info |= {
        "op": "sinkhorn_positionwise",
        "shape": {"positions": positions, "images": images, "prototypes": prototypes, "n_iterations": N_ITERATIONS},
        "direction": "forward",
        "implementation": implementation,
        "bytes": 2 * logits.numel() * logits.element_size(),
        "threads": THREADS,
    }
    # setup gives each round a fresh copy, untimed: the official formula overwrites its argument.
    benchmark.pedantic(run, setup=lambda: ((logits.clone(),), {}), rounds=7, warmup_rounds=1)


def test_never_slower_than_the_official_formula() -> None:
    """The best of seven alternating rounds each; wants as many idle cores as threads."""
    ratios = {}
    for shape in SHAPES:
        logits = draw(shape)
        seconds = {name: [] for name in IMPLEMENTATIONS}
        for _ in range(7):
            for name, run in IMPLEMENTATIONS.items():
                argument = logits.clone()
                start = perf_counter()
                run(argument)
                seconds[name].append(perf_counter() - start)
        ratios[shape] = min(seconds["official_eager"]) / min(seconds["ours"])
    mean = geometric_mean(ratios.values())
    print(
        "\nofficial / ours:", ", ".join(f"{shape} {ratio:.2f}" for shape, ratio in ratios.items()), f"mean {mean:.2f}"
    )
    assert mean >= 1
