"""Every loss is near 0 for a correct and confident prediction and larger for a wrong one, in 2-D and in 3-D."""

from typing import get_args

import pytest
import torch
from monai.losses.dice import DiceCELoss

from prostate_seg.segmentation.training.losses import build_loss
from prostate_seg.segmentation.training.settings import Loss
from prostate_seg.segmentation.training.training_step import TrainingStep
from tests.segmentation_helpers import train_settings


def target(*shape: int) -> torch.Tensor:
    mask = torch.zeros(shape)
    mask[..., 4:12, 4:12] = 1
    return mask


@pytest.mark.parametrize("name", get_args(Loss))
@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 1, 4, 16, 16)], ids=["2-D", "3-D"])
def test_loss_is_near_zero_only_for_the_correct_mask(name: Loss, shape: tuple[int, ...]) -> None:
    loss, mask = build_loss(name), target(*shape)
    logits = 40 * mask - 20
    assert loss(logits, mask) < 0.01
    assert loss(-logits, mask) > 0.5


@pytest.mark.parametrize("name", get_args(Loss))
@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 4, 16, 16)], ids=["2-D", "3-D"])
def test_loss_of_several_regions_is_the_mean_of_theirs(name: Loss, shape: tuple[int, ...]) -> None:
    loss, masks = build_loss(name), target(*shape)
    masks[:, 1, ..., 8:] = 0
    masks[:, 2] = 0
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    each = [loss(logits[:, part], masks[:, part]) for part in (slice(0, 1), slice(1, 2), slice(2, 3))]
    torch.testing.assert_close(loss(logits, masks), torch.stack(each).mean())


def test_dice_ce_of_one_region_has_the_bits_of_monai() -> None:
    logits, mask = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)), target(2, 1, 16, 16)
    assert torch.equal(build_loss("dice_ce")(logits, mask), DiceCELoss(sigmoid=True, batch=True)(logits, mask))


@pytest.mark.parametrize("volumetric", [False, True], ids=["2-D", "3-D"])
def test_training_step_gives_the_loss_one_channel(volumetric: bool) -> None:
    """MONAI treats several channels as exclusive classes, and slices are not classes."""
    mask = target(2, 4, 16, 16) if volumetric else target(2, 1, 16, 16)
    network = torch.nn.Conv3d(1, 1, 1) if volumetric else torch.nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        network.weight.fill_(40.0)
        network.bias.fill_(-20.0)  # type: ignore[union-attr]
    step = TrainingStep(network, settings=train_settings(), device=torch.device("cpu"), volumetric=volumetric)
    assert step.backward(mask, mask) < 0.01
