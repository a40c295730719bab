"""Reading and writing volumes.

Every volume is a [Z, Y, X] array whose axes run, as nearly as the scan allows, to the patient's left, posterior and superior
(LPS); it remembers how its file stored the axes, so that a mask written for it lies on the file's own grid. Spacings are
(z, y, x) in mm, world points (x, y, z) in mm. What cannot be one scalar volume is refused with a named check; whether the
voxels make sense is for `quality` to say.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from prostate_seg.common.errors import InputError, VolumeError
from prostate_seg.common.files import atomic_path, md5_of, md5_of_text
from prostate_seg.imaging.dicom_series import read_series
from prostate_seg.imaging.file_integrity import (
    require_complete,
    require_content,
    require_sane_header,
    require_sane_size,
    require_three_dimensional,
    require_voxel_file,
)
from prostate_seg.imaging.geometry import RIGHT_ANGLE_TOLERANCE, Geometry, Volume
from prostate_seg.imaging.nifti import read_nifti, write_nifti
from prostate_seg.imaging.sitk_reader import (
    IMAGE_IO,
    image_suffix,
    open_reader,
    refusing_unreadable,
    require_scalar_pixels,
)
from prostate_seg.imaging.text_headers import check_text_header

SINGLE_FILE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")
"""What can be written: .mhd needs a second file beside it, which no single rename can put in place."""

EDGE_RANGE_MM = (0.01, 100.0)
"""Shortest and longest voxel edge; outside them the header is damaged or in another unit."""

MAX_EXTENT_MM = 2000.0
"""No volume is longer along an axis than a scanner's bore."""

WORLD_AXES = ("LR", "PA", "SI")
"""Letters of the two directions along x, y and z, LPS first."""


def read_volume(path: Path, *, channel: int | None = None) -> Volume:
    """Read an image file, or a folder that holds one DICOM series, and turn it to LPS.

    Args:
        path: A .mha, .mhd, .nii, .nii.gz or .nrrd file, or a folder of DICOM files.
        channel: Which volume of a four-dimensional file is wanted, from 0; None refuses several.

    Returns:
        Array [Z, Y, X] in the file's dtype (float64 becomes float32), its grid and the file's axis code.

    Raises:
        VolumeError: If this is not one complete three-dimensional scalar volume; `check` names the reason.
    """
    with refusing_unreadable():
        stored = _of_sitk(read_series(path)) if path.is_dir() else _read_file(path, channel=channel)
    _check_grid(stored.geometry)
    return _to_lps(stored)


def write_volume(path: Path, volume: Volume) -> None:
    """Write a volume atomically, compressed where the format can, with the axes of `volume.stored_orientation`.

    Args:
        path: File to write, .nii.gz, .nii, .mha or .nrrd; equal volumes give equal bytes.
        volume: Volume in LPS; bool is stored as uint8.

    Raises:
        InputError: If the suffix is none of these.
    """
    suffix = image_suffix(path.name)
    if suffix not in SINGLE_FILE_SUFFIXES:
        raise InputError(
            f"volumes are written as {', '.join(SINGLE_FILE_SUFFIXES)}, not as {path.name}; choose one of these suffixes"
        )
    stored = _from_lps(volume)
    stored = replace(stored, array=stored.array.astype(_stored_dtype(volume.array.dtype), copy=False))
    with atomic_path(path) as temporary:
        if suffix in (".nii", ".nii.gz"):
            write_nifti(temporary, stored)
        else:
            sitk.WriteImage(to_sitk(stored), str(temporary), useCompression=True)


def stored_array(volume: Volume) -> np.ndarray:
    """Return the voxels with the axes of the file that the volume came from, [Z, Y, X] of that file."""
    return _from_lps(volume).array


def content_md5(path: Path) -> str:
    """Return the md5 of an image: of its file, of the files of a DICOM folder, of header and voxels of a .mhd pair.

    What lies in folders below a series, such as the masks that were made of it, is no part of it.
    """
    if path.is_dir():
        files = (file for file in sorted(path.iterdir()) if file.is_file())
        return md5_of_text("\n".join(f"{file.name}:{md5_of(file)}" for file in files))
    voxels = (
        re.search(r"(?m)^ElementDataFile *= *(.+?) *$", _header_text(path)) if path.suffix.lower() == ".mhd" else None
    )
    if voxels is None:
        return md5_of(path)
    parts = [path, path.parent / voxels.group(1)]
    return md5_of_text(" ".join(md5_of(part) for part in parts if part.is_file()))


def geometry_of(image: sitk.Image) -> Geometry:
    """Return the grid of a three-dimensional SimpleITK image."""
    size_x, size_y, size_z = image.GetSize()
    spacing_x_mm, spacing_y_mm, spacing_z_mm = image.GetSpacing()
    return Geometry(
        shape_vox=(size_z, size_y, size_x),
        spacing_mm=(spacing_z_mm, spacing_y_mm, spacing_x_mm),
        origin_mm=image.GetOrigin(),
        direction=image.GetDirection(),
    )


def to_sitk(volume: Volume) -> sitk.Image:
    """Return the volume as a SimpleITK image on its grid; bool becomes uint8, float16 float32."""
    assert volume.array.shape == volume.geometry.shape_vox, (volume.array.shape, volume.geometry)
    image = sitk.GetImageFromArray(volume.array.astype(_stored_dtype(volume.array.dtype), copy=False))
    image.SetSpacing(volume.geometry.spacing_mm[::-1])
    image.SetOrigin(volume.geometry.origin_mm)
    image.SetDirection(volume.geometry.direction)
    return image


def _stored_dtype(dtype: np.dtype) -> np.dtype:
    return np.dtype({"bool": np.uint8, "float16": np.float32}.get(dtype.name, dtype))


def _of_sitk(image: sitk.Image) -> Volume:
    return Volume(array=sitk.GetArrayFromImage(image), geometry=geometry_of(image))


def _to_lps(stored: Volume) -> Volume:
    """Permute and flip the axes of a volume as it is stored to LPS; float64 becomes float32.

    `sitk.DICOMOrient` does the same, but is not its own inverse for scans at exactly 45 degrees.
    """
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(stored.geometry.direction)
    order, flips = _axes(code)
    volume = _flipped(_permuted(stored, order), flips)
    dtype = np.float32 if volume.array.dtype.kind == "f" else volume.array.dtype
    array = np.require(volume.array, dtype=dtype, requirements=["C", "W"])
    return replace(volume, array=array, stored_orientation=code)


def _from_lps(volume: Volume) -> Volume:
    """Undo `_to_lps`."""
    order, flips = _axes(volume.stored_orientation)
    return _permuted(_flipped(volume, flips), [order.index(axis) for axis in range(3)])


def _permuted(volume: Volume, order: Sequence[int]) -> Volume:
    """Return a volume whose x, y and z are these axes, counted from x, of the given one."""
    grid = volume.geometry
    z, y, x = (2 - axis for axis in reversed(order))
    shape, spacing = grid.shape_vox, grid.spacing_mm
    geometry = replace(
        grid,
        shape_vox=(shape[z], shape[y], shape[x]),
        spacing_mm=(spacing[z], spacing[y], spacing[x]),
        direction=tuple(np.reshape(grid.direction, (3, 3))[:, order].ravel().tolist()),
    )
    return replace(volume, array=volume.array.transpose(z, y, x), geometry=geometry)


def _flipped(volume: Volume, flips: Sequence[bool]) -> Volume:
    """Return a volume that runs the other way along some of x, y and z."""
    grid = volume.geometry
    last = [size - 1 if flip else 0 for size, flip in zip(grid.shape_vox, reversed(flips), strict=True)]
    geometry = replace(
        grid,
        origin_mm=tuple(grid.to_world(last).tolist()),
        direction=tuple((np.reshape(grid.direction, (3, 3)) * np.where(flips, -1.0, 1.0)).ravel().tolist()),
    )
    flipped = tuple(2 - axis for axis, flip in enumerate(flips) if flip)
    return replace(volume, array=np.flip(volume.array, flipped), geometry=geometry)


def _axes(code: str) -> tuple[list[int], list[bool]]:
    """Return, for x, y and z in LPS, the axis of the file that runs along it and whether it runs the other way."""
    order = [next(axis for axis, letter in enumerate(code) if letter in pair) for pair in WORLD_AXES]
    return order, [code[axis] not in "LPS" for axis in order]


def _read_file(path: Path, *, channel: int | None) -> Volume:
    """Read a volume with the axes of its file."""
    _check_file(path)
    suffix = image_suffix(path.name) or ""
    if suffix in (".nii", ".nii.gz"):
        return read_nifti(path, channel=channel)
    require_sane_header(path)
    warnings = check_text_header(path)
    reader = open_reader(path, image_io=IMAGE_IO[suffix])
    require_scalar_pixels(reader)
    require_three_dimensional(reader.GetSize(), channel=channel)
    require_sane_size(reader.GetSize())
    require_voxel_file(path, reader)
    image = reader.Execute()
    require_complete(path, reader, image)
    volume = _of_sitk(image[:, :, :, channel or 0] if image.GetDimension() == 4 else image)
    return replace(volume, warnings=warnings)


def _check_grid(grid: Geometry) -> None:
    """Refuse grids that no scanner makes: damaged headers, other units, sheared axes."""
    edges_mm, size_xyz = np.array(grid.spacing_mm[::-1]), grid.shape_vox[::-1]
    directions = np.array(grid.direction).reshape(3, 3)
    shortest_mm, longest_mm = EDGE_RANGE_MM
    extent_mm = edges_mm * size_xyz
    if not (edges_mm.min() >= shortest_mm and edges_mm.max() <= longest_mm and extent_mm.max() <= MAX_EXTENT_MM):
        edges = " x ".join(f"{edge:.4g}" for edge in edges_mm)
        size = " x ".join(str(length) for length in size_xyz)
        raise VolumeError(
            f"voxel edges are {shortest_mm:g} to {longest_mm:g} mm and a volume at most {MAX_EXTENT_MM:g} mm long, and the "
            f"header says {edges} mm for {size} voxels; correct the spacing, or export it again",
            "implausible_grid",
        )
    if not np.isfinite(grid.origin_mm).all():
        raise VolumeError(
            f"the first voxel lies at a finite position, and the header says {grid.origin_mm}; export it again",
            "implausible_grid",
        )
    if not np.abs(directions.T @ directions - np.eye(3)).max() <= RIGHT_ANGLE_TOLERANCE:
        axes = " ".join(f"({', '.join(f'{value:.3f}' for value in axis)})" for axis in directions.T)
        raise VolumeError(
            f"the axes of a grid are at right angles, and the header's are {axes}; resample it to a straight grid",
            "sheared_axes",
        )


def _header_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _check_file(path: Path) -> None:
    """Refuse what need not be opened as an image."""
    if not path.is_file():
        raise VolumeError("there is no such file; check the path, or fetch the data (dvc pull)", "missing_file")
    suffix = image_suffix(path.name)
    if suffix is None:
        raise VolumeError(
            f"its suffix is none of {', '.join(IMAGE_IO)}; convert it (a pair of .hdr and .img too), or give the folder of its "
            "DICOM series",
            "unknown_suffix",
        )
    require_content(path)
