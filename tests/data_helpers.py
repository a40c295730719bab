"""Cases for tests of the data side."""

from prostate_seg.data.dataset import CaseRecord


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
