"""The checks of annotations that these tests run under refuse what is wrong, wherever it is."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import jaxtyping
import pytest
import torch
from annotations import check_annotations

beartype_roar = pytest.importorskip("beartype.roar", reason="checks of annotations need beartype")
MODULE = '''
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


def rows(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> Float[Tensor, "n"]:
    return (x + y).sum(1 if x.shape == y.shape and len(x) < 5 else 0)


def text(number: int) -> str:
    return str(number) if number else number


def within(x: Float[Tensor, "n"]) -> tuple[Float[Tensor, "m"], Float[Tensor, "n"]]:
    return rows(x[None], x[None]), x


def closure() -> Callable:
    def nested(number: int) -> str:
        return number

    return nested


@dataclass
class Pair:
    """Of one length."""

    first: Float[Tensor, "n"]
    second: Float[Tensor, "n"]

    @property
    def size(self) -> int:
        return len(self.first) or None

    @classmethod
    def twice(cls, x: Float[Tensor, "n"]) -> "Pair":
        return cls(x, x) if len(x) else x
'''


@pytest.fixture
def module(tmp_path, monkeypatch) -> Iterator[ModuleType]:
    (tmp_path / "annotated_for_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    with check_annotations("annotated_for_a_test"):
        yield importlib.import_module("annotated_for_a_test")
    del sys.modules["annotated_for_a_test"]


def test_what_is_right_passes(module) -> None:
    assert module.rows(torch.ones(2, 3), torch.ones(2, 3)).tolist() == [6, 6]
    assert module.text(3) == "3"
    assert [len(x) for x in module.within(torch.ones(4))] == [1, 4]  # Axes of a call are not those of its caller.
    assert module.Pair.twice(torch.ones(2)).size == 2
    assert module.closure()(3) == 3, "closures are not checked"


WRONG = {
    "axes": lambda m: m.rows(torch.ones(2, 3), torch.ones(2, 4)),
    "dtype": lambda m: m.rows(torch.ones(2, 3), torch.ones(2, 3).long()),
    "returned axes": lambda m: m.rows(torch.ones(6, 3), torch.ones(6, 3)),
    "operand": lambda m: m.text("3"),
    "returned": lambda m: m.text(0),
    "fields": lambda m: m.Pair(torch.ones(2), torch.ones(3)),
    "property": lambda m: m.Pair(torch.ones(0), torch.ones(0)).size,
    "class method": lambda m: m.Pair.twice(torch.ones(2, 2)),
    "returned by class method": lambda m: m.Pair.twice(torch.ones(0)),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused(module, wrong) -> None:
    with pytest.raises((beartype_roar.BeartypeCallHintViolation, jaxtyping.TypeCheckError)):
        wrong(module)


@pytest.mark.usefixtures("without_annotations")
@pytest.mark.parametrize("name", ["operand", "returned", "class method"])
def test_checks_can_be_switched_off(module, name) -> None:
    WRONG[name](module)


def test_the_packages_are_checked() -> None:
    from capi_kernels import reference

    with pytest.raises(beartype_roar.BeartypeCallHintViolation):
        reference.sinkhorn_positionwise([1.0])
