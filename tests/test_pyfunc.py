"""MLflow flavour: a path or the bytes of a file, the mask on its own grid, and errors per row."""

import base64
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prostate_seg.common.errors import InputError, VolumeError
from prostate_seg.common.files import write_json
from prostate_seg.common.settings import plain
from prostate_seg.imaging.image_io import read_volume, write_volume
from prostate_seg.provenance.source_files import PACKAGE, files_behind
from prostate_seg.segmentation.networks.pyfunc import COLUMNS, ServedModel, suffix_of
from prostate_seg.tracking.registry import LOADER
from tests.test_inference import BrightVoxels
from tests.test_model_folder import USAGE, save_fold
from tests.test_prediction import model, study

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")


@pytest.fixture
def served() -> ServedModel:
    return ServedModel(model(BrightVoxels()))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_path_and_content_of_every_format_give_one_mask_on_the_grid_of_the_file(
    served: ServedModel, tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"study{suffix}"
    write_volume(file, study())
    assert suffix_of(file.read_bytes()) == suffix
    by_path, by_content = (
        served.predict(pd.DataFrame(rows)).iloc[0] for rows in ({"path": [str(file)]}, {"content": [file.read_bytes()]})
    )
    assert by_path["mask"] == by_content["mask"]
    (tmp_path / "mask.nii.gz").write_bytes(base64.b64decode(by_path["mask"]))
    mask = read_volume(tmp_path / "mask.nii.gz")
    assert mask.geometry.is_same_grid(read_volume(file).geometry)
    assert mask.array.sum() * 3 / 1000 == pytest.approx(by_path["volume_ml"])
    assert by_path["error"] is None


def test_a_bad_row_has_its_error_and_does_not_affect_the_others(served: ServedModel, tmp_path: Path) -> None:
    write_volume(tmp_path / "good.mha", study())
    rows = [
        {"path": str(tmp_path / "good.mha"), "content": None},
        {"path": str(tmp_path / "absent.mha"), "content": None},
        {"path": np.nan, "content": b"no image"},
        {"path": None, "content": None},
    ]
    answer = served.predict(pd.DataFrame(rows, index=[5, 6, 7, 8]))
    assert tuple(answer.columns) == COLUMNS
    assert list(answer.index) == [5, 6, 7, 8]
    assert [error is None for error in answer["error"]] == [True, False, False, False]
    assert answer["mask"].notna().tolist() == [True, False, False, False]
    for words, error in zip(("no such file", "whole .nii.gz", "give one of the two"), answer["error"][1:], strict=True):
        assert words in error


def test_a_request_without_a_volume_is_refused(served: ServedModel) -> None:
    with pytest.raises(InputError, match="a path or the content"):
        served.predict(pd.DataFrame({"image": ["x"]}))
    with pytest.raises(VolumeError, match="give a DICOM series as the path"):
        suffix_of(b"PK\x03\x04")


LOADED_ALONE = """
import sys
sys.path.insert(0, sys.argv[1])
import pandas as pd
import prostate_seg
from prostate_seg.segmentation.networks.pyfunc import _load_pyfunc
assert prostate_seg.__file__.startswith(sys.argv[1]), prostate_seg.__file__
(error,) = _load_pyfunc(sys.argv[2]).predict(pd.DataFrame({"path": [sys.argv[3]]}))["error"]
assert error is None, error
"""


def test_packaged_code_loads_a_registered_folder_without_the_checkout(tmp_path: Path) -> None:
    for file in files_behind(PACKAGE / LOADER):
        copy = tmp_path / "code" / PACKAGE.name / file.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    save_fold(tmp_path / "networks", 0)
    write_json(tmp_path / "networks" / "segmentation.json", plain(USAGE))
    write_volume(tmp_path / "study.mha", study())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    arguments = [tmp_path / "code", tmp_path / "networks", tmp_path / "study.mha"]
    done = subprocess.run(
        [sys.executable, "-c", LOADED_ALONE, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
