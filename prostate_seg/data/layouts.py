"""Layouts of a data folder, recognised by its subfolders: our own, nnU-Net's raw one, and BIDS.

own      images/CASE.mha (or a DICOM folder), masks/CASE.nii.gz
nnU-Net  imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz, dataset.json; of several channels only the T2-weighted one
BIDS     sub-01[/ses-1]/anat/sub-01[_ses-1]_T2w.nii.gz, derivatives/*/sub-01[/ses-1]/anat/sub-01[_ses-1]_mask.nii.gz

Nothing here opens an image. Names are compared in Unicode NFC: macOS stores an umlaut in two characters, other systems in one.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from prostate_seg.common.errors import InputError
from prostate_seg.common.files import read_json
from prostate_seg.data.label_names import is_gland_name
from prostate_seg.imaging.sitk_reader import image_stem

COMPANION_SUFFIXES = (".raw", ".zraw", ".dvc", ".md", ".txt")
"""Files that belong beside images: the voxels of a .mhd, DVC's files, notes."""
COMPANION_STEMS = (".", "readme", "license", "licence", "thumbs.db", "desktop.ini")
"""Beginnings of other file names that are not reported as ignored."""
EXPECTED = (
    "expected are images/ and masks/ with equal names, such as images/10001_1.mha and masks/10001_1.nii.gz, nnU-Net's "
    "imagesTr/ and labelsTr/, or BIDS' sub-*/anat/ and derivatives/"
)

MASK_SUFFIXES = ("mask", "dseg", "seg")
"""Last word of a mask's name in BIDS derivatives."""
MASK_ENTITIES = ("space", "label", "desc", "res", "den", "atlas", "seg")
"""Entities in the name of a BIDS mask that are absent from the name of its image."""
OTHER_SEQUENCE = r"\b(adc|dwi|hbv|b[0-9]+|dce|t1w?|swi|ct|pet)\b"
"""Names of channels that are not T2-weighted; a single channel of any other name is taken as T2-weighted."""

CHANNEL = re.compile(r"(.+)_([0-9]{4})")
"""nnU-Net's name of an image: case and channel."""

Stems = Mapping[str, Sequence[Path]]
"""Files or folders by stem; more than one per stem is an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unread:
    """An image or mask that is not read although its name may be that of a case."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Files of a data folder."""

    images: Stems
    masks: Stems
    ignored: Sequence[Path] = ()
    unread: Mapping[str, Unread] = field(default_factory=dict)
    """Images of another channel, or without a channel number, by the case that they may belong to; masks of other organs."""


def list_files(root: Path, *, masks_required: bool) -> Listing:
    """Return images and masks by name, in any of the layouts.

    Raises:
        InputError: If the folder has no layout or several, a folder is missing, there are no images, or it is not clear which
            of several channels is T2-weighted.
    """
    layouts = {
        "images/ or masks/": any((root / name).is_dir() for name in ("images", "masks")),
        "imagesTr/": (root / "imagesTr").is_dir(),
        "sub-*/": is_bids(root),
    }
    found = [name for name, is_present in layouts.items() if is_present]
    if len(found) > 1:
        raise InputError(
            f"{root} must have one layout, has {' and '.join(found)}\nMove all but one of them elsewhere; {EXPECTED}."
        )
    if found == ["sub-*/"]:
        return _list_bids(root, masks_required)
    is_nnunet = found == ["imagesTr/"]
    folders = [root / name for name in (("imagesTr", "labelsTr") if is_nnunet else ("images", "masks"))]
    for folder in folders if masks_required else folders[:1]:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}; {EXPECTED}. Set data.root, or run stage=fetch first.")
    (images, ignored_images), (masks, ignored_masks) = map(_by_stem, folders)
    listing = Listing(images=images, masks=masks, ignored=[*ignored_images, *ignored_masks])
    if is_nnunet:
        listing = _of_t2_channel(listing, folders[0])
    _require_images(listing.images, folders[0])
    return listing


def has_images(root: Path) -> bool:
    """Return whether a folder has the layout of a data set."""
    return (root / "images").is_dir() or (root / "imagesTr").is_dir() or is_bids(root)


def is_bids(root: Path) -> bool:
    """Return whether a folder is the root of a BIDS data set."""
    return any(True for pattern in ("sub-*/anat", "sub-*/ses-*/anat") for _ in root.glob(pattern))


def nfc(name: str) -> str:
    """Return a name in Unicode NFC."""
    return unicodedata.normalize("NFC", name)


def _of_t2_channel(listing: Listing, folder: Path) -> Listing:
    """Return a listing of nnU-Net's names with the images of the T2-weighted channel, by case."""
    numbered: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    unnumbered = {}
    for stem, paths in listing.images.items():
        name = CHANNEL.fullmatch(stem)
        if name is None:
            unnumbered[stem] = paths[0]
        else:
            numbered[name.group(2)][name.group(1)] += paths
    if unnumbered and not numbered:
        raise InputError(
            f"{folder}: names must end in a channel such as CASE_0000.nii.gz, and none does\n"
            "Four-dimensional images of the Medical Segmentation Decathlon are split by stage=fetch data=decathlon."
        )
    channel = t2_channel(folder.parent / "dataset.json", sorted(numbered)) if numbered else ""
    unread = {
        stem: Unread(path=paths[0], reason=f"it is channel {number}, and the T2-weighted one is {channel}; add that")
        for number, others in sorted(numbered.items())
        for stem, paths in others.items()
        if stem not in numbered[channel]
    }
    for stem, path in unnumbered.items():
        suffix = path.name.removeprefix(image_stem(path.name))
        reason = f"its name has no channel number; rename it to {stem}_{channel}{suffix}"
        unread[stem] = Unread(path=path, reason=reason)
    return replace(listing, images=numbered[channel], unread=unread)


def t2_channel(dataset_json: Path, channels: Sequence[str]) -> str:
    """Return which of the channels, such as 0000, is T2-weighted by nnU-Net's description, which may be absent.

    Raises:
        InputError: If it is not clear which of several channels is T2-weighted, or none is.
    """
    names: dict[str, str] = {}
    try:
        if dataset_json.is_file():
            content = read_json(dataset_json)
            table = content.get("channel_names") or content.get("modality") or {}  # modality: nnU-Net's first version
            names = {f"{int(number):04d}": str(name) for number, name in table.items()}
    except (AttributeError, ValueError) as error:
        raise InputError(f"{dataset_json}: cannot be read ({error}); write it as nnU-Net does") from error
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


def _list_bids(root: Path, masks_required: bool) -> Listing:
    images, masks, unread = defaultdict(list), defaultdict(list), {}
    for path, stem in _images(root, "sub-*/anat/*", "sub-*/ses-*/anat/*"):
        if stem.endswith("_T2w"):
            images[stem.removesuffix("_T2w")].append(path)
    for path, stem in _images(root / "derivatives", "**/sub-*"):
        *words, last = stem.split("_")
        label = re.search(r"_label-([^_]+)_", stem)
        if last not in MASK_SUFFIXES:
            continue
        if label is None or is_gland_name(label.group(1)):
            of_image = [word for word in words if word != "T2w" and word.partition("-")[0] not in MASK_ENTITIES]
            masks["_".join(of_image)].append(path)
        else:
            unread[stem] = Unread(path=path, reason=f"it marks {label.group(1)!r}, which is not the gland")
    if masks_required and not masks:
        raise InputError(
            f"{root / 'derivatives'}: has no mask such as derivatives/manual/sub-01/anat/sub-01_mask.nii.gz, named as its "
            f"image but for the last word, one of {', '.join(MASK_SUFFIXES)}"
        )
    _require_images(images, root / "sub-*/anat")
    return Listing(images=images, masks=masks, unread=unread)


def _images(root: Path, *patterns: str) -> Iterator[tuple[Path, str]]:
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        stem = _stem(path)
        if path.is_file() and stem is not None:
            yield path, stem


def _require_images(images: Stems, folder: Path) -> None:
    loose = next(folder.glob("*.[Dd][Cc][Mm]"), None)
    if not images and loose is not None:
        raise InputError(
            f"{folder}: a DICOM series must be a folder of its own, such as {folder.name}/10001_1/{loose.name}, and "
            f"{loose.name} lies in {folder.name}/ itself\nMake a folder for each case and move its files there."
        )
    if not images:
        raise InputError(f"there is no image in {folder}; {EXPECTED}. Set data.root, or run stage=fetch first.")


def _by_stem(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Return the images of a folder by stem, and its other files without the companions of images."""
    stems: dict[str, list[Path]] = defaultdict(list)
    ignored = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        stem, name = _stem(path), path.name.lower()
        if stem is not None:
            stems[stem].append(path)
        elif not name.startswith(COMPANION_STEMS) and not name.endswith(COMPANION_SUFFIXES):
            ignored.append(path)
    return dict(stems), ignored


def _stem(path: Path) -> str | None:
    """Return the name without its image suffix, NFC; None for a file that is no image."""
    if path.name.startswith("."):
        return None
    if path.is_dir():
        return nfc(path.name)
    stem = image_stem(path.name)
    return nfc(stem) if stem and stem != path.name else None
