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
    dice, cross_entropy = DiceLoss(sigmoid=True, batch=True), nn.BCEWithLogitsLoss()
    losses: dict[Loss, LossFunction] = {
        "bce": cross_entropy,
        "dice": dice,
        "dice_ce": lambda logits, masks: dice(logits, masks) + cross_entropy(logits, masks),
        "iou": DiceLoss(sigmoid=True, batch=True, jaccard=True),
        "focal_dice": DiceFocalLoss(sigmoid=True, batch=True),
    }
    return losses[name]
