"""Lineage of a trained network: the studies that it and its ancestors, the networks it started from, were trained on.

lineage.json and lineage.npz lie beside the weights and stay with them. A study is known by the hashes of its files and voxels
and by its thumbnail, and has no patient id.
"""

import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from prostate_seg.common.errors import InputError, listed
from prostate_seg.common.files import atomic_path, read_json, write_json
from prostate_seg.data.folds import Fold
from prostate_seg.data.leak_gate import ANCESTOR, Fingerprint, Leak, NotDuplicates, Verdict, find_leaks
from prostate_seg.imaging.fingerprint import THUMBNAIL_SHAPE, packed_thumbnails, unpacked_thumbnails

LINEAGE, THUMBNAILS = "lineage.json", "lineage.npz"
HASHES = ("image_md5", "mask_md5", "voxels_sha1")
CHECK = "studies of ancestors"
"""Name of the check in the verdict of the leak gate."""
UNKNOWN = "unknown"
"""First word of its outcome if the studies of an ancestor are not recorded."""

Studies = tuple[Fingerprint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ancestor:
    """A network whose weights another one started from."""

    weights_md5: str
    source: str
    """train.init as it was given."""
    version: str | None
    """Name and version of the registered model; None if it was in no registry."""
    run_id: str | None
    """Run that trained it, as far as it is known."""
    train: Studies | None = None
    val: Studies | None = None
    """Studies; None if they are not recorded."""

    def __str__(self) -> str:
        return f"{self.version or self.source} (weights {self.weights_md5[:8]})"

    @property
    def studies(self) -> Studies:
        """Train and val studies, as far as they are recorded."""
        return (self.train or ()) + (self.val or ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """Studies of a network, and its ancestors, the nearest first."""

    train: Studies
    val: Studies
    ancestors: tuple[Ancestor, ...] = ()


def as_ancestors(parent: Ancestor, lineage: Lineage | None) -> tuple[Ancestor, ...]:
    """Return a network with its studies and then its own ancestors; without a lineage its studies stay unknown."""
    if lineage is None:
        return (parent,)
    return (replace(parent, train=lineage.train, val=lineage.val), *lineage.ancestors)


def write_lineage(folder: Path, lineage: Lineage) -> None:
    """Write lineage.json, with each study once, and lineage.npz, with their thumbnails in the same order.

    `folder` is not in place yet (`atomic_folder`): a process killed between the two files leaves the former pair.
    """
    everyone = chain(lineage.train, lineage.val, *(ancestor.studies for ancestor in lineage.ancestors))
    studies = {_hashes(study): study for study in everyone}
    row_of = {hashes: row for row, hashes in enumerate(studies)}

    def rows(one: Lineage | Ancestor) -> dict[str, list[int] | None]:
        subsets = {"train": one.train, "val": one.val}
        return {
            name: None if group is None else [row_of[_hashes(study)] for study in group]
            for name, group in subsets.items()
        }

    facts = ("weights_md5", "source", "version", "run_id")
    ancestors = [{**{name: getattr(one, name) for name in facts}, **rows(one)} for one in lineage.ancestors]
    hashes = [dict(zip(HASHES, key, strict=True)) for key in studies]
    write_json(folder / LINEAGE, {"studies": hashes, **rows(lineage), "ancestors": ancestors})
    blank = np.zeros(THUMBNAIL_SHAPE, np.int8)
    thumbnails = [blank if study.thumbnail is None else study.thumbnail for study in studies.values()]
    with atomic_path(folder / THUMBNAILS) as temporary:
        np.savez_compressed(temporary, thumbnails=packed_thumbnails(thumbnails))


def _hashes(study: Fingerprint) -> tuple[str | None, ...]:
    return tuple(getattr(study, name) for name in HASHES)


def read_lineage(folder: Path) -> Lineage | None:
    """Return the lineage of the network in a folder; None if there is no lineage.json, as of an earlier version.

    Without lineage.npz the studies have no thumbnails.

    Raises:
        InputError: If the files are damaged.
    """
    if not (folder / LINEAGE).is_file():
        return None
    try:
        content = read_json(folder / LINEAGE)
        studies = [Fingerprint(patient_id="", **{name: row[name] for name in HASHES}) for row in content["studies"]]
        if (folder / THUMBNAILS).is_file():
            with np.load(folder / THUMBNAILS, allow_pickle=False) as file:
                pairs = zip(studies, unpacked_thumbnails(file["thumbnails"]), strict=True)
                studies = [replace(study, thumbnail=one if one.any() else None) for study, one in pairs]
        ancestors = [Ancestor(**{**one, **_subsets(one, studies)}) for one in content["ancestors"]]
        return Lineage(**_subsets(content, studies), ancestors=tuple(ancestors))
    except (OSError, EOFError, KeyError, IndexError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{folder / LINEAGE} or {THUMBNAILS} is damaged: {error}\nCopy both again with the weights, or train again."
        ) from error


def _subsets(values: Mapping[str, Any], studies: Sequence[Fingerprint]) -> dict[str, Any]:
    groups = {name: values[name] for name in ("train", "val")}
    return {name: None if rows is None else tuple(studies[row] for row in rows) for name, rows in groups.items()}


def studies_by_name(studies: Iterable[Fingerprint]) -> dict[str, Fingerprint]:
    """Return studies of ancestors, each once, by the names that they have in messages and in fold.not_duplicates."""
    names = {f"{ANCESTOR}{str(study.voxels_sha1 or study.image_md5)[:12]}": study for study in studies}
    return {name: replace(study, patient_id=name) for name, study in names.items()}


def find_ancestor_leaks(
    ancestors: Sequence[Ancestor],
    *,
    val: Sequence[str] = (),
    test: Sequence[str] = (),
    fingerprints: Mapping[str, Fingerprint],
    not_duplicates: NotDuplicates | None = None,
) -> Verdict:
    """Compare test cases with all studies of the ancestors, and val cases with those that their weights were fitted to.

    A val study of an ancestor may choose the epoch again: with the same folds, each continues without a leak.
    """
    fitted = studies_by_name(chain.from_iterable(one.train or () for one in ancestors))
    selecting = studies_by_name(chain.from_iterable(one.val or () for one in ancestors))
    cases = {name: replace(fingerprints[name], oracle_crop=None, own_intensities=None) for name in (*val, *test)}
    folds = [
        Fold(train=sorted(fitted), val=list(val), test=[]),
        Fold(train=sorted(fitted), val=sorted(selecting.keys() - fitted), test=list(test)),
    ]
    known = fitted | selecting | cases
    verdict = find_leaks(folds, fingerprints=known, not_duplicates=not_duplicates, new=list(cases))
    leaks = [leak for leak in verdict.leaks if not str(leak.second).startswith(ANCESTOR)]  # ancestors share studies
    overruled = {
        pair: text for pair, text in verdict.overruled.items() if any(one.startswith(ANCESTOR) for one in pair)
    }
    return replace(verdict, leaks=[replace(leak, fold_index=None) for leak in leaks], overruled=overruled)


def owners(leaks: Sequence[Leak], ancestors: Sequence[Ancestor]) -> list[str]:
    """Return a line for each study that leaks name: the nearest ancestor that was trained on it."""
    named = {leak.first.partition(" ")[0] for leak in leaks}
    owner: dict[str, Ancestor] = {}
    for ancestor in ancestors:
        owner = dict.fromkeys(studies_by_name(ancestor.studies), ancestor) | owner
    return [f"{name} is a study of {owner[name]}" for name in sorted(named & owner.keys())]


def outcome(ancestors: Sequence[Ancestor], *, num_overruled: int = 0) -> str:
    """Return the outcome of the check on ancestors without leaks, in words."""
    if unknown := list(dict.fromkeys(str(one) for one in ancestors if one.train is None)):
        return f"{UNKNOWN}: the studies of {listed(unknown)} are not recorded"
    studies = studies_by_name(chain.from_iterable(one.studies for one in ancestors))
    without = sum(study.thumbnail is None for study in studies.values())
    num_networks = len({one.weights_md5 for one in ancestors})
    parts = [f"{len(studies)} studies of {num_networks} network{'' if num_networks == 1 else 's'}"]
    parts += [f"{without} of them by hashes alone"] if without else []
    parts += [f"{num_overruled} pairs overruled"] if num_overruled else []
    return f"passed ({', '.join(parts)})"
