"""MetaImage and NRRD files: their text headers, checked before SimpleITK reads the voxels, and its errors, translated.

SimpleITK takes an absent spacing as 1 mm, ignores units, and overruns its memory on some damaged headers. A truncated header
has no fields here, and SimpleITK refuses it.
"""

import math
import re
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import SimpleITK as sitk

from prostate_seg.common.errors import VolumeError
from prostate_seg.imaging.file_integrity import INFLATED_CHUNK_BYTES, require_complete, require_one_volume, require_room
from prostate_seg.imaging.geometry import Finding, Geometry, Volume

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
"""Readable formats, the longest suffix first."""
ZLIB_OR_GZIP = 47
"""zlib's wbits for "either header, detected automatically"."""
ADLER_BYTES = 4
"""A zlib stream ends with its Adler-32 checksum."""
MAX_REASON = 200
"""Characters of SimpleITK's own message that an error repeats."""
HEADER_BYTES = 65536
"""Bytes at the start of a file that contain its text header; headers have a few hundred bytes."""
MAX_NRRD_LINE = 500
"""Characters of a line of a NRRD header; a damaged one of 1,000 overruns a buffer of teem, which reads it."""
LONG_NRRD_LINE = rb"(?m)^(?!#|content:|[^\n:]{1,500}:=)[^\n]{%d,}" % MAX_NRRD_LINE
"""Such a line, except comments, the content field and key/value pairs, which are free text."""
ORIENTATION_KEYS, POSITION_KEYS = ("TransformMatrix", "Rotation", "Orientation"), ("Offset", "Position", "Origin")
"""MetaImage's synonyms for the directions of the axes, and for the position of the first voxel."""
PATIENT_SPACES = ("right-anterior-superior", "left-anterior-superior", "left-posterior-superior", "ras", "las", "lps")
"""NRRD spaces that are defined by the patient; SimpleITK takes the axes of all others as LPS."""
MILLIMETRES = ("mm", "millimeter", "millimeters", "millimetre", "millimetres", "", "?")
"""Names of the unit; a unit that is absent or unknown is mm by common practice."""


class _QuietReaders:
    """Number of threads that are reading, and ITK's process-wide warning switch before the first of them."""

    lock = threading.Lock()
    count = 0
    displayed_before = True


@contextmanager
def without_itk_warnings() -> Iterator[None]:
    """Suppress ITK's warnings on stderr, which would repeat the errors raised here."""
    with _QuietReaders.lock:
        if _QuietReaders.count == 0:
            _QuietReaders.displayed_before = sitk.ProcessObject.GetGlobalWarningDisplay()
            sitk.ProcessObject.SetGlobalWarningDisplay(False)
        _QuietReaders.count += 1
    try:
        yield
    finally:
        with _QuietReaders.lock:
            _QuietReaders.count -= 1
            if _QuietReaders.count == 0:
                sitk.ProcessObject.SetGlobalWarningDisplay(_QuietReaders.displayed_before)


@contextmanager
def refusing_unreadable() -> Iterator[None]:
    """Turn SimpleITK's RuntimeError, zlib's errors and those of the disk into a `VolumeError`, without ITK's warnings."""
    try:
        with without_itk_warnings():
            yield
    except (RuntimeError, zlib.error, EOFError, OSError) as error:
        raise VolumeError(
            "the file cannot be read: it is damaged, incomplete or not in the format of its suffix "
            f"({reason_of(error)}); copy or export it again"
        ) from error


def reason_of(error: Exception) -> str:
    """Return SimpleITK's message after its source lines, on one line and without memory addresses."""
    text = str(error).rpartition("ERROR: ")[2].partition("Reason:")[0]  # MetaIO's "Reason:" is a stale errno
    words = " ".join(re.sub(r"\(0x[0-9a-f]+\)", "", text).split())
    return words if len(words) <= MAX_REASON else words[:MAX_REASON] + " ..."


def read_with_sitk(path: Path, *, channel: int | None) -> Volume:
    """Read a MetaImage or NRRD file with the axes of the file; arguments and errors as `image_io.read_volume`."""
    fields, header_bytes = read_header(path)
    warnings = check_grid(path, fields)
    reader = sitk.ImageFileReader()
    # Set here, because SimpleITK recognises suffixes in lower case only.
    reader.SetImageIO("NrrdImageIO" if path.suffix.lower() == ".nrrd" else "MetaImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    kind, num_components = sitk.GetPixelIDValueAsString(reader.GetPixelID()), reader.GetNumberOfComponents()
    require_one_volume(
        reader.GetSize(), channel=channel, kind=kind, is_complex="complex" in kind, num_components=num_components
    )

    # The file that holds the voxels may be another one; SimpleITK reports one that is absent.
    num_bytes = math.prod(reader.GetSize()) * sitk.Image([1, 1], reader.GetPixelID()).GetSizeOfPixelComponent()
    voxels = voxel_file(path, fields)
    if voxels is not None and voxels.exists():
        if not voxels.is_file():
            raise VolumeError(f"its header names {voxels.name} for the voxels, and that is no file; export it again")
        require_room(voxels, num_bytes=num_bytes)

    image = reader.Execute()
    if fields.get("CompressedData", "").upper().startswith("T") and voxels is not None and voxels.is_file():
        payload = voxels.read_bytes()[header_bytes if voxels == path else 0 :]
        _require_complete(image, payload, num_bytes=num_bytes)
    if image.GetDimension() == 4:
        image = image[:, :, :, channel or 0]
    geometry = Geometry.from_xyz(
        image.GetSize(), image.GetSpacing(), origin_mm=image.GetOrigin(), direction=image.GetDirection()
    )
    return Volume(array=sitk.GetArrayFromImage(image), geometry=geometry, warnings=warnings)


def _require_complete(image: sitk.Image, payload: bytes, *, num_bytes: int) -> None:
    """Refuse truncated and damaged compressed voxels of a MetaImage, which SimpleITK reads without an error.

    The checksum at the end of the payload is compared with that of the image; where it differs (for example because of the
    byte order), the payload is inflated a second time, which raises zlib.error if it is damaged.
    """
    checksum = zlib.adler32(memoryview(sitk.GetArrayViewFromImage(image)))
    if int.from_bytes(payload[-ADLER_BYTES:], "big") != checksum:
        stream, length = zlib.decompressobj(wbits=ZLIB_OR_GZIP), 0
        while part := stream.decompress(payload, INFLATED_CHUNK_BYTES):
            length, payload = length + len(part), stream.unconsumed_tail
        if not stream.eof:
            raise EOFError(f"its compressed data end after {length} bytes")
        require_complete(length, num_bytes=num_bytes)


def image_suffix(name: str) -> str | None:
    """Return the readable suffix that a file name ends with, in lower case, or None."""
    return next((suffix for suffix in IMAGE_SUFFIXES if name.lower().endswith(suffix)), None)


def image_stem(name: str) -> str:
    """Return a file name without its image suffix, if it has one."""
    return name[: len(name) - len(image_suffix(name) or "")]


def read_header(path: Path) -> tuple[dict[str, str], int]:
    """Return the fields of a MetaImage or NRRD header (names in lower case for NRRD), and the length of a MetaImage's in bytes.

    Raises:
        VolumeError: If the header would make SimpleITK's libraries write or read beyond their memory, which ends the process.
    """
    with path.open("rb") as stream:
        start = stream.read(HEADER_BYTES)
    if path.suffix.lower() == ".nrrd":
        return _nrrd_fields(start), 0
    dimensions = re.findall(rb"(?mi)^\s*NDims\s*=\s*(\S*)", start)
    if bad := next((value for value in dimensions if value not in (b"1", b"2", b"3", b"4")), None):
        number = bad[:20].decode("ascii", "replace")
        raise VolumeError(f"a volume has three dimensions, and the header has {number}; export it again", "not_3d")
    header = re.match(rb"(?sm).*?^[ \t]*ElementDataFile[ \t]*[=:][^\r\n]*\r?\n?", start)
    if header is None:
        return {}, 0
    # MetaIO uses the last value of a repeated key, and so does dict.
    lines = re.findall(r"(?m)^[ \t]*(\w+)[ \t]*[=:][ \t]*(.*?)[ \t\r]*$", header.group().decode("utf-8", "replace"))
    return dict(lines), header.end()


def _nrrd_fields(start: bytes) -> dict[str, str]:
    text, *rest = re.split(rb"\r?\n\r?\n", start, maxsplit=1)
    if line := re.search(LONG_NRRD_LINE, text):
        raise VolumeError(
            f"a line of its header is longer than {MAX_NRRD_LINE} characters "
            f"({line.group()[:20].decode('ascii', 'replace')}...): the header is damaged; copy or export it again"
        )
    if not re.match(rb"NRRD\d{4}\r?\n", text):
        return {}
    # Comments and key/value pairs, which are written "key:=value", are no fields.
    lines = [line for line in text.decode("utf-8", "replace").splitlines() if not re.match(r"#|[^:]*:=", line)]
    fields = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(": ") for line in lines) if value
    }
    return fields if rest or "data file" in fields or "datafile" in fields else {}


def voxel_file(path: Path, fields: Mapping[str, str]) -> Path | None:
    """Return the file that holds the voxels, which a header may name; None where it names several."""
    keys = ("data file", "datafile") if path.suffix.lower() == ".nrrd" else ("ElementDataFile",)
    name = next((fields[key] for key in keys if fields.get(key)), "LOCAL")
    if name.upper() == "LOCAL":
        return path
    return None if name.split()[0].upper() == "LIST" or "%" in name else path.parent / name


def check_grid(path: Path, fields: Mapping[str, str]) -> tuple[Finding, ...]:
    """Return the warnings about a header.

    Raises:
        VolumeError: If the spacing is absent, not a positive number or not in mm, or a number of the grid cannot be read.
    """
    if not fields or fields.get("NDims", fields.get("dimension")) in ("1", "2"):
        return ()
    found = _check_nrrd(fields) if path.suffix.lower() == ".nrrd" else _check_meta_image(fields)
    if not found:
        return ()
    message = (
        f"no orientation is stated: {found}; the axes are taken as LPS: compare left and right with the scanner's images, or "
        "convert the study from DICOM again"
    )
    return (Finding("no_orientation", message),)


def _check_meta_image(fields: Mapping[str, str]) -> str:
    """Check the grid of a MetaImage, and return why its orientation is unknown; an empty text if it is known."""
    if "ElementSpacing" not in fields:
        beside = " (ElementSize is the size of a voxel, without gaps between slices)" if "ElementSize" in fields else ""
        raise _no_spacing(f"ElementSpacing is absent from the header{beside}")
    _require_spacing("ElementSpacing", fields["ElementSpacing"].split())
    _require_millimetres("DistanceUnits", [fields.get("DistanceUnits", "")])
    for key in (*ORIENTATION_KEYS, *POSITION_KEYS):
        if bad := [value for value in fields.get(key, "").split() if math.isnan(_number(value))]:
            raise VolumeError(
                f"{key} has a value that is no number: {bad[0]}; write it with a decimal point, or export the volume again",
                "implausible_grid",
            )
    return "" if any(key in fields for key in ORIENTATION_KEYS) else "TransformMatrix is absent from the header"


def _check_nrrd(fields: Mapping[str, str]) -> str:
    """Check the grid of a NRRD file, and return why its orientation is unknown; an empty text if it is known."""
    if "space directions" in fields:
        axes = re.findall(r"\([^)]*\)|\S+", fields["space directions"])
        vectors = [[_number(part) for part in axis.strip("()").split(",")] for axis in axes if axis.lower() != "none"]
        num_dimensions = fields.get("space dimension", "3")
        are_vectors = all(str(len(one)) == num_dimensions and 0 < math.hypot(*one) < math.inf for one in vectors)
        if len(vectors) < 3 or not are_vectors:
            raise _no_spacing(f"space directions are {' '.join(axes)}")
        _require_millimetres("space units", _units(fields.get("space units", "")))
    elif "space" in fields:
        raise _no_spacing(f"space is {fields['space']} without space directions")
    elif "spacings" in fields:
        # The three spatial axes; others are components of a voxel or a series.
        kinds = fields.get("kinds", "").lower().split()
        spatial = [axis for axis, kind in enumerate(kinds) if kind in ("domain", "space", "none", "???")]
        spatial = spatial[:3] if len(spatial) >= 3 else [0, 1, 2]
        values, units = fields["spacings"].split(), _units(fields.get("units", ""))
        _require_spacing("spacings", [values[axis] for axis in spatial if axis < len(values)])
        _require_millimetres("units", [units[axis] for axis in spatial if axis < len(units)])
    else:
        raise _no_spacing("the header has neither space directions nor spacings")
    space = fields.get("space", "absent")
    return "" if space.lower() in PATIENT_SPACES else f"space is {space}, which is not relative to the patient"


def _units(text: str) -> list[str]:
    return re.findall(r'"([^"]*)"', text) or text.split()


def _require_spacing(key: str, values: Sequence[str]) -> None:
    numbers = [_number(value) for value in values[:3]]
    if len(numbers) < 3 or not all(0 < number < math.inf for number in numbers):
        raise _no_spacing(f"{key} is {' '.join(values) or 'empty'}")


def _require_millimetres(key: str, units: Sequence[str]) -> None:
    if other := [unit for unit in units if unit.strip().lower() not in MILLIMETRES]:
        raise VolumeError(f"lengths are in mm, and {key} is {other[0]}; convert the header to mm", "not_in_mm")


def _number(value: str) -> float:
    """Return a number with a decimal point; NaN for everything else."""
    try:
        return float(value)
    except ValueError:
        return math.nan


def _no_spacing(found: str) -> VolumeError:
    return VolumeError(
        f"a spacing is a positive number of mm for each axis, and {found}; write the true spacing into the header, with a "
        "decimal point, or export the volume again",
        "no_spacing",
    )
