"""NIfTI files, read and written with nibabel.

Affines are 4x4, from the voxel index (x, y, z) of the file to RAS mm, as in nibabel. The sform is used before the qform;
without either the axes are those of ANALYZE files, with a warning. Voxels keep the axes of their file.
"""

import gzip
import io
import logging
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
from isal import igzip, isal_zlib
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from prostate_seg.common.errors import VolumeError
from prostate_seg.imaging.file_integrity import INFLATED_CHUNK_BYTES, require_complete, require_one_volume, require_room
from prostate_seg.imaging.geometry import (
    RIGHT_ANGLE_TOLERANCE,
    SAME_GRID_TOLERANCE,
    Finding,
    Geometry,
    NiftiForm,
    Volume,
)

LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

GZIP_MAGIC = b"\x1f\x8b"
"""First bytes of a gzip stream."""
HEADER_BYTES = 540
"""Length of the longer header, that of NIfTI-2."""
ROUNDING = 2.5e-7
"""Relative rounding error of the float32 numbers of a header."""
SAME_SPACING = 0.01
"""Relative difference up to which the sform's spacing is a rounded pixdim; beyond it they contradict each other."""
COMPRESSION_LEVEL = 4
"""As fast as SimpleITK's; the usual 6 takes five times as long for 16-bit images and saves 6%."""


def read_nifti(path: Path, *, channel: int | None) -> Volume:
    """Read a NIfTI-1 or NIfTI-2 file, compressed or not whatever its suffix, with voxels scaled as by nibabel.

    Axes are those of the file; `channel` as in `image_io.read_volume`.

    Raises:
        VolumeError: If the header cannot be used or contradicts itself, or the file is incomplete.
        EOFError, OSError, zlib.error: If its compressed bytes are incomplete or damaged.
    """
    try:
        return _read(path, igzip.IGzipFile, channel=channel)
    except (EOFError, gzip.BadGzipFile, isal_zlib.error):  # type: ignore[misc]  # its stub declares an instance
        # Slower; up to nine bytes after the last member are no error, and errors are those of zlib.
        return _read(path, gzip.GzipFile, channel=channel)


def _read(path: Path, gzip_file: type[gzip.GzipFile], *, channel: int | None) -> Volume:
    """Read a file; `gzip_file` inflates it if it is compressed."""
    with path.open("rb") as file:
        is_compressed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        file.seek(0)
        stream = gzip_file(fileobj=file) if is_compressed else file
        start = stream.read(HEADER_BYTES)
        header = _read_header(start)
        shape = _volume_shape(header, channel=channel)
        form, warnings = _read_form(header, shape)
        num_bytes = int(np.prod(header.get_data_shape())) * header.get_data_dtype().itemsize + header.get_data_offset()
        require_room(path, num_bytes=num_bytes)
        content = start + stream.read(max(0, num_bytes - len(start)))
        require_complete(len(content), num_bytes=num_bytes)
        try:
            while is_compressed and stream.read(INFLATED_CHUNK_BYTES):
                pass  # the checksum comes last
        except gzip.BadGzipFile as error:
            if "Not a gzipped file" not in str(error):  # what follows the last member is ignored, as by gunzip
                raise
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # voxels that are not finite are refused by quality.py
            voxels = header.data_from_fileobj(io.BytesIO(content))
    except (HeaderDataError, ValueError) as error:
        raise VolumeError(f"its voxels cannot be scaled: {error}; export it again") from error
    volumes = voxels.reshape((*shape, -1), order="F")
    array = volumes[..., 0 if channel is None or volumes.shape[-1] == 1 else channel]
    return Volume(
        array=array.astype(array.dtype.newbyteorder("="), copy=False).T,
        geometry=_straight_grid(form.affine, shape, pixdim_mm=_pixdim_mm(header)),
        nifti_form=form,
        warnings=warnings,
    )


def write_nifti(path: Path, stored: Volume) -> None:
    """Write a volume with the axes of the file, of a dtype that NIfTI has, compressed if the name ends in .gz.

    sform and qform are equal; equal volumes give equal bytes. A `nifti_form` on the same grid is written again with its code,
    so that every reader places the file like the one that the form was read from.
    """
    grid, form = stored.geometry, stored.nifti_form
    if form is None or not _straight_grid(form.affine, stored.array.T.shape).is_same_grid(grid):
        affine = nibabel.affines.from_matvec(grid.matrix * grid.spacing_mm[::-1], grid.origin_mm)
        form = NiftiForm(affine=LPS_FROM_RAS @ affine, code=1)
    image = nibabel.Nifti1Image(stored.array.T, form.affine, dtype=stored.array.dtype)
    image.header.set_sform(form.affine, code=form.code)
    image.header.set_qform(form.affine, code=form.code)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    is_compressed = path.name.lower().endswith(".gz")
    path.write_bytes(gzip.compress(content, COMPRESSION_LEVEL, mtime=0) if is_compressed else content)


def _read_header(start: bytes) -> Nifti1Header:
    """Return the header of a single-file NIfTI, checked and corrected by nibabel."""
    kind = next((kind for kind in (Nifti1Header, Nifti2Header) if kind.may_contain_header(start)), None)
    if kind is None:
        raise VolumeError(
            "the file cannot be read: it has no NIfTI header, so that it is damaged, incomplete or not in the format of its "
            "suffix; copy or export it again"
        )
    header = kind(start[: kind.sizeof_hdr], check=False)
    if header["magic"].item().startswith(b"ni"):
        raise VolumeError(
            "its header belongs to a pair of .hdr and .img, which holds the voxels; convert the pair to .nii.gz"
        )
    unit = int(header["xyzt_units"]) % 8
    if unit not in (0, 2):  # 2 is mm; 0, "unknown", is mm by common practice
        name = {1: "meter", 3: "micron"}.get(unit, "not defined")
        raise VolumeError(
            f"lengths are in mm, and xyzt_units is {unit} ({name}); convert the header to mm", "not_in_mm"
        )
    pixdim_mm = _pixdim_mm(header)  # before nibabel replaces 0 by 1
    if header["dim"][0] >= 3 and not (np.isfinite(pixdim_mm) & (pixdim_mm > 0)).all():
        raise VolumeError(
            f"a spacing is a positive number of mm, and pixdim[1] to [3] are {_numbers(pixdim_mm)}; write the true spacing "
            "into the header, or export it again",
            "no_spacing",
        )
    try:
        # nibabel logs what it corrects; what matters of that is an error or a warning here.
        header.check_fix(logger=logging.Logger("nibabel header", level=logging.CRITICAL))
        header.get_data_offset()
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise VolumeError(f"its NIfTI header cannot be used: {error}; export it again") from error
    return header


def _volume_shape(header: Nifti1Header, *, channel: int | None) -> tuple[int, int, int]:
    """Return the size along x, y and z of a file of one scalar volume, or with the wanted channel."""
    try:
        shape = header.get_data_shape()
    except HeaderDataError as error:
        raise VolumeError(f"its size cannot be read: {error}; export it again") from error
    dtype = header.get_data_dtype()
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    num_components = len(dtype) or (shape[4] if len(shape) == 5 and shape[3] == 1 else 1)
    is_complex = dtype.kind == "c"
    require_one_volume(shape, channel=channel, kind=str(dtype), is_complex=is_complex, num_components=num_components)
    return shape[:3]


def _read_form(header: Nifti1Header, shape: tuple[int, int, int]) -> tuple[NiftiForm, tuple[Finding, ...]]:
    """Return the form that nibabel uses, and warnings where the header or its other form disagrees."""
    sform_code, qform_code = int(header["sform_code"]), int(header["qform_code"])
    try:
        form = NiftiForm(affine=header.get_best_affine(), code=sform_code or qform_code)
    except (HeaderDataError, ValueError) as error:
        raise VolumeError(f"its qform is no rotation ({error}); write the orientation again") from error
    _check_axes(form.affine, pixdim_mm=_pixdim_mm(header))
    found = {}
    if not form.code:
        found["no_orientation"] = (
            "no orientation is stated: the codes of sform and qform are 0; the axes are taken as "
            f"{''.join(map(str, nibabel.aff2axcodes(form.affine)))} with the origin at the centre, as by nibabel: compare left "
            "and right with the scanner's images, or convert the study from DICOM again"
        )
    elif sform_code and qform_code and (difference := _difference_of_forms(header, shape)):
        found["forms_differ"] = difference

    # Axes of a rounded sform are read as the nearest rotation, which may move a corner visibly.
    grid = _straight_grid(form.affine, shape)
    moved_mm = np.linalg.norm(grid.corners_mm - _stated_grid(form.affine, shape).corners_mm, axis=1).max()
    if moved_mm > SAME_GRID_TOLERANCE * min(grid.spacing_mm):
        found["rounded_axes"] = (
            "the axes are not quite at right angles, as after rounding: they are read as the nearest rotation, which moves a "
            f"corner by {moved_mm:.2f} mm; convert the study from DICOM again"
        )
    return form, tuple(Finding(check, message) for check, message in found.items())


def _check_axes(affine: np.ndarray, *, pixdim_mm: np.ndarray) -> None:
    """Refuse axes that are not at right angles, an origin that is not finite, and an sform that contradicts pixdim."""
    matrix = affine[:3, :3]
    spacing_mm = nibabel.affines.voxel_sizes(affine)
    are_axes = np.isfinite(matrix).all() and spacing_mm.min() > 0
    if not (are_axes and _deviation_from_rotation(matrix / spacing_mm) <= RIGHT_ANGLE_TOLERANCE):
        rows = "; ".join(_numbers(row) for row in matrix)
        raise VolumeError(
            f"the axes of a grid are at right angles, and those of the header are not (rows of its affine are {rows}); "
            "resample the volume to a grid with right angles, or write its sform again",
            "sheared_axes",
        )
    if not np.isfinite(affine).all():
        raise VolumeError(
            f"the first voxel lies at a finite position, and the header has ({_numbers(affine[:3, 3], ', ')}); "
            "export it again",
            "implausible_grid",
        )
    if (np.abs(spacing_mm - pixdim_mm) > SAME_SPACING * pixdim_mm).any():
        raise VolumeError(
            f"the header states two spacings: {_numbers(spacing_mm)} mm by its sform and {_numbers(pixdim_mm)} mm by pixdim; "
            "correct the one that is wrong, or convert the study from DICOM again",
            "spacings_differ",
        )


def _difference_of_forms(header: Nifti1Header, shape: tuple[int, int, int]) -> str:
    """Return how sform and qform differ; an empty text if they place the volume alike."""
    sform = header.get_sform()
    try:
        qform = header.get_qform()
    except (HeaderDataError, ValueError):
        qform = np.full((4, 4), np.nan)
    if not np.isfinite(qform).all():
        return "sform and qform contradict each other: the qform is no rotation; the sform is used"
    if _straight_grid(sform, shape).is_same_grid(_straight_grid(qform, shape)):
        return ""
    corners_mm = [_stated_grid(affine, shape).corners_mm for affine in (sform, qform)]
    apart_mm = np.linalg.norm(corners_mm[0] - corners_mm[1], axis=1).max()
    by_sform, by_qform = (
        f"first voxel at ({_numbers(one[:3, 3], ', ')}) mm RAS and axes {''.join(map(str, nibabel.aff2axcodes(one)))}"
        for one in (sform, qform)
    )
    return (
        f"sform and qform put the volume {apart_mm:.1f} mm apart: {by_sform} by the sform, which is used, and {by_qform} by "
        "the qform; remove the one that is wrong"
    )


def _stated_grid(affine: np.ndarray, shape_xyz: tuple[int, ...]) -> Geometry:
    """Return the grid of an affine as it is, even where its axes are not quite at right angles."""
    lps = LPS_FROM_RAS @ affine
    spacing_mm = np.linalg.norm(lps[:3, :3], axis=0)
    return Geometry.from_xyz(shape_xyz, spacing_mm, origin_mm=lps[:3, 3], direction=lps[:3, :3] / spacing_mm)


def _straight_grid(affine: np.ndarray, shape_xyz: tuple[int, ...], *, pixdim_mm: np.ndarray | None = None) -> Geometry:
    """Return the grid of an affine with the nearest rotation, and pixdim as spacing where only float32 rounding differs."""
    grid = _stated_grid(affine, shape_xyz)
    if _deviation_from_rotation(grid.matrix) > 4 * ROUNDING:
        left, _, right = np.linalg.svd(grid.matrix)
        grid = replace(grid, direction=tuple((left @ right).ravel().tolist()))
    if pixdim_mm is None:
        return grid
    stated_mm = pixdim_mm[::-1]
    is_rounded = np.abs(np.array(grid.spacing_mm) - stated_mm) <= ROUNDING * stated_mm
    return replace(grid, spacing_mm=tuple(np.where(is_rounded, stated_mm, grid.spacing_mm).tolist()))


def _deviation_from_rotation(axes: np.ndarray) -> float:
    """Return the largest cosine between two columns of a 3x3 matrix, or their largest deviation from unit length."""
    return float(np.abs(axes.T @ axes - np.eye(3)).max())


def _pixdim_mm(header: Nifti1Header) -> np.ndarray:
    return header["pixdim"][1:4].astype(float)


def _numbers(values: np.ndarray, separator: str = " x ") -> str:
    return separator.join(f"{value:.4g}" for value in values)
