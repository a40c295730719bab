"""Stops a run whose parts share what they must not share, and says of every check whether it passed.

A case may be known by its name alone, by its files, or by what preprocessing saw of it; a check for which too little is known
says so. Nothing here reads files.
"""

import difflib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from prostate_seg.common.errors import InputError
from prostate_seg.data.dataset import CaseRecord
from prostate_seg.data.folds import Fold
from prostate_seg.imaging.fingerprint import near_duplicates

SHOWN_LEAKS = 20
"""Leaks written out in the error; the rest are counted."""


OVERRULE = (
    "Near-identical images that are no copies: name the pair and the reason in every stage, such as "
    "'fold.not_duplicates=[\"10001_1/10002_1: two patients, says the register\"]'."
)
"""The next step for a pair that the thumbnails mistake."""


class Check(Enum):
    """What is looked for, in the order in which a pair is named by one of them."""

    case = "case in two parts"
    patient = "patient overlap"
    image_file = "identical image files"
    voxels = "identical voxels"
    picture = "near-identical images"
    mask_file = "identical mask files"
    intensities = "intensities from outside the study"
    oracle_crop = "oracle crop"


SHARED = {
    Check.patient: "patient_id",
    Check.image_file: "image_md5",
    Check.voxels: "voxels_sha1",
    Check.mask_file: "mask_md5",
}
"""Checks for a value that no two parts may share."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fingerprint:
    """What the leak gate compares of a case; None where it is not known."""

    patient_id: str
    image_md5: str | None = None
    mask_md5: str | None = None
    voxels_sha1: str | None = None
    """Of the decoded image."""
    thumbnail: np.ndarray | None = None
    """See `imaging.fingerprint`."""
    oracle_crop: bool | None = None
    """Whether the network's window was placed with the reference."""
    own_intensities: bool | None = None
    """Whether the preprocessed image can be made again from this study alone."""


def fingerprints_of(dataset: Mapping[str, CaseRecord], thumbnails: Mapping[str, np.ndarray]) -> dict[str, Fingerprint]:
    """Return the fingerprints of a preprocessed data set, by case id."""
    return {
        case_id: Fingerprint(
            patient_id=record.patient_id,
            image_md5=record.image_md5,
            mask_md5=record.mask_md5,
            voxels_sha1=record.voxels_sha1,
            thumbnail=thumbnails[case_id],
            oracle_crop=record.oracle_crop,
        )
        for case_id, record in dataset.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """Two cases in different parts of a fold that share something; or a case, of any fold, that holds what it must not."""

    check: Check
    first: str
    second: str | None = None
    fold_index: int | None = None
    detail: str = ""
    """What is shared, when it has a name."""

    def __str__(self) -> str:
        where = "" if self.fold_index is None else f"fold {self.fold_index}: "
        detail = f" ({self.detail})" if self.detail else ""
        return f"{where}{self.check.value}{detail}: {self.first}" + (f" and {self.second}" if self.second else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Overruled:
    """A pair of near-identical images that a person says are no duplicates."""

    first: str
    second: str
    correlation: float
    reason: str

    def __str__(self) -> str:
        return f"{self.first} and {self.second} (correlation {self.correlation:.2f}): {self.reason}"


NotDuplicates = Mapping[frozenset[str], str]
"""The reason, by the case ids of a pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate found."""

    leaks: list[Leak]
    num_cases: int
    num_unknown: Mapping[Check, int]
    """Cases of which a check knew too little, by check."""
    overruled: list[Overruled]

    @property
    def text(self) -> str:
        """The verdict in a few words: passed, or the checks that found something, and how many pairs were overruled."""
        found = [check.value for check in Check if self.found(check)]
        return (f"leaks: {', '.join(found)}" if found else "passed") + self._num_overruled()

    def found(self, check: Check) -> list[Leak]:
        """Return the leaks of one check."""
        return [leak for leak in self.leaks if leak.check is check]

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict, the outcome of every check and the pairs that were overruled, ready for JSON."""
        checks = {check.value: self._outcome(check) for check in Check}
        checks[Check.picture.value] += self._num_overruled()
        return {"verdict": self.text, "checks": checks, "overruled": [str(pair) for pair in self.overruled]}

    def _num_overruled(self) -> str:
        num = len(self.overruled)
        return f" ({num} pair{'s' if num > 1 else ''} overruled)" if num else ""

    def _outcome(self, check: Check) -> str:
        found = self.found(check)
        if found:
            return f"{len(found)} {'pairs' if found[0].second else 'cases'}"
        num_unknown = self.num_unknown.get(check, 0)
        if num_unknown == self.num_cases:
            return "not run"
        return f"passed on {self.num_cases - num_unknown} of {self.num_cases} cases" if num_unknown else "passed"


def find_leaks(
    folds: Sequence[Fold], *, identities: Mapping[str, Fingerprint], not_duplicates: NotDuplicates | None = None
) -> Verdict:
    """Compare the parts of each fold, and look at each case.

    Args:
        folds: Case ids of the parts.
        identities: What is known of each case.
        not_duplicates: Pairs whose near-identical images are no leak. They still leak by what else they share.

    Returns:
        The leaks, each pair of a fold under the first check that finds it; none when the folds are clean.
    """
    listed = sorted({case_id for fold in folds for part in fold.parts().values() for case_id in part})
    cases = {case_id: identities[case_id] for case_id in listed}
    thumbnails = {case_id: case.thumbnail for case_id, case in cases.items() if case.thumbnail is not None}
    alike = near_duplicates(thumbnails)
    reasons = not_duplicates or {}
    overruled = [
        Overruled(first=pair[0], second=pair[1], correlation=correlation, reason=reasons[frozenset(pair)])
        for pair, correlation in alike.items()
        if frozenset(pair) in reasons and not _shared(*(cases[case_id] for case_id in pair))
    ]
    alike = {pair: value for pair, value in alike.items() if pair not in {(one.first, one.second) for one in overruled}}
    leaks = [leak for index, fold in enumerate(folds) for leak in _leaks_of_fold(fold, index, cases=cases, alike=alike)]
    for check, is_leak in (
        (Check.intensities, lambda case: case.own_intensities is False),
        (Check.oracle_crop, lambda case: case.oracle_crop is True),
    ):
        leaks += [Leak(check=check, first=case_id) for case_id, case in cases.items() if is_leak(case)]
    return Verdict(leaks=leaks, num_cases=len(cases), num_unknown=_num_unknown(cases), overruled=overruled)


def idle_pairs(not_duplicates: NotDuplicates, *, identities: Mapping[str, Fingerprint], verdict: Verdict) -> list[str]:
    """Return, for each pair that overruled nothing, the pair and why, in words."""
    done = {frozenset((one.first, one.second)) for one in verdict.overruled}
    return [_why_idle(sorted(pair), identities) for pair in not_duplicates if pair not in done]


def _why_idle(pair: Sequence[str], identities: Mapping[str, Fingerprint]) -> str:
    named = "/".join(pair)
    unknown = [case_id for case_id in pair if case_id not in identities]
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(identities), n=1)
        return f"{named}: {unknown[0]} is no case of this data set{f'; did you mean {near[0]}?' if near else ''}"
    if len(pair) < 2:
        return f"{named}: a pair is two cases, and this is one"
    if shared := _shared(*(identities[case_id] for case_id in pair)):
        return f"{named}: they share more than near-identical images ({', '.join(shared)}), which no setting overrules"
    return f"{named}: their images are not near-identical; remove the pair"


def _shared(one: Fingerprint, other: Fingerprint) -> list[str]:
    """Return the checks for a shared value that name both cases."""
    return [
        check.value
        for check, attribute in SHARED.items()
        if getattr(one, attribute) is not None and getattr(one, attribute) == getattr(other, attribute)
    ]


def stop_on_leaks(
    folds: Sequence[Fold],
    *,
    identities: Mapping[str, Fingerprint],
    allowed: Collection[Check] = (),
    not_duplicates: NotDuplicates | None = None,
) -> Verdict:
    """Raise if a fold leaks.

    Args:
        folds: Case ids of the parts.
        identities: What is known of each case of the data set.
        allowed: Checks whose finding is noted in the verdict and stops nothing.
        not_duplicates: See `find_leaks`.

    Raises:
        InputError: If `find_leaks` finds anything else, or a fold names a case that is not in the data set.
    """
    listed = {case_id for fold in folds for part in fold.parts().values() for case_id in part}
    unknown = sorted(listed - set(identities))
    if unknown:
        raise InputError(
            f"kfold.json names {len(unknown)} cases that dataset.csv does not have: {', '.join(unknown[:10])}\n"
            "Run stage=prepare again."
        )
    verdict = find_leaks(folds, identities=identities, not_duplicates=not_duplicates)
    leaks = [leak for leak in verdict.leaks if leak.check not in allowed]
    if leaks:
        raise InputError(f"the folds leak:\n  {listing(leaks)}\n{next_step(leaks)}")
    return verdict


def listing(leaks: Sequence[Leak]) -> str:
    """Return the first leaks, a line each, and how many more there are."""
    more = [f"and {len(leaks) - SHOWN_LEAKS} more"] if len(leaks) > SHOWN_LEAKS else []
    return "\n  ".join([*(str(leak) for leak in leaks[:SHOWN_LEAKS]), *more])


def next_step(leaks: Sequence[Leak]) -> str:
    """Say what to do about each kind of leak that was found."""
    found = {leak.check for leak in leaks}
    steps = []
    if found & {Check.case, Check.patient}:
        steps.append(
            "Keep all studies of a patient in one part: stage=prepare does, with data.patient_pattern as it is."
        )
    if found & {Check.image_file, Check.voxels, Check.picture, Check.mask_file}:
        steps.append(
            "Copies: list one of each pair under data.exclude; if they are one patient, give both one patient id (file names, "
            "data.patient_pattern); run stage=preprocess and stage=prepare again."
        )
    if Check.picture in found:
        steps.append(OVERRULE)
    if Check.intensities in found:
        steps.append("Run stage=preprocess again: it scales each study by its own percentiles.")
    if Check.oracle_crop in found:
        steps.append("Use preprocess.crop=center: the reference is not there at inference.")
    return "\n".join(steps)


def _leaks_of_fold(
    fold: Fold, index: int, *, cases: Mapping[str, Fingerprint], alike: Mapping[tuple[str, str], float]
) -> list[Leak]:
    members = [Member(part, case_id) for part, case_ids in fold.parts().items() for case_id in case_ids]
    found: dict[tuple[Member, Member], Leak] = {}
    for check in Check:
        for one, other, detail in _sharing(check, members, cases=cases, alike=alike):
            if one.part != other.part and (one, other) not in found:
                leak = Leak(check=check, fold_index=index, first=str(one), second=str(other), detail=detail)
                found[one, other] = leak
    return list(found.values())


class Member(NamedTuple):
    """A case in a part of a fold."""

    part: str
    case_id: str

    def __str__(self) -> str:
        return f"{self.case_id} ({self.part})"


def _sharing(
    check: Check,
    members: Sequence[Member],
    *,
    cases: Mapping[str, Fingerprint],
    alike: Mapping[tuple[str, str], float],
) -> Iterator[tuple[Member, Member, str]]:
    """Yield the pairs that share what the check looks for, with its name where it has one."""
    if check is Check.picture:
        for pair, correlation in alike.items():
            both = [member for member in members if member.case_id in pair]
            yield from ((one, other, f"correlation {correlation:.2f}") for one, other in combinations(both, 2))
        return
    groups: dict[str | None, list[Member]] = defaultdict(list)
    for member in members if check is Check.case or check in SHARED else []:
        shared = member.case_id if check is Check.case else getattr(cases[member.case_id], SHARED[check])
        groups[shared].append(member)
    for value, group in groups.items():
        if value is not None:
            name = value if check is Check.patient else ""
            yield from ((one, other, name) for one, other in combinations(group, 2))


def _num_unknown(cases: Mapping[str, Fingerprint]) -> dict[Check, int]:
    """Count the cases of which a check knows too little."""
    needed = SHARED | {
        Check.picture: "thumbnail",
        Check.intensities: "own_intensities",
        Check.oracle_crop: "oracle_crop",
    }
    return {
        check: sum(getattr(case, attribute) is None for case in cases.values()) for check, attribute in needed.items()
    }
