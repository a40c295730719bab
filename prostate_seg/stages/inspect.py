"""Stage inspect: show the contents of a data set and all findings on it, with a picture of each case, before preprocessing."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import atomic_folder, write_csv, write_json
from prostate_seg.common.progress import map_cases
from prostate_seg.common.tables import table_lines
from prostate_seg.config.schema import Config
from prostate_seg.config.workspace import StageResult, Workspace
from prostate_seg.data.cases import Case, discover_cases
from prostate_seg.data.label_names import require_gland_names
from prostate_seg.data.loading import bad_case, check_files
from prostate_seg.imaging.geometry import Volume
from prostate_seg.imaging.image_io import content_md5
from prostate_seg.imaging.quality import CaseQuality, Finding, check_slice_planes, check_zones, whole_gland
from prostate_seg.reporting.overlays import Panel, Picture, choose_panels, contact_sheet_figure, picture_of
from prostate_seg.reporting.plots import save_png
from prostate_seg.stages.common import identical_files

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
    """Measures and picture of one case."""

    case: Case
    quality: CaseQuality
    """With all findings on the case."""
    image: Volume | None
    """Image without its voxels; None if it cannot be read."""
    picture: Picture | None
    md5s: dict[str, str] = field(default_factory=dict)
    """Hashes of image and mask."""

    @property
    def measures(self) -> dict[str, float]:
        """Values of `MEASURES`; NaN for those that could not be measured."""
        values = dict.fromkeys(MEASURES, float("nan"))
        if self.image is not None:
            grid = self.image.geometry
            values |= dict(zip(list(MEASURES)[:4], (grid.shape_vox[0], *grid.spacing_mm), strict=True))
            values["field_of_view_mm"] = max(grid.shape_vox[axis] * grid.spacing_mm[axis] for axis in (1, 2))
        if self.quality.reference is not None:
            values["gland_volume_ml"] = self.quality.reference.gland_volume_ml
        return values

    @property
    def labels(self) -> list[int]:
        """Labels of the mask; empty if it could not be measured."""
        return [] if self.quality.reference is None else sorted(self.quality.reference.labels_ml)


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write inspect/: cases.csv, findings.csv, summary.json and contact_sheet.png; log the same in short."""
    labels = cfg.data.whole_gland_labels
    cases, findings = discover_cases(
        workspace.data, patient_pattern=cfg.data.patient_pattern, exclude=cfg.data.exclude, masks_required=False
    )
    if any(case.mask for case in cases):
        message = "other images have a mask and this has none; add it, or list it under data.exclude"
        findings += [bad_case(case.case_id, "image_without_mask", message) for case in cases if case.mask is None]
    work = partial(inspect_case, labels=labels)
    inspections = map_cases(work, cases, num_workers=cfg.machine.num_workers, label="inspect")
    findings += [finding for one in inspections for finding in one.quality.findings]
    findings += identical_files(
        {
            kind: {one.case.case_id: one.md5s[kind] for one in inspections if kind in one.md5s}
            for kind in ("image", "mask")
        }
    )
    gland_labels = {
        one.case.case_id: [label for label in one.labels if labels is None or label in labels]
        for one in inspections
        if one.labels
    }
    spacings_mm = {one.case.case_id: one.image.geometry.spacing_mm for one in inspections if one.image is not None}
    findings += [*check_zones(gland_labels), *check_slice_planes(spacings_mm)]
    findings_of = {case.case_id: [finding for finding in findings if finding.case_id == case.case_id] for case in cases}
    table = pd.DataFrame([_row(one, findings_of[one.case.case_id]) for one in inspections])
    found = _findings_table(findings)
    summary = summarise(inspections, findings)
    panels = [_panel(one, findings_of[one.case.case_id]) for one in inspections]
    shown = choose_panels(panels)
    with atomic_folder(workspace.inspection) as folder:
        write_csv(folder / "cases.csv", table, float_format="%.6g")
        write_csv(folder / "findings.csv", found)
        write_json(folder / "summary.json", summary)
        if shown:
            title = f"{workspace.data}: {len(shown)} of {len(panels)} cases"
            save_png(folder / "contact_sheet.png", contact_sheet_figure(shown, title=title))
    exclude = cfg.data.on_bad_case == "exclude"
    logged = found if exclude else found[found["severity"] == "warning"]  # errors end the stage
    for line in [*_summary_lines(summary), *_case_lines(table), *_finding_lines(logged)]:
        log.info("%s", line)
    log.info("tables and contact_sheet.png are in %s", workspace.inspection)
    require_gland_names(workspace.data, labels=labels)
    _conclude(summary, found[found["severity"] == "error"], exclude=exclude)
    return StageResult()


def inspect_case(case: Case, *, labels: Sequence[int] | None) -> Inspection:
    """Read and check one case; problems become findings, never an exception."""
    image, mask, quality = check_files(case, labels=labels)
    md5s = {}
    for kind, volume, path in (("image", image, case.image), ("mask", mask, case.mask)):
        if volume is not None and path is not None:
            md5s[kind] = content_md5(path)
    picture = None
    if image is not None and np.isfinite(image.array).all():
        gland = None
        if mask is not None and mask.geometry.is_same_grid(image.geometry):
            gland = whole_gland(mask.array, labels=labels)
        picture = picture_of(image, gland if gland is not None and gland.any() else None)
    if image is not None:
        image = replace(image, array=np.empty(0))
    return Inspection(case=case, quality=quality, image=image, picture=picture, md5s=md5s)


def _row(one: Inspection, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the row of cases.csv."""
    return {
        "case_id": one.case.case_id,
        "patient_id": one.case.patient_id,
        **one.measures,
        "orientation": "" if one.image is None else one.image.stored_orientation,
        "labels": " ".join(map(str, one.labels)),
        "usable": one.case.mask is not None and not any(finding.is_error for finding in findings),
        "findings": ";".join(sorted({finding.check for finding in findings})),
        **one.case.attributes,
    }


def _panel(one: Inspection, findings: Sequence[Finding]) -> Panel:
    """Return the case's panel of the contact sheet."""
    ordered = sorted(findings, key=lambda finding: (not finding.is_error, finding.check))
    checks = list(dict.fromkeys(finding.check for finding in ordered))
    volume_ml = one.measures["gland_volume_ml"]
    volume = [] if np.isnan(volume_ml) else [f"{volume_ml:.0f} mL"]
    return Panel(
        case_id=one.case.case_id,
        caption=[*volume, *checks[:2], *(["..."] if len(checks) > 2 else [])],
        picture=one.picture,
        is_error=any(finding.is_error for finding in findings),
        is_warning=bool(findings),
    )


def summarise(inspections: Sequence[Inspection], findings: Sequence[Finding]) -> dict[str, Any]:
    """Return counts and, of each measure, minimum, median and maximum."""
    bad = {finding.case_id for finding in findings if finding.is_error}
    measures = pd.DataFrame([one.measures for one in inspections], columns=list(MEASURES)).dropna(axis=1, how="all")
    patients = Counter(one.case.patient_id for one in inspections)
    orientations = Counter(one.image.stored_orientation for one in inspections if one.image is not None)
    checks = Counter(finding.check for finding in findings)
    return {
        "num_cases": len(inspections),
        "num_usable": sum(one.case.mask is not None and one.case.case_id not in bad for one in inspections),
        "num_bad": len(bad),
        "num_without_mask": sum(one.case.mask is None for one in inspections),
        "num_patients": len(patients),
        "num_patients_with_several_studies": sum(num > 1 for num in patients.values()),
        "orientations": dict(sorted(orientations.items())),
        "measures": {
            str(name): {"smallest": float(one.min()), "median": float(one.median()), "largest": float(one.max())}
            for name, one in measures.items()
        },
        "findings": dict(sorted(checks.items())),
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
    more = [f"and {len(listed) - MAX_ROWS} more in cases.csv"] if len(listed) > MAX_ROWS else []
    return [*table_lines(heads, rows, numbers=["slices", "gland mL"]), *more] if rows else []


def _findings_table(findings: Sequence[Finding]) -> pd.DataFrame:
    rows = [
        (one.case_id, one.check, "error" if one.is_error else "warning", one.message)
        for one in sorted(findings, key=lambda one: (not one.is_error, one.case_id, one.check))
    ]
    return pd.DataFrame(rows, columns=["case_id", "check", "severity", "message"])


def _finding_lines(table: pd.DataFrame) -> list[str]:
    lines = [f"{row.severity}: {row.case_id}: {row.check}: {row.message}" for row in table.head(MAX_ROWS).itertuples()]
    return [*lines, *([f"and {len(table) - MAX_ROWS} more in findings.csv"] if len(table) > MAX_ROWS else [])]


def _conclude(summary: dict[str, Any], errors: pd.DataFrame, *, exclude: bool) -> None:
    """Log whether this data set can be trained on.

    Raises:
        InputError: If no image can be read, or a case cannot be used and bad cases are not to be excluded.
    """
    lines, num_bad = _finding_lines(errors), summary["num_bad"]
    if not summary["measures"]:
        raise InputError(f"none of {summary['num_cases']} cases can be read: {'; '.join(lines[:3])}")
    if num_bad and not exclude:
        listing = "\n".join(f"  {line}" for line in lines)
        raise InputError(
            f"{num_bad} cases cannot be used, and stage=preprocess will refuse them:\n{listing}\n"
            "Fix them, list them under data.exclude, or go on without them: data.on_bad_case=exclude"
        )
    if num_bad:
        log.info("stage=preprocess will exclude the %d cases that cannot be used", num_bad)
    elif summary["num_usable"]:
        log.info("all %s cases can be used: go on with stage=preprocess", summary["num_usable"])
    else:
        log.info("the images can be read; to train on them they need masks")
