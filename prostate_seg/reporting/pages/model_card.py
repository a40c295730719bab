"""model_card.md: the fields of Hugging Face's model cards and those that the CLAIM checklist requires of a study.

What is not recorded is marked for the user to fill in.
"""

from typing import Any

import pandas as pd
import yaml
from markupsafe import Markup

from prostate_seg.data.cases import REFERENCE_BY
from prostate_seg.data.dataset import OWN_COLUMNS
from prostate_seg.reporting.evaluation.tables import METRIC_LABELS, zones_of
from prostate_seg.reporting.pages.report_tables import MAX_NUM_GROUPS, UNKNOWN, ReportData
from prostate_seg.reporting.pages.templates import render_markdown
from prostate_seg.segmentation.statistics import FAILURE_DICE

TASK = "image-segmentation"
"""Hugging Face's name of the task."""


def render_model_card(data: ReportData, *, subgroups: pd.DataFrame) -> str:
    """Return the card, with the table of `report_tables.subgroup_dice`."""
    return render_markdown(
        "model_card.md.j2",
        front_matter=Markup(yaml.safe_dump(front_matter(data), sort_keys=False, allow_unicode=True)),
        data=data,
        zones=zones_of(data.summary),
        metric_labels=METRIC_LABELS,
        failure_dice=FAILURE_DICE,
        reference_by=REFERENCE_BY,
        subgroups=subgroups.to_dict("records"),
        dataset=None if data.dataset is None or data.dataset.empty else describe_dataset(data.dataset),
        attributes={} if data.dataset is None else attribute_counts(data.dataset),
    )


def front_matter(data: ReportData) -> dict[str, Any]:
    """Return the card's metadata; licence and data sets are left for the user to fill in."""
    results = [
        {"type": name, "name": label, "value": round(data.summary["pooled"][name]["mean"], 4)}
        for name, (label, _) in METRIC_LABELS.items()
        if data.summary["pooled"][name]["mean"] is not None
    ]
    results += [
        {"type": f"{zone}/dice", "name": f"Dice, {zone.replace('_', ' ')}", "value": round(pooled["dice"]["mean"], 4)}
        for zone, pooled in zones_of(data.summary).items()
    ]
    what = "gland and zones" if data.zones else "whole gland"
    dataset = {"name": "external cases" if data.is_external else "cross-validation", "type": "private"}
    return {
        "library_name": "prostate_seg",
        "pipeline_tag": TASK,
        "tags": ["medical", "mri", "prostate", "t2w", "segmentation", "monai"],
        "license": "other",
        "license_name": "fill-in",
        "model-index": [
            {
                "name": f"prostate {what}, {data.settings.get('model', {}).get('name', 'unknown network')}",
                "results": [{"task": {"type": TASK}, "dataset": dataset, "metrics": results}],
            }
        ],
    }


def describe_dataset(table: pd.DataFrame) -> dict[str, int | str]:
    """Return the counts of the networks' data set and the ranges of its grids and volumes."""
    described: dict[str, int | str] = {"num_cases": len(table), "num_patients": table["patient_id"].nunique()}
    for column, digits in (("num_slices", 0), ("spacing_y_mm", 2), ("spacing_z_mm", 2), ("gland_volume_ml", 1)):
        low, high = (f"{bound:.{digits}f}" for bound in (table[column].min(), table[column].max()))
        described[column] = low if low == high else f"{low} to {high}"
    return described


def attribute_counts(dataset: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Return the number of cases per value, for each attribute from cases.csv that has few values."""
    attributes = dataset.drop(columns=list(OWN_COLUMNS)).replace("", UNKNOWN)
    counts = {str(name): values.value_counts() for name, values in attributes.items()}
    return {
        name: {str(value): int(count) for value, count in found.items()}
        for name, found in counts.items()
        if len(found) <= MAX_NUM_GROUPS
    }
