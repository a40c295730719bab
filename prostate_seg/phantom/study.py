"""Properties of one study of a scanner: grid, position, filling of bladder and rectum, noise; and the mask on its grid."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prostate_seg.imaging.geometry import Geometry
from prostate_seg.phantom.patient import Gland, Points, in_central_gland, surface_mm, unit_points
from prostate_seg.phantom.settings import IN_PLANE_MARGIN_MM, PhantomSettings, ScannerName

CENTRAL_GLAND = 1
"""Mask label of the transition zone, central zone and anterior stroma."""
PERIPHERAL_ZONE = 2
"""Mask label of the peripheral zone."""
END_MARGIN_SLICES = 2
"""Minimum number of slices without gland below the apex and above the base."""
MAX_TILT_DEGREES = 20.0
"""Maximum tilt of axial-oblique stacks, which follow the back of the gland."""
STORED_ORIENTATIONS = ("LPS", "LPS", "LPS", "RAS", "LAS")
"""Axis codes of the files; most are those of DICOM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scanner:
    """Ranges from which each study of a scanner is sampled; the defaults are those of PI-CAI."""

    pixel_spacing_range_mm: tuple[float, float] = (0.3, 0.6)
    """In-plane spacing of stored studies."""
    slice_spacing_range_mm: tuple[float, float] = (3.0, 3.6)
    acquired_pixel_mm: float = 0.7
    """Pixels are simulated at this size and interpolated to the stored size, as scanners do."""
    max_off_centre_mm: float = 10.0
    """Maximum distance of the gland's centre from the middle of the image along each image axis."""
    noise_factor: float = 1.0
    bias_factor: float = 1.0
    """Noise and bias field relative to those of `data.phantom.difficulty`."""
    coil_gain_range: tuple[float, float] | None = None
    """Relative gain beside the rectum; None for up to 1.5 times the difficulty."""
    gamma_range: tuple[float, float] = (0.9, 1.15)
    """Exponent of the signal: the contrast between dark and bright tissues."""


SCANNERS: dict[ScannerName, Scanner] = {
    "standard": Scanner(),
    "fine": Scanner(pixel_spacing_range_mm=(0.25, 0.35), acquired_pixel_mm=0.5, noise_factor=1.8),
    "coarse": Scanner(
        pixel_spacing_range_mm=(0.9, 1.4),
        slice_spacing_range_mm=(3.6, 4.5),
        acquired_pixel_mm=1.2,
        gamma_range=(0.8, 1),
    ),
    "noisy": Scanner(noise_factor=2.5, bias_factor=2.0, gamma_range=(0.6, 0.8)),
    "dark": Scanner(acquired_pixel_mm=0.9, noise_factor=1.5, gamma_range=(1.3, 1.7)),
    "coil": Scanner(pixel_spacing_range_mm=(0.4, 0.7), bias_factor=1.5, coil_gain_range=(2.0, 5.0)),
    "off_centre": Scanner(pixel_spacing_range_mm=(0.6, 0.9), bias_factor=2.0, max_off_centre_mm=20.0),
}
"""Simulated centres, which differ in grids, contrast, noise, bias field, coil and positioning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Properties of one study of a patient."""

    geometry: Geometry
    gland_centre_mm: np.ndarray
    """World position of the gland's centre, shape [3] (x, y, z)."""
    stored_orientation: str
    bladder_radius_mm: float
    rectum_radius_mm: float
    rectum_signal: float
    bias: np.ndarray
    """Logarithm of the gain at the image borders: the linear and quadratic terms along (z, y, x), shape [2, 3]."""
    coil_gain: float
    """Relative gain beside the rectum; 0 without an endorectal coil."""
    noise: float
    """Standard deviation of the noise in both channels, relative to urine."""
    gamma: float
    scale: float


def draw_study(generator: np.random.Generator, gland: Gland, *, settings: PhantomSettings, scanner: Scanner) -> Study:
    """Sample grid, filling, bias and noise of one study."""
    gland_centre_mm = generator.uniform((-15, -40, -60), (15, 20, 60))
    difficulty = settings.difficulty
    return Study(
        geometry=_draw_geometry(generator, gland, gland_centre_mm=gland_centre_mm, settings=settings, scanner=scanner),
        gland_centre_mm=gland_centre_mm,
        stored_orientation=str(generator.choice(STORED_ORIENTATIONS)),
        bladder_radius_mm=generator.uniform(20, 34),
        rectum_radius_mm=generator.uniform(11, 16),
        rectum_signal=float(generator.choice((0.02, 0.15, 0.32))),  # gas, or more or less stool
        bias=generator.normal(0, scanner.bias_factor * (0.04 + 0.14 * difficulty), (2, 3)),
        coil_gain=generator.uniform(*(scanner.coil_gain_range or (0, 1.5 * difficulty))),
        noise=scanner.noise_factor * (0.01 + 0.07 * difficulty) * generator.uniform(0.8, 1.2),
        gamma=generator.uniform(*scanner.gamma_range),
        scale=generator.uniform(650, 1200),
    )


def _draw_geometry(
    generator: np.random.Generator,
    gland: Gland,
    *,
    gland_centre_mm: np.ndarray,
    settings: PhantomSettings,
    scanner: Scanner,
) -> Geometry:
    """Sample a grid that contains the gland, off centre in plane and with free slices at both ends."""
    pixel_mm = round(generator.uniform(*scanner.pixel_spacing_range_mm), 3)
    slice_mm = round(generator.uniform(*scanner.slice_spacing_range_mm), 1)
    rotation = _draw_rotation(generator)
    along_axes_mm = surface_mm(gland) @ rotation
    num_pixels = round(settings.field_of_view_mm / pixel_mm)
    num_slices = int(generator.integers(*settings.num_slices_range, endpoint=True))
    num_slices = max(num_slices, math.ceil(np.ptp(along_axes_mm[:, 2]) / slice_mm) + 2 * END_MARGIN_SLICES)
    edges_mm = np.array((pixel_mm, pixel_mm, slice_mm))
    extent_mm = edges_mm * (num_pixels, num_pixels, num_slices)
    margin_mm = np.array((IN_PLANE_MARGIN_MM, IN_PLANE_MARGIN_MM, END_MARGIN_SLICES * slice_mm))
    # The grid's middle along its own axes (x, y, z) from the gland's centre, such that the gland fits.
    free_mm = extent_mm / 2 - margin_mm
    lowest = np.maximum(along_axes_mm.max(axis=0) - free_mm, -scanner.max_off_centre_mm)
    highest = np.minimum(along_axes_mm.min(axis=0) + free_mm, scanner.max_off_centre_mm)
    middle_mm = generator.uniform(lowest, highest)
    origin_mm = gland_centre_mm + rotation @ (middle_mm - extent_mm / 2 + edges_mm / 2)
    return Geometry.from_xyz((num_pixels, num_pixels, num_slices), edges_mm, origin_mm=origin_mm, direction=rotation)


def _draw_rotation(generator: np.random.Generator) -> np.ndarray:
    """Sample a rotation, shape [3, 3]: a quarter of the stacks is straight, the others lean forward and turn a little."""
    if generator.random() < 0.25:
        return np.eye(3)
    lean, turn, roll = np.radians(generator.uniform((3, -3, -3), (MAX_TILT_DEGREES, 3, 3)))
    about_x = np.array([[1, 0, 0], [0, np.cos(lean), np.sin(lean)], [0, -np.sin(lean), np.cos(lean)]])
    about_y = np.array([[np.cos(roll), 0, np.sin(roll)], [0, 1, 0], [-np.sin(roll), 0, np.cos(roll)]])
    about_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def grid_points(geometry: Geometry, box: Sequence[slice], *, gland_centre_mm: np.ndarray) -> Points:
    """Return the gland-centred positions of the voxels in `box` (slices of z, y, x), float32."""
    steps = geometry.matrix * geometry.spacing_mm[::-1]
    start = np.array(geometry.origin_mm) - gland_centre_mm
    ranges = [np.arange(size)[part] for size, part in zip(geometry.shape_vox, box, strict=True)]
    z, y, x = np.meshgrid(*ranges, indexing="ij", sparse=True)

    def along(axis: int) -> np.ndarray:
        to_x, to_y, to_z = steps[axis]
        return (start[axis] + z * to_z + y * to_y).astype(np.float32) + (x * to_x).astype(np.float32)

    return Points(along(0), along(1), along(2))


def rasterise(gland: Gland, study: Study) -> np.ndarray:
    """Return the zones at the voxel centres, shape [Z, Y, X], uint8."""
    mask = np.zeros(study.geometry.shape_vox, dtype=np.uint8)
    index = study.geometry.to_index(surface_mm(gland) + study.gland_centre_mm)
    lowest, highest = np.floor(index.min(axis=0)).astype(int), np.ceil(index.max(axis=0)).astype(int)
    box = tuple(slice(low, high + 1) for low, high in zip(lowest, highest, strict=True))
    unit = unit_points(gland, grid_points(study.geometry, box, gland_centre_mm=study.gland_centre_mm))
    is_gland = unit.x**2 + unit.y**2 + unit.z**2 <= 1
    mask[box] = is_gland * np.where(in_central_gland(gland, unit), CENTRAL_GLAND, PERIPHERAL_ZONE)
    return mask
