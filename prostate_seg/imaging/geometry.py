"""Voxel grids and volumes.

Arrays are indexed [Z, Y, X]; world coordinates are LPS millimetres (x to the patient's left, y to posterior, z to superior),
as in DICOM and ITK. Shapes and spacings are in array order (z, y, x), points and directions in world order (x, y, z).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

Spacing = tuple[float, float, float]
Shape = tuple[int, int, int]
Box = tuple[slice, ...]

SAME_GRID_TOLERANCE = 0.1
"""Largest distance between corners of equal grids, as a fraction of the smallest voxel edge (float32 headers differ)."""
RIGHT_ANGLE_TOLERANCE = 0.01
"""Largest cosine between two axes of a grid, and largest deviation of an axis from unit length."""
ROUNDED_ROTATION = 1e-3
"""Rotation in radians that is ignored: a NIfTI quaternion in float32 is rounded by up to 6e-4, about its origin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """A regular voxel grid in world space."""

    shape_vox: Shape
    """Number of voxels along z, y, x."""
    spacing_mm: Spacing
    """Voxel edge lengths along z, y, x."""
    origin_mm: tuple[float, float, float]
    """World position (x, y, z) of the centre of voxel [0, 0, 0]."""
    direction: tuple[float, ...]
    """3x3 matrix, row by row; its columns are the world directions of the array's x, y and z axes."""

    @classmethod
    def from_xyz(
        cls,
        size: Iterable[float],
        spacing_mm: Iterable[float],
        *,
        origin_mm: Iterable[float],
        direction: Sequence[float] | np.ndarray,
    ) -> "Geometry":
        """Return the grid of sizes and spacings along x, y, z, as ITK, nibabel and DICOM have them."""
        size_x, size_y, size_z = map(int, size)
        spacing_x_mm, spacing_y_mm, spacing_z_mm = map(float, spacing_mm)
        x_mm, y_mm, z_mm = map(float, origin_mm)
        return cls(
            shape_vox=(size_z, size_y, size_x),
            spacing_mm=(spacing_z_mm, spacing_y_mm, spacing_x_mm),
            origin_mm=(x_mm, y_mm, z_mm),
            direction=tuple(np.ravel(direction).tolist()),
        )

    def window(self, first: Sequence[float] | np.ndarray, shape_vox: Sequence[int] | np.ndarray) -> "Geometry":
        """Return a grid of the same spacing and axes whose voxel [0, 0, 0] is at an index (z, y, x) of this one."""
        return Geometry.from_xyz(
            shape_vox[::-1], self.spacing_mm[::-1], origin_mm=self.to_world(first), direction=self.direction
        )

    def to_world(self, index_zyx: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the world point (x, y, z) in mm of a continuous voxel index (z, y, x), or of an [N, 3] array of them."""
        index_xyz = np.asarray(index_zyx, dtype=float)[..., ::-1]
        scaled = index_xyz * np.array(self.spacing_mm[::-1])
        return np.array(self.origin_mm) + scaled @ self.matrix.T

    def to_index(self, world_xyz: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the continuous voxel index (z, y, x) of a world point (x, y, z) in mm, or of an [N, 3] array of them."""
        relative = np.asarray(world_xyz, dtype=float) - np.array(self.origin_mm)
        return (relative @ np.linalg.inv(self.matrix).T / np.array(self.spacing_mm[::-1]))[..., ::-1]

    @property
    def matrix(self) -> np.ndarray:
        """The direction as an array, shape [3, 3]."""
        return np.array(self.direction, dtype=float).reshape(3, 3)

    @property
    def corners_mm(self) -> np.ndarray:
        """World points of the eight outer voxel centres, shape [8, 3]."""
        ends = [(0, size - 1) for size in self.shape_vox]
        return self.to_world(np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 3))

    @property
    def voxel_volume_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(np.prod(self.spacing_mm)) / 1000.0

    @property
    def diagonal_mm(self) -> float:
        """Length of the space diagonal of the grid, outer edge to outer edge."""
        return float(np.linalg.norm(np.array(self.shape_vox) * np.array(self.spacing_mm)))

    def is_same_grid(self, other: "Geometry") -> bool:
        """Return whether both grids have the same shape and, within rounding, the same corners."""
        if self.shape_vox != other.shape_vox:
            return False
        apart_mm = np.linalg.norm(self.corners_mm - other.corners_mm, axis=1)
        tolerance_mm = SAME_GRID_TOLERANCE * min(self.spacing_mm)
        is_rounded = apart_mm.min() <= tolerance_mm and apart_mm.max() <= ROUNDED_ROTATION * self.diagonal_mm
        return bool(apart_mm.max() <= tolerance_mm or is_rounded)

    def __str__(self) -> str:
        shape = "x".join(str(size) for size in self.shape_vox)
        spacing = "x".join(f"{length:.4g}" for length in self.spacing_mm)
        origin = ", ".join(f"{value:.2f}" for value in self.origin_mm)
        axes = " ".join(f"({', '.join(f'{v:.3f}' for v in column)})" for column in self.matrix.T)
        return f"shape {shape} vox, spacing {spacing} mm (z, y, x), origin ({origin}) mm, axes x y z {axes}"


@dataclass(frozen=True, slots=True)
class Finding:
    """An error or a warning of a check about a case."""

    check: str
    """Name of the check, such as grids_differ."""
    message: str
    """The rule, the value and the next step, without case and check."""
    is_error: bool = False
    """Whether the case cannot be used."""
    case_id: str = ""
    """Empty for a warning of reading a file, until it is known whose file it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NiftiForm:
    """The sform or qform of a NIfTI file."""

    affine: np.ndarray
    """From the voxel index (x, y, z) of the file to mm right, anterior and superior (RAS), shape [4, 4]."""
    code: int
    """Coordinate space: 1 scanner, 2 aligned to another image, 3 Talairach, 4 MNI 152; 0 for a file without a form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A volume with the axes nearest to the patient's left, posterior and superior (LPS)."""

    array: np.ndarray
    """Voxel values, shape [Z, Y, X]."""
    geometry: Geometry
    stored_orientation: str = "LPS"
    """Axis code of the file, such as RAS; `image_io.write_volume` restores it."""
    nifti_form: NiftiForm | None = None
    """Form of the NIfTI file that the volume was read from; a mask written on this grid gets the same form."""
    warnings: tuple[Finding, ...] = ()
    """Warnings about the file's header; `quality.check_case` turns them into findings."""

    def with_mask(self, mask: np.ndarray) -> "Volume":
        """Return a mask [Z, Y, X] on this grid, uint8 or uint16, with the stored orientation and form of this volume."""
        return replace(self, array=mask if mask.dtype == np.uint16 else mask.astype(np.uint8), warnings=())


def bounding_box(mask: np.ndarray) -> Box:
    """Return the smallest box around a boolean mask [Z, Y, X]; an empty box when the mask is empty."""
    z_range = _extent(np.logical_or.reduce(mask.reshape(mask.shape[0], -1), axis=1))
    plane = np.logical_or.reduce(mask[z_range], axis=0)
    return z_range, _extent(np.logical_or.reduce(plane, axis=1)), _extent(np.logical_or.reduce(plane, axis=0))


def _extent(occupied: np.ndarray) -> slice:
    indices = np.flatnonzero(occupied)
    return slice(int(indices[0]), int(indices[-1]) + 1) if indices.size else slice(0, 0)
