"""How much is fuzzed, and with what: strange numbers, strange tensors, strange objects in place of either."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

TIMES = int(os.environ.get("CAPI_FUZZ_TIMES", "1"))
"""How many times more examples than in `make test`; above 1 they are others each time."""
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NUMBERS = (0, 1, -1, 2, 3, 0.0, -0.0, 0.5, -0.5, 1e-30, 1e30, 2**31, 2**63, -(2**63), 2**70)
NUMBERS += (float("nan"), float("inf"), -float("inf"))
OBJECTS = (None, True, "", "world", "1", b"1", [], [1.0], (), {}, 1j, object, object(), np.float32(1), np.ones(3))


def fuzz(examples: int) -> Callable:
    """Runs a test with so many examples, or a multiple of them; the same each time, unless `CAPI_FUZZ_TIMES` is set."""
    return settings(
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails where the main thread is still inside after so many seconds."""

    def fail(signum: int, frame: FrameType | None) -> None:
        raise AssertionError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@st.composite
def tensors(draw, shape: tuple[int, ...], dtype: torch.dtype, *, grad: bool = False) -> Tensor:
    """Normal numbers of a drawn seed, in a drawn layout of memory."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    layout = draw(st.sampled_from(("contiguous", "reversed", "part", "expanded", "offset")))
    if layout == "reversed":
        x = torch.randn(shape[::-1], generator=generator).permute(*reversed(range(len(shape))))
    elif layout == "part":
        x = torch.randn([2 * n + 1 for n in shape], generator=generator)[tuple(slice(1, 2 * n + 1, 2) for n in shape)]
    elif layout == "expanded" and shape and shape[0]:
        x = torch.randn(shape[1:], generator=generator).expand(shape)
    elif layout == "offset":
        x = torch.randn(int(np.prod(shape)) + 3, generator=generator)[3:].view(shape)
    else:
        x = torch.randn(shape, generator=generator)
    x = x.to(dtype)
    return x.requires_grad_() if grad and draw(st.booleans()) else x


def _with(x: Tensor, value: float) -> Tensor:
    x = x.detach().clone()
    if x.numel():
        x.view(-1)[x.numel() // 2] = value if x.is_floating_point() else -1
    return x


STRANGE: dict[str, Callable[[Tensor], object]] = {
    "meta": lambda x: x.detach().to("meta"),
    "int64": lambda x: x.detach().long(),
    "int32": lambda x: x.detach().int(),
    "uint8": lambda x: x.detach().to(torch.uint8),
    "bool": lambda x: x.detach().bool(),
    "complex": lambda x: x.detach().to(torch.complex64),
    "fp16": lambda x: x.detach().to(torch.float16),
    "bf16": lambda x: x.detach().to(torch.bfloat16),
    "fp32": lambda x: x.detach().float(),
    "fp64": lambda x: x.detach().double(),
    "fp8": lambda x: x.detach().to(torch.float8_e4m3fn),
    "numpy": lambda x: x.detach().double().numpy(),
    "list": lambda x: x.detach().double().tolist(),
    "sparse": lambda x: x.detach().to_sparse(),
    "parameter": lambda x: torch.nn.Parameter(x.detach(), requires_grad=x.is_floating_point()),
    "more axes": lambda x: x.detach()[None],
    "axis of one at the end": lambda x: x.detach()[..., None],
    "flat": lambda x: x.detach().reshape(-1),
    "scalar": lambda x: x.detach().sum(),
    "first": lambda x: x.detach()[:1],
    "none": lambda x: x.detach()[:0],
    "no channel": lambda x: x.detach()[..., :0],
    "one channel": lambda x: x.detach()[..., :1],
    "twice": lambda x: torch.cat([x.detach()] * 2),
    "turned": lambda x: x.detach().transpose(0, -1) if x.ndim else x,
    "zeros": lambda x: torch.zeros_like(x),
    "large": lambda x: x.detach() * 100,
    "nan": lambda x: _with(x, torch.nan),
    "inf": lambda x: _with(x, torch.inf),
    "-inf": lambda x: _with(x, -torch.inf),
}


@st.composite
def strange(draw, value: object) -> object:
    """Something else in place of a value."""
    if isinstance(value, tuple) and value and all(isinstance(x, Tensor) for x in value):
        what = draw(st.sampled_from(("object", "list", "short", "reversed", "element")))
        if what == "element":
            place = draw(st.integers(0, len(value) - 1))
            changed = [*value[:place], draw(strange(value[place])), *value[place + 1 :]]
            return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
        others = {"list": list(value), "short": value[:-1], "reversed": value[::-1]}
        return others[what] if what in others else draw(st.sampled_from(OBJECTS + NUMBERS))
    if isinstance(value, Tensor) and draw(st.integers(0, 3)):
        try:
            return STRANGE[draw(st.sampled_from(list(STRANGE)))](value)
        except (RuntimeError, IndexError):  # of a scalar, or of no element
            return None
    return draw(st.sampled_from(NUMBERS + OBJECTS))
