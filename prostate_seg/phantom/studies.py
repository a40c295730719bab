"""Phantom studies: synthetic T2-weighted images whose prostate mask and volume follow from a formula.

Anatomy is defined in gland-centred millimetres along the world axes (x left, y posterior, z superior); a study samples it on
its own grid. Arrays are [Z, Y, X]. Signal is relative, urine = 1, until it is scaled by the study. Random numbers come from
(seed, patient id) for anatomy and (seed, case id) for a study.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from prostate_seg.common.files import atomic_folder, write_csv
from prostate_seg.common.progress import map_cases, num_cores
from prostate_seg.data.cases import FILE_NAME
from prostate_seg.imaging.geometry import Volume
from prostate_seg.imaging.image_io import write_volume
from prostate_seg.phantom.patient import Patient, draw_patient, generator_for
from prostate_seg.phantom.settings import PhantomSettings, ScannerName
from prostate_seg.phantom.study import SCANNERS, Study, draw_study, rasterise
from prostate_seg.phantom.tissues import render_slice

FINE_PIXEL_MM = 0.45
"""Middle of the pixel spacings, by which cases.csv has two groups of studies."""
MAX_WORKERS = 8
"""Maximum number of cases at the same time; each takes about 150 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomCase:
    """One study of a phantom patient, such as ph001_2 of ph001."""

    image: Volume
    """T2-weighted signal, int16."""
    mask: Volume
    """On the grid of the image, uint8: 0 outside, `CENTRAL_GLAND` or `PERIPHERAL_ZONE` inside."""
    true_volume_ml: float
    """Volume of the continuous shape by formula, not by counting voxels."""


def phantom_case_ids(settings: PhantomSettings) -> list[str]:
    """Return the case ids, sorted: ph001_1, ph001_2, ph002_1 and so on."""
    digits = max(3, len(str(settings.num_patients)))
    return [
        f"ph{number:0{digits}d}_{study}"
        for number in range(1, settings.num_patients + 1)
        for study in ((1, 2) if number <= settings.num_second_studies else (1,))
    ]


def make_phantom_case(case_id: str, *, settings: PhantomSettings, seed: int) -> PhantomCase:
    """Simulate one of `phantom_case_ids(settings)`, else ValueError; the result depends on the arguments alone."""
    case_ids = phantom_case_ids(settings)
    if case_id not in case_ids:
        raise ValueError(f"case_id must be from {case_ids[0]} to {case_ids[-1]}, is {case_id}")
    patient = draw_patient(generator_for(seed, case_id.partition("_")[0]), settings=settings)
    generator = generator_for(seed, case_id)
    scanner = SCANNERS[scanner_of(case_id, settings=settings)]
    study = draw_study(generator, patient.gland, settings=settings, scanner=scanner)
    image = _acquire(
        patient, study, generator=generator, pixel_mm=scanner.acquired_pixel_mm, difficulty=settings.difficulty
    )
    volume = partial(Volume, geometry=study.geometry, stored_orientation=study.stored_orientation)
    return PhantomCase(
        image=volume(array=image),
        mask=volume(array=rasterise(patient.gland, study)),
        true_volume_ml=patient.gland.volume_ml,
    )


def scanner_of(case_id: str, *, settings: PhantomSettings) -> ScannerName:
    """Return the scanner of a case; scanners are assigned to the patients cyclically."""
    number = int(case_id.partition("_")[0].removeprefix("ph"))
    return settings.scanners[(number - 1) % len(settings.scanners)]


def _acquire(
    patient: Patient, study: Study, *, generator: np.random.Generator, pixel_mm: float, difficulty: float
) -> np.ndarray:
    """Return the image, [Z, Y, X], int16: thick slices with bias field, Rician noise and gamma on the stored grid."""
    stored = study.geometry
    # The acquired grid has the same outer edges as the stored one, and pixels of about `pixel_mm`.
    extent_mm = stored.shape_vox[1] * stored.spacing_mm[1]
    num_pixels = round(extent_mm / pixel_mm)
    pixel_mm = extent_mm / num_pixels
    first = (pixel_mm / stored.spacing_mm[1] - 1) / 2
    placed = stored.window((0, first, first), (stored.shape_vox[0], num_pixels, num_pixels))
    acquired = replace(placed, spacing_mm=(stored.spacing_mm[0], pixel_mm, pixel_mm))
    signal = np.empty(acquired.shape_vox, dtype=np.float32)
    for index in range(len(signal)):
        signal[index] = render_slice(patient, study, acquired=acquired, index=index, difficulty=difficulty)
    np.maximum(signal, 0, out=signal)
    signal **= np.float32(study.gamma)
    # Bias field: the exponential of a quadratic along each axis, from -1 to 1 over the image.
    axes = [np.linspace(-1, 1, size, dtype=np.float32) for size in acquired.shape_vox]
    terms = [linear * axis + quadratic * axis**2 for axis, linear, quadratic in zip(axes, *study.bias, strict=True)]
    bias_z, bias_y, bias_x = (np.exp(term) for term in np.meshgrid(*terms, indexing="ij", sparse=True))
    signal *= bias_z * bias_y * bias_x
    # Rician noise: the magnitude after Gaussian noise in the real and in the imaginary channel.
    real = signal + study.noise * generator.standard_normal(signal.shape, dtype=np.float32)
    signal = np.hypot(real, study.noise * generator.standard_normal(signal.shape, dtype=np.float32))
    image = _interpolate(_interpolate(signal, axis=2, num=stored.shape_vox[1]), axis=1, num=stored.shape_vox[1])
    return np.rint(np.clip(image * np.float32(study.scale), 0, np.iinfo(np.int16).max)).astype(np.int16)


def _interpolate(array: np.ndarray, *, axis: int, num: int) -> np.ndarray:
    """Interpolate one axis to `num` samples over the same extent by Catmull-Rom's cubic; edges are repeated."""
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


def write_phantom(folder: Path, *, settings: PhantomSettings, seed: int, num_workers: int | None = None) -> list[Path]:
    """Write `images/<case_id>.nii.gz`, `masks/<case_id>.nii.gz`, `phantom.csv` and `cases.csv` below `folder`.

    Earlier images and masks are replaced once every case is complete; other files in `folder` stay. `num_workers` is the number
    of cases at the same time, None that of cores. Returns the image files, sorted.
    """
    case_ids = phantom_case_ids(settings)
    num_workers = min(num_workers or num_cores(), MAX_WORKERS)
    with atomic_folder(folder / "images") as images, atomic_folder(folder / "masks") as masks:
        write = partial(_write_case, images=images, masks=masks, settings=settings, seed=seed)
        table = pd.DataFrame(map_cases(write, case_ids, num_workers=num_workers, label="fetch"))
    write_csv(folder / "phantom.csv", table)
    is_fine = table["spacing_y_mm"].astype(float) < FINE_PIXEL_MM
    pixels = is_fine.map({True: f"below {FINE_PIXEL_MM} mm", False: f"from {FINE_PIXEL_MM} mm"})
    attributes = {"case_id": case_ids, "pixels": pixels}
    if len(set(settings.scanners)) > 1:
        attributes["scanner"] = [scanner_of(case_id, settings=settings) for case_id in case_ids]
    write_csv(folder / FILE_NAME, pd.DataFrame(attributes))
    return [folder / "images" / f"{case_id}.nii.gz" for case_id in case_ids]


def _write_case(case_id: str, *, images: Path, masks: Path, settings: PhantomSettings, seed: int) -> dict[str, str]:
    """Write image and mask, and return the row of phantom.csv."""
    case = make_phantom_case(case_id, settings=settings, seed=seed)
    write_volume(images / f"{case_id}.nii.gz", case.image)
    write_volume(masks / f"{case_id}.nii.gz", case.mask)
    slice_mm, row_mm, column_mm = case.image.geometry.spacing_mm
    return {
        "case_id": case_id,
        "patient_id": case_id.partition("_")[0],
        "true_volume_ml": f"{case.true_volume_ml:.4f}",
        "spacing_z_mm": f"{slice_mm:g}",
        "spacing_y_mm": f"{row_mm:g}",
        "spacing_x_mm": f"{column_mm:g}",
        "num_slices": str(case.image.geometry.shape_vox[0]),
        "stored_orientation": case.image.stored_orientation,
    }
