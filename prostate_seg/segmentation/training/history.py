"""History of a training: a row per epoch, and the EMA weights of the best one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from prostate_seg.segmentation.settings import Precision
from prostate_seg.segmentation.training.settings import ValMetric


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One row of the history."""

    epoch: int
    loss: float
    val_dice: float | None
    val_iou: float | None
    """Means over the val studies as `validate` measures them, unlike evaluation; None without validation."""
    learning_rate: float
    """Learning rate of the step that follows the epoch."""
    batch_size: int
    """Inputs per forward pass at the end of the epoch; smaller than train.batch_size after a GPU ran out of memory."""
    seconds: float
    """Since training began."""

    def score(self, metric: ValMetric) -> float:
        """Return the value by which epochs are compared; minus infinity without validation."""
        score = self.val_dice if metric == "dice" else self.val_iou
        return -math.inf if score is None else score

    def as_dict(self) -> dict[str, float]:
        """Return metric names and values."""
        val = {"val/dice": self.val_dice, "val/iou": self.val_iou}
        return {
            "train/loss": self.loss,
            **{name: value for name, value in val.items() if value is not None},
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "seconds": self.seconds,
        }


@dataclass(slots=True, kw_only=True)
class TrainingResult:
    """History of a training and the EMA weights of its best epoch."""

    history: list[Epoch] = field(default_factory=list)
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    measured_precision: Precision | None = None
    """What train.precision=auto was on this GPU; None if it was not measured."""

    def add(self, epoch: Epoch, ema_weights: Mapping[str, torch.Tensor], *, metric: ValMetric) -> None:
        """Append an epoch, and keep a copy of its weights if it is the best so far."""
        self.history.append(epoch)
        if not self.weights or best_epoch(self.history, metric=metric) is epoch:
            self.weights = {name: value.detach().clone() for name, value in ema_weights.items()}


def best_epoch(history: Sequence[Epoch], *, metric: ValMetric) -> Epoch:
    """Return the first of the epochs with the highest score."""
    return max(history, key=lambda epoch: epoch.score(metric))
