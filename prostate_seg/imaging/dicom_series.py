"""One DICOM series in a folder, sorted by position; everything that is not one volume is refused by name.

Positions and directions are world (x, y, z) in LPS mm, as in the headers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from prostate_seg.errors import VolumeError
from prostate_seg.imaging.file_integrity import require_sane_size
from prostate_seg.imaging.sitk_reader import (
    LFS_POINTER,
    open_reader,
    reason_of,
    require_scalar_pixels,
)

SAME_DIRECTION_TOLERANCE = 1e-3
"""Two slices are parallel when no direction cosine differs by more than this (0.06 degrees; headers are rounded)."""

SAME_POSITION_TOLERANCE_MM = 0.01
"""Two slices closer than this along the normal are at one position."""

SAME_PIXEL_SPACING_TOLERANCE = 1e-4
"""Relative difference up to which two pixel spacings are one."""

GAP_TOLERANCE_FRACTION = 0.05
"""Part of the usual gap by which a gap may differ; exporters that round positions to 0.1 mm stay below it at 3 mm."""

STRAIGHT_TOLERANCE_MM = 0.25
"""How far a slice may lie beside the line of the others: half a pixel of a usual T2 scan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slice:
    """One DICOM file's header."""

    path: Path
    series_uid: str
    size: tuple[int, int, int]
    """Columns, rows, frames."""
    pixel_spacing_mm: tuple[float, float]
    """Along x (columns) and y (rows) of the image."""
    axes: np.ndarray
    """World directions of the image's x and y, shape [2, 3] (Image Orientation (Patient))."""
    position_mm: np.ndarray
    """World point of the first pixel's centre, shape [3] (Image Position (Patient))."""
    has_position: bool
    """False when the header gives none, in which case GDCM says 0, 0, 0."""
    pixel_id: int
    """SimpleITK's pixel type after the file's rescaling."""

    @property
    def normal(self) -> np.ndarray:
        """Unit vector across the slice, shape [3]."""
        across = np.cross(self.axes[0], self.axes[1])
        return across / np.linalg.norm(across)


def read_series(folder: Path) -> sitk.Image:
    """Read the one DICOM series of a folder, its slices sorted by position."""
    ordered = _checked_slices(folder)
    if len(ordered) == 1:
        return _read_single(ordered[0])
    return _placed(_series_reader(ordered).Execute(), ordered)


def series_files(folder: Path) -> list[Path]:
    """Return the files of the one DICOM series of a folder in the order of its slices; one file of several frames alone.

    Raises:
        VolumeError: As `read_series`.
    """
    return [one.path for one in _checked_slices(folder)]


def _checked_slices(folder: Path) -> list[_Slice]:
    """Return the headers of the one volume of a folder, sorted by position."""
    slices = _slices_of(folder)
    columns, rows, _ = slices[0].size
    require_sane_size((columns, rows, sum(one.size[2] for one in slices)))
    if len(slices) == 1:
        return slices
    _check_one_series(slices)
    _check_parallel(slices)
    _check_same_pixels(slices)
    ordered = _ordered(slices)
    _check_positions(ordered)
    return ordered


def _slices_of(folder: Path) -> list[_Slice]:
    """Return the headers of all DICOM images in the folder, skipping other files."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    slices = [found for path in files if path.name.upper() != "DICOMDIR" and (found := _slice_of(path)) is not None]
    if not slices:
        example = f", such as {files[0].name}" if files else ""
        folders = sum(path.is_dir() for path in folder.iterdir())
        raise VolumeError(
            f"no DICOM image lies in this folder ({len(files)} other files{example}; {folders} folders); "
            "a case is an image file or a folder with the files of one DICOM series",
            "no_dicom",
        )
    return slices


def _slice_of(path: Path) -> _Slice | None:
    """Return a DICOM file's header, or None for a file that is not DICOM."""
    try:
        reader = open_reader(path, image_io="GDCMImageIO")
    except RuntimeError as error:
        _check_not_dicom(path, error)
        return None
    require_scalar_pixels(reader)
    direction = np.array(reader.GetDirection()).reshape(3, 3)
    spacing_x_mm, spacing_y_mm, _ = reader.GetSpacing()
    return _Slice(
        path=path,
        series_uid=_tag(reader, "0020|000e"),
        size=reader.GetSize(),
        pixel_spacing_mm=(spacing_x_mm, spacing_y_mm),
        axes=direction.T[:2],
        position_mm=np.array(reader.GetOrigin()),
        has_position=bool(_tag(reader, "0020|0032")) or any(reader.GetOrigin()),
        pixel_id=reader.GetPixelID(),
    )


def _check_not_dicom(path: Path, error: RuntimeError) -> None:
    """Refuse a file that says it is DICOM, or stands for one, and cannot be read."""
    with path.open("rb") as stream:
        start = stream.read(132)
    if start.startswith(LFS_POINTER):
        raise VolumeError(f"{path.name} is a Git LFS pointer; run `git lfs pull` (or `dvc pull`)", "lfs_pointer")
    if start[128:] == b"DICM":
        raise VolumeError(
            f"{path.name} is a DICOM file that is damaged, incomplete or no image ({reason_of(error)}); "
            "export the series again, or take the file out of the folder"
        ) from error


def _tag(reader: sitk.ImageFileReader, key: str) -> str:
    return reader.GetMetaData(key).strip("\0 ") if reader.HasMetaDataKey(key) else ""


def _read_single(only: _Slice) -> sitk.Image:
    """Read a series of one file, which must have several frames."""
    if only.size[2] == 1:
        raise VolumeError(
            "a volume has three dimensions, and the folder holds a single DICOM image; export all slices of the series",
            "not_3d",
        )
    return open_reader(only.path, image_io="GDCMImageIO").Execute()


def _check_one_series(slices: Sequence[_Slice]) -> None:
    series = sorted({one.series_uid for one in slices})
    if len(series) > 1:
        counts = ", ".join(f"{sum(one.series_uid == uid for one in slices)} files of {uid}" for uid in series)
        raise VolumeError(
            f"the folder holds {len(series)} DICOM series: {counts}; keep the files of one series", "several_series"
        )
    multi_frame = [one.path.name for one in slices if one.size[2] > 1]
    if multi_frame:
        raise VolumeError(
            f"the folder holds {len(slices)} files, and {multi_frame[0]} alone is a volume of many frames; "
            "keep one volume",
            "several_volumes",
        )


def _check_parallel(slices: Sequence[_Slice]) -> None:
    """Refuse slices in several orientations, as localizers have them."""
    _check_have_positions(slices)
    groups: list[list[_Slice]] = []
    for one in slices:
        same = (group for group in groups if np.abs(group[0].axes - one.axes).max() <= SAME_DIRECTION_TOLERANCE)
        group = next(same, None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    if len(groups) > 1:
        counts = "; ".join(f"{len(group)} {_plane(group[0])}" for group in groups)
        raise VolumeError(
            f"mixed orientations: {len(slices)} files in {len(groups)} orientations ({counts}); "
            "this may be a localizer: give the axial T2-weighted series",
            "mixed_orientations",
        )


def _check_have_positions(slices: Sequence[_Slice]) -> None:
    without = [one.path.name for one in slices if not one.has_position]
    if len(without) > 1:
        raise VolumeError(
            f"{len(without)} of {len(slices)} DICOM files have no Image Position (Patient), {without[0]} among them, "
            "so that their order is unknown; export the original series",
            "no_position",
        )


def _plane(one: _Slice) -> str:
    """Name the anatomical plane that a slice is nearest to, with its normal."""
    name = ("sagittal", "coronal", "axial")[int(np.abs(one.normal).argmax())]
    return f"{name}, normal ({', '.join(f'{value:.3f}' for value in one.normal)})"


def _check_same_pixels(slices: Sequence[_Slice]) -> None:
    """Refuse slices of different size or pixel spacing."""
    first = slices[0]
    for one in slices[1:]:
        same_spacing = np.allclose(
            one.pixel_spacing_mm, first.pixel_spacing_mm, rtol=SAME_PIXEL_SPACING_TOLERANCE, atol=0
        )
        if one.size != first.size or not same_spacing:
            raise VolumeError(
                "all slices must have the same pixels\n"
                f"  {first.path.name} {_pixels(first)}\n  {one.path.name} {_pixels(one)}\n"
                "Keep the files of one volume.",
                "mixed_pixels",
            )


def _pixels(one: _Slice) -> str:
    columns, rows, _ = one.size
    spacing_x_mm, spacing_y_mm = one.pixel_spacing_mm
    return f"{columns} columns x {rows} rows, {spacing_x_mm:.5g} x {spacing_y_mm:.5g} mm"


def _ordered(slices: Sequence[_Slice]) -> list[_Slice]:
    """Sort by position along the normal of the first slice."""
    normal = slices[0].normal
    return sorted(slices, key=lambda one: (float(one.position_mm @ normal), one.path.name))


def _check_positions(ordered: Sequence[_Slice]) -> None:
    """Refuse slices that are not one straight stack at equal distances.

    Args:
        ordered: At least two parallel slices, sorted by position along their normal.
    """
    positions_mm = np.array([one.position_mm for one in ordered])
    along_mm = positions_mm @ ordered[0].normal
    gaps_mm = np.diff(along_mm)
    _check_one_file_each(gaps_mm, ordered)
    _check_gaps(gaps_mm, along_mm, ordered)
    beside_mm = positions_mm - positions_mm[0] - np.outer(along_mm - along_mm[0], ordered[0].normal)
    furthest_mm = float(np.linalg.norm(beside_mm, axis=1).max())
    if furthest_mm > STRAIGHT_TOLERANCE_MM:
        raise VolumeError(
            f"slices must lie straight above each other, and one lies {furthest_mm:.2f} mm beside the first one's normal; "
            "resample the series to a straight grid and give that file",
            "sheared_series",
        )


def _check_one_file_each(gaps_mm: np.ndarray, ordered: Sequence[_Slice]) -> None:
    repeated = np.flatnonzero(gaps_mm <= SAME_POSITION_TOLERANCE_MM)
    if len(repeated):
        first, second = ordered[repeated[0]].path.name, ordered[repeated[0] + 1].path.name
        raise VolumeError(
            f"{len(ordered)} files at {len(ordered) - len(repeated)} positions: not one volume "
            f"({first} and {second} share a position); several b-values, echoes or repeats need a folder each",
            "several_volumes",
        )


def _check_gaps(gaps_mm: np.ndarray, along_mm: np.ndarray, ordered: Sequence[_Slice]) -> None:
    usual_mm = float(np.sort(gaps_mm)[(len(gaps_mm) - 1) // 2])
    odd = int(np.abs(gaps_mm - usual_mm).argmax())
    if abs(gaps_mm[odd] - usual_mm) <= GAP_TOLERANCE_FRACTION * usual_mm:
        return
    raise VolumeError(
        f"missing slice: slices {odd + 1} and {odd + 2} of {len(ordered)} ({ordered[odd].path.name} and "
        f"{ordered[odd + 1].path.name}, at {along_mm[odd]:.2f} and {along_mm[odd + 1]:.2f} mm along the normal) are "
        f"{gaps_mm[odd]:.2f} mm apart, and slices are usually {usual_mm:.2f} mm apart here; export the series again",
        "missing_slice",
    )


def _series_reader(ordered: Sequence[_Slice]) -> sitk.ImageSeriesReader:
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([str(one.path) for one in ordered])
    if len({one.pixel_id for one in ordered}) > 1:  # files that rescale differently; the first would decide for all
        reader.SetOutputPixelType(sitk.sitkFloat32)
    return reader


def _placed(image: sitk.Image, ordered: Sequence[_Slice]) -> sitk.Image:
    """Set the grid from the slices' positions, which headers' thickness and spacing may contradict."""
    first, last = ordered[0], ordered[-1]
    gap_mm = float((last.position_mm - first.position_mm) @ first.normal) / (len(ordered) - 1)
    image.SetSpacing((*first.pixel_spacing_mm, gap_mm))
    image.SetOrigin(first.position_mm.tolist())
    image.SetDirection(np.column_stack([*first.axes, first.normal]).ravel().tolist())
    return image
