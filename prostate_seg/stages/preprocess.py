"""Stage preprocess: look at every case, refuse the bad ones by name, bring the others to the network's grid."""

import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import atomic_folder, write_json
from prostate_seg.common.progress import map_cases
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.data.cases import Case, discover_cases
from prostate_seg.data.dataset import CaseRecord, join_thumbnails, write_contract, write_dataset
from prostate_seg.data.label_names import require_gland_names
from prostate_seg.data.loading import LoadedCase, bad_case, load_case, refuse_or_exclude
from prostate_seg.data.quality_table import write_quality_table
from prostate_seg.imaging.fingerprint import thumbnail, voxels_sha1
from prostate_seg.imaging.image_io import content_md5, write_volume
from prostate_seg.imaging.preprocessing import Preprocessed, PreprocessSettings, preprocess_study
from prostate_seg.imaging.quality import CaseQuality, Finding, check_slice_planes, check_zones, whole_gland
from prostate_seg.stages.common import identical_files, preprocess_settings

log = logging.getLogger(__name__)

ENOUGH_KEPT = 0.995
"""Part of the gland that the window must keep; a case below it is a warning."""

THUMBNAILS = "thumbnails"
"""Folder with a file per case, until they are one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one case."""

    case_id: str
    row: CaseRecord | None
    """None for a bad case."""
    quality: CaseQuality
    """With the findings of preprocessing itself."""


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write preprocess/: images, masks, dataset.csv, reference_quality.csv, thumbnails.npy, the log and contract.json."""
    settings = preprocess_settings(cfg)
    cases, findings = discover_cases(workspace.data, patient_pattern=cfg.data.patient_pattern, exclude=cfg.data.exclude)
    require_gland_names(workspace.data, labels=settings.whole_gland_labels)
    log.info("preprocess %d cases of %s", len(cases), workspace.data)
    with atomic_folder(workspace.preprocess) as folder:
        work = partial(preprocess_case, data=workspace.data, folder=folder, settings=settings)
        outcomes = map_cases(work, cases, num_workers=cfg.machine.num_workers, label="preprocess")
        findings = findings + [finding for outcome in outcomes for finding in outcome.quality.findings]
        rows = [outcome.row for outcome in outcomes if outcome.row is not None]
        findings += identical_files(
            {kind: {row.case_id: getattr(row, f"{kind}_md5") for row in rows} for kind in ("image", "mask")}
        )
        findings += check_zones(_zones(outcomes, labels=settings.whole_gland_labels))
        findings += check_slice_planes(
            {row.case_id: (row.spacing_z_mm, row.spacing_y_mm, row.spacing_x_mm) for row in rows}
        )
        exclude = cfg.data.on_bad_case == "exclude"
        excluded = refuse_or_exclude(findings, num_usable=len(rows), exclude=exclude)
        write_dataset(folder / "dataset.csv", rows)
        join_thumbnails(folder / "thumbnails.npy", folder / THUMBNAILS, case_ids=[row.case_id for row in rows])
        shutil.rmtree(folder / THUMBNAILS)
        write_quality_table(
            folder / "reference_quality.csv",
            {outcome.case_id: outcome.quality for outcome in outcomes},
            findings=findings,
            used={row.case_id for row in rows},
        )
        write_contract(folder / "contract.json", settings)
        write_json(folder / "preprocess_log.json", _log_of(findings, rows, excluded, cfg.data.exclude, settings))
    for line in _summary(rows, excluded):
        log.info("%s", line)
    return StageResult(
        inputs=[workspace.data],
        outputs=[workspace.preprocess],
        metrics=_metrics(rows, excluded, findings),
        tables=[
            workspace.preprocess / name for name in ("dataset.csv", "reference_quality.csv", "preprocess_log.json")
        ],
    )


def preprocess_case(case: Case, *, data: Path, folder: Path, settings: PreprocessSettings) -> Outcome:
    """Read, check, preprocess and write one case; a bad case becomes findings, never an exception."""
    loaded, quality = load_case(case, labels=settings.whole_gland_labels)
    if loaded is None:
        return Outcome(case_id=case.case_id, row=None, quality=quality)
    try:
        result = preprocess_study(loaded.image, loaded.mask, settings=settings)
    except InputError as error:
        quality.findings.append(bad_case(case.case_id, "constant_image", str(error)))
        return Outcome(case_id=case.case_id, row=None, quality=quality)
    quality.findings.extend(_cut_gland(case.case_id, result))
    _write(result, loaded, case.case_id, folder)
    row = _row(case, loaded, result, quality.findings, data=data, settings=settings)
    return Outcome(case_id=case.case_id, row=row, quality=quality)


def _cut_gland(case_id: str, result: Preprocessed) -> list[Finding]:
    """Warn of a window that cuts gland off."""
    if result.gland_kept_fraction >= ENOUGH_KEPT:
        return []
    message = (
        f"the window keeps {result.gland_kept_fraction:.2%} of the gland, less than {ENOUGH_KEPT:.1%}; "
        "use a larger preprocess.image_size or spacing_mm"
    )
    return [Finding(case_id=case_id, check="gland_cut", is_error=False, message=message)]


def _write(result: Preprocessed, loaded: LoadedCase, case_id: str, folder: Path) -> None:
    assert result.mask is not None
    write_volume(folder / "images" / f"{case_id}.nii.gz", result.image)
    write_volume(folder / "masks" / f"{case_id}.nii.gz", result.mask)
    (folder / THUMBNAILS).mkdir(exist_ok=True)
    np.save(folder / THUMBNAILS / f"{case_id}.npy", thumbnail(loaded.image))


def _row(
    case: Case,
    loaded: LoadedCase,
    result: Preprocessed,
    findings: Sequence[Finding],
    *,
    data: Path,
    settings: PreprocessSettings,
) -> CaseRecord:
    assert case.mask is not None
    grid, gland = loaded.image.geometry, whole_gland(loaded.mask.array, labels=settings.whole_gland_labels)
    spacing_z_mm, spacing_y_mm, spacing_x_mm = grid.spacing_mm
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
        gland_kept_fraction=result.gland_kept_fraction,
        oracle_crop=settings.crop == "mask",
        warnings=";".join(sorted({finding.check for finding in findings if not finding.is_error})),
        attributes=case.attributes,
    )


def _zones(outcomes: Sequence[Outcome], *, labels: Sequence[int] | None) -> dict[str, list[int]]:
    """Return the labels that are gland in each mask that could be measured, refused ones included."""
    return {
        outcome.case_id: [label for label in outcome.quality.reference.labels_ml if labels is None or label in labels]
        for outcome in outcomes
        if outcome.quality.reference is not None
    }


def _log_of(
    findings: Sequence[Finding],
    rows: Sequence[CaseRecord],
    excluded: Sequence[str],
    asked: Sequence[str],
    settings: PreprocessSettings,
) -> dict[str, object]:
    kept = [row.gland_kept_fraction for row in rows]
    return {
        "num_cases": len(rows),
        "settings": settings.as_dict(),
        "excluded_by_config": sorted(asked),
        "excluded_by_checks": list(excluded),
        "lowest_gland_kept_fraction": min(kept),
        "findings": [asdict(finding) for finding in findings],
    }


def _metrics(rows: Sequence[CaseRecord], excluded: Sequence[str], findings: Sequence[Finding]) -> dict[str, float]:
    return {
        "preprocess/num_cases": len(rows),
        "preprocess/num_excluded": len(excluded),
        "preprocess/num_warnings": sum(not finding.is_error for finding in findings),
        "preprocess/lowest_gland_kept_fraction": min(row.gland_kept_fraction for row in rows),
    }


def _summary(rows: Sequence[CaseRecord], excluded: Sequence[str]) -> list[str]:
    volumes = [row.gland_volume_ml for row in rows]
    lowest = min(rows, key=lambda row: row.gland_kept_fraction)
    return [
        f"{len(rows)} cases of {len({row.patient_id for row in rows})} patients, {len(excluded)} excluded; "
        f"glands {math.floor(min(volumes))}-{math.ceil(max(volumes))} mL",
        f"the window keeps {lowest.gland_kept_fraction:.2%} or more of every gland (least: {lowest.case_id})",
    ]
