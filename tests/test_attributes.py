"""Attributes of cases from cases.csv; a table that cannot be joined is refused with its name."""

from dataclasses import fields
from pathlib import Path

import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.data.cases import RESERVED, discover_cases, read_attributes
from prostate_seg.data.dataset import OWN_COLUMNS
from prostate_seg.segmentation.metrics import CaseMetrics


def data_folder(folder: Path, text: str) -> Path:
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
        for case_id in ("007_1", "008_1"):
            (folder / kind / f"{case_id}.mha").touch()
    (folder / "cases.csv").write_text(text, encoding="utf-8-sig")  # byte order mark of spreadsheet programs
    return folder


def test_values_stay_text_and_a_case_without_a_row_is_unknown_and_named(tmp_path: Path) -> None:
    root = data_folder(tmp_path, "case_id,centre,scanner\n007_1,01,NA\n")
    cases, findings = discover_cases(root, patient_pattern="^([^_]+)", exclude=[])
    assert [case.attributes for case in cases] == [{"centre": "01", "scanner": "NA"}, {"centre": "", "scanner": ""}]
    assert [(finding.case_id, finding.check, finding.is_error) for finding in findings] == [
        ("008_1", "no_attributes", False)
    ]


def test_folder_without_the_table_has_no_attributes(tmp_path: Path) -> None:
    assert read_attributes(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,centre\n007_1,a\n", "must have a column case_id, has id, centre"),
        ("case_id,centre\n007_1,a\n007_1,b\n", "must have one row per case, has several of 007_1"),
        ("case_id,dice\n007_1,1\n", "dice: columns of the project's own tables"),
        ("case_id,a\n1,2,3\n4\n5,6,7,8\n", "cannot be read"),
    ],
)
def test_table_that_cannot_be_joined_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_attributes(data_folder(tmp_path, text))


def test_no_column_of_our_own_tables_can_be_taken() -> None:
    assert {*OWN_COLUMNS, *(field.name for field in fields(CaseMetrics))} <= RESERVED
