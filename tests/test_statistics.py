"""Summaries over cases: hand-computed values, the bootstrap over patients, missing values, refusals."""

import json
import math

import numpy as np
import pytest

from prostate_seg.segmentation.statistics import FAILURE_DICE, Summary, num_failures, summarise


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


def test_missing_values_are_left_out_and_counted() -> None:
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
    text = json.dumps(summary_of([0.8, math.nan], ["a", "b"]).as_dict(), allow_nan=False)
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
