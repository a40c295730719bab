"""Per-case results as a table, as metrics.json and as lines for a terminal. Nothing here reads files."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from prostate_seg.data.cases import Case
from prostate_seg.segmentation.metrics import CaseMetrics, SliceCounts, gland_slice_overlap, pooled_iou
from prostate_seg.segmentation.statistics import num_failures, summarise

SUMMARISED = (
    "dice",
    "iou",
    "hd95_mm",
    "assd_mm",
    "nsd_2mm",
    "volume_difference_ml",
    "volume_difference_percent",
    "dice_apex",
    "dice_mid",
    "dice_base",
)
"""Metrics that get a mean and an interval."""

METRICS = tuple(one.name for one in fields(CaseMetrics) if one.type in (float, "float"))
"""Columns of numbers in the table of cases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One segmented and measured case."""

    fold: str
    """Such as fold0; `ensemble` for external cases."""
    case: Case
    image_md5: str
    mask_md5: str
    """Of the files, so that two tables can be told to be of the same references."""
    metrics: CaseMetrics
    counts: SliceCounts
    """Voxels per slice, from apex to base."""


def cases_table(scored: Sequence[Scored], *, oracle_crop: bool) -> pd.DataFrame:
    """Return one row per case: fold, ids, metrics, whether the crop knew the reference, file hashes and attributes."""
    return pd.DataFrame(
        [
            {
                "fold": one.fold,
                "case_id": one.case.case_id,
                "patient_id": one.case.patient_id,
                **asdict(one.metrics),
                "oracle_crop": oracle_crop,
                "image_md5": one.image_md5,
                "mask_md5": one.mask_md5,
                **one.case.attributes,
            }
            for one in scored
        ]
    )


def slices_table(scored: Sequence[Scored]) -> pd.DataFrame:
    """Return one row per slice with reference or predicted gland, from apex to base.

    `position` is the slice's centre on the reference's extent, from 0 (apex) to 1 (base); slices beyond it lie outside.
    """
    return pd.DataFrame([row for one in scored for row in _slice_rows(one)])


def _slice_rows(one: Scored) -> list[dict[str, Any]]:
    counts, gland = one.counts, np.flatnonzero(one.counts.reference_vox)
    return [
        {
            "fold": one.fold,
            "case_id": one.case.case_id,
            "patient_id": one.case.patient_id,
            "slice": int(z),
            "position": float((z - gland[0] + 0.5) / (gland[-1] - gland[0] + 1)),
            "reference_vox": int(counts.reference_vox[z]),
            "predicted_vox": int(counts.predicted_vox[z]),
            "dice": counts.part(z, z + 1).dice(),
        }
        for z in np.flatnonzero(counts.union_vox).tolist()
    ]


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
        "iou_gland_slices_pooled": pooled_iou([gland_slice_overlap(one.counts) for one in scored]),
    }
    for name in SUMMARISED:
        values = np.array([getattr(one.metrics, name) for one in scored], dtype=float)
        summary[name] = summarise(values, patients=patients, num_bootstrap=num_bootstrap, seed=seed).as_dict()
    return summary


def flat_summary(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return summary.json: the pooled means, and the ends of their intervals, as far as they exist."""
    pooled = summary["pooled"]
    means = {name: pooled[name]["mean"] for name in SUMMARISED}
    ends = {f"{name}_{end}": pooled[name][end] for name in SUMMARISED for end in ("ci95_low", "ci95_high")}
    return {"test": {name: value for name, value in (means | ends).items() if value is not None}}


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
