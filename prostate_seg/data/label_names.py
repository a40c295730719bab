"""What a data set calls its labels, and whether these names are the gland: nnU-Net's dataset.json, BIDS' dseg.tsv.

Names are English, as both formats are; words that say nothing about anatomy (mask, left, expert) do not count.
"""

import csv
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import read_json

GLAND_WORD = (
    r"prostat\w*|prostaat|gland|wholegland|wg|wp|central|peripheral|transition|transitional|pz|tz|cz|cg|"
    r"(central|peripheral|transition|transitional)(gland|zone)|afs|afms|amfs|afm|fibromuscular|stroma"
)
"""The organ and its zones, with their usual abbreviations."""

INSIDE_WORD = (
    r"(sub)?lesions?|tumou?rs?|cancers?|carcinomas?|adenocarcinoma|malignan\w+|pca|cs|cspca|significant|clinically|suspicious|"
    r"index|dominant|isup|gleason|pirads|pi|rads|bph|nodules?|cysts?|calcifications?|urethra\w*|dpu|verumontanum|utricle"
)
"""What lies in the gland, and is gland where the gland has a label of its own."""

PLAIN_WORD = (
    r"\w|whole|total|full|all|union|merged|combined|left|right|anterior|posterior|lateral|medial|mid|middle|midgland|apex|"
    r"base|inner|outer|horn|zones?|sectors?|areas?|regions?|volume|of|the|and|or|labels?|masks?|seg|segmentation|roi|"
    r"foreground|fg|target|object|organ|structure|contour|class|positive|manual|expert|human|reader|ai|auto|gt|ground|truth|"
    r"mri?|t2w?|max"
)
"""Words that say nothing about what is marked."""


class _Meaning(IntEnum):
    """What a name stands for; of several names of a label the largest counts."""

    plain = 0
    inside = 1
    other = 2
    gland = 3


def require_gland_names(root: Path, *, labels: Sequence[int] | None) -> None:
    """Check that no label which is taken as gland has the name of something else.

    Args:
        root: The data folder.
        labels: Mask labels that are gland; None takes every label above 0.

    Raises:
        InputError: If one has, or dataset.json cannot be read.
    """
    for file, names in _label_names(root):
        meanings = {label: max(map(_meaning, of_label)) for label, of_label in names.items()}
        taken = [label for label in sorted(meanings) if labels is None or label in labels]
        wrong = _not_gland(taken, meanings)
        if wrong:
            named = ", ".join(f"label {label} is {' and '.join(map(repr, names[label]))}" for label in wrong)
            right = [label for label in sorted(meanings) if label not in _not_gland(sorted(meanings), meanings)]
            raise InputError(
                f"{file}: {named}, and only labels of the prostate, its zones and what lies in them are gland\n"
                f"{_step(right, labels=labels)}"
            )


def _step(right: Sequence[int], *, labels: Sequence[int] | None) -> str:
    """Say which labels to name instead of those that were taken."""
    taken = (
        "Without data.whole_gland_labels every label above 0 is gland"
        if labels is None
        else f"data.whole_gland_labels={_list(labels)} names labels that are not"
    )
    if right:
        return f"{taken}: set data.whole_gland_labels={_list(right)}, or correct the names."
    return (
        f"{taken}; no label here is called prostate, gland or one of its zones: correct the names, or use other data."
    )


def _list(labels: Sequence[int]) -> str:
    return f"[{','.join(map(str, labels))}]"


def is_gland_name(name: str) -> bool:
    """Return whether a name says prostate, gland or zone, or nothing about anatomy; a lesion alone is no gland."""
    return _meaning(name) in (_Meaning.gland, _Meaning.plain)


def _not_gland(taken: Collection[int], meanings: Mapping[int, _Meaning]) -> list[int]:
    """Return the labels that are something else; a lesion alone is no gland, beside the gland it is a part of it."""
    has_gland = any(meanings[label] in (_Meaning.gland, _Meaning.plain) for label in taken)
    return [
        label
        for label in taken
        if meanings[label] is _Meaning.other or (meanings[label] is _Meaning.inside and not has_gland)
    ]


def _meaning(name: str) -> _Meaning:
    """Return what a name such as PZ, whole_gland or prostate-lesion stands for."""
    letters = "".join(one for one in unicodedata.normalize("NFKD", name) if not unicodedata.combining(one))
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", letters).lower())
    if not all(re.fullmatch(f"{GLAND_WORD}|{INSIDE_WORD}|{PLAIN_WORD}", word) for word in words):
        return _Meaning.other
    if any(re.fullmatch(INSIDE_WORD, word) for word in words):
        return _Meaning.inside
    return _Meaning.gland if any(re.fullmatch(GLAND_WORD, word) for word in words) else _Meaning.plain


def _label_names(root: Path) -> Iterator[tuple[Path, dict[int, list[str]]]]:
    """Yield the names of the labels above 0, for each file that has some."""
    dataset_json = root / "dataset.json"
    if dataset_json.is_file():
        yield dataset_json, _by_label(_of_nnunet(dataset_json))
    for table in sorted((root / "derivatives").rglob("*dseg.tsv")):
        yield table, _by_label(_of_bids(table))


def _by_label(named: Iterable[tuple[int, str]]) -> dict[int, list[str]]:
    names: dict[int, list[str]] = defaultdict(list)
    for label, name in named:
        if label > 0:
            names[label].append(name)
    return dict(names)


def _of_nnunet(dataset_json: Path) -> list[tuple[int, str]]:
    """Return label and name of nnU-Net's first version, {"1": "PZ"}, and of its second, {"PZ": 1, "whole": [1, 2]}."""
    try:
        content: Any = read_json(dataset_json)
        table = content.get("labels") if isinstance(content, dict) else None
        return [
            pair for key, value in (table if isinstance(table, dict) else {}).items() for pair in _pairs(key, value)
        ]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise InputError(f"{dataset_json}: the labels cannot be read ({error}); write them as nnU-Net does") from error


def _pairs(key: str, value: Any) -> list[tuple[int, str]]:
    if isinstance(value, str) and not value.strip().isdigit():
        return [(int(key), value)]
    return [(int(label), key) for label in (value if isinstance(value, list) else [value])]


def _of_bids(table: Path) -> list[tuple[int, str]]:
    """Return index and name of each row of a BIDS look-up table."""
    with table.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    return [(int(row["index"]), row["name"]) for row in rows if (row.get("index") or "").isdigit() and row.get("name")]
