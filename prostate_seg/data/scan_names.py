"""Recognition of masks, other sequences or planes than axial T2, and channels by the names of files and folders.

Names are compared word by word, in lower case; a word is a run of letters and digits. Nothing here opens a file.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from prostate_seg.common.errors import InputError
from prostate_seg.data.layouts import CHANNEL, t2_channel

MASK = re.compile(
    r"masks?|segs?|segmentations?|dseg|labels?|labelst[rs]|labelmaps?|annotations?|contours?|delineations?|rois?|gt|lesions?"
    r"|tumou?rs?|anatomy|gland|wg|pz|tz|preds?|predictions?|derivatives"
)
"""Words of reference masks and of other programs' masks."""
PLANE = re.compile(r"(t2\w*)?(cor|sag)|coronal|sagittal|locali[sz]er|scout|survey")
"""Words of images that are not axial, also joined to the sequence as in t2tsesag."""
SEQUENCE = re.compile(r"adc|dwi|dti|hbv|diff|diffusion|ep2d|tracew?|bval|dce|perf|perfusion|ktrans|flair|t1\w*")
"""Words of other sequences; a name with a T2 word is T2-weighted all the same."""
T2 = re.compile(r"t2\w*")

B_VALUE = re.compile(r"b(0|[1-9][0-9]*)")
B_VALUE_STEP = 50
"""b-values are multiples of this, which distinguishes most of them from patient numbers such as B1013."""
MAX_CHANNELS = 8
"""Maximum number of channels of a case; more numbers behind one name are studies."""
MASKS, OTHERS = "masks", "other sequences or planes"
"""Kinds of file that are not segmented."""


def kind_of(name: str, *, allowed: Iterable[str] = (), masks_possible: bool = True) -> str | None:
    """Return `MASKS` or `OTHERS`, or None for a name, without suffix, that may be an axial T2-weighted image.

    Words in `allowed` are ignored.
    """
    is_t2 = any(map(T2.fullmatch, words_of(name)))
    words = words_of(name) - set(allowed)
    if masks_possible and any(map(MASK.fullmatch, words)):
        return MASKS
    is_other = any(map(PLANE.fullmatch, words)) or (not is_t2 and any(map(_is_other_sequence, words)))
    return OTHERS if is_other else None


def kind_of_folder(name: str, *, allowed: Iterable[str] = ()) -> str | None:
    """Return the kind of all files in a folder; None if its name has other words as well."""
    words = {word for word in words_of(name) - set(allowed) if not word.isdigit()}
    if any(map(MASK.fullmatch, words)) and all(MASK.fullmatch(word) or T2.fullmatch(word) for word in words):
        return MASKS
    is_t2 = any(map(T2.fullmatch, words)) and not any(map(PLANE.fullmatch, words))
    others_alone = all(PLANE.fullmatch(word) or T2.fullmatch(word) or _is_other_sequence(word) for word in words)
    return OTHERS if words and others_alone and not is_t2 else None


def words_of(name: str) -> set[str]:
    """Return the words of a name in lower case."""
    return set(re.split(r"[\W_]+", name.lower())) - {""}


def _is_other_sequence(word: str) -> bool:
    b_value = B_VALUE.fullmatch(word)
    is_b_value = b_value is not None and int(b_value.group(1)) % B_VALUE_STEP == 0
    return is_b_value or SEQUENCE.fullmatch(word) is not None


def other_channels(stems: Sequence[str], *, folder: Path, is_nnunet: bool, allowed: Iterable[str] = ()) -> set[str]:
    """Return the names, without suffix, of a folder that are, by nnU-Net's numbering, channels that are not T2-weighted.

    dataset.json is searched in the folder and one level up. Numbers in `allowed` are taken, whatever their sequence, where
    there is no other. Outside of nnU-Net's folders only several channels of one case count as channels.

    Raises:
        InputError: If it is not clear which of several channels is T2-weighted.
    """
    numbered = {stem: match.groups() for stem in stems if (match := CHANNEL.fullmatch(stem))}
    channels: dict[str, set[str]] = defaultdict(set)
    for case, number in numbered.values():
        channels[case].add(number)
    cases = {
        case
        for case, numbers in channels.items()
        if is_nnunet or ("0000" in numbers and 1 < len(numbers) <= MAX_CHANNELS)
    }
    numbers = sorted(set().union(*(channels[case] for case in cases)))
    if not cases or (len(numbers) == 1 and numbers[0] in allowed):
        return set()
    described = next((path for path in (folder, folder.parent) if (path / "dataset.json").is_file()), folder)
    try:
        channel = t2_channel(described / "dataset.json", numbers)
    except InputError as error:
        raise InputError(
            f"{error}\nOr choose the images of one channel, such as predict.pattern='*_{numbers[0]}.*'."
        ) from error
    others = {stem for stem, (case, number) in numbered.items() if case in cases and number != channel}
    return others | (set(stems) - numbered.keys() if is_nnunet else set())
