"""DICOM SEG masks have the pixels and positions of their series, as read with highdicom and with pydicom."""

import copy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset

from prostate_seg.common.errors import InputError, VolumeError
from prostate_seg.imaging.dicom_seg import MAY_BE_EMPTY, write_dicom_seg
from prostate_seg.imaging.dicom_series import series_frames
from prostate_seg.imaging.geometry import Volume
from prostate_seg.imaging.image_io import as_stored, read_volume, write_volume
from prostate_seg.imaging.regions import Regions

highdicom = pytest.importorskip("highdicom")


@pytest.fixture
def series(shared_data: Path) -> Path:
    return shared_data / "dicom" / "11373_1001396"


def block_mask(series: Path) -> Volume:
    """Return a mask without symmetry."""
    image = read_volume(series)
    array = np.zeros(image.array.shape, dtype=np.uint8)
    array[4:9, 100:150, 180:220] = 1
    array[8, 100:120, 180:260] = 1
    return replace(image, array=array)


def write(path: Path, mask: Volume, series: Path, regions: Regions | None = None) -> None:
    write_dicom_seg(
        path,
        mask,
        regions=regions or {"whole_gland": None},
        series=series,
        model_name="prostate_seg version 3",
        model_md5="0123456789abcdef",
    )


def test_frames_are_the_slices_of_the_files_that_they_refer_to(series: Path, tmp_path: Path) -> None:
    mask = block_mask(series)
    write(tmp_path / "mask.dcm", mask, series)
    seg = highdicom.seg.segread(tmp_path / "mask.dcm")
    files = [frame.path for frame in series_frames(series)]
    uids = [pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID for file in files]
    frames = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True, combine_segments=True)
    np.testing.assert_array_equal(frames, as_stored(mask).array)
    assert seg.number_of_segments == 1
    assert seg.get_segment_description(1).segmented_property_type.meaning == "Prostate"


def test_zones_are_segments_with_codes_of_dicom(series: Path, tmp_path: Path) -> None:
    mask = block_mask(series)
    mask.array[:, :, 200:][mask.array[:, :, 200:] > 0] = 5
    mask.array[8, 100:110, 220:260] = 7
    regions: Regions = {"whole_gland": None, "peripheral_zone": (5,), "stroma": (7,), "transition_zone": (1,)}
    write(tmp_path / "mask.dcm", mask, series, regions)
    seg = highdicom.seg.segread(tmp_path / "mask.dcm")
    uids = [pydicom.dcmread(frame.path, stop_before_pixels=True).SOPInstanceUID for frame in series_frames(series)]
    frames = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    stored = as_stored(mask).array
    expected = np.stack([stored > 0, stored == 5, stored == 7, stored == 1], axis=-1)
    np.testing.assert_array_equal(frames, expected)
    found = [seg.get_segment_description(number) for number in (1, 2, 3, 4)]
    assert [one.segment_label for one in found] == [
        *("whole prostate gland", "peripheral zone", "stroma", "transition zone"),
    ]
    types = [one.segmented_property_type for one in found]
    assert [one.value for one in types] == ["41216001", "279706003", "41216001", "399384005"]
    assert {one.scheme_designator for one in types} == {"SCT"}


def test_object_has_the_world_position_of_the_series(series: Path, tmp_path: Path) -> None:
    mask = block_mask(series)
    write(tmp_path / "mask.dcm", mask, series)
    volume = highdicom.seg.segread(tmp_path / "mask.dcm").get_volume(combine_segments=True, rescale_fractional=False)
    there = np.argwhere(volume.array > 0)
    points = (volume.affine @ np.c_[there, np.ones(len(there))].T).T[:, :3]
    expected = mask.geometry.to_world(np.argwhere(mask.array))
    np.testing.assert_allclose(np.sort(points, axis=0), np.sort(expected, axis=0), atol=1e-3)


def test_pydicom_reads_it_as_a_segmentation_of_the_same_study_and_patient(series: Path, tmp_path: Path) -> None:
    write(tmp_path / "mask.dcm", block_mask(series), series)
    seg, source = pydicom.dcmread(tmp_path / "mask.dcm"), pydicom.dcmread(series_frames(series)[0].path)
    assert seg.SOPClassUID.name == "Segmentation Storage"
    for name in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert getattr(seg, name) == getattr(source, name)
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID
    assert seg.pixel_array.sum() == block_mask(series).array.sum()
    assert "prostate_seg version 3" in seg.ManufacturerModelName


def test_equal_masks_have_equal_uids_and_others_have_others(series: Path, tmp_path: Path) -> None:
    mask = block_mask(series)
    for name, array in {"a": mask.array, "b": mask.array, "c": np.roll(mask.array, 1, axis=0)}.items():
        write(tmp_path / f"{name}.dcm", replace(mask, array=array), series)
    a, b, c = (pydicom.dcmread(tmp_path / f"{name}.dcm").SOPInstanceUID for name in "abc")
    assert a == b != c


def test_an_empty_mask_can_be_written(series: Path, tmp_path: Path) -> None:
    mask = block_mask(series)
    write(tmp_path / "mask.dcm", replace(mask, array=np.zeros_like(mask.array)), series)
    assert pydicom.dcmread(tmp_path / "mask.dcm").pixel_array.sum() == 0


def test_a_series_without_required_attributes_is_refused_with_a_message(series: Path, tmp_path: Path) -> None:
    mask = block_mask(series)
    odd = tmp_path / "series"
    shutil.copytree(series, odd)
    for file in odd.iterdir():
        file.chmod(0o644)
        one = pydicom.dcmread(file)
        del one.FrameOfReferenceUID
        one.save_as(file)
    with pytest.raises(VolumeError, match="no DICOM SEG can be made"):
        write(tmp_path / "mask.dcm", mask, odd)
    assert not (tmp_path / "mask.dcm").exists()


def rewritten(series: Path, folder: Path, *, without: Sequence[str] = (), **values: object) -> Path:
    """Return a copy of a series without some attributes, and with others changed."""
    folder.mkdir(parents=True)
    for file in sorted(series.iterdir()):
        one = pydicom.dcmread(file)
        for keyword in without:
            if keyword in one:
                delattr(one, keyword)
        for keyword, value in values.items():
            setattr(one, keyword, value)
        one.save_as(folder / file.name)
    return folder


def test_attributes_that_the_series_may_lack_are_written_empty_and_it_needs_no_preamble(
    series: Path, tmp_path: Path
) -> None:
    bare = rewritten(series, tmp_path / "bare", without=MAY_BE_EMPTY)
    for file in bare.iterdir():
        one = pydicom.dcmread(file)
        one.preamble, one.file_meta = None, FileMetaDataset()
        one.save_as(file, implicit_vr=False, little_endian=True)
    write(tmp_path / "mask.dcm", block_mask(series), bare)
    seg = pydicom.dcmread(tmp_path / "mask.dcm")
    assert all(keyword in seg and not seg[keyword].value for keyword in MAY_BE_EMPTY)
    assert seg.pixel_array.sum() == block_mask(series).array.sum()


@pytest.mark.parametrize(
    ("without", "values", "words"),
    [
        (["SliceThickness"], {}, "its images have no SliceThickness; use the file of the mask"),
        (["StudyInstanceUID"], {}, "its images have no StudyInstanceUID"),
        ([], {"PatientSex": "W"}, "no DICOM SEG can be made for this series: .*PatientSex"),
        ([], {"SOPClassUID": "1.2.3"}, "no DICOM SEG can be made for this series"),
    ],
)
def test_errors_of_the_library_become_a_message_with_their_reason(
    series: Path, tmp_path: Path, without: list[str], values: dict[str, object], words: str
) -> None:
    odd = rewritten(series, tmp_path / "odd", without=without, **values)
    with pytest.raises(VolumeError, match=words):
        write(tmp_path / "mask.dcm", block_mask(series), odd)
    assert not (tmp_path / "mask.dcm").exists()


def enhanced(series: Path, folder: Path, *, order: Sequence[int]) -> Path:
    """Write the slices of a series as frames of one Enhanced MR file, in another order."""
    slices = [pydicom.dcmread(frame.path) for frame in series_frames(series)]
    made = copy.deepcopy(slices[0])
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    for keyword in ("PixelSpacing", "SliceThickness"):
        setattr(measures, keyword, made[keyword].value)
    orientation.ImageOrientationPatient = made.ImageOrientationPatient
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    frames = []
    for index in order:
        frame, position, content = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = slices[index].ImagePositionPatient
        content.DimensionIndexValues = [1, index + 1]
        frame.PlanePositionSequence, frame.FrameContentSequence = [position], [content]
        frames.append(frame)
    made.SharedFunctionalGroupsSequence, made.PerFrameFunctionalGroupsSequence = [shared], frames
    made.NumberOfFrames = len(frames)
    made.PixelData = b"".join(slices[index].PixelData for index in order)
    for keyword in ("PixelSpacing", "SliceThickness", "ImageOrientationPatient", "ImagePositionPatient"):
        delattr(made, keyword)
    folder.mkdir()
    made.save_as(folder / "IM0001.dcm")
    return folder


def test_object_of_an_enhanced_file_matches_its_frames_in_any_order(series: Path, tmp_path: Path) -> None:
    mask = block_mask(series)
    num_slices = len(mask.array)
    odd = enhanced(series, tmp_path / "enhanced", order=[*range(1, num_slices, 2), *range(0, num_slices, 2)])
    write(tmp_path / "mask.dcm", mask, odd)
    volume = highdicom.seg.segread(tmp_path / "mask.dcm").get_volume(combine_segments=True, rescale_fractional=False)
    there = np.argwhere(volume.array > 0)
    points = (volume.affine @ np.c_[there, np.ones(len(there))].T).T[:, :3]
    expected = mask.geometry.to_world(np.argwhere(mask.array))
    order = [np.lexsort(np.round(cloud, 1).T) for cloud in (points, expected)]
    np.testing.assert_allclose(points[order[0]], expected[order[1]], atol=1e-2)


def test_a_mask_that_is_read_back_from_its_file_gives_the_same_object(series: Path, tmp_path: Path) -> None:
    mask = block_mask(series)
    write_volume(tmp_path / "mask.nii.gz", mask)
    for name, one in {"direct": mask, "file": read_volume(tmp_path / "mask.nii.gz")}.items():
        write(tmp_path / f"{name}.dcm", one, series)
    direct, read = (pydicom.dcmread(tmp_path / f"{name}.dcm") for name in ("direct", "file"))
    assert direct.SOPInstanceUID == read.SOPInstanceUID
    assert direct.PixelData == read.PixelData


def test_missing_package_is_reported_with_the_install_command(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "highdicom.seg", None)
    with pytest.raises(InputError, match=r"pip install 'prostate-seg\[dicom\]'"):
        write(tmp_path / "mask.dcm", block_mask(series), series)
