"""Anatomy that the studies of a patient share: the gland, its texture, the pelvis."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from prostate_seg.phantom.gland import Gland, Points, Vector, draw_gland, in_central_gland, is_stroma
from prostate_seg.phantom.settings import PhantomSettings

GLAND_TEXTURE_VOX = 72
"""Edge of the lattice with the signal inside the gland, about 1 mm per voxel."""
GLAND_TEXTURE_REACH = 1.1
"""The lattice covers unit coordinates from minus to plus this value; the surface is at 1."""
BODY_TEXTURE_VOX = 80
"""Edge of the periodic lattice with the patient's texture."""
CENTRAL, PERIPHERAL, STROMA, URETHRA = 0.27, 0.62, 0.15, 0.42
"""T2-weighted signal relative to urine, measured on real studies."""


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
