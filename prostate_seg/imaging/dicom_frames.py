"""Headers of DICOM images, one `Frame` per slice: a classic file has one, an Enhanced (multi-frame) file one or many.

Positions and directions are world (x, y, z) in LPS mm, as in the headers. What places a slice in the patient is never assumed:
an attribute that is absent or cannot be read is refused by its tag. `dicom_series` checks that the frames are one volume.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pydicom
from pydicom.datadict import dictionary_description
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from prostate_seg.common.errors import VolumeError
from prostate_seg.imaging.file_integrity import require_content, require_sane_size
from prostate_seg.imaging.sitk_reader import image_suffix, reason_of

MAGIC_AT, MAGIC = 128, b"DICM"
"""What a DICOM file has after its preamble."""

FIRST_GROUPS = (b"\x08\x00", b"\x02\x00")
"""First bytes of a DICOM file that was stored without preamble, in little endian."""

COMPANION_NAMES = ("dicomdir", "thumbs.db", "desktop.ini", "lockfile", "md5sums", "sha1sums", "sha256sums")
"""Files that file systems, archives and media put beside the slices."""

COMPANION_SUFFIXES = (
    *(
        ".txt",
        ".csv",
        ".tsv",
        ".json",
        ".xml",
        ".html",
        ".htm",
        ".md",
        ".pdf",
        ".rtf",
        ".doc",
        ".docx",
        ".xls",
        ".xlsx",
    ),
    *(".log", ".ini", ".inf", ".yaml", ".yml", ".dvc", ".md5", ".sha256", ".url", ".lnk", ".bat", ".exe"),
    *(".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".bval", ".bvec", ".raw", ".zraw"),
)
"""Reports, notes, pictures and conversions, which no exporter calls a slice."""

FOREIGN_CONTENT = {
    b"\x1f\x8b": "is compressed by gzip; unpack it",
    b"PK\x03\x04": "is a zip archive; unpack it, or move it elsewhere",
    b"<": "is a web page or XML, such as a server sends in place of a file; download it again",
    b"{": "is JSON, such as a server sends in place of a file; download it again",
    b"\xff\xd8\xff": "is a JPEG picture; export the original DICOM file",
    b"\x89PNG": "is a PNG picture; export the original DICOM file",
}
"""How other files begin that were found under a slice's name."""

UNIT_LENGTH_TOLERANCE = 0.01
"""How far a direction's length may be from 1, and the cosine between two from 0: headers round to two decimals at worst."""

PIXEL_SPACING, IMAGER_PIXEL_SPACING, NOMINAL_PIXEL_SPACING = 0x00280030, 0x00181164, 0x00182010
ORIENTATION, POSITION = 0x00200037, 0x00200032
SLOPE, INTERCEPT = 0x00281053, 0x00281052
ROWS, COLUMNS, NUMBER_OF_FRAMES = 0x00280010, 0x00280011, 0x00280008
SAMPLES_PER_PIXEL, BITS_ALLOCATED, PIXEL_REPRESENTATION = 0x00280002, 0x00280100, 0x00280103
SOP_CLASS, SOP_INSTANCE, PATIENT, STUDY, SERIES = 0x00080016, 0x00080018, 0x00100020, 0x0020000D, 0x0020000E
SHARED_GROUPS, FRAME_GROUPS = 0x52009229, 0x52009230
MEASURES_GROUP, ORIENTATION_GROUP, POSITION_GROUP, RESCALE_GROUP = 0x00289110, 0x00209116, 0x00209113, 0x00289145
"""Functional groups of Enhanced objects: Pixel Measures, Plane Orientation, Plane Position, Pixel Value Transformation."""

PIXEL_DATA, UNDEFINED_LENGTH = (0x7FE0, 0x0010), 0xFFFFFFFF

HEADER_TAGS = [
    *(PIXEL_SPACING, IMAGER_PIXEL_SPACING, NOMINAL_PIXEL_SPACING, ORIENTATION, POSITION, SLOPE, INTERCEPT),
    *(ROWS, COLUMNS, NUMBER_OF_FRAMES, SAMPLES_PER_PIXEL, BITS_ALLOCATED, PIXEL_REPRESENTATION),
    *(SOP_CLASS, SOP_INSTANCE, PATIENT, STUDY, SERIES, SHARED_GROUPS, FRAME_GROUPS),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Header of one slice."""

    path: Path
    index: int
    """Which frame of the file it is, from 0."""
    num_frames: int
    """Frames of the file."""
    identity: dict[int, str]
    """Patient ID, Study and Series Instance UID by their tags; empty where absent."""
    sop_instance_uid: str
    size: tuple[int, int]
    """Columns, rows."""
    pixel_spacing_mm: tuple[float, float]
    """Along x (columns) and y (rows) of the image."""
    axes: np.ndarray
    """World directions of the image's x and y, shape [2, 3] (Image Orientation (Patient))."""
    position_mm: np.ndarray
    """World point of the first pixel's centre, shape [3] (Image Position (Patient)); NaN where the header gives none."""
    rescale: tuple[float, float]
    """Slope and intercept that turn stored values into the scanner's."""
    stored_type: tuple[int, int]
    """Bits Allocated and Pixel Representation (1 is signed)."""
    has_functional_groups: bool
    """Whether the file is an Enhanced one."""

    @property
    def normal(self) -> np.ndarray:
        """Unit vector across the slice, shape [3]."""
        across = np.cross(self.axes[0], self.axes[1])
        return across / np.linalg.norm(across)

    @property
    def name(self) -> str:
        """The file, and the frame, from 1, where it has several."""
        return self.path.name if self.num_frames == 1 else f"{self.path.name} frame {self.index + 1}"


def frames_of(path: Path) -> list[Frame]:
    """Return the frames of a file; none where it belongs beside a series, such as a report.

    Raises:
        VolumeError: If the file may be a slice and cannot be read, or does not say where its slices lie.
    """
    start = _start(path)
    if start[MAGIC_AT:] != MAGIC:
        if _is_companion(path):
            return []
        if not start.startswith(FIRST_GROUPS):
            _refuse_foreign(path, start)
    with naming_damage(path), path.open("rb") as stream:
        header = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=HEADER_TAGS, force=True)
        if not _is_image(header):
            return []
        frames = _frames(path, header)
        _require_pixels(path, header, stream)
        return frames


def is_hidden(path: Path) -> bool:
    """Return whether a file is none that was exported: hidden, or the index of a medium."""
    return path.name.startswith(".") or path.name.lower() == "dicomdir"


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Turn what pydicom and GDCM raise about a damaged file, which may be any exception, into a `VolumeError`."""
    try:
        yield
    except (VolumeError, OSError):
        raise
    except Exception as error:
        raise VolumeError(
            f"{path.name} is a DICOM file that is damaged, incomplete or no image ({reason_of(error)}); "
            "export the series again, or take the file out of the folder"
        ) from error


def _start(path: Path) -> bytes:
    if not path.exists():
        raise VolumeError(
            f"{path.name} is a link to a file that is absent; fetch it (dvc pull, git annex get), or delete the link",
            "missing_file",
        )
    with path.open("rb") as stream:
        return stream.read(MAGIC_AT + len(MAGIC))


def _is_companion(path: Path) -> bool:
    """Return whether a file without DICOM's mark is known not to be a slice; slices are numbered, or have a suffix."""
    name, suffix = path.name.lower(), path.suffix.lower()
    is_numbered = bool(suffix) or re.search(r"\d", name) is not None
    return name in COMPANION_NAMES or suffix in COMPANION_SUFFIXES or image_suffix(name) is not None or not is_numbered


def _refuse_foreign(path: Path, start: bytes) -> None:
    """Refuse a file that has the place of a slice and is not DICOM: a slice may be lost with it."""
    try:
        require_content(path)
    except VolumeError as error:
        raise VolumeError(f"{path.name}, among the files of a DICOM series: {error}", error.check) from error
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    what = next((what for begins, what in FOREIGN_CONTENT.items() if text.startswith(begins)), None)
    raise VolumeError(
        f"{path.name} lies among the files of a DICOM series and {what or 'is not DICOM; export it again'}. "
        "A file that cannot be read may be a lost slice; if it is none, take it out of the folder."
    )


def _is_image(header: pydicom.Dataset) -> bool:
    """Return whether an object has slices: reports, presentation states, segmentations and raw data have none."""
    uid = pydicom.uid.UID(_text(header, SOP_CLASS) or header.file_meta.get("MediaStorageSOPClassUID", ""))
    if uid.name != uid:
        return "Image Storage" in uid.name
    return ROWS in header or not uid  # a private class, or a header that is cut before its class


def _frames(path: Path, header: pydicom.Dataset) -> list[Frame]:
    """Return the frames that a header describes, in the order of the file."""
    size = (_integer(header, COLUMNS), _integer(header, ROWS))
    num_frames = int(_text(header, NUMBER_OF_FRAMES) or 1)
    require_sane_size((*size, num_frames))
    if (samples := _integer(header, SAMPLES_PER_PIXEL)) != 1:
        raise VolumeError(
            f"{path.name}: voxels must be single numbers, and {label(SAMPLES_PER_PIXEL)} is {samples}; "
            "export the original series",
            "vector_pixels",
        )
    shared, own = _items(header, SHARED_GROUPS)[:1], _items(header, FRAME_GROUPS)
    if num_frames < 1 or (own and len(own) != num_frames):
        raise VolumeError(
            f"{path.name}: {label(NUMBER_OF_FRAMES)} is {num_frames}, and {label(FRAME_GROUPS)} describes {len(own)} "
            "frames; export the series again"
        )
    return [
        _Attributes(path=path, header=header, groups=[*own[index : index + 1], *shared], num_frames=num_frames).frame(
            index, size=size
        )
        for index in range(num_frames)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attributes:
    """Where the attributes of one frame are found: its own functional groups, the shared ones, then the file itself."""

    path: Path
    header: pydicom.Dataset
    groups: Sequence[pydicom.Dataset]
    num_frames: int

    def frame(self, index: int, *, size: tuple[int, int]) -> Frame:
        """Return the frame's header with every value checked."""
        return Frame(
            path=self.path,
            index=index,
            num_frames=self.num_frames,
            identity={tag: _text(self.header, tag) or "" for tag in (PATIENT, STUDY, SERIES)},
            sop_instance_uid=_text(self.header, SOP_INSTANCE) or "",
            size=size,
            pixel_spacing_mm=self._pixel_spacing_mm(),
            axes=self._axes(),
            position_mm=self._position_mm(),
            rescale=self._rescale(),
            stored_type=(_integer(self.header, BITS_ALLOCATED), _integer(self.header, PIXEL_REPRESENTATION)),
            has_functional_groups=bool(self.groups),
        )

    def _pixel_spacing_mm(self) -> tuple[float, float]:
        text = self._text(MEASURES_GROUP, PIXEL_SPACING)
        if text is None:
            other = next((tag for tag in (IMAGER_PIXEL_SPACING, NOMINAL_PIXEL_SPACING) if tag in self.header), None)
            detector = f"; {label(other)} is the detector's and does not replace it" if other else ""
            raise VolumeError(
                f"{self.path.name}: {label(PIXEL_SPACING)} is absent{detector}. No spacing is assumed: export the "
                "original series",
                "no_spacing",
            )
        rows_mm, columns_mm = self._numbers(text, PIXEL_SPACING, count=2, check="no_spacing")
        if min(rows_mm, columns_mm) <= 0:
            raise self._refused(text, PIXEL_SPACING, rule="two lengths above 0 mm", check="no_spacing")
        return columns_mm, rows_mm

    def _axes(self) -> np.ndarray:
        text = self._text(ORIENTATION_GROUP, ORIENTATION)
        if text is None:
            raise VolumeError(
                f"{self.path.name}: {label(ORIENTATION)} is absent, so that left and right are unknown; export the "
                "original series",
                "no_orientation",
            )
        axes = np.array(self._numbers(text, ORIENTATION, count=6, check="no_orientation")).reshape(2, 3)
        if np.abs(axes @ axes.T - np.eye(2)).max() > UNIT_LENGTH_TOLERANCE:
            raise self._refused(text, ORIENTATION, rule="two perpendicular unit vectors", check="no_orientation")
        left, _, right = np.linalg.svd(axes, full_matrices=False)  # the nearest axes, where the header rounds
        return left @ right

    def _position_mm(self) -> np.ndarray:
        in_file = self.num_frames == 1  # the position of a file is no position of each of its frames
        text = self._text(POSITION_GROUP, POSITION, in_file=in_file)
        return np.array([np.nan] * 3 if text is None else self._numbers(text, POSITION, count=3, check="no_position"))

    def _rescale(self) -> tuple[float, float]:
        texts = {tag: self._text(RESCALE_GROUP, tag) for tag in (SLOPE, INTERCEPT)}
        values = {tag: self._numbers(text, tag, count=1)[0] for tag, text in texts.items() if text is not None}
        slope, intercept = values.get(SLOPE, 1.0), values.get(INTERCEPT, 0.0)
        if slope == 0:
            raise self._refused(texts[SLOPE] or "", SLOPE, rule="a number other than 0")
        return slope, intercept

    def _text(self, group: int, tag: int, *, in_file: bool = True) -> str | None:
        """Return an attribute as it is written, or None where it is absent or empty."""
        holders = [holder for groups in self.groups for holder in _items(groups, group)[:1]]
        texts = (_text(holder, tag) for holder in [*holders, *[self.header] * in_file])
        return next((text for text in texts if text is not None), None)

    def _numbers(self, text: str, tag: int, *, count: int, check: str = "unreadable") -> list[float]:
        try:
            values = [float(part) for part in text.replace("_", "?").split("\\")]  # Python reads 1_0 as 10
        except ValueError:
            values = []
        if len(values) != count or not np.isfinite(values).all():
            rule = (
                f"{count} numbers with decimal points, separated by \\"
                if count > 1
                else "a number with a decimal point"
            )
            raise self._refused(text, tag, rule=rule, check=check)
        return values

    def _refused(self, text: str, tag: int, *, rule: str, check: str = "unreadable") -> VolumeError:
        return VolumeError(
            f"{self.path.name}: {label(tag)} must be {rule}, and is {text}; export the original series", check
        )


def _require_pixels(path: Path, header: pydicom.FileDataset, stream: BinaryIO) -> None:
    """Refuse a file that holds fewer pixels than its header promises, which GDCM would fill with zeros.

    Args:
        path: The file.
        header: Its header.
        stream: The open file, at its Pixel Data.
    """
    if header.file_meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        return  # the stream is at its end; a cut one cannot be inflated
    is_implicit, is_little = header.original_encoding
    element = struct.Struct(("<" if is_little else ">") + ("HHL" if is_implicit else "HH4xL"))
    start = stream.read(element.size).ljust(element.size, b"\0")
    *tag, length = element.unpack(start)
    if tuple(tag) != PIXEL_DATA:
        raise VolumeError(f"{path.name}: Pixel Data (7FE0,0010) is absent; export the series again")
    if length == UNDEFINED_LENGTH:  # compressed; the decoder counts
        return
    stored = min(length, path.stat().st_size - stream.tell())
    num_frames = int(_text(header, NUMBER_OF_FRAMES) or 1)
    expected = _integer(header, ROWS) * _integer(header, COLUMNS) * num_frames * _integer(header, BITS_ALLOCATED) // 8
    if stored < expected:
        raise VolumeError(
            f"{path.name} is incomplete: it has {stored} of {expected} bytes of pixels; copy or export it again"
        )


def _integer(header: pydicom.Dataset, tag: int) -> int:
    if tag not in header:
        raise ValueError(f"{label(tag)} is absent")
    return int(header[tag].value)


def _items(header: pydicom.Dataset, sequence: int) -> list[pydicom.Dataset]:
    """Return the items of a sequence, none where it is absent."""
    return list(header[sequence].value or []) if sequence in header else []


def _text(header: pydicom.Dataset, tag: int) -> str | None:
    """Return an element as it is written, without pydicom's conversions, or None where it is absent or empty."""
    element = header.get_item(tag)
    value = b"" if element is None or element.value is None else element.value
    written = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    return written.strip("\0 ") or None


def label(tag: int) -> str:
    """Return an attribute's name and tag, such as Pixel Spacing (0028,0030)."""
    return f"{dictionary_description(tag)} {Tag(tag)}"
