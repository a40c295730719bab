"""A drawn pelvis: T2-like studies whose prostate mask and volume are known by formula.

Anatomy is defined in gland-centred millimetres along the world axes (x left, y posterior, z superior); a study samples
it on a grid of its own. Arrays are [Z, Y, X]. Signal is relative, urine = 1, until a study gives it a scale. Random
numbers come from (seed, patient id) for anatomy and (seed, case id) for a study. Reading files does not belong here.
"""

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from prostate_seg.common.files import atomic_folder, write_csv
from prostate_seg.common.signals import submit_all
from prostate_seg.data.attributes import FILE_NAME
from prostate_seg.imaging.geometry import Volume
from prostate_seg.imaging.image_io import write_volume
from prostate_seg.phantom.acquisition import acquire
from prostate_seg.phantom.patient import draw_patient, generator_for
from prostate_seg.phantom.settings import PhantomSettings
from prostate_seg.phantom.study import draw_study, rasterise

FINE_PIXEL_MM = 0.45
"""Middle of the pixel spacings; which side a study lies on is its attribute in cases.csv."""

MAX_THREADS = 8
"""Cases made at the same time, at most; each takes about 150 MB meanwhile."""


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
    if case_id not in case_ids:
        raise ValueError(f"case_id must be from {case_ids[0]} to {case_ids[-1]}, is {case_id}")
    patient_id = case_id.partition("_")[0]
    patient = draw_patient(generator_for(seed, patient_id), settings=settings)
    generator = generator_for(seed, case_id)
    study = draw_study(generator, patient.gland, settings=settings)
    image = acquire(patient, study, generator=generator, difficulty=settings.difficulty)
    mask = rasterise(patient.gland, study)
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
    """Write `images/<case_id>.nii.gz`, `masks/<case_id>.nii.gz`, `phantom.csv` and `cases.csv` below `folder`.

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
        made = _in_threads(lambda case_id: _write_case(case_id, images, masks, settings=settings, seed=seed), case_ids)
        with closing(made):  # an interrupt ends the threads before the folders that they write to are removed
            for row in made:
                rows.append(row)
                if on_progress is not None:
                    on_progress(len(rows), len(case_ids))
    write_csv(folder / "phantom.csv", pd.DataFrame(rows))
    cases = [{"case_id": row["case_id"], "pixels": _pixels(row)} for row in rows]
    write_csv(folder / FILE_NAME, pd.DataFrame(cases))
    return [folder / "images" / f"{case_id}.nii.gz" for case_id in case_ids]


def _in_threads(
    make: Callable[[str], dict[str, str]], case_ids: Sequence[str]
) -> Generator[dict[str, str], None, None]:
    """Yield `make` of every case, in order; numpy and gzip leave the other cores to other threads."""
    executor = ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, MAX_THREADS))
    try:
        for future in submit_all(executor, make, case_ids):
            yield future.result()
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


def _pixels(row: Mapping[str, str]) -> str:
    return f"{'below' if float(row['spacing_y_mm']) < FINE_PIXEL_MM else 'from'} {FINE_PIXEL_MM} mm"
