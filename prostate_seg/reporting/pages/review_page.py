"""review.html: the studies of a prediction, most doubtful first, with their overlays and the reasons for doubt.

The page lies beside masks/ and overlays/ and shows the overlays from there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from prostate_seg.common.files import write_csv, write_text
from prostate_seg.data.cases import FILE_NAME, REFERENCE_BY
from prostate_seg.reporting.pages.templates import render_html

CORRECTED = "corrected"
"""Folder for corrected masks, in the layout of data=folder, and value of `REFERENCE_BY` of its cases."""
VERDICTS = ("reject", "check", "accept")


def write_review(output: Path, volumes: pd.DataFrame) -> None:
    """Write review.html of the rows of volumes.csv, and the folder for corrected masks with its cases.csv."""
    studies = [_study(row) for row in volumes.astype(object).where(volumes.notna(), None).to_dict("records")]
    verdicts = [study["verdict"] for study in studies if study["error"] is None]
    page = render_html(
        "review.html.j2",
        studies=studies,
        counts={verdict: verdicts.count(verdict) for verdict in VERDICTS if verdict in verdicts},
        num_unknown=verdicts.count(None),
        num_refused=len(studies) - len(verdicts),
        corrected=CORRECTED,
        reference_by=REFERENCE_BY,
    )
    write_text(output / "review.html", page)
    for folder in ("images", "masks"):
        (output / CORRECTED / folder).mkdir(parents=True, exist_ok=True)
    rows = [(one["case_id"], CORRECTED, one["model"], one["model_md5"]) for one in studies if one["error"] is None]
    columns = ["case_id", REFERENCE_BY, "corrected_from", "corrected_from_md5"]
    write_csv(output / CORRECTED / FILE_NAME, pd.DataFrame(rows, columns=columns))


def _study(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a row of volumes.csv with its case id, address of the overlay and reasons for doubt."""
    name = str(row["name"])
    return {
        **row,
        "case_id": name.replace("/", "_"),
        "overlay": quote(f"overlays/{name}.png"),
        "reasons": [warning for warning in str(row["warnings"] or "").split("; ") if warning],
    }
