"""Names of mask labels in data.labels, nnU-Net's dataset.json, BIDS' dseg.tsv and SOURCE.json.

Names are English, as both formats are; words without anatomical meaning (mask, left, expert) are ignored.
"""

import csv
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

from prostate_seg.common.errors import InputError, listed
from prostate_seg.common.files import read_json
from prostate_seg.imaging.regions import Regions
from prostate_seg.imaging.settings import WHOLE_GLAND

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
ZONE_NAMES = {
    "peripheral_zone": r"(prostate_)?(pz|peripheral(_?(zone|gland))?)",
    "transition_zone": r"(prostate_)?(tz|transition(al)?(_?(zone|gland))?)",
    "central_gland": r"(prostate_)?(cg|central_?gland|inner_gland)",
}
"""Names of zones in files, in lower case with underscores, by their names here."""


class _Meaning(IntEnum):
    """Meaning of a name; of several names of a label the largest counts."""

    plain = 0
    inside = 1
    other = 2
    gland = 3


def label_names(root: Path, *, given: Mapping[str, int] | None) -> dict[str, int] | None:
    """Return the label of each name: `given` as data.labels, or else from the files of a data folder; None without either.

    Raises:
        InputError: If a name has several labels, or the files disagree with `given`.
    """
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for file, pairs in _read_tables(root).items():
        of_names = Counter(name for _, name in pairs)
        for label, name in pairs:
            if label > 0 and of_names[name] == 1:  # nnU-Net's unions have several labels
                found[_standard_name(name)].setdefault(label, file)
    if "transition_zone" not in found and "central_gland" in found:
        found["transition_zone"] = found.pop("central_gland")
    for name, places in found.items():
        if len(places) > 1:
            listing = ", ".join(f"{label} in {file}" for label, file in places.items())
            raise InputError(f"{name}: must be one label, is {listing}\nCorrect the names.")
        (label, file), wanted = next(iter(places.items())), (given or {}).get(name)
        if wanted not in (None, label):
            raise InputError(f"data.labels: {name} must be {label}, as in {file}, is {wanted}\nCorrect one of the two.")
    if given is not None:
        return dict(given)
    return {name: next(iter(places)) for name, places in found.items()} or None


def region_labels(
    regions: Mapping[str, Sequence[str] | None],
    *,
    names: Mapping[str, int] | None,
    whole_gland_labels: tuple[int, ...] | None,
) -> Regions:
    """Return the labels of `target.regions`, the whole gland first and then the zones by name; `names` as of `label_names`.

    Raises:
        InputError: If there is no label of a name, or a zone has labels that are not gland.
    """
    zones = {name: labels for name, labels in sorted(regions.items()) if labels is not None}
    if not zones:
        return {WHOLE_GLAND: whole_gland_labels}
    known = names or {}
    if absent := sorted({label for labels in zones.values() for label in labels} - known.keys()):
        has = ", ".join(f"{name} {label}" for name, label in known.items()) or "none"
        raise InputError(
            f"target.regions: there must be a label of each name, and there is none of {', '.join(absent)}; the data set has: "
            f"{has}\nGive the value of each label by its name, as in 'data.labels={{transition_zone: 1, peripheral_zone: 2}}', "
            "or take target=whole_gland."
        )
    gland = whole_gland_labels or tuple(sorted(set(known.values())))
    found = {name: tuple(sorted(known[label] for label in labels)) for name, labels in zones.items()}
    for name, of_zone in found.items():
        if outside := set(of_zone) - set(gland):
            raise InputError(
                f"target.regions: a zone must be a part of the gland, and label {listed(sorted(outside))} of {name} is not in "
                f"data.whole_gland_labels={_list(gland)}\nAdd it there, or use null."
            )
    return {WHOLE_GLAND: gland, **found}


def require_gland_names(root: Path, *, labels: Sequence[int] | None, given: Mapping[str, int] | None = None) -> None:
    """Raise InputError if a label that is taken as gland has the name of something else, or dataset.json cannot be read.

    `given` are the names in data.labels, which are checked as those of the files are.
    """
    configured = {"data.labels": [(label, name) for name, label in (given or {}).items()]}
    tables: Mapping[Any, list[tuple[int, str]]] = {**configured, **_read_tables(root)}
    for file, pairs in tables.items():
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


def _standard_name(name: str) -> str:
    """Return a name in lower case with underscores, and a zone by its name here: PZ is peripheral_zone."""
    words = re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
    plain = "_".join(words).lower()
    return next((zone for zone, pattern in ZONE_NAMES.items() if re.fullmatch(pattern, plain)), plain)


def _read_tables(root: Path) -> dict[Path, list[tuple[int, str]]]:
    """Return label and name of every row, by file."""
    sources = [(root / "dataset.json", "nnU-Net", _read_json), (root / "SOURCE.json", "stage=fetch", _read_json)]
    sources += [(path, "BIDS", _read_tsv) for path in sorted((root / "derivatives").rglob("*dseg.tsv"))]
    tables = {}
    for path, author, read in sources:
        if path.is_file():
            try:
                tables[path] = read(path)
            except (TypeError, ValueError) as error:
                raise InputError(f"{path}: the labels cannot be read ({error}); write them as {author} does") from error
    return tables


def _read_tsv(path: Path) -> list[tuple[int, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = [(row.get("index") or "", row.get("name")) for row in csv.DictReader(stream, delimiter="\t")]
    return [(int(index), name) for index, name in rows if index.isdigit() and name]


def _read_json(path: Path) -> list[tuple[int, str]]:
    """Return label and name of nnU-Net's first version, {"1": "PZ"}, and of its second, {"PZ": 1, "whole": [1, 2]}."""
    content: Any = read_json(path)
    table = content.get("labels") if isinstance(content, dict) else None
    pairs = []
    for key, value in (table if isinstance(table, dict) else {}).items():
        if isinstance(value, str) and not value.strip().isdigit():
            pairs.append((int(key), value))
        else:
            pairs += [(int(label), key) for label in (value if isinstance(value, list) else [value])]
    return pairs
