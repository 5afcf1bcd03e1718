"""Where there is no GPU, Triton kernels run in its interpreter on CPU tensors; their outputs start as NaN, guarded."""

import gc
import math
import os
from collections.abc import Iterator
from importlib.util import find_spec

import jaxtyping
import pytest
import torch
from annotations import check_annotations
from interpreter import hasten
from stratified import stratified

if find_spec("beartype"):
    # Here and not among pytest's options, which hold for benchmarks too: checks of every call take a tenth of some.
    check_annotations("capi", "capi_kernels")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton"):
        hasten()

OPTIONAL = {"triton": "*_triton.py", "hypothesis": "test_fuzz_*.py"}
collect_ignore_glob = [files for package, files in OPTIONAL.items() if not find_spec(package)]
collect_ignore_glob += [] if os.environ.get("CAPI_SOAK") else ["soak"]
GUARD = 1024  # Elements on both sides of every new tensor.


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    choose_gpu_tests(config, items, os.environ.get("CAPI_GPU_TESTS", "all"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def choose_gpu_tests(config: pytest.Config, items: list[pytest.Item], count: str) -> None:
    """Leaves so many of the tests that need a GPU, of every test function some; "all" leaves all."""
    if count != "all":
        gpu = [item for item in items if item.get_closest_marker("gpu")]
        kept = set(stratified(gpu, int(count), lambda item: (item.path, item.originalname)))
        config.hook.pytest_deselected(items=[item for item in gpu if item not in kept])
        items[:] = [item for item in items if item in kept or not item.get_closest_marker("gpu")]


def pytest_collection_finish() -> None:
    gc.freeze()  # Modules and tests stay: without this each collection, some tests ask for many, goes through them.


@pytest.fixture
def without_annotations() -> Iterator[None]:
    """What is refused is refused as for a user, who has no checks of annotations in between."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty and empty_like give NaN, or -77, between guards that must be untouched at the end of the test."""
    empty, buffers = torch.empty, []

    def guarded(*size, dtype=None, device=None) -> torch.Tensor:
        dtype = dtype or torch.get_default_dtype()
        size = tuple(size[0]) if size and not isinstance(size[0], int) else size
        count = math.prod(size)
        buffer = empty(count + 2 * GUARD, dtype=dtype, device=device).fill_(-77)
        buffers.append(buffer)
        return buffer[GUARD : GUARD + count].fill_(math.nan if dtype.is_floating_point else -77).view(size)

    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(torch, "empty_like", lambda x: guarded(x.shape, dtype=x.dtype, device=x.device))
    yield
    for buffer in buffers:
        assert (buffer[:GUARD] == -77).all(), "written before the start of a tensor"
        assert (buffer[len(buffer) - GUARD :] == -77).all(), "written past the end of a tensor"
