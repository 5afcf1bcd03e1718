import numpy as np
import pytest
import torch

from capi.config import MaskingConfig
from capi.masking import Masks, check_masking, sample_masks


def rngs(n: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng((seed, i)) for i in range(n)]


def by_image(indices: torch.Tensor, counts: tuple[int, ...], n_tokens: int) -> list[torch.Tensor]:
    images = [part - i * n_tokens for i, part in enumerate(indices.split(counts))]
    assert all((part >= 0).all() and (part < n_tokens).all() for part in images)
    return images


@pytest.mark.parametrize("kind", ["inverse_block", "block", "random"])
@pytest.mark.parametrize("grid", [(16, 16), (6, 6), (5, 9), (3, 20)])
@pytest.mark.parametrize("mask_ratio", [0.65, (0.3, 0.9)])
def test_masks_partition_the_patches(kind, grid, mask_ratio) -> None:
    masking = MaskingConfig(kind=kind, mask_ratio=mask_ratio, prediction_subsampling=0.5)
    n_tokens = grid[0] * grid[1]
    masks = sample_masks(masking, grid, rngs(40))
    visible = by_image(masks.visible_indices, masks.visible_counts, n_tokens)
    predicted = by_image(masks.predict_indices, masks.predict_counts, n_tokens)
    low, high = mask_ratio if isinstance(mask_ratio, tuple) else (mask_ratio, mask_ratio)
    for seen, guessed in zip(visible, predicted, strict=True):
        assert (seen.diff() > 0).all()
        assert not set(seen.tolist()) & set(guessed.tolist())
        assert len(set(guessed.tolist())) == len(guessed) == int((n_tokens - len(seen)) * 0.5)
        assert int(n_tokens * low) <= n_tokens - len(seen) <= int(n_tokens * high)
    assert (len(set(masks.visible_counts)) > 1) == isinstance(mask_ratio, tuple)


def test_the_papers_counts() -> None:
    masks = sample_masks(MaskingConfig(), (16, 16), rngs(2))
    assert masks.visible_counts == (90, 90)
    assert masks.predict_counts == (8, 8)


def test_predicted_positions_are_a_uniform_unsorted_choice() -> None:
    masking = MaskingConfig(prediction_subsampling=0.2)
    masks = sample_masks(masking, (16, 16), rngs(400))
    predicted = torch.stack(by_image(masks.predict_indices, masks.predict_counts, 256))
    assert (predicted.diff(dim=1) < 0).any(1).double().mean() > 0.99  # in ascending order by chance: 1 in 33!
    first_half = (predicted < 128).double().mean()
    assert abs(float(first_half) - 0.5) < 4 * (0.25 / predicted.numel()) ** 0.5


def test_an_unrolled_block_is_one_rectangle_but_for_its_last_row() -> None:
    masking = MaskingConfig(kind="block", roll=False, mask_ratio=0.3)
    n_masked = int(256 * 0.3)
    masks = sample_masks(masking, (16, 16), rngs(200))
    sizes = []
    for seen in by_image(masks.visible_indices, masks.visible_counts, 256):
        masked = torch.ones(256, dtype=torch.bool)
        masked[seen] = False
        rows, columns = masked.view(16, 16).nonzero().unbind(1)
        height, width = (int(axis.max() - axis.min()) + 1 for axis in (rows, columns))
        assert 0 <= height * width - n_masked < width + 1
        assert 0.5 / 1.3 <= height / width <= 2 * 1.3
        sizes.append((height, width))
    assert len(set(sizes)) > 5


@pytest.mark.parametrize(("low", "high"), [(0.25, 0.5), (2.0, 4.0), (0.8, None), (1.0, 1.0)])
def test_blocks_have_the_aspect_ratios_that_are_asked_for(low, high) -> None:
    masking = MaskingConfig(kind="block", roll=False, mask_ratio=0.25, min_aspect=low, max_aspect=high)
    masks = sample_masks(masking, (128, 128), rngs(200))
    ratios = []
    for seen in by_image(masks.visible_indices, masks.visible_counts, 128**2):
        masked = torch.ones(128**2, dtype=torch.bool)
        masked[seen] = False
        height, width = (int(axis.max() - axis.min()) + 1 for axis in masked.view(128, 128).nonzero().unbind(1))
        ratios.append(height / width)
    largest = high or 1 / low
    assert low / 1.15 <= min(ratios) <= 1.15 * low
    assert largest / 1.15 <= max(ratios) <= 1.15 * largest


def test_roll_wraps_around_the_edges() -> None:
    def touching_both_edges(roll: bool) -> int:
        masks = sample_masks(MaskingConfig(kind="inverse_block", roll=roll), (16, 16), rngs(200))
        visible = by_image(masks.visible_indices, masks.visible_counts, 256)
        return sum(bool((seen < 16).any() and (seen >= 240).any()) for seen in visible)

    assert touching_both_edges(roll=False) == 0
    assert touching_both_edges(roll=True) > 50


def test_one_generator_fixes_one_image() -> None:
    masking = MaskingConfig(mask_ratio=(0.4, 0.8))
    together = sample_masks(masking, (8, 8), rngs(3))
    alone = [sample_masks(masking, (8, 8), [rng]) for rng in rngs(3)]
    assert together.visible_counts == sum((masks.visible_counts for masks in alone), ())
    expected = torch.cat([masks.predict_indices + 64 * i for i, masks in enumerate(alone)])
    assert torch.equal(together.predict_indices, expected)


@pytest.mark.parametrize(
    ("masking", "message"),
    [
        (MaskingConfig(mask_ratio=1.0), r"masking.mask_ratio must lie in \(0, 1\).*got 1.0"),
        (MaskingConfig(mask_ratio=(0.7, 0.5)), "a range ascending, got"),
        (MaskingConfig(prediction_subsampling=0.0), r"prediction_subsampling must lie in \(0, 1\], got 0.0"),
        (MaskingConfig(min_aspect=0.0), "must be a positive ascending range, got 0.0 and None"),
        (MaskingConfig(min_aspect=2.0), "must be a positive ascending range, got 2.0 and None"),
        (MaskingConfig(max_aspect=0.4), "must be a positive ascending range, got 0.5 and 0.4"),
        (MaskingConfig(prediction_subsampling=0.05), "at least one predicted patch an image, got none: 16 patches"),
    ],
)
def test_impossible_masks(masking, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_masking(masking, (4, 4))


def test_moving_keeps_everything() -> None:
    masks = sample_masks(MaskingConfig(), (16, 16), rngs(2)).to("cpu")
    assert isinstance(masks, Masks)
    assert masks.predict_counts == (8, 8)
