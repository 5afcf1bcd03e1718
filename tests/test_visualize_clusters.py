"""Clusters of patches, and the contact sheet of those nearest to prototypes."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from capi.config import ClusteringConfig
from capi.heads import OnlineClustering
from capi.visualize import clusters as module
from capi.visualize.clusters import (
    clusters_of,
    colours_of,
    draw_clusters,
    most_frequent,
    nearest_patches,
)
from capi.visualize.sheet import sheet

PATCH, DIM, PROTOTYPES = 4, 8, 12
GRIDS = [(5, 7), (6, 4), (3, 9)]


def layer(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    of_teacher = OnlineClustering(DIM, ClusteringConfig(n_prototypes=PROTOTYPES)).init_weights().layer
    nn.init.normal_(of_teacher.bias)
    return of_teacher.requires_grad_(False)


def random_maps(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*grid, DIM, generator=generator) * 5 for grid in GRIDS]


def coloured_pictures() -> list[torch.Tensor]:
    """Every patch of all of them has a colour of its own: picture, row and column."""
    pictures = []
    for i, (rows, columns) in enumerate(GRIDS):
        colours = torch.zeros(3, rows, columns, dtype=torch.uint8)
        colours[0], colours[1], colours[2] = 60 * i + 20, 20 * torch.arange(rows)[:, None], 20 * torch.arange(columns)
        pictures.append(colours.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2))
    return pictures


def logits(maps: list[torch.Tensor], head: nn.Linear) -> torch.Tensor:
    """z = x / |x| W^T + b of all patches, in float64, picture by picture."""
    x = torch.cat([of_picture.flatten(0, 1) for of_picture in maps]).double()
    return x / x.norm(dim=1, keepdim=True) @ head.weight.double().T + head.bias.double()


def places() -> list[tuple[int, int, int]]:
    return [(i, *place) for i, grid in enumerate(GRIDS) for place in np.ndindex(grid)]


def test_a_patch_takes_the_prototype_of_its_largest_logit(monkeypatch):
    monkeypatch.setattr(module, "_ROWS_AT_A_TIME", 10)
    head, maps = layer(), random_maps()
    found = [clusters_of(x, head) for x in maps]
    assert [tuple(x.shape) for x in found] == GRIDS
    assert torch.equal(torch.cat([x.flatten() for x in found]), logits(maps, head).argmax(1))


def test_the_nearest_patches_are_those_of_the_largest_logits():
    head, maps = layer(), random_maps()
    clusters = [clusters_of(x, head) for x in maps]
    chosen = [7, 0, 11]
    for prototype, nearest in zip(chosen, nearest_patches(maps, clusters, head, chosen, 6), strict=True):
        of_prototype = logits(maps, head)[:, prototype]
        expected = [places()[k] for k in of_prototype.argsort(descending=True)[:6]]
        assert (nearest.prototype, nearest.places) == (prototype, expected)
        assert nearest.share == pytest.approx((logits(maps, head).argmax(1) == prototype).double().mean().item())


def test_more_patches_than_there_are_is_all_of_them():
    head, maps = layer(), random_maps()
    (nearest,) = nearest_patches(maps, [clusters_of(x, head) for x in maps], head, [3], 1000)
    assert sorted(nearest.places) == places()


def test_the_commonest_prototypes_come_first():
    clusters = [torch.tensor([[5, 5, 2]]), torch.tensor([[2], [9], [0]])]
    assert most_frequent(clusters, 3) == [2, 5, 0]  # Of equal ones the lower number.
    assert most_frequent(clusters, 10) == [2, 5, 0, 9]


def test_a_prototype_has_one_colour_in_every_picture_and_no_other_has_it():
    every = colours_of(torch.arange(64))
    assert torch.equal(colours_of(torch.tensor([[63, 5], [5, 17]])), every[torch.tensor([[63, 5], [5, 17]])])
    distances = torch.cdist(every, every) + torch.eye(64)
    assert distances.min() > 0.04
    assert every.min() >= 0
    assert every.max() <= 1


def sheets_of(monkeypatch, **options) -> tuple[list, list, str]:
    """The groups of the pictures, those of the contact sheet, and the note."""
    drawn = []

    def note_them(title, note, *sections):
        drawn.append((*sections, note))
        return sheet(title, note, *sections)

    monkeypatch.setattr(module, "sheet", note_them)
    names = ["a", "b", "c"]
    draw_clusters(coloured_pictures(), random_maps(), layer(), patch_size=PATCH, names=names, **options)
    return drawn[0]


def test_the_contact_sheet_shows_the_nearest_patches_themselves(monkeypatch):
    _, rows, _ = sheets_of(monkeypatch, prototypes=[4, 9], n_nearest=5)
    assert len(rows) == 2
    for prototype, (swatch, *panels) in zip([4, 9], rows, strict=True):
        of_prototype = logits(random_maps(), layer())[:, prototype]
        expected = [places()[k] for k in of_prototype.argsort(descending=True)[:5]]
        share = 100 * (logits(random_maps(), layer()).argmax(1) == prototype).double().mean().item()
        assert swatch.caption == f"{prototype}: {share:.1f} %"
        assert (swatch.pixels == (colours_of(torch.tensor([prototype])) * 255).round().byte().numpy()).all()
        assert len(panels) == 5
        for panel, (i, row, column) in zip(panels, expected, strict=True):
            # Its own colour in the middle of the frame; others differ by 20 at least.
            middle = panel.pixels.shape[0] // 2
            within = panel.pixels[middle - 1 : middle + 1, middle - 1 : middle + 1].astype(int)
            assert np.abs(within - [60 * i + 20, 20 * row, 20 * column]).max() < 8


def test_patches_that_a_picture_ends_in_are_not_among_the_nearest(monkeypatch):
    pictures, maps, head = coloured_pictures(), random_maps(), layer()
    cut = [picture[:, :-1, :-1] for picture in pictures]
    drawn = []
    monkeypatch.setattr(module, "nearest_patches", lambda *given: drawn.append(given) or nearest_patches(*given))
    draw_clusters(cut, maps, head, patch_size=PATCH, names=["a", "b", "c"], prototypes=[4], n_nearest=1000)
    (nearest,) = nearest_patches(*drawn[0])
    whole = [(i, row, column) for i, row, column in places() if row < GRIDS[i][0] - 1 and column < GRIDS[i][1] - 1]
    assert sorted(nearest.places) == whole


def test_by_default_the_commonest_prototypes_are_shown(monkeypatch):
    pictures, rows, note = sheets_of(monkeypatch)
    taken = logits(random_maps(), layer()).argmax(1)
    expected = most_frequent([taken[None]], 8)
    assert [int(swatch.caption.split(":")[0]) for swatch, *_ in rows] == expected
    assert [panels[0].caption for panels in pictures] == ["a", "b", "c"]
    assert f"12 prototypes, of which {len(taken.unique())} are taken here" in note


def test_every_patch_has_the_colour_of_its_prototype(monkeypatch):
    pictures, _, _ = sheets_of(monkeypatch)
    maps, head = random_maps(), layer()
    for (picture, coloured), of_map in zip(pictures, maps, strict=True):
        assert picture.pixels.shape == coloured.pixels.shape
        side = coloured.pixels.shape[0] // of_map.shape[0]
        colours = (colours_of(clusters_of(of_map, head)) * 255).round().byte()
        for row, column in np.ndindex(*of_map.shape[:2]):
            patch = coloured.pixels[row * side : (row + 1) * side, column * side : (column + 1) * side]
            assert (patch == colours[row, column].numpy()).all()


def test_what_cannot_be_drawn():
    pictures, maps, names = coloured_pictures(), random_maps(), ["a", "b", "c"]
    for number in (-1, 12):
        with pytest.raises(ValueError, match=f"prototypes must be from 0 to 11, got {number}"):
            draw_clusters(pictures, maps, layer(), patch_size=PATCH, names=names, prototypes=[3, number])
    maps[2][0, 0, 0] = math.inf
    with pytest.raises(ValueError, match="must be finite"):
        draw_clusters(pictures, maps, layer(), patch_size=PATCH, names=names)
