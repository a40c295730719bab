"""Settings of the group `preprocess`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from prostate_seg.common.settings import Range, RisingPair, Rule, Settings

Crop = Literal["center", "mask"]
Auto = Literal["auto"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessConfig(Settings):
    """How a volume is prepared for the network."""

    spacing_mm: tuple[float, float, float] | Auto | None
    """Voxel edge lengths (z, y, x) to resample to; auto takes medians of the data set, null keeps those of each study."""
    image_size: Annotated[int | Auto, Range(ge=32, le=1024)]
    """Edge length in voxels of the square that is kept of every slice; auto contains every gland with a margin of 10 mm."""
    crop: Crop
    """Centre of the square: that of the image, or of the reference mask, which marks every number `oracle_crop`."""
    to_8bit: bool
    """Whether intensities are rescaled to 0 to 255; otherwise they are kept as float32."""
    intensity_percentiles: Annotated[tuple[float, float], RisingPair(0, 100)]
    """Percentiles of the kept region that are mapped to 0 and 255."""

    def _rules(self) -> list[Rule]:
        spacing = self.spacing_mm
        is_spacing = (
            spacing is None or spacing == "auto" or (len(spacing) == 3 and all(0.1 <= mm <= 20 for mm in spacing))
        )
        return [("spacing_mm", is_spacing, "must be null, auto or three lengths (z, y, x) from 0.1 to 20")]
