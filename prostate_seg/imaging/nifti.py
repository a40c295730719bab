"""NIfTI files, with nibabel's reading of their headers.

Affines are as in nibabel: 4x4, from the voxel index (x, y, z) of the file to mm to the patient's right, anterior and superior
(RAS). The sform is believed, then the qform; where no form is set, the axes are taken as in ANALYZE files. What the header
contradicts is refused or warned of. Voxels are not turned here: volumes keep the axes of their file.
"""

import gzip
import logging
import zlib
from pathlib import Path

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from prostate_seg.common.errors import VolumeError
from prostate_seg.imaging.file_integrity import (
    GZIP_MAGIC,
    ZLIB_OR_GZIP,
    inflated,
    require_room,
    require_sane_size,
    require_three_dimensional,
)
from prostate_seg.imaging.geometry import (
    RIGHT_ANGLE_TOLERANCE,
    SAME_GRID_TOLERANCE,
    Geometry,
    NiftiForm,
    Volume,
    VolumeWarning,
)

LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

START_BYTES = 65536
"""Bytes of a file, compressed or not, that surely hold the header of 348 or 540 bytes."""

UNITS = {1: "meter", 3: "micron"}
"""Codes of `xyzt_units` that are not mm (2); 0, "unknown", is mm by common practice."""

ROUNDING = 2.5e-7
"""Relative difference that the float32 numbers of a header make."""

SAME_SPACING = 0.01
"""Relative difference up to which the sform's spacing is pixdim's, rounded; beyond it they contradict each other."""

COMPRESSION_LEVEL = 4
"""As fast as SimpleITK's; the usual 6 takes five times as long for 16-bit images and saves 6%."""

SILENT = logging.Logger("nibabel header", level=logging.CRITICAL)
"""nibabel tells a logger of what it corrects; what matters of that is an error or a warning here."""


def read_nifti(path: Path, *, channel: int | None) -> Volume:
    """Read a NIfTI-1 or NIfTI-2 file, compressed or not whatever its suffix.

    Args:
        path: The file.
        channel: Which volume of a four-dimensional file is wanted, from 0; None refuses several.

    Returns:
        Voxels as nibabel scales them, [Z, Y, X] with the axes of the file, and their grid.

    Raises:
        VolumeError: If the header cannot be used or contradicts itself, or the file is incomplete.
        zlib.error: If its compressed bytes are damaged.
    """
    header = _read_header(path)
    shape = _volume_shape(header, channel=channel)
    form, warnings = _read_form(header)
    voxels = _read_voxels(path, header)
    volumes = voxels.reshape((*shape, -1), order="F")
    array = volumes[..., 0 if channel is None or volumes.shape[-1] == 1 else channel]
    return Volume(
        array=_scaled(array, header).T,
        geometry=_grid(form.affine, shape, pixdim_mm=_pixdim_mm(header)),
        nifti_form=form,
        warnings=(*warnings, *_leaning_axes(form, shape)),
    )


def write_nifti(path: Path, stored: Volume) -> None:
    """Write a NIfTI file whose sform and qform are both set; equal volumes give equal bytes.

    Args:
        path: File to write, compressed if it ends in .gz.
        stored: Volume with the axes of the file, of a dtype that NIfTI has. A `nifti_form` on the same grid is repeated
            with its code, so that every reader puts the file where it puts the one that the form was read from.
    """
    form = stored.nifti_form
    if form is None or not _grid(form.affine, stored.array.T.shape).is_same_grid(stored.geometry):
        form = NiftiForm(affine=_affine(stored.geometry), code=1)
    image = nibabel.Nifti1Image(stored.array.T, form.affine, dtype=stored.array.dtype)
    image.header.set_sform(form.affine, code=form.code)
    image.header.set_qform(form.affine, code=form.code)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    path.write_bytes(
        gzip.compress(content, COMPRESSION_LEVEL, mtime=0) if path.name.lower().endswith(".gz") else content
    )


def _read_header(path: Path) -> Nifti1Header:
    """Return the header of a single-file NIfTI, checked and corrected as nibabel does it."""
    with path.open("rb") as stream:
        start = stream.read(START_BYTES)
    if start.startswith(GZIP_MAGIC):
        start = zlib.decompressobj(wbits=ZLIB_OR_GZIP).decompress(start, START_BYTES)
    kind = next((kind for kind in (Nifti1Header, Nifti2Header) if kind.may_contain_header(start)), None)
    if kind is None:
        raise VolumeError(
            "the file cannot be read: it has no NIfTI header, so that it is damaged, incomplete or not what its suffix "
            "says; copy or export it again"
        )
    header = kind(start[: kind.sizeof_hdr], check=False)
    if header["magic"].item().startswith(b"ni"):
        raise VolumeError(
            "its header belongs to a pair of .hdr and .img, and the voxels are elsewhere; convert it to .nii.gz"
        )
    _check_spacing(header)
    try:
        header.check_fix(logger=SILENT)
        header.get_data_offset()
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise VolumeError(f"its NIfTI header cannot be used: {error}; export it again") from error
    return header


def _check_spacing(header: Nifti1Header) -> None:
    """Refuse spacings that are not stated in mm, before nibabel replaces a pixdim of 0 by 1."""
    unit = int(header["xyzt_units"]) % 8
    if unit not in (0, 2):
        raise VolumeError(
            f"lengths are in mm, and xyzt_units is {unit} ({UNITS.get(unit, 'not defined')}); convert the header to mm",
            "not_in_mm",
        )
    pixdim_mm = _pixdim_mm(header)
    if header["dim"][0] >= 3 and not (np.isfinite(pixdim_mm) & (pixdim_mm > 0)).all():
        raise VolumeError(
            f"a spacing is a positive number of mm, and pixdim[1] to [3] are {_numbers(pixdim_mm)}; write the true spacing "
            "into the header, or export it again",
            "no_spacing",
        )


def _volume_shape(header: Nifti1Header, *, channel: int | None) -> tuple[int, int, int]:
    """Return the size along x, y and z of a file of one scalar volume, or with the wanted channel."""
    try:
        shape = header.get_data_shape()
    except HeaderDataError as error:
        raise VolumeError(f"its size cannot be read: {error}; export it again") from error
    dtype = header.get_data_dtype()
    if dtype.kind == "c":
        raise VolumeError(f"voxels must be real numbers, and these are {dtype}; export the magnitude", "complex_pixels")
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    if num_components := len(dtype) or (shape[4] if len(shape) == 5 and shape[3] == 1 else 0):
        raise VolumeError(
            f"voxels must be single numbers, and these have {num_components} components; export one channel",
            "vector_pixels",
        )
    require_three_dimensional(shape, channel=channel)
    require_sane_size(shape)
    return shape[:3]


def _read_voxels(path: Path, header: Nifti1Header) -> np.ndarray:
    """Return all voxels of the file as one row, in the dtype of the file and this machine's byte order."""
    dtype, offset = header.get_data_dtype(), header.get_data_offset()
    num_bytes = offset + int(np.prod(header.get_data_shape())) * dtype.itemsize
    require_room(path, num_bytes=num_bytes)
    content = path.read_bytes()
    content = inflated(content, num_bytes=num_bytes) if content.startswith(GZIP_MAGIC) else content
    if len(content) < num_bytes:
        raise VolumeError(
            f"the file is incomplete: it has {len(content)} of {num_bytes} bytes; copy or export it again"
        )
    voxels = np.frombuffer(content, dtype=dtype, offset=offset, count=(num_bytes - offset) // dtype.itemsize)
    return voxels.astype(dtype.newbyteorder("="), copy=False)


def _scaled(array: np.ndarray, header: Nifti1Header) -> np.ndarray:
    """Apply the header's slope and intercept, in float64 as nibabel does; a slope of 0 or NaN is none."""
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise VolumeError(f"its voxels cannot be scaled: {error}; export it again") from error
    if slope is None or (slope, intercept) == (1, 0):
        return array
    with np.errstate(over="ignore", invalid="ignore"):  # infinite voxels are refused with their number later
        return (array.astype(np.float64) * slope + intercept).astype(np.float32)


def _read_form(header: Nifti1Header) -> tuple[NiftiForm, list[VolumeWarning]]:
    """Return the form that nibabel believes, and what there is to say against it."""
    sform_code, qform_code = int(header["sform_code"]), int(header["qform_code"])
    try:
        form = NiftiForm(affine=header.get_best_affine(), code=sform_code or qform_code)
    except (HeaderDataError, ValueError) as error:
        raise VolumeError(f"its qform is no rotation ({error}); write the orientation again") from error
    _check_axes(form.affine, pixdim_mm=_pixdim_mm(header))
    if not form.code:
        message = (
            "no orientation is stated: the codes of sform and qform are 0; the axes are taken as "
            f"{_codes(form.affine)} with the origin at the centre, as nibabel does: compare left and right with the scanner's "
            "images, or convert the study from DICOM again"
        )
        return form, [VolumeWarning(check="no_orientation", message=message)]
    return form, _compare_forms(header) if sform_code and qform_code else []


def _check_axes(affine: np.ndarray, *, pixdim_mm: np.ndarray) -> None:
    """Refuse axes that are none or lean, a place that is none, and an sform whose spacing is not pixdim's."""
    matrix = affine[:3, :3]
    spacing_mm = np.linalg.norm(matrix, axis=0)
    are_axes = np.isfinite(matrix).all() and spacing_mm.min() > 0
    if not (are_axes and _lean(matrix / spacing_mm) <= RIGHT_ANGLE_TOLERANCE):
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


def _compare_forms(header: Nifti1Header) -> list[VolumeWarning]:
    """Warn of an sform and a qform that put the volume to different places."""
    shape, sform, qform = header.get_data_shape()[:3], header.get_sform(), _qform(header)
    if qform is None:
        message = "sform and qform contradict each other: the qform is no rotation; the sform is used"
        return [VolumeWarning(check="forms_differ", message=message)]
    if _grid(sform, shape).is_same_grid(_grid(qform, shape)):
        return []
    apart_mm = np.linalg.norm(_corners(sform, shape) - _corners(qform, shape), axis=1).max()
    message = (
        f"sform and qform put the volume {apart_mm:.1f} mm apart: {_place(sform)} by the sform, which is used, and "
        f"{_place(qform)} by the qform; remove the one that is wrong"
    )
    return [VolumeWarning(check="forms_differ", message=message)]


def _qform(header: Nifti1Header) -> np.ndarray | None:
    """Return the affine of the qform; None where it is none."""
    try:
        affine = header.get_qform()
    except (HeaderDataError, ValueError):
        return None
    return affine if np.isfinite(affine).all() else None


def _leaning_axes(form: NiftiForm, shape_xyz: tuple[int, int, int]) -> list[VolumeWarning]:
    """Warn of axes that were rounded so far that the nearest right angles move a corner visibly."""
    grid = _grid(form.affine, shape_xyz)
    stated_mm = _corners(form.affine, shape_xyz) @ LPS_FROM_RAS[:3, :3]
    moved_mm = np.linalg.norm(grid.corners_mm - stated_mm, axis=1).max()
    if moved_mm <= SAME_GRID_TOLERANCE * min(grid.spacing_mm):
        return []
    message = (
        f"the axes are not quite at right angles, as after rounding: they are read as the nearest rotation, which moves a "
        f"corner by {moved_mm:.2f} mm; convert the study from DICOM again"
    )
    return [VolumeWarning(check="rounded_axes", message=message)]


def _grid(affine: np.ndarray, shape_xyz: tuple[int, ...], *, pixdim_mm: np.ndarray | None = None) -> Geometry:
    """Return the grid of an affine, with the nearest rotation where its axes lean.

    Args:
        affine: Of a header, shape [4, 4], RAS.
        shape_xyz: Number of voxels along x, y and z.
        pixdim_mm: The header's own spacing, which is taken where it is the affine's but for float32 rounding.
    """
    lps = LPS_FROM_RAS @ affine
    spacing_mm = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / spacing_mm
    if _lean(axes) > 4 * ROUNDING:
        left, _, right = np.linalg.svd(axes)
        axes = left @ right
    if pixdim_mm is not None:
        spacing_mm = np.where(np.abs(spacing_mm - pixdim_mm) <= ROUNDING * pixdim_mm, pixdim_mm, spacing_mm)
    size_x, size_y, size_z = shape_xyz
    spacing_x_mm, spacing_y_mm, spacing_z_mm = spacing_mm.tolist()
    return Geometry(
        shape_vox=(size_z, size_y, size_x),
        spacing_mm=(spacing_z_mm, spacing_y_mm, spacing_x_mm),
        origin_mm=tuple(lps[:3, 3].tolist()),
        direction=tuple(axes.ravel().tolist()),
    )


def _affine(grid: Geometry) -> np.ndarray:
    """Return the affine of a grid, shape [4, 4], RAS."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(grid.direction, (3, 3)) * grid.spacing_mm[::-1]
    affine[:3, 3] = grid.origin_mm
    return LPS_FROM_RAS @ affine


def _lean(axes: np.ndarray) -> float:
    """Return the largest cosine between two axes, the columns of a 3x3 matrix, or their largest difference from length 1."""
    return float(np.abs(axes.T @ axes - np.eye(3)).max())


def _corners(affine: np.ndarray, shape_xyz: tuple[int, ...]) -> np.ndarray:
    """Return the places of the eight outer voxel centres, RAS, in the order of `Geometry.corners_mm`, shape [8, 3]."""
    ends = [(0, size - 1) for size in shape_xyz[::-1]]
    index_zyx = np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 3)
    return nibabel.affines.apply_affine(affine, index_zyx[:, ::-1])


def _pixdim_mm(header: Nifti1Header) -> np.ndarray:
    return header["pixdim"][1:4].astype(float)


def _place(affine: np.ndarray) -> str:
    return f"first voxel at ({_numbers(affine[:3, 3], ', ')}) mm RAS and axes {_codes(affine)}"


def _codes(affine: np.ndarray) -> str:
    """Return where the axes run to, such as LAS."""
    return "".join(str(code) for code in nibabel.aff2axcodes(affine))


def _numbers(values: np.ndarray, separator: str = " x ") -> str:
    return separator.join(f"{value:.4g}" for value in values)
