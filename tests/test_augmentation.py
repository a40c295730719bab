"""Spatial transforms apply to image and mask alike, masks stay binary, and the rng determines the result."""

from typing import get_args

import pytest
import torch

from prostate_seg.segmentation.training import augmentation
from prostate_seg.segmentation.training.augmentation import augment
from prostate_seg.segmentation.training.settings import Augmentation


def batch(num: int = 32, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    disc = (torch.hypot(y - 28, x - 36) < 14).float().expand(num, 1, 64, 64).clone()
    return (2 * disc - 0.5).repeat(1, channels, 1, 1), disc


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", list(augmentation.INTENSITIES))
def test_shapes_stay_and_masks_stay_binary(kind: Augmentation) -> None:
    images, masks = batch(channels=3)
    moved, moved_masks = augment(images, masks, rng=rng(), kind=kind)
    assert moved.shape == images.shape
    assert moved_masks.shape == masks.shape
    assert set(moved_masks.unique().tolist()) == {0.0, 1.0}
    assert moved.isfinite().all()


def test_image_moves_with_its_mask() -> None:
    moved, masks = augment(*batch(), rng=rng())
    inside = (moved * masks).sum(dim=(1, 2, 3)) / masks.sum(dim=(1, 2, 3))
    outside = (moved * (1 - masks)).sum(dim=(1, 2, 3)) / (1 - masks).sum(dim=(1, 2, 3))
    assert (inside - outside > 1).all()


def test_inputs_of_a_batch_have_different_transforms() -> None:
    _, masks = augment(*batch(), rng=rng())
    assert len({tuple(mask.flatten().nonzero().flatten().tolist()) for mask in masks}) == len(masks)


def test_slices_of_one_input_share_a_transform() -> None:
    images, masks = batch(channels=2)
    moved, _ = augment(images, masks, rng=rng())
    difference = (moved[:, 0] - moved[:, 1]).abs().mean()
    assert difference < 0.2  # noise alone differs between the slices


def test_same_generator_same_bits_other_seed_other_bits() -> None:
    first, again, other = (augment(*batch(), rng=rng(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_strong_changes_intensities_more_and_positions_as_standard() -> None:
    (standard, masks), (strong, moved_masks) = (
        augment(*batch(num=64), rng=rng(), kind=k) for k in ("standard", "strong")
    )
    assert torch.equal(masks, moved_masks)
    inside = [image[mask > 0.5].mean() for image, mask in zip(standard, masks, strict=True)]
    stronger = [image[mask > 0.5].mean() for image, mask in zip(strong, masks, strict=True)]
    assert torch.stack(stronger).std() > 1.5 * torch.stack(inside).std()


def test_every_option_of_the_setting_has_intensities_but_none() -> None:
    assert {*augmentation.INTENSITIES, "none"} == set(get_args(Augmentation))


def test_areas_change_by_at_most_the_scale_range() -> None:
    images, masks = batch(num=200)
    _, moved = augment(images, masks, rng=rng())
    ratio = moved.sum(dim=(1, 2, 3)) / masks[0].sum()
    low, high = augmentation.SCALE_RANGE
    assert ratio.min() > low**2 * 0.8
    assert ratio.max() < high**2 * 1.25
    assert 0.8 < ratio.mean() < 1.25


def test_coil_brightens_the_posterior_side_and_keeps_mean_and_sd() -> None:
    images = torch.rand((64, 3, 48, 48), generator=rng())
    brightened = augmentation._coil(images.clone(), rng=rng(1))
    torch.testing.assert_close(brightened.mean(dim=(1, 2, 3)), images.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(brightened.std(dim=(1, 2, 3)), images.std(dim=(1, 2, 3)))
    front, back = (brightened - images)[:, :, :8].mean(), (brightened - images)[:, :, -24:].mean()
    assert back > front + 0.05
    assert len({float(value) for value in brightened[:, 0, 0, 0]}) == 64
