"""A label whose name is not the prostate or a part of it is not used as gland."""

import json
from pathlib import Path
from typing import Any

import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.data.label_names import require_gland_names


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
