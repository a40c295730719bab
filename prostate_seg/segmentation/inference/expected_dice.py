"""Expected Dice of a mask without a reference, and a lower bound from conformal prediction.

Features of a mask are numbers that grow with its error, 1 - Dice. They are computed for each network by itself and averaged,
so that they mean the same for one network on its test cases and for the ensemble of all folds on a new study. The logarithm
of the error is linear in the features, with slopes that are not negative: a larger feature never gives a higher Dice. The
bound is CV+ (Barber et al. 2021) with patients as units. Nothing here needs more than numbers in a JSON file.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import ndimage
from scipy.optimize import nnls

from prostate_seg.common.errors import InputError
from prostate_seg.imaging.geometry import Spacing, bounding_box
from prostate_seg.segmentation.overlap import dice

SMALLEST_ERROR = 1e-3
"""Lower limit of an error whose logarithm is taken."""
NUM_GROUPS = 10
"""Groups of patients of which each is predicted by a regression on the others."""
PENALTY = 5.0
"""Ridge penalty of the slopes of standardised features, in cases: with as many cases they shrink by half."""

Verdict = Literal["accept", "check", "reject"]


def mask_features(
    gland: np.ndarray,
    plain: np.ndarray | None,
    *,
    threshold: float,
    inter_model_dice: float | None,
    spacing_mm: Spacing,
) -> dict[str, float]:
    """Return the features of the networks' masks, averaged over networks; empty if all masks are.

    Args:
        gland: Probability of the gland from each network, [networks, Z, Y, X].
        plain: The same without test-time augmentation; None if there is none, and then `tta` is missing.
        threshold: Lowest probability of a gland voxel.
        inter_model_dice: None for one network, and then `inter_model` is missing.
        spacing_mm: Voxel edges along Z, Y, X.
    """
    rows = []
    for number, probability in enumerate(gland):
        mask = probability >= threshold
        if not mask.any():
            continue
        row = _shape_features(mask, spacing_mm=spacing_mm)
        row["confidence"] = log_error(float(probability[mask].mean()))
        if plain is not None:  # the mean of both views minus one view is the other
            mirrored = 2 * probability - plain[number] >= threshold
            row["tta"] = log_error(dice(plain[number] >= threshold, mirrored))
        rows.append(row)
    features = {name: float(np.mean([row[name] for row in rows])) for name in (rows[0] if rows else ())}
    if rows and inter_model_dice is not None:
        features["inter_model"] = log_error(inter_model_dice)
    return features


def _shape_features(mask: np.ndarray, *, spacing_mm: Spacing) -> dict[str, float]:
    """Return small volume, rough surface and voxels outside the largest component of a mask that is not empty."""
    inside = np.pad(mask[bounding_box(mask)], 1)
    largest = np.bincount(ndimage.label(inside)[0].ravel())[1:].max()
    z, y, x = spacing_mm
    faces_mm2 = (y * x, z * x, z * y)
    area_mm2 = sum(face * np.count_nonzero(np.diff(inside, axis=axis)) for axis, face in enumerate(faces_mm2))
    volume_mm3 = float(inside.sum()) * z * y * x
    return {
        "small": -math.log(volume_mm3),
        "rough": math.log(area_mm2 / volume_mm3 ** (2 / 3)),
        "fragments": 1 - float(largest) / float(inside.sum()),
    }


def log_error(value: float | np.ndarray) -> Any:
    """Return the logarithm of 1 - value, of a Dice or a probability, at least that of `SMALLEST_ERROR`."""
    return np.log(np.maximum(1 - np.asarray(value), SMALLEST_ERROR))[()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What to expect of one mask."""

    expected_dice: float
    lower_bound: float

    def verdict(self, *, min_expected_dice: float) -> Verdict:
        """Accept a mask whose lower bound reaches the minimum, reject one whose expected Dice does not."""
        if self.lower_bound >= min_expected_dice:
            return "accept"
        return "check" if self.expected_dice >= min_expected_dice else "reject"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedDice:
    """Regression of Dice on features, with the scores behind its lower bound; all fields are of JSON types."""

    coverage: float
    """Fraction of patients for whom the bound holds in all studies."""
    features: list[str]
    """Names of the features, in the order of the coefficients."""
    coefficients: list[float]
    """Intercept and slopes of the log error, from all cases."""
    mean_ratio: float
    """Mean of actual over fitted error, of cases whose patient was left out: turns a geometric mean into a mean."""
    coefficients_without: list[list[float]]
    """The same without the patients of each group."""
    scores: list[list[float]]
    """Group of each patient, and log error minus its prediction without the group, in the patient's worst study."""

    @property
    def num_patients(self) -> int:
        """Patients that the bound is calibrated on."""
        return len(self.scores)

    def estimate(self, features: Mapping[str, float]) -> Estimate:
        """Return expected Dice and lower bound of a mask; both 0 for an empty one, which has no features."""
        if not features:
            return Estimate(expected_dice=0.0, lower_bound=0.0)
        row = np.array([1.0, *(features[name] for name in self.features)])
        fitted = min(0.0, float(row @ np.array(self.coefficients)))
        expected = 1 - min(1.0, self.mean_ratio * math.exp(fitted))
        groups, scores = (np.array(values) for values in zip(*self.scores, strict=True))
        log_errors = np.sort((np.array(self.coefficients_without) @ row)[groups] + scores)
        highest = min(0.0, float(log_errors[_rank(len(scores), coverage=self.coverage) - 1]))
        return Estimate(expected_dice=expected, lower_bound=min(expected, 1 - math.exp(highest)))


class CalibrationCase(NamedTuple):
    """A test case of the calibration."""

    features: Mapping[str, float]
    """Empty for an empty mask."""
    dice: float
    patient: str


def fit_expected_dice(cases: Sequence[CalibrationCase], *, coverage: float) -> ExpectedDice:
    """Fit the regression, and the scores of its bound for a fraction of patients, to all cases whose mask is not empty.

    Raises:
        InputError: If there are too few patients for the coverage.
    """
    kept = [case for case in cases if case.features]
    groups_of = _groups_of(kept)
    needed = num_patients_needed(coverage)
    if len(groups_of) < needed:
        raise InputError(
            f"a lower bound that holds for {coverage:.0%} of patients needs {needed} test patients with a predicted gland, "
            f"and there are {len(groups_of)}: test more patients, or lower evaluate.coverage"
        )
    names = [name for name in kept[0].features if all(name in case.features for case in kept)]
    values = np.array([[case.features[name] for name in names] for case in kept])
    errors = log_error(np.array([case.dice for case in kept]))
    groups = np.array([groups_of[case.patient] for case in kept])
    without = [_fit(values[groups != group], errors[groups != group]) for group in range(groups.max() + 1)]
    fitted = np.sum(np.array(without)[groups] * np.column_stack([np.ones(len(values)), values]), axis=1)
    worst = dict.fromkeys(groups_of, -math.inf)
    for case, residual in zip(kept, (errors - fitted).tolist(), strict=True):
        worst[case.patient] = max(worst[case.patient], residual)
    return ExpectedDice(
        coverage=coverage,
        features=names,
        coefficients=_fit(values, errors).tolist(),
        mean_ratio=float(np.exp(errors).mean() / np.exp(np.minimum(fitted, 0)).mean()),
        coefficients_without=[one.tolist() for one in without],
        scores=[[groups_of[patient], score] for patient, score in worst.items()],
    )


def left_out_estimates(cases: Sequence[CalibrationCase], *, coverage: float) -> list[Estimate | None]:
    """Return the estimate of each case from a fit without its group of patients; None where that has too few."""
    groups = _groups_of(cases)
    fits: dict[int, ExpectedDice] = {}
    for group in set(groups.values()):
        with suppress(InputError):
            others = [case for case in cases if groups[case.patient] != group]
            fits[group] = fit_expected_dice(others, coverage=coverage)
    found = [(fits.get(groups[case.patient]), case.features) for case in cases]
    return [None if fit is None else fit.estimate(features) for fit, features in found]


def num_patients_needed(coverage: float) -> int:
    """Return the smallest number of patients with a finite bound at this coverage."""
    # `_rank` is no larger than the number, and a patient is predicted from at least one other.
    return max(2, math.ceil(round(coverage / (1 - coverage), 6)))


def _groups_of(cases: Sequence[CalibrationCase]) -> dict[str, int]:
    """Return the group of each patient."""
    return {patient: number % NUM_GROUPS for number, patient in enumerate(sorted({case.patient for case in cases}))}


def _rank(num_patients: int, *, coverage: float) -> int:
    """Return the rank of the score that bounds those of new patients with this coverage."""
    return math.ceil(round((num_patients + 1) * coverage, 9))  # 10 * 0.9 is 9, not the next number above


def _fit(values: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Return intercept and slopes, none negative, of a ridge regression on values [cases, features]; 0 for constant ones."""
    centres, sds = values.mean(axis=0), values.std(axis=0)
    sds = np.where(sds > 1e-9, sds, np.inf)
    standardised = np.vstack([(values - centres) / sds, math.sqrt(PENALTY) * np.eye(len(centres))])
    slopes = nnls(standardised, np.concatenate([errors - errors.mean(), np.zeros(len(centres))]))[0] / sds
    return np.array([errors.mean() - slopes @ centres, *slopes])
