"""A mask as a DICOM Segmentation object beside the series that it was made from (DICOM PS3.3, A.51), through highdicom.

highdicom is the optional extra `dicom`. Arrays are [Z, Y, X] with the axes of the series: a frame per slice.
"""

import hashlib
import importlib
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

import prostate_seg
from prostate_seg.common.errors import InputError, VolumeError
from prostate_seg.common.files import atomic_path
from prostate_seg.imaging.dicom_series import series_frames
from prostate_seg.imaging.geometry import Volume
from prostate_seg.imaging.image_io import stored_array

SERIES_NUMBER = 900
"""High enough to stand behind the scanner's own series."""

MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)
"""Attributes of type 2 (PS3.3, C.7.1.1 and C.7.2.1) that the object repeats: an empty value is allowed where none is known."""


def require_dicom_packages() -> None:
    """Check that DICOM SEG can be written here.

    Raises:
        InputError: If a package is missing.
    """
    _import("highdicom")


def write_dicom_seg(path: Path, mask: Volume, *, series: Path, model_name: str, model_md5: str) -> None:
    """Write the whole gland as one binary segment that refers to the images of a series.

    Args:
        path: File to write; equal masks of equal series by one model get equal UIDs.
        mask: 0 or 1 on the grid of the series; may be empty.
        series: Folder that the mask's image was read from.
        model_name: Names the networks in the object.
        model_md5: Identifies them.

    Raises:
        VolumeError: If the series lacks attributes that the object must repeat, or the object cannot be written.
    """
    seg = _import("highdicom.seg")
    with _refusing_in_words(), atomic_path(path) as temporary:
        frames, voxels = series_frames(series), stored_array(mask)
        sources = [_with_empty_values(pydicom.dcmread(file)) for file in dict.fromkeys(file for file, _ in frames)]
        if len(sources) == 1:  # highdicom takes the slices in the order of the frames
            voxels = voxels[np.argsort([index for _, index in frames])]
        unique = [sources[0].SeriesInstanceUID, model_md5, hashlib.sha256(voxels.tobytes()).hexdigest()]
        made = seg.Segmentation(
            source_images=sources,
            pixel_array=voxels.astype("uint8"),
            segmentation_type="BINARY",
            segment_descriptions=[_whole_gland(seg, _short_text(model_name))],
            series_instance_uid=pydicom.uid.generate_uid(entropy_srcs=["series", *unique]),
            series_number=SERIES_NUMBER,
            sop_instance_uid=pydicom.uid.generate_uid(entropy_srcs=["instance", *unique]),
            instance_number=1,
            manufacturer="prostate_seg",
            manufacturer_model_name=_short_text(model_name),
            software_versions=prostate_seg.__version__,
            device_serial_number=model_md5[:16],
            content_label="PROSTATE",
            content_description="whole prostate gland, by a network",
            series_description="prostate_seg whole gland",
        )
        made.save_as(temporary)


def _short_text(text: str) -> str:
    """Return what a Long String (LO) of the default repertoire can hold."""
    return text.encode("ascii", "replace").decode().replace("\\", "/")[-50:]


def _whole_gland(seg: ModuleType, model_name: str) -> object:
    """Return the segment: the prostate, outlined automatically by machine learning."""
    highdicom = _import("highdicom")
    return seg.SegmentDescription(
        segment_number=1,
        segment_label="whole prostate gland",
        segmented_property_category=codes.cid7150.AnatomicalStructure,
        segmented_property_type=codes.SCT.Prostate,
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=f"prostate_seg {model_name}",
            family=codes.cid7162.ArtificialIntelligence,
            version=prostate_seg.__version__,
        ),
    )


def _with_empty_values(source: Dataset) -> Dataset:
    for keyword in MAY_BE_EMPTY:
        if keyword not in source:
            setattr(source, keyword, "")
    return source


@contextmanager
def _refusing_in_words() -> Iterator[None]:
    """Turn whatever pydicom and highdicom raise about a series into a `VolumeError`."""
    logging.getLogger("highdicom").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="highdicom")  # names of patients are as the scanner wrote them
    try:
        yield
    except VolumeError:
        raise
    except Exception as error:  # of any kind, by the header that was met
        said = " ".join(str(error).split()) or type(error).__name__
        absent = re.search(r"no attribute '([A-Z]\w+)'", said)
        reason = f"its images have no {absent.group(1)}" if absent else said
        raise VolumeError(
            f"no DICOM SEG can be made for this series: {reason}; use the file of the mask", "no_dicom_seg"
        ) from error


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{name} is not installed, which DICOM SEG needs: pip install 'prostate-seg[dicom]', "
            "or predict.dicom_seg=false"
        ) from error
