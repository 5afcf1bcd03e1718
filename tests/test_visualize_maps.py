"""Feature maps of pictures of any size."""

import numpy as np
import pytest
import torch
from torch import nn

from capi.config import ModelConfig
from capi.model import Backbone, normalize_images
from capi.visualize import maps
from capi.visualize.maps import feature_map, upsampled

PATCH = 4


class PatchMeans(nn.Module):
    """An encoder to which a patch is its mean colour, beside where it lies in what is seen (from 0 to 1)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[torch.Size] = []

    def forward(self, images):
        self.seen.append(images.shape)
        means = nn.functional.avg_pool2d(images, PATCH).permute(0, 2, 3, 1)
        place = torch.stack(
            torch.meshgrid(*(torch.linspace(0, 1, n) for n in means.shape[1:3]), indexing="ij"), dim=-1
        ).expand(len(images), -1, -1, -1)
        return None, None, torch.cat([means, place], dim=-1)


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def continued(image: torch.Tensor) -> torch.Tensor:
    """To whole patches, by the mirror image."""
    margins = [(0, 0), *((0, -side % PATCH) for side in image.shape[1:])]
    return torch.from_numpy(np.pad(image.numpy(), margins, mode="symmetric"))


@pytest.mark.parametrize("size", [(16, 24), (13, 22), (1, 3), (48 * PATCH, PATCH)])
def test_in_one_window_the_map_is_the_encoders_own(size):
    torch.manual_seed(0)
    config = ModelConfig(PATCH, embed_dim=16, num_heads=2, encoder_depth=2, predictor_depth=1, n_registers=4)
    backbone = Backbone(config).init_weights().eval()
    image = picture(*size)
    with torch.no_grad():
        expected = backbone(normalize_images(continued(image)[None]))[2][0]
    assert torch.equal(feature_map(backbone, image, PATCH), expected)


@pytest.mark.parametrize("size", [(41, 30), (64, 12), (24, 100)])
@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_windows_show_every_patch_in_its_place(size, window):
    image = picture(*size)
    whole, parts = (feature_map(PatchMeans(), image, PATCH, window=n) for n in (100, window))
    assert whole.shape == (-(-size[0] // PATCH), -(-size[1] // PATCH), 5)
    torch.testing.assert_close(parts[..., :3], whole[..., :3], rtol=0, atol=1e-5)


def test_windows_leave_no_seams():
    """What an encoder makes of a place within its window differs most where one window ends: it must fade."""
    place = feature_map(PatchMeans(), picture(40 * PATCH, 40 * PATCH), PATCH, window=8)[..., 3:]
    # Within a window neighbours differ by 1/7; windows that are put side by side would differ by 0.5 or more.
    assert place[1:, :, 0].sub(place[:-1, :, 0]).abs().max() < 0.2
    assert place[:, 1:, 1].sub(place[:, :-1, 1]).abs().max() < 0.2
    assert place.std() > 0.1


@pytest.mark.parametrize("finer", [2, 4])
def test_a_finer_cell_has_the_mean_of_the_patches_that_cover_it(finer):
    image = picture(22, 17)
    found = feature_map(PatchMeans(), image, PATCH, finer=finer)[..., :3]
    cell, shifts, margin = PATCH // finer, range(-(finer // 2), finer - finer // 2), 2 * PATCH
    margins = [(0, 0), *((margin, margin + -side % PATCH) for side in image.shape[1:])]
    normal = normalize_images(torch.from_numpy(np.pad(image.numpy(), margins, mode="symmetric")))
    rows, columns = (-(-side // PATCH) * finer for side in image.shape[1:])
    assert found.shape == (rows, columns, 3)

    def starts(at: int, cells: int) -> list[int]:
        """Of the views, shifted by so many cells, the patches that cover the cell at this place."""
        covering = [(shift, (at - shift) // finer * finer + shift) for shift in shifts]
        return [start for shift, start in covering if shift <= start <= cells - finer + shift]

    for row in range(rows):
        for column in range(columns):
            patches = [
                normal[:, margin + top * cell :, margin + left * cell :][:, :PATCH, :PATCH].mean((1, 2))
                for top in starts(row, rows)
                for left in starts(column, columns)
            ]
            torch.testing.assert_close(found[row, column], torch.stack(patches).mean(0), rtol=0, atol=1e-5)


def test_what_is_seen_at_a_time_is_bounded():
    encoder = PatchMeans()
    feature_map(encoder, picture(50 * PATCH, 90 * PATCH), PATCH, window=16, finer=2)
    assert all(n * height * width <= 4096 * PATCH**2 for n, _, height, width in encoder.seen)
    assert all(shape[2:] == (16 * PATCH, 16 * PATCH) for shape in encoder.seen)
    assert len(encoder.seen) > 1


def test_what_no_map_can_be_made_of():
    for finer in (0, 3):
        with pytest.raises(ValueError, match=f"finer must divide the patch size 4, got {finer}"):
            feature_map(PatchMeans(), picture(8, 8), PATCH, finer=finer)
    with pytest.raises(ValueError, match="window must be at least 1 patch, got 0"):
        feature_map(PatchMeans(), picture(8, 8), PATCH, window=0)


def test_cells_as_pixels():
    cells = torch.rand(3, 4, 2)
    crisp = upsampled(cells, 5, 13, 18, crisp=True)
    assert crisp.shape == (13, 18, 2)
    assert torch.equal(crisp[12, 17], cells[2, 3])
    assert torch.equal(crisp[4, 5], cells[0, 1])
    smooth = upsampled(cells, 5, 13, 18, crisp=False)
    # At the middle of a cell the interpolation has its value.
    torch.testing.assert_close(smooth[7, 7], cells[1, 1])
    assert not torch.equal(smooth[5:10, 5:10], crisp[5:10, 5:10])


def test_the_default_window_holds_what_a_training_sees():
    assert maps.WINDOW >= 2 * 16
