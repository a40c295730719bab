"""NIfTI files with any header fields, consistent or not."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

SPACING_MM = (0.5, 0.75, 3.0)
"""Along x, y and z of `image_array`."""

LPS_FROM_RAS = np.diag([-1, -1, 1])


def image_array(dtype: str = "int16") -> np.ndarray:
    """Return an image [x, y, z] of 6 x 5 x 4 distinct voxels."""
    return np.random.default_rng(0).permutation(120).reshape(6, 5, 4).astype(dtype)


def affine(
    spacing_mm: Sequence[float] = SPACING_MM,
    *,
    angles: Sequence[float] = (0.32, 0.1, 0.06),
    flips: Sequence[int] = (-1, -1, 1),
    origin_mm: Sequence[float] = (57.25, 82.5, -27.125),
) -> np.ndarray:
    """Return an affine, RAS, of rotated axes; an odd number of -1 in `flips` makes it left-handed."""
    rotation = nibabel.eulerangles.euler2mat(*angles)
    return nibabel.affines.from_matvec(rotation * np.multiply(flips, spacing_mm), origin_mm)


def nifti_bytes(
    array: np.ndarray,
    *,
    sform: np.ndarray | None = None,
    qform: np.ndarray | None = None,
    sform_code: int = 1,
    qform_code: int = 1,
    kind: type[Nifti1Header] = Nifti1Header,
    endianness: str = "<",
    **fields: object,
) -> bytes:
    """Return the bytes of a NIfTI file of an array [x, y, z, ...]; an absent form has code 0, and `fields` are set last."""
    header = kind(endianness=endianness)
    header.set_data_shape(array.shape)
    header.set_data_dtype(array.dtype)
    header["pixdim"][1:4] = SPACING_MM
    header["xyzt_units"] = 2
    if qform is not None:
        header.set_qform(qform, code=qform_code)
    if sform is not None:
        header.set_sform(sform, code=sform_code)
    offset = 544 if kind is Nifti2Header else 352
    header["vox_offset"], header["magic"] = offset, header.single_magic
    for name, value in fields.items():
        header[name] = value
    voxels = array.astype(array.dtype.newbyteorder(endianness)).tobytes(order="F")
    return header.binaryblock.ljust(offset, b"\0") + voxels


def write_nifti_file(path: Path, array: np.ndarray | None = None, **header: object) -> Path:
    """Write `nifti_bytes`, compressed if the name ends in .gz."""
    content = nifti_bytes(image_array() if array is None else array, **header)  # type: ignore[arg-type]
    path.write_bytes(gzip.compress(content, mtime=0) if path.name.endswith(".gz") else content)
    return path


def pixdim(x: float, y: float, z: float, *, qfac: float = 1.0) -> list[float]:
    """Return the field pixdim for three dimensions."""
    return [qfac, x, y, z, 0, 0, 0, 0]
