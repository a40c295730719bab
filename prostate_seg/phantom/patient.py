"""Anatomy that the studies of a patient share: the gland, whose volume follows from a formula, its texture and the pelvis.

Positions are gland-centred millimetres along the world axes (x left, y posterior, z superior).
"""

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from prostate_seg.phantom.settings import HEIGHT_RATIO_RANGE, LENGTH_RATIO_RANGE, PhantomSettings, half_width_of

FLATTENING_PIVOT = 0.25
"""x^2 / a^2 at which the bend of the flanks is 0."""
RIPPLE_PER_MM = 0.22
"""Wave number of the irregular surface: a wavelength of 29 mm."""
GLAND_TEXTURE_VOX = 72
"""Edge of the lattice with the signal inside the gland, about 1 mm per voxel."""
GLAND_TEXTURE_REACH = 1.1
"""The lattice covers unit coordinates from minus to plus this value; the surface is at 1."""
BODY_TEXTURE_VOX = 80
"""Edge of the periodic lattice with the patient's texture."""
CENTRAL, PERIPHERAL, STROMA, URETHRA = 0.27, 0.62, 0.15, 0.42
"""T2-weighted signal relative to urine, measured on real studies."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """Anatomy that the studies of a patient share."""

    gland: Gland
    gland_signal: np.ndarray
    """Signal inside the gland over unit coordinates, shape [GLAND_TEXTURE_VOX] * 3 (z, y, x)."""
    body_texture: np.ndarray
    """Texture of the tissues and, on a coarser scale, deformation of the body: zero mean, unit variance, periodic, shape
    [BODY_TEXTURE_VOX] * 3 (z, y, x)."""
    hip_shift_mm: float
    """Lateral shift of the hips from the average pelvis."""


def generator_for(seed: int, name: str) -> np.random.Generator:
    """Return a generator seeded by both; Python's own hash differs between processes."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def draw_patient(generator: np.random.Generator, *, settings: PhantomSettings) -> Patient:
    """Sample a patient."""
    gland = draw_gland(generator, volume_ml=generator.uniform(*settings.gland_volume_range_ml))
    return Patient(
        gland=gland,
        gland_signal=_draw_gland_signal(generator, gland, difficulty=settings.difficulty),
        body_texture=_smooth_noise(generator, num_vox=BODY_TEXTURE_VOX, sigma_vox=1.3),
        hip_shift_mm=generator.uniform(-3, 4),
    )


def _smooth_noise(generator: np.random.Generator, *, num_vox: int, sigma_vox: float) -> np.ndarray:
    """Return periodic noise of zero mean and unit variance, shape [num_vox] * 3, float32."""
    white = generator.standard_normal((num_vox,) * 3, dtype=np.float32)
    smooth = ndimage.gaussian_filter(white, sigma_vox, mode="wrap", truncate=3)
    return (smooth - smooth.mean()) / smooth.std()


def _draw_gland_signal(generator: np.random.Generator, gland: Gland, *, difficulty: float) -> np.ndarray:
    """Sample zones, nodules, lesions and urethra on a lattice over unit coordinates."""
    edge = np.linspace(-GLAND_TEXTURE_REACH, GLAND_TEXTURE_REACH, GLAND_TEXTURE_VOX, dtype=np.float32)
    unit = Points(edge[None, None, :], edge[None, :, None], edge[:, None, None])
    grain = _smooth_noise(generator, num_vox=GLAND_TEXTURE_VOX, sigma_vox=1.5)
    is_central = in_central_gland(gland, unit)
    bright = PERIPHERAL - 0.25 * difficulty * generator.uniform(0.3, 1)
    central = _draw_central(generator, unit=unit, grain=grain)
    peripheral = _draw_lesions(generator, unit=unit, signal=bright + 0.07 * grain)
    signal = np.where(is_central, central, peripheral)
    signal[ndimage.binary_dilation(is_central) & ~is_central] = 0.6 * CENTRAL
    return ndimage.gaussian_filter(signal, 0.6).astype(np.float32)


def _draw_central(generator: np.random.Generator, *, unit: Points, grain: np.ndarray) -> np.ndarray:
    """Sample the central gland: nodules with dark rims, the stroma before them, the urethra in the middle."""
    signal = CENTRAL + 0.04 * grain
    for _ in range(generator.integers(8, 18)):
        radius = generator.uniform(0.12, 0.3)
        side = generator.choice((-1, 1))
        centre = (side * generator.uniform(0.1, 0.5), generator.uniform(-0.55, 0.25), generator.uniform(-0.5, 0.75))
        inside = CENTRAL + generator.choice((-0.06, 0.04, 0.2)) + 0.07 * grain
        distance = _distance(unit, centre)
        signal = np.where(distance < radius, inside, np.where(distance < radius + 0.05, 0.6 * CENTRAL, signal))
    signal = np.where(is_stroma(unit), STROMA + 0.02 * grain, signal)
    from_urethra = np.hypot(unit.x, unit.y - 0.05 + 0.15 * unit.z)
    return np.where(from_urethra < 0.08, URETHRA, np.where(from_urethra < 0.14, 0.7 * CENTRAL, signal))


def _draw_lesions(generator: np.random.Generator, *, unit: Points, signal: np.ndarray) -> np.ndarray:
    """Add up to two dark lesions to the peripheral zone."""
    for _ in range(generator.integers(0, 3)):
        angle = generator.uniform(0.1, math.pi - 0.1)
        centre = (0.82 * math.cos(angle), 0.82 * math.sin(angle), generator.uniform(-0.6, 0.5))
        near = np.clip(1.5 - _distance(unit, centre) / generator.uniform(0.12, 0.25), 0, 1)
        signal = signal + near * (CENTRAL - signal)
    return signal


def _distance(points: Points, centre: Vector) -> np.ndarray:
    return np.sqrt((points.x - centre[0]) ** 2 + (points.y - centre[1]) ** 2 + (points.z - centre[2]) ** 2)
