"""model_card.md from the facts: the fields of Hugging Face's model cards, with what the CLAIM checklist asks of a study.

Nothing is guessed: what the files do not say is marked for the user to fill in.
"""

from typing import Any

import yaml
from markupsafe import Markup

from prostate_seg.data.attributes import REFERENCE_BY
from prostate_seg.reporting.facts import Facts, Tree
from prostate_seg.reporting.pages import render_markdown
from prostate_seg.reporting.report import METRIC_NAMES
from prostate_seg.segmentation.statistics import FAILURE_DICE

TASK = "image-segmentation"
"""Hugging Face's name of the task."""


def render_model_card(facts: Facts, *, subgroups: list[dict[str, Any]]) -> str:
    """Return the card.

    Args:
        facts: What is known.
        subgroups: Rows of `analysis.subgroup_dice`.
    """
    return render_markdown(
        "model_card.md.j2",
        front_matter=Markup(yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)),
        facts=facts,
        pooled=facts.pooled,
        metric_names=METRIC_NAMES,
        failure_dice=FAILURE_DICE,
        reference_by=REFERENCE_BY,
        leak_gate=facts.summary.get("leak_gate"),
        subgroups=subgroups,
        data=describe_data(facts),
        attributes=[] if facts.dataset is None else attribute_counts(facts),
    )


def front_matter(facts: Facts) -> dict[str, Any]:
    """Return the card's metadata; licence and data sets are for the user to name."""
    results = [
        {"type": name, "name": METRIC_NAMES[name][0], "value": round(summary["mean"], 4)}
        for name, summary in facts.metrics
        if summary["mean"] is not None
    ]
    dataset = {"name": "external cases" if facts.is_external else "cross-validation", "type": "private"}
    return {
        "library_name": "prostate_seg",
        "pipeline_tag": TASK,
        "tags": ["medical", "mri", "prostate", "t2w", "segmentation", "monai"],
        "license": "other",
        "license_name": "fill-in",
        "model-index": [
            {
                "name": f"prostate whole gland, {facts.settings.get('model', {}).get('name', 'unknown network')}",
                "results": [{"task": {"type": TASK}, "dataset": dataset, "metrics": results}],
            }
        ],
    }


def describe_data(facts: Facts) -> Tree | None:
    """Return the counts and ranges of the networks' data set; None when its table is not there."""
    table = facts.dataset
    if table is None or table.empty:
        return None
    return {
        "num_cases": len(table),
        "num_patients": table["patient_id"].nunique(),
        "num_slices": _range(table, "num_slices", 0),
        "spacing_y_mm": _range(table, "spacing_y_mm", 2),
        "spacing_z_mm": _range(table, "spacing_z_mm", 2),
        "gland_volume_ml": _range(table, "gland_volume_ml", 1),
    }


def attribute_counts(facts: Facts) -> list[tuple[str, dict[str, int]]]:
    """Return how many cases have each value of each attribute that comes from cases.csv and has few values."""
    assert facts.dataset is not None
    counts = {name: facts.dataset[name].replace("", "unknown").value_counts() for name in facts.attribute_names}
    return [(name, {str(k): int(n) for k, n in found.items()}) for name, found in counts.items() if len(found) <= 10]


def _range(table: Any, column: str, digits: int) -> str:
    low, high = float(table[column].min()), float(table[column].max())
    return (
        f"{low:.{digits}f}" if round(low, digits) == round(high, digits) else f"{low:.{digits}f} to {high:.{digits}f}"
    )
