"""One DICOM series in a folder, sorted by position; everything that is not one volume is refused by name.

A volume is a list of frames, each with its header and the place of its voxels: the slices of a folder of classic files and
the frames of an Enhanced (multi-frame) file follow the same rules. Positions and directions are world (x, y, z) in LPS mm.
"""

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk

from prostate_seg.common.errors import VolumeError
from prostate_seg.imaging.dicom_frames import (
    PATIENT,
    POSITION,
    SERIES,
    STUDY,
    Frame,
    frames_of,
    is_hidden,
    label,
    naming_damage,
)
from prostate_seg.imaging.file_integrity import require_sane_size

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

NO_RESCALE = (1.0, 0.0)
"""Slope and intercept that leave stored values as they are."""

PIXEL_ATTRIBUTES = (
    *(
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "NumberOfFrames",
        "Rows",
        "Columns",
        "BitsAllocated",
        "BitsStored",
    ),
    *("HighBit", "PixelRepresentation", "PixelData"),
)
"""What is needed to decode the stored values of a file."""


def read_series(folder: Path) -> sitk.Image:
    """Read the one DICOM series of a folder, its slices sorted by position."""
    ordered = _checked_frames(folder)
    if len(ordered) == 1:
        raise VolumeError(
            "a volume has three dimensions, and the folder holds a single DICOM image; export all slices of the series",
            "not_3d",
        )
    return _placed(_image(ordered), ordered)


def series_files(folder: Path) -> list[Path]:
    """Return the files of the one DICOM series of a folder in the order of its slices; one file of several frames alone.

    Raises:
        VolumeError: As `read_series`.
    """
    return list(dict.fromkeys(path for path, _ in series_frames(folder)))


def series_frames(folder: Path) -> list[tuple[Path, int]]:
    """Return the file of each slice and its frame in that file, from 0, in the order of `read_series`.

    Raises:
        VolumeError: As `read_series`.
    """
    return [(frame.path, frame.index) for frame in _checked_frames(folder)]


def _checked_frames(folder: Path) -> list[Frame]:
    """Return the headers of the one volume of a folder, sorted by position."""
    frames = _frames_in(folder)
    require_sane_size((*frames[0].size, len(frames)))
    if len(frames) == 1:
        return frames
    _check_one_series(frames)
    _check_have_positions(frames)
    _check_parallel(frames)
    _check_same_pixels(frames)
    ordered = _ordered(frames)
    _check_positions(ordered)
    _check_one_study(ordered)
    return ordered


def _frames_in(folder: Path) -> list[Frame]:
    """Return the headers of all DICOM images in the folder."""
    paths = sorted(folder.iterdir())
    files = [path for path in paths if not is_hidden(path) and (path.is_file() or not path.exists())]
    frames = [frame for path in files for frame in frames_of(path)]
    if not frames:
        example = f", such as {files[0].name}" if files else ""
        folders = sum(path.is_dir() for path in paths)
        raise VolumeError(
            f"no DICOM image lies in this folder ({len(files)} other files{example}; {folders} folders); "
            "a case is an image file or a folder with the files of one DICOM series",
            "no_dicom",
        )
    return frames


def _check_one_series(frames: Sequence[Frame]) -> None:
    series = sorted({one.identity[SERIES] for one in frames})
    if len(series) > 1:
        counts = ", ".join(
            f"{len({one.path for one in frames if one.identity[SERIES] == uid})} files of {uid}" for uid in series
        )
        raise VolumeError(
            f"the folder holds {len(series)} DICOM series: {counts}; keep the files of one series", "several_series"
        )


def _check_one_study(frames: Sequence[Frame]) -> None:
    for tag, whose in ((PATIENT, "patient"), (STUDY, "study")):
        other = next((one for one in frames if one.identity[tag] != frames[0].identity[tag]), None)
        if other is not None:  # the value may name the patient, and this text goes into logs
            raise VolumeError(
                f"slices of one volume have one {label(tag)}, and {frames[0].path.name} and {other.path.name} have two; "
                f"keep the files of one {whose}",
                "several_series",
            )


def _check_parallel(frames: Sequence[Frame]) -> None:
    """Refuse slices in several orientations, as localizers have them."""
    groups: list[list[Frame]] = []
    for one in frames:
        same = (group for group in groups if np.abs(group[0].axes - one.axes).max() <= SAME_DIRECTION_TOLERANCE)
        group = next(same, None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    if len(groups) > 1:
        counts = "; ".join(f"{len(group)} {_plane(group[0])}" for group in groups)
        raise VolumeError(
            f"mixed orientations: {len(frames)} {_unit(frames)} in {len(groups)} orientations ({counts}); "
            "this may be a localizer: give the axial T2-weighted series",
            "mixed_orientations",
        )


def _check_have_positions(frames: Sequence[Frame]) -> None:
    without = [one.name for one in frames if np.isnan(one.position_mm).any()]
    if without:
        raise VolumeError(
            f"{len(without)} of {len(frames)} DICOM {_unit(frames)} have no {label(POSITION)}, {without[0]} among them, "
            "so that their order is unknown; export the original series",
            "no_position",
        )


def _unit(frames: Sequence[Frame]) -> str:
    """Return what slices are called in a message: files, or frames where a file has several."""
    return "frames" if any(one.num_frames > 1 for one in frames) else "files"


def _plane(one: Frame) -> str:
    """Name the anatomical plane that a slice is nearest to, with its normal."""
    name = ("sagittal", "coronal", "axial")[int(np.abs(one.normal).argmax())]
    return f"{name}, normal ({', '.join(f'{value:.3f}' for value in one.normal)})"


def _check_same_pixels(frames: Sequence[Frame]) -> None:
    """Refuse slices of different size or pixel spacing."""
    first = frames[0]
    for one in frames[1:]:
        same_spacing = np.allclose(
            one.pixel_spacing_mm, first.pixel_spacing_mm, rtol=SAME_PIXEL_SPACING_TOLERANCE, atol=0
        )
        if one.size != first.size or not same_spacing:
            raise VolumeError(
                "all slices must have the same pixels\n"
                f"  {first.name} {_pixels(first)}\n  {one.name} {_pixels(one)}\n"
                "Keep the files of one volume.",
                "mixed_pixels",
            )


def _pixels(one: Frame) -> str:
    columns, rows = one.size
    spacing_x_mm, spacing_y_mm = one.pixel_spacing_mm
    return f"{columns} columns x {rows} rows, {spacing_x_mm:.5g} x {spacing_y_mm:.5g} mm"


def _ordered(frames: Sequence[Frame]) -> list[Frame]:
    """Sort by position along the normal of the first slice."""
    normal = frames[0].normal
    return sorted(frames, key=lambda one: (float(one.position_mm @ normal), one.path.name, one.index))


def _check_positions(ordered: Sequence[Frame]) -> None:
    """Refuse slices that are not one straight stack at equal distances.

    Args:
        ordered: At least two parallel slices, sorted by position along their normal.
    """
    positions_mm = np.array([one.position_mm for one in ordered])
    along_mm = positions_mm @ ordered[0].normal
    gaps_mm = np.diff(along_mm)
    _check_one_frame_each(gaps_mm, ordered)
    _check_gaps(gaps_mm, along_mm, ordered)
    beside_mm = positions_mm - positions_mm[0] - np.outer(along_mm - along_mm[0], ordered[0].normal)
    furthest_mm = float(np.linalg.norm(beside_mm, axis=1).max())
    if furthest_mm > STRAIGHT_TOLERANCE_MM:
        raise VolumeError(
            f"slices must lie straight above each other, and one lies {furthest_mm:.2f} mm beside the first one's normal; "
            "resample the series to a straight grid and give that file",
            "sheared_series",
        )


def _check_one_frame_each(gaps_mm: np.ndarray, ordered: Sequence[Frame]) -> None:
    """Refuse several slices at one position: copies of the same files, or other images of the same slices."""
    pairs = [(ordered[at], ordered[at + 1]) for at in np.flatnonzero(gaps_mm <= SAME_POSITION_TOLERANCE_MM).tolist()]
    if not pairs:
        return
    names = f"{pairs[0][0].name} and {pairs[0][1].name}"
    if all(_are_copies(first, second) for first, second in pairs):
        raise VolumeError(
            f"{len(ordered)} {_unit(ordered)} at {len(ordered) - len(pairs)} positions: identical copies, such as {names}; "
            "delete one set",
            "identical_files",
        )
    raise VolumeError(
        f"{len(ordered)} {_unit(ordered)} at {len(ordered) - len(pairs)} positions: not one volume "
        f"({names} share a position); several b-values, echoes or repeats need a folder each",
        "several_volumes",
    )


def _are_copies(first: Frame, second: Frame) -> bool:
    """Return whether two files hold one object; careless anonymisation gives different objects one UID."""
    if first.path == second.path or first.sop_instance_uid != second.sop_instance_uid:
        return False
    return np.array_equal(_stored_values(first)[first.index], _stored_values(second)[second.index])


def _check_gaps(gaps_mm: np.ndarray, along_mm: np.ndarray, ordered: Sequence[Frame]) -> None:
    usual_mm = float(np.sort(gaps_mm)[(len(gaps_mm) - 1) // 2])
    odd = int(np.abs(gaps_mm - usual_mm).argmax())
    if abs(gaps_mm[odd] - usual_mm) <= GAP_TOLERANCE_FRACTION * usual_mm:
        return
    raise VolumeError(
        f"missing slice: slices {odd + 1} and {odd + 2} of {len(ordered)} ({ordered[odd].name} and "
        f"{ordered[odd + 1].name}, at {along_mm[odd]:.2f} and {along_mm[odd + 1]:.2f} mm along the normal) are "
        f"{gaps_mm[odd]:.2f} mm apart, and slices are usually {usual_mm:.2f} mm apart here; export the series again",
        "missing_slice",
    )


def _image(ordered: Sequence[Frame]) -> sitk.Image:
    """Return the scanner's values: as stored, or float32 where a frame has a slope or an intercept."""
    if all(_is_plain(frame) for frame in ordered) and len({frame.stored_type for frame in ordered}) == 1:
        with suppress(RuntimeError):  # reading file by file takes twice as long, but names the file that fails
            return sitk.ReadImage([str(frame.path) for frame in ordered], imageIO="GDCMImageIO")
    stored = {frame.path: _stored_values(frame) for frame in {frame.path: frame for frame in ordered}.values()}
    planes = [stored[frame.path][frame.index] for frame in ordered]
    if any(frame.rescale != NO_RESCALE for frame in ordered):
        planes = [_rescaled(plane, frame) for plane, frame in zip(planes, ordered, strict=True)]
    return sitk.GetImageFromArray(np.stack(planes))


def _is_plain(frame: Frame) -> bool:
    """Return whether GDCM reads the stored values of the frame's file; else it rescales all frames as the first one."""
    return frame.rescale == NO_RESCALE and not frame.has_functional_groups


def _rescaled(plane: np.ndarray, frame: Frame) -> np.ndarray:
    slope, intercept = frame.rescale
    return (plane * slope + intercept).astype(np.float32)


def _stored_values(frame: Frame) -> np.ndarray:
    """Return the stored values of a frame's file, shape [frames, Y, X]."""
    columns, rows = frame.size
    with naming_damage(frame.path), tempfile.TemporaryDirectory(prefix="prostate_seg_") as folder:
        path = frame.path if _is_plain(frame) else _without_rescale(frame.path, Path(folder))
        stored = sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO="GDCMImageIO"))
        if stored.shape != (frame.num_frames, rows, columns):
            raise ValueError(f"{stored.shape} voxels in place of {(frame.num_frames, rows, columns)}")
        return stored


def _without_rescale(path: Path, folder: Path) -> Path:
    """Write a copy of a file that has the attributes of its pixels alone, compressed as they are."""
    source = pydicom.dcmread(path, specific_tags=list(PIXEL_ATTRIBUTES), force=True)
    source.SOPClassUID = source.file_meta.MediaStorageSOPClassUID = pydicom.uid.EnhancedMRImageStorage
    source.save_as(folder / "pixels.dcm")
    return folder / "pixels.dcm"


def _placed(image: sitk.Image, ordered: Sequence[Frame]) -> sitk.Image:
    """Set the grid from the slices' positions, which headers' thickness and spacing may contradict."""
    first, last = ordered[0], ordered[-1]
    gap_mm = float((last.position_mm - first.position_mm) @ first.normal) / (len(ordered) - 1)
    image.SetSpacing((*first.pixel_spacing_mm, gap_mm))
    image.SetOrigin(first.position_mm.tolist())
    image.SetDirection(np.column_stack([*first.axes, first.normal]).ravel().tolist())
    return image
