"""Summaries over cases and differences between runs: hand-computed values, the bootstrap over patients, refusals."""

import itertools
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import scipy.stats

from prostate_seg.segmentation.statistics import (
    FAILURE_DICE,
    PairedDifference,
    Summary,
    holm,
    num_failures,
    paired_difference,
    summarise,
)


def summary_of(values: list[float], patients: list[str], *, num_bootstrap: int = 2000, seed: int = 7) -> Summary:
    return summarise(np.array(values), patients=patients, num_bootstrap=num_bootstrap, seed=seed)


def width(summary: Summary) -> float:
    assert summary.ci95_low is not None
    assert summary.ci95_high is not None
    return summary.ci95_high - summary.ci95_low


def ids(count: int) -> list[str]:
    return [f"p{number:03d}" for number in range(count)]


def test_summary_of_four_cases_by_hand() -> None:
    found = summary_of([1.0, 2.0, 3.0, 6.0], ["a", "b", "c", "a"])
    assert (found.num_cases, found.num_patients, found.num_missing) == (4, 3, 0)
    assert found.mean == 3.0
    assert found.median == 2.5
    assert found.sd == pytest.approx(math.sqrt(14 / 3))  # squares 4 + 1 + 0 + 9, over n - 1


def test_interval_of_two_patients_ends_at_their_means() -> None:
    # A quarter of the draws takes one patient twice, a quarter the other: both ends are among the 2.5% tails.
    found = summary_of([0.2, 0.4, 0.9], ["a", "a", "b"])
    assert found.ci95_low == pytest.approx(0.3)
    assert found.ci95_high == pytest.approx(0.9)


def test_interval_of_many_patients_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(3).normal(0.85, 0.05, size=400)
    found = summary_of(values.tolist(), ids(400), num_bootstrap=4000)
    assert width(found) == pytest.approx(2 * 1.96 * values.std(ddof=1) / math.sqrt(400), rel=0.08)
    assert found.ci95_low is not None
    assert found.mean is not None
    assert found.ci95_low < found.mean


def test_duplicated_studies_of_the_same_patients_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(4).uniform(0.5, 1.0, size=30).tolist()
    once = summary_of(values, ids(30))
    twice = summary_of(values * 2, ids(30) * 2)
    as_other_patients = summary_of(values * 2, ids(60))
    assert twice.num_cases == 60
    assert width(twice) == pytest.approx(width(once))
    assert width(as_other_patients) < 0.85 * width(once)  # 1 / sqrt(2) for truly new patients


def test_all_studies_of_a_patient_are_drawn_together() -> None:
    # Five bad studies of one patient: the means of draws are 0 / 5, 5 / 10 ..., never between two multiples of a patient.
    values, patients = [0.0] * 5 + [1.0] * 5, ["a"] * 5 + ["b"] * 5
    found = summary_of(values, patients)
    assert (found.ci95_low, found.ci95_high) == (0.0, 1.0)
    assert width(summary_of(values, ids(10))) < 1.0


def test_same_seed_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(5).uniform(size=25).tolist()
    assert summary_of(values, ids(25)) == summary_of(values, ids(25))
    assert summary_of(values, ids(25)) != summary_of(values, ids(25), seed=8)


def test_interval_does_not_depend_on_the_order_of_the_cases() -> None:
    values = np.random.default_rng(6).integers(0, 64, size=25) / 64  # sums of these are exact in any order
    order = np.random.default_rng(0).permutation(25)
    shuffled = summary_of(values[order].tolist(), [ids(25)[index] for index in order])
    expected = summary_of(values.tolist(), ids(25))
    assert (shuffled.ci95_low, shuffled.ci95_high) == (expected.ci95_low, expected.ci95_high)


def test_missing_values_are_excluded_and_counted() -> None:
    found = summary_of([1.0, math.nan, 3.0, math.nan], ["a", "b", "c", "c"])
    assert (found.num_cases, found.num_patients, found.num_missing) == (2, 2, 2)
    assert found.mean == 2.0


def test_one_patient_has_no_interval() -> None:
    found = summary_of([0.8, 0.9], ["a", "a"])
    assert found.sd == pytest.approx(math.sqrt(0.005))
    assert (found.ci95_low, found.ci95_high) == (None, None)


def test_one_case_has_no_spread() -> None:
    found = summary_of([0.8], ["a"])
    assert (found.mean, found.median, found.sd) == (0.8, 0.8, None)


@pytest.mark.parametrize("values", [[], [math.nan, math.nan]])
def test_no_value_gives_none_throughout(values: list[float]) -> None:
    found = summary_of(values, ids(len(values)))
    assert (found.num_cases, found.num_patients, found.num_missing) == (0, 0, len(values))
    assert (found.mean, found.sd, found.median, found.ci95_low, found.ci95_high) == (None,) * 5


def test_as_dict_is_json_without_nan() -> None:
    text = json.dumps(asdict(summary_of([0.8, math.nan], ["a", "b"])), allow_nan=False)
    assert json.loads(text) == {
        "num_cases": 1,
        "num_patients": 1,
        "num_missing": 1,
        "mean": 0.8,
        "sd": None,
        "median": 0.8,
        "ci95_low": None,
        "ci95_high": None,
    }


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2,\) and 3 patient ids"):
        summary_of([0.1, 0.2], ids(3))


def test_a_table_in_place_of_a_column_is_refused() -> None:
    with pytest.raises(ValueError, match="one patient id per value"):
        summarise(np.zeros((2, 2)), patients=ids(4), num_bootstrap=10, seed=0)


def test_infinite_values_are_refused() -> None:
    with pytest.raises(ValueError, match="1 infinite of 2"):
        summary_of([0.1, math.inf], ids(2))


def test_a_bootstrap_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        summary_of([0.1, 0.2], ids(2), num_bootstrap=0)


def test_failures_are_cases_below_the_limit_and_cases_without_dice() -> None:
    assert FAILURE_DICE == 0.5
    assert num_failures(np.array([0.0, 0.49, 0.5, 0.9, math.nan])) == 3
    assert num_failures(np.array([])) == 0


# --- differences between two runs ----------------------------------------------------------------------------------


def differing(differences: list[float], patients: list[str] | None = None, *, seed: int = 7) -> PairedDifference:
    """Compare a run with one whose values are these differences higher."""
    baseline = np.linspace(0, 3, len(differences)).round(1)
    return paired_difference(
        baseline,
        baseline + np.array(differences),
        patients=patients or ids(len(differences)),
        num_bootstrap=1000,
        seed=seed,
    )


def p_by_counting(by_patient: list[float]) -> float:
    """Return the two-sided signed-rank p by giving the ranks every combination of signs."""
    ranks = scipy.stats.rankdata(np.abs(by_patient))
    observed = abs(ranks[np.array(by_patient) > 0].sum() - ranks.sum() / 2)
    sums = [sum(itertools.compress(ranks, signs)) for signs in itertools.product((0, 1), repeat=len(ranks))]
    return float(np.mean([abs(total - ranks.sum() / 2) >= observed - 1e-9 for total in sums]))


def test_paired_difference_of_three_patients_by_hand() -> None:
    found = paired_difference(
        np.array([0.5, 0.75, 0.5, 0.25]),
        np.array([1.0, 0.75, 0.25, 0.5]),
        patients=["a", "a", "b", "c"],
        num_bootstrap=5000,
        seed=0,
    )
    assert (found.num_cases, found.num_patients, found.num_missing) == (4, 3, 0)
    assert (found.mean_baseline, found.mean_other, found.difference) == (0.5, 0.625, 0.125)
    assert (found.num_patients_higher, found.num_patients_lower) == (2, 1)  # a: mean of 0.5 and 0
    # All three draws the same patient in 1 of 27 samples each, 3.7%: both ends are those patients' means.
    assert (found.ci95_low, found.ci95_high) == (-0.25, 0.25)


def test_a_drawn_patient_brings_all_its_cases_of_both_runs() -> None:
    changes = np.random.default_rng(4).normal(0.1, 0.2, size=30).tolist()
    once, twice = differing(changes), differing(changes * 2, ids(30) * 2)
    as_other_patients = differing(changes * 2, ids(60))
    assert once.ci95_low == pytest.approx(twice.ci95_low)
    assert once.ci95_high == pytest.approx(twice.ci95_high)
    assert once.p_wilcoxon == pytest.approx(twice.p_wilcoxon)
    assert as_other_patients.p_wilcoxon != pytest.approx(once.p_wilcoxon)


def test_interval_of_differences_is_paired() -> None:
    baseline = np.random.default_rng(1).uniform(0.3, 1.0, size=50)
    found = paired_difference(baseline, baseline + 0.01, patients=ids(50), num_bootstrap=500, seed=0)
    assert (found.ci95_low, found.ci95_high) == pytest.approx((0.01, 0.01))


def test_exchanged_runs_give_the_negative_difference() -> None:
    a, b = np.random.default_rng(2).uniform(size=(2, 25))
    there = paired_difference(a, b, patients=ids(25), num_bootstrap=500, seed=3)
    back = paired_difference(b, a, patients=ids(25), num_bootstrap=500, seed=3)
    assert back.difference == pytest.approx(-there.difference)  # type: ignore[operator]
    assert back.ci95_low == pytest.approx(-there.ci95_high)  # type: ignore[operator]
    assert back.p_wilcoxon == pytest.approx(there.p_wilcoxon)
    assert (back.num_patients_higher, back.num_patients_lower) == (there.num_patients_lower, there.num_patients_higher)


@pytest.mark.parametrize(
    ("by_patient", "p"),
    [
        ([1, 2, 3, 4, 5, 6], 2 / 64),  # one of 64 sign patterns on each side
        ([1, 2, 3, 4, 5, -6], 28 / 64),  # 14 sets of the ranks 1 to 6 have a sum of 6 or less
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0, 0], 2 / 64),  # patients without a difference are excluded
    ],
)
def test_signed_rank_p_by_hand(by_patient: list[float], p: float) -> None:
    assert differing(by_patient).p_wilcoxon == pytest.approx(p)


def test_signed_rank_p_with_ties_is_that_of_counting_all_signs() -> None:
    by_patient = [0.25, 0.25, -0.25, 0.5, 0.5, 0.5, -0.75, 1.0, 1.25]
    assert differing(by_patient).p_wilcoxon == pytest.approx(p_by_counting(by_patient))


def test_ties_that_only_rounding_breaks_are_ties() -> None:
    baseline = np.array([0.1, 0.2, 0.3, 0.7, 0.6, 0.5, 0.4])
    other = np.array([0.3, 0.4, 0.5, 0.9, 0.8, 0.7, 0.2])  # 0.2 more, and 0.2 less in the last
    found = paired_difference(baseline, other, patients=ids(7), num_bootstrap=100, seed=0)
    assert found.p_wilcoxon == pytest.approx(16 / 128)  # none or one of seven signs the other way, on both sides


def test_signed_rank_test_ranks_patients_and_not_cases() -> None:
    changes = np.random.default_rng(8).normal(0.3, 1, size=40)
    by_patient = changes.reshape(20, 2).mean(axis=1)
    found = differing(changes.tolist(), [patient for patient in ids(20) for _ in range(2)])
    assert found.p_wilcoxon == pytest.approx(scipy.stats.wilcoxon(by_patient, method="exact").pvalue)


@pytest.mark.parametrize(
    ("by_patient", "reason"),
    [
        ([0.0] * 10, "no patient differs"),
        ([0.1, 0.2, 0.3, 0.4, 0.5], "fewer than 6 patients differ"),
        ([0.1, 0.2, 0.3, 0.4, 0.5, *[0.0] * 9], "fewer than 6 patients differ"),
        ([math.nan, math.nan], "no patient differs"),
    ],
)
def test_undefined_p_has_a_reason(by_patient: list[float], reason: str) -> None:
    found = differing(by_patient)
    assert (found.p_wilcoxon, found.no_p) == (None, reason)
    json.dumps(asdict(found), allow_nan=False)


def test_a_value_missing_in_one_run_excludes_the_pair_and_is_counted() -> None:
    found = paired_difference(
        np.array([1.0, math.nan, 2.0, math.nan]),
        np.array([2.0, 5.0, math.nan, math.nan]),
        patients=["a", "b", "c", "c"],
        num_bootstrap=100,
        seed=0,
    )
    assert (found.num_cases, found.num_patients, found.num_missing) == (1, 1, 3)
    assert (found.mean_baseline, found.mean_other, found.difference) == (1.0, 2.0, 1.0)
    assert (found.ci95_low, found.ci95_high) == (None, None)


def test_intervals_cover_the_true_difference_at_about_the_nominal_rate() -> None:
    rng, num_holding = np.random.default_rng(20), 0
    for seed in range(400):
        patients = [patient for patient in ids(40) for _ in range(1 + int(rng.integers(3)))]
        of_patient = dict(zip(ids(40), rng.normal(0.02, 0.03, size=40), strict=True))
        change = np.array([of_patient[patient] for patient in patients]) + rng.normal(0, 0.01, size=len(patients))
        baseline = rng.uniform(0.5, 1.0, size=len(patients))
        found = paired_difference(baseline, baseline + change, patients=patients, num_bootstrap=400, seed=seed)
        assert found.ci95_low is not None
        assert found.ci95_high is not None
        num_holding += found.ci95_low <= 0.02 <= found.ci95_high
    assert 0.91 <= num_holding / 400 <= 0.98


def test_p_is_below_5_percent_in_about_5_percent_of_comparisons_without_a_difference() -> None:
    changes = np.random.default_rng(21).normal(size=(1000, 15))
    p_values = [differing(change.tolist()).p_wilcoxon for change in changes]
    assert 0.03 <= np.mean([p is not None and p < 0.05 for p in p_values]) <= 0.065


def test_runs_of_different_length_and_infinite_values_are_refused() -> None:
    with pytest.raises(ValueError, match="one patient id per value"):
        paired_difference(np.zeros(2), np.zeros(3), patients=ids(2), num_bootstrap=10, seed=0)
    with pytest.raises(ValueError, match="1 infinite of 2"):
        paired_difference(np.zeros(2), np.array([0, math.inf]), patients=ids(2), num_bootstrap=10, seed=0)


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.04, and never below the one before.
    assert holm([0.04, 0.01, None, 0.03, 0.02]) == pytest.approx([0.06, 0.04, None, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([None]) == [None]
    assert holm([]) == []
