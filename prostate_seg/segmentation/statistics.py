"""Statistics over cases: summaries with bootstrap confidence intervals, and paired comparison of two runs.

Values come one per case (study); a patient can have several. Studies of one patient are correlated, so the bootstrap resamples
patients and the signed-rank test ranks them. Metrics of one case are in `metrics`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import wilcoxon

from prostate_seg.common.seeds import Stream, seed_sequence

FAILURE_DICE = 0.5
"""A case with Dice below this failed, missed glands included: the masks share less than half of their mean volume."""
CI_PERCENTILES = (2.5, 97.5)
"""Ends of the 95% percentile interval."""
MIN_TESTED_PATIENTS = 6
"""With fewer differing patients the signed-rank test cannot give p < 0.05: all of five in one direction give 2 / 2^5."""
ROUNDING_DECIMALS = 12
"""Differences are ranked after rounding, so that 0.3 - 0.1 and 0.2 are a tie in binary too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Summary of one metric over cases; None, never NaN, where there are too few cases or patients."""

    num_cases: int
    """Cases with a value."""
    num_patients: int
    """Patients with a value."""
    num_missing: int
    """Cases excluded because their value is NaN."""
    mean: float | None
    """Mean over cases, not over patients."""
    sd: float | None
    """Sample standard deviation over cases (n - 1)."""
    median: float | None
    ci95_low: float | None
    ci95_high: float | None
    """Ends of the bootstrap interval of the mean, which draws patients; None below two patients."""


def summarise(values: np.ndarray, *, patients: Sequence[str], num_bootstrap: int, seed: int) -> Summary:
    """Summarise one metric over cases: one value and patient id per case, NaN if the metric is not defined for it.

    Raises:
        ValueError: If the lengths differ, a value is infinite, or `num_bootstrap` is below 1.
    """
    values = np.asarray(values, dtype=float)
    _check(values, patients=patients, num_bootstrap=num_bootstrap)
    is_present = ~np.isnan(values)
    present = values[is_present]
    ids = np.asarray(patients, dtype=object)[is_present].tolist()
    low, high = mean_interval(present, patients=ids, num_bootstrap=num_bootstrap, seed=seed)
    return Summary(
        num_cases=present.size,
        num_patients=len(set(ids)),
        num_missing=values.size - present.size,
        mean=float(present.mean()) if present.size else None,
        sd=float(present.std(ddof=1)) if present.size > 1 else None,
        median=float(np.median(present)) if present.size else None,
        ci95_low=low,
        ci95_high=high,
    )


def _check(values: np.ndarray, *, patients: Sequence[str], num_bootstrap: int) -> None:
    if values.ndim != 1 or len(patients) != values.size:
        raise ValueError(
            f"one patient id per value is needed, got values {values.shape} and {len(patients)} patient ids."
        )
    if np.isinf(values).any():
        raise ValueError(f"values must be finite or NaN, got {int(np.isinf(values).sum())} infinite of {values.size}.")
    if num_bootstrap < 1:
        raise ValueError(f"num_bootstrap must be at least 1, got {num_bootstrap}.")


def mean_interval(
    values: np.ndarray, *, patients: Sequence[str], num_bootstrap: int, seed: int
) -> tuple[float | None, float | None]:
    """Return the 95% percentile interval of the mean over cases, from a bootstrap over patients (Efron 1979).

    Arguments as in `summarise`, all values finite. (None, None) below two patients, which have no variance between patients.
    """
    sums, counts = _per_patient(values, patients=patients)
    if sums.size < 2:
        return None, None
    rng = np.random.default_rng(seed_sequence(Stream.bootstrap, seed=seed))
    drawn = rng.integers(sums.size, size=(num_bootstrap, sums.size), dtype=np.int32)
    # A cluster bootstrap: a drawn patient brings all its cases, so each bootstrap mean is a ratio of two sums.
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, CI_PERCENTILES)
    return float(low), float(high)


def _per_patient(values: np.ndarray, *, patients: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of the values and the number of cases of each patient, in the order of the patient ids."""
    ids, rows = np.unique(np.asarray(patients, dtype=object), return_inverse=True)
    return np.bincount(rows, weights=values, minlength=len(ids)), np.bincount(rows, minlength=len(ids))


def num_failures(dice: np.ndarray) -> int:
    """Return the number of cases with a Dice below `FAILURE_DICE`; a case without a Dice (NaN) is a failure too."""
    return int(np.sum(~(np.asarray(dice, dtype=float) >= FAILURE_DICE)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """Difference of one metric, other run minus baseline, on the same cases; None, never NaN, where there are too few."""

    num_cases: int
    """Cases with a value in both runs."""
    num_patients: int
    num_missing: int
    """Cases excluded because a value is NaN in one run or in both."""
    mean_baseline: float | None
    mean_other: float | None
    difference: float | None
    ci95_low: float | None
    ci95_high: float | None
    """Ends of the paired bootstrap interval of the difference, which draws patients; None below two patients."""
    num_patients_higher: int
    num_patients_lower: int
    """Patients whose mean is higher, or lower, in the other run; the rest are equal."""
    p_wilcoxon: float | None
    """Two-sided p of the Wilcoxon signed-rank test over the patients that differ; None with a reason in `no_p`."""
    no_p: str | None


def paired_difference(
    baseline: np.ndarray, other: np.ndarray, *, patients: Sequence[str], num_bootstrap: int, seed: int
) -> PairedDifference:
    """Compare one metric between two runs on the same cases.

    The interval is a bootstrap over patients of the mean difference; a drawn patient brings all its cases, from both runs. The
    test ranks one number per patient, the mean of its cases' differences (Wilcoxon 1945); patients without a difference are
    excluded. Arguments, with the values of both runs, and errors as in `summarise`.
    """
    for values in (baseline, other):
        _check(values, patients=patients, num_bootstrap=num_bootstrap)
    is_pair = ~(np.isnan(baseline) | np.isnan(other))
    ids = np.asarray(patients, dtype=object)[is_pair].tolist()
    differences = (other - baseline)[is_pair]
    sums, counts = _per_patient(differences, patients=ids)
    by_patient = np.round(sums / counts, ROUNDING_DECIMALS)
    low, high = mean_interval(differences, patients=ids, num_bootstrap=num_bootstrap, seed=seed)
    differing = by_patient[by_patient != 0]
    p_wilcoxon: float | None = None
    no_p: str | None = None
    if differing.size == 0:
        no_p = "no patient differs"
    elif differing.size < MIN_TESTED_PATIENTS:
        no_p = f"fewer than {MIN_TESTED_PATIENTS} patients differ"
    else:
        p_wilcoxon = float(wilcoxon(differing).pvalue)  # exact up to 50 values without ties, up to 13 with ties
    has_cases = differences.size > 0
    return PairedDifference(
        num_cases=differences.size,
        num_patients=by_patient.size,
        num_missing=baseline.size - differences.size,
        mean_baseline=float(baseline[is_pair].mean()) if has_cases else None,
        mean_other=float(other[is_pair].mean()) if has_cases else None,
        difference=float(differences.mean()) if has_cases else None,
        ci95_low=low,
        ci95_high=high,
        num_patients_higher=int((by_patient > 0).sum()),
        num_patients_lower=int((by_patient < 0).sum()),
        p_wilcoxon=p_wilcoxon,
        no_p=no_p,
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p values adjusted for multiple tests (Holm 1979), in the order given; None is not a test and stays None."""
    tests = sorted((p, number) for number, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, number) in enumerate(tests):
        largest = max(largest, min(1.0, (len(tests) - rank) * p))
        adjusted[number] = largest
    return adjusted
