"""Argument checks shared by the ops: each says what was expected and what came, and none waits for a GPU."""

import math
from numbers import Integral, Real
from operator import sub

import torch
from torch import Tensor


def check_is_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {torch.typename(x)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got the layout {x.layout}")


def check_tensor(name: str, x: Tensor, axes: str, *, like: tuple[str, Tensor] | None = None) -> None:
    """A floating tensor with these axes (a leading `...` stands for any), on the device and of the type of `like`."""
    check_is_tensor(name, x)
    names = axes.removeprefix("... ").split()
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.dtype.itemsize < 2:  # PyTorch computes with none of these.
        raise TypeError(f"{name} must have 16 bits or more, got {x.dtype}")
    if x.ndim < len(names) or (x.ndim > len(names) and not axes.startswith("...")):
        raise ValueError(f"{name} must have the axes [{', '.join(axes.split())}], got shape {tuple(x.shape)}")
    if like is not None:
        check_device(name, x, like)
        if x.dtype != like[1].dtype:
            raise TypeError(f"{name} must have the dtype of {like[0]}, {like[1].dtype}, got {x.dtype}")


def check_device(name: str, x: Tensor, like: tuple[str, Tensor]) -> None:
    check_is_tensor(name, x)
    if x.device != like[1].device:
        raise ValueError(f"{name} must be on the device of {like[0]}, {like[1].device}, got {x.device}")


def check_shape(name: str, x: Tensor, **axes: int) -> None:
    check_is_tensor(name, x)
    if tuple(x.shape) != tuple(axes.values()):
        expected = ", ".join(f"{axis}={size}" for axis, size in axes.items())
        raise ValueError(f"{name} must have the shape [{expected}], got {tuple(x.shape)}")


def check_not_empty(name: str, **axes: int) -> None:
    for axis, size in axes.items():
        if size == 0:
            raise ValueError(f"{name} must have at least one element on the axis {axis}, got 0")


def check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if isinstance(value, Integral) and abs(value) >= 2**63:
        raise ValueError(f"{name} must be a float or an integer of 64 bits, got {value}")


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_positive(**values: float) -> None:
    for name, value in values.items():
        check_number(name, value)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def check_count(name: str, value: int, least: int = 1) -> None:
    """An integer of at least `least`, and of 32 bits."""
    if isinstance(value, bool) or not isinstance(value, Integral | torch.SymInt):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value >= 2**31:
        raise ValueError(f"{name} must be below 2^31, got {value}")


def check_sinkhorn_options(n_iterations: int, eps: float) -> None:
    check_count("n_iterations", n_iterations)
    check_number("eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and at least 0, got {eps}")


def check_index(name: str, index: Tensor, below: int, like: tuple[str, Tensor]) -> None:
    """One-dimensional indices in [0, below); values are looked at on a CPU, uncompiled."""
    check_is_tensor(name, index)
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be torch.int32 or torch.int64, got {index.dtype}")
    if index.ndim != 1:
        raise ValueError(f"{name} must have one axis, got shape {tuple(index.shape)}")
    check_device(name, index, like)
    if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= below:
            raise ValueError(f"{name} must be in [0, {below}), got values from {low} to {high}")


def check_potentials(potentials: tuple[Tensor, Tensor, Tensor]) -> None:
    if not isinstance(potentials, tuple) or len(potentials) != 3:
        got = f"{len(potentials)} values" if isinstance(potentials, tuple) else torch.typename(potentials)
        raise TypeError(f"potentials must be column_max, column and row, got {got}")
    for name, potential in zip(("column_max", "column", "row"), potentials, strict=True):
        check_is_tensor(name, potential)
        if potential.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be torch.float32 or torch.float64, got {potential.dtype}")


def check_chosen(
    name: str, rows: Tensor, potentials: tuple[Tensor, Tensor, Tensor], prototypes: int, like: tuple[str, Tensor]
) -> None:
    """Potentials of [positions, images, prototypes], and image * positions + position of rows chosen of these."""
    check_potentials(potentials)
    column_max, column, row = potentials
    check_tensor("row", row, "positions images")
    positions, images = row.shape
    for potential, x in (("column_max", column_max), ("column", column)):
        check_shape(potential, x, positions=positions, prototypes=prototypes)
    for potential, x in (("column_max", column_max), ("column", column), ("row", row)):
        check_device(potential, x, like)
    check_index(name, rows, positions * images, like)


def check_chosen_logits(name: str, logits: Tensor, row: Tensor, rows: Tensor, prototypes: int) -> None:
    """Logits of all rows that `row` [positions, images] has, or of the chosen ones alone."""
    if logits.ndim == 2:
        check_tensor(name, logits, "selected prototypes")
        check_shape(name, logits, selected=len(rows), prototypes=prototypes)
    else:
        check_tensor(name, logits, "positions images prototypes")
        check_shape(name, logits, positions=row.shape[0], images=row.shape[1], prototypes=prototypes)


def check_heads(name: str, x: Tensor, tokens: str) -> None:
    check_tensor(name, x, f"{tokens} heads head_dim")
    check_not_empty(name, heads=x.shape[1], head_dim=x.shape[2])


def check_rotary(names: tuple[str, str], cos: Tensor | None, sin: Tensor | None, like: tuple[str, Tensor]) -> None:
    """Both tables or neither, float32 (float64 with float64 tokens), [tokens, head_dim] with an even head_dim."""
    if cos is None and sin is None:
        return
    x = like[1]
    allowed = torch.promote_types(x.dtype, torch.float32)
    for name, table in zip(names, (cos, sin), strict=True):
        if table is None:
            raise ValueError(f"{names[0]} and {names[1]} must both be given or both be None, got {name} = None")
        check_is_tensor(name, table)
        if table.dtype not in (torch.float32, allowed):
            raise TypeError(f"{name} must be {allowed}, got {table.dtype}")
        check_shape(name, table, tokens=x.shape[0], head_dim=x.shape[2])
        check_device(name, table, like)
    if x.shape[2] % 2:
        raise ValueError(f"head_dim must be even for a rotary embedding, got {x.shape[2]}")


def check_cu_seqlens(
    name: str, cu_seqlens: Tensor, max_name: str, max_seqlen: int, tokens: int, like: tuple[str, Tensor]
) -> None:
    """int32 [groups + 1] from 0 to the token count without decreasing; values are looked at on a CPU, uncompiled."""
    check_is_tensor(name, cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"{name} must have the shape [groups + 1] with a group or more, got {tuple(cu_seqlens.shape)}")
    check_device(name, cu_seqlens, like)
    check_count(max_name, max_seqlen, 0)
    if (cu_seqlens.numel() - 1) * max_seqlen < tokens:
        groups = cu_seqlens.numel() - 1
        raise ValueError(f"{max_name} must be at least {-(-tokens // groups)} for {tokens} tokens, got {max_seqlen}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    starts = cu_seqlens.tolist()
    if starts[0] != 0:
        raise ValueError(f"{name} must start at 0, got {starts[0]}")
    if starts[-1] != tokens:
        raise ValueError(f"{name} must end at the token count {tokens}, got {starts[-1]}")
    lengths = list(map(sub, starts[1:], starts))
    shortest, longest = min(lengths), max(lengths)
    if shortest < 0:
        raise ValueError(f"{name} must not decrease, got a step of {shortest}")
    if longest > max_seqlen:
        raise ValueError(f"{max_name} must be at least {longest}, the longest sequence, got {max_seqlen}")
