"""Records of cases, and results of segmented ones."""

from pathlib import Path

import numpy as np

from prostate_seg.data.cases import Case
from prostate_seg.data.dataset import CaseRecord
from prostate_seg.imaging.geometry import Spacing
from prostate_seg.reporting.evaluation.tables import CaseResult
from prostate_seg.segmentation.metrics import case_metrics
from prostate_seg.segmentation.overlap import slice_counts


def case_record(
    case_id: str, *, gland_volume_ml: float = 40.0, hashes_of: str = "", mask_md5: str | None = None
) -> CaseRecord:
    """Return a record whose patient is the case id up to the underscore; cases with equal `hashes_of` have equal files."""
    patient_id, _, study_id = case_id.partition("_")
    return CaseRecord(
        case_id=case_id,
        patient_id=patient_id,
        study_id=study_id,
        image=f"images/{case_id}.mha",
        mask=f"masks/{case_id}.nii.gz",
        image_md5=f"image {hashes_of}",
        mask_md5=mask_md5 or f"mask {hashes_of}",
        voxels_sha1=f"voxels {hashes_of}",
        num_slices=19,
        spacing_z_mm=3.0,
        spacing_y_mm=0.5,
        spacing_x_mm=0.5,
        orientation="LPS",
        gland_volume_ml=gland_volume_ml,
        gland_reach_mm=30.0,
        gland_edge_mm=50.0,
        gland_kept_fraction=1.0,
        oracle_crop=False,
        warnings="",
    )


def case_result(
    case_id: str, reference: np.ndarray, predicted: np.ndarray, *, fold: str, spacing_mm: Spacing, **attributes: str
) -> CaseResult:
    """Return the result of a case with these masks, [Z, Y, X]."""
    patient_id, _, study_id = case_id.partition("_")
    files = {"image": Path("i"), "mask": Path("m")}
    return CaseResult(
        fold=fold,
        case=Case(case_id=case_id, patient_id=patient_id, study_id=study_id, attributes=attributes, **files),
        metrics=case_metrics(reference, predicted, spacing_mm=spacing_mm),
        counts=slice_counts(reference, predicted),
        image_md5="i",
        mask_md5="m",
    )
