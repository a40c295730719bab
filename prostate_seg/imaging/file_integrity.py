"""Whether a file can hold, and then whether it holds, all that its header promises.

SimpleITK fills what is missing of a compressed MetaImage with whatever was in memory, and checks no checksum. NRRD files and
uncompressed MetaImages it checks itself. nibabel stops after the last voxel of a compressed file, before its checksum.
"""

import math
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import SimpleITK as sitk

from prostate_seg.common.errors import VolumeError
from prostate_seg.imaging.sitk_reader import LFS_POINTER, image_suffix

GZIP_MAGIC = b"\x1f\x8b"
"""First bytes of a gzip stream."""

ZLIB_OR_GZIP = 47
"""zlib's code for "either header"; MetaIO accepts both too."""

ADLER_BYTES = 4
"""A zlib stream ends with its Adler-32 checksum."""

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


def require_three_dimensional(size_xyz: Sequence[int], *, channel: int | None) -> None:
    """Refuse single images and series of volumes; a fourth dimension of one, or with the wanted channel, is no harm."""
    num_wanted = 1 if channel is None else size_xyz[-1]
    if len(size_xyz) == 3 or (len(size_xyz) == 4 and size_xyz[3] == num_wanted > (channel or 0)):
        return
    size = " x ".join(str(length) for length in size_xyz)
    raise VolumeError(
        f"a volume has three dimensions, and this has {len(size_xyz)} ({size} voxels); "
        "export one T2-weighted volume to a file",
        "not_3d",
    )


def require_sane_size(size_xyz: Sequence[int]) -> None:
    """Refuse sizes that no study has, before memory is set aside for them."""
    if min(size_xyz) > 0 and max(size_xyz) <= MAX_AXIS_VOX and math.prod(size_xyz) <= MAX_VOXELS:
        return
    size = " x ".join(str(length) for length in size_xyz)
    raise VolumeError(
        f"a volume has 1 to {MAX_AXIS_VOX} voxels along an axis and {MAX_VOXELS} in all, and the header says {size}; "
        "it may be damaged: export the volume again",
        "too_large",
    )


def require_room(voxels: Path, *, num_bytes: int) -> None:
    """Refuse a header that promises more bytes than a file, compressed or not, can hold, before memory is set aside."""
    stored = voxels.stat().st_size
    if num_bytes > MOST_INFLATION * stored:
        raise VolumeError(
            f"the file is incomplete: its header promises {num_bytes} bytes of voxels, which {stored} bytes cannot hold; "
            "copy or export it again"
        )


def require_voxel_file(path: Path, reader: sitk.ImageFileReader) -> None:
    """Refuse a header that names voxels that are not in a file, or promises more than the file can hold."""
    voxels = _voxel_file(path)
    if voxels is None or not voxels.exists():
        return
    if not voxels.is_file():
        raise VolumeError(f"its header names {voxels.name} for the voxels, and that is no file; export it again")
    require_room(voxels, num_bytes=_voxel_bytes(reader))


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
    """Refuse cut and damaged MetaImages that SimpleITK would read without a word.

    The checksum at the end of compressed voxels is compared with those that were read; only where it differs they are inflated
    a second time.

    Args:
        path: The file.
        reader: Its reader, with the header.
        image: What it read.

    Raises:
        VolumeError: If the file holds fewer bytes than its header promises.
        zlib.error: If its compressed bytes are damaged.
    """
    payload = _meta_payload(path) if reader.GetImageIO() == "MetaImageIO" else None
    if payload is None:
        return
    voxels = memoryview(sitk.GetArrayViewFromImage(image))
    if int.from_bytes(payload[-ADLER_BYTES:], "big") == zlib.adler32(voxels):
        return
    expected, stored = _voxel_bytes(reader), sum(len(part) for part in _inflated_parts(payload))
    if stored < expected:
        raise VolumeError(f"the file is incomplete: it has {stored} of {expected} bytes; copy or export it again")


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


def inflated(data: bytes, *, num_bytes: int) -> bytes:
    """Return the first bytes of a zlib or gzip stream once inflated; all of it is tested.

    Raises:
        VolumeError: If the stream breaks off.
        zlib.error: If it is damaged.
    """
    kept, length = [], 0
    for part in _inflated_parts(data):
        if length < num_bytes:
            kept.append(part[: num_bytes - length])
        length += len(part)
    return b"".join(kept)


def _inflated_parts(data: bytes) -> Iterator[bytes]:
    """Yield a zlib or gzip stream of one or several members once inflated; errors as in `inflated`."""
    length = 0
    while True:
        stream = zlib.decompressobj(wbits=ZLIB_OR_GZIP)
        while part := stream.decompress(data, INFLATED_CHUNK_BYTES):
            yield part
            length += len(part)
            data = stream.unconsumed_tail
        if not stream.eof:
            raise VolumeError(
                f"the file is incomplete: its compressed data break off after {length} bytes; copy it again"
            )
        data = stream.unused_data
        if not data.startswith(GZIP_MAGIC):
            return
