"""reference_quality.csv: what was measured of every case and its reference, one row per case, used or not.

Volumes are in mL. A cell is empty where a file could not be read or measured.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import pandas as pd

from prostate_seg.common.files import write_csv
from prostate_seg.imaging.quality import CaseQuality, Finding, ReferenceQuality

COLUMNS = (
    "case_id",
    "used",
    "gland_volume_ml",
    "num_slices",
    "num_components",
    "holes_ml",
    "solid_fraction",
    "gaps",
    "mask_disorder",
    "image_disorder",
    "labels",
    "findings",
)
"""What each measurement is stands at `ReferenceQuality`; `labels` has the volume of each label, as in 1:20.1 2:24.3."""


def write_quality_table(
    path: Path, quality_of: Mapping[str, CaseQuality], *, findings: Sequence[Finding], used: Collection[str]
) -> None:
    """Write the table, sorted by case id.

    Args:
        path: File to write.
        quality_of: Measurements by case id.
        findings: All findings on the data set; a bad case without measurements gets a row too.
        used: Ids of the cases that were not refused.
    """
    bad = {finding.case_id for finding in findings if finding.is_error}
    rows = [
        {
            "case_id": case_id,
            "used": case_id in used,
            **(_measured(quality_of[case_id]) if case_id in quality_of else {}),
            "findings": ";".join(sorted({finding.check for finding in findings if finding.case_id == case_id})),
        }
        for case_id in sorted({*quality_of, *bad})
    ]
    write_csv(path, pd.DataFrame(rows, columns=list(COLUMNS)))


def _measured(quality: CaseQuality) -> dict[str, str]:
    reference = {} if quality.reference is None else _reference_cells(quality.reference)
    image = {} if quality.image_disorder is None else {"image_disorder": f"{quality.image_disorder:.3g}"}
    return reference | image


def _reference_cells(reference: ReferenceQuality) -> dict[str, str]:
    return {
        "gland_volume_ml": f"{reference.gland_volume_ml:.4g}",
        "num_slices": str(reference.num_slices),
        "num_components": str(len(reference.components_ml)),
        "holes_ml": f"{sum(reference.holes_ml):.3g}",
        "solid_fraction": f"{reference.solid_fraction:.3g}",
        "gaps": str(len(reference.gaps)),
        "mask_disorder": f"{reference.disorder:.3g}",
        "labels": " ".join(f"{label}:{volume_ml:.1f}" for label, volume_ml in sorted(reference.labels_ml.items())),
    }
