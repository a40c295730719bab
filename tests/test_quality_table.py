"""reference_quality.csv: a row for every case, also for those that could not be read or measured."""

import csv
from pathlib import Path

from prostate_seg.data.dataset import QUALITY_COLUMNS, write_quality_table
from prostate_seg.imaging.geometry import Finding
from prostate_seg.imaging.quality import CaseQuality, ReferenceQuality

REFERENCE = ReferenceQuality(
    labels_ml={2: 24.28, 1: 20.11},
    gland_volume_ml=44.39,
    num_slices=14,
    components_ml=(44.29, 0.1),
    holes_ml=(0.05, 0.02),
    solid_fraction=0.9612,
    gaps=(7,),
    disorder=0.0731,
    touched_sides=(),
)


def finding(case_id: str, check: str, *, is_error: bool = False) -> Finding:
    return Finding(case_id=case_id, check=check, is_error=is_error, message="")


def written(path: Path) -> list[dict[str, str]]:
    measured = CaseQuality(findings=[], image_disorder=0.25, reference=REFERENCE)
    mask_alone = CaseQuality(findings=[], image_disorder=None, reference=REFERENCE)
    findings = [
        finding("b", "several_components"),
        finding("b", "gap"),
        finding("b", "gap"),
        finding("a", "unreadable", is_error=True),
        finding("c", "image_without_mask", is_error=True),
        finding("notes.txt", "ignored_file"),
    ]
    write_quality_table(path, {"b": measured, "a": mask_alone}, findings=findings, used={"b"})
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_case_has_its_measurements_and_each_finding_once(tmp_path: Path) -> None:
    row = written(tmp_path / "table.csv")[1]
    assert tuple(row) == QUALITY_COLUMNS
    assert tuple(row.values()) == (
        "b", "True", "44.39", "14", "2", "0.07", "0.961", "1", "0.0731", "0.25", "1:20.1 2:24.3", "gap;several_components"
    )  # fmt: skip


def test_a_refused_case_has_what_could_be_measured_and_one_without_files_its_findings(tmp_path: Path) -> None:
    refused, _, alone = written(tmp_path / "table.csv")
    assert (refused["case_id"], refused["used"], refused["findings"]) == ("a", "False", "unreadable")
    assert (refused["gland_volume_ml"], refused["image_disorder"]) == ("44.39", "")
    assert {name: cell for name, cell in alone.items() if cell} == {
        "case_id": "c",
        "used": "False",
        "findings": "image_without_mask",
    }
