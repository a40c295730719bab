"""Stage train refuses folds that it cannot train."""

from pathlib import Path

import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import parse
from prostate_seg.config.workspace import workspace_of
from prostate_seg.data.folds import Fold
from prostate_seg.stages import train
from tests.conftest import composed


@pytest.mark.parametrize("split", ["train", "val"])
def test_fold_without_train_or_val_studies_is_refused(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = {"train": ["a_1"], "val": ["b_1"], "test": []}
    folds = {0: Fold(**complete), 1: Fold(**{**complete, split: []})}
    monkeypatch.setattr(train, "checked_dataset", lambda *_: {})
    monkeypatch.setattr(train, "checked_folds", lambda *_: (folds, None))
    cfg = parse(composed(f"paths.root={tmp_path}"))
    with pytest.raises(InputError, match=f"fold 1: kfold.json lists no {split} studies\nRun stage=prepare again"):
        train.run(cfg, workspace_of(cfg))
