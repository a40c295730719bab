"""Dice in groups that no network had seen (fold=groups), beside mixed folds of the same cases.

Differences are those of stage=compare: paired by case, with a bootstrap over patients.
"""

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy.stats import t

from prostate_seg.reporting.comparison.results import ALL, Results, require_same_cases
from prostate_seg.segmentation.statistics import num_failures, paired_difference, summarise

MIN_GROUPS = 3
"""Groups from which the variance between groups is estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnseenGroups:
    """Dice of each group, and the interval of a new one."""

    column: str
    """Attribute that names the groups, such as centre."""
    rows: pd.DataFrame
    """expected_elsewhere.csv: a row per group, then one of all cases. Dice of unseen groups: num_cases, num_patients,
    num_failures, mean, ci95_low, ci95_high; with mixed folds mean_mixed, and difference (unseen minus mixed) with its
    difference_low and difference_high."""
    mean: float
    """Mean Dice over the groups, each with the same weight."""
    new_group: tuple[float, float] | None
    """95% prediction interval of the mean Dice of a new group; None with fewer than `MIN_GROUPS`."""


def summarise_unseen_groups(
    own: Results, *, column: str, mixed: Results | None, num_bootstrap: int, seed: int
) -> UnseenGroups:
    """Return the Dice of each group in an evaluation of fold=groups, whole gland; `mixed` has folds that mix the groups.

    Raises:
        InputError: If the two evaluations have other cases, images or references.
    """
    if mixed is not None:
        require_same_cases(mixed, own)
    groups = [(str(name), rows) for name, rows in own.table.groupby(column, sort=True)]
    rows = []
    for name, cases in [*groups, (ALL, own.table)]:
        dice, patients = cases["dice"].to_numpy(), cases["patient_id"].tolist()
        summary = asdict(summarise(dice, patients=patients, num_bootstrap=num_bootstrap, seed=seed))
        kept = ("num_cases", "num_patients", "mean", "ci95_low", "ci95_high")
        row = {"group": name, "num_failures": num_failures(dice), **{key: summary[key] for key in kept}}
        if mixed is not None:
            before = mixed.table.loc[cases.index, "dice"].to_numpy()
            paired = paired_difference(before, dice, patients=patients, num_bootstrap=num_bootstrap, seed=seed)
            row |= {"mean_mixed": paired.mean_baseline, "difference": paired.difference}
            row |= {"difference_low": paired.ci95_low, "difference_high": paired.ci95_high}
        rows.append(row)
    means = np.array([row["mean"] for row in rows[:-1]], dtype=float)
    return UnseenGroups(
        column=column, rows=pd.DataFrame(rows), mean=float(means.mean()), new_group=new_group_interval(means)
    )


def new_group_interval(means: np.ndarray) -> tuple[float, float] | None:
    """Return the 95% prediction interval of the mean Dice of a new group from those of groups, shape [G], within 0 to 1.

    The groups count as a sample of groups, with normal means (IntHout et al. 2016, prediction intervals in meta-analysis).
    """
    if means.size < MIN_GROUPS:
        return None
    half = float(t.ppf(0.975, means.size - 1) * means.std(ddof=1) * np.sqrt(1 + 1 / means.size))
    return max(0.0, float(means.mean()) - half), min(1.0, float(means.mean()) + half)
