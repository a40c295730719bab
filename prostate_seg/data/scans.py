"""Search for the studies to segment in a file or folder. A study is named by its path below the folder, without suffix.

An image file is one study; so is a folder with DICOM files, whatever else it contains. In a data set (own, nnU-Net's or BIDS
layout) only T2-weighted images are studies; elsewhere masks and other sequences are recognised by name. Everything left out is
listed with the reason. Links are followed, each real file and folder once. Nothing here reads voxels.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path
from stat import S_ISDIR, S_ISREG

import pydicom

from prostate_seg.common.errors import InputError, listed
from prostate_seg.data.layouts import CHANNEL, is_bids
from prostate_seg.data.scan_names import kind_of, kind_of_folder, other_channels, words_of
from prostate_seg.imaging.dicom_frames import MAGIC, MAGIC_OFFSET
from prostate_seg.imaging.sitk_reader import image_stem, image_suffix

DICOM_SUFFIXES = (".dcm", ".ima")
"""Usual suffixes; most scanners and archives write none, and the file is recognised by its content."""
SUFFIXES = ".mha .mhd .nii .nii.gz .nrrd"

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
OTHER_SUFFIXES = (".gz", ".bz2", ".xz", ".hdr", ".img", ".nhdr", ".mgh", ".mgz", ".mnc")
"""Image formats that are not read, and compressed files."""
NNUNET_FOLDERS = ("imagesTr", "imagesTs")

OUTSIDE = "outside the image folders of data sets (images/, imagesTr/, imagesTs/, sub-*/)"

RESULT_FOLDERS = ("masks", "overlays", "dicom_seg", "records")
"""Folders of a prediction's output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """A study without a reference."""

    name: str
    """Path below the input folder without suffix, with / between folders; unique."""
    path: Path
    description: str = ""
    """Series Description of a DICOM series; empty where it has none, and for image files."""

    @property
    def is_dicom(self) -> bool:
        """Whether it is a folder of DICOM files."""
        return self.path.is_dir()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanList:
    """The studies of an input, and the other files and folders in it."""

    scans: list[Scan] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Names of the files and folders that are no input, by reason."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Reason that a possible study cannot be opened, by its path below the input folder."""

    @property
    def left_out_lines(self) -> list[str]:
        """One line for each reason."""
        by_reason = sorted(self.left_out.items())
        return [f"left out: {len(names)} {reason}: {listed(sorted(names))}" for reason, names in by_reason]


def find_scans(root: Path, *, pattern: str, output: Path | None = None) -> ScanList:
    """Return the studies of a file, a folder of images, a DICOM series, or a folder of patients with any of these.

    `pattern` is a glob for the names of files and of folders of a series; a `root` that is a study itself always matches.
    Results in `output`, to which results are written, are no input.

    Raises:
        InputError: If there is no study, or two would have one name.
    """
    if not root.exists():
        link = f", which is a broken link to {root.readlink()}" if root.is_symlink() else ""
        raise InputError(f"predict.input: there is no file or folder {root}{link}; check the path")
    if root.is_file():
        return ScanList(scans=[_single(root)])
    root = root.resolve()
    is_reference = (root.name == "masks" and (root.parent / "images").exists()) or (
        root.name.startswith("labelsT") and (root.parent / "imagesTr").exists()
    )
    if is_reference or (root.name in RESULT_FOLDERS and _holds_results(root.parent)):
        what = "reference masks" if is_reference else "results of an earlier prediction"
        raise InputError(f"predict.input: {root} holds {what}, and images are segmented; give the folder of the images")
    found = _Search(root=root, pattern=pattern, output=None if output is None else output.resolve()).run()
    files_of = {name: [scan.path.name for scan in same] for name, same in groupby(found.scans, lambda scan: scan.name)}
    if repeated := [f"  {name}: {', '.join(files)}\n" for name, files in files_of.items() if len(files) > 1]:
        raise InputError(
            "predict.input: two studies must not have one name, because their masks would have one file\n"
            f"{''.join(repeated)}Take one of each away, or choose with predict.pattern, such as predict.pattern='*.mha'."
        )
    if not found.scans and not found.unreadable:
        matching = "" if pattern == "*" else f" whose name matches predict.pattern {pattern}"
        raise InputError(
            f"predict.input: no image file and no DICOM series lies in {root}{matching}; expected are {SUFFIXES} "
            "files or folders of DICOM files" + "".join(f"\n  {line}" for line in found.left_out_lines)
        )
    return found


def _single(file: Path) -> Scan:
    if image_suffix(file.name) is not None:
        return Scan(name=_stem(file), path=file)
    if _is_dicom(file):
        raise InputError(
            f"predict.input: {file} is one DICOM file, and a study is the folder that holds all files of a series; "
            f"set predict.input={file.parent}"
        )
    if file.name.lower().endswith(ARCHIVE_SUFFIXES):
        raise InputError(f"predict.input: {file} is an archive; unpack it, and set predict.input to the folder")
    raise InputError(
        f"predict.input: {file} is no image by its suffix; expected is {SUFFIXES}, or the folder that holds a DICOM series"
    )


@dataclass(kw_only=True, slots=True)
class _Search:
    """Traversal of one input folder."""

    root: Path
    pattern: str
    output: Path | None
    found: ScanList = field(default_factory=ScanList)
    links: list[Path] = field(default_factory=list)
    """Links are followed after all real folders, so that a study is named by its own path."""
    visited: set[str] = field(default_factory=set)

    def run(self) -> ScanList:
        """Visit the folder, then the targets of its links."""
        self.visited.add(os.path.realpath(self.root))
        self._visit_folder(self.root)
        for link in self.links:  # grows while links are followed
            self._visit(link)
        self.found.scans.sort(key=lambda scan: scan.name)
        return self.found

    def _visit(self, path: Path) -> None:
        mode, real = _mode(path), os.path.realpath(path)
        if not mode:
            if image_suffix(path.name) is not None or not path.suffix:
                why = f"broken link to {path.readlink()}" if path.is_symlink() else "it cannot be opened"
                self._unreadable(path, f"{why}; restore or remove it")
            return
        if real in self.visited or self.root.is_relative_to(real):
            self._leave_out("links to what is listed already, or back to predict.input", path)
        elif S_ISDIR(mode):
            self.visited.add(real)
            self._visit_folder(path)
        elif S_ISREG(mode) and image_suffix(path.name) is not None:
            self.visited.add(real)
            self.found.scans.append(Scan(name=self._name(path), path=path))

    def _visit_folder(self, folder: Path) -> None:
        try:
            entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
        except OSError as error:
            self._unreadable(folder, f"this folder cannot be read ({error.strerror}); check its permissions")
            return
        self._take_series(folder, entries)
        writable = []
        for path in entries:
            try:
                path.name.encode()
                writable.append(path)
            except UnicodeEncodeError:  # it could not be written to a table
                shown = os.fsencode(self._place(path)).decode("utf-8", "backslashreplace")
                self.found.unreadable[shown] = "its name is not in UTF-8; rename it"
        for path in self._inputs(folder, writable):
            if path.is_symlink():
                self.links.append(path)
            else:
                self._visit(path)

    def _take_series(self, folder: Path, entries: Sequence[Path]) -> None:
        files = []
        for path in entries:
            try:
                if S_ISREG(_mode(path)) and _is_dicom(path):
                    files.append(path)
            except OSError as error:
                self._unreadable(path, f"this file cannot be read ({error.strerror}); check its permissions")
        is_root = folder == self.root
        if not files or not (is_root or fnmatch(folder.name, self.pattern)):
            return
        kind = kind_of(folder.name, allowed=words_of(self.pattern))
        modality, description = _modality_and_description(files)
        if kind and not is_root:
            self._leave_out(_by_name(kind), folder)
        elif modality != "MR" and not is_root:
            self._leave_out(f"DICOM objects of modality {modality}, not MR", folder)
        else:
            self.found.scans.append(Scan(name=self._name(folder), path=folder, description=description))

    def _inputs(self, folder: Path, entries: Sequence[Path]) -> Iterator[Path]:
        """Yield the folders and the image files of a folder that are inputs."""
        folders = [path for path in entries if S_ISDIR(_mode(path))]
        files = [path for path in entries if not S_ISDIR(_mode(path))]
        layout = _layout_folders(folder, folders)
        has_results = _holds_results(folder) or folder == self.output
        for path in folders:
            kinds = [kind_of_folder(name, allowed=words_of(self.pattern)) for name in (path.name, path.resolve().name)]
            if path.name in RESULT_FOLDERS and has_results:
                self._leave_out("results of a prediction", path)
            elif (path / "contract.json").is_file():
                self._leave_out("results of stage=preprocess", path)
            elif (path / "pyvenv.cfg").is_file():
                self._leave_out("Python environments", path)
            elif layout and path.name not in layout:
                self._leave_out(OUTSIDE, path)
            elif not layout and (kind := next(filter(None, kinds), None)):
                self._leave_out(_by_name(kind), path)
            else:
                yield path
        for path in files:
            name = path.name.lower()
            if image_suffix(name) is not None and layout:
                self._leave_out(OUTSIDE, path)
            elif image_suffix(name) is None and name.endswith((*ARCHIVE_SUFFIXES, *OTHER_SUFFIXES)):
                self._leave_out("archives or files of formats that are not read (unpack or convert them)", path)
        if not layout:
            yield from self._input_files(folder, [path for path in files if fnmatch(path.name, self.pattern)])

    def _input_files(self, folder: Path, files: Sequence[Path]) -> Iterator[Path]:
        images = [path for path in files if image_suffix(path.name) is not None]
        real = folder.resolve()
        is_nnunet = real.name in NNUNET_FOLDERS
        is_own = real.name == "images" and (real.parent / "masks").is_dir()
        stems, allowed = [_stem(path) for path in images], words_of(self.pattern)
        channels = other_channels(stems, folder=real, is_nnunet=is_nnunet, allowed=allowed)
        for path, stem in zip(images, stems, strict=True):
            kind = kind_of(stem, allowed=allowed, masks_possible=not is_own)
            if stem in channels and CHANNEL.fullmatch(stem):
                self._leave_out("of other channels than T2", path)
            elif stem in channels:
                self._leave_out("without the number of a channel, such as _0000 (rename them as nnU-Net does)", path)
            elif _is_other_bids_image(path):
                self._leave_out("in BIDS folders whose name does not end in _T2w", path)
            elif kind and not is_nnunet:
                self._leave_out(_by_name(kind), path)
            else:
                yield path
        yield from (path for path in files if path.is_symlink() and not _mode(path) and not path.suffix)

    def _leave_out(self, reason: str, path: Path) -> None:
        self.found.left_out[reason].append(self._place(path))

    def _unreadable(self, path: Path, reason: str) -> None:
        self.found.unreadable[self._place(path)] = reason

    def _place(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _name(self, path: Path) -> str:
        return self.root.name if path == self.root else (path.parent.relative_to(self.root) / _stem(path)).as_posix()


def _mode(path: Path) -> int:
    """Return the mode of a path with links followed; 0 if there is no target."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def _holds_results(folder: Path) -> bool:
    """Return whether a folder is the output of a prediction, perhaps an unfinished one."""
    return all((folder / name).is_dir() for name in ("masks", "records")) and not (folder / "images").is_dir()


def _layout_folders(folder: Path, folders: Sequence[Path]) -> set[str]:
    """Return the names of a data set's image folders; empty for a folder of no known layout."""
    names = {path.name for path in folders}
    own = {"images"} if {"images", "masks"} <= names else set()
    subjects = {name for name in names if name.startswith("sub-")} if is_bids(folder) else set()
    return own | names.intersection(NNUNET_FOLDERS) | subjects


def _is_other_bids_image(path: Path) -> bool:
    """Return whether a file belongs to a BIDS subject and is not T2-weighted."""
    subjects = {part for part in path.parts[:-1] if part.startswith("sub-")}
    is_of_subject = any(path.name.startswith(f"{subject}_") for subject in subjects)
    return is_of_subject and not _stem(path).endswith("_T2w")


def _is_dicom(file: Path) -> bool:
    if image_suffix(file.name) is not None or file.name.upper() == "DICOMDIR":
        return False
    if file.name.lower().endswith(DICOM_SUFFIXES):
        return True
    with file.open("rb") as stream:
        return stream.read(MAGIC_OFFSET + len(MAGIC))[MAGIC_OFFSET:] == MAGIC


def _modality_and_description(files: Sequence[Path]) -> tuple[str, str]:
    """Return modality and Series Description of the first file that may be MR; the last file's if none is."""
    modality = description = ""
    for file in files:
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["Modality", "SeriesDescription"])
            modality, description = (str(header.get(name) or "") for name in ("Modality", "SeriesDescription"))
        except (OSError, ValueError, TypeError, AttributeError, KeyError, pydicom.errors.InvalidDicomError):
            modality = ""  # reading the series gives the error
        if modality in ("", "MR"):
            return "MR", description
    return modality, description


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else image_stem(path.name)


def _by_name(kind: str) -> str:
    return f"{kind} by their name (predict.pattern with the same word takes them)"
