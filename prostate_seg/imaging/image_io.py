"""Reading and writing volumes of all formats.

Every volume is a [Z, Y, X] array with the axes nearest to LPS, and keeps the axis code of its file, so that a mask is written
on the file's own grid. Spacings are (z, y, x) in mm, world points (x, y, z) in mm. What is not one scalar volume is refused
by a named check; `quality` checks the voxels.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt2axcodes, ornt_transform

from prostate_seg.common.errors import InputError, VolumeError
from prostate_seg.common.files import atomic_path, md5_of, md5_of_text
from prostate_seg.imaging.dicom_series import read_series
from prostate_seg.imaging.file_integrity import require_content
from prostate_seg.imaging.geometry import RIGHT_ANGLE_TOLERANCE, Geometry, Volume
from prostate_seg.imaging.nifti import read_nifti, write_nifti
from prostate_seg.imaging.sitk_reader import (
    IMAGE_SUFFIXES,
    image_suffix,
    read_header,
    read_with_sitk,
    refusing_unreadable,
    voxel_file,
)

SINGLE_FILE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")
"""Formats that can be written: .mhd needs a second file beside it, which no single rename can put in place."""
EDGE_RANGE_MM = (0.01, 100.0)
"""Shortest and longest voxel edge; outside them the header is damaged or in another unit."""
MAX_EXTENT_MM = 2000.0
"""Largest extent of a volume along an axis, the length of a scanner's bore."""
LPS_LABELS = (("R", "L"), ("A", "P"), ("I", "S"))
"""Letters of the negative and the positive end of the world axes x, y and z, for nibabel's orientations."""
LPS = axcodes2ornt("LPS", LPS_LABELS)


def read_volume(path: Path, *, channel: int | None = None) -> Volume:
    """Read an image file, or a folder that holds one DICOM series, and reorient it to LPS.

    The array keeps the file's dtype, except that float64 becomes float32. `channel` is the index of the wanted volume of a
    four-dimensional file; None refuses several.

    Raises:
        VolumeError: If this is not one complete three-dimensional scalar volume; `check` names the reason.
    """
    with refusing_unreadable():
        stored = read_series(path) if path.is_dir() else _read_file(path, channel=channel)
    _check_grid(stored.geometry)
    orientation = io_orientation(np.pad(stored.geometry.matrix, (0, 1)))
    volume = _reoriented(stored, orientation)
    dtype = np.float32 if volume.array.dtype.kind == "f" else volume.array.dtype
    with np.errstate(over="ignore"):  # voxels that are not finite are refused by quality.py
        array = np.require(volume.array, dtype=dtype, requirements=["C", "W"])
    return replace(volume, array=array, stored_orientation="".join(ornt2axcodes(orientation, LPS_LABELS)))


def write_volume(path: Path, volume: Volume) -> None:
    """Write a volume atomically, compressed where the format can, with the axes of `volume.stored_orientation`.

    Equal volumes give equal bytes; bool is stored as uint8, float16 as float32.

    Raises:
        InputError: If the suffix is none of `SINGLE_FILE_SUFFIXES`.
    """
    suffix = image_suffix(path.name)
    if suffix not in SINGLE_FILE_SUFFIXES:
        raise InputError(
            f"volumes are written as {', '.join(SINGLE_FILE_SUFFIXES)}, not as {path.name}; choose one of these suffixes"
        )
    stored = as_stored(volume)
    with atomic_path(path) as temporary:
        if suffix in (".nii", ".nii.gz"):
            write_nifti(temporary, replace(stored, array=_stored_type(stored.array)))
        else:
            sitk.WriteImage(to_sitk(stored), str(temporary), useCompression=True)


def as_stored(volume: Volume) -> Volume:
    """Return a volume with the axes of the file that it was read from, [Z, Y, X] of that file."""
    return _reoriented(volume, ornt_transform(LPS, axcodes2ornt(volume.stored_orientation, LPS_LABELS)))


def content_md5(path: Path) -> str:
    """Return the md5 of an image: of its file, of the files of a DICOM folder, of a header and the file with its voxels.

    Hidden files in a DICOM folder, such as .DS_Store, and folders, which may hold masks of the series, are left out. A header
    that cannot be used has the md5 of its file alone: reading the image refuses it and gives the reason.
    """
    if path.is_dir():
        files = (file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith("."))
        return md5_of_text("\n".join(f"{file.name}:{md5_of(file)}" for file in files))
    if path.suffix.lower() not in (".mhd", ".nrrd") or not path.is_file():
        return md5_of(path)
    try:
        voxels = voxel_file(path, read_header(path)[0])
    except VolumeError:
        voxels = path
    if voxels == path:
        return md5_of(path)
    return md5_of_text(" ".join(md5_of(part) for part in (path, voxels) if part is not None and part.is_file()))


def to_sitk(volume: Volume) -> sitk.Image:
    """Return the volume as a SimpleITK image on its grid; bool becomes uint8, float16 float32."""
    assert volume.array.shape == volume.geometry.shape_vox, (volume.array.shape, volume.geometry)
    image = sitk.GetImageFromArray(_stored_type(volume.array))
    image.SetSpacing(volume.geometry.spacing_mm[::-1])
    image.SetOrigin(volume.geometry.origin_mm)
    image.SetDirection(volume.geometry.direction)
    return image


def _stored_type(array: np.ndarray) -> np.ndarray:
    return array.astype({"bool": np.uint8, "float16": np.float32}.get(array.dtype.name, array.dtype), copy=False)


def _reoriented(volume: Volume, orientation: np.ndarray) -> Volume:
    """Permute and flip array and grid by an orientation of nibabel: for each of x, y, z its new axis, and -1 if flipped."""
    order, grid = np.argsort(orientation[:, 0]), volume.geometry
    flips, size = orientation[order, 1], np.array(grid.shape_vox[::-1])[order]
    spacing_mm, axes = np.array(grid.spacing_mm[::-1])[order], grid.matrix[:, order]
    permuted = Geometry.from_xyz(size, spacing_mm, origin_mm=grid.origin_mm, direction=axes)
    first_mm = permuted.to_world(np.where(flips < 0, size - 1, 0)[::-1])
    flipped = Geometry.from_xyz(size, spacing_mm, origin_mm=first_mm, direction=axes * flips)
    return replace(volume, array=apply_orientation(volume.array.T, orientation).T, geometry=flipped)


def _read_file(path: Path, *, channel: int | None) -> Volume:
    if not path.is_file():
        raise VolumeError("there is no such file; check the path, or fetch the data (dvc pull)", "missing_file")
    suffix = image_suffix(path.name)
    if suffix is None:
        raise VolumeError(
            f"its suffix is none of {', '.join(IMAGE_SUFFIXES)}; convert it (a pair of .hdr and .img too), or give the folder "
            "of its DICOM series",
            "unknown_suffix",
        )
    require_content(path)
    read = read_nifti if suffix in (".nii", ".nii.gz") else read_with_sitk
    return read(path, channel=channel)


def _check_grid(grid: Geometry) -> None:
    """Refuse grids that no scanner produces: damaged headers, other units, sheared axes."""
    edges_mm, size_xyz, directions = np.array(grid.spacing_mm[::-1]), grid.shape_vox[::-1], grid.matrix
    shortest_mm, longest_mm = EDGE_RANGE_MM
    extent_mm = edges_mm * size_xyz
    if not (edges_mm.min() >= shortest_mm and edges_mm.max() <= longest_mm and extent_mm.max() <= MAX_EXTENT_MM):
        edges = " x ".join(f"{edge:.4g}" for edge in edges_mm)
        size = " x ".join(str(length) for length in size_xyz)
        raise VolumeError(
            f"voxel edges are {shortest_mm:g} to {longest_mm:g} mm and a volume is at most {MAX_EXTENT_MM:g} mm long, and the "
            f"header has {edges} mm for {size} voxels; correct the spacing, or export it again",
            "implausible_grid",
        )
    if not np.isfinite(grid.origin_mm).all():
        raise VolumeError(
            f"the first voxel lies at a finite position, and the header has {grid.origin_mm}; export it again",
            "implausible_grid",
        )
    if not np.abs(directions.T @ directions - np.eye(3)).max() <= RIGHT_ANGLE_TOLERANCE:
        axes = " ".join(f"({', '.join(f'{value:.3f}' for value in axis)})" for axis in directions.T)
        raise VolumeError(
            f"the axes of a grid are at right angles, and the header's are {axes}; resample it to a straight grid",
            "sheared_axes",
        )
