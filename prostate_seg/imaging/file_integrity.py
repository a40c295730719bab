"""Whether a file can hold, and then whether it holds, all that its header promises.

SimpleITK fills what is missing of a NIfTI file with zeros, and of a compressed MetaImage with whatever was in memory; it checks
no checksum in either. NRRD files and uncompressed MetaImages it checks itself.
"""

import math
import os
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import SimpleITK as sitk

from prostate_seg.errors import VolumeError
from prostate_seg.imaging.sitk_reader import LFS_POINTER, image_suffix

GZIP_MAGIC = b"\x1f\x8b"
"""First bytes of a gzip stream."""

ZLIB_OR_GZIP = 47
"""zlib's code for "either header", which MetaIO accepts too."""

GZIP_TRAILER = struct.Struct("<II")
"""CRC-32 and length modulo 2^32 of what was compressed."""

ADLER_BYTES = 4
"""A zlib stream ends with its Adler-32 checksum."""

NIFTI_START_BYTES = 65536
"""Compressed bytes that surely hold a NIfTI header, which is 352 bytes and seldom more."""

META_HEADER_BYTES = 65536
"""Part of a MetaImage file in which the text header ends; headers are a few hundred bytes."""

MAX_NRRD_LINE = 500
"""Characters of a line of a NRRD header; a damaged one of 1,000 overruns a buffer of teem, which reads it."""

NRRD_LONG_LINE = rb"(?m)^(?!#|content:|[^\n:]{1,500}:=)[^\n]{%d,}" % MAX_NRRD_LINE
"""Such a line, but a comment, the content or a key with its value, which are text."""

MAX_AXIS_VOX = 4096
"""Most voxels along an axis; the finest scans have about 1,000."""

MAX_VOXELS = 2**28
"""Most voxels of a volume, 512 x 512 x 1024; a T2-weighted study has 3 to 50 million."""

MOST_INFLATION = 1032
"""Deflate makes a byte of at most so many; a header that promises more cannot be true."""

INFLATED_CHUNK_BYTES = 2**24
"""Part of a compressed file that is in memory at once while its length is counted."""


def require_content(path: Path) -> None:
    """Refuse empty files and Git LFS pointers."""
    with path.open("rb") as stream:
        start = stream.read(len(LFS_POINTER))
    if not start:
        raise VolumeError("the file is empty (0 bytes); copy or export it again")
    if start == LFS_POINTER:
        raise VolumeError(
            "this is a Git LFS pointer, not the image itself; run `git lfs pull` (or `dvc pull`) where it came from",
            "lfs_pointer",
        )


def require_sane_header(path: Path) -> None:
    """Refuse text headers that let SimpleITK's libraries write or read beyond their own memory, which ends the process."""
    suffix = image_suffix(path.name) or ""
    if suffix not in (".mha", ".mhd", ".nrrd"):
        return
    with path.open("rb") as stream:
        start = stream.read(META_HEADER_BYTES)
    header = re.split(rb"\r?\n\r?\n", start, maxsplit=1)[0] if suffix == ".nrrd" else start
    if suffix == ".nrrd" and (line := re.search(NRRD_LONG_LINE, header)):
        raise VolumeError(
            f"a line of its header is longer than {MAX_NRRD_LINE} characters "
            f"({line.group()[:20].decode('ascii', 'replace')}...): the header is damaged; copy or export it again"
        )
    said = re.findall(rb"(?mi)^\s*NDims\s*=\s*(\S*)", header) if suffix != ".nrrd" else []
    if bad := next((value for value in said if value not in (b"1", b"2", b"3", b"4")), None):
        number = bad[:20].decode("ascii", "replace")
        raise VolumeError(f"a volume has three dimensions, and the header says {number}; export it again", "not_3d")


def require_sane_size(size_xyz: Sequence[int]) -> None:
    """Refuse sizes that no study has, before memory is set aside for them."""
    if max(size_xyz) <= MAX_AXIS_VOX and math.prod(size_xyz) <= MAX_VOXELS:
        return
    size = " x ".join(str(length) for length in size_xyz)
    raise VolumeError(
        f"a volume has at most {MAX_AXIS_VOX} voxels along an axis and {MAX_VOXELS} in all, and the header says {size}; "
        "it may be damaged: export the volume again",
        "too_large",
    )


def require_room(path: Path, reader: sitk.ImageFileReader) -> None:
    """Refuse a header that promises more than the file can hold, before memory is set aside for it.

    Raises:
        VolumeError: If it does, or names voxels that are not in a file.
    """
    voxels = _voxel_file(path)
    if voxels is None or not voxels.exists():
        return
    if not voxels.is_file():
        raise VolumeError(f"its header names {voxels.name} for the voxels, and that is no file; export it again")
    promised, stored = _voxel_bytes(reader), voxels.stat().st_size
    if promised > MOST_INFLATION * stored:
        raise VolumeError(
            f"the file is incomplete: its header promises {promised} bytes of voxels, which {stored} bytes cannot hold; "
            "copy or export it again"
        )


def _voxel_file(path: Path) -> Path | None:
    """Return the file with the voxels, which a .mhd or .nrrd may name; None where it names several."""
    pattern = {".mhd": rb"(?m)^ElementDataFile *= *(.+?)\s*$", ".nrrd": rb"(?mi)^data ?file: *(.+?)\s*$"}
    suffix = image_suffix(path.name) or ""
    with path.open("rb") as stream:
        start = stream.read(META_HEADER_BYTES) if suffix in pattern else b""
    named = re.search(pattern[suffix], start.partition(b"\n\n")[0]) if suffix in pattern else None
    if named is None:
        return path
    name = named.group(1).decode(errors="replace").strip()
    return None if not name or name.split()[0].upper() == "LIST" or "%" in name else path.parent / name


def require_complete(path: Path, reader: sitk.ImageFileReader, image: sitk.Image) -> None:
    """Refuse cut and damaged files that SimpleITK would read without a word.

    The checksum at the end of a compressed file is compared with the voxels that were read; only where it differs, as it
    also does for rescaled voxels, the file is inflated a second time.

    Args:
        path: The file.
        reader: Its reader, with the header.
        image: What it read.

    Raises:
        VolumeError: If the file holds fewer bytes than its header promises.
        zlib.error: If its compressed bytes are damaged.
    """
    io = reader.GetImageIO()
    voxels = memoryview(sitk.GetArrayViewFromImage(image))
    if io == "NiftiImageIO":
        if _nifti_trailer_agrees(path, reader, voxels):
            return
        expected, stored = _nifti_bytes(reader), _nifti_stored_bytes(path)
    elif io == "MetaImageIO" and (payload := _meta_payload(path)) is not None:
        if int.from_bytes(payload[-ADLER_BYTES:], "big") == zlib.adler32(voxels):
            return
        expected, stored = _voxel_bytes(reader), _inflated_bytes(payload)
    else:
        return
    if stored < expected:
        raise VolumeError(f"the file is incomplete: it has {stored} of {expected} bytes; copy or export it again")


def _nifti_trailer_agrees(path: Path, reader: sitk.ImageFileReader, voxels: memoryview) -> bool:
    """Return whether the checksum and length that end a gzip file are those of its header and these voxels."""
    offset = int(float(reader.GetMetaData("vox_offset")))
    with path.open("rb") as stream:
        start = stream.read(NIFTI_START_BYTES)
        if not start.startswith(GZIP_MAGIC) or path.stat().st_size < len(GZIP_MAGIC) + GZIP_TRAILER.size:
            return False
        stream.seek(-GZIP_TRAILER.size, os.SEEK_END)
        checksum, length = GZIP_TRAILER.unpack(stream.read())
    header = zlib.decompressobj(wbits=ZLIB_OR_GZIP).decompress(start, offset)
    return checksum == zlib.crc32(voxels, zlib.crc32(header)) and length == (len(header) + voxels.nbytes) % 2**32


def _nifti_bytes(reader: sitk.ImageFileReader) -> int:
    """Return the length that the header promises, header included."""
    sizes = [int(reader.GetMetaData(f"dim[{axis}]")) for axis in range(1, int(reader.GetMetaData("dim[0]")) + 1)]
    return int(float(reader.GetMetaData("vox_offset"))) + math.prod(sizes) * int(reader.GetMetaData("bitpix")) // 8


def _nifti_stored_bytes(path: Path) -> int:
    with path.open("rb") as stream:
        is_compressed = stream.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    return _inflated_bytes(path.read_bytes()) if is_compressed else path.stat().st_size


def _voxel_bytes(reader: sitk.ImageFileReader) -> int:
    voxel = sitk.Image([1, 1], reader.GetPixelID())
    return math.prod(reader.GetSize()) * voxel.GetSizeOfPixelComponent()


def _meta_payload(path: Path) -> bytes | None:
    """Return the compressed voxels of a MetaImage, or None if they are not compressed or in several files."""
    start = path.read_bytes() if image_suffix(path.name) == ".mha" else path.read_bytes()[:META_HEADER_BYTES]
    header = re.match(rb"(?s).*?^ElementDataFile *= *([^\r\n]*)\r?\n?", start[:META_HEADER_BYTES], re.MULTILINE)
    if header is None or not re.search(rb"(?im)^CompressedData *= *T", header.group()):
        return None
    if header.group(1).strip().upper() == b"LOCAL":
        return start[header.end() :]
    data = path.parent / header.group(1).decode(errors="replace").strip()
    return data.read_bytes() if data.is_file() else None


def _inflated_bytes(data: bytes) -> int:
    """Return the length of a zlib or gzip stream once inflated, with every checksum tested.

    Raises:
        VolumeError: If the stream breaks off.
        zlib.error: If it is damaged.
    """
    length = 0
    while True:
        stream = zlib.decompressobj(wbits=ZLIB_OR_GZIP)
        while inflated := stream.decompress(data, INFLATED_CHUNK_BYTES):
            length += len(inflated)
            data = stream.unconsumed_tail
        if not stream.eof:
            raise VolumeError(
                f"the file is incomplete: its compressed data break off after {length} bytes; copy it again"
            )
        data = stream.unused_data
        if not data.startswith(GZIP_MAGIC):
            return length
