"""The benchmark of large folders."""

import multiprocessing

import pytest

from benchmarks.listing import loaders, make_tree, memory, names
from capi.data import folder
from capi.data.folder import ImageFolder


def test_generated_names_are_those_of_a_tree_in_their_order(tmp_path, monkeypatch) -> None:
    make_tree(tmp_path, 2003)
    tree = ImageFolder(str(tmp_path))
    monkeypatch.setattr(folder, "_image_names", lambda root: names(2003))
    generated = ImageFolder(str(tmp_path))
    assert len(tree) == len(generated) == 2003
    assert all(tree.name(i) == generated.name(i) for i in range(0, 2003, 17))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_loader_shares_the_listing(tmp_path, monkeypatch) -> None:
    """Of 11 MB, it has next to none of its own."""
    monkeypatch.setattr(folder, "_image_names", lambda root: names(300_000))
    source = ImageFolder(str(tmp_path))
    more = []
    for _ in range(3):  # What a fork copies of the rest of this process varies by as much.
        (_, (_, without)), (_, (main, with_listing)) = (loaders(listing, "fork", 1) for listing in (None, source))
        more.append(with_listing["Private"] - without["Private"])
    assert min(more) < 4e6
    assert 0 < memory()["Private"] <= memory()["Pss"]
    assert main["Pss"] > 0
    assert not multiprocessing.active_children()
