"""Small MR series written with pydicom, as classic or Enhanced (multi-frame) files; every attribute can be changed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

Edit = Callable[[int, Dataset], None]
"""Changes the dataset of one slice or the functional groups of one frame, by its number."""


def tilted(about_x: float = 0.3, about_z: float = 0.1) -> np.ndarray:
    """Return a rotation whose columns are the directions of x, y and z."""
    cos_x, sin_x, cos_z, sin_z = np.cos(about_x), np.sin(about_x), np.cos(about_z), np.sin(about_z)
    return np.array([[1, 0, 0], [0, cos_x, -sin_x], [0, sin_x, cos_x]]) @ np.array(
        [[cos_z, -sin_z, 0], [sin_z, cos_z, 0], [0, 0, 1]]
    )


@dataclass(kw_only=True)
class Stack:
    """Voxels on an oblique grid with edges of different lengths."""

    voxels: np.ndarray = field(
        default_factory=lambda: np.random.default_rng(0).integers(0, 900, (6, 5, 4)).astype("<u2")
    )
    """Shape [Z, Y, X]."""
    spacing_mm: tuple[float, float, float] = (3.0, 0.75, 0.5)
    axes: np.ndarray = field(default_factory=tilted)
    origin_mm: tuple[float, float, float] = (-40.0, -45.5, 12.25)

    def position_mm(self, z: int) -> list[float]:
        """Return Image Position (Patient) of a slice."""
        return [round(float(value), 9) for value in np.array(self.origin_mm) + self.axes[:, 2] * self.spacing_mm[0] * z]

    @property
    def orientation(self) -> list[float]:
        """Return Image Orientation (Patient)."""
        return [round(float(value), 12) for value in (*self.axes[:, 0], *self.axes[:, 1])]

    @property
    def pixel_spacing_mm(self) -> list[float]:
        """Return Pixel Spacing: between rows, then between columns."""
        return list(self.spacing_mm[1:])


def write_classic(folder: Path, stack: Stack, *, edit: Edit | None = None, name: str = "{:03d}.dcm") -> Path:
    """Write a file per slice and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for z, plane in enumerate(stack.voxels):
        one = _image(MRImageStorage, plane, instance=z)
        one.ImagePositionPatient, one.ImageOrientationPatient = stack.position_mm(z), stack.orientation
        one.PixelSpacing = stack.pixel_spacing_mm
        if edit is not None:
            edit(z, one)
        one.save_as(folder / name.format(z), enforce_file_format=True)
    return folder


def write_enhanced(
    folder: Path,
    stack: Stack,
    *,
    order: Sequence[int] | None = None,
    shared: Sequence[str] = ("PixelMeasuresSequence", "PlaneOrientationSequence"),
    edit: Edit | None = None,
    edit_file: Callable[[Dataset], None] | None = None,
    name: str = "IM0001.dcm",
) -> Path:
    """Write one file and return its folder.

    Args:
        folder: Created if it does not exist.
        stack: Voxels and geometry of the frames.
        order: Slice of each frame; as in the stack if None.
        shared: Functional groups that all frames share; `edit` gets the others only.
        edit: Changes the functional groups of a frame, by the number of its slice.
        edit_file: Changes the file last.
        name: Of the file.
    """
    order = range(len(stack.voxels)) if order is None else order
    one = _image(EnhancedMRImageStorage, stack.voxels[list(order)], instance=0)
    one.NumberOfFrames = len(order)
    common: Dataset = Dataset()
    frames = []
    for z in order:
        groups = Dataset()
        groups.PlanePositionSequence = [_with("ImagePositionPatient", stack.position_mm(z))]
        groups.PlaneOrientationSequence = [_with("ImageOrientationPatient", stack.orientation)]
        groups.PixelMeasuresSequence = [_with("PixelSpacing", stack.pixel_spacing_mm)]
        for keyword in shared:
            setattr(common, keyword, getattr(groups, keyword))
            delattr(groups, keyword)
        if edit is not None:
            edit(z, groups)
        frames.append(groups)
    one.SharedFunctionalGroupsSequence, one.PerFrameFunctionalGroupsSequence = [common], frames
    if edit_file is not None:
        edit_file(one)
    folder.mkdir(parents=True, exist_ok=True)
    one.save_as(folder / name, enforce_file_format=True)
    return folder


def with_rescale(groups: Dataset, *, slope: float, intercept: float = 0.0) -> None:
    """Add a rescale to the functional groups of a frame, or to the shared ones."""
    item = _with("RescaleSlope", slope)
    item.RescaleIntercept, item.RescaleType = intercept, "US"
    groups.PixelValueTransformationSequence = [item]


def write_report(path: Path, sop_class: str) -> None:
    """Write an object of the series without pixels."""
    _base(sop_class, instance=99).save_as(path, enforce_file_format=True)


def _with(keyword: str, value: object) -> Dataset:
    item = Dataset()
    setattr(item, keyword, value)
    return item


def _base(sop_class: str, *, instance: int) -> Dataset:
    one = Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = sop_class
    uid = generate_uid(entropy_srcs=[sop_class, str(instance)])
    one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = uid
    one.PatientID, one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = (
        "P1",
        "1.2.3",
        "1.2.3.1",
        "1.2.4",
    )
    one.Modality = "MR"
    return one


def _image(sop_class: str, pixels: np.ndarray, *, instance: int) -> Dataset:
    one = _base(sop_class, instance=instance)
    one.Rows, one.Columns = pixels.shape[-2:]
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    bits = 8 * pixels.itemsize
    one.BitsAllocated, one.BitsStored, one.HighBit = bits, bits, bits - 1
    one.PixelRepresentation = int(np.issubdtype(pixels.dtype, np.signedinteger))
    one.PixelData = pixels.tobytes()
    return one
