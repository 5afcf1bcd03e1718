"""What is computed while a reduction is on its way: on a CPU; for the kernels, see tests/test_sinkhorn_triton.py."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from capi_kernels import _process_groups
from capi_kernels._process_groups import in_turn
from capi_kernels.heads import clustering_head_cpu
from capi_kernels.sinkhorn import cpu

POSITIONS, IMAGES, PROTOTYPES, DIM = 8, 6, 64, 4
CHUNK = 2
LARGE = CHUNK * IMAGES * PROTOTYPES  # Elements of a chunk.


class Record(TorchDispatchMode):
    """A group of one that reduces nothing: when reductions start and are waited for, and passes over a chunk between.

    An event is a reduction's number to start it, minus one minus it to wait for it, and None for a pass.
    """

    def __init__(self):
        super().__init__()
        self.events: list[int | None] = []
        self.sizes: list[tuple[int, ...]] = []

    def all_reduce(self, x: Tensor, op: object, group: ProcessGroup, async_op: bool = False) -> "Work | None":
        if not async_op:  # What the ranks agree on beforehand.
            return None
        self.sizes.append(tuple(x.shape))
        self.events.append(len(self.sizes) - 1)
        return Work(self, len(self.sizes) - 1)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(x, Tensor) and x.numel() == LARGE for x in args):
            self.events.append(None)
        return func(*args, **(kwargs or {}))

    def between(self, number: int) -> list[int | None]:
        """What happens from the start of a reduction to the wait for it."""
        return self.events[self.events.index(number) + 1 : self.events.index(-1 - number)]


class Work:
    def __init__(self, record: Record, number: int):
        self.record, self.number = record, number

    def wait(self) -> None:
        self.record.events.append(-1 - self.number)


def sinkhorn(dtype: torch.dtype, group: ProcessGroup | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((POSITIONS, IMAGES, PROTOTYPES), generator=generator).to(dtype)
    out, potentials = cpu.balanced(logits, 3, 1e-8, 0.1, group, True)
    return [out, *potentials]


def head(dtype: torch.dtype, group: ProcessGroup | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (POSITIONS, IMAGES, DIM), (PROTOTYPES, DIM), (PROTOTYPES,)
    tensors = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    loss, potentials, *gradients = clustering_head_cpu.clustering_head(
        *tensors, 0.06, 0.12, 3, 1e-8, True, CHUNK, group, dtype
    )
    return [loss, *potentials, *gradients]


@pytest.mark.parametrize("compute", [sinkhorn, head])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_chunk_is_computed_while_one_is_reduced(
    compute: Callable[..., list[Tensor]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 4 * LARGE)
    monkeypatch.setattr(cpu, "IN_PLACE", 1)
    monkeypatch.setattr(_process_groups, "get_backend_config", lambda group: "cpu:gloo")
    alone, record = compute(dtype, None), Record()
    monkeypatch.setattr(_process_groups, "all_reduce", record.all_reduce)
    with record:
        reduced = compute(dtype, ProcessGroup(0, 1))
    assert all(map(torch.equal, reduced, alone))
    # Maxima, and sums of three iterations, of every chunk.
    assert record.sizes == [(CHUNK, 1, PROTOTYPES)] * (4 * POSITIONS // CHUNK)
    for number in range(len(record.sizes)):
        meanwhile = record.between(number)
        assert None in meanwhile, f"nothing is computed while reduction {number} is on its way"
        assert sum(event is not None and event >= 0 for event in meanwhile) <= 2  # The memory is that of two chunks.


def test_chunks_end_in_their_order_and_few_are_under_way() -> None:
    under_way = set()

    def chunk(number: int) -> Iterator[int | None]:
        under_way.add(number)
        for _ in range(3):
            assert len(under_way) <= 2
            yield None
        yield number
        yield number
        under_way.remove(number)

    assert list(in_turn(map(chunk, range(5)), 2)) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert list(in_turn(map(chunk, range(1)), 2)) == [0, 0]
    assert list(in_turn([], 2)) == []
