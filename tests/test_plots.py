"""Box plots per fold and learning curves as PNG files; the SVG plots of the page are in test_report."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from prostate_seg.reporting.figures.plots import case_metrics_figure, history_figure, save_png

pytestmark = pytest.mark.filterwarnings("error")


def case_table(num_cases: int) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    return pd.DataFrame(
        {
            "fold": [str(number % 3) for number in range(num_cases)],
            "dice": rng.uniform(0.7, 0.95, num_cases),
            "hd95_mm": rng.gamma(3, 2, num_cases),
            "volume_difference_percent": rng.normal(0, 12, num_cases),
        }
    )


def test_metric_plot_has_a_panel_per_metric_and_a_group_per_fold(tmp_path: Path) -> None:
    figure = case_metrics_figure(case_table(10))
    assert [ax.get_title() for ax in figure.axes] == ["Dice", "HD95 (mm)", "Volume difference (%)"]
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ticks == ["0\nn=4", "1\nn=3", "2\nn=3"]
    save_png(tmp_path / "cases.png", figure)
    assert imread(tmp_path / "cases.png").std() > 0.05


def test_a_missed_gland_and_a_missing_value_are_within_the_plot(tmp_path: Path) -> None:
    table = case_table(9)
    table.loc[0, ["dice", "hd95_mm"]] = [0.0, 277.4]
    table.loc[0, "volume_difference_percent"] = np.nan
    figure = case_metrics_figure(table)
    low, high = figure.axes[1].get_ylim()
    assert low < 0.0 < 277.4 < high
    assert figure.axes[2].get_xticklabels()[0].get_text() == "0\nn=2"


def test_one_case_is_plotted(tmp_path: Path) -> None:
    save_png(tmp_path / "cases.png", case_metrics_figure(case_table(1)))
    assert (tmp_path / "cases.png").exists()


def test_a_fold_whose_values_are_all_missing_is_plotted(tmp_path: Path) -> None:
    table = case_table(6)
    table.loc[table["fold"] == "1", "volume_difference_percent"] = np.nan
    save_png(tmp_path / "cases.png", case_metrics_figure(table))
    assert (tmp_path / "cases.png").exists()


@pytest.mark.parametrize("num_epochs", [1, 3, 200])
def test_learning_curves_are_drawn_for_one_epoch_and_for_many(tmp_path: Path, num_epochs: int) -> None:
    epochs = list(range(1, num_epochs + 1))
    dices = [epoch / (epoch + 3) for epoch in epochs]
    table = pd.DataFrame({"epoch": epochs, "train/loss": [1 - d for d in dices], "val/dice": dices})
    save_png(tmp_path / "h.png", history_figure(table, kept=num_epochs, title="Fold 0, é"))
    picture = imread(tmp_path / "h.png")
    assert picture.shape[1] > 500
    assert picture.std() > 0.05
