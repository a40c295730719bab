"""Reading splits that others made: our kfold.json, PI-CAI's folds, nnU-Net's splits_final.json, or one plain split."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import read_json
from prostate_seg.data.folds import Fold
from prostate_seg.imaging.sitk_reader import image_suffix

FORMS = (
    'JSON of one of these forms: {"folds": [{"train": [...], "val": [...], "test": [...]}, ...]}, the same with val alone '
    '(PI-CAI), a list of {"train": [...], "val": [...]} (nnU-Net), or {"train": [...], "val": [...], "test": [...]}'
)


def read_splits(path: Path) -> list[Fold]:
    """Return the folds of a split file.

    Where a fold lists only what it tests, as PI-CAI's do, it trains on what the other folds test. Image suffixes of names
    are dropped.

    Raises:
        InputError: If the file cannot be read or has none of the known forms.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); name an existing split file") from error
    except ValueError as error:  # also of a pickle, which is not opened: it could run anything
        raise InputError(f"{path} is no JSON: a split file is {FORMS}") from error
    try:
        folds = [_parts(entry) for entry in _entries(content)]
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: a split file is {FORMS}") from error
    if not any(case_ids for parts in folds for case_ids in parts.values()):
        raise InputError(f"{path} lists no case; a split file is {FORMS}")
    if all(set(parts) == {"val"} for parts in folds):
        folds = [{"train": _others(folds, index), "test": parts["val"]} for index, parts in enumerate(folds)]
    return [Fold(**{part: parts.get(part, []) for part in ("train", "val", "test")}) for parts in folds]


def _entries(content: Any) -> Sequence[Mapping[str, Any]]:
    if isinstance(content, list):
        return content
    return content.get("folds", [content])


def _parts(entry: Mapping[str, Any]) -> dict[str, list[str]]:
    known = {"train": "train", "val": "val", "validation": "val", "test": "test"}
    parts = {known[part]: [_case_id(name) for name in entry[part]] for part in entry if part in known}
    if not parts or any(isinstance(entry[part], str) for part in entry if part in known):
        raise KeyError("train, val, test")
    return parts


def _case_id(name: Any) -> str:
    text = Path(str(name)).name
    suffix = image_suffix(text)
    return text[: -len(suffix)] if suffix else text


def _others(folds: Sequence[Mapping[str, list[str]]], index: int) -> list[str]:
    return sorted(case_id for other, parts in enumerate(folds) if other != index for case_id in parts["val"])
