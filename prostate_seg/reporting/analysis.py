"""The numbers behind the report's plots, as small tables; each becomes a CSV file beside the report.

Intervals are 95% percentile intervals from a bootstrap over patients, as everywhere.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from prostate_seg.reporting.facts import Facts
from prostate_seg.reporting.subgroups import subgroups
from prostate_seg.segmentation.statistics import Summary, summarise

NUM_BINS = 10
"""Parts into which the gland is cut from apex to base; about one 3 mm slice each."""

READERS_DICE = {"dice": 0.92, "dice_apex": 0.90, "dice_base": 0.87}
"""Mean Dice between human readers: whole gland, apex, base (Insights into Imaging 2021, doi 10.1186/s13244-021-01010-9)."""

AGREEMENT_SD = 1.96
"""Half width of the limits of agreement in standard deviations (Bland and Altman 1986)."""


def all_tables(facts: Facts) -> dict[str, pd.DataFrame]:
    """Return every table by the name of its CSV file."""
    return {
        "results": results(facts),
        "bland_altman": bland_altman(facts.cases),
        "subgroups": subgroup_dice(facts),
        "learning_curves": learning_curves(facts.histories),
        "dice_along_gland": dice_along_gland(facts),
    }


def results(facts: Facts) -> pd.DataFrame:
    """Return mean, spread and interval of each metric, pooled and per fold."""
    groups = [("pooled", facts.pooled), *facts.fold_metrics]
    return pd.DataFrame(
        [{"group": group, "metric": name, **summary[name]} for group, summary in groups for name, _ in facts.metrics]
    )


def bland_altman(cases: pd.DataFrame) -> pd.DataFrame:
    """Return mean and difference (predicted minus reference) of both volumes of each case, in mL."""
    mean_ml = (cases["volume_reference_ml"] + cases["volume_predicted_ml"]) / 2
    return cases[["fold", "case_id"]].assign(mean_ml=mean_ml, difference_ml=cases["volume_difference_ml"])


def limits_of_agreement(differences_ml: pd.Series) -> tuple[float, float, float]:
    """Return bias, lower and upper limit of agreement; the limits are NaN for a single case."""
    bias, sd = float(differences_ml.mean()), float(differences_ml.std(ddof=1))
    return bias, bias - AGREEMENT_SD * sd, bias + AGREEMENT_SD * sd


def subgroup_dice(facts: Facts) -> pd.DataFrame:
    """Return mean Dice and interval of each group of each attribute, volume tertiles first."""
    return pd.DataFrame(
        [
            {"attribute": attribute, "group": group, **_dice_of(facts, facts.cases[groups == group])}
            for attribute, groups in subgroups(facts.cases).items()
            for group in sorted(set(groups))
        ],
        columns=["attribute", "group", "num_cases", "num_patients", "mean", "ci95_low", "ci95_high"],
    )


def learning_curves(histories: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return loss and val Dice of each epoch of each fold; no val Dice where there was no look at val."""
    columns = {"epoch": "epoch", "train/loss": "train_loss", "val/dice": "val_dice"}
    parts = [history[list(columns)].rename(columns=columns).assign(fold=fold) for fold, history in histories.items()]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*columns.values(), "fold"])


def dice_along_gland(facts: Facts) -> pd.DataFrame:
    """Return mean Dice of slices by their place from apex (0) to base (1).

    Returns:
        One row per part of the gland and one for what lies beyond each end, where a prediction can only be wrong;
        `position` is the middle of the part, and beyond an end just outside of 0 to 1.
    """
    edges = np.array([-np.inf, *np.linspace(0, 1, NUM_BINS + 1), np.inf])
    part = np.digitize(facts.slices["position"], edges) - 1
    return pd.DataFrame(
        [
            {
                "position": round((number - 0.5) / NUM_BINS, 3),
                "num_slices": int((part == number).sum()),
                **_dice_of(facts, facts.slices[part == number]),
            }
            for number in range(NUM_BINS + 2)
        ]
    )


def _dice_of(facts: Facts, rows: pd.DataFrame) -> dict[str, float | int | None]:
    summary: Summary = summarise(
        rows["dice"].to_numpy(dtype=float),
        patients=rows["patient_id"].tolist(),
        num_bootstrap=facts.num_bootstrap,
        seed=facts.seed,
    )
    return {
        "num_cases": int(rows["case_id"].nunique()),
        "num_patients": summary.num_patients,
        "mean": summary.mean,
        "ci95_low": summary.ci95_low,
        "ci95_high": summary.ci95_high,
    }
