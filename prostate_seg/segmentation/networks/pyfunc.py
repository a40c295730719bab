"""MLflow pyfunc flavour of a registered model: rows with a volume in, rows with its mask out.

MLflow calls `_load_pyfunc` of this module; nothing is unpickled. A row has the `path` of a volume (a file, or the folder of a
DICOM series, readable on the serving machine) or the bytes of a file as `content` (base64 in JSON). A row that cannot be
segmented has the reason in `error`; the other rows are unaffected.
"""

import base64
import json
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from prostate_seg.common.errors import InputError, VolumeError
from prostate_seg.imaging.geometry import Volume
from prostate_seg.imaging.image_io import read_volume, write_volume
from prostate_seg.segmentation.devices import choose_device
from prostate_seg.segmentation.inference.prediction import predict
from prostate_seg.segmentation.networks.model_folder import Model, load_model, read_usage

COLUMNS = (
    *("mask", "volume_ml", "num_slices", "mean_confidence", "fold_agreement", "warnings", "error", "zones"),
    *("expected_dice", "dice_lower_bound"),
)
"""Of a response; `mask` is a .nii.gz file in base64 on the grid of the volume, `fold_agreement` the inter-model Dice.

`zones` is JSON text with the labels and the volume of each zone: {"peripheral_zone": {"labels": [2], "volume_ml": 17.2}}.
"""


class ServedModel:
    """The Python model that MLflow loads and serves."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return one row with `COLUMNS` per row with a `path` or a `content`.

        Raises:
            InputError: If there is neither column.
        """
        del params  # MLflow passes them to every model
        if not {"path", "content"} & set(model_input.columns):
            raise InputError("a request has rows with a path or the content of an image file, and this has neither")
        rows = [self._predict_row(row) for row in model_input.to_dict("records")]
        return pd.DataFrame(rows, columns=list(COLUMNS), index=model_input.index, dtype=object)

    def _predict_row(self, row: dict[Any, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="prostate_seg-") as name:
            try:
                prediction = predict(_read_row(row, Path(name)), model=self.model)
            except InputError as error:
                return dict.fromkeys(COLUMNS) | {"error": str(error)}
            file = Path(name) / "mask.nii.gz"
            write_volume(file, prediction.mask)
            return {
                "mask": base64.b64encode(file.read_bytes()).decode(),
                "volume_ml": prediction.volume_ml,
                "num_slices": prediction.num_slices,
                "mean_confidence": prediction.mean_confidence,
                "fold_agreement": prediction.inter_model_dice,
                "warnings": "; ".join(prediction.warnings),
                "error": None,
                "expected_dice": prediction.estimate and prediction.estimate.expected_dice,
                "dice_lower_bound": prediction.estimate and prediction.estimate.lower_bound,
                "zones": json.dumps(prediction.zones),
            }


def suffix_of(content: bytes) -> str:
    """Return the suffix of an image file from its first bytes.

    Raises:
        VolumeError: If it is of none of the single-file formats.
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


def _read_row(row: dict[Any, Any], folder: Path) -> Volume:
    """Read the volume of a row; its content is written to a file in `folder` first."""
    # MLflow fills the column that a row lacks with None or NaN.
    path, content = (None if pd.isna(row.get(name)) else row[name] for name in ("path", "content"))
    if (path is None) == (content is None):
        raise InputError("a row has either a path or the content of a file; give one of the two")
    if path is not None:
        return read_volume(Path(str(path)))
    if not isinstance(content, bytes):
        raise InputError("content must be the bytes of a file, in base64 where a request is JSON")
    file = folder / f"content{suffix_of(content)}"
    file.write_bytes(content)
    return read_volume(file)
