"""Settings, real studies and rotated grids for tests of imaging."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.image_io import read_volume
from prostate_seg.imaging.preprocessing import PreprocessSettings

DEFAULT = PreprocessSettings(
    spacing_mm=(3.0, 0.5, 0.5),
    image_size=160,
    crop="center",
    to_8bit=True,
    intensity_percentiles=(0.5, 99.5),
    whole_gland_labels=None,
    zones={},
)


def real_study(shared_data: Path, case_id: str) -> tuple[Volume, Volume]:
    (image,) = (shared_data / "t2w" / "images").glob(f"{case_id}.*")
    return read_volume(image), read_volume(shared_data / "t2w" / "masks" / f"{case_id}.nii.gz")


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def rotation(degrees: float) -> np.ndarray:
    """Return an oblique rotation about the axis (1, 2, 3)."""
    axis = np.array([1.0, 2.0, 3.0]) / np.sqrt(14)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    angle = np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def rotate(geometry: Geometry, *, degrees: float) -> Geometry:
    """Rotate a grid about the world origin."""
    turned = rotation(degrees) @ np.array(geometry.direction).reshape(3, 3)
    x, y, z = rotation(degrees) @ np.array(geometry.origin_mm)
    return replace(geometry, direction=tuple(turned.ravel()), origin_mm=(float(x), float(y), float(z)))
