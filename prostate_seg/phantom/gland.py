"""Shape of the gland: a sheared egg whose volume follows from a formula.

Positions are gland-centred millimetres along the world axes (x left, y posterior, z superior).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from prostate_seg.phantom.settings import HEIGHT_RATIO_RANGE, LENGTH_RATIO_RANGE, half_width_of

FLATTENING_PIVOT = 0.25
"""x^2 / a^2 at which the bend of the flanks is 0."""
RIPPLE_PER_MM = 0.22
"""Wave number of the irregular surface: a wavelength of 29 mm."""

Vector = tuple[float, float, float]


class Points(NamedTuple):
    """Gland-centred positions in mm; three arrays of one shape."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Gland:
    """A sheared egg. Neither its taper nor a shear changes the volume of the ellipsoid that it is made from."""

    half_width_mm: float
    half_height_mm: float
    half_length_mm: float
    """Half axes a, b and c along x, y and z."""
    taper: float
    """Cross sections have the ellipsoid's area times 1 + taper z / c: the base is wider than the apex."""
    tilt: float
    """Posterior shift per mm towards the base."""
    skew: float
    """Shift to the left per mm towards the base."""
    flattening: float
    """Posterior shift of the flanks as a fraction of b, times x^2 / a^2; it flattens the side towards the rectum."""
    ripple_mm: float
    ripple_phases: tuple[float, float, float]
    """Amplitude of the irregular surface, and phases of its waves in radians."""
    central_size: float
    """Half width of the central gland over that of the whole; larger with hyperplasia."""

    @property
    def volume_ml(self) -> float:
        """Volume 4/3 pi a b c."""
        return 4 / 3 * math.pi * self.half_width_mm * self.half_height_mm * self.half_length_mm / 1000


def draw_gland(generator: np.random.Generator, *, volume_ml: float) -> Gland:
    """Draw a gland of exactly this volume."""
    height_ratio = generator.uniform(*HEIGHT_RATIO_RANGE)
    length_ratio = generator.uniform(*LENGTH_RATIO_RANGE)
    half_width_mm = half_width_of(volume_ml, height_ratio=height_ratio, length_ratio=length_ratio)
    return Gland(
        half_width_mm=half_width_mm,
        half_height_mm=half_width_mm * height_ratio,
        half_length_mm=half_width_mm * length_ratio,
        taper=generator.uniform(0.1, 0.35),
        tilt=generator.uniform(0.0, 0.2),
        skew=generator.uniform(-0.06, 0.06),
        flattening=generator.uniform(0.3, 0.5),
        ripple_mm=generator.uniform(0.3, 1.0),
        ripple_phases=tuple(generator.uniform(0, 2 * math.pi, 3).tolist()),
        central_size=float(np.interp(volume_ml, (20, 90), (0.64, 0.82))) + generator.uniform(-0.03, 0.03),
    )


def _shift_back_mm(gland: Gland, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return the posterior shift of points at (x, z) in mm; a function of x and z alone is a shear."""
    bend = np.minimum((x / gland.half_width_mm) ** 2, 1.5) - FLATTENING_PIVOT  # constant beyond the gland
    wave = np.sin(x * RIPPLE_PER_MM + gland.ripple_phases[0]) * np.sin(z * RIPPLE_PER_MM + gland.ripple_phases[1])
    return gland.tilt * z + gland.flattening * gland.half_height_mm * bend + gland.ripple_mm * wave


def _shift_left_mm(gland: Gland, z: np.ndarray) -> np.ndarray:
    return gland.skew * z + gland.ripple_mm * np.sin(z * RIPPLE_PER_MM + gland.ripple_phases[2])


def unit_points(gland: Gland, points: Points) -> Points:
    """Map the gland onto the unit ball by undoing the shears and the taper."""
    x = points.x - _shift_left_mm(gland, points.z)
    y = points.y - _shift_back_mm(gland, x, points.z)
    z = points.z / gland.half_length_mm
    width = np.sqrt(1 + gland.taper * np.clip(z, -1, 1))
    return Points(x / (gland.half_width_mm * width), y / (gland.half_height_mm * width), z)


def surface_mm(gland: Gland) -> np.ndarray:
    """Return points all over the gland's surface, in mm from its centre, shape [N, 3] (x, y, z)."""
    polar, around = np.meshgrid(np.linspace(0, math.pi, 91), np.linspace(0, 2 * math.pi, 120), indexing="ij")
    z = gland.half_length_mm * np.cos(polar)
    radius = np.sin(polar) * np.sqrt(1 + gland.taper * np.cos(polar))
    x = gland.half_width_mm * radius * np.cos(around)
    y = gland.half_height_mm * radius * np.sin(around) + _shift_back_mm(gland, x, z)
    return np.stack([x + _shift_left_mm(gland, z), y, z], axis=-1).reshape(-1, 3)


def in_central_gland(gland: Gland, unit: Points) -> np.ndarray:
    """Return the central gland: an inner egg towards the front and the base, and the stroma before it."""
    size = gland.central_size
    inner = (unit.x / size) ** 2 + ((unit.y + 0.9 - size) / size) ** 2 + ((unit.z - 0.12) / 0.85) ** 2 < 1
    return inner | is_stroma(unit)


def is_stroma(unit: Points) -> np.ndarray:
    """Return the anterior fibromuscular stroma."""
    return (unit.y < -0.7) & (abs(unit.x) < 0.5) & (unit.z > -0.7)
