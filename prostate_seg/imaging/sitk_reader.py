"""Opening files with SimpleITK, and its errors in words for people."""

import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import SimpleITK as sitk

from prostate_seg.common.errors import VolumeError

IMAGE_IO = {
    ".nii.gz": "NiftiImageIO",
    ".nii": "NiftiImageIO",
    ".nrrd": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
}
"""SimpleITK's reader for each suffix, longest suffix first; naming it makes upper-case suffixes work too."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a Git LFS pointer begins; it stands in a checkout for a file that was not downloaded."""

MAX_REASON = 200
"""Characters of SimpleITK's own words that an error repeats."""


class _QuietReaders:
    """How many threads read now, and whether ITK displayed warnings before the first of them; it has one switch for all."""

    lock = threading.Lock()
    count = 0
    displayed_before = True


@contextmanager
def without_itk_warnings() -> Iterator[None]:
    """Keep ITK from writing warnings to stderr, which would repeat what the errors here say."""
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


def open_reader(path: Path, *, image_io: str) -> sitk.ImageFileReader:
    """Return a reader that has read the header."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO(image_io)
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


@contextmanager
def refusing_unreadable() -> Iterator[None]:
    """Turn SimpleITK's RuntimeError, zlib's errors and those of the disk into a `VolumeError`, without ITK's warnings."""
    try:
        with without_itk_warnings():
            yield
    except (RuntimeError, zlib.error, OSError) as error:
        raise VolumeError(
            "the file cannot be read: it is damaged, incomplete or not what its suffix says "
            f"({reason_of(error)}); copy or export it again"
        ) from error


def reason_of(error: Exception) -> str:
    """Return what SimpleITK says after its source lines, on one line and without memory addresses."""
    said = str(error).rpartition("ERROR: ")[2].partition("Reason:")[0]  # MetaIO's "Reason:" is a stale errno
    words = " ".join(re.sub(r"\(0x[0-9a-f]+\)", "", said).split())
    return words if len(words) <= MAX_REASON else words[:MAX_REASON] + " ..."


def require_scalar_pixels(reader: sitk.ImageFileReader) -> None:
    """Refuse complex numbers, vectors and colours."""
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if "complex" in kind:
        raise VolumeError(f"voxels must be real numbers, and these are {kind}; export the magnitude", "complex_pixels")
    if reader.GetNumberOfComponents() != 1:
        raise VolumeError(
            f"voxels must be single numbers, and these have {reader.GetNumberOfComponents()} components ({kind}); "
            "export one channel",
            "vector_pixels",
        )


def image_suffix(name: str) -> str | None:
    """Return the readable suffix that a file name ends with, in lower case, or None."""
    return next((suffix for suffix in IMAGE_IO if name.lower().endswith(suffix)), None)
