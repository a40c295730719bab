"""Adaptation curve: test Dice against the number of training cases, from the trials of a sweep over fold.max_train_cases.

A trial tests every case once. Trials of equal settings with different seeds are repeats. Intervals are 95% percentile intervals
of a bootstrap that draws patients and repeats independently (Owen 2007, The pigeonhole bootstrap); with one repeat, patients.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby
from operator import attrgetter
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from prostate_seg.common.errors import InputError, listed
from prostate_seg.common.seeds import Stream, seed_sequence
from prostate_seg.reporting.comparison.repeats import Repeats
from prostate_seg.reporting.figures.overlays import printable
from prostate_seg.reporting.figures.plots import MARKERS, SERIES
from prostate_seg.segmentation.statistics import CI_PERCENTILES

NUM_CASES = "fold.max_train_cases"
"""Setting on the horizontal axis."""
INIT = "train.init"
SCRATCH = "random weights"
"""Curve of the trials without initial weights."""
STYLES = ("-", "--", "-.", ":")
"""Line style of each curve, beside its colour and marker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """Trials of one curve and one number of training cases."""

    curve: str
    """Settings of the curve, such as the initial weights."""
    num_cases: int
    num_repeats: int
    num_patients: int
    mean: float
    ci95_low: float
    ci95_high: float
    drawn: np.ndarray
    """Mean of each bootstrap sample; the samples of all points draw the same patients."""

    def as_row(self) -> dict[str, Any]:
        """Return a row of adaptation_curve.csv."""
        names = ("curve", "num_cases", "num_repeats", "num_patients", "mean", "ci95_low", "ci95_high")
        return {name: getattr(self, name) for name in names}


def adaptation_curve(sides: Sequence[Repeats], *, num_bootstrap: int, seed: int) -> list[CurvePoint]:
    """Return a point per setting, by curve, random weights first, then by number of training cases.

    Raises:
        InputError: If the trials were not tested on the same cases, or there are fewer than two patients.
    """
    patients = sides[0].results[0].table["patient_id"]
    for results in (results for side in sides for results in side.results):
        if differing := sorted(patients.index.symmetric_difference(results.table.index)):
            raise InputError(
                f"the trials of the sweep were not tested on the same cases: {listed(differing, most=10)}\n"
                "Train and evaluate all folds in each trial."
            )
    if patients.nunique() < 2:
        raise InputError(
            "the adaptation curve needs test cases of two patients or more; compare an evaluation of all folds"
        )
    points = [_point(side, patients=patients, num_bootstrap=num_bootstrap, seed=seed) for side in sides]
    return sorted(points, key=lambda point: (point.curve != SCRATCH, point.curve, point.num_cases))


def _curve_name(settings: Mapping[str, str]) -> str:
    """Return the settings of a trial other than the number of training cases, in words."""
    others = {name: value for name, value in settings.items() if name not in (NUM_CASES, INIT)}
    init = settings.get(INIT, "null")
    names = [SCRATCH if init in ("null", "") else f"from {_plain(init)}"]
    return ", ".join([*names, *(f"{name}={_plain(value)}" for name, value in sorted(others.items()))])


def _plain(value: str) -> str:
    """Return a text value without the quotes of JSON."""
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _point(side: Repeats, *, patients: pd.Series, num_bootstrap: int, seed: int) -> CurvePoint:
    """Return the mean of the repeats over cases, and its bootstrap."""
    dice = np.stack([results.table.loc[patients.index, "dice"].to_numpy() for results in side.results])
    ids, of_case = np.unique(patients.to_numpy(dtype=object), return_inverse=True)
    is_of = np.eye(len(ids))[of_case]
    sums, counts = dice @ is_of, is_of.sum(axis=0)
    rng = np.random.default_rng(seed_sequence(Stream.bootstrap, seed=seed))
    # Patients first: points with other numbers of repeats draw the same ones.
    weights = rng.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size=num_bootstrap)
    repeats = rng.multinomial(len(dice), np.full(len(dice), 1 / len(dice)), size=num_bootstrap)
    drawn = np.einsum("br,rp,bp->b", repeats, sums, weights) / (len(dice) * (weights @ counts))
    low, high = np.percentile(drawn, CI_PERCENTILES)
    return CurvePoint(
        curve=_curve_name(side.settings),
        num_cases=int(side.settings[NUM_CASES]),
        num_repeats=len(dice),
        num_patients=len(ids),
        mean=float(dice.mean()),
        ci95_low=float(low),
        ci95_high=float(high),
        drawn=drawn,
    )


def curve_lines(points: Sequence[CurvePoint]) -> list[str]:
    """Return the table of the points for a terminal, then a sentence per curve on what training cases gain."""
    width = max(len("initial weights"), *(len(point.curve) for point in points))
    heading = f"{'initial weights':<{width}}  cases  repeats   Dice  95% CI over patients and repeats"
    rows = [
        f"{point.curve:<{width}}  {point.num_cases:5d}  {point.num_repeats:7d}  {point.mean:.3f}  "
        f"{point.ci95_low:.3f} to {point.ci95_high:.3f}"
        for point in points
    ]
    curves = _by_curve(points)
    gains = [_gain(one) for one in curves.values() if len(one) > 1]
    savings = [
        _saving(one[0], curves[SCRATCH]) for name, one in curves.items() if SCRATCH in curves and name != SCRATCH
    ]
    is_repeated = min(point.num_repeats for point in points) > 1
    notes = [] if is_repeated else ["note: one repeat: the interval does not contain the variance between trainings"]
    return [heading, *rows, *gains, *savings, *notes]


def _by_curve(points: Sequence[CurvePoint]) -> dict[str, list[CurvePoint]]:
    """Return the points of each curve by number of training cases."""
    return {name: list(curve) for name, curve in groupby(points, key=attrgetter("curve"))}


def _gain(curve: Sequence[CurvePoint]) -> str:
    """Return the difference in Dice between the most and the fewest training cases of a curve."""
    fewest, most = curve[0], curve[-1]
    low, high = np.percentile(most.drawn - fewest.drawn, CI_PERCENTILES)
    return (
        f"{fewest.curve}: {most.num_cases} training cases instead of {fewest.num_cases} change Dice by "
        f"{most.mean - fewest.mean:+.3f} (95% CI {low:+.3f} to {high:+.3f})"
    )


def _saving(fewest: CurvePoint, scratch: Sequence[CurvePoint]) -> str:
    """Return how many training cases random weights need for the Dice of the fewest cases with initial weights."""
    enough = [point.num_cases for point in scratch if point.mean >= fewest.mean]
    needed = f"with {enough[0]}" if enough else f"not even with {scratch[-1].num_cases}"
    return (
        f"{fewest.curve}: Dice {fewest.mean:.3f} with training cases: {fewest.num_cases}; {SCRATCH} reach it {needed}"
    )


def curve_figure(points: Sequence[CurvePoint]) -> Figure:
    """Draw Dice against the number of training cases, one line with intervals per curve."""
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    styles = zip(cycle(SERIES), cycle(MARKERS), cycle(STYLES), strict=False)
    for (colour, marker, style), (name, curve) in zip(styles, _by_curve(points).items(), strict=False):
        x, mean = [point.num_cases for point in curve], [point.mean for point in curve]
        low, high = ([getattr(point, end) for point in curve] for end in ("ci95_low", "ci95_high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, mean, color=colour, marker=marker, linestyle=style, label=printable(name))
    sizes = sorted({point.num_cases for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    repeats, patients = {point.num_repeats for point in points}, points[0].num_patients
    shown = "-".join(map(str, sorted({min(repeats), max(repeats)})))
    axes.set(xlabel="training cases", ylabel="mean test Dice, whole gland")
    axes.set_title(
        f"{patients} test patients, repeats: {shown}; bands: 95% interval over patients and repeats", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
