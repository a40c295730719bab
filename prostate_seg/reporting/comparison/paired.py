"""Paired comparison of evaluations on the same cases: requirements, differences with intervals and tests, and a table.

A difference is other minus baseline. Signed volume differences are compared by their absolute values, so that every metric has
one better direction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd

from prostate_seg.common.errors import InputError, listed
from prostate_seg.data.attributes import RESERVED
from prostate_seg.imaging.settings import WHOLE_GLAND
from prostate_seg.reporting.evaluation.tables import SUMMARY_METRICS, by_region
from prostate_seg.reporting.pages.report_tables import subgroups
from prostate_seg.segmentation.statistics import PairedDifference, holm, paired_difference
from prostate_seg.segmentation.variance import NoiseFloor

SIGNED = ("volume_difference_ml", "volume_difference_percent")
"""Metrics whose best value is 0."""

COMPARED = tuple(f"abs_{name}" if name in SIGNED else name for name in SUMMARY_METRICS)
"""Metrics compared over all cases."""

SUBGROUP_METRICS = ("dice", "hd95_mm", "abs_volume_difference_percent")
"""Metrics also compared in every subgroup."""

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

TABLE_HEADING = f"{'':<32}{'better':<6}{'a':>9}{'b':>9}{'b - a':>9}   {'95% CI of b - a':<20}{'b/=/a':>11}"

LINE_CHARACTERS = 117
"""Width of the table at the terminal."""

FEW_PATIENTS = 20
"""Below this number percentile intervals are too narrow: in a simulation 92% coverage at 20 patients, 84% at 5."""

ORACLE_CROP = "ORACLE CROP: windows were centred on the reference masks, in both"

ONE_SEED = (
    "one training of each: the intervals are for these networks and not for their settings, whose seeds are not compared; "
    "for that, sweep over seed: -m stage=train,evaluate seed=1,2,3"
)
"""Limitation of every comparison without repeats."""


Row = dict[str, Any]
"""Row of comparison.csv: one metric of a region in one group of cases.

region is there only if both have zones. subgroup is the name of an attribute and group its value, both `ALL` over all cases;
metric is one of `COMPARED`, better its better direction. Then the fields of `PairedDifference`, the numbers of patients that
are better, equal and worse in the other run, and p_holm: p adjusted for all tests over all cases, None in subgroups, which are
exploratory."""


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

    def as_dict(self) -> dict[str, Any]:
        """Return name and source for comparison.json."""
        return {"name": self.name, "source": self.source}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Comparison of one evaluation with the baseline."""

    baseline: Results
    other: Results
    rows: list[Row]
    """By region, the whole gland first: all cases, then the subgroups."""
    notes: list[str]
    """Limitations of the numbers."""

    def as_dict(self) -> dict[str, Any]:
        """Return an entry of comparison.json."""
        sides = {"baseline": self.baseline.as_dict(), "other": self.other.as_dict()}
        return {**sides, "notes": self.notes, "rows": self.rows}


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


def compare(baseline: Results, others: Sequence[Results], *, num_bootstrap: int, seed: int) -> list[Comparison]:
    """Compare evaluations on the same cases with the baseline, with intervals from a bootstrap over patients.

    Raises:
        InputError: If cases, references, images, patients or crops differ, or there are fewer than two patients.
    """
    for other in others:
        require_same_cases(baseline, other)
    if baseline.table["patient_id"].nunique() < 2:
        raise InputError(f"{baseline.name}: must have two patients or more to estimate the variation between patients")
    tables = [_compare_pair(baseline, other, num_bootstrap=num_bootstrap, seed=seed) for other in others]
    # Holm's adjustment covers the tests over all cases of all comparisons.
    tests = [row for rows in tables for row in rows if row["subgroup"] == ALL]
    for row, p_holm in zip(tests, holm([row["p_wilcoxon"] for row in tests]), strict=True):
        row["p_holm"] = p_holm
    return [
        Comparison(baseline=baseline, other=other, rows=rows, notes=_notes(baseline, other, rows))
        for other, rows in zip(others, tables, strict=True)
    ]


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


def _compare_pair(baseline: Results, other: Results, *, num_bootstrap: int, seed: int) -> list[Row]:
    """Return the rows of every region that both have."""
    regions, rows = shared_regions(baseline, other), []
    for region in regions:
        tables = baseline.regions[region], other.regions[region]
        column = {"region": region} if len(regions) > 1 else {}
        rows += [column | row for row in _compare_tables(*tables, num_bootstrap=num_bootstrap, seed=seed)]
    return rows


def _compare_tables(baseline: pd.DataFrame, other: pd.DataFrame, *, num_bootstrap: int, seed: int) -> list[Row]:
    """Return a row per metric over all cases, then a row per metric and group of cases."""
    a, b = map(compared_values, (baseline, other))
    patients = baseline["patient_id"]

    def row(subgroup: str, group: str, metric: str, cases: pd.Index) -> Row:
        paired = paired_difference(
            a.loc[cases, metric].to_numpy(),
            b.loc[cases, metric].to_numpy(),
            patients=patients.loc[cases].tolist(),
            num_bootstrap=num_bootstrap,
            seed=seed,
        )
        row = {"subgroup": subgroup, "group": group, "metric": metric, "better": better_direction(metric)}
        return {**row, **asdict(paired), **patient_counts(paired, metric), "p_holm": None}

    rows = [row(ALL, ALL, metric, a.index) for metric in COMPARED]
    # Attributes that only the other table has are subgroups too.
    added = other.columns.difference(baseline.columns, sort=False)
    for name, groups in subgroups(baseline.join(other[added])).items():
        for group, cases in sorted(groups.groupby(groups).groups.items()):
            rows += [row(name, str(group), metric, cases) for metric in SUBGROUP_METRICS]
    return rows


def better_direction(metric: str) -> str:
    """Return whether lower or higher values of a metric are better."""
    return "lower" if metric in LOWER_IS_BETTER else "higher"


def patient_counts(found: PairedDifference | NoiseFloor, metric: str) -> Row:
    """Return the numbers of patients that are better, equal and worse in the other run."""
    higher, lower = found.num_patients_higher, found.num_patients_lower
    better, worse = (lower, higher) if metric in LOWER_IS_BETTER else (higher, lower)
    equal = found.num_patients - higher - lower
    return {"num_patients_better": better, "num_patients_equal": equal, "num_patients_worse": worse}


def compared_values(table: pd.DataFrame) -> pd.DataFrame:
    """Return the columns `COMPARED` of a table with the metrics of its cases."""
    metrics = table[list(SUMMARY_METRICS)].copy()
    metrics[list(SIGNED)] = metrics[list(SIGNED)].abs()
    return metrics.set_axis(list(COMPARED), axis="columns")


def _notes(baseline: Results, other: Results, rows: Sequence[Row]) -> list[str]:
    a, b = baseline.table, other.table.loc[baseline.table.index]
    notes = [ORACLE_CROP] if (a["oracle_crop"] == "True").any() else []
    if a["patient_id"].nunique() < FEW_PATIENTS:
        notes.append(f"fewer than {FEW_PATIENTS} patients: the coverage of the intervals is below 95%")
    notes.append(ONE_SEED)
    moved = int((a["fold"] != b["fold"]).sum())
    if moved:
        notes.append(f"{moved} of {len(a)} cases were tested in another fold, by networks trained on other patients")
    for name in a.columns.intersection(b.columns).difference(sorted(RESERVED)):
        if (a[name] != b[name]).any():
            notes.append(f"{name} differs in {(a[name] != b[name]).sum()} of {len(a)} cases; the value of a is used")
    main = [row for row in rows if row["subgroup"] == ALL]
    for row in main:
        if row["num_missing"]:
            notes.append(f"cases without {_name_of(row)} in a or b, left out: {row['num_missing']}")
    for reason in sorted({row["no_p"] for row in main if row["no_p"]}):
        notes.append(f"no p, {reason}: {', '.join(_name_of(row) for row in main if row['no_p'] == reason)}")
    if alone := sorted(baseline.zones.keys() ^ other.zones.keys()):
        notes.append(f"in one of the two only, and not compared: {', '.join(alone)}")
    return notes


def _name_of(row: Row) -> str:
    """Return the metric of a row, with its zone as in the names of metrics."""
    region = row.get("region", WHOLE_GLAND)
    return str(row["metric"]) if region == WHOLE_GLAND else f"{region}/{row['metric']}"


def comparison_lines(comparison: Comparison) -> list[str]:
    """Return the comparison as lines for a terminal."""
    table = comparison.baseline.table
    lines = [
        f"a  {end_of(comparison.baseline.name, 100)} (baseline)",
        f"b  {end_of(comparison.other.name, 100)}",
        f"{len(table)} cases of {table['patient_id'].nunique()} patients; b/=/a: number of patients better in b, "
        "equal, better in a",
        f"{TABLE_HEADING}{'p':>9}{'p Holm':>9}",
    ]
    heading = (WHOLE_GLAND, ALL, ALL)
    for row in comparison.rows:
        region, *group = row.get("region", WHOLE_GLAND), row["subgroup"], row["group"]
        if region != heading[0]:
            lines.append(f"{region}:")
        if (region, *group) != heading and group != [ALL, ALL]:
            lines.append(f"{end_of(group[0], 40)} = {end_of(group[1], 40)}; patients: {row['num_patients']}")
        heading = (region, *group)
        name = row["metric"] if row["subgroup"] == ALL else f"  {row['metric']}"
        lines.append(row_text(row, name=name) + p_text(row["p_wilcoxon"]) + p_text(row["p_holm"]))
    lines.append(
        "p: Wilcoxon signed-rank test over patients; p Holm: adjusted for all tests over all cases; subgroups are "
        "exploratory"
    )
    return lines + note_lines(comparison.notes)


def row_text(row: Row, *, name: str) -> str:
    """Return the columns of `TABLE_HEADING` of a row."""
    means = number_text(row["mean_baseline"]) + number_text(row["mean_other"]) + number_text(row["difference"], "+.3f")
    interval = "-" if row["ci95_low"] is None else f"{row['ci95_low']:+.3f} to {row['ci95_high']:+.3f}"
    patients = "/".join(str(row[f"num_patients_{what}"]) for what in ("better", "equal", "worse"))
    return f"{name:<32}{row['better']:<6}{means}   {interval:<20}{patients:>11}"


def note_lines(notes: Sequence[str]) -> list[str]:
    """Return the limitations of a comparison as lines below its table."""
    return [line for note in notes for line in wrap(f"note: {note}", LINE_CHARACTERS, subsequent_indent=" " * 6)]


def number_text(value: float | None, form: str = ".3f") -> str:
    """Return a number for a column of nine characters; - for None."""
    return ("-" if value is None else format(value, form)).rjust(9)


def p_text(value: float | None) -> str:
    """Return a probability for a column of nine characters."""
    return f"{'<0.0001':>9}" if value is not None and value < 0.0001 else number_text(value, ".4f")


def end_of(text: str, max_characters: int) -> str:
    """Shorten a text to its end, the informative part of a path."""
    return text if len(text) <= max_characters else f"...{text[3 - max_characters :]}"
