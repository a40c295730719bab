"""Results of the stress test: Dice against the strength of each perturbation, a summary, lines for a terminal and a figure.

A drop is the Dice of a case without a perturbation minus its Dice with it, so that cases which cannot have every strength are
compared with themselves.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from prostate_seg.common.errors import InputError
from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.reporting.figures.plots import MARKERS, SERIES
from prostate_seg.segmentation.statistics import mean_interval

NONE = "none"
"""Name in the column `perturbation` of the unchanged images."""
TOLERATED_DROP = 0.05
"""Mean drop in Dice whose strength is reported."""
MODERATE = 1
"""Level of the strength that promotion rules refer to: the second of four."""
NUM_COLUMNS = 4


def stress_curves(cases: pd.DataFrame, *, num_bootstrap: int, seed: int) -> pd.DataFrame:
    """Return curves.csv from cases.csv: a row per region, perturbation and strength, from weak to strong.

    Columns: region, perturbation, unit, level, strength, num_cases, dice (mean), drop (mean) and its 95% interval over
    patients, ci95_low and ci95_high.

    Raises:
        InputError: If no case can have any of the perturbations.
    """
    is_unchanged = cases["perturbation"] == NONE
    if is_unchanged.all():
        raise InputError(
            "stress.perturbations: must have one that some case allows, and none of "
            f"{cases['case_id'].nunique()} cases allows these: rotation needs square pixels, slice_thickness and "
            "pixel_size finer voxels, field_of_view a larger image\nChoose others, or null for all."
        )
    before = cases[is_unchanged].set_index(["region", "case_id"])["dice"].rename("before")
    paired = cases[~is_unchanged].join(before, on=["region", "case_id"])
    paired["drop"] = paired["before"] - paired["dice"]
    for column in ("perturbation", "region"):  # categories are grouped in the order of their appearance
        paired[column] = pd.Categorical(paired[column], paired[column].unique())
    rows = []
    for (name, region, level), group in paired.groupby(["perturbation", "region", "level"], observed=True):
        drops, patients = group["drop"].to_numpy(), group["patient_id"].tolist()
        low, high = mean_interval(drops, patients=patients, num_bootstrap=num_bootstrap, seed=seed)
        row = {"region": region, "perturbation": name, "unit": group["unit"].iloc[0], "level": level}
        row |= {"strength": group["strength"].iloc[0], "num_cases": len(group), "dice": group["dice"].mean()}
        rows.append(row | {"drop": drops.mean(), "ci95_low": low, "ci95_high": high})
    return pd.DataFrame(rows)


def stress_summary(curves: pd.DataFrame) -> dict[str, Any]:
    """Return stress.json without the networks: per region and perturbation, `summary_of` its curve."""
    regions: dict[str, dict[str, Any]] = {}
    for (region, name), curve in curves.groupby(["region", "perturbation"], sort=False):
        regions.setdefault(str(region), {})[str(name)] = summary_of(curve)
    return {"num_cases": int(curves["num_cases"].max()), "regions": regions}


def summary_of(curve: pd.DataFrame) -> dict[str, Any]:
    """Return unit, strengths, mean drops, the moderate strength with its drop, and the strength of `TOLERATED_DROP`.

    The last two are None where the cases cannot have the strength, or the mean Dice does not fall that much.
    """
    strengths, drops = curve["strength"].tolist(), curve["drop"].tolist()
    moderate = dict(zip(curve["level"].tolist(), zip(strengths, drops, strict=True), strict=True)).get(MODERATE)
    return {
        "unit": str(curve["unit"].iloc[0]),
        "strengths": strengths,
        "drops": drops,
        "moderate": None if moderate is None else {"strength": moderate[0], "drop": moderate[1]},
        "tolerated_strength": strength_of_drop(strengths, drops, drop=TOLERATED_DROP),
    }


def strength_of_drop(strengths: Sequence[float], drops: Sequence[float], *, drop: float) -> float | None:
    """Return the strength at which a drop is first reached, interpolated linearly; None if it is not.

    Below the first strength, the first one is returned.
    """
    first = next((number for number, reached in enumerate(drops) if reached >= drop), None)
    if not first:  # at no strength, or at the weakest
        return None if first is None else strengths[0]
    fraction = (drop - drops[first - 1]) / (drops[first] - drops[first - 1])
    return float(strengths[first - 1] + fraction * (strengths[first] - strengths[first - 1]))


def stress_lines(curves: pd.DataFrame) -> list[str]:
    """Return the curves of the whole gland as lines for a terminal: the drop in Dice by strength."""
    lines = [f"{'drop in mean Dice':<18}{'unit':<17}{'strength: drop':<52}{'-0.05 at':>9}"]
    for name, curve in curves[curves["region"] == WHOLE_GLAND].groupby("perturbation", sort=False):
        summary = summary_of(curve)
        drops = zip(summary["strengths"], summary["drops"], strict=True)
        shown = "  ".join(f"{strength:g}: {drop:+.3f}" for strength, drop in drops)
        tolerated = summary["tolerated_strength"]
        lines.append(f"{name:<18}{summary['unit']:<17}{shown:<52}{'-' if tolerated is None else f'{tolerated:.3g}':>9}")
    return lines


def stress_figure(curves: pd.DataFrame) -> Figure:
    """Draw a panel per perturbation: mean drop in Dice against the strength, with 95% intervals, a line per region."""
    names = list(dict.fromkeys(curves["perturbation"]))
    num_rows = -(-len(names) // NUM_COLUMNS)
    figure = Figure(figsize=(3.1 * NUM_COLUMNS, 2.6 * num_rows), dpi=110, layout="constrained")
    panels = figure.subplots(num_rows, NUM_COLUMNS, squeeze=False, sharey=True).ravel()
    for axes, name in zip(panels, names, strict=False):
        of_panel = curves[curves["perturbation"] == name]
        for number, (region, curve) in enumerate(of_panel.groupby("region", sort=False)):
            x = curve["level"]
            errors = np.abs(curve[["ci95_low", "ci95_high"]].to_numpy(dtype=float).T - curve["drop"].to_numpy())
            style = {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number % len(MARKERS)]}
            axes.errorbar(x, -curve["drop"], yerr=errors[::-1], capsize=2, label=str(region), **style)
        axes.axhline(-TOLERATED_DROP, color="black", linewidth=0.8, linestyle=":")
        strengths = of_panel.groupby("level")["strength"].first()
        axes.set_xticks(strengths.index, [f"{strength:g}" for strength in strengths])
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.set_xlabel(of_panel["unit"].iloc[0], fontsize=9)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes in panels[::NUM_COLUMNS]:
        axes.set_ylabel("change in Dice")
    if curves["region"].nunique() > 1:
        panels[0].legend(fontsize=8, frameon=False)
    return figure


def worst_moderate(summary: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the perturbation with the largest drop of the whole gland at its moderate strength, and the drop, if any."""
    moderate = {name: one["moderate"] for name, one in summary["regions"][WHOLE_GLAND].items()}
    drops = {name: float(one["drop"]) for name, one in moderate.items() if one is not None}
    return max(drops.items(), key=lambda one: one[1], default=None)
