"""Settings of the group `evaluate`. No torch."""

from dataclasses import dataclass, fields
from typing import Annotated, Self

from prostate_seg.common.settings import PathText, Range, Settings
from prostate_seg.segmentation.settings import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceSettings(Settings):
    """How a mask is made from the outputs of the networks."""

    threshold: Annotated[float, Range(gt=0, lt=1)]
    """Lowest probability of a gland voxel."""
    largest_component: bool
    """Whether only the largest connected component is kept."""
    tta: bool
    """Whether test-time augmentation averages in the prediction of the left-right mirrored image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage(InferenceSettings):
    """How networks are run and a mask is made from their outputs: the content of segmentation.json."""

    precision: Precision

    @classmethod
    def of(cls, settings: InferenceSettings, *, precision: Precision) -> Self:
        """Return the inference settings of an evaluation."""
        values = {field.name: getattr(settings, field.name) for field in fields(InferenceSettings)}
        return cls(**values, precision=precision)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(InferenceSettings):
    """Inference and metrics of the evaluation."""

    num_bootstrap: Annotated[int, Range(ge=100, le=100_000)]
    """Bootstrap samples per confidence interval."""
    coverage: Annotated[float, Range(gt=0, lt=1)]
    """Fraction of patients for whom the lower bound of expected Dice is to hold."""
    external_root: PathText | None
    """Data folder, laid out as data.root may be, for evaluating the ensemble of all folds instead of the test cases."""
    external_labels: dict[str, int] | None
    """Value of each named mask label in external_root, which zones need; null takes the names in its files."""
