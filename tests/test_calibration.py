"""Calibration of probabilities near the surface: counts, temperature, reliability and calibration error."""

import numpy as np
import pytest
from scipy.special import expit, logit

from prostate_seg.segmentation.calibration import (
    NEAR_SURFACE_MM,
    bin_logits,
    calibration_error,
    count_near_surface,
    fit_temperature,
    reliability,
)

SPACING_MM = (5.0, 1.0, 1.0)


def counted(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the counts of voxels by label and logit."""
    edges = np.linspace(-10, 10, len(bin_logits()) + 1)
    return np.stack([np.histogram(np.clip(logits[labels == label], -9.99, 9.99), edges)[0] for label in (0, 1)])


def over_confident(temperature: float, *, num: int = 200_000) -> np.ndarray:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, num)
    return counted(logits, rng.random(num) < expit(logits / temperature))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_of_simulated_voxels_is_found_and_calibrates_them(temperature: float) -> None:
    counts = over_confident(temperature)
    found = fit_temperature(counts)
    assert found == pytest.approx(temperature, rel=0.02)
    before, after = (calibration_error(reliability(counts, temperature=value)) for value in (1.0, found))
    assert before is not None
    assert after is not None
    assert after < 0.01
    assert (before > 0.05) == (temperature != 1.0)


def test_no_temperature_moves_a_probability_across_one_half() -> None:
    for temperature in (0.1, 10.0):
        assert ((expit(bin_logits() / temperature) >= 0.5) == (bin_logits() >= 0)).all()


def test_voxels_of_one_label_have_no_temperature_and_none_have_no_error() -> None:
    counts = over_confident(1.0)
    counts[1] = 0
    assert fit_temperature(counts) is None
    assert calibration_error(reliability(np.zeros_like(counts))) is None


def test_calibration_error_by_hand() -> None:
    counts = np.zeros((2, len(bin_logits())), dtype=np.int64)
    low, high = (int(np.searchsorted(bin_logits(), logit(value))) for value in (0.12, 0.77))
    counts[:, low], counts[:, high] = (70, 30), (10, 90)
    p_low, p_high = expit(bin_logits()[[low, high]])
    found = reliability(counts)
    np.testing.assert_allclose(found["fraction"][[1, 7]], [0.3, 0.9])
    assert calibration_error(found) == pytest.approx((abs(p_low - 0.3) + abs(p_high - 0.9)) / 2)


def test_only_voxels_near_either_surface_are_counted() -> None:
    reference = np.zeros((5, 60, 60), dtype=bool)
    reference[2, 20:40, 20:40] = True
    probability = np.where(reference, 0.9, 0.2).astype(np.float32)
    counts = count_near_surface(reference, reference, probability, spacing_mm=SPACING_MM)
    assert counts[1].sum() == 20 * 20 == counts[1][bin_logits() > logit(0.85)].sum()  # one slice: all of it is surface
    y, x = np.mgrid[:60, :60]
    distance = np.hypot(np.maximum(0, abs(y - 29.5) - 9.5), np.maximum(0, abs(x - 29.5) - 9.5))
    in_slice = (distance <= NEAR_SURFACE_MM).sum() - 400
    assert counts[0].sum() == in_slice + 2 * 400  # the slices above and below are 5 mm away
    shifted = np.roll(reference, 20, axis=2)
    assert count_near_surface(reference, shifted, probability, spacing_mm=SPACING_MM)[0].sum() > counts[0].sum()


def test_two_empty_masks_have_no_surface() -> None:
    nothing = np.zeros((3, 8, 8), dtype=bool)
    assert not count_near_surface(nothing, nothing, nothing.astype(np.float32), spacing_mm=SPACING_MM).any()


def test_probabilities_0_and_1_are_in_the_outermost_bins() -> None:
    reference = np.ones((3, 4, 4), dtype=bool)
    probability = np.zeros((3, 4, 4), dtype=np.float32)
    probability[0] = 1
    counts = count_near_surface(reference, reference, probability, spacing_mm=SPACING_MM)
    assert (counts[1, 0], counts[1, -1]) == (32, 16)
