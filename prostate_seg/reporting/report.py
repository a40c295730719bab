"""report.html from the facts: one file that holds everything it shows."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import yaml
from markupsafe import Markup

from prostate_seg.reporting.analysis import READERS_DICE, limits_of_agreement
from prostate_seg.reporting.facts import Facts
from prostate_seg.reporting.gallery import GalleryCase
from prostate_seg.reporting.pages import render_html
from prostate_seg.segmentation.statistics import FAILURE_DICE

METRIC_NAMES = {
    "dice": ("Dice", 3),
    "iou": ("IoU", 3),
    "hd95_mm": ("HD95, mm", 1),
    "assd_mm": ("ASSD, mm", 2),
    "nsd_2mm": ("NSD at 2 mm", 3),
    "volume_difference_ml": ("Volume difference, mL", 1),
    "volume_difference_percent": ("Volume difference, %", 1),
    "dice_apex": ("Dice, apex", 3),
    "dice_mid": ("Dice, mid-gland", 3),
    "dice_base": ("Dice, base", 3),
}
"""Words and digits of each metric."""

ANATOMY = {"dice": "whole gland", "dice_apex": "apex", "dice_mid": "mid-gland", "dice_base": "base"}
"""Parts of the gland that are set beside human readers."""

MOST_LISTED = 200
"""Rows of a list of cases that are written out; the files beside the report have all."""

CORE_PACKAGES = ("torch", "monai", "numpy", "scipy", "pandas", "SimpleITK", "mlflow", "dvc")
"""Packages named in short; the others stand in the folded list."""


def render_report(
    facts: Facts,
    *,
    tables: Mapping[str, pd.DataFrame],
    plots: Mapping[str, str],
    gallery: Sequence[GalleryCase],
) -> str:
    """Return the page.

    Args:
        facts: What is known.
        tables: Those of `analysis.all_tables`.
        plots: Those of `plots.all_plots`.
        gallery: Single cases.
    """
    return render_html(
        "report.html.j2",
        facts=facts,
        pooled=facts.pooled,
        metric_names=METRIC_NAMES,
        failure_dice=FAILURE_DICE,
        leak_gate=facts.summary.get("leak_gate"),
        limits=limits_of_agreement(facts.cases["volume_difference_ml"]),
        subgroups=_forest(tables["subgroups"]),
        along=tables["dice_along_gland"],
        anatomy=[(words, facts.pooled[name], READERS_DICE.get(name)) for name, words in ANATOMY.items()],
        plots={name: Markup(svg) for name, svg in plots.items()},
        gallery=gallery,
        settings_text=yaml.safe_dump(_plain(facts.settings), sort_keys=False, allow_unicode=True),
        packages=_packages(facts),
        core_packages=CORE_PACKAGES,
        most_listed=MOST_LISTED,
        quality=_quality(facts.reference_quality),
    )


def _forest(table: pd.DataFrame) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the groups of each attribute; places of mean and interval are in percent of the Dice axis."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_dict("records"):
        percent = {
            f"{key}_percent": 100 * float(row[key]) for key in ("mean", "ci95_low", "ci95_high") if pd.notna(row[key])
        }
        rows.setdefault(row["attribute"], []).append({str(key): value for key, value in row.items()} | percent)
    return list(rows.items())


def _packages(facts: Facts) -> Mapping[str, str]:
    """Return the package versions of the newest stage that is known."""
    known = [facts.entries[stage]["packages"] for stage in ("evaluate", "train") if stage in facts.entries]
    return known[0] if known else {}


def _quality(table: pd.DataFrame | None) -> list[dict[str, str]]:
    """Return the rows of the reference quality table that have a finding."""
    if table is None or "findings" not in table:
        return []
    return [
        {str(key): str(value) for key, value in row.items()}
        for row in table[table["findings"] != ""].to_dict("records")
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
