"""Expected Dice and its lower bound: coverage on simulated tables, order of doubt, features, refusals."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from prostate_seg.common.errors import InputError
from prostate_seg.segmentation.inference.expected_dice import (
    CalibrationCase,
    Estimate,
    ExpectedDice,
    fit_expected_dice,
    left_out_estimates,
    mask_features,
    num_patients_needed,
)
from prostate_seg.segmentation.inference.out_of_distribution import distance_from_training, merged_ranges
from tests.project_helpers import only_in_hard_use
from tests.stage_helpers import run_stages

Table = tuple[list[dict[str, float]], np.ndarray]
SPACING_MM = (3.0, 1.0, 1.0)


def simulated(num: int, *, rng: np.random.Generator, shift: float = 0.0) -> Table:
    """Return features and Dice of cases of random difficulty; with a shift the errors are larger than the features show."""
    difficulty = rng.gamma(1.5, 1.0, size=num)
    dice = 1 - np.clip(np.exp(-2.8 + 0.5 * difficulty + shift + rng.normal(0, 0.3, num)), 0.01, 1)
    features = {
        "tta": -3 + 0.4 * difficulty + rng.normal(0, 0.4, num),
        "confidence": -3 + 0.3 * difficulty + rng.normal(0, 0.3, num),
        "outside_training": np.maximum(0, difficulty - 4),
        "small": rng.normal(-10, 0.4, num),
        "fragments": rng.uniform(0, 0.1, num),
    }
    return [{name: float(values[number]) for name, values in features.items()} for number in range(num)], dice


def fitted(
    rows: Sequence[Mapping[str, float]], dice: np.ndarray, *, coverage: float = 0.9, studies: int = 1
) -> ExpectedDice:
    """Return a fit with some consecutive studies per patient."""
    return fit_expected_dice(calibration_cases(rows, dice, studies=studies), coverage=coverage)


def calibration_cases(
    rows: Sequence[Mapping[str, float]], dice: np.ndarray, *, studies: int = 1
) -> list[CalibrationCase]:
    patients = [f"{number // studies:04d}" for number in range(len(rows))]
    return [CalibrationCase(*one) for one in zip(rows, dice.tolist(), patients, strict=True)]


def covered(*, num_fitted: int, shift: float = 0.0) -> float:
    """Return how often the bound holds for 2,000 new patients, 20 after each of 100 fits."""
    rng, holds = np.random.default_rng(0), []
    for _ in range(100):
        calibration = fitted(*simulated(num_fitted, rng=rng))
        rows, dice = simulated(20, rng=rng, shift=shift)
        holds += [calibration.estimate(row).lower_bound <= value for row, value in zip(rows, dice, strict=True)]
    assert len(holds) == 2000
    return float(np.mean(holds))


@pytest.mark.parametrize("num_fitted", [20, 60, 200])
def test_the_lower_bound_holds_for_nine_of_ten_exchangeable_patients(num_fitted: int) -> None:
    assert 0.87 <= covered(num_fitted=num_fitted) <= 0.93


def test_the_lower_bound_does_not_hold_where_errors_are_larger_than_the_features_show() -> None:
    assert covered(num_fitted=60, shift=0.5) < 0.7


def test_the_lower_bound_holds_in_the_worst_of_several_studies_of_a_patient() -> None:
    rng, holds = np.random.default_rng(1), []
    for _ in range(40):
        calibration = fitted(*simulated(120, rng=rng), studies=3)
        assert calibration.num_patients == 40
        rows, dice = simulated(60, rng=rng)
        of_studies = [calibration.estimate(row).lower_bound <= value for row, value in zip(rows, dice, strict=True)]
        holds += np.reshape(of_studies, (20, 3)).all(axis=1).tolist()
    assert 0.87 <= np.mean(holds) <= 0.94


def test_the_worst_fifth_lies_in_the_first_two_fifths_of_the_queue() -> None:
    rng = np.random.default_rng(2)
    calibration = fitted(*simulated(60, rng=rng))
    (easy, easy_dice), (hard, hard_dice) = simulated(80, rng=rng), simulated(20, rng=rng)
    hard = [{**row, "tta": row["tta"] + 2, "confidence": row["confidence"] + 1.5} for row in hard]
    dice = np.concatenate([easy_dice, 0.6 * hard_dice])
    expected = np.array([calibration.estimate(row).expected_dice for row in [*easy, *hard]])
    assert set(dice.argsort()[:20]) <= set(expected.argsort()[:40])
    unrelated = np.random.default_rng(3).permutation(expected)
    assert not set(dice.argsort()[:20]) <= set(unrelated.argsort()[:40])


def test_expected_dice_is_the_mean_of_dice_over_new_cases() -> None:
    rng = np.random.default_rng(4)
    calibration = fitted(*simulated(200, rng=rng))
    rows, dice = simulated(2000, rng=rng)
    assert np.mean([calibration.estimate(row).expected_dice for row in rows]) == pytest.approx(dice.mean(), abs=0.02)


def test_a_larger_feature_never_gives_a_higher_dice() -> None:
    rng = np.random.default_rng(5)
    rows, dice = simulated(40, rng=rng)
    for row, value in zip(rows, dice, strict=True):
        row["fragments"] = value  # the larger, the better: against its meaning
    calibration = fitted(rows, dice)
    best = calibration.estimate(rows[0])
    for name in rows[0]:
        worse = calibration.estimate({**rows[0], name: rows[0][name] + 1})
        assert worse.expected_dice <= best.expected_dice
        assert worse.lower_bound <= best.lower_bound
    assert calibration.estimate({**rows[0], "tta": 100.0}) == Estimate(expected_dice=0.0, lower_bound=0.0)


@pytest.mark.parametrize(("coverage", "needed"), [(0.5, 2), (0.8, 4), (0.9, 9), (0.95, 19), (0.99, 99)])
def test_fewer_patients_than_the_coverage_needs_are_refused_with_the_number(coverage: float, needed: int) -> None:
    assert num_patients_needed(coverage) == needed
    rng = np.random.default_rng(6)
    assert fitted(*simulated(needed, rng=rng), coverage=coverage).num_patients == needed
    with pytest.raises(InputError, match=f"needs {needed} test patients .* there are {needed - 1}: test more"):
        fitted(*simulated(needed - 1, rng=rng), coverage=coverage)
    with pytest.raises(InputError, match="there are 9: "):  # studies of a patient are one patient
        fitted(*simulated(18, rng=rng), coverage=0.95, studies=2)


def test_estimates_of_a_left_out_patient_do_not_depend_on_its_dice() -> None:
    rows, dice = simulated(30, rng=np.random.default_rng(7))
    before = left_out_estimates(calibration_cases(rows, dice), coverage=0.9)
    after = left_out_estimates(calibration_cases(rows, np.append(0.0, dice[1:])), coverage=0.9)
    assert before[0] == after[0] is not None
    assert before[1] != after[1]
    assert left_out_estimates(calibration_cases(rows[:9], dice[:9]), coverage=0.9) == [None] * 9


def test_a_calibration_is_plain_json() -> None:
    rows, dice = simulated(20, rng=np.random.default_rng(8))
    calibration = fitted(rows, dice)
    again = ExpectedDice(**json.loads(json.dumps(asdict(calibration))))
    assert again == calibration
    assert again.estimate(rows[0]) == calibration.estimate(rows[0])


def test_an_empty_mask_has_expected_dice_0_and_is_no_part_of_the_fit() -> None:
    rows, dice = simulated(20, rng=np.random.default_rng(9))
    calibration = fitted([*rows, {}], np.append(dice, 0.0))
    assert calibration.num_patients == 20
    assert calibration.estimate({}) == Estimate(expected_dice=0.0, lower_bound=0.0)
    with pytest.raises(InputError, match="needs 9 test patients with a predicted gland, and there are 0"):
        fitted([{}] * 20, np.zeros(20))


@pytest.mark.parametrize(
    ("expected", "bound", "verdict"),
    [(0.9, 0.8, "accept"), (0.9, 0.79, "check"), (0.8, 0.5, "check"), (0.79, 0.5, "reject"), (0, 0, "reject")],
)
def test_verdicts(expected: float, bound: float, verdict: str) -> None:
    assert Estimate(expected_dice=expected, lower_bound=bound).verdict(min_expected_dice=0.8) == verdict


def cube(confidence: float = 0.9) -> np.ndarray:
    """Return probabilities with a block of 4 x 12 x 12 voxels, a cube of 12 mm."""
    probability = np.zeros((10, 30, 30), dtype=np.float32)
    probability[3:7, 9:21, 9:21] = confidence
    return probability


def features(
    *glands: np.ndarray, plain: Sequence[np.ndarray] | None = None, agreement: float | None = None
) -> dict[str, float]:
    return mask_features(
        np.stack(glands),
        None if plain is None else np.stack(plain),
        threshold=0.5,
        inter_model_dice=agreement,
        spacing_mm=SPACING_MM,
    )


def test_features_of_a_cube() -> None:
    assert features(cube()) == pytest.approx(
        {"small": -math.log(12**3), "rough": math.log(6), "fragments": 0.0, "confidence": math.log(0.1)}, abs=1e-5
    )


def test_a_second_component_is_a_fragment() -> None:
    probability = cube()
    probability[0, 0, :24] = 0.9
    assert features(probability)["fragments"] == pytest.approx(24 / (24 + 4 * 12 * 12))


def test_the_dice_of_the_mirrored_view_is_a_feature() -> None:
    plain = cube(0.8)
    mean = plain.copy()
    mean[3:7, 9:21, 9:15] = 0.55  # 0.3 in the mirrored view, which has half of the voxels: Dice 2/3
    assert features(mean, plain=[plain])["tta"] == pytest.approx(math.log(1 / 3))
    assert features(cube(), plain=[cube()])["tta"] == pytest.approx(math.log(1e-3))


def test_features_of_an_ensemble_are_means_over_its_masks_and_an_empty_mask_has_none() -> None:
    both = features(cube(0.9), cube(0.6), agreement=0.9)
    assert both["confidence"] == pytest.approx((math.log(0.1) + math.log(0.4)) / 2, abs=1e-5)
    assert both["inter_model"] == pytest.approx(math.log(0.1))
    assert features(cube(0.9), cube(0.1)) == features(cube(0.9))
    assert features(cube(0.1)) == {}


def test_distance_from_training_is_1_at_the_tolerance_and_0_inside() -> None:
    ranges = {"spacing_z_mm": (2.0, 4.0), "mean_grey": (0.2, 0.3), "gland_volume_ml": (20.0, 80.0)}
    inside = {"spacing_z_mm": 3.0, "mean_grey": 0.25}
    assert distance_from_training(inside, ranges=ranges) == 0  # without a gland there is no volume
    assert distance_from_training({**inside, "spacing_z_mm": 5.0}, ranges=ranges) == pytest.approx(1)
    assert distance_from_training({**inside, "spacing_z_mm": 1.6}, ranges=ranges) == pytest.approx(1)
    assert distance_from_training({"spacing_z_mm": 5.0, "mean_grey": 0.5}, ranges=ranges) == pytest.approx(3)
    assert merged_ranges([ranges, {"mean_grey": (0.1, 0.2)}]) == {"mean_grey": (0.1, 0.3)}


PLANTED = [
    *("experiment=tiny", "mlflow=off", "preprocess.image_size=80", "train.steps_per_epoch=40", "train.max_epochs=8"),
    *("data.phantom.field_of_view_mm=120", "data.phantom.gland_volume_range_ml=[25,90]"),
]


@pytest.mark.slow
@only_in_hard_use
def test_planted_difficulties_come_first_in_the_queue(tmp_path: Path) -> None:
    for folder, num_patients, scanners, seed in (
        ("trained", 24, "[standard]", 1),
        ("new", 20, "[standard,standard,standard,standard,coil]", 2),
    ):
        (tmp_path / folder).mkdir()
        phantom = (f"data.phantom.num_patients={num_patients}", f"data.phantom.scanners={scanners}", f"seed={seed}")
        difficulty = f"data.phantom.difficulty={0.3 if folder == 'trained' else 0.6}"
        done = run_stages(tmp_path / folder, "stage=fetch", *PLANTED, *phantom, difficulty)
        assert done.returncode == 0, done.stderr
    external = f"evaluate.external_root={tmp_path / 'new' / 'data'}"
    for stages in (["stage=preprocess,prepare,train,evaluate"], ["stage=evaluate,report", external]):
        done = run_stages(tmp_path / "trained", *stages, *PLANTED)
        assert done.returncode == 0, done.stderr
    queue = pd.read_csv(tmp_path / "trained" / "report_external" / "expected_dice.csv").sort_values("expected_dice")
    # Ranks of single cases vary with the last bits of the weights; by chance the correlation is exceeded once in 25 times.
    assert spearmanr(queue["expected_dice"], queue["dice"])[0] > 0.4, queue
    assert queue["dice"].idxmin() in queue.index[:4], queue
