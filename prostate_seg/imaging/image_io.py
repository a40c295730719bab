"""Reading and writing volumes.

Every volume is a [Z, Y, X] array whose axes run, as nearly as the scan allows, to the patient's left, posterior and superior
(LPS); it remembers how its file stored the axes, so that a mask written for it lies on the file's own grid. Spacings are
(z, y, x) in mm, world points (x, y, z) in mm. What cannot be one scalar volume is refused with a named check; whether the
voxels make sense is for `quality` to say.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from prostate_seg.errors import InputError, VolumeError
from prostate_seg.files import atomic_path, md5_of, md5_of_text
from prostate_seg.imaging.dicom_series import read_series
from prostate_seg.imaging.file_integrity import (
    require_complete,
    require_content,
    require_room,
    require_sane_header,
    require_sane_size,
)
from prostate_seg.imaging.geometry import Geometry, Volume
from prostate_seg.imaging.sitk_reader import (
    IMAGE_IO,
    image_suffix,
    open_reader,
    refusing_unreadable,
    require_scalar_pixels,
)

SINGLE_FILE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")
"""What can be written: .mhd needs a second file beside it, which no single rename can put in place."""

EDGE_RANGE_MM = (0.01, 100.0)
"""Shortest and longest voxel edge; outside them the header is damaged or in another unit."""

MAX_EXTENT_MM = 2000.0
"""No volume is longer along an axis than a scanner's bore."""

RIGHT_ANGLE_TOLERANCE = 0.01
"""Largest cosine between two axes of a grid, and largest difference of an axis from length 1."""

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
        image = read_series(path) if path.is_dir() else _read_file(path, channel=channel)
    _check_grid(image)
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
    oriented = _to_lps(image, code)
    array = sitk.GetArrayFromImage(oriented)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return Volume(array=array, geometry=geometry_of(oriented), stored_orientation=code)


def write_volume(path: Path, volume: Volume) -> None:
    """Write a volume atomically, compressed where the format can, with the axes of `volume.stored_orientation`.

    Args:
        path: File to write, .nii.gz, .nii, .mha or .nrrd; equal volumes give equal bytes.
        volume: Volume in LPS; bool is stored as uint8.

    Raises:
        InputError: If the suffix is none of these.
    """
    if image_suffix(path.name) not in SINGLE_FILE_SUFFIXES:
        raise InputError(
            f"volumes are written as {', '.join(SINGLE_FILE_SUFFIXES)}, not as {path.name}; choose one of these suffixes"
        )
    image = _from_lps(to_sitk(volume), volume.stored_orientation)
    with atomic_path(path) as temporary:
        sitk.WriteImage(image, str(temporary), useCompression=True)


def stored_array(volume: Volume) -> np.ndarray:
    """Return the voxels with the axes of the file that the volume came from, [Z, Y, X] of that file."""
    return sitk.GetArrayFromImage(_from_lps(to_sitk(volume), volume.stored_orientation))


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
    """Return the volume as a SimpleITK image in LPS; bool becomes uint8, float16 float32."""
    assert volume.array.shape == volume.geometry.shape_vox, (volume.array.shape, volume.geometry)
    stored_as = {"bool": np.uint8, "float16": np.float32}.get(volume.array.dtype.name, volume.array.dtype)
    image = sitk.GetImageFromArray(volume.array.astype(stored_as, copy=False))
    image.SetSpacing(volume.geometry.spacing_mm[::-1])
    image.SetOrigin(volume.geometry.origin_mm)
    image.SetDirection(volume.geometry.direction)
    return image


def _to_lps(image: sitk.Image, code: str) -> sitk.Image:
    """Permute and flip the axes of a file with this axis code to LPS.

    `sitk.DICOMOrient` does the same, but is not its own inverse for scans at exactly 45 degrees.
    """
    if code == "LPS":
        return image
    order, flips = _axes(code)
    return sitk.Flip(sitk.PermuteAxes(image, order), flips, flipAboutOrigin=False)


def _from_lps(image: sitk.Image, code: str) -> sitk.Image:
    """Undo `_to_lps`."""
    if code == "LPS":
        return image
    order, flips = _axes(code)
    return sitk.PermuteAxes(sitk.Flip(image, flips, flipAboutOrigin=False), [order.index(axis) for axis in range(3)])


def _axes(code: str) -> tuple[list[int], list[bool]]:
    """Return, for x, y and z in LPS, the axis of the file that runs along it and whether it runs the other way."""
    order = [next(axis for axis, letter in enumerate(code) if letter in pair) for pair in WORLD_AXES]
    return order, [code[axis] not in "LPS" for axis in order]


def _read_file(path: Path, *, channel: int | None) -> sitk.Image:
    _check_file(path)
    require_sane_header(path)
    reader = open_reader(path, image_io=IMAGE_IO[image_suffix(path.name) or ""])
    require_scalar_pixels(reader)
    _check_three_dimensional(reader.GetSize(), channel=channel)
    require_sane_size(reader.GetSize())
    require_room(path, reader)
    image = reader.Execute()
    require_complete(path, reader, image)
    return image[:, :, :, channel or 0] if image.GetDimension() == 4 else image


def _check_grid(image: sitk.Image) -> None:
    """Refuse grids that no scanner makes: damaged headers, other units, sheared axes."""
    edges_mm, directions = np.array(image.GetSpacing()), np.array(image.GetDirection()).reshape(3, 3)
    shortest_mm, longest_mm = EDGE_RANGE_MM
    extent_mm = edges_mm * image.GetSize()
    if not (edges_mm.min() >= shortest_mm and edges_mm.max() <= longest_mm and extent_mm.max() <= MAX_EXTENT_MM):
        edges = " x ".join(f"{edge:.4g}" for edge in edges_mm)
        size = " x ".join(str(length) for length in image.GetSize())
        raise VolumeError(
            f"voxel edges are {shortest_mm:g} to {longest_mm:g} mm and a volume at most {MAX_EXTENT_MM:g} mm long, and the "
            f"header says {edges} mm for {size} voxels; mend the spacing, or export it again",
            "implausible_grid",
        )
    if not np.isfinite(image.GetOrigin()).all():
        raise VolumeError(
            f"the header says that the first voxel lies at {image.GetOrigin()}; mend it", "implausible_grid"
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
            f"its suffix is none of {', '.join(IMAGE_IO)}; convert it, or give the folder of its DICOM series",
            "unknown_suffix",
        )
    require_content(path)
    if suffix.startswith(".nii"):
        _check_nifti_name(path, suffix)


def _check_nifti_name(path: Path, suffix: str) -> None:
    """Refuse names with which niftilib reads nothing, or the voxels of another file."""
    written = path.name[-len(suffix) :]
    if written not in (suffix, suffix.upper()):
        raise VolumeError(f"a NIfTI suffix is all lower or all upper case, not {written}; rename the file to {suffix}")
    twin = path.with_name(path.name[: -len(".gz")])
    if suffix == ".nii.gz" and twin.is_file():
        raise VolumeError(
            f"{twin.name} lies beside it, and its voxels would be read instead; remove or rename one of them",
            "ambiguous_file",
        )


def _check_three_dimensional(size_xyz: Sequence[int], *, channel: int | None) -> None:
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
