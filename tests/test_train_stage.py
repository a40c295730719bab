"""Stage train refuses folds that it cannot train."""

import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.data.folds import Fold
from prostate_seg.stages.train import _require_studies


@pytest.mark.parametrize("part", ["train", "val"])
def test_fold_without_studies_to_fit_or_validate_is_refused(part: str) -> None:
    whole = {"train": ["a_1"], "val": ["b_1"], "test": []}
    _require_studies({0: Fold(**whole)})
    with pytest.raises(InputError, match=f"fold 1: kfold.json lists no {part} studies\nRun stage=prepare again"):
        _require_studies({0: Fold(**whole), 1: Fold(**{**whole, part: []})})
