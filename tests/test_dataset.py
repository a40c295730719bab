"""dataset.csv stores ids as text and numbers as numbers; the contract reports every difference."""

from dataclasses import replace
from pathlib import Path

import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import write_json
from prostate_seg.data.dataset import read_dataset, recorded_labels, require_contract, write_contract, write_dataset
from tests.data_helpers import case_record
from tests.imaging_helpers import DEFAULT

ROW = case_record("007_1", gland_volume_ml=44.25)


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
