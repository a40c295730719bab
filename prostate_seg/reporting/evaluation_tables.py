"""Tables of one evaluation: cases.csv, slices.csv, metrics.json, and the summary that the terminal shows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from prostate_seg.data.cases import Case
from prostate_seg.segmentation.metrics import CaseMetrics, pooled_iou
from prostate_seg.segmentation.overlap import SliceCounts
from prostate_seg.segmentation.statistics import num_failures, summarise

METRIC_LABELS = {
    "dice": ("Dice", 3),
    "iou": ("IoU", 3),
    "hd95_mm": ("HD95 (mm)", 1),
    "assd_mm": ("ASSD (mm)", 2),
    "nsd_2mm": ("NSD at 2 mm", 3),
    "volume_difference_ml": ("Volume difference (mL)", 1),
    "volume_difference_percent": ("Volume difference (%)", 1),
    "dice_apex": ("Dice, apex", 3),
    "dice_mid": ("Dice, mid-gland", 3),
    "dice_base": ("Dice, base", 3),
}
"""Label and number of decimals of each metric that is summarised with mean and confidence interval."""

SUMMARY_METRICS = tuple(METRIC_LABELS)

CASE_METRICS = tuple(field.name for field in fields(CaseMetrics) if field.type in (float, "float"))
"""Numeric columns of cases.csv."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """Metrics of one segmented case."""

    fold: str
    """Such as fold0; `ensemble` for external cases."""
    case: Case
    image_md5: str
    mask_md5: str
    """Content hash of the reference mask, which shows whether two tables have the same references."""
    metrics: CaseMetrics
    counts: SliceCounts
    """Voxels per slice, from apex to base."""

    @property
    def ids(self) -> dict[str, str]:
        """First columns of cases.csv and slices.csv."""
        return {"fold": self.fold, "case_id": self.case.case_id, "patient_id": self.case.patient_id}


def cases_table(results: Sequence[CaseResult], *, oracle_crop: bool) -> pd.DataFrame:
    """Return cases.csv: one row per case with fold, ids, metrics, use of an oracle crop, file hashes and attributes."""
    rows = []
    for result in results:
        hashes = {"image_md5": result.image_md5, "mask_md5": result.mask_md5}
        metrics = {**asdict(result.metrics), "oracle_crop": oracle_crop}
        rows.append({**result.ids, **metrics, **hashes, **result.case.attributes})
    return pd.DataFrame(rows)


def slices_table(results: Sequence[CaseResult]) -> pd.DataFrame:
    """Return slices.csv: one row per slice with reference or predicted gland, from apex to base.

    `position` is the centre of the slice relative to the reference's extent, 0 at the apex and 1 at the base; predicted slices
    beyond the reference have positions below 0 or above 1.
    """
    rows = []
    for result in results:
        counts, gland = result.counts, np.flatnonzero(result.counts.reference_vox)
        rows += [
            {
                **result.ids,
                "slice": int(z),
                "position": float((z - gland[0] + 0.5) / (gland[-1] - gland[0] + 1)),
                "reference_vox": int(counts.reference_vox[z]),
                "predicted_vox": int(counts.predicted_vox[z]),
                "dice": counts.of(slice(z, z + 1)).dice(),
            }
            for z in np.flatnonzero(counts.union_vox).tolist()
        ]
    return pd.DataFrame(rows)


def summarise_folds(
    results: Sequence[CaseResult], *, oracle_crop: bool, num_bootstrap: int, seed: int
) -> dict[str, Any]:
    """Return metrics.json: the summary of each metric, pooled over all cases and per fold."""

    def summary_of(members: Sequence[CaseResult]) -> dict[str, Any]:
        table = pd.DataFrame([asdict(result.metrics) for result in members])
        patients = [result.case.patient_id for result in members]
        summarised = partial(summarise, patients=patients, num_bootstrap=num_bootstrap, seed=seed)
        return {
            "num_cases": len(members),
            "num_patients": len(set(patients)),
            "num_failures": num_failures(table["dice"].to_numpy()),
            "num_missed_glands": int(table["missed_gland"].sum()),
            "iou_gland_slices_pooled": pooled_iou(result.counts for result in members),
            **{name: asdict(summarised(table[name].to_numpy(dtype=float))) for name in SUMMARY_METRICS},
        }

    folds = dict.fromkeys(result.fold for result in results)
    return {
        "oracle_crop": oracle_crop,
        "pooled": summary_of(results),
        "folds": {fold: summary_of([result for result in results if result.fold == fold]) for fold in folds},
    }


def flat_summary(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return summary.json: the pooled means and the bounds of their confidence intervals, where they exist."""
    pooled = summary["pooled"]
    means = {name: pooled[name]["mean"] for name in SUMMARY_METRICS}
    bounds = {f"{name}_{end}": pooled[name][end] for name in SUMMARY_METRICS for end in ("ci95_low", "ci95_high")}
    return {"test": {name: value for name, value in (means | bounds).items() if value is not None}}


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """Return the pooled results as lines for a terminal."""
    pooled = summary["pooled"]
    lines = [
        f"{pooled['num_cases']} cases of {pooled['num_patients']} patients in {len(summary['folds'])} folds, "
        f"{pooled['num_failures']} failed, {pooled['num_missed_glands']} glands missed"
        + (", ORACLE CROP: windows were centred on the reference masks" if summary["oracle_crop"] else ""),
        f"{'metric':<26}{'mean':>8}{'SD':>8}{'median':>8}   95% CI of the mean",
    ]
    for name in SUMMARY_METRICS:
        row = pooled[name]
        interval = f"{_number(row['ci95_low'])} to {_number(row['ci95_high'])}"
        lines.append(f"{name:<26}{_number(row['mean'])}{_number(row['sd'])}{_number(row['median'])}  {interval}")
    demo_iou = _number(pooled["iou_gland_slices_pooled"])
    return [*lines, f"{'iou_gland_slices_pooled':<26}{demo_iou}   (the public demo's metric)"]


def _number(value: float | None) -> str:
    return f"{'-':>8}" if value is None else f"{value:8.3f}"
