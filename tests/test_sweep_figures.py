"""Figures of a sweep: files, axes, and no change of global matplotlib settings."""

import warnings
from pathlib import Path

import matplotlib as mpl
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from prostate_seg.sweeping import figures
from prostate_seg.sweeping.figures import draw_sweep

ROWS = [
    ({"loss": loss, "rate": rate, "steps": steps}, value)
    for loss, rate, steps, value in (
        ("dice", "1e-4", "null", 0.5),
        ("bce", "1e-2", "50", 0.7),
        ("dice", "1e-3", "100", 0.8),
    )
]


def test_figures_are_drawn_of_two_trials_or_more(tmp_path: Path) -> None:
    draw_sweep(tmp_path, ROWS[:1])
    draw_sweep(tmp_path, [({}, 0.5), ({}, 0.6)])
    assert list(tmp_path.iterdir()) == []
    style = dict(mpl.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_sweep(tmp_path, ROWS)
    assert {path.name for path in tmp_path.iterdir()} == {"parallel_coordinates.png", "importance.png"}
    assert {key: value for key, value in mpl.rcParams.items() if style[key] != value and key != "backend"} == {}


@pytest.mark.parametrize("rows", [ROWS[:2], [({"loss": "dice"}, 0.5), ({"loss": "bce"}, 0.5)]], ids=["two", "equal"])
def test_few_or_equal_trials_are_drawn(tmp_path: Path, rows: list[figures.Row]) -> None:
    draw_sweep(tmp_path, rows)
    assert len(list(tmp_path.iterdir())) == 2


def test_numbers_have_an_axis_and_other_values_are_categories() -> None:
    assert figures._distribution(["1e-4", "1e-2"]) == FloatDistribution(1e-4, 1e-2, log=True)
    assert figures._distribution(["4", "16", "8"]) == FloatDistribution(4, 16)
    assert figures._distribution(["null", "50"]) == CategoricalDistribution(["50", "null"])
