"""The ways in which a data folder may be laid out, told apart by their folders: our own, nnU-Net's raw one, and BIDS.

own      images/CASE.mha (or a DICOM folder), masks/CASE.nii.gz
nnU-Net  imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz, dataset.json; of several channels only the T2-weighted one
BIDS     sub-01[/ses-1]/anat/sub-01[_ses-1]_T2w.nii.gz, derivatives/*/sub-01[/ses-1]/anat/sub-01[_ses-1]_mask.nii.gz

Nothing here opens an image. Names are compared in Unicode NFC: macOS stores an umlaut in two characters, other systems in one.
"""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import read_json
from prostate_seg.data.label_names import is_gland_name
from prostate_seg.imaging.sitk_reader import image_suffix

COMPANION_SUFFIXES = (".raw", ".zraw", ".dvc", ".md", ".txt")
"""Files that belong beside images: the voxels of a .mhd, DVC's notes, people's notes."""

COMPANION_STEMS = ("readme", "license", "licence", "thumbs.db", "desktop.ini")
"""First words of other files that people and file managers put into a data folder."""

EXPECTED = (
    "expected are images/ and masks/ with equal names, such as images/10001_1.mha and masks/10001_1.nii.gz, nnU-Net's "
    "imagesTr/ and labelsTr/, or BIDS' sub-*/anat/ and derivatives/"
)

MASK_SUFFIXES = ("mask", "dseg", "seg")
"""Last word of a mask's name in BIDS derivatives."""

OF_MASKS_ALONE = ("space", "label", "desc", "res", "den", "atlas", "seg")
"""Entities in the name of a BIDS mask that the name of its image has not."""

OTHER_SEQUENCE = r"\b(adc|dwi|hbv|b[0-9]+|dce|t1w?|swi|ct|pet)\b"
"""Names of channels that are not T2-weighted, also where there is one channel; any other name of a single one may be."""

Stems = Mapping[str, Sequence[Path]]
"""The files or folders of each stem; more than one is an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unread:
    """An image or mask that is not read although its name may be that of a case."""

    path: Path
    reason: str
    """Why, and the next step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What lies in a data folder."""

    images: Stems
    masks: Stems
    ignored: Sequence[Path] = ()
    """Files that are no images, other than those that belong beside images."""
    unread: Mapping[str, Unread] = field(default_factory=dict)
    """Images of another channel, or without a channel number, by the case that they may belong to; masks of other organs."""


def list_files(root: Path, *, masks_required: bool) -> Listing:
    """Return images and masks by name, whichever way the folder is laid out.

    Raises:
        InputError: If the folder has no layout or two, a folder is missing, there are no images, or it is not clear which of
            several channels is T2-weighted.
    """
    found = [list_all for list_all, is_there in ((_nnunet, _is_nnunet(root)), (_bids, is_bids(root))) if is_there]
    is_own = any((root / name).is_dir() for name in ("images", "masks"))
    if len(found) + is_own > 1:
        named = ["images/ or masks/"] * is_own + ["imagesTr/"] * _is_nnunet(root) + ["sub-*/"] * is_bids(root)
        raise InputError(
            f"{root} must have one layout, has {' and '.join(named)}\nMove all but one of them elsewhere; {EXPECTED}."
        )
    return found[0](root, masks_required) if found else _own(root, masks_required)


def has_images(root: Path) -> bool:
    """Return whether a folder looks like a data set at all."""
    return (root / "images").is_dir() or _is_nnunet(root) or is_bids(root)


def nfc(name: str) -> str:
    """Return a name as other systems than macOS write it."""
    return unicodedata.normalize("NFC", name)


def _is_nnunet(root: Path) -> bool:
    return (root / "imagesTr").is_dir()


def is_bids(root: Path) -> bool:
    """Return whether a folder is the root of a BIDS data set."""
    return any(True for pattern in ("sub-*/anat", "sub-*/ses-*/anat") for _ in root.glob(pattern))


def _own(root: Path, masks_required: bool) -> Listing:
    folders = [root / "images", root / "masks"]
    _require_folders(folders[: 2 if masks_required else 1])
    images, ignored_images = _by_stem(folders[0])
    masks, ignored_masks = _by_stem(folders[1])
    return Listing(images=_some(images, folders[0]), masks=masks, ignored=[*ignored_images, *ignored_masks])


def _nnunet(root: Path, masks_required: bool) -> Listing:
    """Take the T2-weighted channel of each case; the others are not listed."""
    _require_folders([root / "labelsTr"] if masks_required else [])
    numbered: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    images, ignored = _by_stem(root / "imagesTr")
    unnumbered = {}
    for stem, paths in images.items():
        name = re.fullmatch(r"(.+)_([0-9]{4})", stem)
        if name is None:
            unnumbered[stem] = paths[0]
        else:
            numbered[name.group(2)][name.group(1)] += paths
    if images and not numbered:
        raise InputError(
            f"{root / 'imagesTr'}: names must end in a channel such as CASE_0000.nii.gz, and none does\n"
            "Four-dimensional images of the Medical Segmentation Decathlon are split by stage=fetch data=decathlon."
        )
    channel = t2_channel(root / "dataset.json", sorted(numbered)) if numbered else ""
    masks, ignored_masks = _by_stem(root / "labelsTr")
    return Listing(
        images=_some(numbered[channel], root / "imagesTr"),
        masks=masks,
        ignored=[*ignored, *ignored_masks],
        unread=_without_channel(numbered, channel) | _without_number(unnumbered, channel),
    )


def _without_number(images: Mapping[str, Path], channel: str) -> dict[str, Unread]:
    return {
        stem: Unread(path=path, reason=f"its name has no channel number; rename it to {stem}_{channel}{_suffix(path)}")
        for stem, path in images.items()
    }


def _without_channel(numbered: Mapping[str, Stems], channel: str) -> dict[str, Unread]:
    """Return the cases that have other channels than the T2-weighted one alone."""
    return {
        stem: Unread(path=paths[0], reason=f"it is channel {number}, and the T2-weighted one is {channel}; add that")
        for number, images in sorted(numbered.items())
        for stem, paths in images.items()
        if stem not in numbered[channel]
    }


def t2_channel(dataset_json: Path, channels: Sequence[str]) -> str:
    """Return the number of the T2-weighted channel, such as 0000.

    Args:
        dataset_json: nnU-Net's description of the data set; may be absent.
        channels: Numbers that the names of images end in.

    Raises:
        InputError: If it is not clear which of several channels is T2-weighted, or none is.
    """
    names = _channel_names(dataset_json)
    t2 = [number for number, name in names.items() if re.search("t2", name, re.IGNORECASE)]
    of_others = [number for number in channels if re.search(OTHER_SEQUENCE, names.get(number, ""), re.IGNORECASE)]
    chosen = [number for number in t2 if number in channels] if t2 else channels
    if len(chosen) == 1 and (t2 or not of_others):
        return chosen[0]
    known = ", ".join(f"{number} {name}" for number, name in names.items()) or "nothing, as it is absent or names none"
    raise InputError(
        f"{dataset_json}: must name one of the channels {', '.join(channels)} T2, names {known}\n"
        'Write it as nnU-Net does: "channel_names": {"0": "T2", "1": "ADC"}.'
    )


def _channel_names(dataset_json: Path) -> dict[str, str]:
    """Return the name of each channel; nnU-Net's first version calls the table modality."""
    if not dataset_json.is_file():
        return {}
    try:
        content: dict[str, Any] = read_json(dataset_json)
        names = content.get("channel_names") or content.get("modality") or {}
        return {f"{int(number):04d}": str(name) for number, name in names.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, ValueError) as error:
        raise InputError(f"{dataset_json}: cannot be read ({error}); write it as nnU-Net does") from error


def _bids(root: Path, masks_required: bool) -> Listing:
    images, masks, others = defaultdict(list), defaultdict(list), {}
    for path in _files(root, ("sub-*/anat/*", "sub-*/ses-*/anat/*")):
        stem = _stem(path)
        if stem is not None and stem.endswith("_T2w"):
            images[stem.removesuffix("_T2w")].append(path)
    for path in _files(root / "derivatives", ("**/sub-*",)):
        stem = _stem(path)
        if stem is None or stem.rpartition("_")[2] not in MASK_SUFFIXES:
            continue
        label = re.search(r"_label-([^_]+)_", stem)
        if label is None or is_gland_name(label.group(1)):
            masks[_image_name(stem)].append(path)
        else:
            others[stem] = Unread(path=path, reason=f"it marks {label.group(1)!r}, which is not the gland")
    if masks_required and not masks:
        raise InputError(
            f"{root / 'derivatives'}: has no mask such as derivatives/manual/sub-01/anat/sub-01_mask.nii.gz, named as its "
            f"image but for the last word, one of {', '.join(MASK_SUFFIXES)}"
        )
    return Listing(images=_some(images, root / "sub-*/anat"), masks=masks, unread=others)


def _files(root: Path, patterns: Iterable[str]) -> Iterator[Path]:
    return (path for path in sorted({path for one in patterns for path in root.glob(one)}) if path.is_file())


def _image_name(mask_stem: str) -> str:
    """Return the name that the image of a BIDS mask has, without its _T2w."""
    words = mask_stem.split("_")[:-1]
    return "_".join(word for word in words if word != "T2w" and word.partition("-")[0] not in OF_MASKS_ALONE)


def _require_folders(folders: Iterable[Path]) -> None:
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}; {EXPECTED}. Set data.root, or run stage=fetch first.")


def _some(images: Stems, place: Path) -> Stems:
    if not images:
        loose = next(place.glob("*.[Dd][Cc][Mm]"), None)
        if loose is not None:
            raise InputError(
                f"{place}: a DICOM series must be a folder of its own, such as {place.name}/10001_1/{loose.name}, and "
                f"{loose.name} lies in {place.name}/ itself\nMake a folder for each case and move its files there."
            )
        raise InputError(f"there is no image in {place}; {EXPECTED}. Set data.root, or run stage=fetch first.")
    return images


def _by_stem(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Return the images of a folder by stem, and the files that are none."""
    stems: dict[str, list[Path]] = defaultdict(list)
    ignored = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        stem = _stem(path)
        if stem is not None:
            stems[stem].append(path)
        elif not _is_companion(path):
            ignored.append(path)
    return dict(stems), ignored


def _stem(path: Path) -> str | None:
    """Return the name without its image suffix, NFC; None for a file that is no image."""
    if path.name.startswith("."):
        return None
    if path.is_dir():
        return nfc(path.name)
    suffix = image_suffix(path.name)
    return nfc(path.name[: -len(suffix)]) if suffix and len(path.name) > len(suffix) else None


def _suffix(path: Path) -> str:
    return path.name[len(path.name) - len(image_suffix(path.name) or "") :]


def _is_companion(path: Path) -> bool:
    name = path.name.lower()
    return name.startswith((".", *COMPANION_STEMS)) or name.endswith(COMPANION_SUFFIXES)
