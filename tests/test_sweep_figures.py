"""How much a setting matters, by hand, and figures that are there."""

from pathlib import Path

import pytest

from prostate_seg.reporting.sweeps import draw_sweep, importance


def test_setting_that_decides_everything_has_importance_1_and_one_that_decides_nothing_0() -> None:
    rows = [
        ({"loss": loss, "seed": str(seed)}, {"dice": 0.9, "bce": 0.7}[loss])
        for loss in ("dice", "bce")
        for seed in (1, 2)
    ]
    assert importance(rows) == {"loss": pytest.approx(1.0), "seed": 0.0}


def test_importance_is_eta_squared_less_what_chance_gives() -> None:
    """Groups {1, 3} and {5, 7}: sum of squares 20, within 4; 1 - (4 / 2) / (20 / 3) = 0.7."""
    rows = [({"x": "a"}, 1.0), ({"x": "a"}, 3.0), ({"x": "b"}, 5.0), ({"x": "b"}, 7.0)]
    assert importance(rows) == {"x": pytest.approx(0.7)}


def test_numbers_are_cut_into_groups_of_equal_size() -> None:
    rows = [({"rate": str(10.0**-power)}, float(power // 3)) for power in range(12)]
    assert importance(rows) == {"rate": pytest.approx(1.0)}


def test_one_trial_a_value_tells_nothing() -> None:
    assert importance([({"x": "a"}, 1.0), ({"x": "b"}, 2.0)]) == {"x": 0.0}


def test_figures_are_drawn_of_two_trials_or_more(tmp_path: Path) -> None:
    draw_sweep(tmp_path, [({"loss": "dice", "rate": "1e-4"}, 0.5)])
    draw_sweep(tmp_path, [({}, 0.5), ({}, 0.6)])
    assert list(tmp_path.iterdir()) == []
    draw_sweep(tmp_path, [({"loss": "dice", "rate": "1e-4"}, 0.5), ({"loss": "bce", "rate": "1e-2"}, 0.5)])
    assert {path.name for path in tmp_path.iterdir()} == {"parallel_coordinates.png", "importance.png"}
