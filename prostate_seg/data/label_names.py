"""Names of mask labels in nnU-Net's dataset.json and BIDS' dseg.tsv, and whether they name the gland.

Names are English, as both formats are; words without anatomical meaning (mask, left, expert) are ignored.
"""

import csv
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
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
"""Structures inside the gland, which belong to it where the gland has a label of its own."""
PLAIN_WORD = (
    r"\w|whole|total|full|all|union|merged|combined|left|right|anterior|posterior|lateral|medial|mid|middle|midgland|apex|"
    r"base|inner|outer|horn|zones?|sectors?|areas?|regions?|volume|of|the|and|or|labels?|masks?|seg|segmentation|roi|"
    r"foreground|fg|target|object|organ|structure|contour|class|positive|manual|expert|human|reader|ai|auto|gt|ground|truth|"
    r"mri?|t2w?|max"
)
"""Words without anatomical meaning."""


class _Meaning(IntEnum):
    """Meaning of a name; of several names of a label the largest counts."""

    plain = 0
    inside = 1
    other = 2
    gland = 3


def require_gland_names(root: Path, *, labels: Sequence[int] | None) -> None:
    """Raise InputError if a label that is taken as gland has the name of something else, or dataset.json cannot be read."""
    for file, pairs in _read_tables(root).items():
        names: dict[int, list[str]] = defaultdict(list)
        for label, name in pairs:
            if label > 0:
                names[label].append(name)
        meanings = {label: max(map(_meaning, of_label)) for label, of_label in sorted(names.items())}
        wrong = _not_gland([label for label in meanings if labels is None or label in labels], meanings)
        if not wrong:
            continue
        named = ", ".join(f"label {label} is {' and '.join(map(repr, names[label]))}" for label in wrong)
        right = [label for label in meanings if label not in _not_gland(meanings, meanings)]
        taken = "Without data.whole_gland_labels every label above 0 is gland"
        if labels is not None:
            taken = f"data.whole_gland_labels={_list(labels)} names labels that are not"
        step = f"{taken}: set data.whole_gland_labels={_list(right)}, or correct the names."
        if not right:
            reason = "no label here is called prostate, gland or one of its zones"
            step = f"{taken}; {reason}: correct the names, or use other data."
        raise InputError(
            f"{file}: {named}, and only labels of the prostate, its zones and what lies in them are gland\n{step}"
        )


def _list(labels: Sequence[int]) -> str:
    return f"[{','.join(map(str, labels))}]"


def is_gland_name(name: str) -> bool:
    """Return whether a name means prostate, gland or zone, or has no anatomical meaning; a lesion alone is no gland."""
    return _meaning(name) in (_Meaning.gland, _Meaning.plain)


def _not_gland(taken: Collection[int], meanings: Mapping[int, _Meaning]) -> list[int]:
    """Return the labels that are no gland; a lesion is gland only beside a label of the gland."""
    has_gland = any(meanings[label] in (_Meaning.gland, _Meaning.plain) for label in taken)
    wrong = (_Meaning.other,) if has_gland else (_Meaning.other, _Meaning.inside)
    return [label for label in taken if meanings[label] in wrong]


def _meaning(name: str) -> _Meaning:
    """Return the meaning of a name such as PZ, whole_gland or prostate-lesion."""
    letters = "".join(one for one in unicodedata.normalize("NFKD", name) if not unicodedata.combining(one))
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", letters).lower())
    if not all(re.fullmatch(f"{GLAND_WORD}|{INSIDE_WORD}|{PLAIN_WORD}", word) for word in words):
        return _Meaning.other
    if any(re.fullmatch(INSIDE_WORD, word) for word in words):
        return _Meaning.inside
    return _Meaning.gland if any(re.fullmatch(GLAND_WORD, word) for word in words) else _Meaning.plain


def _read_tables(root: Path) -> dict[Path, list[tuple[int, str]]]:
    """Return label and name of every row, by file."""
    dataset_json = root / "dataset.json"
    tables = {dataset_json: _read_nnunet(dataset_json)} if dataset_json.is_file() else {}
    for path in sorted((root / "derivatives").rglob("*dseg.tsv")):
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = [(row.get("index") or "", row.get("name")) for row in csv.DictReader(stream, delimiter="\t")]
        tables[path] = [(int(index), name) for index, name in rows if index.isdigit() and name]
    return tables


def _read_nnunet(dataset_json: Path) -> list[tuple[int, str]]:
    """Return label and name of nnU-Net's first version, {"1": "PZ"}, and of its second, {"PZ": 1, "whole": [1, 2]}."""
    pairs = []
    try:
        content: Any = read_json(dataset_json)
        table = content.get("labels") if isinstance(content, dict) else None
        for key, value in (table if isinstance(table, dict) else {}).items():
            if isinstance(value, str) and not value.strip().isdigit():
                pairs.append((int(key), value))
            else:
                pairs += [(int(label), key) for label in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError) as error:
        raise InputError(f"{dataset_json}: the labels cannot be read ({error}); write them as nnU-Net does") from error
    return pairs
