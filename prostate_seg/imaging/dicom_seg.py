"""Writing a mask as a DICOM Segmentation object that refers to its series (DICOM PS3.3, A.51), with highdicom.

highdicom is the optional extra `dicom`. Arrays are [Z, Y, X] with the axes of the series, a frame per slice.
"""

import hashlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.sr.codedict import codes

import prostate_seg
from prostate_seg.common.errors import InputError, VolumeError
from prostate_seg.common.files import atomic_path
from prostate_seg.imaging.dicom_frames import Frame
from prostate_seg.imaging.dicom_series import series_frames
from prostate_seg.imaging.geometry import Volume
from prostate_seg.imaging.image_io import as_stored
from prostate_seg.imaging.regions import Regions, region_masks
from prostate_seg.imaging.settings import WHOLE_GLAND

SERIES_NUMBER = 900
"""High enough to be listed after the scanner's own series."""
MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime"),
)
"""Attributes of type 2 (PS3.3, C.7.1.1 and C.7.2.1) that the object repeats: an empty value is allowed where none is known."""
LABELS = {WHOLE_GLAND: "whole prostate gland"}
"""Label of a segment that is not the name of its region."""
CODES = {
    "peripheral_zone": codes.SCT.PeripheralZoneOfTheProstate,
    "transition_zone": codes.SCT.TransitionZoneOfTheProstate,
}
"""Codes of zones in SNOMED CT, from DICOM's context group CID 6300."""


def require_dicom_packages() -> None:
    """Raise InputError if highdicom, the optional extra, is not installed."""
    try:
        import highdicom.seg  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{error.name} is not installed, which DICOM SEG needs: pip install 'prostate-seg[dicom]', "
            "or predict.dicom_seg=false"
        ) from error


def write_dicom_seg(
    path: Path, mask: Volume, *, regions: Regions, series: Path, model_name: str, model_md5: str, note: str = ""
) -> None:
    """Write a binary segment per region that refers to the images of a series.

    Args:
        path: File to write; equal masks of equal series by one model get equal UIDs.
        mask: Labels on the grid of the series; may be empty.
        regions: Labels of each region, the whole gland first. Those without a code of DICOM have that of the prostate.
        series: Folder that the mask's image was read from.
        model_name: Written to the object.
        model_md5: Part of the UIDs.
        note: Description of the gland's segment, and part of the UIDs; empty for none.

    Raises:
        VolumeError: If the series lacks attributes that the object must repeat, or the object cannot be written.
    """
    require_dicom_packages()
    import highdicom

    logging.getLogger("highdicom").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="highdicom")  # names of patients are as the scanner wrote them
    with _refusing_series(), atomic_path(path) as temporary:
        frames, voxels = series_frames(series), as_stored(mask).array
        sources = _source_images(frames)
        if len(sources) == 1:  # highdicom takes the slices in the order of the frames
            voxels = voxels[np.argsort([frame.index for frame in frames])]
        # A Long String (LO) of the default repertoire has at most 64 characters of ASCII.
        short_name = model_name.encode("ascii", "replace").decode().replace("\\", "/")[-50:]
        segments = _segments(regions, algorithm=f"prostate_seg {short_name}", note=note)
        content = "whole prostate gland" if len(regions) == 1 else "prostate gland and its zones"
        voxels_sha256 = hashlib.sha256(voxels.tobytes()).hexdigest()
        unique = list(filter(None, [sources[0].SeriesInstanceUID, model_md5, voxels_sha256, note]))
        segmentation = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=np.moveaxis(region_masks(voxels, regions), 0, -1).astype("uint8"),
            segmentation_type="BINARY",
            segment_descriptions=segments,
            series_instance_uid=pydicom.uid.generate_uid(entropy_srcs=["series", *unique]),
            series_number=SERIES_NUMBER,
            sop_instance_uid=pydicom.uid.generate_uid(entropy_srcs=["instance", *unique]),
            instance_number=1,
            manufacturer="prostate_seg",
            manufacturer_model_name=short_name,
            software_versions=prostate_seg.__version__,
            device_serial_number=model_md5[:16],
            content_label="PROSTATE",
            content_description=f"{content}, by a network",
            series_description="prostate_seg whole gland" if len(regions) == 1 else "prostate_seg zones",
        )
        segmentation.save_as(temporary)


@contextmanager
def _refusing_series() -> Iterator[None]:
    """Turn the exceptions of pydicom and highdicom, of any class depending on the header, into a `VolumeError`."""
    try:
        yield
    except VolumeError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        absent = re.search(r"no attribute '([A-Z]\w+)'", text)
        reason = f"its images have no {absent.group(1)}" if absent else text
        raise VolumeError(
            f"no DICOM SEG can be made for this series: {reason}; use the file of the mask", "no_dicom_seg"
        ) from error


def _source_images(frames: Sequence[Frame]) -> Sequence[pydicom.Dataset]:
    """Read each file of a series, with empty values for the attributes that it may lack."""
    sources = [pydicom.dcmread(file, force=True) for file in dict.fromkeys(frame.path for frame in frames)]
    for source in sources:
        for keyword in MAY_BE_EMPTY:
            source.setdefault(keyword, "")
    return sources


def _segments(regions: Regions, *, algorithm: str, note: str) -> list[Any]:
    """Return highdicom's `SegmentDescription` of each region."""
    import highdicom

    identification = highdicom.AlgorithmIdentificationSequence(
        name=algorithm, family=codes.cid7162.ArtificialIntelligence, version=prostate_seg.__version__
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=LABELS.get(name, name.replace("_", " ")),
            segmented_property_category=codes.cid7150.AnatomicalStructure,
            segmented_property_type=CODES.get(name, codes.SCT.Prostate),
            algorithm_type="AUTOMATIC",
            algorithm_identification=identification,
        )
        for number, name in enumerate(regions, start=1)
    ]
    if note:
        segments[0].SegmentDescription = note  # (0062,0006), Short Text: at most 1024 characters
    return segments
