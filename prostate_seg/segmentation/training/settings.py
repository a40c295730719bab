"""Settings of the group `train`. No torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from prostate_seg.common.settings import PathText, Range, Rule, Settings
from prostate_seg.segmentation.settings import Precision

Loss = Literal["bce", "dice", "dice_ce", "iou", "focal_dice"]
ValMetric = Literal["dice", "iou"]
TrainingSlices = Literal["all", "gland"]
Optimizer = Literal["adamw", "adam"]
Augmentation = Literal["none", "standard", "coil", "strong"]
Frozen = Literal["encoder"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Settings):
    """Optimisation of the network's weights."""

    init: PathText | None
    """Weights to start from: models:/NAME@ALIAS, models:/NAME/VERSION, the id of a run, or a folder; null for random ones."""
    freeze: Frozen | None
    """Part of the network that keeps its initial weights and running statistics; null trains all of it."""
    loss: Loss
    """Loss function."""
    metric: ValMetric
    """Metric for choosing the weights: mean over the val studies, on the network's grid, at threshold 0.5."""
    optimizer: Optimizer
    """Optimizer used for training."""
    learning_rate: Annotated[float, Range(gt=0, le=1)]
    """Peak learning rate."""
    weight_decay: Annotated[float, Range(ge=0, le=1)]
    """Decoupled weight decay (adamw) or L2 penalty (adam) of convolution weights; none on biases, norms and PReLU."""
    schedule: Literal["cosine", "constant"]
    """Learning rate schedule over the training budget."""
    warmup_fraction: Annotated[float, Range(ge=0, lt=1)]
    """Fraction of the budget during which the learning rate rises linearly from 0."""
    batch_size: Annotated[int, Range(ge=1, le=4096)]
    """Slices, or 3-D patches, per step."""
    steps_per_epoch: Annotated[int | None, Range(ge=1, le=100_000)]
    """Steps per epoch; null for one pass over the training slices. Validation runs every epoch or every few."""
    max_epochs: Annotated[int, Range(ge=1, le=100_000)]
    """Maximum number of epochs per fold, and end of the schedule."""
    max_minutes: Annotated[float | None, Range(gt=0)]
    """Maximum training time per fold in minutes, and end of the schedule if reached first; null for no limit."""
    slices: TrainingSlices
    """Training slices of a 2-D network: all, or those with gland."""
    augmentation: Augmentation
    """Random transforms of training images; coil adds simulated endorectal coils, strong varies intensities more."""
    ema_decay: Annotated[float, Range(ge=0, lt=1)]
    """Decay per step of the EMA weights, which are validated and saved; smaller in the first steps; 0 disables EMA."""
    zscore: bool
    """Whether each image is clipped to its 5th to 95th percentile and standardised to mean 0 and SD 1."""
    precision: Precision
    """Number format; auto takes bfloat16 if the CPU computes in it, and what is measured to be faster on a GPU."""
    deterministic: bool
    """Whether two runs on one machine give the same bits; slower."""

    def _rules(self) -> list[Rule]:
        init_rule = "must be null, models:/NAME@ALIAS, models:/NAME/VERSION, the id of a run, or a folder"
        freeze_rule = "must be null without train.init: random weights are trained"
        return [
            ("init", self.init is None or bool(self.init.strip()), init_rule),
            ("freeze", self.freeze is None or self.init is not None, freeze_rule),
        ]
