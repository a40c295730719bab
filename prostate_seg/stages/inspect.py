"""Stage inspect: show the contents of a data set and all findings on it, with a picture of each case, before preprocessing."""

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import atomic_folder, write_csv, write_json
from prostate_seg.common.progress import map_cases
from prostate_seg.common.tables import table_lines
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import Workspace
from prostate_seg.data.cases import Case, discover_cases
from prostate_seg.data.label_names import require_gland_names
from prostate_seg.data.loading import check_files
from prostate_seg.imaging import target_grid
from prostate_seg.imaging.geometry import Finding, Geometry
from prostate_seg.imaging.image_io import content_md5
from prostate_seg.imaging.quality import CaseQuality
from prostate_seg.imaging.regions import Regions, region_masks
from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.imaging.target_grid import StudyExtent, spacing_in_words, study_extent
from prostate_seg.reporting.figures.overlays import Panel, Picture, choose_panels, contact_sheet_figure, picture_of
from prostate_seg.reporting.figures.plots import save_png
from prostate_seg.steps.dataset import allows_other_labels, findings_of_data_set, regions_in

log = logging.getLogger(__name__)

MAX_ROWS = 40
"""Maximum number of cases or findings in a table on the terminal."""

MEASURES = {
    "num_slices": "slices",
    "spacing_z_mm": "slice spacing, mm",
    "spacing_y_mm": "pixel height, mm",
    "spacing_x_mm": "pixel width, mm",
    "field_of_view_mm": "field of view, mm",
    "gland_volume_ml": "gland, mL",
}
"""Measures of a case whose minimum, median and maximum are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Measurements and picture of one case."""

    case: Case
    quality: CaseQuality
    """With all findings on the case."""
    geometry: Geometry | None
    """Grid of the image; None if it cannot be read."""
    orientation: str
    """Of the image as stored; empty if it cannot be read."""
    extent: StudyExtent | None
    """None without a gland on the image's grid."""
    picture: Picture | None
    md5s: dict[str, str]
    """Hashes of image and mask, where they can be read."""


def run(cfg: Config, workspace: Workspace) -> None:
    """Write inspect/: cases.csv, findings.csv, summary.json and contact_sheet.png; log the same in short."""
    regions, _ = regions_in(workspace.data, cfg, labels=cfg.data.labels)
    inspections, findings = inspect_cases(cfg, workspace, regions)
    of_case = defaultdict(list)
    for finding in findings:
        of_case[finding.case_id].append(finding)
    rows = [(one.case_id, one.check, "error" if one.is_error else "warning", one.message) for one in findings]
    listing = pd.DataFrame(rows, columns=["case_id", "check", "severity", "message"])
    table = pd.DataFrame([_row(one, of_case[one.case.case_id]) for one in inspections])
    panels = [_panel(one, of_case[one.case.case_id]) for one in inspections]
    summary = summarise(table, findings, num_without_mask=sum(one.case.mask is None for one in inspections))
    summary["grids"] = grids(inspections)
    with atomic_folder(workspace.inspection) as folder:
        write_csv(folder / "cases.csv", table, float_format="%.6g")
        write_csv(folder / "findings.csv", listing)
        write_json(folder / "summary.json", summary)
        if shown := choose_panels(panels):
            title = f"{workspace.data}: {len(shown)} of {len(panels)} cases"
            save_png(folder / "contact_sheet.png", contact_sheet_figure(shown, title=title, zones=list(regions)[1:]))

    is_error, exclude = listing["severity"] == "error", cfg.data.on_bad_case == "exclude"
    logged = listing if exclude else listing[~is_error]  # errors end the stage
    for line in [*_summary_lines(summary), *_case_lines(table), *_finding_lines(logged)]:
        log.info("%s", line)
    log.info("tables and contact_sheet.png are in %s", workspace.inspection)
    require_gland_names(workspace.data, labels=cfg.data.whole_gland_labels, given=cfg.data.labels)
    _conclude(summary, _finding_lines(listing[is_error]), exclude=exclude)


def inspect_cases(cfg: Config, workspace: Workspace, regions: Regions) -> tuple[list[Inspection], list[Finding]]:
    """Read and check every case; return all findings too, those of the data set as a whole included, errors first."""
    cases, findings = discover_cases(
        workspace.data, patient_pattern=cfg.data.patient_pattern, exclude=cfg.data.exclude, masks_required=False
    )
    if any(case.mask for case in cases):
        message = "other images have a mask and this has none; add it, or list it under data.exclude"
        without = [case.case_id for case in cases if case.mask is None]
        findings += [Finding("image_without_mask", message, is_error=True, case_id=one) for one in without]
    work = partial(inspect_case, regions=regions, allow_others=allows_other_labels(cfg))
    inspections = map_cases(work, cases, num_workers=cfg.machine.num_workers, label="inspect")
    by_id = {one.case.case_id: one for one in inspections}
    findings += findings_of_data_set(
        {case_id: one.quality for case_id, one in by_id.items()},
        md5s={case_id: one.md5s for case_id, one in by_id.items()},
        spacings_mm={case_id: one.geometry.spacing_mm for case_id, one in by_id.items() if one.geometry is not None},
        labels=regions[WHOLE_GLAND],
    )
    return inspections, sorted(findings, key=lambda one: (not one.is_error, one.case_id, one.check))


def inspect_case(case: Case, *, regions: Regions, allow_others: bool) -> Inspection:
    """Read and check one case; problems become findings, never an exception. `allow_others` as in `check_case`."""
    image, mask, quality = check_files(case, labels=regions[WHOLE_GLAND], allow_others=allow_others)
    masks: list[np.ndarray] = []
    if image is not None and mask is not None and mask.geometry.is_same_grid(image.geometry):
        masks = list(region_masks(mask.array, regions))
    if masks and not masks[0].any():  # no gland
        masks = []
    files = (("image", image, case.image), ("mask", mask, case.mask))
    return Inspection(
        case=case,
        quality=quality,
        geometry=None if image is None else image.geometry,
        orientation="" if image is None else image.stored_orientation,
        extent=study_extent(masks[0], image.geometry) if image is not None and masks else None,
        picture=picture_of(image, masks) if image is not None and np.isfinite(image.array).all() else None,
        md5s={kind: content_md5(path) for kind, volume, path in files if volume is not None and path is not None},
    )


def grids(inspections: Sequence[Inspection]) -> dict[str, str]:
    """Return the grid of `auto` and the spacings that nnU-Net and Auto3DSeg derive from the same studies, in words."""
    studies = [one.extent for one in inspections if one.extent is not None]
    geometries = [one.geometry for one in inspections if one.geometry is not None]
    found = {}
    if studies:
        spacing_mm = target_grid.auto_spacing_mm(studies)
        size = target_grid.auto_image_size(studies, spacing_mm=spacing_mm, crop="center")
        found["auto"] = f"{spacing_in_words(spacing_mm)}, {size} x {size} voxels a slice"
    if geometries:
        spacings_mm = [grid.spacing_mm for grid in geometries]
        shapes_vox = [grid.shape_vox for grid in geometries]
        found["nnU-Net"] = spacing_in_words(target_grid.nnunet_spacing_mm(spacings_mm, shapes_vox=shapes_vox))
        found["Auto3DSeg"] = spacing_in_words(target_grid.auto3dseg_spacing_mm(spacings_mm))
    return found


def _row(one: Inspection, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the row of cases.csv; measures that could not be taken are NaN."""
    measures, reference = dict.fromkeys(MEASURES, float("nan")), one.quality.reference
    if (grid := one.geometry) is not None:
        measures |= dict(zip(list(MEASURES)[:4], (grid.shape_vox[0], *grid.spacing_mm), strict=True))
        measures["field_of_view_mm"] = max(grid.shape_vox[axis] * grid.spacing_mm[axis] for axis in (1, 2))
    if reference is not None:
        measures["gland_volume_ml"] = reference.gland_volume_ml
    return {
        "case_id": one.case.case_id,
        "patient_id": one.case.patient_id,
        **measures,
        "orientation": one.orientation,
        "labels": "" if reference is None else " ".join(map(str, sorted(reference.labels_ml))),
        "usable": one.case.mask is not None and not any(finding.is_error for finding in findings),
        "findings": ";".join(sorted({finding.check for finding in findings})),
        **one.case.attributes,
    }


def _panel(one: Inspection, findings: Sequence[Finding]) -> Panel:
    """Return the case's panel of the contact sheet, with the first two of its findings, errors first."""
    checks, reference = list(dict.fromkeys(finding.check for finding in findings)), one.quality.reference
    volume = [] if reference is None else [f"{reference.gland_volume_ml:.0f} mL"]
    return Panel(
        case_id=one.case.case_id,
        caption=[*volume, *checks[:2], *(["..."] if len(checks) > 2 else [])],
        picture=one.picture,
        severity=2 if any(finding.is_error for finding in findings) else int(bool(findings)),
    )


def summarise(table: pd.DataFrame, findings: Sequence[Finding], *, num_without_mask: int) -> dict[str, Any]:
    """Return counts and, of each measure, minimum, median and maximum."""
    table = table.reindex(columns=["patient_id", "orientation", "usable", *MEASURES])  # a table without rows has none
    patients, orientations = table["patient_id"].value_counts(), Counter(filter(None, table["orientation"]))
    measures = table[list(MEASURES)].dropna(axis=1, how="all")
    return {
        "num_cases": len(table),
        "num_usable": int(table["usable"].sum()),
        "num_bad": len({finding.case_id for finding in findings if finding.is_error}),
        "num_without_mask": num_without_mask,
        "num_patients": len(patients),
        "num_patients_with_several_studies": int((patients > 1).sum()),
        "orientations": dict(sorted(orientations.items())),
        "measures": {
            str(name): {"smallest": float(one.min()), "median": float(one.median()), "largest": float(one.max())}
            for name, one in measures.items()
        },
        "findings": dict(sorted(Counter(finding.check for finding in findings).items())),
    }


def _summary_lines(summary: dict[str, Any]) -> list[str]:
    heads = ["smallest", "median", "largest"]
    rows = [
        [MEASURES[name], *(f"{values[head]:.4g}" for head in heads)] for name, values in summary["measures"].items()
    ]
    orientations = ", ".join(f"{code} {num}" for code, num in summary["orientations"].items()) or "none could be read"
    return [
        f"{summary['num_cases']} cases of {summary['num_patients']} patients, "
        f"{summary['num_patients_with_several_studies']} with several studies; {summary['num_without_mask']} without mask; "
        f"orientation {orientations}",
        *table_lines(["", *heads], rows, numbers=heads),
        *(f"grid of {name}: {grid}" for name, grid in summary["grids"].items()),
    ]


def _case_lines(table: pd.DataFrame) -> list[str]:
    """Return a table of all cases of a small data set, or of those with findings of a large one."""
    listed = table if len(table) <= MAX_ROWS else table[table["findings"] != ""]
    rows = [
        [
            row["case_id"],
            "" if np.isnan(row["num_slices"]) else f"{row['num_slices']:.0f}",
            " x ".join(f"{row[f'spacing_{axis}_mm']:.3g}" for axis in "zyx") if row["orientation"] else "",
            row["orientation"],
            "" if np.isnan(row["gland_volume_ml"]) else f"{row['gland_volume_ml']:.1f}",
            row["labels"],
            row["findings"].replace(";", ", "),
        ]
        for row in listed.head(MAX_ROWS).to_dict("records")
    ]
    heads = ["case", "slices", "spacing z, y, x mm", "axes", "gland mL", "labels", "findings"]
    return [*table_lines(heads, rows, numbers=["slices", "gland mL"]), *_more(len(listed), "cases.csv")] if rows else []


def _finding_lines(listing: pd.DataFrame) -> list[str]:
    rows = listing.head(MAX_ROWS).itertuples()
    lines = [f"{row.severity}: {row.case_id}: {row.check}: {row.message}" for row in rows]
    return [*lines, *_more(len(listing), "findings.csv")]


def _more(number: int, file: str) -> list[str]:
    return [f"and {number - MAX_ROWS} more in {file}"] if number > MAX_ROWS else []


def _conclude(summary: dict[str, Any], errors: Sequence[str], *, exclude: bool) -> None:
    """Log whether this data set can be trained on; refuse one without a readable image, or with bad cases to keep."""
    num_bad = summary["num_bad"]
    if not summary["measures"]:
        raise InputError(f"none of {summary['num_cases']} cases can be read: {'; '.join(errors[:3])}")
    if num_bad and not exclude:
        listing = "\n".join(f"  {line}" for line in errors)
        raise InputError(
            f"{num_bad} of {summary['num_cases']} cases cannot be used, and stage=preprocess will refuse them:\n{listing}\n"
            "Fix them, list them under data.exclude, or go on without them: data.on_bad_case=exclude"
        )
    if num_bad:
        log.info("stage=preprocess will exclude the %d cases that cannot be used", num_bad)
    elif summary["num_usable"]:
        log.info("all %s cases can be used: go on with stage=preprocess", summary["num_usable"])
    else:
        log.info("the images can be read; to train on them they need masks")
