"""Headers of DICOM images, one `Frame` per slice: a classic file has one, an Enhanced (multi-frame) file one or many.

Positions and directions are world (x, y, z) in LPS mm, as in the headers. What places a slice in the patient is never assumed:
an attribute that is absent or cannot be read is refused by its tag. `dicom_series` checks that the frames are one volume.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pydicom
from pydicom.datadict import dictionary_description
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from prostate_seg.common.errors import VolumeError
from prostate_seg.imaging.file_integrity import require_content, require_sane_size
from prostate_seg.imaging.sitk_reader import image_suffix, reason_of

MAGIC_OFFSET, MAGIC = 128, b"DICM"
"""Mark of a DICOM file after its preamble."""
FIRST_GROUPS = (b"\x08\x00", b"\x02\x00")
"""First bytes of a DICOM file that was stored without preamble, in little endian."""
COMPANION_NAMES = ("dicomdir", "thumbs.db", "desktop.ini", "lockfile", "md5sums", "sha1sums", "sha256sums")

COMPANION_SUFFIXES = (
    *(".txt", ".csv", ".tsv", ".json", ".xml", ".html", ".htm", ".md", ".pdf", ".rtf", ".doc", ".docx", ".xls"),
    *(".xlsx", ".log", ".ini", ".inf", ".yaml", ".yml", ".dvc", ".md5", ".sha256", ".url", ".lnk", ".bat", ".exe"),
    *(".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".bval", ".bvec", ".raw", ".zraw"),
)
"""Reports, notes, pictures, conversions and files of media beside the slices; no exporter gives a slice such a name."""
FOREIGN_CONTENT = {
    b"\x1f\x8b": "is compressed by gzip; unpack it",
    b"PK\x03\x04": "is a zip archive; unpack it, or move it elsewhere",
    b"<": "is a web page or XML, such as a server sends in place of a file; download it again",
    b"{": "is JSON, such as a server sends in place of a file; download it again",
    b"\xff\xd8\xff": "is a JPEG picture; export the original DICOM file",
    b"\x89PNG": "is a PNG picture; export the original DICOM file",
}
"""First bytes of other files that were found under a slice's name."""
UNIT_LENGTH_TOLERANCE = 0.01
"""Largest deviation of a direction from unit length, and of the cosine between two from 0: some headers have two decimals."""
IDENTITY = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
DETECTOR_SPACINGS = ("ImagerPixelSpacing", "NominalScannedPixelSpacing")
FUNCTIONAL_GROUPS = {
    "PixelSpacing": "PixelMeasuresSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "ImagePositionPatient": "PlanePositionSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
}
"""Functional group of an Enhanced object that holds an attribute."""
PIXEL_ATTRIBUTES = [
    *("SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "BitsAllocated"),
    *("BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
]
"""Attributes that are needed to decode the stored values of a file."""
HEADER = [
    *(*IDENTITY, *DETECTOR_SPACINGS, *FUNCTIONAL_GROUPS, *PIXEL_ATTRIBUTES, "SOPClassUID"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
"""Attributes that are read; a raw data object may have hundreds of megabytes in others."""
UNDEFINED_LENGTH = 0xFFFFFFFF
"""Length of compressed Pixel Data, whose decoder counts the pixels."""
NO_RESCALE = (1.0, 0.0)
"""Slope and intercept that keep stored values."""


class Frame:
    """Header of one slice, checked: from its own functional groups, the shared ones, then the file itself."""

    def __init__(
        self, path: Path, header: pydicom.Dataset, *, index: int, num_frames: int, groups: Sequence[pydicom.Dataset]
    ) -> None:
        self.path, self.index, self.num_frames = path, index, num_frames
        self.name = path.name if num_frames == 1 else f"{path.name} frame {index + 1}"
        self.identity = {keyword: _text(header, keyword) or "" for keyword in IDENTITY}
        """Patient ID and UIDs by keyword; empty where absent."""
        self.size = _integer(header, "Columns"), _integer(header, "Rows")
        self.stored_type = _integer(header, "BitsAllocated"), _integer(header, "PixelRepresentation")
        """Bits Allocated and Pixel Representation (1 is signed)."""
        self._header, self._groups = header, groups
        self.pixel_spacing_mm = self._read_pixel_spacing_mm()
        """Along x (columns) and y (rows) of the image."""
        self.axes = self._read_axes()
        """World directions of the image's x and y, shape [2, 3] (Image Orientation (Patient))."""
        across = np.cross(self.axes[0], self.axes[1])
        self.normal = across / np.linalg.norm(across)
        """Unit vector across the slice, shape [3]."""
        self.position_mm = np.array(self._numbers("ImagePositionPatient", count=3, check="no_position", default=np.nan))
        """World point of the first pixel's centre, shape [3] (Image Position (Patient)); NaN where the header has none."""
        self.rescale = self._read_rescale()
        """Slope and intercept that turn stored values into the scanner's."""
        self.is_plain = not groups and self.rescale == NO_RESCALE
        """Whether GDCM reads the stored values of the file; else it rescales all frames like the first one."""

    def _read_pixel_spacing_mm(self) -> tuple[float, float]:
        other = next((keyword for keyword in DETECTOR_SPACINGS if keyword in self._header), None)
        absent = f", and {label(other)} is the detector's and does not replace it" if other else ", and none is assumed"
        rows_mm, columns_mm = self._numbers("PixelSpacing", count=2, check="no_spacing", absent=absent)
        if min(rows_mm, columns_mm) <= 0:
            raise self._refused("PixelSpacing", rule="two lengths above 0 mm", check="no_spacing")
        return columns_mm, rows_mm

    def _read_axes(self) -> np.ndarray:
        keyword, check = "ImageOrientationPatient", "no_orientation"
        numbers = self._numbers(keyword, count=6, check=check, absent=", so that left and right are unknown")
        axes = np.array(numbers).reshape(2, 3)
        if np.abs(axes @ axes.T - np.eye(2)).max() > UNIT_LENGTH_TOLERANCE:
            raise self._refused(keyword, rule="two perpendicular unit vectors", check=check)
        left, _, right = np.linalg.svd(axes, full_matrices=False)  # the nearest axes, where the header rounds
        return left @ right

    def _read_rescale(self) -> tuple[float, float]:
        (slope,) = self._numbers("RescaleSlope", count=1, default=1.0)
        (intercept,) = self._numbers("RescaleIntercept", count=1, default=0.0)
        if slope == 0:
            raise self._refused("RescaleSlope", rule="a number other than 0")
        return slope, intercept

    def _text(self, keyword: str) -> str | None:
        """Return an attribute as it is written, or None where it is absent or empty."""
        holders = [holder for group in self._groups for holder in _items(group, FUNCTIONAL_GROUPS[keyword])[:1]]
        if self.num_frames == 1 or keyword != "ImagePositionPatient":  # a file's position is not that of each frame
            holders.append(self._header)
        return next((text for holder in holders if (text := _text(holder, keyword)) is not None), None)

    def _numbers(
        self, keyword: str, *, count: int, check: str = "unreadable", absent: str = "", default: float | None = None
    ) -> list[float]:
        """Return the numbers of an attribute; where it is absent the default, or the refusal with the consequence."""
        text = self._text(keyword)
        if text is None and default is not None:
            return [default] * count
        if text is None:
            raise VolumeError(
                f"{self.path.name}: {label(keyword)} is absent{absent}; export the original series", check
            )
        try:
            values = [float(part) for part in text.replace("_", "?").split("\\")]  # Python reads 1_0 as 10
        except ValueError:
            values = []
        if len(values) != count or not np.isfinite(values).all():
            several = f"{count} numbers with decimal points, separated by \\"
            raise self._refused(keyword, rule=several if count > 1 else "a number with a decimal point", check=check)
        return values

    def _refused(self, keyword: str, *, rule: str, check: str = "unreadable") -> VolumeError:
        found = f"must be {rule}, and is {self._text(keyword)}"
        return VolumeError(f"{self.path.name}: {label(keyword)} {found}; export the original series", check)


def frames_of(path: Path) -> list[Frame]:
    """Return the frames of a file; none of a file that accompanies a series, such as a report.

    Raises:
        VolumeError: If the file may be a slice and cannot be read, or lacks what places its slices in the patient.
    """
    if not path.exists():
        raise VolumeError(
            f"{path.name} is a link to a file that is absent; fetch it (dvc pull, git annex get), or delete the link",
            "missing_file",
        )
    with path.open("rb") as stream:
        start = stream.read(MAGIC_OFFSET + len(MAGIC))
    if start[MAGIC_OFFSET:] != MAGIC:
        # Slices have a suffix of their own or a number in their name.
        name, suffix = path.name.lower(), path.suffix.lower()
        is_companion = name in COMPANION_NAMES or suffix in COMPANION_SUFFIXES or image_suffix(name) is not None
        if is_companion or not (suffix or re.search(r"\d", name)):
            return []
        if not start.startswith(FIRST_GROUPS):
            _refuse_foreign(path, start)
    with naming_damage(path):
        header = pydicom.dcmread(path, specific_tags=list(HEADER), force=True)
        # Reports, presentation states, segmentations and raw data have no slices.
        uid = pydicom.uid.UID(_text(header, "SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID", ""))
        is_known = uid.name != uid  # others: a private class, or a header that is cut before its class
        if not ("Image Storage" in uid.name if is_known else "Rows" in header or not uid):
            return []
        frames = _frames(path, header)
        _require_pixels(path, header, frames[0])
        return frames


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Turn the exceptions of pydicom and GDCM about a damaged file, which may be of any class, into a `VolumeError`."""
    try:
        yield
    except (VolumeError, OSError):
        raise
    except Exception as error:
        raise VolumeError(
            f"{path.name} is a DICOM file that is damaged, incomplete or no image ({reason_of(error)}); "
            "export the series again, or take the file out of the folder"
        ) from error


def label(keyword: str) -> str:
    """Return an attribute's name and tag, such as Pixel Spacing (0028,0030)."""
    return f"{dictionary_description(keyword)} {Tag(keyword)}"


def _refuse_foreign(path: Path, start: bytes) -> None:
    """Refuse a file with the name of a slice that is not DICOM: a slice may be lost with it."""
    try:
        require_content(path)
    except VolumeError as error:
        raise VolumeError(f"{path.name}, among the files of a DICOM series: {error}", error.check) from error
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    found = next((found for magic, found in FOREIGN_CONTENT.items() if text.startswith(magic)), None)
    raise VolumeError(
        f"{path.name} lies among the files of a DICOM series and {found or 'is not DICOM; export it again'}. "
        "A file that cannot be read may be a lost slice; if it is none, take it out of the folder."
    )


def _frames(path: Path, header: pydicom.Dataset) -> list[Frame]:
    """Return the frames that a header describes, in the order of the file."""
    size = (_integer(header, "Columns"), _integer(header, "Rows"))
    num_frames = int(_text(header, "NumberOfFrames") or 1)
    require_sane_size((*size, num_frames))
    if (samples := _integer(header, "SamplesPerPixel")) != 1:
        raise VolumeError(
            f"{path.name}: voxels must be single numbers, and {label('SamplesPerPixel')} is {samples}; "
            "export the original series",
            "vector_pixels",
        )
    shared = _items(header, "SharedFunctionalGroupsSequence")[:1]
    own = _items(header, "PerFrameFunctionalGroupsSequence")
    if num_frames < 1 or (own and len(own) != num_frames):
        raise VolumeError(
            f"{path.name}: {label('NumberOfFrames')} is {num_frames}, and {label('PerFrameFunctionalGroupsSequence')} "
            f"describes {len(own)} frames; export the series again"
        )
    return [
        Frame(path, header, index=index, num_frames=num_frames, groups=[*own[index : index + 1], *shared])
        for index in range(num_frames)
    ]


def _require_pixels(path: Path, header: pydicom.Dataset, frame: Frame) -> None:
    """Refuse a file with fewer pixels than announced, which GDCM would fill with zeros."""
    element = header.pop("PixelData", None)  # the frames keep the rest
    if not isinstance(element, RawDataElement):
        raise VolumeError(f"{path.name}: Pixel Data (7FE0,0010) is absent; export the series again")
    num_bits = math.prod(frame.size) * frame.num_frames * frame.stored_type[0]
    stored, expected = len(element.value or b""), num_bits // 8
    if element.length != UNDEFINED_LENGTH and stored < expected:
        raise VolumeError(
            f"{path.name} is incomplete: it has {stored} of {expected} bytes of pixels; copy or export it again"
        )


def _integer(header: pydicom.Dataset, keyword: str) -> int:
    if keyword not in header:
        raise ValueError(f"{label(keyword)} is absent")
    return int(header[keyword].value)


def _items(header: pydicom.Dataset, sequence: str) -> list[pydicom.Dataset]:
    return list(header[sequence].value or []) if sequence in header else []


def _text(header: pydicom.Dataset, keyword: str) -> str | None:
    """Return an element as it is written, without pydicom's conversions, or None where it is absent or empty."""
    element = header.get_item(keyword)
    value = b"" if element is None or element.value is None else element.value
    written = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    return written.strip("\0 ") or None
