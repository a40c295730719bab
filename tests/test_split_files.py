"""Split files of other programs are read; other files are refused and never executed."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.data.folds import Fold, read_splits


@pytest.mark.parametrize(
    ("content", "folds"),
    [
        (
            {"how": {}, "folds": [{"train": ["a"], "val": ["b"], "test": ["c"]}]},
            [Fold(train=["a"], val=["b"], test=["c"])],
        ),
        (
            [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a", "b"]}],
            [Fold(train=["a", "b"], val=["c"], test=[]), Fold(train=["c"], val=["a", "b"], test=[])],
        ),
        (
            {"folds": [{"val": ["a"]}, {"val": ["b"]}]},
            [Fold(train=["b"], val=[], test=["a"]), Fold(train=["a"], val=[], test=["b"])],
        ),
        (
            {"train": ["x/a_0000.nii.gz"], "validation": ["b.mha"], "test": ["c"], "name": "mine"},
            [Fold(train=["a_0000"], val=["b"], test=["c"])],
        ),
    ],
    ids=["kfold.json", "nnU-Net", "PI-CAI", "plain"],
)
def test_known_formats_are_read(tmp_path: Path, content: Any, folds: list[Fold]) -> None:
    (tmp_path / "splits.json").write_text(json.dumps(content))
    assert read_splits(tmp_path / "splits.json") == folds


@pytest.mark.parametrize("content", ["3", '"a"', "{}", "[]", '{"folds": [{"val": "abc"}]}', '[["a"], ["b"]]', "{oops"])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "splits.json").write_text(content)
    with pytest.raises(InputError, match="a split file is JSON of one of these forms"):
        read_splits(tmp_path / "splits.json")


def test_pickle_is_not_opened_and_an_absent_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "splits_final.pkl").write_bytes(pickle.dumps([{"train": ["a"], "val": ["b"]}]))
    with pytest.raises(InputError, match="is no JSON"):
        read_splits(tmp_path / "splits_final.pkl")
    with pytest.raises(InputError, match="No such file"):
        read_splits(tmp_path / "absent.json")
