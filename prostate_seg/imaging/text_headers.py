"""What the text headers of MetaImage and NRRD files say of the grid, before SimpleITK replaces what it cannot use.

SimpleITK takes a spacing that is absent as 1 mm and knows no units. A header that is not complete is left to it to refuse.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from prostate_seg.common.errors import VolumeError
from prostate_seg.imaging.file_integrity import META_HEADER_BYTES
from prostate_seg.imaging.geometry import VolumeWarning
from prostate_seg.imaging.sitk_reader import image_suffix

ORIENTATION_KEYS = ("TransformMatrix", "Rotation", "Orientation")
"""Names that MetaImage has for the directions of the axes."""

POSITION_KEYS = ("Offset", "Position", "Origin")
"""Names that MetaImage has for the place of the first voxel."""

PATIENT_SPACES = ("right-anterior-superior", "left-anterior-superior", "left-posterior-superior", "ras", "las", "lps")
"""NRRD spaces that say where the patient is; SimpleITK takes the axes of all others as LPS."""

MILLIMETRES = ("mm", "millimeter", "millimeters", "millimetre", "millimetres")

NO_UNIT = ("", "?")
"""Units that say nothing, which is mm by common practice."""


def check_text_header(path: Path) -> tuple[VolumeWarning, ...]:
    """Return the warnings of a MetaImage or NRRD header.

    Raises:
        VolumeError: If the spacing is absent, not a positive number or not in mm, or a number of the grid cannot be read.
    """
    with path.open("rb") as stream:
        start = stream.read(META_HEADER_BYTES)
    if image_suffix(path.name) == ".nrrd":
        header = re.match(rb"(?s)NRRD\d{4}\r?\n(.*?)\r?\n\r?\n", start)
        return () if header is None else _check_nrrd(_nrrd_fields(header.group(1)))
    header = re.match(rb"(?sm)(.*?^[ \t]*ElementDataFile[ \t]*[=:])", start)
    return () if header is None else _check_meta_image(_meta_fields(header.group(1)))


def _meta_fields(header: bytes) -> dict[str, str]:
    """Return the values by key; of a key that is repeated, MetaIO takes the last."""
    return dict(re.findall(r"(?m)^[ \t]*(\w+)[ \t]*[=:][ \t]*(.*?)[ \t\r]*$", header.decode("utf-8", "replace")))


def _check_meta_image(fields: Mapping[str, str]) -> tuple[VolumeWarning, ...]:
    if fields.get("NDims") in ("1", "2"):
        return ()
    if "ElementSpacing" not in fields:
        beside = " (ElementSize is the size of a voxel, which gaps between slices leave out)" * (
            "ElementSize" in fields
        )
        raise _no_spacing(f"ElementSpacing is absent from the header{beside}")
    _require_spacing("ElementSpacing", fields["ElementSpacing"].split())
    _require_millimetres("DistanceUnits", [fields.get("DistanceUnits", "")])
    for key in (*ORIENTATION_KEYS, *POSITION_KEYS):
        _require_numbers(key, fields.get(key, "").split())
    if any(key in fields for key in ORIENTATION_KEYS):
        return ()
    return (_no_orientation("TransformMatrix is absent from the header"),)


def _nrrd_fields(header: bytes) -> dict[str, str]:
    """Return the fields by name in lower case, without comments and key/value pairs."""
    lines = header.decode("utf-8", "replace").splitlines()
    pairs = (line.split(": ", maxsplit=1) for line in lines if ": " in line and not re.match(r"#|[^:]*:=", line))
    return {name.strip().lower(): value.strip() for name, value in pairs}


def _check_nrrd(fields: Mapping[str, str]) -> tuple[VolumeWarning, ...]:
    if fields.get("dimension") in ("1", "2"):
        return ()
    if "space directions" in fields:
        axes = re.findall(r"\([^)]*\)|\S+", fields["space directions"])
        _require_directions(axes, num_dimensions=fields.get("space dimension", "3"))
        _require_millimetres("space units", _units(fields.get("space units", "")))
    elif "space" in fields:
        raise _no_spacing(f"space is {fields['space']} without space directions")
    elif "spacings" in fields:
        spatial = _spatial_axes(fields.get("kinds", "").split())
        _require_spacing("spacings", _chosen(fields["spacings"].split(), spatial))
        _require_millimetres("units", _chosen(_units(fields.get("units", "")), spatial))
    else:
        raise _no_spacing("the header has neither space directions nor spacings")
    space = fields.get("space", "absent")
    if space.lower() in PATIENT_SPACES:
        return ()
    return (_no_orientation(f"space is {space}, which does not say how the patient lies"),)


def _spatial_axes(kinds: Sequence[str]) -> list[int]:
    """Return the three axes of a NRRD file that are not components of a voxel or a series."""
    spatial = [axis for axis, kind in enumerate(kinds) if kind.lower() in ("domain", "space", "none", "???")]
    return spatial[:3] if len(spatial) >= 3 else [0, 1, 2]


def _chosen(values: Sequence[str], axes: Sequence[int]) -> list[str]:
    return [values[axis] for axis in axes if axis < len(values)]


def _units(text: str) -> list[str]:
    return re.findall(r'"([^"]*)"', text) or text.split()


def _require_directions(axes: Sequence[str], *, num_dimensions: str) -> None:
    """Refuse axes of a NRRD file that are not three or more of finite length in a space of so many dimensions."""
    vectors = [[_number(part) for part in axis.strip("()").split(",")] for axis in axes if axis.lower() != "none"]
    are_vectors = all(str(len(vector)) == num_dimensions and 0 < math.hypot(*vector) < math.inf for vector in vectors)
    if len(vectors) < 3 or not are_vectors:
        raise _no_spacing(f"space directions are {' '.join(axes)}")


def _require_spacing(key: str, values: Sequence[str]) -> None:
    """Refuse values of which the first three are not positive numbers."""
    numbers = [_number(value) for value in values[:3]]
    if len(numbers) < 3 or not all(0 < number < math.inf for number in numbers):
        raise _no_spacing(f"{key} is {' '.join(values) or 'empty'}")


def _require_numbers(key: str, values: Sequence[str]) -> None:
    bad = [value for value in values if math.isnan(_number(value))]
    if bad:
        raise VolumeError(
            f"{key} has a value that is no number: {bad[0]}; write it with a decimal point, or export the volume again",
            "implausible_grid",
        )


def _require_millimetres(key: str, units: Sequence[str]) -> None:
    other = [unit for unit in units if unit.strip().lower() not in (*MILLIMETRES, *NO_UNIT)]
    if other:
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


def _no_orientation(found: str) -> VolumeWarning:
    message = (
        f"no orientation is stated: {found}; the axes are taken as LPS: compare left and right with the scanner's images, or "
        "convert the study from DICOM again"
    )
    return VolumeWarning(check="no_orientation", message=message)
