"""Reading the DICOM series of a folder, sorted by position; folders that are not one volume are refused by a named check.

The slices of a folder of classic files and the frames of an Enhanced (multi-frame) file follow the same rules. Positions and
directions are world (x, y, z) in LPS mm.
"""

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk

from prostate_seg.common.errors import VolumeError
from prostate_seg.imaging.dicom_frames import NO_RESCALE, PIXEL_ATTRIBUTES, Frame, frames_of, label, naming_damage
from prostate_seg.imaging.file_integrity import require_sane_size
from prostate_seg.imaging.geometry import Geometry, Volume

SAME_DIRECTION_TOLERANCE = 1e-3
"""Largest difference of a direction cosine between parallel slices (0.06 degrees; headers are rounded)."""
SAME_POSITION_TOLERANCE_MM = 0.01
"""Slices closer than this along the normal are at one position."""
SAME_PIXEL_SPACING_TOLERANCE = 1e-4
"""Relative difference up to which two pixel spacings are equal."""
GAP_TOLERANCE_FRACTION = 0.05
"""Largest deviation of a gap from the usual one, as a fraction; positions rounded to 0.1 mm deviate less at 3 mm."""
STRAIGHT_TOLERANCE_MM = 0.25
"""Largest distance of a slice from the line through the first one: half a pixel of a usual T2 scan."""


def read_series(folder: Path) -> Volume:
    """Read the one DICOM series of a folder, its slices sorted by position, with the axes of its images.

    Raises:
        VolumeError: If the folder does not hold exactly one complete volume.
    """
    ordered = series_frames(folder)
    first, last = ordered[0], ordered[-1]
    # From the positions: Slice Thickness and Spacing Between Slices may contradict them.
    gap_mm = float((last.position_mm - first.position_mm) @ first.normal) / (len(ordered) - 1)
    geometry = Geometry.from_xyz(
        (*first.size, len(ordered)),
        (*first.pixel_spacing_mm, gap_mm),
        origin_mm=first.position_mm,
        direction=np.column_stack([*first.axes, first.normal]) + 0.0,  # no -0.0
    )
    return Volume(array=_values(ordered), geometry=geometry)


def series_frames(folder: Path) -> list[Frame]:
    """Return the headers of the one volume of a folder, sorted by position along the normal; errors as `read_series`."""
    paths = sorted(folder.iterdir())
    # Hidden files and the index of a medium are no slices; a broken link may be one.
    named = [path for path in paths if not path.name.startswith(".") and path.name.lower() != "dicomdir"]
    files = [path for path in named if path.is_file() or not path.exists()]
    frames = [frame for path in files for frame in frames_of(path)]
    if not frames:
        example = f", such as {files[0].name}" if files else ""
        raise VolumeError(
            f"this folder has no DICOM image ({len(files)} other files{example}; {sum(map(Path.is_dir, paths))} folders); "
            "a case is an image file or a folder with the files of one DICOM series",
            "no_dicom",
        )
    require_sane_size((*frames[0].size, len(frames)))
    if len(frames) == 1:
        raise VolumeError(
            "a volume has three dimensions, and the folder holds a single DICOM image; export all slices of the series",
            "not_3d",
        )
    unit = "frames" if any(one.num_frames > 1 for one in frames) else "files"
    _require_one_series(frames)
    _require_positions(frames, unit=unit)
    _require_one_orientation(frames, unit=unit)
    _require_same_pixels(frames)
    normal = frames[0].normal
    ordered = sorted(frames, key=lambda one: (float(one.position_mm @ normal), one.path.name, one.index))
    _check_stack(ordered, unit=unit)
    _require_one_study(ordered)
    return ordered


def _require_one_series(frames: Sequence[Frame]) -> None:
    files = defaultdict(set)
    for one in frames:
        files[one.identity["SeriesInstanceUID"]].add(one.path)
    if len(files) > 1:
        counts = ", ".join(f"{len(paths)} files of {uid}" for uid, paths in sorted(files.items()))
        raise VolumeError(
            f"the folder holds {len(files)} DICOM series: {counts}; keep the files of one series", "several_series"
        )


def _require_one_study(frames: Sequence[Frame]) -> None:
    """Refuse slices of several patients or studies; their ids may identify a patient, and are not in the message."""
    first = frames[0]
    for keyword, noun in (("PatientID", "patient"), ("StudyInstanceUID", "study")):
        other = next((one for one in frames if one.identity[keyword] != first.identity[keyword]), None)
        if other is not None:
            raise VolumeError(
                f"slices of one volume have one {label(keyword)}, and {first.path.name} and {other.path.name} have two; "
                f"keep the files of one {noun}",
                "several_series",
            )


def _require_positions(frames: Sequence[Frame], *, unit: str) -> None:
    without = [one.name for one in frames if np.isnan(one.position_mm).any()]
    if without:
        raise VolumeError(
            f"{len(without)} of {len(frames)} DICOM {unit} have no {label('ImagePositionPatient')}, {without[0]} among "
            "them, so that their order is unknown; export the original series",
            "no_position",
        )


def _require_one_orientation(frames: Sequence[Frame], *, unit: str) -> None:
    if any(np.abs(one.axes - frames[0].axes).max() > SAME_DIRECTION_TOLERANCE for one in frames):
        orientations: dict[bytes, list[Frame]] = defaultdict(list)
        for one in frames:
            orientations[(one.axes.round(3) + 0.0).tobytes()].append(one)
        counts = "; ".join(f"{len(group)} {_plane(group[0].normal)}" for group in orientations.values())
        raise VolumeError(
            f"mixed orientations: {len(frames)} {unit} in {len(orientations)} orientations ({counts}); "
            "this may be a localizer: give the axial T2-weighted series",
            "mixed_orientations",
        )


def _require_same_pixels(frames: Sequence[Frame]) -> None:
    first = frames[0]
    for one in frames[1:]:
        spacings_mm = one.pixel_spacing_mm, first.pixel_spacing_mm
        if one.size != first.size or not np.allclose(*spacings_mm, rtol=SAME_PIXEL_SPACING_TOLERANCE, atol=0):
            raise VolumeError(
                "all slices must have the same pixels\n"
                f"  {first.name} {_pixels(first)}\n  {one.name} {_pixels(one)}\n"
                "Keep the files of one volume.",
                "mixed_pixels",
            )


def _check_stack(ordered: Sequence[Frame], *, unit: str) -> None:
    """Refuse parallel slices, sorted along their normal, that are not one straight stack at equal distances."""
    positions_mm = np.array([one.position_mm for one in ordered])
    along_mm = positions_mm @ ordered[0].normal
    gaps_mm = np.diff(along_mm)

    pairs = [(ordered[at], ordered[at + 1]) for at in np.flatnonzero(gaps_mm <= SAME_POSITION_TOLERANCE_MM).tolist()]
    if pairs:
        found = f"{len(ordered)} {unit} at {len(ordered) - len(pairs)} positions"
        names = f"{pairs[0][0].name} and {pairs[0][1].name}"
        if all(_are_copies(first, second) for first, second in pairs):
            raise VolumeError(f"{found}: identical copies, such as {names}; delete one set", "identical_files")
        raise VolumeError(
            f"{found}: not one volume ({names} share a position); several b-values, echoes or repeats need a folder each",
            "several_volumes",
        )

    usual_mm = float(np.sort(gaps_mm)[(len(gaps_mm) - 1) // 2])
    odd = int(np.abs(gaps_mm - usual_mm).argmax())
    if abs(gaps_mm[odd] - usual_mm) > GAP_TOLERANCE_FRACTION * usual_mm:
        raise VolumeError(
            f"missing slice: slices {odd + 1} and {odd + 2} of {len(ordered)} ({ordered[odd].name} and "
            f"{ordered[odd + 1].name}, at {along_mm[odd]:.2f} and {along_mm[odd + 1]:.2f} mm along the normal) are "
            f"{gaps_mm[odd]:.2f} mm apart, and slices are usually {usual_mm:.2f} mm apart here; export the series again",
            "missing_slice",
        )

    beside_mm = positions_mm - positions_mm[0] - np.outer(along_mm - along_mm[0], ordered[0].normal)
    furthest_mm = float(np.linalg.norm(beside_mm, axis=1).max())
    if furthest_mm > STRAIGHT_TOLERANCE_MM:
        raise VolumeError(
            f"slices must lie straight above each other, and one lies {furthest_mm:.2f} mm beside the first one's normal; "
            "resample the series to a straight grid and give that file",
            "sheared_series",
        )


def _plane(normal: np.ndarray) -> str:
    """Return the nearest anatomical plane, with the normal."""
    name = ("sagittal", "coronal", "axial")[int(np.abs(normal).argmax())]
    return f"{name}, normal ({', '.join(f'{value:.3f}' for value in normal)})"


def _pixels(one: Frame) -> str:
    columns, rows = one.size
    spacing_x_mm, spacing_y_mm = one.pixel_spacing_mm
    return f"{columns} columns x {rows} rows, {spacing_x_mm:.5g} x {spacing_y_mm:.5g} mm"


def _are_copies(first: Frame, second: Frame) -> bool:
    """Return whether two files hold one object; careless anonymisation gives different objects one UID."""
    if first.path == second.path or first.identity["SOPInstanceUID"] != second.identity["SOPInstanceUID"]:
        return False
    return np.array_equal(_stored_values(first)[first.index], _stored_values(second)[second.index])


def _values(ordered: Sequence[Frame]) -> np.ndarray:
    """Return the scanner's values, [Z, Y, X]: as stored, or float32 where a frame has a slope or an intercept."""
    if all(frame.is_plain for frame in ordered) and len({frame.stored_type for frame in ordered}) == 1:
        with suppress(RuntimeError):  # reading file by file takes twice as long, but names the file that fails
            files = [str(frame.path) for frame in ordered]
            return sitk.GetArrayFromImage(sitk.ReadImage(files, imageIO="GDCMImageIO"))
    one_of_each_file = {frame.path: frame for frame in ordered}
    stored = {path: _stored_values(frame) for path, frame in one_of_each_file.items()}
    planes = [stored[frame.path][frame.index] for frame in ordered]
    if any(frame.rescale != NO_RESCALE for frame in ordered):
        rescaled = [plane * frame.rescale[0] + frame.rescale[1] for plane, frame in zip(planes, ordered, strict=True)]
        planes = [plane.astype(np.float32) for plane in rescaled]
    return np.stack(planes)


def _stored_values(frame: Frame) -> np.ndarray:
    """Return the stored values of a frame's file, shape [frames, Y, X]."""
    columns, rows = frame.size
    with naming_damage(frame.path), tempfile.TemporaryDirectory(prefix="prostate_seg_") as folder:
        path = frame.path
        if not frame.is_plain:  # a copy with the attributes of its pixels alone, compressed as they are
            path = Path(folder) / "pixels.dcm"
            source = pydicom.dcmread(frame.path, specific_tags=list(PIXEL_ATTRIBUTES), force=True)
            source.SOPClassUID = source.file_meta.MediaStorageSOPClassUID = pydicom.uid.EnhancedMRImageStorage
            if "TransferSyntaxUID" not in source.file_meta:  # stored without preamble and file meta information
                is_implicit, _ = source.original_encoding
                syntax = pydicom.uid.ImplicitVRLittleEndian if is_implicit else pydicom.uid.ExplicitVRLittleEndian
                source.file_meta.TransferSyntaxUID, source.preamble = syntax, bytes(128)
            source.save_as(path)
        stored = sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO="GDCMImageIO"))
        if stored.shape != (frame.num_frames, rows, columns):
            raise ValueError(f"{stored.shape} voxels instead of {(frame.num_frames, rows, columns)}")
        return stored
