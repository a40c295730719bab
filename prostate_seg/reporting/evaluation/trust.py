"""Results of one evaluation for single masks: expected Dice, risk-coverage curve, calibration of probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import read_json
from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.reporting.evaluation.tables import CaseResult
from prostate_seg.segmentation.calibration import bin_logits, calibration_error, fit_temperature, reliability
from prostate_seg.segmentation.inference.expected_dice import (
    CalibrationCase,
    ExpectedDice,
    fit_expected_dice,
    left_out_estimates,
)

Counts = Mapping[str, Mapping[str, np.ndarray]]
"""Voxels near the surface by subset, val and test, and region: int64 [2, bins], as `calibration.count_near_surface` returns."""

FEATURES = ("tta", "inter_model", "confidence", "outside_training", "small", "rough", "fragments")
"""Features in the order of expected_dice.csv."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Results of one evaluation for single masks, for the report."""

    cases: pd.DataFrame
    """expected_dice.csv."""
    voxels: Mapping[str, np.ndarray]
    """Counts of calibration.csv over test cases, by region."""
    summary: Mapping[str, Any]
    """Part of metrics.json."""
    is_of_folds: bool
    """Whether the estimates of an external evaluation are those of the cross-validation of the same networks."""


def read_trust(evaluation: Path, summary: Mapping[str, Any], *, of_folds: Path | None) -> Trust | None:
    """Read the results for single masks; None for an evaluation of an older version.

    `of_folds` is the folder of the cross-validation for an external evaluation; it may be missing or of other networks.
    """
    paths = [evaluation / name for name in ("expected_dice.csv", "calibration.csv")]
    if "trust" not in summary or not all(path.is_file() for path in paths):
        return None
    trust, counts = dict(summary["trust"]), counts_in(pd.read_csv(paths[1]))
    cases = pd.read_csv(paths[0], dtype=dict.fromkeys(("fold", "case_id", "patient_id"), str))
    path = None if of_folds is None else of_folds / "metrics.json"
    known = read_json(path).get("trust", {}) if path is not None and path.is_file() else {}
    is_same = known.get("networks_md5") == trust["networks_md5"]
    if is_same:
        temperatures = {region: one["temperature"] for region, one in known["calibration"].items()}
        trust["calibration"] = calibration_errors(counts, temperatures=temperatures)
    is_of_folds = is_same and "expected_dice" in known
    if is_of_folds:
        trust["expected_dice"] = known["expected_dice"]
        calibration = ExpectedDice(**known["expected_dice"])
        cases = _with_estimates(cases, [calibration.estimate(row) for row in features_in(cases)])
    return Trust(cases=cases, voxels=counts["test"], summary=trust, is_of_folds=is_of_folds)


def fitted_expected_dice(table: pd.DataFrame, *, coverage: float, oracle_crop: bool) -> dict[str, Any]:
    """Return the calibration of expected Dice as JSON types, or why there is none, of `expected_dice_table`."""
    if oracle_crop:  # no reference centres the window of a new study
        reason = "the windows of the test cases were centred on the references (preprocess.crop=mask)"
        return {"no_expected_dice": reason}
    try:
        cases = zip(features_in(table), table["dice"], table["patient_id"], strict=True)
        found = fit_expected_dice(list(starmap(CalibrationCase, cases)), coverage=coverage)
    except InputError as error:
        return {"no_expected_dice": str(error)}
    return {"expected_dice": asdict(found)}


def expected_dice_table(results: Sequence[CaseResult], *, coverage: float) -> pd.DataFrame:
    """Return expected_dice.csv: ids, Dice, expected Dice, lower bound and features of the glands of test cases.

    The estimate of a case is from a fit without its patient; it is missing if too few patients are left.
    """
    glands = [result for result in results if result.region == WHOLE_GLAND]
    cases = [CalibrationCase(result.features, result.metrics.dice, result.case.patient_id) for result in glands]
    table = pd.DataFrame([{**result.ids, "dice": result.metrics.dice} for result in glands])
    features = pd.DataFrame([case.features for case in cases], columns=list(FEATURES))
    return _with_estimates(table, left_out_estimates(cases, coverage=coverage)).join(features)


def features_in(table: pd.DataFrame) -> list[dict[str, float]]:
    """Return the features of each case in expected_dice.csv; none for an empty mask."""
    return [
        {str(name): float(value) for name, value in row.items() if not pd.isna(value)}
        for row in table[list(FEATURES)].to_dict("records")
    ]


def _with_estimates(table: pd.DataFrame, estimates: Sequence[Any]) -> pd.DataFrame:
    for column, name in (("expected_dice", "expected_dice"), ("dice_lower_bound", "lower_bound")):
        table[column] = [np.nan if one is None else getattr(one, name) for one in estimates]
    return table


def bounds(table: pd.DataFrame) -> dict[str, float]:
    """Return how well expected_dice.csv orders and bounds the Dice of its cases.

    Returns:
        num_patients, those with a lower bound; num_covered, those whose Dice reaches it in every study; area, the area under
        the risk-coverage curve (AURC): the mean risk over all fractions of cases kept; best_area and mean_risk, the same in
        the order of Dice itself and in random order.
    """
    bounded, curve = table.dropna(subset=["dice_lower_bound"]), risk_coverage(table)
    holds = (bounded["dice"] >= bounded["dice_lower_bound"]).groupby(bounded["patient_id"]).all()
    areas = {"area": float(curve["risk"].mean()), "best_area": float(curve["best_risk"].mean())}
    mean_risk = float(1 - table["dice"].mean())
    return {"num_covered": int(holds.sum()), "num_patients": len(holds), **areas, "mean_risk": mean_risk}


def risk_coverage(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean of 1 - Dice over the cases with the highest expected Dice, by the fraction of cases kept.

    The column `best_risk` has the same in the order of Dice itself, the lowest possible curve.
    """
    rows = table.dropna(subset=["expected_dice"])
    num_kept = np.arange(1, len(rows) + 1)
    risks = {
        column: (1 - rows.sort_values([name, "case_id"], ascending=False)["dice"]).cumsum().to_numpy() / num_kept
        for column, name in (("risk", "expected_dice"), ("best_risk", "dice"))
    }
    return pd.DataFrame({"coverage": num_kept / max(1, len(rows)), **risks})


def voxels_of_regions(results: Sequence[CaseResult]) -> dict[str, np.ndarray]:
    """Return the voxels near the surface of each region, over all cases."""
    counts: dict[str, np.ndarray] = {}
    for result in results:
        if result.voxels is not None:
            counts[result.region] = result.voxels + counts.get(result.region, 0)
    return counts


def calibration_table(counts: Counts) -> pd.DataFrame:
    """Return calibration.csv: voxels near the surface outside and inside of the reference, by region, subset and logit."""
    logits = bin_logits().round(6)
    parts = [
        pd.DataFrame({"region": region, "subset": subset, "logit": logits, "outside": outside, "inside": inside})
        for subset, of_subset in counts.items()
        for region, (outside, inside) in of_subset.items()
    ]
    return pd.concat(parts, ignore_index=True)


def counts_in(table: pd.DataFrame) -> dict[str, dict[str, np.ndarray]]:
    """Return the counts in calibration.csv."""
    counts: dict[str, dict[str, np.ndarray]] = {"val": {}, "test": {}}
    for (subset, region), rows in table.groupby(["subset", "region"], sort=False):
        counts[str(subset)][str(region)] = rows[["outside", "inside"]].to_numpy(dtype=np.int64).T
    return counts


def calibration_errors(counts: Counts, *, temperatures: Mapping[str, float | None] | None = None) -> dict[str, Any]:
    """Return temperature and calibration error on test cases, before and after scaling, of each region.

    Without given temperatures, the temperature of a region fits its val studies, if there are any.
    """
    if temperatures is None:
        temperatures = {region: fit_temperature(voxels) for region, voxels in counts["val"].items()}
    found = {}
    for region, voxels in counts["test"].items():
        temperature = temperatures.get(region)
        found[region] = {
            "temperature": temperature,
            "calibration_error": calibration_error(reliability(voxels)),
            "calibration_error_scaled": temperature and calibration_error(reliability(voxels, temperature=temperature)),
        }
    return found


def reliability_table(trust: Trust) -> pd.DataFrame:
    """Return the reliability diagrams of the test cases, before and after scaling, by region and bin of probability."""
    parts = []
    for region, one in trust.summary["calibration"].items():
        for is_scaled, temperature in ((False, 1.0), (True, one["temperature"])):
            if temperature is None:
                continue
            found = reliability(trust.voxels[region], temperature=temperature)
            parts.append(pd.DataFrame({"region": region, "is_scaled": is_scaled, **found}))
    return pd.concat(parts, ignore_index=True)


def trust_lines(trust: Mapping[str, Any], table: pd.DataFrame) -> list[str]:
    """Return the results as lines for a terminal; `trust` is the part of metrics.json."""
    lines = []
    if "no_expected_dice" in trust:
        lines.append(f"no expected Dice: {trust['no_expected_dice']}")
    elif table["dice_lower_bound"].notna().any():
        found = bounds(table)
        lines.append(
            f"expected Dice, each patient left out: the lower bound holds for {found['num_covered']} of "
            f"{found['num_patients']} patients; area under the risk-coverage curve {found['area']:.4f}, at best "
            f"{found['best_area']:.4f}"
        )
    for region, one in trust["calibration"].items():
        if one["calibration_error"] is not None:
            line = f"{region}: calibration error near the surface {one['calibration_error']:.3f}"
            if one["temperature"] is not None:
                line += f", {one['calibration_error_scaled']:.3f} with temperature {one['temperature']:.2f}"
            lines.append(line)
    return lines
