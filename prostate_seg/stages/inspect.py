"""Stage inspect: show a data set before anything is made of it: what it holds, what is wrong, and a picture of each case."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

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
from prostate_seg.data.loading import bad_case, read_case
from prostate_seg.imaging.geometry import Volume
from prostate_seg.imaging.image_io import content_md5
from prostate_seg.imaging.quality import CaseQuality, Finding, check_case, check_slice_planes, check_zones, whole_gland
from prostate_seg.reporting.overlays import Panel, Picture, choose_panels, contact_sheet_figure, picture_of
from prostate_seg.reporting.plots import save_png
from prostate_seg.stages.common import identical_files

log = logging.getLogger(__name__)

MAX_ROWS = 40
"""Cases that the table on the terminal lists; cases.csv has all."""

MEASURES = {
    "num_slices": "slices",
    "spacing_z_mm": "slice spacing, mm",
    "spacing_y_mm": "pixel height, mm",
    "spacing_x_mm": "pixel width, mm",
    "field_of_view_mm": "field of view, mm",
    "gland_volume_ml": "gland, mL",
}
"""Numbers of a case of which smallest, median and largest are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was seen of one case."""

    case: Case
    findings: list[Finding]
    image: Volume | None = None
    """Without its voxels; None where it cannot be read."""
    quality: CaseQuality | None = None
    picture: Picture | None = None
    md5s: dict[str, str] = field(default_factory=dict)
    """Of image and mask."""


def run(cfg: Config, workspace: Workspace) -> StageResult:
    """Write inspect/: cases.csv, findings.csv, summary.json and contact_sheet.png; print the same in short."""
    labels = cfg.data.whole_gland_labels
    cases, findings = discover_cases(
        workspace.data, patient_pattern=cfg.data.patient_pattern, exclude=cfg.data.exclude, masks_required=False
    )
    if any(case.mask for case in cases):
        findings += [_no_mask(case) for case in cases if case.mask is None]
    looks = map_cases(partial(look_at, labels=labels), cases, num_workers=cfg.machine.num_workers, label="inspect")
    findings += [finding for look in looks for finding in look.findings]
    findings += identical_files(
        {kind: {one.case.case_id: one.md5s[kind] for one in looks if kind in one.md5s} for kind in ("image", "mask")}
    )
    findings += check_zones(_labels(looks, labels=labels))
    images = {look.case.case_id: look.image for look in looks if look.image is not None}
    findings += check_slice_planes({case_id: image.geometry.spacing_mm for case_id, image in images.items()})
    table, summary = cases_table(looks, findings), summarise(looks, findings)
    panels = [panel_of(look, findings) for look in looks]
    shown = choose_panels(panels)
    with atomic_folder(workspace.inspection) as folder:
        write_csv(folder / "cases.csv", table, float_format="%.6g")
        write_csv(folder / "findings.csv", _findings_table(findings))
        write_json(folder / "summary.json", summary)
        if shown:
            title = f"{workspace.data}: {len(shown)} of {len(panels)} cases"
            save_png(folder / "contact_sheet.png", contact_sheet_figure(shown, title=title))
    exclude = cfg.data.on_bad_case == "exclude"
    logged = [finding for finding in findings if exclude or not finding.is_error]  # the others end the stage
    for line in [*describe(summary), *_case_lines(table), *_finding_lines(logged)]:
        log.info("%s", line)
    log.info("tables and contact_sheet.png are in %s", workspace.inspection)
    require_gland_names(workspace.data, labels=labels)
    _conclude(summary, findings, exclude=exclude)
    return StageResult()


def look_at(case: Case, *, labels: Sequence[int] | None) -> Look:
    """Read and check one case; what is wrong becomes findings, never an exception."""
    image, mask, unreadable = read_case(case)
    volumes = {"image": (image, case.image), "mask": (mask, case.mask)}
    md5s = {
        kind: content_md5(path) for kind, (volume, path) in volumes.items() if volume is not None and path is not None
    }
    quality = check_case(case.case_id, image, mask, labels=labels)
    return Look(
        case=case,
        findings=[*unreadable, *quality.findings],
        image=None if image is None else replace(image, array=np.empty(0)),
        quality=quality,
        picture=_picture(image, mask, labels=labels),
        md5s=md5s,
    )


def _picture(image: Volume | None, mask: Volume | None, *, labels: Sequence[int] | None) -> Picture | None:
    if image is None or not np.isfinite(image.array).all():
        return None
    if mask is None or not mask.geometry.is_same_grid(image.geometry):
        return picture_of(image, None)
    gland = whole_gland(mask.array, labels=labels)
    return picture_of(image, gland if gland.any() else None)


def cases_table(looks: Sequence[Look], findings: Sequence[Finding]) -> pd.DataFrame:
    """Return one row per case: its grid, its gland, and what was found."""
    rows = []
    for look in looks:
        of_case = [finding for finding in findings if finding.case_id == look.case.case_id]
        rows.append(
            {
                "case_id": look.case.case_id,
                "patient_id": look.case.patient_id,
                **_measures(look),
                "orientation": "" if look.image is None else look.image.stored_orientation,
                "labels": " ".join(str(label) for label in sorted(_labels_of(look))),
                "usable": look.case.mask is not None and not any(finding.is_error for finding in of_case),
                "findings": ";".join(sorted({finding.check for finding in of_case})),
                **look.case.attributes,
            }
        )
    return pd.DataFrame(rows)


def _measures(look: Look) -> dict[str, float]:
    """Return the numbers of `MEASURES`; NaN for those that could not be measured."""
    found = dict.fromkeys(MEASURES, float("nan"))
    if look.image is not None:
        grid = look.image.geometry
        found |= dict(zip(list(MEASURES)[:4], (grid.shape_vox[0], *grid.spacing_mm), strict=True))
        found["field_of_view_mm"] = max(grid.shape_vox[axis] * grid.spacing_mm[axis] for axis in (1, 2))
    if look.quality is not None and look.quality.reference is not None:
        found["gland_volume_ml"] = look.quality.reference.gland_volume_ml
    return found


def _labels_of(look: Look) -> list[int]:
    reference = None if look.quality is None else look.quality.reference
    return [] if reference is None else list(reference.labels_ml)


def _labels(looks: Iterable[Look], *, labels: Sequence[int] | None) -> dict[str, list[int]]:
    """Return the labels that are gland in each mask that could be measured."""
    found = {look.case.case_id: _labels_of(look) for look in looks}
    return {
        case_id: [label for label in of_case if labels is None or label in labels]
        for case_id, of_case in found.items()
        if of_case
    }


def summarise(looks: Sequence[Look], findings: Sequence[Finding]) -> dict[str, object]:
    """Return counts and, of each measure, smallest, median and largest."""
    bad = {finding.case_id for finding in findings if finding.is_error}
    numbers = pd.DataFrame([_measures(look) for look in looks], columns=list(MEASURES)).dropna(
        axis="columns", how="all"
    )
    patients = pd.Series([look.case.patient_id for look in looks]).value_counts()
    checks = pd.Series([finding.check for finding in findings], dtype=object).value_counts().sort_index()
    orientations = pd.Series([look.image.stored_orientation for look in looks if look.image is not None], dtype=object)
    return {
        "num_cases": len(looks),
        "num_usable": sum(look.case.mask is not None and look.case.case_id not in bad for look in looks),
        "num_bad": len(bad),
        "num_without_mask": sum(look.case.mask is None for look in looks),
        "num_patients": len(patients),
        "num_patients_with_several_studies": int((patients > 1).sum()),
        "orientations": {str(code): int(num) for code, num in orientations.value_counts().sort_index().items()},
        "measures": {
            str(name): {"smallest": float(one.min()), "median": float(one.median()), "largest": float(one.max())}
            for name, one in numbers.items()
        },
        "findings": {str(check): int(num) for check, num in checks.items()},
    }


def panel_of(look: Look, findings: Sequence[Finding]) -> Panel:
    """Return the case's place on the contact sheet."""
    of_case = [finding for finding in findings if finding.case_id == look.case.case_id]
    checks = list(dict.fromkeys(one.check for one in sorted(of_case, key=lambda one: (not one.is_error, one.check))))
    volume_ml = _measures(look)["gland_volume_ml"]
    words = [] if np.isnan(volume_ml) else [f"{volume_ml:.0f} mL"]
    return Panel(
        case_id=look.case.case_id,
        caption=[*words, *checks[:2], *(["..."] if len(checks) > 2 else [])],
        picture=look.picture,
        is_error=any(finding.is_error for finding in of_case),
        is_warning=bool(of_case),
    )


def describe(summary: dict[str, object]) -> list[str]:
    """Return counts and measures as lines for a terminal."""
    measures = summary["measures"]
    orientations = summary["orientations"]
    assert isinstance(measures, dict)
    assert isinstance(orientations, dict)
    rows = [
        [MEASURES[name], *(f"{values[key]:.4g}" for key in ("smallest", "median", "largest"))]
        for name, values in measures.items()
    ]
    stored = ", ".join(f"{code} {num}" for code, num in orientations.items()) or "none could be read"
    return [
        f"{summary['num_cases']} cases of {summary['num_patients']} patients, "
        f"{summary['num_patients_with_several_studies']} with several studies; {summary['num_without_mask']} without mask; "
        f"orientation {stored}",
        *table_lines(["", "smallest", "median", "largest"], rows, numbers=["smallest", "median", "largest"]),
    ]


def _case_lines(table: pd.DataFrame) -> list[str]:
    """List every case of a small data set, and of a large one those with findings."""
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
        {
            "case_id": one.case_id,
            "check": one.check,
            "severity": "error" if one.is_error else "warning",
            "message": one.message,
        }
        for one in sorted(findings, key=lambda one: (not one.is_error, one.case_id, one.check))
    ]
    return pd.DataFrame(rows, columns=["case_id", "check", "severity", "message"])


def _finding_lines(findings: Sequence[Finding]) -> list[str]:
    table = _findings_table(findings)
    lines = [f"{row.severity}: {row.case_id}: {row.check}: {row.message}" for row in table.head(MAX_ROWS).itertuples()]
    return [*lines, *([f"and {len(table) - MAX_ROWS} more in findings.csv"] if len(table) > MAX_ROWS else [])]


def _no_mask(case: Case) -> Finding:
    message = "other images have a mask and this has none; add it, or list it under data.exclude"
    return bad_case(case.case_id, "image_without_mask", message)


def _conclude(summary: dict[str, object], findings: Sequence[Finding], *, exclude: bool) -> None:
    """Log whether this data set can be trained on.

    Raises:
        InputError: If no image can be read, or a case cannot be used and bad cases are not to be excluded.
    """
    errors = [finding for finding in findings if finding.is_error]
    bad = {finding.case_id for finding in errors}
    if not summary["measures"]:
        raise InputError(f"none of {summary['num_cases']} cases can be read: {'; '.join(_finding_lines(errors)[:3])}")
    if bad and not exclude:
        listing = "\n".join(f"  {line}" for line in _finding_lines(errors))
        raise InputError(
            f"{len(bad)} cases cannot be used, and stage=preprocess will refuse them:\n{listing}\n"
            "Fix them, list them under data.exclude, or go on without them: data.on_bad_case=exclude"
        )
    if bad:
        log.info("stage=preprocess will exclude the %d cases that cannot be used", len(bad))
    elif summary["num_usable"]:
        log.info("all %s cases can be used: go on with stage=preprocess", summary["num_usable"])
    else:
        log.info("the images can be read; to train on them they need masks")
