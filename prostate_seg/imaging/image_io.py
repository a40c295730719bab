"""Reading and writing volumes.

Every volume is a [Z, Y, X] array whose axes run, as nearly as the scan allows, to the patient's left, posterior and superior
(LPS); it remembers how its file stored the axes, so that a mask written for it lies on the file's own grid. Spacings are
(z, y, x) in mm, world points (x, y, z) in mm. What cannot be one scalar volume is refused with a named check; whether the
voxels make sense is for `quality` to say.
"""

import math
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from prostate_seg.errors import InputError
from prostate_seg.files import atomic_path
from prostate_seg.imaging.geometry import Geometry, Volume

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # ITK's warnings would repeat on stderr what the errors here say

IMAGE_IO = {
    ".nii.gz": "NiftiImageIO",
    ".nii": "NiftiImageIO",
    ".nrrd": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
}
"""SimpleITK's reader for each suffix, longest suffix first; naming it makes upper-case suffixes work too."""

SINGLE_FILE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")
"""What can be written: .mhd needs a second file beside it, which no single rename can put in place."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a Git LFS pointer begins; it stands in a checkout for a file that was not downloaded."""

GZIP_MAGIC = b"\x1f\x8b"
"""First bytes of a gzip stream."""

ZLIB_OR_GZIP = 47
"""zlib's code for "either header", which MetaIO accepts too."""

META_HEADER_BYTES = 65536
"""Part of a MetaImage file in which the text header ends; headers are a few hundred bytes."""

MAX_REASON = 200
"""Characters of SimpleITK's own words that an error repeats."""

WORLD_AXES = ("LR", "PA", "SI")
"""Letters of the two directions along x, y and z, LPS first."""

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


class VolumeError(InputError):
    """A file or folder is not one usable volume; the caller adds its name and the case."""

    def __init__(self, message: str, check: str = "unreadable") -> None:
        super().__init__(message)
        self.check = check
        """Name of the check that refused it, such as missing_slice."""


def read_volume(path: Path) -> Volume:
    """Read an image file, or a folder that holds one DICOM series, and turn it to LPS.

    Args:
        path: A .mha, .mhd, .nii, .nii.gz or .nrrd file, or a folder of DICOM files.

    Returns:
        Array [Z, Y, X] in the file's dtype (float64 becomes float32), its grid and the file's axis code.

    Raises:
        VolumeError: If this is not one complete three-dimensional scalar volume; `check` names the reason.
    """
    image = _read_series(path) if path.is_dir() else _read_file(path)
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


def image_suffix(name: str) -> str | None:
    """Return the readable suffix that a file name ends with, in lower case, or None."""
    return next((suffix for suffix in IMAGE_IO if name.lower().endswith(suffix)), None)


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


def _read_file(path: Path) -> sitk.Image:
    _check_file(path)
    with _refusing_unreadable():
        reader = _reader(path, image_io=IMAGE_IO[image_suffix(path.name) or ""])
        _check_pixels(reader)
        _check_three_dimensional(reader.GetSize())
        _check_complete(path, reader)
        image = reader.Execute()
    return image[:, :, :, 0] if image.GetDimension() == 4 else image


def _reader(path: Path, *, image_io: str) -> sitk.ImageFileReader:
    """Return a reader that has read the header."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO(image_io)
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


@contextmanager
def _refusing_unreadable() -> Iterator[None]:
    """Turn SimpleITK's RuntimeError and zlib's errors into a `VolumeError` in few words."""
    try:
        yield
    except (RuntimeError, zlib.error) as error:
        raise VolumeError(
            "the file cannot be read: it is damaged, incomplete or not what its suffix says "
            f"({_reason(error)}); copy or export it again"
        ) from error


def _reason(error: Exception) -> str:
    """Return what SimpleITK says after its source lines, on one line and without memory addresses."""
    said = str(error).rpartition("ERROR: ")[2].partition("Reason:")[0]  # MetaIO's "Reason:" is a stale errno
    words = " ".join(re.sub(r"\(0x[0-9a-f]+\)", "", said).split())
    return words if len(words) <= MAX_REASON else words[:MAX_REASON] + " ..."


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
    _check_content(path)
    if suffix.startswith(".nii"):
        _check_nifti_name(path, suffix)


def _check_content(path: Path) -> None:
    """Refuse empty files and Git LFS pointers."""
    with path.open("rb") as stream:
        start = stream.read(len(LFS_POINTER))
    if not start:
        raise VolumeError("the file is empty (0 bytes); copy or export it again")
    if start == LFS_POINTER:
        raise VolumeError(
            "this is a Git LFS pointer, not the image itself; run `git lfs pull` (or `dvc pull`) where it came from",
            "lfs_pointer",
        )


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


def _check_pixels(reader: sitk.ImageFileReader) -> None:
    """Refuse complex numbers, vectors and colours."""
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if "complex" in kind:
        raise VolumeError(f"voxels must be real numbers, and these are {kind}; export the magnitude", "complex_pixels")
    if reader.GetNumberOfComponents() != 1:
        raise VolumeError(
            f"voxels must be single numbers, and these have {reader.GetNumberOfComponents()} components ({kind}); "
            "export one channel",
            "vector_pixels",
        )


def _check_three_dimensional(size_xyz: Sequence[int]) -> None:
    """Refuse single images and series of volumes; a fourth dimension of one is no harm."""
    if len(size_xyz) == 3 or (len(size_xyz) == 4 and size_xyz[3] == 1):
        return
    size = " x ".join(str(length) for length in size_xyz)
    raise VolumeError(
        f"a volume has three dimensions, and this has {len(size_xyz)} ({size} voxels); "
        "export one T2-weighted volume to a file",
        "not_3d",
    )


def _check_complete(path: Path, reader: sitk.ImageFileReader) -> None:
    """Refuse cut and damaged files that SimpleITK would read without a word.

    It fills what is missing of a NIfTI file with zeros, and of a compressed MetaImage with whatever was in memory; it
    checks no checksum in either. NRRD files and uncompressed MetaImages it checks itself.
    """
    io = reader.GetImageIO()
    if io == "NiftiImageIO":
        expected, stored = _nifti_bytes(reader), _nifti_stored_bytes(path)
    elif io == "MetaImageIO" and (payload := _meta_payload(path)) is not None:
        expected, stored = _voxel_bytes(reader), _inflated_bytes(payload)
    else:
        return
    if stored < expected:
        raise VolumeError(f"the file is incomplete: it has {stored} of {expected} bytes; copy or export it again")


def _nifti_bytes(reader: sitk.ImageFileReader) -> int:
    """Return the length that the header promises, header included."""
    sizes = [int(reader.GetMetaData(f"dim[{axis}]")) for axis in range(1, int(reader.GetMetaData("dim[0]")) + 1)]
    return int(float(reader.GetMetaData("vox_offset"))) + math.prod(sizes) * int(reader.GetMetaData("bitpix")) // 8


def _nifti_stored_bytes(path: Path) -> int:
    with path.open("rb") as stream:
        is_compressed = stream.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    return _inflated_bytes(path.read_bytes()) if is_compressed else path.stat().st_size


def _voxel_bytes(reader: sitk.ImageFileReader) -> int:
    voxel = sitk.Image([1, 1], reader.GetPixelID())
    return math.prod(reader.GetSize()) * voxel.GetSizeOfPixelComponent()


def _meta_payload(path: Path) -> bytes | None:
    """Return the compressed voxels of a MetaImage, or None if they are not compressed or in several files."""
    start = path.read_bytes() if image_suffix(path.name) == ".mha" else path.read_bytes()[:META_HEADER_BYTES]
    header = re.match(rb"(?s).*?^ElementDataFile *= *([^\r\n]*)\r?\n?", start[:META_HEADER_BYTES], re.MULTILINE)
    if header is None or not re.search(rb"(?im)^CompressedData *= *T", header.group()):
        return None
    if header.group(1).strip().upper() == b"LOCAL":
        return start[header.end() :]
    data = path.parent / header.group(1).decode(errors="replace").strip()
    return data.read_bytes() if data.is_file() else None


def _inflated_bytes(data: bytes) -> int:
    """Return the length of a zlib or gzip stream once inflated, with every checksum tested.

    Raises:
        VolumeError: If the stream breaks off.
        zlib.error: If it is damaged.
    """
    length = 0
    while True:
        stream = zlib.decompressobj(wbits=ZLIB_OR_GZIP)
        length += len(stream.decompress(data))
        if not stream.eof:
            raise VolumeError(
                f"the file is incomplete: its compressed data break off after {length} bytes; copy it again"
            )
        data = stream.unused_data
        if not data.startswith(GZIP_MAGIC):
            return length


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


def _read_series(folder: Path) -> sitk.Image:
    """Read the one DICOM series of a folder, its slices sorted by position."""
    slices = _slices_of(folder)
    if len(slices) == 1:
        return _read_single(slices[0])
    _check_one_series(slices)
    _check_parallel(slices)
    _check_same_pixels(slices)
    ordered = _ordered(slices)
    _check_positions(ordered)
    with _refusing_unreadable():
        image = _series_reader(ordered).Execute()
    return _placed(image, ordered)


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
        reader = _reader(path, image_io="GDCMImageIO")
    except RuntimeError as error:
        _check_not_dicom(path, error)
        return None
    _check_pixels(reader)
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
            f"{path.name} is a DICOM file that is damaged, incomplete or no image ({_reason(error)}); "
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
    with _refusing_unreadable():
        return _reader(only.path, image_io="GDCMImageIO").Execute()


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
