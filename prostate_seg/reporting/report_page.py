"""report.html: one self-contained page with text, plots and pictures."""

from collections.abc import Mapping, Sequence

import pandas as pd
import yaml
from markupsafe import Markup

from prostate_seg.reporting.evaluation_tables import METRIC_LABELS
from prostate_seg.reporting.gallery import GalleryCase
from prostate_seg.reporting.plots import READERS_DICE, page_plots
from prostate_seg.reporting.report_tables import ReportData, limits_of_agreement
from prostate_seg.reporting.templates import render_html
from prostate_seg.segmentation.statistics import FAILURE_DICE

REGIONS = {"dice": "whole gland", "dice_apex": "apex", "dice_mid": "mid-gland", "dice_base": "base"}
"""Regions of the gland that are compared with human readers."""

MAX_ROWS = 200
"""Rows of a list of cases on the page; the CSV files have all."""

CORE_PACKAGES = ("torch", "monai", "numpy", "scipy", "pandas", "SimpleITK", "mlflow", "dvc")
"""Packages whose versions are shown at once; the others are in the folded list."""


def render_report(data: ReportData, *, tables: Mapping[str, pd.DataFrame], gallery: Sequence[GalleryCase]) -> str:
    """Return the page, with the tables of `report_tables.all_tables`."""
    limits_ml = limits_of_agreement(data.cases["volume_difference_ml"])
    plots = page_plots(data.cases, tables, limits_ml=limits_ml, kept_epochs=data.kept_epochs)
    quality = data.reference_quality
    packages = [data.records[stage]["packages"] for stage in ("evaluate", "train") if stage in data.records]
    pooled = data.summary["pooled"]
    return render_html(
        "report.html.j2",
        data=data,
        pooled=pooled,
        folds=data.summary["folds"],
        metric_labels=METRIC_LABELS,
        failure_dice=FAILURE_DICE,
        leak_gate=data.summary.get("leak_gate"),
        limits=limits_ml,
        subgroups={
            name: rows.to_dict("records") for name, rows in tables["subgroups"].groupby("attribute", sort=False)
        },
        regions=[(label, pooled[name], READERS_DICE.get(name)) for name, label in REGIONS.items()],
        plots={name: Markup(svg) for name, svg in plots.items()},
        gallery=gallery,
        settings_text=yaml.safe_dump(dict(data.settings), sort_keys=False, allow_unicode=True),
        packages=packages[0] if packages else {},
        core_packages=CORE_PACKAGES,
        max_rows=MAX_ROWS,
        quality=[] if quality is None else quality[quality["findings"] != ""].to_dict("records"),
    )
