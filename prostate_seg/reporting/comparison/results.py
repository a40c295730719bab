"""Results of evaluations and of repeated trainings, what two of them must share, and their comparison.

A difference is other minus baseline. Signed volume differences are compared by their absolute values, so that every metric has
one better direction.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any

import numpy as np
import pandas as pd

from prostate_seg.common.errors import InputError, listed
from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.reporting.evaluation.tables import SUMMARY_METRICS, by_region
from prostate_seg.segmentation.statistics import PairedDifference
from prostate_seg.segmentation.variance import NoiseFloor

SIGNED = ("volume_difference_ml", "volume_difference_percent")
"""Metrics whose best value is 0."""

COMPARED = tuple(f"abs_{name}" if name in SIGNED else name for name in SUMMARY_METRICS)
"""Metrics compared over all cases."""

DICE = "dice"
"""Metric whose sources of variance are estimated."""

LOWER_IS_BETTER = frozenset({"hd95_mm", "assd_mm", *(f"abs_{name}" for name in SIGNED)})

ALL = "all"
"""Subgroup and group of the rows over all cases."""

EQUAL_COLUMNS = {
    "mask_md5": "another reference (mask_md5)",
    "image_md5": "another image (image_md5)",
    "patient_id": "another patient (patient_id)",
    "oracle_crop": "an oracle crop on one side only (oracle_crop)",
}
"""Columns in which both tables must agree, with the description of a disagreement."""

VOLUME_TOLERANCE = 1e-6
"""Largest relative difference of the reference volumes of one mask; above it, different labels were merged."""

MAX_NUM_NAMED = 10
"""Case ids listed per kind of disagreement."""

ORACLE_CROP = "ORACLE CROP: windows were centred on the reference masks, in both"

Row = dict[str, Any]
"""Row of comparison.csv: one metric of a region in one group of cases.

region is there only if both have zones. metric is one of `COMPARED`, better its better direction; num_patients_better, _equal
and _worse count patients in the other run. Pairs have subgroup, the name of an attribute, and group, its value, both `ALL` over
all cases; the fields of `PairedDifference`; and p_holm: p adjusted for all tests over all cases, None in subgroups, which are
exploratory. Settings are compared over all cases only, with the numbers of `NoiseFloor`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """cases.csv of one evaluation."""

    name: str
    """Shown in tables and figures, such as pipeline and run."""
    source: str
    """Run id or folder."""
    table: pd.DataFrame
    """Whole gland: index case_id, sorted; columns of cases.csv, attributes as text."""
    zones: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """The same table of each zone, by name."""

    @property
    def regions(self) -> dict[str, pd.DataFrame]:
        """Table of each region, the whole gland first."""
        return {WHOLE_GLAND: self.table, **self.zones}


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """Results of one setting, by the seed of its networks."""

    name: str
    """Shown in tables and figures."""
    source: str
    """Run id or folder, with the setting if a sweep has several."""
    by_seed: Mapping[int | None, Results]
    """At least one; the seed of a single evaluation is unknown, None."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings that differ from those of other trials of the sweep."""

    @classmethod
    def of(cls, results: Results) -> "Repeats":
        """Return a single evaluation as the repeats of a setting."""
        return cls(name=results.name, source=results.source, by_seed={None: results})

    @property
    def results(self) -> list[Results]:
        """Return the results, in the order of the seeds."""
        return list(self.by_seed.values())

    @property
    def table(self) -> pd.DataFrame:
        """Return cases.csv of the first seed; all seeds have its cases."""
        return self.results[0].table

    @property
    def seeds_text(self) -> str:
        """Return the seeds for a line of a table."""
        return "one seed" if len(self.by_seed) == 1 else f"seeds {', '.join(map(str, self.by_seed))}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Comparison of single evaluations, or of settings with several seeds."""

    baseline: Repeats
    other: Repeats
    rows: list[Row]
    """By region, the whole gland first: all cases, then the subgroups."""
    notes: list[str]
    """Limitations of the numbers."""
    floors: dict[str, NoiseFloor] = field(default_factory=dict)
    """Noise floor of Dice, by region; empty for single evaluations."""

    @property
    def full_rows(self) -> list[Row]:
        """Rows with region, subgroup and group."""
        return [{"region": WHOLE_GLAND, "subgroup": ALL, "group": ALL, **row} for row in self.rows]

    def as_dict(self) -> dict[str, Any]:
        """Return an entry of comparison.json."""
        entry: dict[str, Any] = {}
        for name, side in (("baseline", self.baseline), ("other", self.other)):
            seeds = {"seeds": list(side.by_seed)} if self.floors else {}
            entry[name] = {"name": side.name, "source": side.source, **seeds}
        entry |= {"notes": self.notes, "rows": self.rows}
        floors = {region: asdict(floor) for region, floor in self.floors.items()}
        return entry | ({"noise_floor": floors} if floors else {})


def parse_results(text: str, *, name: str, source: str) -> Results:
    """Parse the text of a cases.csv; refuse one of an older version, or with several rows of a case and region."""
    numeric = [*SUMMARY_METRICS, "volume_reference_ml"]
    try:
        table = pd.read_csv(StringIO(text), dtype=str, keep_default_na=False)
        missing = [column for column in ("case_id", "fold", *EQUAL_COLUMNS, *numeric) if column not in table]
        if not missing:
            table[numeric] = table[numeric].replace("", "nan").astype(float)  # exact, unlike read_csv's own parser
            if np.isinf(table[numeric]).any(axis=None):
                raise ValueError("values must be finite, got inf")
    except ValueError as error:
        raise InputError(f"{name}: cases.csv cannot be read: {error}\nRun stage=evaluate again.") from error
    if missing:
        raise InputError(
            f"{name}: its cases.csv has no {', '.join(missing)}: an older version wrote it\n"
            "Run stage=evaluate again: both results need the same columns."
        )
    regions = by_region(table)
    for rows in regions.values():
        if repeated := rows["case_id"][rows["case_id"].duplicated()].unique().tolist():
            raise InputError(
                f"{name}: must have one row per case, has several of {listed(repeated, most=MAX_NUM_NAMED)}"
            )
    indexed = {region: rows.set_index("case_id").sort_index() for region, rows in regions.items()}
    return Results(name=name, source=source, table=indexed.pop(WHOLE_GLAND), zones=indexed)


def require_same_cases(baseline: Results, other: Results) -> None:
    """Raise an `InputError` that lists all disagreements, unless both evaluations have the same images and references."""
    a, b = baseline.table, other.table
    shared = a.index.intersection(b.index)
    found = {
        f"test cases of {baseline.name} only": a.index.difference(b.index).tolist(),
        f"test cases of {other.name} only": b.index.difference(a.index).tolist(),
    }
    a, b = a.loc[shared], b.loc[shared]
    found |= {words: shared[a[column] != b[column]].tolist() for column, words in EQUAL_COLUMNS.items()}
    for region in shared_regions(baseline, other):
        a_ml, b_ml = (one.regions[region].loc[shared, "volume_reference_ml"] for one in (baseline, other))
        volumes_differ = ~np.isclose(a_ml, b_ml, rtol=VOLUME_TOLERANCE, atol=0)
        setting = "data.whole_gland_labels" if region == WHOLE_GLAND else f"labels of {region}"
        found[f"another volume of the same reference (other {setting}?)"] = shared[
            volumes_differ & (a["mask_md5"] == b["mask_md5"])
        ].tolist()
    lines = [f"  {words}, {len(cases)}: {listed(cases, most=MAX_NUM_NAMED)}" for words, cases in found.items() if cases]
    if lines:
        raise InputError(
            "\n".join([f"{other.name} and {baseline.name} were not evaluated on the same data:", *lines])
            + "\nEvaluate both with the same data, fold and preprocess.crop settings."
        )


def shared_regions(baseline: Results, other: Results) -> list[str]:
    """Return the regions that both have, the whole gland first."""
    return [region for region in baseline.regions if region in other.regions]


def compared_values(table: pd.DataFrame) -> pd.DataFrame:
    """Return the columns `COMPARED` of a table with the metrics of its cases."""
    metrics = table[list(SUMMARY_METRICS)].copy()
    metrics[list(SIGNED)] = metrics[list(SIGNED)].abs()
    return metrics.set_axis(list(COMPARED), axis="columns")


def patient_counts(found: PairedDifference | NoiseFloor, metric: str) -> Row:
    """Return the numbers of patients that are better, equal and worse in the other run."""
    higher, lower = found.num_patients_higher, found.num_patients_lower
    better, worse = (lower, higher) if metric in LOWER_IS_BETTER else (higher, lower)
    equal = found.num_patients - higher - lower
    return {"num_patients_better": better, "num_patients_equal": equal, "num_patients_worse": worse}
