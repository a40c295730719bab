"""Stage preprocess: check every case, and bring the usable ones to the grid of the network."""

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from prostate_seg.common.errors import InputError, listed
from prostate_seg.common.files import atomic_folder, write_json
from prostate_seg.common.progress import map_cases
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.data.cases import Case, discover_cases
from prostate_seg.data.dataset import CaseRecord, join_thumbnails, write_contract, write_dataset, write_quality_table
from prostate_seg.data.label_names import require_gland_names
from prostate_seg.data.loading import LoadedCase, load_case, read_mask, refuse_or_exclude
from prostate_seg.imaging.fingerprint import thumbnail, voxels_sha1
from prostate_seg.imaging.geometry import Finding
from prostate_seg.imaging.image_io import content_md5, write_volume
from prostate_seg.imaging.preprocessing import Preprocessed, PreprocessSettings, preprocess_study
from prostate_seg.imaging.quality import CaseQuality, whole_gland
from prostate_seg.imaging.target_grid import StudyExtent, auto_names, choose_grid, study_extent
from prostate_seg.steps.dataset import allows_other_labels, findings_of_data_set, regions_in

log = logging.getLogger(__name__)

MIN_KEPT_FRACTION = 0.995
"""Fraction of the gland below which a window that cuts it off is a warning."""

THUMBNAILS = "thumbnails"
"""Temporary folder with a thumbnail per case."""


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write preprocess/: images, masks, dataset.csv, reference_quality.csv, thumbnails.npy, the log and contract.json."""
    cases, findings = discover_cases(workspace.data, patient_pattern=cfg.data.patient_pattern, exclude=cfg.data.exclude)
    settings, names = choose_settings(cfg, workspace, cases)
    log.info("preprocess %d cases of %s", len(cases), workspace.data)
    with atomic_folder(workspace.preprocess) as folder:
        rows, qualities = preprocess_cases(cfg, workspace, cases, folder=folder, settings=settings)
        findings += findings_of_data_set(
            qualities,
            md5s={row.case_id: {"image": row.image_md5, "mask": row.mask_md5} for row in rows},
            spacings_mm={row.case_id: (row.spacing_z_mm, row.spacing_y_mm, row.spacing_x_mm) for row in rows},
            labels=settings.whole_gland_labels,
        )
        excluded = refuse_or_exclude(findings, num_usable=len(rows), exclude=cfg.data.on_bad_case == "exclude")
        require_every_zone(settings, [qualities[row.case_id] for row in rows])
        write_tables(folder, rows, qualities, findings)
        write_contract(folder / "contract.json", settings, labels=names, auto=auto_names(cfg.preprocess))
        lowest = min(rows, key=lambda row: row.gland_kept_fraction)
        facts = {
            "num_cases": len(rows),
            "settings": settings.as_dict(),
            "excluded_by_config": sorted(cfg.data.exclude),
            "excluded_by_checks": excluded,
            "lowest_gland_kept_fraction": lowest.gland_kept_fraction,
            "findings": [asdict(finding) for finding in findings],
        }
        write_json(folder / "preprocess_log.json", facts)
    log_summary(rows, num_excluded=len(excluded), lowest=lowest)
    tables = ("dataset.csv", "reference_quality.csv", "preprocess_log.json")
    return StageResult(
        inputs=[workspace.data],
        outputs=[workspace.preprocess],
        metrics={
            "preprocess/num_cases": len(rows),
            "preprocess/num_excluded": len(excluded),
            "preprocess/num_warnings": sum(not finding.is_error for finding in findings),
            "preprocess/lowest_gland_kept_fraction": lowest.gland_kept_fraction,
        },
        tables=[workspace.preprocess / name for name in tables],
        tags={"grid": settings.grid},
    )


def choose_settings(
    cfg: Config, workspace: Workspace, cases: Sequence[Case]
) -> tuple[PreprocessSettings, dict[str, int] | None]:
    """Return the settings, with the values that the data set decides, and the label of each name; None without names.

    Raises:
        InputError: If the labels do not fit the regions, or a grid is to be chosen and no mask can be read.
    """
    labels, auto = cfg.data.whole_gland_labels, auto_names(cfg.preprocess)
    require_gland_names(workspace.data, labels=labels, given=cfg.data.labels)
    regions, names = regions_in(workspace.data, cfg, labels=cfg.data.labels)
    chosen = choose_grid(cfg.preprocess, study_extents(cfg, cases)) if auto else {}
    settings = PreprocessSettings.of(cfg.preprocess, regions=regions, chosen=chosen)
    if settings.zones:
        zones = [f"{name} is label {listed(of_zone)}" for name, of_zone in settings.zones.items()]
        log.info("zones: %s", ", ".join(zones))
    if auto:
        log.info("grid chosen from the data set: %s", settings.grid)
    return settings, names


def preprocess_cases(
    cfg: Config, workspace: Workspace, cases: Sequence[Case], *, folder: Path, settings: PreprocessSettings
) -> tuple[list[CaseRecord], dict[str, CaseQuality]]:
    """Write the images, masks and thumbnails; return the rows of the usable cases, and the checks of all by case id."""
    allow_others = allows_other_labels(cfg)
    work = partial(preprocess_case, data=workspace.data, folder=folder, settings=settings, allow_others=allow_others)
    results = map_cases(work, cases, num_workers=cfg.machine.num_workers, label="preprocess")
    rows = [row for row, _ in results if row is not None]
    return rows, {case.case_id: quality for case, (_, quality) in zip(cases, results, strict=True)}


def write_tables(
    folder: Path, rows: Sequence[CaseRecord], qualities: Mapping[str, CaseQuality], findings: Sequence[Finding]
) -> None:
    """Write dataset.csv, thumbnails.npy and reference_quality.csv."""
    case_ids = [row.case_id for row in rows]
    write_dataset(folder / "dataset.csv", rows)
    join_thumbnails(folder / "thumbnails.npy", folder / THUMBNAILS, case_ids=case_ids)
    shutil.rmtree(folder / THUMBNAILS)
    write_quality_table(folder / "reference_quality.csv", qualities, findings=findings, used=set(case_ids))


def log_summary(rows: Sequence[CaseRecord], *, num_excluded: int, lowest: CaseRecord) -> None:
    """Log the number of cases, the range of gland volumes, and the gland that the window cuts most."""
    patients, volumes_ml = {row.patient_id for row in rows}, [row.gland_volume_ml for row in rows]
    glands = f"glands {math.floor(min(volumes_ml))}-{math.ceil(max(volumes_ml))} mL"
    log.info("%d cases of %d patients, %d excluded; %s", len(rows), len(patients), num_excluded, glands)
    kept = 100 * lowest.gland_kept_fraction
    log.info("the window keeps %.2f%% or more of every gland (least: %s)", kept, lowest.case_id)


def study_extents(cfg: Config, cases: Sequence[Case]) -> list[StudyExtent]:
    """Measure the studies whose mask can be read; the checks of preprocessing come later and give the reasons of the others."""
    measure = partial(_extent_of_mask, labels=cfg.data.whole_gland_labels)
    measured = map_cases(measure, cases, num_workers=cfg.machine.num_workers, label="choose the grid")
    extents = [extent for extent in measured if extent is not None]
    if not extents:
        raise InputError(
            f"preprocess.{auto_names(cfg.preprocess)[0]}=auto chooses the grid from the masks, and none of {len(cases)} has a "
            "gland that can be read\nstage=inspect lists the reasons; or set spacing_mm and image_size to numbers."
        )
    return extents


def _extent_of_mask(case: Case, *, labels: Sequence[int] | None) -> StudyExtent | None:
    try:
        assert case.mask is not None
        mask = read_mask(case.mask)
    except InputError:
        return None
    gland = whole_gland(mask.array, labels=labels)
    return study_extent(gland, mask.geometry) if gland.any() else None


def require_every_zone(settings: PreprocessSettings, qualities: Sequence[CaseQuality]) -> None:
    """Raise InputError if no mask has a zone: a network cannot learn it."""
    found = {label for one in qualities if one.reference is not None for label in one.reference.labels_ml}
    for name, labels in settings.zones.items():
        if not found.intersection(labels):
            raise InputError(
                f"target.regions: some mask must have {name}, label {listed(labels)}, and all {len(qualities)} masks together "
                f"have {listed(sorted(found))}\nCorrect data.labels, or leave the zone out."
            )


def preprocess_case(
    case: Case, *, data: Path, folder: Path, settings: PreprocessSettings, allow_others: bool
) -> tuple[CaseRecord | None, CaseQuality]:
    """Read, check, preprocess and write one case.

    Returns:
        The row of dataset.csv, None for a case that cannot be used, and the measurements with all findings.
    """
    loaded, quality = load_case(case, labels=settings.whole_gland_labels, allow_others=allow_others)
    if loaded is None:
        return None, quality
    try:
        result = preprocess_study(loaded.image, loaded.mask, settings=settings)
    except InputError as error:
        quality.findings.append(Finding("constant_image", str(error), is_error=True, case_id=case.case_id))
        return None, quality
    if result.gland_kept_fraction < MIN_KEPT_FRACTION:
        message = (
            f"the window keeps {result.gland_kept_fraction:.2%} of the gland, less than {MIN_KEPT_FRACTION:.1%}; "
            "use a larger preprocess.image_size or spacing_mm"
        )
        quality.findings.append(Finding("gland_cut", message, case_id=case.case_id))

    assert result.mask is not None
    write_volume(folder / "images" / f"{case.case_id}.nii.gz", result.image)
    write_volume(folder / "masks" / f"{case.case_id}.nii.gz", result.mask)
    (folder / THUMBNAILS).mkdir(exist_ok=True)
    np.save(folder / THUMBNAILS / f"{case.case_id}.npy", thumbnail(loaded.image))

    return _record(case, loaded, result, quality, data=data, settings=settings), quality


def _record(
    case: Case,
    loaded: LoadedCase,
    result: Preprocessed,
    quality: CaseQuality,
    *,
    data: Path,
    settings: PreprocessSettings,
) -> CaseRecord:
    """Return the row of dataset.csv of a preprocessed case."""
    assert case.mask is not None
    grid, gland = loaded.image.geometry, whole_gland(loaded.mask.array, labels=settings.whole_gland_labels)
    spacing_z_mm, spacing_y_mm, spacing_x_mm = grid.spacing_mm
    extent = study_extent(gland, grid)
    return CaseRecord(
        case_id=case.case_id,
        patient_id=case.patient_id,
        study_id=case.study_id,
        image=case.image.relative_to(data).as_posix(),
        mask=case.mask.relative_to(data).as_posix(),
        image_md5=content_md5(case.image),
        mask_md5=content_md5(case.mask),
        voxels_sha1=voxels_sha1(loaded.image),
        num_slices=grid.shape_vox[0],
        spacing_z_mm=spacing_z_mm,
        spacing_y_mm=spacing_y_mm,
        spacing_x_mm=spacing_x_mm,
        orientation=loaded.image.stored_orientation,
        gland_volume_ml=int(gland.sum()) * grid.voxel_volume_ml,
        gland_reach_mm=extent.gland_reach_mm,
        gland_edge_mm=extent.gland_edge_mm,
        gland_kept_fraction=result.gland_kept_fraction,
        oracle_crop=settings.crop == "mask",
        warnings=";".join(sorted({finding.check for finding in quality.findings if not finding.is_error})),
        attributes=case.attributes,
    )
