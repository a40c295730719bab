"""Loss functions by name, from MONAI and torch; each takes logits and a 0/1 mask of the same shape, [B, 1, ...]."""

from collections.abc import Callable

import torch
from monai.losses.dice import DiceCELoss, DiceFocalLoss, DiceLoss
from torch import nn

from prostate_seg.segmentation.training.settings import Loss

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def build_loss(name: Loss) -> LossFunction:
    """Return a loss function; Dice is pooled over the batch, because it is undefined for a slice without gland."""
    losses: dict[Loss, Callable[[], nn.Module]] = {
        "bce": nn.BCEWithLogitsLoss,
        "dice": lambda: DiceLoss(sigmoid=True, batch=True),
        "dice_ce": lambda: DiceCELoss(sigmoid=True, batch=True),
        "iou": lambda: DiceLoss(sigmoid=True, batch=True, jaccard=True),
        "focal_dice": lambda: DiceFocalLoss(sigmoid=True, batch=True),
    }
    return losses[name]()
