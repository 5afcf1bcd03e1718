"""Which GPU tests run, and under which warnings."""

import warnings
from collections import Counter

import pytest
from stratified import stratified

ITEMS = [("few", i) for i in range(3)] + [("many", i) for i in range(200)] + [("some", i) for i in range(20)]


@pytest.mark.parametrize("count", [3, 10, 30, 60, 500])
def test_a_choice_of_tests_leaves_no_kind_out(count: int) -> None:
    chosen = stratified(ITEMS, count, lambda item: item[0])
    assert len(chosen) == min(count, len(ITEMS))
    assert chosen == [item for item in ITEMS if item in chosen], "in their order"
    shares = Counter(kind for kind, _ in chosen)
    for kind, all_of_kind in Counter(kind for kind, _ in ITEMS).items():
        assert shares[kind] == all_of_kind or shares[kind] >= max(shares.values()) - 1


def test_a_choice_is_spread_over_the_parameters_of_a_test() -> None:
    chosen = [i for kind, i in stratified(ITEMS, 33, lambda item: item[0]) if kind == "many"]
    gaps = [b - a for a, b in zip([0, *chosen], [*chosen, 200], strict=True)]
    assert max(gaps) <= 2 * 200 / len(chosen)


def test_of_fewer_than_there_are_kinds_not_the_first_alone_are_chosen() -> None:
    chosen = stratified(list("abcdefgh"), 4, lambda item: item)
    assert chosen[-1] > "e"


class Session:
    """Collected tests of two functions, all but one of which need a GPU."""

    def __init__(self):
        self.deselected: list = []
        self.config = self.hook = self
        self.items = [Item(f"test_{i % 2}", True) for i in range(100)] + [Item("test_on_a_cpu", False)]

    def pytest_deselected(self, items: list) -> None:
        self.deselected += items


class Item:
    path = "tests/test_kernels.py"

    def __init__(self, originalname: str, gpu: bool):
        self.originalname, self.gpu = originalname, gpu

    def get_closest_marker(self, name: str) -> bool:
        return self.gpu and name == "gpu"


def test_gpu_tests_are_chosen_on_request_and_all_run_by_default() -> None:
    from conftest import choose_gpu_tests

    session = Session()
    everything = list(session.items)
    choose_gpu_tests(session, session.items, "all")
    assert session.items == everything
    choose_gpu_tests(session, session.items, "10")
    assert Counter(item.originalname for item in session.items) == {"test_0": 5, "test_1": 5, "test_on_a_cpu": 1}
    assert len(session.deselected) == 90


def test_a_warning_of_pytorch_about_itself_is_no_error() -> None:
    text = "`torch.jit.script_method` is deprecated. Please switch to `torch.compile` or `torch.export`."
    warnings.warn(text, DeprecationWarning, stacklevel=2)
    with pytest.raises(DeprecationWarning):
        warnings.warn("another function is deprecated", DeprecationWarning, stacklevel=2)
