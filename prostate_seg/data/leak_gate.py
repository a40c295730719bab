"""Leak gate: refuses folds whose subsets share a patient, a file, or duplicate or near-duplicate images.

A case may be known by its name alone, by its files, or by its preprocessing; a check without the values that it compares is
reported as not run. Nothing here reads files.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import combinations
from typing import Any

import numpy as np

from prostate_seg.common.errors import InputError, listed
from prostate_seg.common.suggestions import closest
from prostate_seg.data.dataset import CaseRecord
from prostate_seg.data.folds import Fold
from prostate_seg.imaging.fingerprint import near_duplicates

SHOWN_LEAKS = 20
"""Leaks listed in the error; the rest are counted."""
OVERRULE = (
    "Near-identical images that are no copies: name the pair and the reason in every stage, such as "
    "'fold.not_duplicates=[\"10001_1/10002_1: two patients according to the register\"]'."
)
"""The next step for a pair of different patients whose thumbnails are near-duplicates."""

ANCESTOR = "ancestor-"
"""Start of the name of a study that initial weights were trained on; the start of its hash follows."""

NotDuplicates = Mapping[frozenset[str], str]
"""Pairs of case ids that are no duplicates, each with the reason."""


class Check(Enum):
    """The checks, in order of precedence: a pair is reported under the first check that finds it."""

    case = "case in two parts"
    patient = "patient overlap"
    image_file = "identical image files"
    voxels = "identical voxels"
    near_duplicate = "near-identical images"
    mask_file = "identical mask files"
    intensities = "intensities from outside the study"
    oracle_crop = "oracle crop"


SHARED = {
    Check.patient: "patient_id",
    Check.image_file: "image_md5",
    Check.voxels: "voxels_sha1",
    Check.mask_file: "mask_md5",
}
"""Attribute of `Fingerprint` that no two subsets may share, by check."""
NEEDED = SHARED | {
    Check.near_duplicate: "thumbnail",
    Check.intensities: "own_intensities",
    Check.oracle_crop: "oracle_crop",
}
"""Attribute of `Fingerprint` that a check needs, by check."""
NEXT_STEPS = {
    "Keep all studies of a patient in one part: stage=prepare does, with data.patient_pattern as it is.": (
        Check.case,
        Check.patient,
    ),
    "Copies: list one of each pair under data.exclude; if they are one patient, give both one patient id (file names, "
    "data.patient_pattern); run stage=preprocess and stage=prepare again.": (
        *(Check.image_file, Check.voxels, Check.near_duplicate, Check.mask_file),
    ),
    OVERRULE: (Check.near_duplicate,),
    "Run stage=preprocess again: it scales each study by its own percentiles.": (Check.intensities,),
    "Use preprocess.crop=center: the reference is not there at inference.": (Check.oracle_crop,),
}
"""Checks whose leaks a next step resolves."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fingerprint:
    """Values of a case that the leak gate compares; None where unknown."""

    patient_id: str
    image_md5: str | None = None
    mask_md5: str | None = None
    voxels_sha1: str | None = None
    thumbnail: np.ndarray | None = None
    """See `fingerprint.thumbnail`."""
    oracle_crop: bool | None = None
    """Whether the network's window was placed with the reference."""
    own_intensities: bool | None = None
    """Whether preprocessing this study alone reproduces the preprocessed image."""

    def shared_with(self, other: "Fingerprint") -> list[str]:
        """Return the checks, other than for near-duplicates, that find this pair."""
        return [
            check.value
            for check, attribute in SHARED.items()
            if getattr(self, attribute) is not None and getattr(self, attribute) == getattr(other, attribute)
        ]


def fingerprints_of(dataset: Mapping[str, CaseRecord], thumbnails: Mapping[str, np.ndarray]) -> dict[str, Fingerprint]:
    """Return the fingerprints of a preprocessed data set, by case id."""
    return {
        case_id: Fingerprint(
            **{attribute: getattr(record, attribute) for attribute in SHARED.values()},
            thumbnail=thumbnails[case_id],
            oracle_crop=record.oracle_crop,
        )
        for case_id, record in dataset.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """Two cases in different subsets of a fold that share a value, or a single case that fails a check in any fold."""

    check: Check
    first: str
    second: str | None = None
    fold_index: int | None = None
    detail: str = ""
    """The shared patient id, or the correlation of the thumbnails."""

    def __str__(self) -> str:
        where = "" if self.fold_index is None else f"fold {self.fold_index}: "
        detail = f" ({self.detail})" if self.detail else ""
        return f"{where}{self.check.value}{detail}: {self.first}" + (f" and {self.second}" if self.second else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Result of the leak gate."""

    leaks: list[Leak]
    num_cases: int
    num_unknown: Mapping[Check, int]
    """Cases without the value that a check compares, by check."""
    overruled: Mapping[frozenset[str], str]
    """Near-duplicates that fold.not_duplicates lets pass, with correlation and reason in words, by pair."""

    def found(self, check: Check) -> list[Leak]:
        """Return the leaks of one check."""
        return [leak for leak in self.leaks if leak.check is check]

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict in words, the outcome of every check and the overruled pairs, ready for JSON."""
        num = len(self.overruled)
        note = f" ({num} pair{'s' if num > 1 else ''} overruled)" if num else ""
        checks = {}
        for check in Check:
            leaks, num_unknown = self.found(check), self.num_unknown.get(check, 0)
            if leaks:
                checks[check.value] = f"{len(leaks)} {'pairs' if leaks[0].second else 'cases'}"
            elif num_unknown == self.num_cases:
                checks[check.value] = "not run"
            elif num_unknown:
                checks[check.value] = f"passed on {self.num_cases - num_unknown} of {self.num_cases} cases"
            else:
                checks[check.value] = "passed"
        checks[Check.near_duplicate.value] += note
        failed = ", ".join(check.value for check in Check if self.found(check))
        return {
            "verdict": (f"leaks: {failed}" if failed else "passed") + note,
            "checks": checks,
            "overruled": list(self.overruled.values()),
        }


def find_leaks(
    folds: Sequence[Fold],
    *,
    fingerprints: Mapping[str, Fingerprint],
    not_duplicates: NotDuplicates | None = None,
    new: Collection[str] | None = None,
) -> Verdict:
    """Compare the subsets of each fold, and check each case; a pair of a fold is reported by the first check that finds it.

    Near-duplicate pairs in `not_duplicates` are no leak unless they share another value as well. With `new`, near-duplicates
    are searched only among the pairs that one of these cases is in.
    """
    reasons = not_duplicates or {}
    cases = {case_id: fingerprints[case_id] for case_id in case_ids_of(folds)}
    thumbnails = {case_id: case.thumbnail for case_id, case in cases.items() if case.thumbnail is not None}
    near, overruled = {}, {}
    for pair, correlation in near_duplicates(thumbnails, new=new).items():
        reason = reasons.get(frozenset(pair))
        if reason is None or cases[pair[0]].shared_with(cases[pair[1]]):
            near[pair] = correlation
        else:
            overruled[frozenset(pair)] = f"{pair[0]} and {pair[1]} (correlation {correlation:.2f}): {reason}"
    leaks = [leak for index, fold in enumerate(folds) for leak in _leaks_of_fold(fold, index, cases=cases, near=near)]
    leaks += [Leak(check=Check.intensities, first=name) for name, one in cases.items() if one.own_intensities is False]
    leaks += [Leak(check=Check.oracle_crop, first=name) for name, one in cases.items() if one.oracle_crop]
    num_unknown = {
        check: sum(getattr(case, attribute) is None for case in cases.values()) for check, attribute in NEEDED.items()
    }
    return Verdict(leaks=leaks, num_cases=len(cases), num_unknown=num_unknown, overruled=overruled)


def _leaks_of_fold(
    fold: Fold, fold_index: int, *, cases: Mapping[str, Fingerprint], near: Mapping[tuple[str, str], float]
) -> list[Leak]:
    members = [(subset, case_id) for subset, case_ids in fold.subsets().items() for case_id in case_ids]
    found: dict[tuple[tuple[str, str], tuple[str, str]], Leak] = {}

    def report(check: Check, group: Sequence[tuple[str, str]], detail: str = "") -> None:
        """Add a leak for each pair of a group that lies in two subsets and has none yet."""
        for first, second in combinations(group, 2):
            if first[0] != second[0] and (first, second) not in found:
                one, other = (f"{case_id} ({subset})" for subset, case_id in (first, second))
                found[first, second] = Leak(check=check, fold_index=fold_index, first=one, second=other, detail=detail)

    for check in Check:
        if check is Check.near_duplicate:
            for pair, correlation in near.items():
                group = [member for member in members if member[1] in pair]
                report(check, group, f"correlation {correlation:.2f}")
        elif check is Check.case or check in SHARED:
            by_value: dict[str | None, list[tuple[str, str]]] = defaultdict(list)
            for member in members:
                value = member[1] if check is Check.case else getattr(cases[member[1]], SHARED[check])
                by_value[value].append(member)
            by_value.pop(None, None)
            for value, group in by_value.items():
                report(check, group, str(value) if check is Check.patient else "")
    return list(found.values())


def case_ids_of(folds: Sequence[Fold]) -> list[str]:
    """Return the ids of all cases that some folds list, sorted."""
    return sorted({case_id for fold in folds for subset in fold.subsets().values() for case_id in subset})


def unused_pairs(
    not_duplicates: NotDuplicates, *, fingerprints: Mapping[str, Fingerprint], verdict: Verdict
) -> list[str]:
    """Return, for each pair of fold.not_duplicates that overruled nothing, the pair and the cause; none with an ancestor."""
    lines = []
    for pair in (sorted(pair) for pair in not_duplicates if pair not in verdict.overruled):
        if any(case_id.startswith(ANCESTOR) for case_id in pair):
            continue
        unknown = [case_id for case_id in pair if case_id not in fingerprints]
        if unknown:
            near = closest(unknown[0], sorted(fingerprints))
            hint = f"; did you mean {near}?" if near else ""
            cause = f"{unknown[0]} is no case of this data set{hint}"
        elif len(pair) < 2:
            cause = "a pair is two cases, and this is one"
        elif shared := fingerprints[pair[0]].shared_with(fingerprints[pair[1]]):
            cause = f"they share more than near-identical images ({', '.join(shared)}), which no setting overrules"
        else:
            cause = "their images are not near-identical; remove the pair"
        lines.append(f"{'/'.join(pair)}: {cause}")
    return lines


def stop_on_leaks(
    folds: Sequence[Fold],
    *,
    fingerprints: Mapping[str, Fingerprint],
    allowed: Collection[Check] = (),
    not_duplicates: NotDuplicates | None = None,
) -> Verdict:
    """Return the verdict of `find_leaks`.

    Raises:
        InputError: If it has a leak of a check that is not `allowed`, or a fold lists a case that is not in the data set.
    """
    unknown = [case_id for case_id in case_ids_of(folds) if case_id not in fingerprints]
    if unknown:
        raise InputError(
            f"kfold.json names {len(unknown)} cases that dataset.csv does not have: {listed(unknown, most=10)}\n"
            "Run stage=prepare again."
        )
    verdict = find_leaks(folds, fingerprints=fingerprints, not_duplicates=not_duplicates)
    leaks = [leak for leak in verdict.leaks if leak.check not in allowed]
    if leaks:
        raise InputError(f"the folds leak:\n  {listing(leaks)}\n{next_step(leaks)}")
    return verdict


def listing(leaks: Sequence[Leak]) -> str:
    """Return the first leaks, a line each, and the number of the others."""
    more = [f"and {len(leaks) - SHOWN_LEAKS} more"] if len(leaks) > SHOWN_LEAKS else []
    return "\n  ".join([*(str(leak) for leak in leaks[:SHOWN_LEAKS]), *more])


def next_step(leaks: Sequence[Leak]) -> str:
    """Return the next step for each kind of leak that was found."""
    found = {leak.check for leak in leaks}
    return "\n".join(step for step, checks in NEXT_STEPS.items() if found.intersection(checks))
