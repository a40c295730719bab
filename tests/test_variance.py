"""Noise floor: error of the interval on equal settings, components and plans with known answers, one seed, refusals."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from prostate_seg.segmentation.variance import (
    POWER,
    MeanSquares,
    NoiseFloor,
    mean_squares,
    noise_floor,
    plan_for,
    variance_of_difference,
)

NUM_SIMULATED = 1000
MARGIN = 1.96 * (0.05 * 0.95 / NUM_SIMULATED) ** 0.5
"""Half width of the 95% binomial interval of a rate of 5%: 1.4 percentage points."""
PATIENT, RESIDUAL = 0.015, 0.015
"""Simulated standard deviations of setting x patient and of patient x network."""

DESIGNS = [(3, 5, 20), (2, 5, 20), (3, 2, 8), (2, 2, 8), (3, 1, 20), (5, 5, 50)]
"""Seeds, folds, patients."""


def simulated(
    num_seeds: int,
    num_folds: int,
    num_patients: int,
    *,
    network: float,
    fold: float = 0.0,
    gain: float = 0.0,
    residual: float = RESIDUAL,
    num: int = NUM_SIMULATED,
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Return scores of `num` comparisons, each side [num, seeds, patients], and the folds of the patients."""
    rng = np.random.default_rng(0)
    folds = np.arange(num_patients) % num_folds
    shared = rng.normal(0.85, 0.05, (num, 1, num_patients)) + rng.normal(0, 0.01, (num, 1, num_folds))[..., folds]

    def side(shift: float) -> np.ndarray:
        of_setting = rng.normal(shift, PATIENT / 2**0.5, (num, 1, num_patients))
        of_setting = of_setting + rng.normal(0, fold / 2**0.5, (num, 1, num_folds))[..., folds]
        networks = rng.normal(0, network, (num, num_seeds, num_folds))[..., folds]
        return shared + of_setting + networks + rng.normal(0, residual, (num, num_seeds, num_patients))

    return (side(0.0), side(gain)), folds


def rate(*design: int, network: float, fold: float = 0.0, gain: float = 0.0) -> float:
    """Return the fraction of simulated comparisons in which one setting is called better."""
    sides, folds = simulated(*design, network=network, fold=fold, gain=gain)
    mean = (sides[1].mean(axis=-2) - sides[0].mean(axis=-2)).mean(axis=-1)
    variance, df = variance_of_difference(mean_squares(sides, folds=folds))
    return float((np.abs(mean) > t.ppf(0.975, df) * variance**0.5).mean())


# --- error and power -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [0, 0.005, 0.02])
@pytest.mark.parametrize("design", DESIGNS)
def test_equal_settings_are_called_better_in_at_most_5_percent(design: tuple[int, ...], network: float) -> None:
    assert rate(*design, network=network) <= 0.05 + MARGIN


@pytest.mark.parametrize(("design", "bound"), [((3, 5, 20), 0.09), ((2, 5, 20), 0.09), ((3, 10, 50), 0.07)])
def test_folds_that_favour_one_setting_raise_the_error_by_less_than_documented(
    design: tuple[int, ...], bound: float
) -> None:
    assert max(rate(*design, network=0, fold=fold) for fold in (0.005, 0.01, 0.02)) <= bound + MARGIN


@pytest.mark.parametrize(("design", "least"), [((3, 5, 20), 0.65), ((5, 5, 50), 0.7), ((3, 2, 8), 0.45)])
@pytest.mark.parametrize("network", [0, 0.02])
def test_a_difference_of_three_standard_errors_is_mostly_found(
    design: tuple[int, int, int], least: float, network: float
) -> None:
    seeds, folds, patients = design
    standard_error = 2 * network**2 / (seeds * folds) + (PATIENT**2 + 2 * RESIDUAL**2 / seeds) / patients
    assert rate(*design, network=network, gain=3 * standard_error**0.5) >= least


# --- known answers -------------------------------------------------------------------------------------------------


def table(values: np.ndarray, folds: np.ndarray) -> pd.DataFrame:
    """Return scores, shape [seeds, patients], as rows of one case per patient."""
    rows = [
        {"seed": seed, "fold": f"fold{folds[case]}", "case_id": f"{case}_0", "patient_id": f"{case}", "value": value}
        for (seed, case), value in np.ndenumerate(values)
    ]
    return pd.DataFrame(rows)


def floor_of(a: list[list[float]], b: list[list[float]], folds: list[int]) -> NoiseFloor:
    return noise_floor(table(np.array(a), np.array(folds)), table(np.array(b), np.array(folds)))


def test_seeds_alone_explain_a_difference_between_networks() -> None:
    found = floor_of([[0.8] * 4] * 2, [[0.9, 0.9, 0.8, 0.8], [0.8, 0.8, 0.9, 0.9]], [0, 0, 1, 1])
    assert found.difference == pytest.approx(0.05)
    assert (found.num_seeds, found.num_folds, found.num_patients) == ((2, 2), 2, 4)
    assert found.sd_other.seeds == pytest.approx(0.005**0.5)  # of 0.9 and 0.8
    assert found.sd_difference.seeds == pytest.approx(0.005**0.5)
    for one in (found.sd_baseline, found.sd_other, found.sd_difference):
        assert (one.folds, one.patients, one.residual) == pytest.approx((0, 0, 0))
    # 0.005 / 2 seeds / 2 folds is the variance; each fold has a seed to spare, so there are two degrees of freedom
    assert found.ci95_high - found.difference == pytest.approx(4.302653 * 0.00125**0.5)


def test_patients_alone_give_the_interval_of_a_paired_t_test() -> None:
    gains = [0.01, 0.02, 0.03, 0.06]
    found = floor_of([[0.8] * 4] * 2, [[0.8 + gain for gain in gains]] * 2, [0, 0, 0, 0])
    sd = float(np.std(gains, ddof=1))
    assert found.sd_difference.patients == pytest.approx(sd)
    assert found.ci95_low == pytest.approx(0.03 - 3.182446 * sd / 2)
    assert found.p_not_better is not None
    assert found.p_not_better == pytest.approx(0.0344, abs=1e-3)  # t = 2.777 with three degrees of freedom
    assert (found.num_patients_higher, found.num_patients_lower) == (4, 0)


def test_components_are_recovered_from_simulated_scores() -> None:
    (a, b), folds = simulated(20, 50, 1000, network=0.02, fold=0.012, num=1)
    found = noise_floor(table(a[0], folds), table(b[0], folds))
    of_difference, of_side = found.sd_difference, found.sd_other
    assert of_difference.seeds == pytest.approx(0.02 * 2**0.5, rel=0.05)
    assert of_difference.folds == pytest.approx(0.012, rel=0.2)
    assert of_difference.patients == pytest.approx(PATIENT, rel=0.1)
    assert of_difference.residual == pytest.approx(RESIDUAL * 2**0.5, rel=0.02)
    assert of_side.seeds == pytest.approx(0.02, rel=0.05)
    assert of_side.residual == pytest.approx(RESIDUAL, rel=0.02)
    assert of_side.patients == pytest.approx((0.05**2 + PATIENT**2 / 2) ** 0.5, rel=0.05)
    assert of_side.folds == pytest.approx((0.01**2 + 0.012**2 / 2) ** 0.5, rel=0.4)


def test_cases_of_a_patient_count_as_their_mean() -> None:
    a, b = (table(np.array([[0.8, 0.7, 0.6]] * 2) + shift, np.zeros(3, int)) for shift in (0.0, 0.01))
    b.loc[b["case_id"] == "0_0", "value"] += 0.06
    for one in (a, b):
        one["patient_id"] = one["patient_id"].replace("1", "0")
    assert noise_floor(a, b).difference == pytest.approx((0.01 + 0.03 + 0.01) / 2)


# --- plan ----------------------------------------------------------------------------------------------------------


def expected_squares(num_seeds: int, num_folds: int, num_patients: int, *, network: float) -> MeanSquares:
    """Return the expected mean squares of the simulated scores."""
    size = num_patients / num_folds
    patients = PATIENT**2 + 2 * RESIDUAL**2 / num_seeds
    return MeanSquares(
        num_seeds=(num_seeds, num_seeds),
        fold_sizes=np.full(num_folds, size),
        patients=np.array(patients),
        folds=np.array(patients + size * 2 * network**2 / num_seeds),
        seeds=np.full((2, num_folds), network**2 + RESIDUAL**2 / size),
        residual=np.full(2, RESIDUAL**2),
    )


@pytest.mark.parametrize("network", [0, 0.006])
def test_planned_sizes_show_the_difference_with_the_planned_power(network: float) -> None:
    plan = plan_for(0.01, squares=expected_squares(3, 5, 30, network=network))
    assert plan.num_seeds is not None
    sizes = [(seeds, patients, 0.01) for seeds, patients in plan.patients_by_seeds.items() if patients is not None]
    assert plan.detectable is not None
    sizes += [(plan.num_seeds, 30, 0.01), (3, 30, plan.detectable)]
    assert len(sizes) >= 5
    for seeds, patients, gain in sizes:
        patients = 5 * round(patients / 5)  # simulated folds of equal size
        assert rate(seeds, 5, patients, network=network, gain=gain) == pytest.approx(POWER, abs=0.05)
    assert plan.num_patients == plan.patients_by_seeds[3]


def test_more_seeds_need_fewer_patients_and_noisy_seeds_are_out_of_reach() -> None:
    needed = plan_for(0.01, squares=expected_squares(3, 5, 50, network=0.006)).patients_by_seeds
    assert needed[3] is not None
    assert needed[10] is not None
    assert needed[3] > needed[10]
    noisy = plan_for(0.01, squares=expected_squares(3, 5, 50, network=0.03))
    assert (noisy.num_patients, noisy.patients_by_seeds[2]) == (None, None)
    assert plan_for(1e-6, squares=expected_squares(3, 5, 50, network=0.03)).detectable is None


# --- one seed, refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_seeds", [(1, 3), (3, 1), (1, 1)])
def test_one_seed_tells_nothing_of_seeds(num_seeds: tuple[int, int]) -> None:
    (a, b), folds = simulated(3, 5, 20, network=0.02, num=1)
    sides = [table(one[0, :number], folds) for one, number in zip((a, b), num_seeds, strict=True)]
    found = noise_floor(*sides, difference=0.01)
    assert (found.p_not_better, found.plan, found.sd_difference.seeds, found.sd_difference.folds) == (None,) * 4
    many = noise_floor(table(a[0], folds), table(b[0], folds))
    assert found.ci95_high - found.ci95_low < many.ci95_high - many.ci95_low  # of these networks, not of the setting
    alone = found.sd_baseline if num_seeds[0] == 1 else found.sd_other
    assert (alone.seeds, alone.residual) == (None, None)
    assert alone.patients > 0


def test_other_cases_or_folds_are_refused() -> None:
    (a, b), folds = simulated(2, 2, 8, network=0, num=1)
    first, second = table(a[0], folds), table(b[0], folds)
    with pytest.raises(ValueError, match="every seed needs the same cases"):
        noise_floor(first[1:], second)
    with pytest.raises(ValueError, match="both settings need the same cases"):
        noise_floor(first, second.assign(fold="fold0"))
    with pytest.raises(ValueError, match="a fold of two patients or more"):
        noise_floor(*(table(one[0, :, :2], np.arange(2)) for one in (a, b)))


def test_mean_squares_of_many_comparisons_are_those_of_each() -> None:
    (a, b), folds = simulated(3, 2, 8, network=0.01, num=5)
    together = mean_squares((a, b), folds=folds)
    for number in range(5):
        alone = mean_squares((a[number], b[number]), folds=folds)
        for name in ("patients", "folds", "seeds", "residual"):
            np.testing.assert_allclose(getattr(together, name)[number], getattr(alone, name))
