"""Settings of the group `data.phantom`, and the bounds of a gland's shape that they depend on."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from prostate_seg.common.settings import Range, RisingPair, Rule, Settings

ScannerName = Literal["standard", "fine", "coarse", "noisy", "dark", "coil", "off_centre"]

HEIGHT_RATIO_RANGE = (0.68, 0.8)
"""Front-to-back half axis of the gland over the left-to-right one."""
LENGTH_RATIO_RANGE = (0.78, 0.95)
"""Apex-to-base half axis of the gland over the left-to-right one."""
IN_PLANE_MARGIN_MM = 4.0
"""Minimum margin of image around the gland in plane."""
REACH = 1.3
"""Maximum distance of a point of the gland from its centre, in half widths."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhantomSettings(Settings):
    """Size and difficulty of the synthetic data set."""

    num_patients: Annotated[int, Range(ge=1, le=9999)]
    """Number of synthetic patients."""
    num_second_studies: Annotated[int, Range(ge=0)]
    """Number of patients, the first ones, with a second study of the same gland."""
    field_of_view_mm: Annotated[float, Range(ge=80, le=400)]
    """Edge length of the square field of view; 140 includes the pubis, the hip sockets and the rectum."""
    num_slices_range: Annotated[tuple[int, int], RisingPair(8, 64)]
    """Minimum and maximum number of slices of a study; a long gland may get more."""
    gland_volume_range_ml: Annotated[tuple[float, float], RisingPair(15, 263)]
    """Minimum and maximum gland volume; a smaller gland would span too few slices for its mask to keep its volume."""
    difficulty: Annotated[float, Range(ge=0, le=1)]
    """From 0 (clean, high contrast) to 1 (strong noise and bias field, weak edges)."""
    scanners: tuple[ScannerName, ...]
    """Simulated scanners, assigned to the patients cyclically; several simulate a multi-centre data set."""

    def _rules(self) -> list[Rule]:
        largest_ml = self.gland_volume_range_ml[1]
        half_width_mm = half_width_of(
            largest_ml, height_ratio=HEIGHT_RATIO_RANGE[0], length_ratio=LENGTH_RATIO_RANGE[0]
        )
        needed_mm = math.ceil(2 * (REACH * half_width_mm + IN_PLANE_MARGIN_MM))
        seconds_rule = f"must be from 0 to data.phantom.num_patients ({self.num_patients})"
        view_rule = f"must be from {needed_mm} to 400 for glands of up to {largest_ml:g} mL"
        return [
            ("scanners", len(self.scanners) > 0, "must name at least one scanner"),
            ("num_second_studies", self.num_second_studies <= self.num_patients, seconds_rule),
            ("field_of_view_mm", self.field_of_view_mm >= needed_mm, view_rule),
        ]


def half_width_of(volume_ml: float, *, height_ratio: float, length_ratio: float) -> float:
    """Solve 4/3 pi a b c = volume for a."""
    return float((volume_ml * 1000 * 3 / (4 * math.pi * height_ratio * length_ratio)) ** (1 / 3))
