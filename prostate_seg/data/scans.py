"""Finding the studies to segment in a file or folder, and a name for each: its path below the folder, without suffix.

An image file is one study; so is a folder that holds DICOM files, whatever lies beside them. Other files are left alone. Of a
data set with images/ and masks/ the images are taken. Nothing here reads voxels.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from prostate_seg.errors import InputError
from prostate_seg.imaging.sitk_reader import image_suffix

DICOM_SUFFIXES = (".dcm", ".ima")
"""Usual endings; most scanners and archives give none, and the file itself says what it is."""

DICOM_MAGIC_AT, DICOM_MAGIC = 128, b"DICM"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """A study without a reference."""

    name: str
    """Path below the input folder without suffix, with / between folders; unique."""
    path: Path
    """Image file, or folder of a DICOM series."""

    @property
    def is_dicom(self) -> bool:
        """Whether it is a folder of DICOM files."""
        return self.path.is_dir()


def find_scans(root: Path, *, pattern: str) -> list[Scan]:
    """Return the studies of a file, a folder of images, a DICOM series or a folder of patients with any of these.

    Args:
        root: File or folder.
        pattern: What the name of a file, or of the folder of a series, must match; a `root` that is a study itself always does.

    Raises:
        InputError: If there is no study, or two would have one name.
    """
    if not root.exists():
        raise InputError(f"predict.input: there is no file or folder {root}; check the path")
    if root.is_file():
        return [_single(root)]
    root = root.resolve()
    if _is_series(root):
        return [Scan(name=root.name, path=root)]
    found = [path for path in _studies(root) if fnmatch(path.name, pattern)]
    if not found:
        raise InputError(
            f"predict.input: no image file and no DICOM series lies in {root}"
            + ("" if pattern == "*" else f" whose name matches predict.pattern {pattern}")
            + "; expected are .mha .mhd .nii .nii.gz .nrrd files or folders of DICOM files"
        )
    scans = [Scan(name=_name(path, root), path=path) for path in found]
    _require_unique(scans)
    return sorted(scans, key=lambda scan: scan.name)


def _single(file: Path) -> Scan:
    if image_suffix(file.name) is None:
        raise InputError(
            f"predict.input: {file} is no image by its suffix; expected is .mha .mhd .nii .nii.gz .nrrd, or the folder "
            "that holds a DICOM series"
        )
    return Scan(name=_stem(file), path=file)


def _studies(folder: Path) -> Iterable[Path]:
    """Yield the image files and the folders of DICOM series below a folder; hidden ones are left out."""
    is_data_set = (folder / "images").is_dir() and (folder / "masks").is_dir()
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or (is_data_set and path.name == "masks"):
            continue
        if path.is_dir():
            if _is_series(path):
                yield path
            yield from _studies(path)
        elif image_suffix(path.name) is not None:
            yield path


def _is_series(folder: Path) -> bool:
    """Return whether a DICOM file lies in the folder."""
    return any(_is_dicom(path) for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))


def _is_dicom(file: Path) -> bool:
    if image_suffix(file.name) is not None or file.name.upper() == "DICOMDIR":
        return False
    if file.name.lower().endswith(DICOM_SUFFIXES):
        return True
    with file.open("rb") as stream:
        return stream.read(DICOM_MAGIC_AT + len(DICOM_MAGIC))[DICOM_MAGIC_AT:] == DICOM_MAGIC


def _name(path: Path, top: Path) -> str:
    return (path.parent.relative_to(top) / _stem(path)).as_posix()


def _stem(path: Path) -> str:
    suffix = None if path.is_dir() else image_suffix(path.name)
    return path.name[: -len(suffix)] if suffix else path.name


def _require_unique(scans: Iterable[Scan]) -> None:
    by_name: dict[str, list[Path]] = defaultdict(list)
    for scan in scans:
        by_name[scan.name].append(scan.path)
    twins = {name: paths for name, paths in by_name.items() if len(paths) > 1}
    if twins:
        listing = "\n".join(f"  {name}: {', '.join(path.name for path in paths)}" for name, paths in twins.items())
        raise InputError(
            "predict.input: two studies must not have one name, because their masks would have one file\n"
            f"{listing}\nTake one of each away, or choose with predict.pattern, such as predict.pattern='*.mha'."
        )
