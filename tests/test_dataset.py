"""dataset.csv keeps ids as text, the contract reports every difference, and reference_quality.csv has a row for every case."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import write_json
from prostate_seg.data.dataset import (
    QUALITY_COLUMNS,
    read_dataset,
    recorded_labels,
    require_contract,
    write_contract,
    write_dataset,
    write_quality_table,
)
from prostate_seg.imaging.geometry import Finding
from prostate_seg.imaging.quality import CaseQuality, ReferenceQuality
from tests.data_helpers import case_record
from tests.imaging_helpers import DEFAULT

ROW = case_record("007_1", gland_volume_ml=44.25)
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


def test_rows_round_trip_sorted(tmp_path: Path) -> None:
    rows = [
        ROW,
        replace(ROW, case_id="001", patient_id="001", study_id=""),
        replace(ROW, case_id="NA", patient_id="Ünal"),
    ]
    rows = [replace(row, attributes={"centre": "007", "scanner": ""}) for row in rows]
    write_dataset(tmp_path / "dataset.csv", rows)
    read = read_dataset(tmp_path / "dataset.csv")
    assert list(read) == ["001", "007_1", "NA"]
    assert sorted(read.values(), key=lambda row: row.case_id) == sorted(rows, key=lambda row: row.case_id)


def test_absent_table_and_contract_are_refused_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run stage=preprocess first"):
        read_dataset(tmp_path / "dataset.csv")
    with pytest.raises(InputError, match="run stage=preprocess first"):
        require_contract(tmp_path / "contract.json", DEFAULT)


def test_contract_of_the_same_settings_is_accepted_and_every_difference_is_listed(tmp_path: Path) -> None:
    write_contract(tmp_path / "contract.json", DEFAULT, labels={"transition_zone": 1})
    assert recorded_labels(tmp_path / "contract.json") == {"transition_zone": 1}
    require_contract(tmp_path / "contract.json", DEFAULT)
    other = replace(DEFAULT, spacing_mm=None, crop="mask")
    with pytest.raises(InputError) as caught:
        require_contract(tmp_path / "contract.json", other)
    assert "spacing_mm: is [3.0, 0.5, 0.5], wanted None" in str(caught.value)
    assert "crop: is center, wanted mask" in str(caught.value)
    assert "image_size" not in str(caught.value)


def test_contract_of_a_version_without_zones_is_that_of_the_whole_gland(tmp_path: Path) -> None:
    old = {name: value for name, value in DEFAULT.as_dict().items() if name != "zones"}
    write_json(tmp_path / "contract.json", {"preprocess": old, "auto": [], "hash": "x"})
    require_contract(tmp_path / "contract.json", DEFAULT)
    with pytest.raises(InputError, match=r"zones: is \{\}, wanted \{'peripheral_zone': \[1\]\}"):
        require_contract(tmp_path / "contract.json", replace(DEFAULT, zones={"peripheral_zone": (1,)}))
    assert recorded_labels(tmp_path / "contract.json") is None


def finding(case_id: str, check: str, *, is_error: bool = False) -> Finding:
    return Finding(case_id=case_id, check=check, is_error=is_error, message="")


def written_quality_table(path: Path) -> list[dict[str, str]]:
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
    row = written_quality_table(tmp_path / "table.csv")[1]
    assert tuple(row) == QUALITY_COLUMNS
    assert tuple(row.values()) == (
        "b", "True", "44.39", "14", "2", "0.07", "0.961", "1", "0.0731", "0.25", "1:20.1 2:24.3", "gap;several_components"
    )  # fmt: skip


def test_a_refused_case_has_what_could_be_measured_and_one_without_files_its_findings(tmp_path: Path) -> None:
    refused, _, alone = written_quality_table(tmp_path / "table.csv")
    assert (refused["case_id"], refused["used"], refused["findings"]) == ("a", "False", "unreadable")
    assert (refused["gland_volume_ml"], refused["image_disorder"]) == ("44.39", "")
    assert {name: cell for name, cell in alone.items() if cell} == {
        "case_id": "c",
        "used": "False",
        "findings": "image_without_mask",
    }
