"""A mask as DICOM SEG lies on the very pixels of its series, for highdicom's reader and for pydicom's."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prostate_seg.errors import InputError, VolumeError
from prostate_seg.imaging.dicom_seg import write_dicom_seg
from prostate_seg.imaging.dicom_series import series_files
from prostate_seg.imaging.geometry import Volume
from prostate_seg.imaging.image_io import read_volume, stored_array

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")


@pytest.fixture
def series(shared_data: Path) -> Path:
    return shared_data / "dicom" / "11373_1001396"


def block_mask(series: Path) -> Volume:
    """Return a mask that is nowhere symmetric."""
    image = read_volume(series)
    array = np.zeros(image.array.shape, dtype=np.uint8)
    array[4:9, 100:150, 180:220] = 1
    array[8, 100:120, 180:260] = 1
    return replace(image, array=array)


def write(path: Path, mask: Volume, series: Path) -> None:
    write_dicom_seg(path, mask, series=series, model_name="prostate_seg version 3", model_md5="0123456789abcdef")


def test_frames_are_the_slices_of_the_files_that_they_refer_to(series: Path, tmp_path: Path) -> None:
    mask = block_mask(series)
    write(tmp_path / "mask.dcm", mask, series)
    seg = highdicom.seg.segread(tmp_path / "mask.dcm")
    files = series_files(series)
    uids = [pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID for file in files]
    frames = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True, combine_segments=True)
    np.testing.assert_array_equal(frames, stored_array(mask))
    assert seg.number_of_segments == 1
    assert seg.get_segment_description(1).segmented_property_type.meaning == "Prostate"


def test_object_lies_where_the_series_lies_in_the_world(series: Path, tmp_path: Path) -> None:
    mask = block_mask(series)
    write(tmp_path / "mask.dcm", mask, series)
    volume = highdicom.seg.segread(tmp_path / "mask.dcm").get_volume(combine_segments=True, rescale_fractional=False)
    there = np.argwhere(volume.array > 0)
    points = (volume.affine @ np.c_[there, np.ones(len(there))].T).T[:, :3]
    expected = mask.geometry.to_world(np.argwhere(mask.array))
    np.testing.assert_allclose(np.sort(points, axis=0), np.sort(expected, axis=0), atol=1e-3)


def test_pydicom_reads_it_as_a_segmentation_of_the_same_study_and_patient(series: Path, tmp_path: Path) -> None:
    write(tmp_path / "mask.dcm", block_mask(series), series)
    seg, source = pydicom.dcmread(tmp_path / "mask.dcm"), pydicom.dcmread(series_files(series)[0])
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


def test_a_series_without_what_the_object_must_repeat_is_refused_in_words(series: Path, tmp_path: Path) -> None:
    mask = block_mask(series)
    copy = tmp_path / "series"
    shutil.copytree(series, copy)
    for file in copy.iterdir():
        file.chmod(0o644)
        one = pydicom.dcmread(file)
        del one.FrameOfReferenceUID
        one.save_as(file)
    with pytest.raises(VolumeError, match="no DICOM SEG can be made"):
        write(tmp_path / "mask.dcm", mask, copy)
    assert not (tmp_path / "mask.dcm").exists()


def test_missing_package_is_named_with_the_way_to_get_it(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "highdicom.seg", None)
    with pytest.raises(InputError, match=r"pip install 'prostate-seg\[dicom\]'"):
        write(tmp_path / "mask.dcm", block_mask(series), series)
