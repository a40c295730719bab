"""The verdict of the leak gate is cached for stages after prepare, until anything that it compares changes."""

from pathlib import Path

import numpy as np
import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.config.schema import parse
from prostate_seg.config.workspace import Workspace
from prostate_seg.data.dataset import write_dataset
from prostate_seg.data.folds import Fold
from prostate_seg.imaging.fingerprint import THUMBNAIL_SHAPE
from prostate_seg.steps import leak_gate
from tests.conftest import composed
from tests.data_helpers import case_record

FOLDS = [Fold(train=["a_1"], val=["b_1"], test=["c_1"])]
DATASET = {name: case_record(name, hashes_of=name) for name in ("a_1", "b_1", "c_1")}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(root=tmp_path, data=tmp_path / "data", cache=tmp_path / ".cache")
    workspace.preprocess.mkdir()
    write_dataset(workspace.dataset_csv, list(DATASET.values()))
    np.save(workspace.thumbnails_npy, np.random.default_rng(0).integers(-127, 128, (3, *THUMBNAIL_SHAPE), np.int8))
    return workspace


def test_same_folds_of_the_same_files_are_compared_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = parse(composed("stage=prepare"))
    verdict = leak_gate.pass_leak_gate(cfg, workspace, FOLDS, DATASET)
    assert verdict["verdict"] == "passed"
    monkeypatch.setattr(leak_gate, "stop_on_leaks", None)
    assert leak_gate.pass_leak_gate(cfg, workspace, FOLDS, DATASET) == verdict


def test_changed_folds_thumbnails_and_tables_are_compared_again(workspace: Workspace) -> None:
    cfg = parse(composed("stage=prepare"))
    leak_gate.pass_leak_gate(cfg, workspace, FOLDS, DATASET)
    with pytest.raises(InputError, match="case in two parts: c_1"):
        leak_gate.pass_leak_gate(cfg, workspace, [Fold(train=["a_1"], val=["b_1", "c_1"], test=["c_1"])], DATASET)
    thumbnails = np.load(workspace.thumbnails_npy)
    np.save(workspace.thumbnails_npy, thumbnails[[0, 1, 0]])
    with pytest.raises(InputError, match=r"near-identical images \(correlation 1.00\): a_1 \(train\) and c_1 \(test\)"):
        leak_gate.pass_leak_gate(cfg, workspace, FOLDS, DATASET)
    np.save(workspace.thumbnails_npy, thumbnails)
    same_mask = DATASET | {"c_1": case_record("c_1", hashes_of="c_1", mask_md5="mask a_1")}
    write_dataset(workspace.dataset_csv, list(same_mask.values()))
    with pytest.raises(InputError, match="identical mask files"):
        leak_gate.pass_leak_gate(cfg, workspace, FOLDS, same_mask)


def test_cached_verdict_still_lists_accepted_pairs(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    np.save(workspace.thumbnails_npy, np.load(workspace.thumbnails_npy)[[0, 1, 0]])
    cfg = parse(composed("stage=prepare", "fold.not_duplicates=['a_1/c_1: two patients']"))
    for _ in range(2):
        caplog.clear()
        verdict = leak_gate.pass_leak_gate(cfg, workspace, FOLDS, DATASET)
        assert verdict["verdict"] == "passed (1 pair overruled)"
        assert "lets near-identical images pass: a_1 and c_1" in caplog.text
    with pytest.raises(InputError, match="near-identical images"):
        leak_gate.pass_leak_gate(parse(composed("stage=prepare")), workspace, FOLDS, DATASET)
