"""The registered model as MLflow loads and serves it: rows with a volume in, rows with its mask out.

MLflow finds `_load_pyfunc` by the name that it asks of a loader module; nothing is unpickled. A row names a volume by `path` (a
file, or the folder of a DICOM series, that the serving machine can read) or holds the bytes of a file in `content` (base64 in
JSON). What cannot be segmented says why in `error`, and costs the other rows nothing.
"""

import base64
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from prostate_seg.common.errors import InputError, VolumeError
from prostate_seg.imaging.geometry import Volume
from prostate_seg.imaging.image_io import read_volume, write_volume
from prostate_seg.segmentation.devices import choose_device
from prostate_seg.segmentation.inference.prediction import Prediction, predict
from prostate_seg.segmentation.networks.model_folder import Model, load_model, read_usage

COLUMNS = ("mask", "volume_ml", "num_slices", "mean_confidence", "fold_agreement", "warnings", "error")
"""Of an answer; `mask` is a .nii.gz file in base64, on the grid of the volume, and None where there is an error."""


class ServedModel:
    """What MLflow calls."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Segment every row.

        Args:
            model_input: Columns `path` or `content`, or both; of each row one is given.
            params: None are known; MLflow passes them to every model.

        Returns:
            One row per input, with the columns `COLUMNS`.

        Raises:
            InputError: If there is neither column.
        """
        del params
        if not {"path", "content"} & set(model_input.columns):
            raise InputError("a request has rows with a path or the content of an image file, and this has neither")
        rows = [self._answer(row) for row in model_input.to_dict("records")]
        return pd.DataFrame(rows, columns=list(COLUMNS), index=model_input.index, dtype=object)

    def _answer(self, row: dict[Any, Any]) -> dict[str, Any]:
        try:
            return _as_row(predict(_volume(row), model=self.model))
        except InputError as error:
            return dict.fromkeys(COLUMNS) | {"error": str(error)}


def suffix_of(content: bytes) -> str:
    """Return the suffix of an image file that begins with these bytes.

    Raises:
        VolumeError: If it is of none of the formats that fit into one file.
    """
    if content[:2] == b"\x1f\x8b":
        return ".nii.gz"
    if content[:4] == b"NRRD":
        return ".nrrd"
    if content[344:348] == b"n+1\0" or content[:8] in (b"\x1c\x02\0\0n+2\0", b"\0\0\x02\x1cn+2\0"):
        return ".nii"
    if b"ElementDataFile" in content[:10_000]:
        return ".mha"
    raise VolumeError(
        "content must hold a whole .nii.gz, .nii, .nrrd or .mha file; give a DICOM series as the path of its folder",
        "unknown_suffix",
    )


def _load_pyfunc(data_path: str) -> ServedModel:
    """Load the networks; MLflow calls this with the folder that was registered."""
    folder = Path(data_path)
    usage = read_usage(folder)
    assert usage is not None  # stage=register writes it
    return ServedModel(load_model(folder, fold_index=None, usage=usage, device=choose_device("auto")))


def _volume(row: dict[Any, Any]) -> Volume:
    path, content = (None if _is_absent(row.get(name)) else row[name] for name in ("path", "content"))
    if (path is None) == (content is None):
        raise InputError("a row has either a path or the content of a file; give one of the two")
    if path is not None:
        return read_volume(Path(str(path)))
    if not isinstance(content, bytes):
        raise InputError("content must be the bytes of a file, in base64 where a request is JSON")
    with tempfile.TemporaryDirectory(prefix="prostate_seg-") as folder:
        file = Path(folder) / f"content{suffix_of(content)}"
        file.write_bytes(content)
        return read_volume(file)


def _is_absent(value: object) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _as_row(prediction: Prediction) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="prostate_seg-") as folder:
        file = Path(folder) / "mask.nii.gz"
        write_volume(file, prediction.mask)
        mask = base64.b64encode(file.read_bytes()).decode()
    return {
        "mask": mask,
        "volume_ml": prediction.volume_ml,
        "num_slices": prediction.num_slices,
        "mean_confidence": prediction.mean_confidence,
        "fold_agreement": prediction.fold_agreement,
        "warnings": "; ".join(prediction.warnings),
        "error": None,
    }
