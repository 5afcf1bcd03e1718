"""Groups of processes: how the caller names one, how an op's schema does, what its ranks agree on and reduce."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch
from torch.distributed import ProcessGroup, ReduceOp, all_reduce, get_backend_config, group, is_initialized
from torch.distributed.distributed_c10d import _resolve_process_group

Result = TypeVar("Result")


def resolve_group(process_group: ProcessGroup | str | None) -> ProcessGroup | None:
    """The group to reduce over; None is this process alone, as in a group of one."""
    if process_group == "world":
        process_group = group.WORLD if is_initialized() else None
    if process_group is None:
        return None
    if isinstance(process_group, ProcessGroup):
        return process_group if process_group.size() > 1 else None
    raise TypeError(f'process_group must be "world", a ProcessGroup or None, got {process_group!r}')


def group_name(process_group: ProcessGroup | None) -> str | None:
    """How an op's schema can name a group."""
    return None if process_group is None else process_group.group_name


def named_group(name: str | None) -> ProcessGroup | None:
    return None if name is None else _resolve_process_group(name)


def largest(values: list[int], process_group: ProcessGroup | None, device: torch.device) -> list[int]:
    """The largest of each value over the ranks; no rank waits for its GPU where the group reduces on CPUs as well."""
    if process_group is None:
        return values
    x = torch.tensor(values, device="cpu" if "cpu:" in get_backend_config(process_group) else device)
    all_reduce(x, ReduceOp.MAX, process_group)
    return x.tolist()


def reduced(x: torch.Tensor, op: ReduceOp.RedOpType, process_group: ProcessGroup | None) -> Iterator[None]:
    """All-reduces x in place, and yields once while it is on its way; without a group it does neither."""
    if process_group is None:
        return
    work = all_reduce(x, op, process_group, async_op=True)
    yield
    work.wait()  # On a GPU its stream waits, not the host.


def in_turn(chunks: Iterable[Iterator[Result | None]], in_flight: int) -> Iterator[Result]:
    """What the chunks yield but for None: at that, a reduction of the chunk is on its way, and the next goes on.

    With as many reductions each, chunks end in their order. One more begins as soon as one of the `in_flight` ends.
    """
    waiting = iter(chunks)
    active = deque(islice(waiting, in_flight))
    while active:
        chunk = active.popleft()
        for result in chunk:
            if result is None:
                active.append(chunk)
                break
            yield result
        else:
            active.extendleft(islice(waiting, 1))
