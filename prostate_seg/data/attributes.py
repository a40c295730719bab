"""Attributes of the cases, such as centre and scanner, from `cases.csv` in the data folder.

The columns are copied to dataset.csv and, with the results, to evaluation/cases.csv, where results are compared by them. All
values are text; an empty cell is unknown.
"""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from prostate_seg.common.errors import InputError, listed
from prostate_seg.data.dataset import OWN_COLUMNS

FILE_NAME = "cases.csv"
REFERENCE_BY = "reference_by"
"""Column with the author of a reference mask, a person or a network."""
RESERVED = frozenset(
    (
        *OWN_COLUMNS,
        *("fold", "dice", "iou", "hd95_mm", "assd_mm", "nsd_2mm"),
        *("volume_reference_ml", "volume_predicted_ml", "volume_difference_ml", "volume_difference_percent"),
        *("dice_apex", "dice_mid", "dice_base", "missed_gland", "volume_tertile", "region"),
    )
)
"""Columns of the project's own tables."""

Attributes = Mapping[str, Mapping[str, str]]
"""Column and value of each case, by case id."""


def read_attributes(root: Path) -> Attributes:
    """Read cases.csv of a data folder; without the file no case has attributes.

    Raises:
        InputError: If it is no table with a row per case id, or has a column of the project's own tables.
    """
    path = root / FILE_NAME
    if not path.is_file():
        return {}
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True, encoding="utf-8-sig")
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}\nSave it as UTF-8 with commas, one row per case.") from error
    if "case_id" not in table.columns:
        raise InputError(f"{path}: must have a column case_id, has {', '.join(map(str, table.columns))}")
    repeated = sorted(set(table["case_id"][table["case_id"].duplicated()]))
    if repeated:
        raise InputError(f"{path}: must have one row per case, has several of {listed(repeated, most=10)}")
    taken = [column for column in table.columns if column != "case_id" and column in RESERVED]
    if taken:
        raise InputError(f"{path}: {', '.join(taken)}: columns of the project's own tables; name them otherwise")
    return table.set_index("case_id").to_dict("index")  # type: ignore[return-value]
