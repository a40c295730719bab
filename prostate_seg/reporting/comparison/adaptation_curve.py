"""Adaptation curve: test Dice against the number of training cases, from the trials of a sweep over fold.max_train_cases.

A trial tests every case once. Trials of equal settings with different seeds are repeats. Intervals are 95% percentile intervals
of a bootstrap that draws patients and repeats independently (Owen 2007, The pigeonhole bootstrap); with one repeat, patients.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from prostate_seg.common.errors import InputError
from prostate_seg.common.seeds import Stream, seed_sequence
from prostate_seg.common.tables import table_lines
from prostate_seg.reporting.comparison.results import Repeats, require_same_cases
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
DRAWN = "drawn"
"""Column with the mean of each bootstrap sample, in no file; the samples of all points draw the same patients."""


def adaptation_curve(sides: Sequence[Repeats], *, num_bootstrap: int, seed: int) -> pd.DataFrame:
    """Return a point per setting, by curve, random weights first, then by number of training cases.

    Columns: curve, the settings other than the number of training cases; num_cases, num_repeats, num_patients; mean, ci95_low
    and ci95_high of Dice; and `DRAWN`.

    Raises:
        InputError: If the trials have other cases, images, patients or references, or there are fewer than two patients.
    """
    patients = sides[0].table["patient_id"]
    for results in (results for side in sides for results in side.results):
        require_same_cases(sides[0].results[0], results)
    if patients.nunique() < 2:
        raise InputError(
            "the adaptation curve needs test cases of two patients or more; compare an evaluation of all folds"
        )
    points = [_point(side, patients=patients, num_bootstrap=num_bootstrap, seed=seed) for side in sides]
    points.sort(key=lambda point: (point["curve"] != SCRATCH, point["curve"], point["num_cases"]))
    return pd.DataFrame(points)


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


def _point(side: Repeats, *, patients: pd.Series, num_bootstrap: int, seed: int) -> dict[str, Any]:
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
    return {
        "curve": _curve_name(side.settings),
        "num_cases": int(side.settings[NUM_CASES]),
        "num_repeats": len(dice),
        "num_patients": len(ids),
        "mean": float(dice.mean()),
        "ci95_low": float(low),
        "ci95_high": float(high),
        DRAWN: drawn,
    }


def curve_lines(points: pd.DataFrame) -> list[str]:
    """Return the table of the points for a terminal, then a sentence per curve on what training cases gain."""
    heads = ["initial weights", "cases", "repeats", "Dice", "95% CI over patients and repeats"]
    intervals = [f"{low:.3f} to {high:.3f}" for low, high in zip(points["ci95_low"], points["ci95_high"], strict=True)]
    shown = points.assign(interval=intervals, mean=points["mean"].map("{:.3f}".format)).astype(str)
    rows = shown[["curve", "num_cases", "num_repeats", "mean", "interval"]].to_numpy().tolist()
    curves = _by_curve(points)
    gains = [_gain(name, curve) for name, curve in curves.items() if len(curve) > 1]
    scratch = curves.pop(SCRATCH, None)
    savings = [] if scratch is None else [_saving(name, curve.iloc[0], scratch) for name, curve in curves.items()]
    is_repeated = points["num_repeats"].min() > 1
    notes = [] if is_repeated else ["note: one repeat: the interval does not contain the variance between trainings"]
    return [*table_lines(heads, rows, numbers=heads[1:4]), *gains, *savings, *notes]


def _by_curve(points: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {str(name): curve for name, curve in points.groupby("curve", sort=False)}


def _gain(name: str, curve: pd.DataFrame) -> str:
    """Return the difference in Dice between the most and the fewest training cases of a curve."""
    fewest, most = curve.iloc[0], curve.iloc[-1]
    low, high = np.percentile(most[DRAWN] - fewest[DRAWN], CI_PERCENTILES)
    return (
        f"{name}: {most['num_cases']} training cases instead of {fewest['num_cases']} change Dice by "
        f"{most['mean'] - fewest['mean']:+.3f} (95% CI {low:+.3f} to {high:+.3f})"
    )


def _saving(name: str, fewest: pd.Series, scratch: pd.DataFrame) -> str:
    """Return how many training cases random weights need for the Dice of the fewest cases with initial weights."""
    enough = scratch["num_cases"][scratch["mean"] >= fewest["mean"]]
    needed = f"not even with {scratch['num_cases'].iloc[-1]}" if enough.empty else f"with {enough.iloc[0]}"
    return f"{name}: Dice {fewest['mean']:.3f} with training cases: {fewest['num_cases']}; {SCRATCH} reach it {needed}"


def curve_figure(points: pd.DataFrame) -> Figure:
    """Draw Dice against the number of training cases, one line with intervals per curve."""
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    styles = zip(cycle(SERIES), cycle(MARKERS), cycle(STYLES), strict=False)
    for (colour, marker, style), (name, curve) in zip(styles, _by_curve(points).items(), strict=False):
        x = curve["num_cases"]
        axes.fill_between(x, curve["ci95_low"], curve["ci95_high"], color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, curve["mean"], color=colour, marker=marker, linestyle=style, label=printable(name))
    sizes, repeats = sorted(set(points["num_cases"])), points["num_repeats"]
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    shown = "-".join(map(str, sorted({repeats.min(), repeats.max()})))
    axes.set(xlabel="training cases", ylabel="mean test Dice, whole gland")
    axes.set_title(
        f"{points['num_patients'].iloc[0]} test patients, repeats: {shown}; bands: 95% interval over patients and repeats",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
