"""A label whose name is not the prostate or a part of it is not used as gland."""

import json
from pathlib import Path
from typing import Any

import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.data.label_names import label_names, region_labels, require_gland_names


def data_set(root: Path, labels: Any) -> Path:
    root.mkdir(exist_ok=True)
    (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T2"}, "labels": labels}))
    return root


@pytest.mark.parametrize(
    "names",
    [
        {"background": 0, "prostate": 1},
        {"0": "background", "1": "PZ", "2": "TZ"},
        {"0": "background", "1": "peripheral_zone", "2": "CentralGland", "3": "Anterior fibromuscular stroma"},
        {"background": 0, "whole_gland": [1, 2], "TZ": [2]},
        {"background": 0, "whole prostate": [1, 2], "tumor": 2},
        {"background": 0, "prostate": 1, "lesion": 2, "prostatic urethra": 3},
        {"background": 0, "prostate": 1, "csPCa": 2},
        {"background": 0, "próstata": 1},
        {"background": 0, "foreground": 1},
        {"0": "0", "1": "1"},
        {"background": 0},
    ],
)
def test_prostate_zones_and_structures_inside_are_gland(tmp_path: Path, names: dict[str, Any]) -> None:
    require_gland_names(data_set(tmp_path, names), labels=None)


@pytest.mark.parametrize(
    ("names", "message", "step"),
    [
        ({"background": 0, "bladder": 1, "prostate": 2}, "label 1 is 'bladder'", "data.whole_gland_labels=[2]"),
        ({"0": "background", "1": "PZ", "2": "TZ", "3": "rectum"}, "label 3 is 'rectum'", "labels=[1,2]"),
        ({"background": 0, "whole": [1, 2], "TZ": 2, "ignore": 3}, "label 3 is 'ignore'", "labels=[1,2]"),
        ({"background": 0, "pelvis": [1, 2], "prostate": 1, "lesion": 3}, "label 2 is 'pelvis'", "labels=[1,3]"),
        ({"background": 0, "seminal vesicles": 2, "prostate gland": 1}, "label 2 is 'seminal vesicles'", "labels=[1]"),
        (
            {"background": 0, "periprostatic fat": 1},
            "label 1 is 'periprostatic fat'",
            "no label here is called prostate",
        ),
        ({"background": 0, "prostate_and_bladder": 1}, "label 1 is 'prostate_and_bladder'", "correct the names"),
        ({"background": 0, "lesion": 1}, "label 1 is 'lesion'", "no label here is called prostate"),
        ({"background": 0, "csPCa": 1}, "label 1 is 'csPCa'", "no label here is called prostate"),
    ],
)
def test_label_of_another_structure_is_refused_with_the_gland_labels(
    tmp_path: Path, names: dict[str, Any], message: str, step: str
) -> None:
    with pytest.raises(InputError) as refused:
        require_gland_names(data_set(tmp_path, names), labels=None)
    text = str(refused.value)
    assert text.startswith(f"{tmp_path / 'dataset.json'}: {message}")
    assert step in text


def test_configured_labels_are_checked_against_their_names(tmp_path: Path) -> None:
    root = data_set(tmp_path, {"background": 0, "bladder": 1, "prostate": 2, "lesion": 3})
    require_gland_names(root, labels=[2])
    require_gland_names(root, labels=[2, 3])
    for labels, message in (
        ([1], "label 1 is 'bladder'"),
        ([1, 2], "label 1 is 'bladder'"),
        ([3], "label 3 is 'lesion'"),
    ):
        with pytest.raises(
            InputError, match=f"{message}(.|\n)*names labels that are not: set data.whole_gland_labels=\\[2,3\\]"
        ):
            require_gland_names(root, labels=labels)


def test_bids_lookup_table_names_labels(tmp_path: Path) -> None:
    folder = tmp_path / "derivatives/manual"
    folder.mkdir(parents=True)
    (folder / "desc-organs_dseg.tsv").write_text("index\tname\n0\tbackground\n1\tprostate\n2\tbladder\n")
    with pytest.raises(InputError, match=r"desc-organs_dseg\.tsv: label 2 is 'bladder'"):
        require_gland_names(tmp_path, labels=None)
    require_gland_names(tmp_path, labels=[1])


def test_a_data_set_without_label_names_passes_and_invalid_names_are_an_error(tmp_path: Path) -> None:
    require_gland_names(tmp_path, labels=None)
    for other in (["PZ"], None):
        require_gland_names(data_set(tmp_path, other), labels=None)
    for wrong in ({"one": "prostate"}, {"prostate": None}, {"prostate": {"a": 1}}):
        with pytest.raises(InputError, match=r"dataset\.json: the labels cannot be read"):
            require_gland_names(data_set(tmp_path, wrong), labels=None)


@pytest.mark.parametrize(
    "names",
    [
        {"background": 0, "PZ": 1, "TZ": 2},
        {"0": "background", "1": "peripheral zone", "2": "CentralGland"},
        {"background": 0, "whole prostate": [1, 2], "peripheral_zone": 1, "transitional-zone": [2]},
    ],
)
def test_zones_are_found_by_their_usual_names(tmp_path: Path, names: dict[str, Any]) -> None:
    assert label_names(data_set(tmp_path, names), given=None) == {"peripheral_zone": 1, "transition_zone": 2}


def test_names_are_those_of_bids_and_other_structures_keep_theirs(tmp_path: Path) -> None:
    folder = tmp_path / "derivatives/manual"
    folder.mkdir(parents=True)
    (folder / "dseg.tsv").write_text("index\tname\n0\tbackground\n1\tTZ\n2\tcentral gland\n3\tIndex Lesion 2\n")
    assert label_names(tmp_path, given=None) == {"transition_zone": 1, "central_gland": 2, "index_lesion_2": 3}
    assert label_names(tmp_path / "nothing", given=None) is None


def test_a_table_that_is_not_in_utf8_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "derivatives" / "dseg.tsv"
    table.parent.mkdir()
    table.write_bytes("index\tname\n1\tPrüfung\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"dseg\.tsv: the labels cannot be read .*; write them as BIDS does"):
        label_names(tmp_path, given=None)


def test_names_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    root = data_set(tmp_path, {"1": "PZ", "2": "peripheral zone"})
    with pytest.raises(InputError, match=r"peripheral_zone: must be one label, is 1 in .*dataset\.json, 2 in "):
        label_names(root, given=None)
    root = data_set(tmp_path, {"PZ": 1, "TZ": 2})
    swapped = {"transition_zone": 1, "peripheral_zone": 2}
    with pytest.raises(
        InputError, match=r"data.labels: (transition|peripheral)_zone must be \d, as in .*dataset\.json, is"
    ):
        label_names(root, given=swapped)
    assert label_names(root, given={"peripheral_zone": 1, "lesion": 3}) == {"peripheral_zone": 1, "lesion": 3}


REGIONS = {"whole_gland": None, "transition_zone": ["transition_zone"], "peripheral_zone": ["peripheral_zone"]}


def test_the_same_regions_have_the_labels_of_each_data_set() -> None:
    for names in ({"peripheral_zone": 1, "transition_zone": 2}, {"transition_zone": 1, "peripheral_zone": 2}):
        found = region_labels(REGIONS, names=names, whole_gland_labels=None)
        assert list(found) == [
            "whole_gland",
            "peripheral_zone",
            "transition_zone",
        ]  # by name, whatever the order of the YAML
        assert found["whole_gland"] == (1, 2)
        assert {name: found[name] for name in names} == {name: (label,) for name, label in names.items()}
    assert region_labels({"whole_gland": None}, names=None, whole_gland_labels=None) == {"whole_gland": None}
    assert region_labels({"whole_gland": None}, names=None, whole_gland_labels=(3,)) == {"whole_gland": (3,)}


def test_a_region_unites_labels() -> None:
    names = {"pz_left": 3, "pz_right": 1, "rest": 2}
    found = region_labels({"whole_gland": None, "pz": ["pz_left", "pz_right"]}, names=names, whole_gland_labels=None)
    assert found == {"whole_gland": (1, 2, 3), "pz": (1, 3)}


def test_a_region_without_a_label_or_outside_the_gland_is_refused() -> None:
    with pytest.raises(InputError, match=r"none of peripheral_zone, transition_zone; the data set has: prostate 1\n"):
        region_labels(REGIONS, names={"prostate": 1}, whole_gland_labels=None)
    with pytest.raises(InputError, match=r"the data set has: none\nGive the value of each label by its name"):
        region_labels(REGIONS, names=None, whole_gland_labels=None)
    with pytest.raises(InputError, match=r"label 2 of peripheral_zone is not in data.whole_gland_labels=\[1\]"):
        region_labels(REGIONS, names={"transition_zone": 1, "peripheral_zone": 2}, whole_gland_labels=(1,))


def test_names_in_the_config_are_checked_as_those_of_files_are(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"data.labels: label 3 is 'bladder'(.|\n)*set data.whole_gland_labels=\[1,2\]"
    ):
        require_gland_names(tmp_path, labels=None, given={"PZ": 1, "TZ": 2, "bladder": 3})
