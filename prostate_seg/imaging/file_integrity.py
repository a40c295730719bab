"""Checks that an image file can hold, and holds, all voxels that its header announces, before memory is allocated for them.

SimpleITK fills missing voxels of a compressed MetaImage with uninitialised memory and verifies no checksum; nibabel stops
reading a compressed file after its last voxel, before the checksum.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from prostate_seg.common.errors import VolumeError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of a Git LFS pointer, which replaces a file that was not downloaded."""
MAX_AXIS_VOX = 4096
"""Most voxels along an axis; the finest scans have about 1,000."""
MAX_VOXELS = 2**28
"""Most voxels of a volume, 512 x 512 x 1024; a T2-weighted study has 3 to 50 million."""
MAX_COMPRESSION_RATIO = 1032
"""Highest compression ratio of Deflate, so that a header that announces more bytes is wrong."""
INFLATED_CHUNK_BYTES = 2**24
"""Bytes of a compressed file that are inflated at once, which bounds the memory used."""


def require_content(path: Path) -> None:
    """Refuse empty files and Git LFS pointers."""
    with path.open("rb") as stream:
        start = stream.read(len(LFS_POINTER))
    if not start:
        raise VolumeError("the file is empty (0 bytes); copy or export it again")
    if start == LFS_POINTER:
        raise VolumeError(
            "this is a Git LFS pointer, not the image itself; run `git lfs pull` (or `dvc pull`) in its repository",
            "lfs_pointer",
        )


def require_one_volume(
    size_xyz: Sequence[int], *, channel: int | None, kind: str, is_complex: bool, num_components: int
) -> None:
    """Refuse voxels that are no single real numbers, single slices, several volumes and sizes that no study has.

    A fourth dimension of size 1, or with the wanted channel, is accepted; `kind` describes the voxels.
    """
    if is_complex:
        raise VolumeError(f"voxels must be real numbers, and these are {kind}; export the magnitude", "complex_pixels")
    if num_components != 1:
        raise VolumeError(
            f"voxels must be single numbers, and these have {num_components} components ({kind}); export one channel",
            "vector_pixels",
        )
    num_wanted = 1 if channel is None else size_xyz[-1]
    if len(size_xyz) != 3 and not (len(size_xyz) == 4 and size_xyz[3] == num_wanted > (channel or 0)):
        size = " x ".join(str(length) for length in size_xyz)
        raise VolumeError(
            f"a volume has three dimensions, and this has {len(size_xyz)} ({size} voxels); "
            "export one T2-weighted volume to a file",
            "not_3d",
        )
    require_sane_size(size_xyz)


def require_sane_size(size_xyz: Sequence[int]) -> None:
    """Refuse sizes that no study has."""
    if min(size_xyz) > 0 and max(size_xyz) <= MAX_AXIS_VOX and math.prod(size_xyz) <= MAX_VOXELS:
        return
    size = " x ".join(str(length) for length in size_xyz)
    raise VolumeError(
        f"a volume has 1 to {MAX_AXIS_VOX} voxels along an axis and at most {MAX_VOXELS} in all, and the header has {size}; "
        "it may be damaged: export the volume again",
        "too_large",
    )


def require_room(path: Path, *, num_bytes: int) -> None:
    """Refuse a header that announces more bytes than a file, compressed or not, can hold."""
    stored = path.stat().st_size
    if num_bytes > MAX_COMPRESSION_RATIO * stored:
        raise VolumeError(
            f"the file is incomplete: its header announces {num_bytes} bytes of voxels, more than {stored} bytes can hold; "
            "copy or export it again"
        )


def require_complete(stored: int, *, num_bytes: int) -> None:
    """Refuse a file with fewer bytes than its header announces."""
    if stored < num_bytes:
        raise VolumeError(f"the file is incomplete: it has {stored} of {num_bytes} bytes; copy or export it again")
