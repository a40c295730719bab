"""Loss functions by name, from MONAI and torch; each takes logits and 0/1 masks of the same shape, [B, regions, ...].

A loss is the mean of those of the regions. MONAI's DiceCELoss would take several channels as classes that exclude each other.
"""

from collections.abc import Callable

import torch
from monai.losses.dice import DiceFocalLoss, DiceLoss
from torch import nn

from prostate_seg.segmentation.training.settings import Loss

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def build_loss(name: Loss) -> LossFunction:
    """Return a loss function; Dice is pooled over the batch, because it is undefined for a slice without gland."""
    losses: dict[Loss, Callable[[], LossFunction]] = {
        "bce": nn.BCEWithLogitsLoss,
        "dice": lambda: DiceLoss(sigmoid=True, batch=True),
        "dice_ce": _dice_cross_entropy,
        "iou": lambda: DiceLoss(sigmoid=True, batch=True, jaccard=True),
        "focal_dice": lambda: DiceFocalLoss(sigmoid=True, batch=True),
    }
    return losses[name]()


def _dice_cross_entropy() -> LossFunction:
    dice, cross_entropy = DiceLoss(sigmoid=True, batch=True), nn.BCEWithLogitsLoss()
    return lambda logits, masks: dice(logits, masks) + cross_entropy(logits, masks)
