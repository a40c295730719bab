"""Groups of cases that results are compared by: the attributes of cases.csv, and the volume of the gland.

A table has one row per case, as evaluation/cases.csv.
"""

import numpy as np
import pandas as pd

from prostate_seg.data.attributes import RESERVED

VOLUME_TERTILE = "volume_tertile"
TERTILES = ("lower third", "middle third", "upper third")
"""Thirds of the cases by a number, such as the volume of the reference."""

MAX_NUM_GROUPS = 10
"""An attribute with more values than this is cut into tertiles when it is a number, and passed over when it is none."""

UNKNOWN = "unknown"
"""Group of the cases of which the attribute is not known."""


def subgroups(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Return the group of each case, by the name of the attribute; volume tertile first.

    Args:
        table: One row per case, with volume_reference_ml and any attributes.

    Returns:
        Series on the index of `table`, text; attributes with one value alone are left out.
    """
    groups = {VOLUME_TERTILE: _tertile(table["volume_reference_ml"])}
    for name in table.columns.difference(sorted(RESERVED), sort=False):
        values = table[name].fillna("").astype(str).str.strip().replace("", UNKNOWN)
        if values.nunique() > MAX_NUM_GROUPS:
            numbers = pd.to_numeric(table[name], errors="coerce")
            values = _tertile(numbers) if numbers.notna().any() else values
        if 2 <= values.nunique() <= MAX_NUM_GROUPS:
            groups[str(name)] = values
    return {name: values for name, values in groups.items() if values.nunique() >= 2}


def _tertile(values: pd.Series) -> pd.Series:
    """Return which third of the cases each belongs to by rank, so that the three groups are as equal in size as ties allow."""
    fraction = (values.rank(method="average") - 0.5) / max(int(values.notna().sum()), 1)
    names = pd.Series(np.array(TERTILES)[np.clip(fraction.fillna(0) * 3, 0, 2).astype(int)], index=values.index)
    return names.where(values.notna(), UNKNOWN)
