"""Adaptation curve: points, intervals and sentences of constructed trials."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.reporting.comparison.adaptation_curve import (
    SCRATCH,
    adaptation_curve,
    curve_figure,
    curve_lines,
)
from prostate_seg.reporting.comparison.results import Repeats, Results

INIT = "models:/prostate_seg@champion"
MEANS = {"null": {2: 0.70, 4: 0.80, 8: 0.86}, f'"{INIT}"': {2: 0.82, 4: 0.85}}


def side(init: str, num_cases: int, *, num_seeds: int, sd: float) -> Repeats:
    patients = [f"p{i}" for i in range(20)]
    by_seed: dict[int | None, Results] = {}
    for seed in range(num_seeds):
        shift = np.random.default_rng(seed).normal(0, sd)
        dice = MEANS[init][num_cases] + np.tile([-0.05, 0.05], 10) + shift
        table = pd.DataFrame({"patient_id": patients, "dice": dice}, index=[f"{patient}_1" for patient in patients])
        table = table.assign(image_md5=patients, mask_md5=patients, oracle_crop="False", volume_reference_ml=40.0)
        by_seed[seed] = Results(name=f"{num_cases} cases", source="", table=table)
    settings = {"fold.max_train_cases": str(num_cases), "train.init": init}
    return Repeats(name="", source="", by_seed=by_seed, settings=settings)


def trials(*, num_seeds: int = 1, sd: float = 0.0) -> list[Repeats]:
    return [side(init, size, num_seeds=num_seeds, sd=sd) for init, sizes in MEANS.items() for size in sizes]


def cut(one: Repeats, rows: slice) -> Repeats:
    """Return trials that were tested on some of their cases."""
    return replace(one, by_seed={0: replace(one.results[0], table=one.results[0].table.iloc[rows])})


def test_points_have_the_mean_of_their_cases_by_curve_and_number() -> None:
    points = adaptation_curve(trials(), num_bootstrap=500, seed=0)
    assert list(zip(points["curve"], points["num_cases"], strict=True)) == [
        *((SCRATCH, size) for size in (2, 4, 8)),
        *((f"from {INIT}", size) for size in (2, 4)),
    ]
    assert points["mean"].tolist() == pytest.approx([0.70, 0.80, 0.86, 0.82, 0.85])
    # A bootstrap mean of 20 values of +-0.05 has a standard deviation of 0.05 / sqrt(20).
    first = points.iloc[0]
    assert first["ci95_high"] - first["ci95_low"] == pytest.approx(2 * 1.96 * 0.05 / np.sqrt(20), rel=0.15)
    assert first["num_patients"] == 20


def test_intervals_widen_with_the_variance_between_repeats() -> None:
    calm, varied = (
        adaptation_curve(trials(num_seeds=4, sd=sd), num_bootstrap=500, seed=0).iloc[0] for sd in (0.0, 0.05)
    )
    assert (calm.num_repeats, varied.num_repeats) == (4, 4)
    assert varied.ci95_high - varied.ci95_low > 1.3 * (calm.ci95_high - calm.ci95_low)


def test_lines_say_what_cases_gain_and_how_many_the_initial_weights_replace() -> None:
    lines = curve_lines(adaptation_curve(trials(), num_bootstrap=100, seed=0))
    # The same patients in every sample, so that a constant difference has no variance.
    assert f"{SCRATCH}: 8 training cases instead of 2 change Dice by +0.160 (95% CI +0.160 to +0.160)" in lines
    assert f"from {INIT}: Dice 0.820 with training cases: 2; {SCRATCH} reach it with 8" in lines
    assert lines[-1] == "note: one repeat: the interval does not contain the variance between trainings"


def test_initial_weights_that_no_number_of_cases_replaces_are_reported_as_such() -> None:
    without_most = [one for one in trials(num_seeds=2) if one.settings["fold.max_train_cases"] != "8"]
    lines = curve_lines(adaptation_curve(without_most, num_bootstrap=100, seed=0))
    assert lines[-1] == f"from {INIT}: Dice 0.820 with training cases: 2; {SCRATCH} reach it not even with 4"


def test_trials_of_other_test_cases_or_of_one_patient_are_refused() -> None:
    first, second = trials()[:2]
    with pytest.raises(InputError, match=r"evaluated on the same data:\n  test cases of 2 cases only, 1: p0_1\n"):
        adaptation_curve([first, cut(second, slice(1, None))], num_bootstrap=10, seed=0)
    results = second.results[0]
    other = replace(results, table=results.table.assign(mask_md5="another"))
    with pytest.raises(InputError, match=r"another reference \(mask_md5\), 20: p0_1"):
        adaptation_curve([first, replace(second, by_seed={0: other})], num_bootstrap=10, seed=0)
    with pytest.raises(InputError, match="needs test cases of two patients or more"):
        adaptation_curve([cut(first, slice(1))], num_bootstrap=10, seed=0)


def test_figure_has_a_line_and_a_band_per_curve() -> None:
    (axes,) = curve_figure(adaptation_curve(trials(), num_bootstrap=100, seed=0)).axes
    assert [line.get_label() for line in axes.lines] == [SCRATCH, f"from {INIT}"]
    assert len(axes.collections) == 2
