"""report.html: one self-contained page with text, plots and pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import yaml
from markupsafe import Markup

from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.reporting.comparison.unseen_groups import UnseenGroups
from prostate_seg.reporting.evaluation.stress import TOLERATED_DROP, stress_figure
from prostate_seg.reporting.evaluation.tables import METRIC_LABELS, by_region, zones_of
from prostate_seg.reporting.evaluation.trust import bounds
from prostate_seg.reporting.figures import plots
from prostate_seg.reporting.figures.plots import READERS_DICE, READERS_OF_REGIONS
from prostate_seg.reporting.pages.report_tables import ReportData, failures_of, limits_of_agreement
from prostate_seg.reporting.pages.templates import render_html
from prostate_seg.segmentation.calibration import NEAR_SURFACE_MM
from prostate_seg.segmentation.statistics import FAILURE_DICE

THIRDS = {"dice": "whole gland", "dice_apex": "apex", "dice_mid": "mid-gland", "dice_base": "base"}
"""The gland and its thirds that are compared with human readers."""

MAX_ROWS = 200
"""Rows of a list of cases on the page; the CSV files have all."""

CORE_PACKAGES = ("torch", "monai", "numpy", "scipy", "pandas", "SimpleITK", "mlflow", "dvc")
"""Packages whose versions are shown at once; the others are in the folded list."""


def render_report(
    data: ReportData,
    *,
    tables: Mapping[str, pd.DataFrame],
    gallery: Sequence[Mapping[str, Any]],
    unseen: UnseenGroups | None = None,
) -> str:
    """Return the page, with the tables of `report_tables.all_tables`, and the results of unseen groups if there are some."""
    trust, quality = data.trust, data.reference_quality
    packages = [data.records[stage]["packages"] for stage in ("evaluate", "train") if stage in data.records]
    return render_html(
        "report.html.j2",
        data=data,
        metric_labels=METRIC_LABELS,
        failure_dice=FAILURE_DICE,
        limits=limits_of_agreement(data.cases["volume_difference_ml"]),
        subgroups={
            name if region == WHOLE_GLAND else f"{name}, {region}": rows.to_dict("records")
            for region, table in by_region(tables["subgroups"]).items()
            for name, rows in table.groupby("attribute", sort=False)
        },
        anatomy=anatomy(data),
        unseen=unseen,
        tolerated_drop=TOLERATED_DROP,
        bounds=None if trust is None or trust.cases["dice_lower_bound"].isna().all() else bounds(trust.cases),
        thirds=[(label, data.summary["pooled"][name], READERS_DICE.get(name)) for name, label in THIRDS.items()],
        plots={name: Markup(svg) for name, svg in page_plots(data, tables).items()},
        gallery=gallery,
        settings_text=yaml.safe_dump(dict(data.settings), sort_keys=False, allow_unicode=True),
        packages=packages[0] if packages else {},
        core_packages=CORE_PACKAGES,
        max_rows=MAX_ROWS,
        near_surface_mm=NEAR_SURFACE_MM,
        quality=[] if quality is None else quality[quality["findings"] != ""].to_dict("records"),
    )


def page_plots(data: ReportData, tables: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """Return the plots of the page as SVG by name."""
    figures = {f"box_{name}": plots.box_figure(data.cases, name) for name in plots.PLOTTED_METRICS}
    limits_ml = limits_of_agreement(data.cases["volume_difference_ml"])
    figures["bland_altman"] = plots.bland_altman_figure(
        by_region(tables["bland_altman"])[WHOLE_GLAND], limits_ml=limits_ml
    )
    if data.zones:
        figures["regions"] = plots.regions_figure(data.regions)
    figures["dice_along_gland"] = plots.along_gland_figure(tables["dice_along_gland"])
    curves = tables["learning_curves"]
    if not curves.empty:
        figures["train_loss"] = plots.curves_figure(curves, "train_loss", label="training loss", kept_epochs={})
        figures["val_dice"] = plots.curves_figure(curves, "val_dice", label="val Dice", kept_epochs=data.kept_epochs)
    if data.trust is not None:
        figures["reliability"] = plots.reliability_figure(by_region(tables["reliability"])[WHOLE_GLAND])
        if tables["expected_dice"]["dice_lower_bound"].notna().any():
            figures["expected_dice"] = plots.expected_dice_figure(tables["expected_dice"])
            figures["risk_coverage"] = plots.risk_coverage_figure(tables["risk_coverage"])
    if data.stress_curves is not None:
        figures["stress"] = stress_figure(data.stress_curves)
    return {name: plots.to_svg(figure, name=name) for name, figure in figures.items()}


def anatomy(data: ReportData) -> list[dict[str, Any]]:
    """Return name, pooled results, failed cases and the Dice of human readers of each region; empty without zones."""
    pooled = {WHOLE_GLAND: data.summary["pooled"], **zones_of(data.summary)}
    return [
        {
            "name": region.replace("_", " "),
            "pooled": pooled[region],
            "failed": failures_of(cases)["case_id"].tolist(),
            "readers": READERS_OF_REGIONS.get(region),
        }
        for region, cases in (data.regions.items() if data.zones else ())
    ]
