"""Features as colours, and the sheets that pictures stand on."""

import math

import numpy as np
import pytest
import torch

from capi.visualize import pca
from capi.visualize.pca import draw_pca, principal_colours
from capi.visualize.sheet import Panel, sheet


def random_maps(*sizes: tuple[int, int], dim: int = 8, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(1, 3, dim)
    return [torch.randn(*size, dim, generator=generator) * scale for size in sizes]


def test_colours_are_joint_over_the_images_and_fill_the_range():
    maps = random_maps((4, 5), (40, 30))
    maps[1][0, 0] = maps[0][3, 4]
    colours = principal_colours(maps)
    assert [x.shape for x in colours] == [(4, 5, 3), (40, 30, 3)]
    torch.testing.assert_close(colours[1][0, 0], colours[0][3, 4])
    every = torch.cat([x.flatten(0, 1) for x in colours])
    assert ((every < 0).float().mean(0) - 0.02).abs().max() < 0.002
    assert ((every > 1).float().mean(0) - 0.02).abs().max() < 0.002


def test_colours_follow_the_directions_of_largest_spread():
    generator = torch.Generator().manual_seed(1)
    latent = (torch.rand(200, 3, generator=generator) * 2 - 1) * torch.tensor([9.0, 3, 1])
    directions, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    features = latent @ directions[:, :3].T + 0.01 * torch.randn(200, 16, generator=generator) + 5
    (colours,) = principal_colours([features.view(10, 20, 16)])
    for channel in range(3):
        correlation = torch.corrcoef(torch.stack([colours.view(200, 3)[:, channel], latent[:, channel]]))[0, 1]
        sign = directions[directions[:, channel].abs().argmax(), channel].sign()
        assert correlation * sign > 0.98


def test_signs_are_those_of_a_rule_not_of_a_library(monkeypatch):
    maps = random_maps((6, 7))
    (colours,) = principal_colours(maps)
    eigh = torch.linalg.eigh

    def mirrored(x):
        values, axes = eigh(x)
        return values, -axes

    monkeypatch.setattr(torch.linalg, "eigh", mirrored)
    assert torch.equal(principal_colours(maps)[0], colours)


def test_colours_do_not_depend_on_the_order_of_the_images():
    maps = random_maps((6, 7), (3, 9), (8, 2))
    one, other = principal_colours(maps), principal_colours(maps[::-1])[::-1]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [1, 2, 3, 8])
def test_constant_features_are_grey(dim):
    (colours,) = principal_colours([torch.full((3, 3, dim), 7.3)])
    assert torch.equal(colours, torch.full((3, 3, 3), 0.5))


def test_fewer_dimensions_than_colours():
    (colours,) = principal_colours([torch.arange(8.0).view(2, 4, 1)])
    assert colours[..., 0].min() == 0
    assert colours[..., 0].max() == 1
    assert torch.equal(colours[..., 1:], torch.full((2, 4, 2), 0.5))


def flat_pictures() -> list[torch.Tensor]:
    """Of one colour each, and of several sizes."""
    sizes = [(40, 100), (96, 96), (300, 210), (50, 50), (8, 8)]
    return [
        torch.tensor([200, 40 * i, 90], dtype=torch.uint8)[:, None, None].expand(3, *size)
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("crisp", [False, True])
@pytest.mark.parametrize("n", [1, 5])
def test_every_image_stands_beside_its_map(n, crisp, per_image):
    pictures = flat_pictures()[:n]
    maps = random_maps(*[(-(-x.shape[1] // 8), -(-x.shape[2] // 8)) for x in pictures])
    image = np.asarray(draw_pca(pictures, maps, cell=8, crisp=crisp, per_image=per_image)).astype(int)
    colours = [principal_colours([x])[0] for x in maps] if per_image else principal_colours(maps)
    for i, (picture, of_map) in enumerate(zip(pictures, colours, strict=True)):
        rows, columns = np.nonzero((image == [200, 40 * i, 90]).all(axis=2))
        times = max(1, round(200 / max(picture.shape[1:])))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert (height, width) == (times * picture.shape[1], times * picture.shape[2])
        assert len(rows) == height * width
        beside = image[rows.min() :, columns.max() + 7 :][:height, :width]
        for row, column in (0, 0), (of_map.shape[0] // 2, of_map.shape[1] // 2):
            y, x = (times * (8 * at + 4) for at in (row, column))
            expected = (of_map[row, column].clamp(0, 1) * 255).round().int().numpy()
            if crisp:
                assert (beside[y, x] == expected).all()
            elif times == 1 and of_map.shape[0] > 8:  # Between pixels, for an even number of them a cell.
                assert np.abs(beside[y - 1 : y + 1, x - 1 : x + 1].mean((0, 1)) - expected).max() < 20


def test_in_a_mode_of_its_own_an_image_has_its_colours_whatever_stands_beside_it():
    pictures, maps = flat_pictures()[1:3], random_maps((12, 12), (38, 27))
    joint = [np.asarray(draw_pca(pictures[:k], maps[:k], cell=8)) for k in (1, 2)]
    alone = [np.asarray(draw_pca(pictures[:k], maps[:k], cell=8, per_image=True)) for k in (1, 2)]

    def beside_the_first(image):
        rows, columns = np.nonzero((image == [200, 40, 90]).all(axis=2))
        return image[rows.min() : rows.max(), columns.max() + 7 :][:, : np.ptp(columns)]

    assert (beside_the_first(alone[0]) == beside_the_first(alone[1])).all()
    assert (beside_the_first(joint[0]) != beside_the_first(joint[1])).any()


def panels_of(monkeypatch, *arguments, **options) -> list[list[Panel]]:
    """The groups that are drawn."""
    drawn = []

    def note_them(title, note, *sections):
        drawn.extend(group for section in sections for group in section)
        return sheet(title, note, *sections)

    monkeypatch.setattr(pca, "sheet", note_them)
    draw_pca(*arguments, **options)
    return drawn


def test_permuting_images_permutes_the_pictures_of_each_alone(monkeypatch):
    pictures, maps, order = flat_pictures()[:3], random_maps((5, 13), (12, 12), (38, 27)), [2, 0, 1]
    one = panels_of(monkeypatch, pictures, maps, cell=8, per_image=True)
    other = panels_of(monkeypatch, [pictures[i] for i in order], [maps[i] for i in order], cell=8, per_image=True)
    for i, group in zip(order, other, strict=True):
        assert all((a.pixels == b.pixels).all() for a, b in zip(group, one[i], strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_maps_of_any_precision_also_with_a_gradient(dtype):
    maps = [random_maps((5, 13))[0].to(dtype).requires_grad_()]
    assert np.asarray(draw_pca(flat_pictures()[:1], maps, cell=8)).std() > 0


def test_what_cannot_be_drawn():
    pictures, maps = flat_pictures()[:2], random_maps((5, 13), (12, 12))
    with pytest.raises(ValueError, match="as many images as feature maps, got 0 and 0"):
        draw_pca([], [], cell=8)
    with pytest.raises(ValueError, match="as many images as feature maps, got 2 and 1"):
        draw_pca(pictures, maps[:1], cell=8)
    maps[1][0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="must be finite"):
        draw_pca(pictures, maps, cell=8)


def test_words_stay_within_the_sheet():
    pixels = np.full((30, 40, 3), [0, 200, 0], dtype=np.uint8)
    words = "a-word-that-is-far-longer-than-any-sheet-is-wide/" * 9
    image = np.asarray(sheet("Title " + words, "Note " + words, [[Panel(pixels, words), Panel(pixels, "b")]])).astype(
        int
    )
    margin = np.concatenate([image[:, :16].reshape(-1, 3), image[:, -16:].reshape(-1, 3)])
    assert (margin == 255).all()
    green = (image == [0, 200, 0]).all(axis=2)
    assert green.sum() == 2 * 30 * 40
