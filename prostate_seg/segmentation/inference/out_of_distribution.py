"""Out-of-distribution check: a few properties of a study against their ranges over the training studies."""

import math
from collections.abc import Iterable, Mapping, Sequence

from prostate_seg.segmentation.inference.network_input import Intensity

TrainingRanges = Mapping[str, tuple[float, float]]
"""Lowest and highest value over the training studies, by property."""
TOLERATED_FACTOR = 1.25
"""A length, count or volume may be smaller or larger than in training by this factor."""
TOLERATED_GREY = 0.1
"""`mean_grey` may lie outside its training range by this difference."""
FORMATS = {
    "spacing_y_mm": "pixel spacing {:.2f} mm",
    "spacing_z_mm": "slice spacing {:.2f} mm",
    "num_slices": "{:.0f} slices",
    "mean_grey": "mean grey {:.2f}",
    "gland_volume_ml": "gland of {:.1f} mL",
}
"""The checked properties in order, as text."""


def mean_grey(intensity: Intensity) -> float:
    """Return the mean intensity relative to the range from darkest to brightest, 0 to 1, independent of the scan's units."""
    span = intensity.high - intensity.low
    return (intensity.mean - intensity.low) / span if span > 0 else 0.0


def property_ranges(studies: Iterable[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Return the range of each property over the studies, rounded to six digits; empty without a study."""
    rows = list(studies)
    return {
        name: (float(f"{min(row[name] for row in rows):.6g}"), float(f"{max(row[name] for row in rows):.6g}"))
        for name in (FORMATS if rows else ())
    }


def merged_ranges(every: Sequence[TrainingRanges]) -> dict[str, tuple[float, float]]:
    """Return the ranges over the training studies of several networks, of the properties that all of them have."""
    shared = [name for name in every[0] if all(name in ranges for ranges in every)]
    return {name: (min(one[name][0] for one in every), max(one[name][1] for one in every)) for name in shared}


def distance_from_training(study: Mapping[str, float], *, ranges: TrainingRanges) -> float:
    """Return how far the properties of a study lie outside their training ranges, summed; 1 is what is tolerated of one."""
    distance = 0.0
    for name, (low, high) in ranges.items():
        if name not in study:
            continue
        if name == "mean_grey":
            distance += max(0.0, low - study[name], study[name] - high) / TOLERATED_GREY
        else:
            distance += max(0.0, math.log(low / study[name]), math.log(study[name] / high)) / math.log(TOLERATED_FACTOR)
    return distance


def out_of_distribution(study: Mapping[str, float], *, ranges: TrainingRanges) -> list[str]:
    """Return a sentence for each property of a study that lies well outside its training range."""
    sentences = []
    for name, (low, high) in ranges.items():
        if name == "mean_grey":
            lowest, highest = low - TOLERATED_GREY, high + TOLERATED_GREY
        else:
            lowest, highest = low / TOLERATED_FACTOR, high * TOLERATED_FACTOR
        if name in study and not lowest <= study[name] <= highest:
            sentences.append(f"{FORMATS[name].format(study[name])}, in training {low:.3g} to {high:.3g}")
    return sentences
