"""Settings of the groups `preprocess` and `target`."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from prostate_seg.common.settings import Range, RisingPair, Rule, Settings

Crop = Literal["center", "mask"]
Auto = Literal["auto"]

WHOLE_GLAND = "whole_gland"
"""The first region, which stands for a result where one number is needed."""
MAX_REGIONS = 8
"""Bits of a mask on the network's grid."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetConfig(Settings):
    """Regions that the network segments."""

    regions: dict[str, list[str] | None]
    """Names of the labels that each region unites; whole_gland is always one, and null, the labels of the whole gland."""

    def _rules(self) -> list[Rule]:
        zones = {name: labels for name, labels in self.regions.items() if name != WHOLE_GLAND}
        are_names = all(re.fullmatch("[a-z][a-z0-9_]*", name) for name in zones)
        has_gland = self.regions.get(WHOLE_GLAND, []) is None
        return [
            ("regions", has_gland, f"must have {WHOLE_GLAND}: null, as a zone is part of the gland"),
            ("regions", are_names, "must have names of small letters, digits and _"),
            ("regions", all(zones.values()), "must give the names of labels for each zone"),
            ("regions", len(self.regions) <= MAX_REGIONS, f"must be at most {MAX_REGIONS}"),
        ]
