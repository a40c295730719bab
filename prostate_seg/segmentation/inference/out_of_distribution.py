"""Whether a study is like those that a network was trained on, told by a few numbers and the range that each had there."""

from collections.abc import Iterable, Mapping

from prostate_seg.segmentation.inference.intensity import Intensity

Ranges = Mapping[str, tuple[float, float]]
"""Lowest and highest value among the training studies, by name of the number."""

TOLERATED_FACTOR = 1.25
"""A length, count or volume may be smaller or larger than all in training by this much."""

TOLERATED_GREY = 0.1
"""`mean_grey` may lie outside the training studies' range by this much."""

FORMATS = {
    "spacing_y_mm": "pixel spacing {:.2f} mm",
    "spacing_z_mm": "slice spacing {:.2f} mm",
    "num_slices": "{:.0f} slices",
    "mean_grey": "mean grey {:.2f}",
    "gland_volume_ml": "gland of {:.1f} mL",
}
"""The numbers that are looked at, in order, in words."""


def mean_grey(intensity: Intensity) -> float:
    """Return where between the darkest and the brightest grey the mean lies, 0 to 1, in whatever units the scan is."""
    span = intensity.high - intensity.low
    return (intensity.mean - intensity.low) / span if span > 0 else 0.0


def ranges_of(studies: Iterable[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Return the range of each number over the studies, rounded to six digits; empty without a study."""
    rows = list(studies)
    return {
        name: (float(f"{min(row[name] for row in rows):.6g}"), float(f"{max(row[name] for row in rows):.6g}"))
        for name in (FORMATS if rows else ())
    }


def unfamiliar(study: Mapping[str, float], *, ranges: Ranges) -> list[str]:
    """Return a sentence for each number of a study that lies well outside the range in training."""
    return [
        f"{FORMATS[name].format(study[name])}, in training {low:.3g} to {high:.3g}"
        for name, (low, high) in ranges.items()
        if name in study and not _is_near(name, study[name], low, high)
    ]


def _is_near(name: str, value: float, low: float, high: float) -> bool:
    if name == "mean_grey":
        return low - TOLERATED_GREY <= value <= high + TOLERATED_GREY
    return low / TOLERATED_FACTOR <= value <= high * TOLERATED_FACTOR
