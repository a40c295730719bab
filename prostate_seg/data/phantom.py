"""A drawn pelvis: T2-like studies whose prostate mask and volume are known by formula.

Anatomy is defined in gland-centred millimetres along the world axes (x left, y posterior, z superior); a study samples
it on a grid of its own. Arrays are [Z, Y, X]. Signal is relative, urine = 1, until a study gives it a scale. Every random
number comes from (seed, patient id) for anatomy or from (seed, case id) for a study. Reading does not belong here.
"""

import csv
import hashlib
import io
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from prostate_seg.files import atomic_folder, write_text
from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.image_io import write_volume

logger = logging.getLogger(__name__)

CENTRAL_GLAND = 1
"""Mask label of the transition zone, central zone and anterior stroma."""
PERIPHERAL_ZONE = 2
"""Mask label of the peripheral zone."""

SMALLEST_GLAND_ML = 10.0
"""Below this a gland spans too few slices for its mask to keep the formula's volume."""
LARGEST_FIELD_OF_VIEW_MM = 400.0
"""A whole body fits in this; a larger value is a typing error."""
MAX_OFF_CENTRE_MM = 10.0
"""The gland's centre lies at most this far from the middle of the image, along each image axis; nearer if it must."""
IN_PLANE_MARGIN_MM = 4.0
"""Image left around the gland in plane, at least."""
END_MARGIN_SLICES = 2
"""Slices without gland below the apex and above the base, at least."""
PIXEL_SPACING_RANGE_MM = (0.3, 0.6)
"""In-plane spacing of stored studies, as in PI-CAI."""
SLICE_SPACING_RANGE_MM = (3.0, 3.6)
"""Slice spacing, as in PI-CAI."""
ACQUIRED_PIXEL_MM = 0.7
"""Pixels are computed at this size and interpolated to the stored size, as scanners do."""
SUB_SLICES = 3
"""A slice is the mean of this many thin ones, so that edges blur through the plane."""
EDGE_MM = 1.0
"""Width of the ramp from one tissue to the next."""
MAX_TILT_DEGREES = 20.0
"""Axial-oblique stacks follow the back of the gland; this is the steepest."""
STORED_ORIENTATIONS = ("LPS", "LPS", "LPS", "RAS", "LAS")
"""Axis codes of the files; most are as DICOM has them."""
HEIGHT_RATIO_RANGE = (0.68, 0.8)
"""Front-to-back half axis of the gland over the left-to-right one."""
LENGTH_RATIO_RANGE = (0.78, 0.95)
"""Apex-to-base half axis of the gland over the left-to-right one."""
REACH = 1.3
"""No part of the gland is further from its centre than this times its half width."""
FLATTENING_ENDS = 1.5
"""x^2 / a^2 beyond which the bend of the flanks stops growing; the gland ends before."""
FLATTENING_PIVOT = 0.25
"""x^2 / a^2 at which the bend moves nothing."""
RIPPLE_PER_MM = 0.22
"""Wave number of the surface's irregularity, a wave length of 29 mm."""
RECTUM_GAP_MM = 1.5
"""Between the back of the gland and the rectal wall."""
COIL_REACH_MM = 25.0
"""Distance over which an endorectal coil's gain falls to 0.6 of its height."""
FADE_FROM = 2 / 3
"""Apex and base fade into their surroundings beyond this part of the half length: the outer sixths of the gland."""
GLAND_TEXTURE_VOX = 72
"""Edge of the lattice that holds the gland's inside, about 1 mm per voxel."""
GLAND_TEXTURE_REACH = 1.1
"""The lattice covers unit coordinates from minus to plus this value; the surface is at 1."""
BODY_TEXTURE_VOX = 80
"""Edge of the lattice, repeated without seams, that gives fat and muscle their grain."""
BODY_TEXTURE_MM = 1.6
"""Voxel edge of that lattice."""

FAT, MUSCLE, CORTEX, MARROW, AIR, URINE, FLUID = 0.58, 0.13, 0.04, 0.4, 0.02, 1.0, 0.75
DETRUSOR, RECTAL_WALL, MUCOSA, SPHINCTER, LOOSE_TISSUE = 0.17, 0.22, 0.45, 0.18, 0.42
CENTRAL, PERIPHERAL, STROMA, CAPSULE, URETHRA = 0.27, 0.6, 0.11, 0.1, 0.42
"""T2-weighted signal as a part of the urine's, read off real studies."""
TINY = np.float32(1e-6)
"""Keeps distances finite at the centre of an ellipsoid."""
MAX_THREADS = 8
"""Cases made at the same time, at most; each takes about 150 MB meanwhile."""


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
        _require(self.num_patients >= 1, f"num_patients must be at least 1, got {self.num_patients}")
        _require(
            0 <= self.num_second_studies <= self.num_patients,
            f"num_second_studies must lie in 0 to num_patients ({self.num_patients}), got {self.num_second_studies}",
        )
        _require(0 <= self.difficulty <= 1, f"difficulty must lie in 0 to 1, got {self.difficulty}")
        _check_range("num_slices_range", self.num_slices_range, lowest=1)
        _check_range("gland_volume_range_ml", self.gland_volume_range_ml, lowest=SMALLEST_GLAND_ML)
        self._check_field_of_view()

    def _check_field_of_view(self) -> None:
        needed_mm = _field_of_view_needed_mm(self.gland_volume_range_ml[1])
        _require(
            needed_mm <= self.field_of_view_mm <= LARGEST_FIELD_OF_VIEW_MM,
            f"field_of_view_mm must lie in {needed_mm:.0f} to {LARGEST_FIELD_OF_VIEW_MM:.0f} "
            f"for glands up to {self.gland_volume_range_ml[1]:g} ml, got {self.field_of_view_mm}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomCase:
    """One study of a phantom patient."""

    case_id: str
    """Patient and study, such as ph001_2."""
    patient_id: str
    """Patient, such as ph001."""
    image: Volume
    """T2-like signal, int16."""
    mask: Volume
    """uint8: 0 outside, `CENTRAL_GLAND` or `PERIPHERAL_ZONE` inside."""
    true_volume_ml: float
    """Volume of the continuous shape, by formula; not a count of voxels."""


_Vector = tuple[float, float, float]


class _Points(NamedTuple):
    """Gland-centred positions in mm; three arrays of one shape."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gland:
    """An egg, sheared. Neither the egg's taper nor a shear changes the volume of the ellipsoid it is made from."""

    half_width_mm: float
    """Half axis a along x."""
    half_height_mm: float
    """Half axis b along y."""
    half_length_mm: float
    """Half axis c along z."""
    taper: float
    """Cross sections have the area of the ellipsoid's times 1 + taper z / c: the base is wider than the apex."""
    tilt: float
    """Posterior shift per mm towards the base."""
    skew: float
    """Shift to the left per mm towards the base."""
    flattening: float
    """The flanks lie this part of b further back, times x^2 / a^2, which flattens the side that faces the rectum."""
    ripple_mm: float
    """Height of the surface's irregularity."""
    ripple_phases: tuple[float, float, float]
    """Where its waves start, in radians."""
    central_size: float
    """Half width of the central gland over that of the whole: larger where hyperplasia has enlarged it."""

    @property
    def volume_ml(self) -> float:
        """Volume 4/3 pi a b c."""
        return 4 / 3 * math.pi * self.half_width_mm * self.half_height_mm * self.half_length_mm / 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class _Patient:
    """What two studies of one patient share."""

    gland: _Gland
    gland_signal: np.ndarray
    """Signal inside the gland over unit coordinates, shape [GLAND_TEXTURE_VOX] * 3 (z, y, x)."""
    body_texture: np.ndarray
    """Zero mean, unit variance, periodic, shape [BODY_TEXTURE_VOX] * 3 (z, y, x)."""
    sway_phase: float
    """Where the surroundings bend to the left and right, in radians."""
    hip_shift_mm: float
    """How much further out the hips are than in the average pelvis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Study:
    """What differs between two studies of one patient."""

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
    """How much brighter tissue beside the rectum is; 0 without an endorectal coil."""
    noise: float
    """Standard deviation of the noise in both channels, as a part of the urine's signal."""
    gamma: float
    scale: float
    """Stored value of urine without bias."""


def phantom_case_ids(settings: PhantomSettings) -> list[str]:
    """Return the case ids, sorted: ph001_1, ph001_2, ph002_1 and so on."""
    digits = max(3, len(str(settings.num_patients)))
    return [
        f"ph{number:0{digits}d}_{study}"
        for number in range(1, settings.num_patients + 1)
        for study in ((1, 2) if number <= settings.num_second_studies else (1,))
    ]


def make_phantom_case(case_id: str, *, settings: PhantomSettings, seed: int) -> PhantomCase:
    """Make one study; it depends on the arguments alone, not on what was made before.

    Args:
        case_id: One of `phantom_case_ids(settings)`.
        settings: Sizes and difficulty.
        seed: Any integer.

    Returns:
        The image (int16) and the mask (uint8) on one grid, with the gland's volume by formula.

    Raises:
        ValueError: If the settings have no such case.
    """
    case_ids = phantom_case_ids(settings)
    _require(case_id in case_ids, f"case_id must lie in {case_ids[0]} to {case_ids[-1]}, got {case_id}")
    patient_id = case_id.partition("_")[0]
    patient = _draw_patient(_generator(seed, patient_id), settings=settings)
    generator = _generator(seed, case_id)
    study = _draw_study(generator, patient.gland, settings=settings)
    image = _acquire(patient, study, generator=generator, difficulty=settings.difficulty)
    mask = _rasterise(patient.gland, study)
    return PhantomCase(
        case_id=case_id,
        patient_id=patient_id,
        image=Volume(array=image, geometry=study.geometry, stored_orientation=study.stored_orientation),
        mask=Volume(array=mask, geometry=study.geometry, stored_orientation=study.stored_orientation),
        true_volume_ml=patient.gland.volume_ml,
    )


def write_phantom(
    folder: Path, *, settings: PhantomSettings, seed: int, on_progress: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Write `images/<case_id>.nii.gz`, `masks/<case_id>.nii.gz` and `phantom.csv` below `folder`.

    What was there is replaced when every case is complete; other files in `folder` stay.

    Args:
        folder: Where to write; made when missing.
        settings: Sizes and difficulty.
        seed: Any integer.
        on_progress: Called with (cases done, cases in all) after each case.

    Returns:
        The image files, sorted.
    """
    case_ids = phantom_case_ids(settings)
    with atomic_folder(folder / "images") as images, atomic_folder(folder / "masks") as masks:
        rows = []
        for row in _in_threads(
            lambda case_id: _write_case(case_id, images, masks, settings=settings, seed=seed), case_ids
        ):
            rows.append(row)
            if on_progress is not None:
                on_progress(len(rows), len(case_ids))
    _write_csv(folder / "phantom.csv", rows)
    logger.info("%d phantom studies of %d patients in %s", len(case_ids), settings.num_patients, folder)
    return [folder / "images" / f"{case_id}.nii.gz" for case_id in case_ids]


def _in_threads(make: Callable[[str], dict[str, str]], case_ids: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield `make` of every case, in order; numpy and gzip leave the other cores to other threads."""
    executor = ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, MAX_THREADS))
    try:
        yield from executor.map(make, case_ids)
    finally:
        executor.shutdown(cancel_futures=True)


def _write_case(case_id: str, images: Path, masks: Path, *, settings: PhantomSettings, seed: int) -> dict[str, str]:
    case = make_phantom_case(case_id, settings=settings, seed=seed)
    write_volume(images / f"{case_id}.nii.gz", case.image)
    write_volume(masks / f"{case_id}.nii.gz", case.mask)
    return _csv_row(case)


def _csv_row(case: PhantomCase) -> dict[str, str]:
    slice_mm, row_mm, column_mm = case.image.geometry.spacing_mm
    return {
        "case_id": case.case_id,
        "patient_id": case.patient_id,
        "true_volume_ml": f"{case.true_volume_ml:.4f}",
        "spacing_z_mm": f"{slice_mm:g}",
        "spacing_y_mm": f"{row_mm:g}",
        "spacing_x_mm": f"{column_mm:g}",
        "num_slices": str(case.image.geometry.shape_vox[0]),
        "stored_orientation": case.image.stored_orientation,
    }


def _write_csv(path: Path, rows: Sequence[dict[str, str]]) -> None:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, stream.getvalue())


# --------------------------------------------------------------------------------------------------------------- checks


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise ValueError(text)


def _check_range(name: str, values: Sequence[float], *, lowest: float) -> None:
    is_range = len(values) == 2 and lowest <= values[0] <= values[1] < math.inf
    _require(is_range, f"{name} must be two values, the smaller first, from {lowest:g} up, got {list(values)}")


def _field_of_view_needed_mm(volume_ml: float) -> float:
    """Return the edge that holds any gland of this volume, however turned."""
    half_width_mm = _half_width_mm(volume_ml, height_ratio=HEIGHT_RATIO_RANGE[0], length_ratio=LENGTH_RATIO_RANGE[0])
    return math.ceil(2 * (REACH * half_width_mm + IN_PLANE_MARGIN_MM))


# ---------------------------------------------------------------------------------------------------------------- gland


def _half_width_mm(volume_ml: float, *, height_ratio: float, length_ratio: float) -> float:
    """Solve 4/3 pi a b c = volume for a."""
    return float((volume_ml * 1000 * 3 / (4 * math.pi * height_ratio * length_ratio)) ** (1 / 3))


def _draw_gland(generator: np.random.Generator, *, volume_ml: float) -> _Gland:
    height_ratio = generator.uniform(*HEIGHT_RATIO_RANGE)
    length_ratio = generator.uniform(*LENGTH_RATIO_RANGE)
    half_width_mm = _half_width_mm(volume_ml, height_ratio=height_ratio, length_ratio=length_ratio)
    return _Gland(
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


def _shift_back_mm(gland: _Gland, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return how far the egg's points at (x, z), in mm, move to posterior: a shear, whatever this function is."""
    bend = np.minimum((x / gland.half_width_mm) ** 2, FLATTENING_ENDS) - FLATTENING_PIVOT
    wave = np.sin(x * RIPPLE_PER_MM + gland.ripple_phases[0]) * np.sin(z * RIPPLE_PER_MM + gland.ripple_phases[1])
    return gland.tilt * z + gland.flattening * gland.half_height_mm * bend + gland.ripple_mm * wave


def _shift_left_mm(gland: _Gland, z: np.ndarray) -> np.ndarray:
    return gland.skew * z + gland.ripple_mm * np.sin(z * RIPPLE_PER_MM + gland.ripple_phases[2])


def _unit_points(gland: _Gland, points: _Points) -> _Points:
    """Map the gland onto the unit ball by undoing the shears and the taper."""
    x = points.x - _shift_left_mm(gland, points.z)
    y = points.y - _shift_back_mm(gland, x, points.z)
    z = points.z / gland.half_length_mm
    width = np.sqrt(1 + gland.taper * np.clip(z, -1, 1))
    return _Points(x / (gland.half_width_mm * width), y / (gland.half_height_mm * width), z)


def _surface_mm(gland: _Gland) -> np.ndarray:
    """Return points all over the gland's surface, in mm from its centre, shape [N, 3] (x, y, z)."""
    polar, around = np.meshgrid(np.linspace(0, math.pi, 91), np.linspace(0, 2 * math.pi, 120), indexing="ij")
    z = gland.half_length_mm * np.cos(polar)
    radius = np.sin(polar) * np.sqrt(1 + gland.taper * np.cos(polar))
    x = gland.half_width_mm * radius * np.cos(around)
    y = gland.half_height_mm * radius * np.sin(around) + _shift_back_mm(gland, x, z)
    return np.stack([x + _shift_left_mm(gland, z), y, z], axis=-1).reshape(-1, 3)


def _is_central(gland: _Gland, unit: _Points) -> np.ndarray:
    """Return where the central gland is: an inner egg towards the front and the base, and the stroma before it."""
    size = gland.central_size
    inner = (unit.x / size) ** 2 + ((unit.y + 0.9 - size) / size) ** 2 + ((unit.z - 0.12) / 0.85) ** 2 < 1
    return inner | _is_stroma(unit)


def _is_stroma(unit: _Points) -> np.ndarray:
    """Return where the anterior fibromuscular stroma is."""
    return (unit.y < -0.6) & (abs(unit.x) < 0.5) & (unit.z > -0.7)


# -------------------------------------------------------------------------------------------------------------- patient


def _generator(seed: int, name: str) -> np.random.Generator:
    """Return a generator that depends on both; Python's own hash differs between processes."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _draw_patient(generator: np.random.Generator, *, settings: PhantomSettings) -> _Patient:
    gland = _draw_gland(generator, volume_ml=generator.uniform(*settings.gland_volume_range_ml))
    return _Patient(
        gland=gland,
        gland_signal=_draw_gland_signal(generator, gland, difficulty=settings.difficulty),
        body_texture=_smooth_noise(generator, num_vox=BODY_TEXTURE_VOX, sigma_vox=1.3),
        sway_phase=generator.uniform(0, 2 * math.pi),
        hip_shift_mm=generator.uniform(-3, 4),
    )


def _smooth_noise(generator: np.random.Generator, *, num_vox: int, sigma_vox: float) -> np.ndarray:
    """Return periodic noise of zero mean and unit variance, shape [num_vox] * 3, float32."""
    white = generator.standard_normal((num_vox,) * 3, dtype=np.float32)
    smooth = ndimage.gaussian_filter(white, sigma_vox, mode="wrap", truncate=3)
    return (smooth - smooth.mean()) / smooth.std()


def _draw_gland_signal(generator: np.random.Generator, gland: _Gland, *, difficulty: float) -> np.ndarray:
    """Draw zones, nodules, lesions and urethra on a lattice over unit coordinates."""
    edge = np.linspace(-GLAND_TEXTURE_REACH, GLAND_TEXTURE_REACH, GLAND_TEXTURE_VOX, dtype=np.float32)
    unit = _Points(edge[None, None, :], edge[None, :, None], edge[:, None, None])
    grain = _smooth_noise(generator, num_vox=GLAND_TEXTURE_VOX, sigma_vox=1.5)
    is_central = _is_central(gland, unit)
    bright = PERIPHERAL - 0.25 * difficulty * generator.uniform(0.3, 1)
    central = _draw_central(generator, unit=unit, grain=grain)
    peripheral = _draw_lesions(generator, unit=unit, signal=bright + 0.07 * grain)
    signal = np.where(is_central, central, peripheral)
    signal[ndimage.binary_dilation(is_central) & ~is_central] = 0.6 * CENTRAL
    return ndimage.gaussian_filter(signal, 0.6).astype(np.float32)


def _draw_central(generator: np.random.Generator, *, unit: _Points, grain: np.ndarray) -> np.ndarray:
    """Draw a mottled central gland: nodules with dark rims, the stroma before them, the urethra in the middle."""
    signal = CENTRAL + 0.04 * grain
    for _ in range(generator.integers(8, 18)):
        radius = generator.uniform(0.12, 0.3)
        side = generator.choice((-1, 1))
        centre = (side * generator.uniform(0.1, 0.5), generator.uniform(-0.55, 0.25), generator.uniform(-0.5, 0.75))
        inside = CENTRAL + generator.choice((-0.06, 0.04, 0.2)) + 0.07 * grain
        distance = _distance(unit, centre)
        signal = np.where(distance < radius, inside, np.where(distance < radius + 0.05, 0.6 * CENTRAL, signal))
    signal = np.where(_is_stroma(unit), STROMA + 0.02 * grain, signal)
    from_urethra = np.hypot(unit.x, unit.y - 0.05 + 0.15 * unit.z)
    return np.where(from_urethra < 0.08, URETHRA, np.where(from_urethra < 0.14, 0.7 * CENTRAL, signal))


def _draw_lesions(generator: np.random.Generator, *, unit: _Points, signal: np.ndarray) -> np.ndarray:
    """Darken up to two spots of the peripheral zone."""
    for _ in range(generator.integers(0, 3)):
        angle = generator.uniform(0.1, math.pi - 0.1)
        centre = (0.82 * math.cos(angle), 0.82 * math.sin(angle), generator.uniform(-0.6, 0.5))
        near = np.clip(1.5 - _distance(unit, centre) / generator.uniform(0.12, 0.25), 0, 1)
        signal = signal + near * (CENTRAL - signal)
    return signal


def _distance(points: _Points, centre: _Vector) -> np.ndarray:
    return np.sqrt((points.x - centre[0]) ** 2 + (points.y - centre[1]) ** 2 + (points.z - centre[2]) ** 2)


# ---------------------------------------------------------------------------------------------------------------- study


def _draw_study(generator: np.random.Generator, gland: _Gland, *, settings: PhantomSettings) -> _Study:
    gland_centre_mm = generator.uniform((-15, -40, -60), (15, 20, 60))
    difficulty = settings.difficulty
    return _Study(
        geometry=_draw_geometry(generator, gland, gland_centre_mm=gland_centre_mm, settings=settings),
        gland_centre_mm=gland_centre_mm,
        stored_orientation=str(generator.choice(STORED_ORIENTATIONS)),
        bladder_radius_mm=generator.uniform(20, 34),
        rectum_radius_mm=generator.uniform(11, 16),
        rectum_signal=float(generator.choice((AIR, 0.2, 0.45))),
        bias=generator.normal(0, 0.05 + 0.2 * difficulty, (2, 3)),
        coil_gain=generator.uniform(0, 1.5 * difficulty),
        noise=(0.01 + 0.07 * difficulty) * generator.uniform(0.8, 1.2),
        gamma=generator.uniform(0.9, 1.15),
        scale=generator.uniform(650, 1200),
    )


def _draw_geometry(
    generator: np.random.Generator, gland: _Gland, *, gland_centre_mm: np.ndarray, settings: PhantomSettings
) -> Geometry:
    """Draw a grid with the gland inside, off centre in plane and with free slices at both ends."""
    pixel_mm = round(generator.uniform(*PIXEL_SPACING_RANGE_MM), 3)
    slice_mm = round(generator.uniform(*SLICE_SPACING_RANGE_MM), 1)
    rotation = _draw_rotation(generator)
    along_axes_mm = _surface_mm(gland) @ rotation
    num_pixels = round(settings.field_of_view_mm / pixel_mm)
    num_slices = int(generator.integers(*settings.num_slices_range, endpoint=True))
    num_slices = max(num_slices, math.ceil(np.ptp(along_axes_mm[:, 2]) / slice_mm) + 2 * END_MARGIN_SLICES)
    edges_mm = np.array((pixel_mm, pixel_mm, slice_mm))
    extent_mm = edges_mm * (num_pixels, num_pixels, num_slices)
    margin_mm = np.array((IN_PLANE_MARGIN_MM, IN_PLANE_MARGIN_MM, END_MARGIN_SLICES * slice_mm))
    middle_mm = _draw_middle(generator, along_axes_mm, free_mm=extent_mm / 2 - margin_mm)
    first_mm = middle_mm - extent_mm / 2 + edges_mm / 2
    x, y, z = (gland_centre_mm + rotation @ first_mm).tolist()
    return Geometry(
        shape_vox=(num_slices, num_pixels, num_pixels),
        spacing_mm=(slice_mm, pixel_mm, pixel_mm),
        origin_mm=(x, y, z),
        direction=tuple(rotation.ravel().tolist()),
    )


def _draw_rotation(generator: np.random.Generator) -> np.ndarray:
    """Draw a rotation: one stack in four is straight, the others lean forward and turn a little; shape [3, 3]."""
    if generator.random() < 0.25:
        return np.eye(3)
    lean, turn, roll = np.radians(generator.uniform((3, -3, -3), (MAX_TILT_DEGREES, 3, 3)))
    about_x = np.array([[1, 0, 0], [0, np.cos(lean), np.sin(lean)], [0, -np.sin(lean), np.cos(lean)]])
    about_y = np.array([[np.cos(roll), 0, np.sin(roll)], [0, 1, 0], [-np.sin(roll), 0, np.cos(roll)]])
    about_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def _draw_middle(generator: np.random.Generator, gland_mm: np.ndarray, *, free_mm: np.ndarray) -> np.ndarray:
    """Draw the grid's middle, along its own axes (x, y, z) from the gland's centre, so that the gland fits.

    `gland_mm` holds the gland's surface along the same axes, shape [N, 3]; `free_mm` is the half extent without margins.
    """
    lowest = np.maximum(gland_mm.max(axis=0) - free_mm, -MAX_OFF_CENTRE_MM)
    highest = np.minimum(gland_mm.min(axis=0) + free_mm, MAX_OFF_CENTRE_MM)
    return generator.uniform(lowest, highest)


def _grid_points(geometry: Geometry, box: Sequence[slice], *, gland_centre_mm: np.ndarray) -> _Points:
    """Return the gland-centred positions of the voxels in `box` (slices of z, y, x), float32."""
    steps = np.array(geometry.direction).reshape(3, 3) * geometry.spacing_mm[::-1]
    start = np.array(geometry.origin_mm) - gland_centre_mm
    ranges = [np.arange(size)[part] for size, part in zip(geometry.shape_vox, box, strict=True)]
    z, y, x = np.meshgrid(*ranges, indexing="ij", sparse=True)

    def along(axis: int) -> np.ndarray:
        to_x, to_y, to_z = steps[axis]
        return (start[axis] + z * to_z + y * to_y).astype(np.float32) + (x * to_x).astype(np.float32)

    return _Points(along(0), along(1), along(2))


def _rasterise(gland: _Gland, study: _Study) -> np.ndarray:
    """Return the zones at the voxel centres, shape [Z, Y, X], uint8."""
    mask = np.zeros(study.geometry.shape_vox, dtype=np.uint8)
    index = study.geometry.to_index(_surface_mm(gland) + study.gland_centre_mm)
    lowest, highest = np.floor(index.min(axis=0)).astype(int), np.ceil(index.max(axis=0)).astype(int)
    box = tuple(slice(low, high + 1) for low, high in zip(lowest, highest, strict=True))
    unit = _unit_points(gland, _grid_points(study.geometry, box, gland_centre_mm=study.gland_centre_mm))
    is_gland = unit.x**2 + unit.y**2 + unit.z**2 <= 1
    mask[box] = is_gland * np.where(_is_central(gland, unit), CENTRAL_GLAND, PERIPHERAL_ZONE)
    return mask


# -------------------------------------------------------------------------------------------------------------- tissues


class _Canvas(NamedTuple):
    """The thin slices of one slice while tissue after tissue is painted over them."""

    signal: np.ndarray
    """What has been painted, shape [SUB_SLICES, Y, X]."""
    points: _Points
    """Where its samples lie."""
    bent: _Points
    """The same with the body's sway, for everything but the gland."""
    grain: np.ndarray
    """Texture of zero mean and unit variance, shape [1, Y, X]."""


def _paint(canvas: _Canvas, distance_mm: np.ndarray, value: float | np.ndarray, *, edge_mm: float = EDGE_MM) -> None:
    """Blend `value` over the samples with negative distance to a surface."""
    coverage = np.clip(0.5 - distance_mm / edge_mm, 0, 1)
    canvas.signal[:] += coverage * (value - canvas.signal)


def _paint_walled(canvas: _Canvas, distance_mm: np.ndarray, *, wall_mm: float, wall: float, inside: float) -> None:
    _paint(canvas, distance_mm, wall)
    _paint(canvas, distance_mm + wall_mm, inside * (1 + 0.06 * canvas.grain))


def _mirrored(points: _Points) -> _Points:
    """Fold the right half over the left, so that one organ is painted on both sides."""
    return _Points(abs(points.x), points.y, points.z)


def _distance_mm(scaled: Sequence[np.ndarray], half_axes: Sequence[float | np.ndarray]) -> np.ndarray:
    """Return the approximate signed distance to an ellipsoid that `scaled` coordinates map onto the unit ball."""
    level = np.sqrt(sum(s * s for s in scaled)) + TINY
    steepness = np.sqrt(sum((s / h) ** 2 for s, h in zip(scaled, half_axes, strict=True))) + TINY
    return level * (level - 1) / steepness


def _ellipsoid_mm(points: _Points, centre: _Vector, half_axes: _Vector) -> np.ndarray:
    return _distance_mm([(p - c) / h for p, c, h in zip(points, centre, half_axes, strict=True)], half_axes)


def _rod_mm(points: _Points, start: _Vector, end: _Vector, *, radius_mm: float) -> np.ndarray:
    """Return the signed distance to a rod with round ends."""
    axis = np.subtract(end, start)
    relative = [p - c for p, c in zip(points, start, strict=True)]
    along = sum(r * np.float32(a / (axis @ axis)) for r, a in zip(relative, axis, strict=True))
    along = np.clip(along, 0, 1)
    return np.sqrt(sum((r - along * np.float32(a)) ** 2 for r, a in zip(relative, axis, strict=True))) - radius_mm


def _tube_mm(points: _Points, *, centre_y: np.ndarray, half_width: np.ndarray, half_height: np.ndarray) -> np.ndarray:
    """Return the approximate signed distance to a tube along z with ellipses as sections."""
    return _distance_mm((points.x / half_width, (points.y - centre_y) / half_height), (half_width, half_height))


def _render_slice(patient: _Patient, study: _Study, *, coarse: Geometry, index: int, difficulty: float) -> np.ndarray:
    """Paint all tissues from the outside in and return the mean through the slice, shape [Y, X]."""
    canvas = _blank_canvas(patient, study, coarse=coarse, index=index)
    _add_muscles(canvas, patient)
    _add_bones(canvas, patient)
    _add_pelvic_floor(canvas, patient.gland, study)
    _add_rectum(canvas, patient.gland, study)
    _add_bladder(canvas, patient.gland, study)
    _add_seminal_vesicles(canvas, patient.gland)
    _add_sphincter(canvas, patient.gland)
    _add_prostate(canvas, patient, difficulty=difficulty)
    return (canvas.signal * _coil_gain(canvas.points, patient.gland, study)).mean(axis=0)


def _blank_canvas(patient: _Patient, study: _Study, *, coarse: Geometry, index: int) -> _Canvas:
    """Return one slice of fat with dots of vessels in it."""
    thin = _thin_slices(coarse, index=index)
    points = _grid_points(thin, (slice(None),) * 3, gland_centre_mm=study.gland_centre_mm)
    middle = [p[SUB_SLICES // 2][None] / BODY_TEXTURE_MM for p in points[::-1]]
    grain = ndimage.map_coordinates(patient.body_texture, middle, order=1, mode="grid-wrap", output=np.float32)
    fat = FAT * (1 + 0.05 * grain - 0.6 * np.clip(grain - 1.7, 0, 1))
    return _Canvas(np.repeat(fat, SUB_SLICES, axis=0), points, _sway(points, phase=patient.sway_phase), grain)


def _sway(points: _Points, *, phase: float) -> _Points:
    """Bend the body a little, so that its two sides differ."""
    left = 1.5 * np.sin(0.06 * points.z + 0.05 * points.y + phase)
    back = 1.5 * np.sin(0.05 * points.z + 0.08 * points.x - phase)
    return _Points(points.x + left, points.y + back, points.z)


def _add_muscles(canvas: _Canvas, patient: _Patient) -> None:
    """Obturators at the side walls, adductors below them, glutei behind, the abdominal wall in front."""
    sides = _mirrored(canvas.bent)
    out = patient.hip_shift_mm
    bowed = sides._replace(x=sides.x - 0.004 * (sides.y - 5) ** 2 * np.sign(5 - sides.y))
    flesh = MUSCLE * (1 + 0.2 * canvas.grain)
    for distance in (
        _ellipsoid_mm(sides, (80 + out, -22, -12), (24, 22, 22)),
        _ellipsoid_mm(bowed, (50 + out, 0, 12), (9, 42, 48)),
        _rod_mm(sides, (18, -48, -22), (62 + out, -8, -28), radius_mm=13),
        (72 - sides.y - 0.45 * sides.x - 4 * np.sin(0.1 * sides.x)) * 0.9,
        _ellipsoid_mm(sides, (16, -78, 45), (16, 9, 45)),
    ):
        _paint(canvas, distance, flesh)


def _add_bones(canvas: _Canvas, patient: _Patient) -> None:
    """Pubis with its rami, hip joint, ischium and coccyx: marrow in a dark rim."""
    sides = _mirrored(canvas.bent)
    out, front = patient.hip_shift_mm, -(patient.gland.half_height_mm + 24)
    bowed = sides._replace(y=sides.y - 0.012 * sides.x**2)
    for distance in (
        _ellipsoid_mm(bowed, (20, front - 2, 0), (20, 11, 20)),
        _rod_mm(sides, (12, front + 2, -14), (50 + out, 14, -44), radius_mm=6.5),
        _ellipsoid_mm(sides, (84 + out, 2, 18), (33, 33, 32)),
        _rod_mm(sides, (70 + out, 22, 8), (56 + out, 30, -46), radius_mm=13),
        _ellipsoid_mm(canvas.bent, (0, 62, 12), (8, 6, 22)),
    ):
        _paint_walled(canvas, distance, wall_mm=1.8, wall=CORTEX, inside=MARROW)
    head = _ellipsoid_mm(sides, (88 + out, 2, 20), (25, 25, 25))
    _paint(canvas, abs(head - 1.5) - 1.0, LOOSE_TISSUE)
    _paint_walled(canvas, head, wall_mm=1.8, wall=CORTEX, inside=MARROW)


def _add_pelvic_floor(canvas: _Canvas, gland: _Gland, study: _Study) -> None:
    """The levator: a dark funnel around gland and rectum, open to the front, filled with loose tissue and veins."""
    level = np.clip(canvas.bent.z / gland.half_length_mm, -2.2, 1.6)
    back = gland.half_height_mm + 2 * study.rectum_radius_mm + 7
    front = -gland.half_height_mm - 10
    centre_y = gland.tilt * canvas.bent.z + (front + back) / 2
    half_height = (back - front) / 2 * (1 + 0.12 * level)
    half_width = (gland.half_width_mm + 7) * (1 + 0.3 * level - 0.05 * np.minimum(level + 1, 0) ** 2)
    backness = (canvas.bent.y - centre_y) / half_height
    funnel = _tube_mm(
        canvas.bent, centre_y=centre_y, half_width=half_width * (1 - 0.15 * backness), half_height=half_height
    )
    thickness_mm = np.clip(4.5 - 1.5 * level, 2, 8) * np.clip(0.7 + backness, 0, 1)
    _paint(canvas, funnel, MUSCLE * (1 + 0.15 * canvas.grain))
    _paint(canvas, funnel + thickness_mm, LOOSE_TISSUE * (1 + 0.18 * canvas.grain))
    veins = _ellipsoid_mm(canvas.bent, (0, -gland.half_height_mm - 5, -3), (15, 6, 16))
    _paint(canvas, veins, LOOSE_TISSUE * (1 + 0.5 * canvas.grain))


class _Rectum(NamedTuple):
    """The rectum at each height z, in mm."""

    centre_y: np.ndarray
    half_height: np.ndarray
    open_part: np.ndarray
    """From 0 in the anal canal, which is closed, to 1 above it."""


def _rectum_at(gland: _Gland, study: _Study, z: np.ndarray) -> _Rectum:
    """Lay the rectum against the back of the gland; above the base it follows the sacrum."""
    open_part = np.clip((z + gland.half_length_mm + 6) / 14, 0, 1)
    half_height = study.rectum_radius_mm * (0.7 + 0.25 * open_part + 0.06 * np.sin(0.15 * z))
    gland_back = gland.half_height_mm * (1 - FLATTENING_PIVOT * gland.flattening) + gland.tilt * z
    above = np.maximum(z - gland.half_length_mm, 0)
    return _Rectum(gland_back + half_height + RECTUM_GAP_MM + 0.012 * above**2, half_height, open_part)


def _add_rectum(canvas: _Canvas, gland: _Gland, study: _Study) -> None:
    """Rectum behind the gland, narrowing to the anal canal with its sphincter below the apex."""
    rectum = _rectum_at(gland, study, canvas.bent.z)
    distance = _tube_mm(
        canvas.bent,
        centre_y=rectum.centre_y,
        half_width=rectum.half_height * (1.1 + 0.15 * rectum.open_part),
        half_height=rectum.half_height,
    )
    content = study.rectum_signal * (1 + 0.3 * canvas.grain)
    _paint(canvas, distance, RECTAL_WALL)
    _paint(canvas, abs(distance + 2.6) - 0.5, MUCOSA)
    _paint(canvas, distance + 3.6, RECTAL_WALL + rectum.open_part * (content - RECTAL_WALL))


def _add_bladder(canvas: _Canvas, gland: _Gland, study: _Study) -> None:
    """Bladder above and before the base, on which it rests."""
    radius = study.bladder_radius_mm
    centre = (0.0, gland.tilt * gland.half_length_mm - 0.75 * radius + 4, gland.half_length_mm + 0.55 * radius)
    distance = _ellipsoid_mm(canvas.bent, centre, (1.1 * radius, 0.8 * radius, radius))
    _paint_walled(canvas, distance, wall_mm=4.5, wall=DETRUSOR, inside=URINE)


def _add_seminal_vesicles(canvas: _Canvas, gland: _Gland) -> None:
    """Bright ducts with dark walls behind the bladder."""
    sides = _mirrored(canvas.bent)
    top, back = gland.half_length_mm, 0.45 * gland.half_height_mm + gland.tilt * gland.half_length_mm
    distance = _ellipsoid_mm(sides._replace(y=sides.y + 0.15 * sides.x), (15, back + 4, top + 2), (15, 6, 9))
    lumen = np.clip(1.6 - 1.6 * abs(canvas.grain), 0, 1)
    _paint(canvas, distance, RECTAL_WALL + lumen * (FLUID - RECTAL_WALL))


def _add_sphincter(canvas: _Canvas, gland: _Gland) -> None:
    """Below the apex the urethra in its sphincter, then the bulb; before the gland the dorsal veins."""
    end_y = -gland.tilt * gland.half_length_mm
    end_z = -gland.half_length_mm
    distance = _rod_mm(canvas.bent, (0, end_y, end_z + 4), (0, end_y - 3, end_z - 16), radius_mm=7.0)
    _paint(canvas, distance, SPHINCTER)
    _paint(canvas, distance + 4.5, URETHRA)
    _paint(canvas, _ellipsoid_mm(canvas.bent, (0, end_y - 2, end_z - 24), (9, 12, 9)), FLUID)


def _add_prostate(canvas: _Canvas, patient: _Patient, *, difficulty: float) -> None:
    """Paint capsule and zones; towards apex and base they fade into what surrounds the gland there."""
    gland = patient.gland
    unit = _unit_points(gland, canvas.points)
    distance = _distance_mm(unit, (gland.half_width_mm, gland.half_height_mm, gland.half_length_mm))
    near = distance < 8
    if not near.any():
        return
    fade = np.clip((abs(unit.z) - FADE_FROM) / (1 - FADE_FROM), 0, 1) * (0.15 + 0.6 * difficulty)
    neighbour = np.where(unit.z < 0, np.float32(SPHINCTER), np.float32(DETRUSOR))
    halo = np.clip(1 - distance / 8, 0, 1) * fade
    canvas.signal[:] += halo * (neighbour - canvas.signal)
    inside = _look_up(patient.gland_signal, unit, where=distance < 1)
    _paint(canvas, distance, inside + fade * (neighbour - inside), edge_mm=EDGE_MM * (1 + 2 * difficulty))
    rim = CAPSULE + 0.15 * difficulty
    _paint(canvas, abs(distance) - 0.6, rim + fade * (neighbour - rim))


def _look_up(lattice: np.ndarray, unit: _Points, *, where: np.ndarray) -> np.ndarray:
    """Return the lattice's values at unit coordinates, 0 elsewhere than `where`."""
    per_unit = (GLAND_TEXTURE_VOX - 1) / (2 * GLAND_TEXTURE_REACH)
    index_zyx = np.stack([(u[where] + GLAND_TEXTURE_REACH) * per_unit for u in unit[::-1]])
    values = np.zeros(where.shape, dtype=np.float32)
    values[where] = ndimage.map_coordinates(lattice, index_zyx, order=1, mode="nearest", output=np.float32)
    return values


def _coil_gain(points: _Points, gland: _Gland, study: _Study) -> np.ndarray:
    """Return how much brighter an endorectal coil makes its neighbourhood."""
    distance_sq = points.x**2 + (points.y - _rectum_at(gland, study, points.z).centre_y) ** 2
    return 1 + study.coil_gain * np.exp(-distance_sq / (2 * COIL_REACH_MM**2))


# ---------------------------------------------------------------------------------------------------------- acquisition


def _acquire(patient: _Patient, study: _Study, *, generator: np.random.Generator, difficulty: float) -> np.ndarray:
    """Scan the patient: draw the tissues, weight, add noise, interpolate; shape [Z, Y, X], int16."""
    coarse = _acquired_geometry(study.geometry)
    signal = np.empty(coarse.shape_vox, dtype=np.float32)
    for index in range(len(signal)):
        signal[index] = _render_slice(patient, study, coarse=coarse, index=index, difficulty=difficulty)
    np.maximum(signal, 0, out=signal)
    signal **= np.float32(study.gamma)
    signal *= _bias_field(study, coarse)
    signal = _rician(generator, signal, noise=study.noise)
    num_pixels = study.geometry.shape_vox[1]
    image = _interpolate(_interpolate(signal, axis=2, num=num_pixels), axis=1, num=num_pixels)
    return np.rint(np.clip(image * np.float32(study.scale), 0, np.iinfo(np.int16).max)).astype(np.int16)


def _acquired_geometry(stored: Geometry) -> Geometry:
    """Return the grid with the same outer edges whose pixels are about `ACQUIRED_PIXEL_MM` wide."""
    extent_mm = stored.shape_vox[1] * stored.spacing_mm[1]
    num_pixels = round(extent_mm / ACQUIRED_PIXEL_MM)
    pixel_mm = extent_mm / num_pixels
    first = (pixel_mm / stored.spacing_mm[1] - 1) / 2
    x, y, z = stored.to_world((0, first, first)).tolist()
    return Geometry(
        shape_vox=(stored.shape_vox[0], num_pixels, num_pixels),
        spacing_mm=(stored.spacing_mm[0], pixel_mm, pixel_mm),
        origin_mm=(x, y, z),
        direction=stored.direction,
    )


def _thin_slices(coarse: Geometry, *, index: int) -> Geometry:
    """Return the grid of the `SUB_SLICES` thin slices that make up one slice."""
    first = index - (SUB_SLICES - 1) / (2 * SUB_SLICES)
    x, y, z = coarse.to_world((first, 0, 0)).tolist()
    return Geometry(
        shape_vox=(SUB_SLICES, *coarse.shape_vox[1:]),
        spacing_mm=(coarse.spacing_mm[0] / SUB_SLICES, *coarse.spacing_mm[1:]),
        origin_mm=(x, y, z),
        direction=coarse.direction,
    )


def _bias_field(study: _Study, coarse: Geometry) -> np.ndarray:
    """Return the bias field, shape [Z, Y, X], float32."""
    axes = [np.linspace(-1, 1, size, dtype=np.float32) for size in coarse.shape_vox]
    terms = [linear * axis + quadratic * axis**2 for axis, linear, quadratic in zip(axes, *study.bias, strict=True)]
    z, y, x = (np.exp(term) for term in np.meshgrid(*terms, indexing="ij", sparse=True))
    return z * y * x


def _rician(generator: np.random.Generator, signal: np.ndarray, *, noise: float) -> np.ndarray:
    """Return the magnitude after Gaussian noise in the real and the imaginary channel."""
    real = signal + noise * generator.standard_normal(signal.shape, dtype=np.float32)
    return np.hypot(real, noise * generator.standard_normal(signal.shape, dtype=np.float32))


def _interpolate(array: np.ndarray, *, axis: int, num: int) -> np.ndarray:
    """Interpolate one axis to `num` samples over the same extent, with Catmull-Rom's cubic; edges are repeated."""
    size = array.shape[axis]
    position = (np.arange(num) + 0.5) * size / num - 0.5
    base = np.floor(position).astype(int)
    t = (position - base).astype(np.float32).reshape([-1 if dim == axis else 1 for dim in range(array.ndim)])
    weights = (
        ((2 - t) * t - 1) * t / 2,
        ((3 * t - 5) * t * t + 2) / 2,
        ((4 - 3 * t) * t + 1) * t / 2,
        (t - 1) * t * t / 2,
    )
    taps = [array.take(np.clip(base + offset, 0, size - 1), axis=axis) for offset in (-1, 0, 1, 2)]
    return sum(weight * tap for weight, tap in zip(weights, taps, strict=True))
