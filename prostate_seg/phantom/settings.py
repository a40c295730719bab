"""Sizes and difficulty of the phantom, checked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prostate_seg.phantom.gland import HEIGHT_RATIO_RANGE, LENGTH_RATIO_RANGE, half_width_of

SMALLEST_GLAND_ML = 10.0
"""Below this a gland spans too few slices for its mask to keep the formula's volume."""


LARGEST_FIELD_OF_VIEW_MM = 400.0
"""A whole body fits in this; a larger value is a typing error."""


IN_PLANE_MARGIN_MM = 4.0
"""Image left around the gland in plane, at least."""


REACH = 1.3
"""No part of the gland is further from its centre than this times its half width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomSettings:
    """How many phantom patients there are and how hard they are to segment."""

    num_patients: int
    """Patients to make."""
    num_second_studies: int
    """How many of them, the first ones, have a second study."""
    field_of_view_mm: float
    """In-plane edge of the image; 140 shows the pubis, the hip sockets and the rectum."""
    num_slices_range: tuple[int, int]
    """Fewest and most slices; a gland that needs more gets more."""
    gland_volume_range_ml: tuple[float, float]
    """Smallest and largest gland."""
    difficulty: float
    """From 0 (clean, strong contrast) to 1 (strong noise, bias and weak edges)."""

    def __post_init__(self) -> None:
        require(self.num_patients >= 1, f"num_patients must be at least 1, got {self.num_patients}")
        require(
            0 <= self.num_second_studies <= self.num_patients,
            f"num_second_studies must lie in 0 to num_patients ({self.num_patients}), got {self.num_second_studies}",
        )
        require(0 <= self.difficulty <= 1, f"difficulty must lie in 0 to 1, got {self.difficulty}")
        _check_range("num_slices_range", self.num_slices_range, lowest=1)
        _check_range("gland_volume_range_ml", self.gland_volume_range_ml, lowest=SMALLEST_GLAND_ML)
        self._check_field_of_view()

    def _check_field_of_view(self) -> None:
        needed_mm = _field_of_view_needed_mm(self.gland_volume_range_ml[1])
        require(
            needed_mm <= self.field_of_view_mm <= LARGEST_FIELD_OF_VIEW_MM,
            f"field_of_view_mm must lie in {needed_mm:.0f} to {LARGEST_FIELD_OF_VIEW_MM:.0f} "
            f"for glands up to {self.gland_volume_range_ml[1]:g} ml, got {self.field_of_view_mm}",
        )


def require(holds: bool, text: str) -> None:
    """Raise ValueError with a text unless the rule holds."""
    if not holds:
        raise ValueError(text)


def _check_range(name: str, values: Sequence[float], *, lowest: float) -> None:
    is_range = len(values) == 2 and lowest <= values[0] <= values[1] < math.inf
    require(is_range, f"{name} must be two values, the smaller first, from {lowest:g} up, got {list(values)}")


def _field_of_view_needed_mm(volume_ml: float) -> float:
    """Return the edge that holds any gland of this volume, however turned."""
    half_width_mm = half_width_of(volume_ml, height_ratio=HEIGHT_RATIO_RANGE[0], length_ratio=LENGTH_RATIO_RANGE[0])
    return math.ceil(2 * (REACH * half_width_mm + IN_PLANE_MARGIN_MM))
