"""Figures of a sweep by optuna.visualization: parallel coordinates of the trials, and the importance of each setting."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.visualization.matplotlib import plot_parallel_coordinate, plot_param_importances

from prostate_seg.tracking.sweeps import Row

LOG_SCALE_RATIO = 20.0
"""Positive numbers that span more than this ratio have a logarithmic axis."""


def draw_sweep(folder: Path, rows: Sequence[Row]) -> None:
    """Draw parallel_coordinates.png and importance.png of two trials or more; nothing for fewer."""
    if len(rows) < 2 or not rows[0][0]:
        return
    names = list(rows[0][0])
    distributions = {name: _distribution([settings[name] for settings, _ in rows]) for name in names}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")  # in memory: a grid has no study of its own
    for settings, objective in rows:
        params = {
            name: float(settings[name]) if isinstance(distribution, FloatDistribution) else settings[name]
            for name, distribution in distributions.items()
        }
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=objective))
    plots: dict[str, Callable[..., Any]] = {
        "parallel_coordinates.png": plot_parallel_coordinate,
        "importance.png": plot_param_importances,
    }
    plt.switch_backend("agg")  # opens no window
    with warnings.catch_warnings(), plt.rc_context():  # Optuna sets a style of its own
        warnings.simplefilter("ignore")  # the plots are experimental; importances of few trials are equal
        for name, plot in plots.items():
            axes = plot(study, target_name="objective")
            for lines in axes.collections:
                lines.set_cmap("viridis_r")  # Optuna's colour of the worst trial is white
            figure = axes.figure
            figure.set_size_inches(3 + 1.9 * len(names), 4.5)
            figure.savefig(folder / name, dpi=110, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)


def _distribution(values: Sequence[str]) -> BaseDistribution:
    """Return the range of numbers, or the set of other values."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return CategoricalDistribution(sorted(set(values)))
    low, high = min(numbers), max(numbers)
    return FloatDistribution(low, high, log=low > 0 and high / low > LOG_SCALE_RATIO)
