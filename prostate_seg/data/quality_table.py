"""reference_quality.csv: measurements of every case and its reference, one row per case, used or not.

Volumes are in mL. A cell is empty where a file could not be read or measured.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import pandas as pd

from prostate_seg.common.files import write_csv
from prostate_seg.imaging.quality import CaseQuality, Finding

COLUMNS = (
    *("case_id", "used", "gland_volume_ml", "num_slices", "num_components", "holes_ml", "solid_fraction", "gaps"),
    *("mask_disorder", "image_disorder", "labels", "findings"),
)
"""Columns; see `ReferenceQuality` for the measurements; `labels` has the volume of each label, as in 1:20.1 2:24.3."""


def write_quality_table(
    path: Path, quality_of: Mapping[str, CaseQuality], *, findings: Sequence[Finding], used: Collection[str]
) -> None:
    """Write the table, sorted by case id, of measurements by case id; a bad case without measurements gets a row too.

    `findings` are all those on the data set, `used` the ids of the cases that were not refused.
    """
    bad = {finding.case_id for finding in findings if finding.is_error}
    rows = []
    for case_id in sorted({*quality_of, *bad}):
        row: dict[str, object] = {"case_id": case_id, "used": case_id in used}
        quality = quality_of.get(case_id)
        if quality is not None and quality.reference is not None:
            reference = quality.reference
            labels = sorted(reference.labels_ml.items())
            row |= {
                "gland_volume_ml": f"{reference.gland_volume_ml:.4g}",
                "num_slices": str(reference.num_slices),
                "num_components": str(len(reference.components_ml)),
                "holes_ml": f"{sum(reference.holes_ml):.3g}",
                "solid_fraction": f"{reference.solid_fraction:.3g}",
                "gaps": str(len(reference.gaps)),
                "mask_disorder": f"{reference.disorder:.3g}",
                "labels": " ".join(f"{label}:{volume_ml:.1f}" for label, volume_ml in labels),
            }
        if quality is not None and quality.image_disorder is not None:
            row["image_disorder"] = f"{quality.image_disorder:.3g}"
        row["findings"] = ";".join(sorted({finding.check for finding in findings if finding.case_id == case_id}))
        rows.append(row)
    write_csv(path, pd.DataFrame(rows, columns=list(COLUMNS)))
