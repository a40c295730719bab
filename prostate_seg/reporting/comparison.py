"""How two results on the same cases differ: what must be equal before they are compared, the numbers, and a table.

A table has one row per case, as evaluation/cases.csv. A difference is other minus baseline. Of the signed volume
differences the sizes are compared, so that of every metric one direction is better. Nothing here reads files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import StringIO
from itertools import chain
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd

from prostate_seg.common.errors import InputError
from prostate_seg.data.attributes import RESERVED
from prostate_seg.reporting.results import SUMMARISED
from prostate_seg.reporting.subgroups import subgroups
from prostate_seg.segmentation.statistics import PairedDifference, holm, paired_difference

SIGNED = ("volume_difference_ml", "volume_difference_percent")
"""Metrics of which 0 is best; their sizes are compared."""

COMPARED = tuple(f"abs_{name}" if name in SIGNED else name for name in SUMMARISED)
"""Metrics of the main table."""

BY_SUBGROUP = ("dice", "hd95_mm", "abs_volume_difference_percent")
"""Metrics that are compared in every subgroup too."""

LOWER_IS_BETTER = frozenset({"hd95_mm", "assd_mm", *(f"abs_{name}" for name in SIGNED)})
"""Of all others more is better."""

ALL = "all"
"""Subgroup and group of the rows of all cases."""

EQUAL_COLUMNS = {
    "mask_md5": "another reference (mask_md5)",
    "image_md5": "another image (image_md5)",
    "patient_id": "another patient (patient_id)",
    "oracle_crop": "an oracle crop on one side alone (oracle_crop)",
}
"""Columns in which the tables of two runs must agree, case by case, and what it is when they do not."""

VOLUME_TOLERANCE = 1e-6
"""Reference volumes of one mask that differ by more than this part were made of other labels."""

MAX_NUM_NAMED = 10
"""Case ids that a refusal lists of a kind."""

LINE_CHARACTERS = 117
"""Width of the table for a terminal."""

FEW_PATIENTS = 20
"""Of fewer patients, percentile intervals hold the truth too seldom: in a simulation in 92% at 20 patients, 84% at 5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What one run came to, case by case."""

    name: str
    """For people, such as pipeline and run."""
    source: str
    """Run id or folder: where the table is from."""
    table: pd.DataFrame
    """Index case_id, sorted; columns of cases.csv; attributes are text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric in one group of cases."""

    subgroup: str
    """Name of an attribute, or `ALL`."""
    group: str
    """Its value in these cases, or `ALL`."""
    metric: str
    """One of `COMPARED`."""
    paired: PairedDifference
    p_holm: float | None = None
    """p adjusted for all tests of the main tables; None in subgroups, which only explore."""

    @property
    def lower_is_better(self) -> bool:
        """Return whether less of the metric is better."""
        return self.metric in LOWER_IS_BETTER

    @property
    def patients(self) -> tuple[int, int, int]:
        """Return how many patients are better, equal and worse in the other run."""
        higher, lower = self.paired.num_patients_higher, self.paired.num_patients_lower
        better, worse = (lower, higher) if self.lower_is_better else (higher, lower)
        return better, self.paired.num_patients - higher - lower, worse

    def as_dict(self) -> dict[str, Any]:
        """Return a row of comparison.csv."""
        better, equal, worse = self.patients
        return {
            "subgroup": self.subgroup,
            "group": self.group,
            "metric": self.metric,
            "better": "lower" if self.lower_is_better else "higher",
            **self.paired.as_dict(),
            "num_patients_better": better,
            "num_patients_equal": equal,
            "num_patients_worse": worse,
            "p_holm": self.p_holm,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One run against the baseline."""

    baseline: Results
    other: Results
    rows: list[Row]
    """All cases first, then the subgroups."""
    notes: list[str]
    """What a reader must know beside the numbers."""

    def as_dict(self) -> dict[str, Any]:
        """Return an entry of comparison.json."""
        return {
            "baseline": {"name": self.baseline.name, "source": self.baseline.source},
            "other": {"name": self.other.name, "source": self.other.source},
            "notes": self.notes,
            "rows": [row.as_dict() for row in self.rows],
        }


def parse_results(text: str, *, name: str, source: str, may_lack: Sequence[str] = ()) -> Results:
    """Read the text of a cases.csv.

    Args:
        text: The table.
        name: For people, such as pipeline and run.
        source: Run id or folder.
        may_lack: Metrics that are NaN where an older version wrote the table.

    Raises:
        InputError: If it is no such table, has a case twice, or an older version wrote it.
    """
    try:
        table = pd.read_csv(StringIO(text), dtype=str, keep_default_na=False)
        for column in set(may_lack) - set(table.columns):
            table[column] = ""
        _require_columns(table, name)
        for column in (*SUMMARISED, "volume_reference_ml"):
            table[column] = [_number(value) for value in table[column]]
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{name}: cases.csv cannot be read: {error}\nRun stage=evaluate again.") from error
    repeated = table["case_id"][table["case_id"].duplicated()].unique().tolist()
    if repeated:
        raise InputError(f"{name}: must have one row per case, has several of {_listed(repeated)}")
    return Results(name=name, source=source, table=table.set_index("case_id").sort_index())


def _require_columns(table: pd.DataFrame, name: str) -> None:
    needed = ("case_id", "fold", *EQUAL_COLUMNS, "volume_reference_ml", *SUMMARISED)
    missing = [column for column in needed if column not in table.columns]
    if missing:
        raise InputError(
            f"{name}: its cases.csv has no {', '.join(missing)}: an older version wrote it\n"
            "Run stage=evaluate again: both results need the same columns."
        )


def _number(text: str) -> float:
    """Return a number, NaN of an empty cell; exact, which pandas' own reader is not."""
    value = float(text or "nan")
    if np.isinf(value):
        raise ValueError(f"values must be finite, got {text}")
    return value


def compare(baseline: Results, others: Sequence[Results], *, num_bootstrap: int, seed: int) -> list[Comparison]:
    """Compare each of some results with the baseline.

    Args:
        baseline: What the others are measured against.
        others: Results on the same cases.
        num_bootstrap: Bootstrap samples behind each interval.
        seed: Seed of the draws.

    Raises:
        InputError: If cases, references, images, patients or crops differ, or there are fewer than two patients.
    """
    for other in others:
        require_same_cases(baseline, other)
    if baseline.table["patient_id"].nunique() < 2:
        raise InputError(f"{baseline.name}: must have two patients or more: one says nothing about others")
    rows = [_rows(baseline, other, num_bootstrap=num_bootstrap, seed=seed) for other in others]
    adjusted = iter(holm([row.paired.p_wilcoxon for part in rows for row in part if row.subgroup == ALL]))
    rows = [[replace(row, p_holm=next(adjusted)) if row.subgroup == ALL else row for row in part] for part in rows]
    return [
        Comparison(baseline=baseline, other=other, rows=part, notes=_notes(baseline, other, part))
        for other, part in zip(others, rows, strict=True)
    ]


def require_same_cases(baseline: Results, other: Results) -> None:
    """Check that two results are of the same images and references.

    Raises:
        InputError: If not; the text lists how they differ.
    """
    a, b = baseline.table, other.table
    shared = a.index.intersection(b.index)
    found = {
        f"test cases of {baseline.name} alone": a.index.difference(b.index).tolist(),
        f"test cases of {other.name} alone": b.index.difference(a.index).tolist(),
    }
    a, b = a.loc[shared], b.loc[shared]
    found |= {words: shared[a[column] != b[column]].tolist() for column, words in EQUAL_COLUMNS.items()}
    volumes_differ = ~np.isclose(a["volume_reference_ml"], b["volume_reference_ml"], rtol=VOLUME_TOLERANCE, atol=0)
    found["another volume of the same reference (other data.whole_gland_labels?)"] = shared[
        volumes_differ & (a["mask_md5"] == b["mask_md5"])
    ].tolist()
    lines = [f"  {words}, {len(cases)}: {_listed(cases)}" for words, cases in found.items() if cases]
    if lines:
        raise InputError(
            "\n".join([f"{other.name} and {baseline.name} were not measured on the same:", *lines])
            + "\nEvaluate both with the same data, fold and preprocess.crop settings."
        )


def _listed(cases: Sequence[str]) -> str:
    more = len(cases) - MAX_NUM_NAMED
    return ", ".join(cases[:MAX_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def _rows(baseline: Results, other: Results, *, num_bootstrap: int, seed: int) -> list[Row]:
    """Return a row per metric of all cases, then a row per metric and group of cases."""
    a, b = compared_values(baseline), compared_values(other)
    patients = baseline.table["patient_id"]

    def row(subgroup: str, group: str, metric: str, cases: pd.Index) -> Row:
        paired = paired_difference(
            a.loc[cases, metric].to_numpy(),
            b.loc[cases, metric].to_numpy(),
            patients=patients.loc[cases].tolist(),
            num_bootstrap=num_bootstrap,
            seed=seed,
        )
        return Row(subgroup=subgroup, group=group, metric=metric, paired=paired)

    rows = [row(ALL, ALL, metric, a.index) for metric in COMPARED]
    for name, groups in subgroups(_joined(baseline, other)).items():
        for group, cases in sorted(groups.groupby(groups).groups.items()):
            rows += [row(name, str(group), metric, cases) for metric in BY_SUBGROUP]
    return rows


def compared_values(results: Results) -> pd.DataFrame:
    """Return the values of `COMPARED` by case, float64."""
    values = results.table[list(SUMMARISED)].copy()
    values[list(SIGNED)] = values[list(SIGNED)].abs()
    return values.set_axis(list(COMPARED), axis="columns")


def _joined(baseline: Results, other: Results) -> pd.DataFrame:
    """Return the baseline's table with the attributes that the other one alone has."""
    added = other.table.columns.difference(baseline.table.columns, sort=False)
    return baseline.table.join(other.table[added])


def _notes(baseline: Results, other: Results, rows: Sequence[Row]) -> list[str]:
    a, b = baseline.table, other.table.loc[baseline.table.index]
    notes = []
    if (a["oracle_crop"] == "True").any():
        notes.append("ORACLE CROP: the window was placed with the reference, in both")
    if a["patient_id"].nunique() < FEW_PATIENTS:
        notes.append(f"fewer than {FEW_PATIENTS} patients: the intervals are narrower than 95% ones should be")
    moved = int((a["fold"] != b["fold"]).sum())
    if moved:
        notes.append(f"{moved} of {len(a)} cases were tested in another fold, by networks trained on other patients")
    for name in a.columns.intersection(b.columns).difference(sorted(RESERVED)):
        if (a[name] != b[name]).any():
            notes.append(f"{name} differs in {(a[name] != b[name]).sum()} of {len(a)} cases; a's is used")
    main = [row for row in rows if row.subgroup == ALL]
    notes += [
        f"cases without {row.metric} in a or b, left out: {row.paired.num_missing}"
        for row in main
        if row.paired.num_missing
    ]
    for reason in sorted({row.paired.no_p for row in main if row.paired.no_p}):
        notes.append(f"no p, {reason}: {', '.join(row.metric for row in main if row.paired.no_p == reason)}")
    return notes


def comparison_lines(comparison: Comparison) -> list[str]:
    """Return the comparison as lines that fit a terminal."""
    table = comparison.baseline.table
    lines = [
        f"a  {_cut(comparison.baseline.name, 100)} (baseline)",
        f"b  {_cut(comparison.other.name, 100)}",
        f"{len(table)} cases of {table['patient_id'].nunique()} patients; b/=/a counts patients that are better in b, "
        "equal, better in a",
        f"{'':<32}{'better':<6}{'a':>9}{'b':>9}{'b - a':>9}   {'95% CI of b - a':<20}{'b/=/a':>11}{'p':>9}{'p Holm':>9}",
    ]
    heading = (ALL, ALL)
    for row in comparison.rows:
        if (row.subgroup, row.group) != heading:
            heading = (row.subgroup, row.group)
            lines.append(f"{_cut(row.subgroup, 40)} = {_cut(row.group, 40)}; patients: {row.paired.num_patients}")
        lines.append(_line(row))
    lines += [
        "p: Wilcoxon signed-rank test over patients; p Holm: adjusted for all tests of all cases; subgroups explore"
    ]
    notes = [wrap(f"note: {note}", LINE_CHARACTERS, subsequent_indent=" " * 6) for note in comparison.notes]
    return [*lines, *chain.from_iterable(notes)]


def _line(row: Row) -> str:
    paired = row.paired
    metric = row.metric if row.subgroup == ALL else f"  {row.metric}"
    interval = "-" if paired.ci95_low is None else f"{paired.ci95_low:+.3f} to {paired.ci95_high:+.3f}"
    means = "".join(_shown(value, ".3f") for value in (paired.mean_baseline, paired.mean_other))
    return (
        f"{metric:<32}{'lower' if row.lower_is_better else 'higher':<6}{means}{_shown(paired.difference, '+.3f')}"
        f"   {interval:<20}{'/'.join(map(str, row.patients)):>11}{_p(paired.p_wilcoxon)}{_p(row.p_holm)}"
    )


def _shown(value: float | None, form: str) -> str:
    return ("-" if value is None else format(value, form)).rjust(9)


def _p(value: float | None) -> str:
    return f"{'<0.0001':>9}" if value is not None and value < 0.0001 else _shown(value, ".4f")


def _cut(text: str, longest: int) -> str:
    """Return the end of a text that is too long: of paths it tells more than the start."""
    return text if len(text) <= longest else f"...{text[3 - longest :]}"
