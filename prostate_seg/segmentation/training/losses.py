"""The losses, by name, from MONAI and torch. Each takes logits and a 0/1 mask of the same shape, [B, 1, ...]."""

from collections.abc import Callable

import torch
from monai.losses.dice import DiceCELoss, DiceFocalLoss, DiceLoss
from torch import nn

from prostate_seg.config.schema import Loss

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def build_loss(name: Loss) -> LossFunction:
    """Return a loss; Dice is pooled over the batch, because a slice without gland has no Dice of its own."""
    losses: dict[Loss, Callable[[], nn.Module]] = {
        Loss.bce: nn.BCEWithLogitsLoss,
        Loss.dice: lambda: DiceLoss(sigmoid=True, batch=True),
        Loss.dice_ce: lambda: DiceCELoss(sigmoid=True, batch=True),
        Loss.iou: lambda: DiceLoss(sigmoid=True, batch=True, jaccard=True),
        Loss.focal_dice: lambda: DiceFocalLoss(sigmoid=True, batch=True),
    }
    return losses[name]()
