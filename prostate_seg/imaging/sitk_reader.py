"""MetaImage and NRRD files read with SimpleITK, whose errors are translated."""

import math
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import SimpleITK as sitk

from prostate_seg.common.errors import VolumeError
from prostate_seg.imaging.file_integrity import INFLATED_CHUNK_BYTES, require_complete, require_one_volume, require_room
from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.text_headers import check_grid, read_header, voxel_file

IMAGE_IO = {
    ".nii.gz": "NiftiImageIO",
    ".nii": "NiftiImageIO",
    ".nrrd": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
}
"""SimpleITK's reader for each suffix, longest suffix first; naming it makes upper-case suffixes work too."""
ZLIB_OR_GZIP = 47
"""zlib's wbits for "either header, detected automatically"."""
ADLER_BYTES = 4
"""A zlib stream ends with its Adler-32 checksum."""
MAX_REASON = 200
"""Characters of SimpleITK's own message that an error repeats."""


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
    reader.SetImageIO(IMAGE_IO[path.suffix.lower()])
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
    return Volume(array=sitk.GetArrayFromImage(image), geometry=geometry_of(image), warnings=warnings)


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


def geometry_of(image: sitk.Image) -> Geometry:
    """Return the grid of a three-dimensional SimpleITK image."""
    return Geometry.from_xyz(
        image.GetSize(), image.GetSpacing(), origin_mm=image.GetOrigin(), direction=image.GetDirection()
    )


def image_suffix(name: str) -> str | None:
    """Return the readable suffix that a file name ends with, in lower case, or None."""
    return next((suffix for suffix in IMAGE_IO if name.lower().endswith(suffix)), None)


def image_stem(name: str) -> str:
    """Return a file name without its image suffix, if it has one."""
    return name[: len(name) - len(image_suffix(name) or "")]
