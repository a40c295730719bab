"""Tables of one evaluation: cases.csv, slices.csv, metrics.json, and the summary that the terminal shows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from prostate_seg.data.cases import Case
from prostate_seg.imaging.settings import WHOLE_GLAND
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

CASE_METRICS = tuple(one.name for one in fields(CaseMetrics) if one.type in (float, "float"))
"""Numeric columns of cases.csv."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """Metrics of one region of a segmented case."""

    fold: str
    """Such as fold0; `ensemble` for external cases."""
    case: Case
    image_md5: str
    mask_md5: str
    """Content hash of the reference mask, which shows whether two tables have the same references."""
    metrics: CaseMetrics
    counts: SliceCounts
    """Voxels per slice, from apex to base."""
    region: str = WHOLE_GLAND
    features: Mapping[str, float] = field(default_factory=dict)
    """Features of the gland's mask, as `inference.Segmentation` has them."""
    voxels: np.ndarray | None = None
    """Voxels near the surface by label and logit, as `calibration.count_near_surface` returns them."""

    @property
    def ids(self) -> dict[str, str]:
        """First columns of cases.csv and slices.csv."""
        return {"fold": self.fold, "case_id": self.case.case_id, "patient_id": self.case.patient_id}


def cases_table(results: Sequence[CaseResult], *, oracle_crop: bool) -> pd.DataFrame:
    """Return cases.csv: a row per case and region with fold, ids, metrics, use of an oracle crop, file hashes and attributes.

    The column `region` is there only if there are several regions, as in slices.csv.
    """
    rows, region = [], _region_column(results)
    for result in results:
        hashes = {"image_md5": result.image_md5, "mask_md5": result.mask_md5}
        metrics = {**asdict(result.metrics), "oracle_crop": oracle_crop}
        rows.append({**result.ids, **region(result), **metrics, **hashes, **result.case.attributes})
    return pd.DataFrame(rows)


def by_region(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the rows of each region in cases.csv or slices.csv, without the column `region`, which may be absent."""
    if "region" not in table or WHOLE_GLAND not in set(table["region"]):  # once an attribute could have this name
        return {WHOLE_GLAND: table}
    rows = {str(name): rows for name, rows in table.groupby("region", sort=False)}
    return {name: one.drop(columns="region").reset_index(drop=True) for name, one in rows.items()}


def slices_table(results: Sequence[CaseResult]) -> pd.DataFrame:
    """Return slices.csv: a row per region and slice where reference or prediction have it, from apex to base.

    `position` is the centre of the slice relative to the reference's extent, 0 at the apex and 1 at the base; predicted slices
    beyond the reference have positions below 0 or above 1. It is NaN if the reference is empty.
    """
    rows, region = [], _region_column(results)
    for result in results:
        counts, extent = result.counts, np.flatnonzero(result.counts.reference_vox)
        rows += [
            {
                **result.ids,
                **region(result),
                "slice": int(z),
                "position": float((z - extent[0] + 0.5) / (extent[-1] - extent[0] + 1)) if extent.size else np.nan,
                "reference_vox": int(counts.reference_vox[z]),
                "predicted_vox": int(counts.predicted_vox[z]),
                "dice": counts.of(slice(z, z + 1)).dice(),
            }
            for z in np.flatnonzero(counts.union_vox).tolist()
        ]
    return pd.DataFrame(rows)


def _region_column(results: Sequence[CaseResult]) -> Callable[[CaseResult], dict[str, str]]:
    has_several = len({result.region for result in results}) > 1
    return lambda result: {"region": result.region} if has_several else {}


def summarise_folds(
    results: Sequence[CaseResult], *, oracle_crop: bool, num_bootstrap: int, seed: int
) -> dict[str, Any]:
    """Return metrics.json: the summary of each metric, pooled over all cases and per fold; that of each zone under `zones`."""
    regions = dict.fromkeys(result.region for result in results)
    summarised = partial(_summarise_region, num_bootstrap=num_bootstrap, seed=seed)
    of = {region: summarised([result for result in results if result.region == region]) for region in regions}
    gland = of.pop(WHOLE_GLAND)
    return {"oracle_crop": oracle_crop, **gland, **({"zones": of} if of else {})}


def _summarise_region(results: Sequence[CaseResult], *, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """Return the summary of each metric of one region, pooled over all cases and per fold."""

    def summary_of(members: Sequence[CaseResult]) -> dict[str, Any]:
        table = pd.DataFrame([asdict(result.metrics) for result in members])
        patients = [result.case.patient_id for result in members]
        summarised = partial(summarise, patients=patients, num_bootstrap=num_bootstrap, seed=seed)
        has_reference = any(result.counts.reference_vox.any() for result in members)
        return {
            "num_cases": len(members),
            "num_patients": len(set(patients)),
            "num_failures": num_failures(table["dice"].to_numpy()),
            "num_missed_glands": int(table["missed_gland"].sum()),
            "iou_gland_slices_pooled": pooled_iou(result.counts for result in members) if has_reference else None,
            **{name: asdict(summarised(table[name].to_numpy(dtype=float))) for name in SUMMARY_METRICS},
        }

    folds = dict.fromkeys(result.fold for result in results)
    return {
        "pooled": summary_of(results),
        "folds": {fold: summary_of([result for result in results if result.fold == fold]) for fold in folds},
    }


def flat_summary(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return summary.json: the pooled means and the bounds of their confidence intervals, where they exist.

    Those of a zone are named after it, such as peripheral_zone/dice.
    """
    found: dict[str, float] = {}
    for prefix, pooled in {"": summary["pooled"], **zones_of(summary)}.items():
        start = f"{prefix}/" if prefix else ""
        means = {name: pooled[name]["mean"] for name in SUMMARY_METRICS}
        bounds = {f"{name}_{end}": pooled[name][end] for name in SUMMARY_METRICS for end in ("ci95_low", "ci95_high")}
        found |= {start + name: value for name, value in (means | bounds).items() if value is not None}
    return {"test": found}


def zones_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pooled results of each zone in metrics.json, by name; empty for the whole gland alone."""
    return {name: zone["pooled"] for name, zone in summary.get("zones", {}).items()}


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the pooled results as lines for a terminal."""
    pooled = summary["pooled"]
    lines = [
        f"{pooled['num_cases']} cases of {pooled['num_patients']} patients in {len(summary['folds'])} folds, "
        f"{pooled['num_failures']} failed, {pooled['num_missed_glands']} glands missed"
        + (", ORACLE CROP: windows were centred on the reference masks" if summary["oracle_crop"] else ""),
        f"{'metric':<26}{'mean':>8}{'SD':>8}{'median':>8}   95% CI of the mean",
        *_metric_lines(pooled),
    ]
    demo_iou = _number(pooled["iou_gland_slices_pooled"])
    lines.append(f"{'iou_gland_slices_pooled':<26}{demo_iou:>8}   (the public demo's metric)")
    for name, zone in zones_of(summary).items():
        lines += [f"{name}: {zone['num_failures']} failed, {zone['num_missed_glands']} missed", *_metric_lines(zone)]
    return lines


def summary_markdown(summary: Mapping[str, Any]) -> str:
    """Return the pooled Dice and HD95 of each region with their intervals as Markdown, for the description of a run."""
    lines = [
        f"**{name}: Dice {_with_interval(pooled['dice'])}**, HD95 {_with_interval(pooled['hd95_mm'])} mm"
        for name, pooled in {WHOLE_GLAND: summary["pooled"], **zones_of(summary)}.items()
    ]
    gate = summary.get("leak_gate", {}).get("verdict", "not run")
    return "  \n".join([*lines, f"{summary_lines(summary)[0]}. Leak gate: {gate}."])


def _metric_lines(pooled: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in SUMMARY_METRICS:
        numbers = "".join(f"{_number(pooled[name][key]):>8}" for key in ("mean", "sd", "median"))
        lines.append(f"{name:<26}{numbers}{_interval(pooled[name]):>21}")
    return lines


def _with_interval(row: Mapping[str, float | None]) -> str:
    return f"{_number(row['mean'])} (95% CI {_interval(row)})"


def _interval(row: Mapping[str, float | None]) -> str:
    return f"{_number(row['ci95_low'])} to {_number(row['ci95_high'])}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
