"""Stops a run whose parts share what they must not share: a patient, or an image file under two names."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from prostate_seg.data.folds import Fold
from prostate_seg.errors import InputError

SHOWN_LEAKS = 20
"""Leaks written out in the error; the rest are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseIdentity:
    """What tells whether two cases are the same person or the same picture."""

    patient_id: str
    image_md5: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """Two cases in different parts of a fold that share something."""

    fold_index: int
    kind: str
    first: str
    second: str

    def __str__(self) -> str:
        return f"fold {self.fold_index}: {self.kind}: {self.first} and {self.second}"


def find_leaks(folds: Sequence[Fold], *, identities: Mapping[str, CaseIdentity]) -> list[Leak]:
    """Compare the parts of each fold.

    Args:
        folds: Case ids of the parts.
        identities: Patient and file hash of each case.

    Returns:
        One entry per pair of cases, `patient overlap` or `identical image files`; empty when the folds are clean.
    """
    leaks = []
    for index, fold in enumerate(folds):
        for kind, attribute in (("patient overlap", "patient_id"), ("identical image files", "image_md5")):
            leaks += _pairs_across(
                fold,
                index,
                kind=kind,
                shared={case_id: getattr(identity, attribute) for case_id, identity in identities.items()},
            )
    return leaks


def stop_on_leaks(folds: Sequence[Fold], *, identities: Mapping[str, CaseIdentity]) -> None:
    """Raise if a fold leaks.

    Raises:
        InputError: If `find_leaks` finds any, or a fold names a case that is not in the data set.
    """
    listed = {case_id for fold in folds for part in fold.parts().values() for case_id in part}
    unknown = sorted(listed - set(identities))
    if unknown:
        raise InputError(
            f"kfold.json names {len(unknown)} cases that dataset.csv does not have: {', '.join(unknown[:10])}\n"
            "Run stage=prepare again."
        )
    leaks = find_leaks(folds, identities=identities)
    if leaks:
        more = f"\n  and {len(leaks) - SHOWN_LEAKS} more" if len(leaks) > SHOWN_LEAKS else ""
        raise InputError(
            f"the folds leak, {len(leaks)} pairs of cases:\n  "
            + "\n  ".join(str(leak) for leak in leaks[:SHOWN_LEAKS])
            + more
            + "\nKeep a patient in one part, list copies under data.exclude, and run stage=prepare again."
        )


def _pairs_across(fold: Fold, index: int, *, kind: str, shared: Mapping[str, str]) -> list[Leak]:
    """Pair the cases of different parts that share a value."""
    members: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for part, case_ids in fold.parts().items():
        for case_id in case_ids:
            members[shared[case_id]].append((part, case_id))
    return [
        Leak(fold_index=index, kind=kind, first=f"{a} ({part_a})", second=f"{b} ({part_b})")
        for group in members.values()
        for (part_a, a), (part_b, b) in combinations(group, 2)
        if part_a != part_b
    ]
