"""Per-case results as a table, as metrics.json and as lines for a terminal. Nothing here reads files."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from prostate_seg.data.cases import CaseFiles
from prostate_seg.segmentation.metrics import CaseMetrics, Overlap, pooled_iou
from prostate_seg.segmentation.statistics import num_failures, summarise

SUMMARISED = (
    "dice",
    "iou",
    "hd95_mm",
    "assd_mm",
    "surface_dice_2mm",
    "volume_difference_ml",
    "volume_difference_percent",
    "dice_apex",
    "dice_mid",
    "dice_base",
)
"""Metrics that get a mean and an interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One segmented and measured case."""

    fold: str
    """Such as fold0; `ensemble` for external cases."""
    case: CaseFiles
    metrics: CaseMetrics
    overlap: Overlap
    """Pixels for the demo's pooled IoU on gland slices."""


def cases_table(scored: Sequence[Scored], *, oracle_crop: bool) -> pd.DataFrame:
    """Return one row per case: fold, ids, metrics and whether the crop knew the reference."""
    return pd.DataFrame(
        [
            {
                "fold": one.fold,
                "case_id": one.case.case_id,
                "patient_id": one.case.patient_id,
                **asdict(one.metrics),
                "oracle_crop": oracle_crop,
            }
            for one in scored
        ]
    )


def summarise_folds(scored: Sequence[Scored], *, oracle_crop: bool, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """Return metrics.json: each metric per fold and over all cases."""
    by_fold: dict[str, list[Scored]] = defaultdict(list)
    for one in scored:
        by_fold[one.fold].append(one)
    return {
        "oracle_crop": oracle_crop,
        "pooled": summarise_cases(scored, num_bootstrap=num_bootstrap, seed=seed),
        "folds": {
            fold: summarise_cases(members, num_bootstrap=num_bootstrap, seed=seed) for fold, members in by_fold.items()
        },
    }


def summarise_cases(scored: Sequence[Scored], *, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """Return mean, spread and interval of every metric, and the counts of failures."""
    patients = [one.case.patient_id for one in scored]
    dices = np.array([one.metrics.dice for one in scored])
    summary: dict[str, Any] = {
        "num_cases": len(scored),
        "num_patients": len(set(patients)),
        "num_failures": num_failures(dices),
        "num_missed_glands": sum(one.metrics.missed_gland for one in scored),
        "iou_gland_slices_pooled": pooled_iou([one.overlap for one in scored]),
    }
    for name in SUMMARISED:
        values = np.array([getattr(one.metrics, name) for one in scored], dtype=float)
        summary[name] = summarise(values, patients=patients, num_bootstrap=num_bootstrap, seed=seed).as_dict()
    return summary


def flat_summary(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return summary.json: the pooled means that exist, which is what two runs are compared by."""
    means = {name: summary["pooled"][name]["mean"] for name in SUMMARISED}
    return {"test": {name: mean for name, mean in means.items() if mean is not None}}


def summary_table(summary: dict[str, Any]) -> list[str]:
    """Return the pooled result as lines that fit a terminal."""
    pooled = summary["pooled"]
    lines = [
        f"{pooled['num_cases']} cases of {pooled['num_patients']} patients in {len(summary['folds'])} folds, "
        f"{pooled['num_failures']} failed, {pooled['num_missed_glands']} glands missed"
        + (", ORACLE CROP: the window was placed with the reference" if summary["oracle_crop"] else ""),
        f"{'metric':<26}{'mean':>8}{'SD':>8}{'median':>8}   95% CI of the mean",
    ]
    for name in SUMMARISED:
        row = pooled[name]
        interval = f"{_number(row['ci95_low'])} to {_number(row['ci95_high'])}"
        lines.append(f"{name:<26}{_number(row['mean'])}{_number(row['sd'])}{_number(row['median'])}  {interval}")
    lines.append(
        f"{'iou_gland_slices_pooled':<26}{_number(pooled['iou_gland_slices_pooled'])}   (the public demo's metric)"
    )
    return lines


def _number(value: float | None) -> str:
    return f"{'-':>8}" if value is None else f"{value:8.3f}"
