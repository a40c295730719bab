"""DICOM series of classic and of Enhanced (multi-frame) files: equal volumes, and a named check for every refusal."""

import gzip
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from prostate_seg.common.errors import VolumeError
from prostate_seg.imaging.dicom_series import series_frames
from prostate_seg.imaging.geometry import Volume
from prostate_seg.imaging.image_io import as_stored, content_md5, read_volume
from prostate_seg.imaging.sitk_reader import without_itk_warnings
from tests.dicom_helpers import Edit, Stack, tilted, with_rescale, write_classic, write_enhanced, write_report

STACK = Stack()
LARGER = Stack(voxels=np.random.default_rng(0).integers(0, 900, (6, 50, 40)).astype("<u2"))
"""GDCM's codecs fail on slices of a few pixels."""
SAGITTAL = [0.0, 1.0, 0.0, 0.0, 0.0, -1.0]
KINDS: list[Callable[..., Path]] = [write_classic, write_enhanced]


def refusal(folder: Path) -> VolumeError:
    with pytest.raises(VolumeError) as caught:
        read_volume(folder)
    return caught.value


def assert_same_volume(actual: Volume, expected: Volume) -> None:
    np.testing.assert_array_equal(actual.array, expected.array)
    for name in ("spacing_mm", "origin_mm", "direction"):
        np.testing.assert_allclose(getattr(actual.geometry, name), getattr(expected.geometry, name), atol=1e-6)


def of_plane(keyword: str, value: object) -> Callable[[str], Edit]:
    """Return, for a classic file and for a frame, an edit of an attribute of position or scale; None deletes it."""
    sequence = {
        "PixelSpacing": "PixelMeasuresSequence",
        "ImageOrientationPatient": "PlaneOrientationSequence",
        "ImagePositionPatient": "PlanePositionSequence",
    }[keyword]

    def edit_for(kind: str) -> Edit:
        def edit(_: int, one: Dataset) -> None:
            holder = one if kind == "write_classic" else one[sequence].value[0]
            if value is None:
                delattr(holder, keyword)
            else:
                setattr(holder, keyword, value)

        return edit

    return edit_for


def write_with(
    write: Callable[..., Path], folder: Path, *, only: int | None = None, stack: Stack = STACK, **values: object
) -> Path:
    """Write the stack with an attribute changed in all slices, or in one; frames hold all their attributes themselves."""
    ((keyword, value),) = values.items()
    edit = of_plane(keyword, value)(write.__name__)
    settings = {"shared": ()} if write is write_enhanced else {}
    return write(folder, stack, edit=lambda z, one: edit(z, one) if only in (None, z) else None, **settings)


class TestFrames:
    @pytest.mark.parametrize("seed", range(6))
    def test_frames_in_any_order_and_tilt_are_the_volume_of_the_classic_series(self, tmp_path: Path, seed: int) -> None:
        rng = np.random.default_rng(seed)
        voxels = rng.integers(0, 900, rng.integers(3, 9, 3)).astype("<u2")
        stack = Stack(
            voxels=voxels,
            spacing_mm=tuple(rng.uniform(0.3, 4, 3).round(3)),
            axes=np.linalg.qr(rng.normal(size=(3, 3)))[0] if seed % 2 else tilted(*rng.uniform(-1, 1, 2)),
        )
        stack.axes[:, 2] = np.cross(stack.axes[:, 0], stack.axes[:, 1])
        order = rng.permutation(len(voxels)).tolist()
        all_groups = ("PixelMeasuresSequence", "PlaneOrientationSequence")
        enhanced = read_volume(write_enhanced(tmp_path / "e", stack, order=order, shared=all_groups[: seed % 3]))
        classic = read_volume(write_classic(tmp_path / "c", stack))
        assert_same_volume(enhanced, classic)
        np.testing.assert_array_equal(as_stored(classic).array, voxels)
        np.testing.assert_allclose(classic.geometry.to_world(_stored_origin(classic)), stack.origin_mm, atol=1e-4)

    def test_series_frames_name_the_frame_of_each_slice(self, tmp_path: Path) -> None:
        folder = write_enhanced(tmp_path, STACK, order=[4, 2, 0, 5, 3, 1])
        assert [frame.index for frame in series_frames(folder)] == [2, 5, 1, 4, 0, 3]
        assert {frame.path for frame in series_frames(folder)} == {folder / "IM0001.dcm"}

    def test_md5_of_a_folder_depends_on_its_slices_and_not_on_hidden_files(self, tmp_path: Path) -> None:
        before = content_md5(write_classic(tmp_path, STACK))
        (tmp_path / ".DS_Store").write_bytes(b"the folder was opened")
        assert content_md5(tmp_path) == before
        (tmp_path / "000.dcm").write_bytes(b"another slice")
        assert content_md5(tmp_path) != before

    def test_a_folder_of_enhanced_files_of_one_frame_each_is_one_volume(self, tmp_path: Path) -> None:
        for z in range(6):
            write_enhanced(tmp_path / "e", STACK, order=[z], name=f"{5 - z}.dcm", edit_file=_uid(z))
        assert_same_volume(read_volume(tmp_path / "e"), read_volume(write_classic(tmp_path / "c", STACK)))
        assert [frame.path.name for frame in series_frames(tmp_path / "e")] == [f"{5 - z}.dcm" for z in range(6)]

    def test_each_frame_has_its_own_slope_and_intercept(self, tmp_path: Path) -> None:
        def rescale(z: int, frame: Dataset) -> None:
            with_rescale(frame, slope=1.5 + z, intercept=-10.0 * z)

        volume = read_volume(write_enhanced(tmp_path, STACK, order=[5, 4, 3, 2, 1, 0], edit=rescale))
        expected = [plane * (1.5 + z) - 10 * z for z, plane in enumerate(STACK.voxels)]
        np.testing.assert_allclose(as_stored(volume).array, expected, rtol=1e-6)
        assert volume.array.dtype == np.float32

    def test_a_shared_slope_is_applied_once(self, tmp_path: Path) -> None:
        def rescale(file: Dataset) -> None:
            with_rescale(file.SharedFunctionalGroupsSequence[0], slope=3, intercept=5)

        volume = read_volume(write_enhanced(tmp_path, STACK, edit_file=rescale))
        np.testing.assert_array_equal(as_stored(volume).array, 3.0 * STACK.voxels + 5)

    def test_a_slope_of_the_enhanced_file_itself_is_applied_once(self, tmp_path: Path) -> None:
        def rescale(file: Dataset) -> None:
            file.RescaleSlope, file.RescaleIntercept = 2, 1

        volume = read_volume(write_enhanced(tmp_path, STACK, edit_file=rescale))
        np.testing.assert_array_equal(as_stored(volume).array, 2.0 * STACK.voxels + 1)

    @pytest.mark.parametrize("write", KINDS)
    def test_real_world_value_mapping_is_not_applied(self, tmp_path: Path, write: Callable[..., Path]) -> None:
        def real_world(_: int, one: Dataset) -> None:
            item = Dataset()
            item.RealWorldValueSlope, item.RealWorldValueIntercept = 7.0, 3.0
            one.RealWorldValueMappingSequence = [item]

        np.testing.assert_array_equal(
            as_stored(read_volume(write(tmp_path, STACK, edit=real_world))).array, STACK.voxels
        )

    def test_classic_slices_have_their_own_slope(self, tmp_path: Path) -> None:
        def rescale(z: int, one: Dataset) -> None:
            one.RescaleSlope, one.RescaleIntercept = 1 + z, -z

        volume = read_volume(write_classic(tmp_path, STACK, edit=rescale))
        np.testing.assert_array_equal(
            as_stored(volume).array, [(1.0 + z) * plane - z for z, plane in enumerate(STACK.voxels)]
        )

    @pytest.mark.parametrize("implicit_vr", [True, False])
    def test_slices_without_preamble_have_their_slope(self, tmp_path: Path, implicit_vr: bool) -> None:
        folder = write_classic(tmp_path, STACK, edit=lambda _, one: setattr(one, "RescaleSlope", 2))
        for path in folder.iterdir():
            one = pydicom.dcmread(path)
            one.preamble, one.file_meta = None, FileMetaDataset()
            one.save_as(path, implicit_vr=implicit_vr, little_endian=True)
        np.testing.assert_array_equal(as_stored(read_volume(folder)).array, 2.0 * STACK.voxels)

    @pytest.mark.parametrize("slope", ["0", "1,5", "nan"])
    def test_a_slope_that_is_not_a_number_or_zero_is_refused(self, tmp_path: Path, slope: str) -> None:
        folder = write_classic(tmp_path, STACK, edit=lambda _, one: setattr(one, "RescaleSlope", "9.25"))
        for path in folder.iterdir():
            path.write_bytes(path.read_bytes().replace(b"9.25", slope.ljust(4).encode()))
        assert "Rescale Slope (0028,1053) must be a number" in str(refusal(folder))
        assert f"is {slope};" in str(refusal(folder))

    def test_pixel_spacing_is_between_rows_and_then_between_columns(self, tmp_path: Path) -> None:
        for write in KINDS:
            volume = read_volume(write(tmp_path / write.__name__, replace(STACK, axes=np.eye(3))))
            np.testing.assert_allclose(volume.geometry.spacing_mm, (3.0, 0.75, 0.5))

    @pytest.mark.parametrize("write", KINDS)
    def test_directions_of_two_decimals_are_read_as_the_nearest_axes(
        self, tmp_path: Path, write: Callable[..., Path]
    ) -> None:
        stack = replace(STACK, axes=tilted(about_x=0.31, about_z=0.0))
        rounded = [round(value, 2) for value in stack.orientation]
        place = "ImageOrientationPatient"
        volume = read_volume(write_with(write, tmp_path, stack=stack, **{place: rounded}))
        axes = np.array(volume.geometry.direction).reshape(3, 3)
        np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
        np.testing.assert_allclose(axes, stack.axes, atol=0.01)


class TestEncodings:
    def test_compressed_frames_are_those_that_were_compressed(self, tmp_path: Path) -> None:
        for compressor in ("JPEG", "JPEG2000"):  # both lossless
            edit = _compressed(tmp_path / f"{compressor}.dcm", LARGER.voxels, compressor)
            folder = write_enhanced(tmp_path / compressor, LARGER, edit_file=edit)
            np.testing.assert_array_equal(as_stored(read_volume(folder)).array, LARGER.voxels)

    @pytest.mark.parametrize("write", KINDS)
    def test_slices_may_be_encoded_in_different_ways(self, tmp_path: Path, write: Callable[..., Path]) -> None:
        def encode(z: int, one: Dataset) -> None:
            if z % 3 == 0:
                one.compress(RLELossless)
            elif z % 3 == 1:
                one.file_meta.TransferSyntaxUID = (ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian)[z // 3]

        if write is write_classic:
            write_classic(tmp_path, LARGER, edit=encode)
        else:
            for z in range(6):
                write_enhanced(tmp_path, LARGER, order=[z], name=f"{z}", edit_file=lambda one, z=z: encode(z, one))
        np.testing.assert_array_equal(as_stored(read_volume(tmp_path)).array, LARGER.voxels)

    def test_signed_and_unsigned_slices_keep_their_values(self, tmp_path: Path) -> None:
        voxels = STACK.voxels.astype(np.int32)
        voxels[::2] = 65535 - voxels[::2]

        def signed(z: int, one: Dataset) -> None:
            one.PixelRepresentation = z % 2
            one.PixelData = voxels[z].astype("<i2" if z % 2 else "<u2").tobytes()

        np.testing.assert_array_equal(as_stored(read_volume(write_classic(tmp_path, STACK, edit=signed))).array, voxels)


class TestFramesRefused:
    def test_a_missing_frame(self, tmp_path: Path) -> None:
        error = refusal(write_enhanced(tmp_path, STACK, order=[0, 1, 2, 4, 5]))
        assert error.check == "missing_slice"
        assert "slices 3 and 4 of 5 (IM0001.dcm frame 3 and IM0001.dcm frame 4," in str(error)

    def test_two_frames_at_each_position(self, tmp_path: Path) -> None:
        error = refusal(write_enhanced(tmp_path, STACK, order=[0, 1, 2, 3, 4, 5] * 2))
        assert error.check == "several_volumes"
        assert "12 frames at 6 positions: not one volume" in str(error)

    def test_several_files_of_many_frames(self, tmp_path: Path) -> None:
        write_enhanced(tmp_path, STACK, edit_file=_uid(1))
        write_enhanced(tmp_path, replace(STACK, voxels=STACK.voxels + 1), edit_file=_uid(2), name="IM0002.dcm")
        assert refusal(tmp_path).check == "several_volumes"

    def test_frames_in_several_orientations(self, tmp_path: Path) -> None:
        error = refusal(write_with(write_enhanced, tmp_path, only=2, ImageOrientationPatient=SAGITTAL))
        assert error.check == "mixed_orientations"
        assert "6 frames in 2 orientations" in str(error)
        assert "1 sagittal" in str(error)

    def test_sheared_frames(self, tmp_path: Path) -> None:
        def lean(z: int, frame: Dataset) -> None:
            frame.PlanePositionSequence[0].ImagePositionPatient = [0.0, 0.4 * z, 3.0 * z]

        assert refusal(write_enhanced(tmp_path, replace(STACK, axes=np.eye(3)), edit=lean)).check == "sheared_series"

    def test_frames_of_different_pixel_spacing(self, tmp_path: Path) -> None:
        error = refusal(write_with(write_enhanced, tmp_path, only=3, PixelSpacing=[0.75, 0.6]))
        assert error.check == "mixed_pixels"
        assert "IM0001.dcm frame 4 4 columns x 5 rows, 0.6 x 0.75 mm" in str(error)

    def test_more_or_fewer_descriptions_than_frames(self, tmp_path: Path) -> None:
        error = refusal(write_enhanced(tmp_path, STACK, edit_file=lambda one: setattr(one, "NumberOfFrames", 5)))
        assert "Number of Frames (0028,0008) is 5" in str(error)
        assert "describes 6 frames" in str(error)

    def test_frames_without_functional_groups_have_no_positions(self, tmp_path: Path) -> None:
        def legacy(one: Dataset) -> None:
            del one.SharedFunctionalGroupsSequence, one.PerFrameFunctionalGroupsSequence
            one.PixelSpacing, one.SpacingBetweenSlices = STACK.pixel_spacing_mm, 3
            one.ImageOrientationPatient, one.ImagePositionPatient = STACK.orientation, STACK.position_mm(0)

        error = refusal(write_enhanced(tmp_path, STACK, edit_file=legacy))
        assert error.check == "no_position"
        assert "6 of 6 DICOM frames have no Image Position (Patient) (0020,0032)" in str(error)


@pytest.mark.parametrize("write", KINDS)
class TestSlicePosition:
    @pytest.mark.parametrize(
        ("value", "found"), [([0.0, 0.5], "is 0.0\\0.5"), ([-0.5, 0.5], "is -0.5\\0.5"), ([0.5], "is 0.5;")]
    )
    def test_a_spacing_that_is_not_a_length_is_refused(
        self, tmp_path: Path, write: Callable[..., Path], value: list[float], found: str
    ) -> None:
        error = refusal(write_with(write, tmp_path, PixelSpacing=value))
        assert error.check == "no_spacing"
        assert "Pixel Spacing (0028,0030) must be two" in str(error) or "must be 2 numbers" in str(error)
        assert found in str(error)

    @pytest.mark.parametrize("text", ["0,5\\0,5", "inf\\0.5", "nan\\nan", "half\\0.5", "1_0\\1_0"])
    def test_a_spacing_that_cannot_be_read_is_refused(
        self, tmp_path: Path, write: Callable[..., Path], text: str
    ) -> None:
        written = text.ljust(10)
        folder = write_with(write, tmp_path, PixelSpacing=[0.125, 0.25])
        for path in folder.iterdir():
            path.write_bytes(path.read_bytes().replace(b"0.125\\0.25", written.encode()))
        error = refusal(folder)
        assert error.check == "no_spacing"
        assert (
            f"Pixel Spacing (0028,0030) must be 2 numbers with decimal points, separated by \\, and is {text};"
            in str(error)
        )

    @pytest.mark.parametrize("keyword", [None, "ImagerPixelSpacing", "NominalScannedPixelSpacing"])
    def test_an_absent_spacing_is_refused_even_beside_the_detectors(
        self, tmp_path: Path, write: Callable[..., Path], keyword: str | None
    ) -> None:
        folder = write_with(write, tmp_path, PixelSpacing=None)
        for path in folder.iterdir() if keyword else []:
            one = pydicom.dcmread(path)
            setattr(one, keyword or "", [0.5, 0.5])
            one.save_as(path)
        error = refusal(folder)
        assert error.check == "no_spacing"
        assert "Pixel Spacing (0028,0030) is absent" in str(error)
        assert ("is the detector's" in str(error)) == (keyword is not None)

    def test_an_absent_orientation_is_refused(self, tmp_path: Path, write: Callable[..., Path]) -> None:
        error = refusal(write_with(write, tmp_path, ImageOrientationPatient=None))
        assert error.check == "no_orientation"
        assert "Image Orientation (Patient) (0020,0037) is absent" in str(error)

    @pytest.mark.parametrize("value", [[0.0] * 6, [1, 0, 0, 0, 1], [1, 0, 0, 0, 2, 0], [1, 0, 0, 0.6, 0.8, 0]])
    def test_directions_that_are_not_axes_are_refused(
        self, tmp_path: Path, write: Callable[..., Path], value: list[float]
    ) -> None:
        error = refusal(write_with(write, tmp_path, only=2, ImageOrientationPatient=value))
        assert error.check == "no_orientation"
        assert "Image Orientation (Patient) (0020,0037) must be" in str(error)

    @pytest.mark.parametrize("only", [None, 0, 4])
    def test_absent_positions_are_refused(self, tmp_path: Path, write: Callable[..., Path], only: int | None) -> None:
        error = refusal(write_with(write, tmp_path, only=only, ImagePositionPatient=None))
        assert error.check == "no_position"
        assert f"{6 if only is None else 1} of 6 DICOM" in str(error)

    def test_a_position_of_two_numbers_is_refused(self, tmp_path: Path, write: Callable[..., Path]) -> None:
        error = refusal(write_with(write, tmp_path, only=1, ImagePositionPatient=[1.0, 2.0]))
        assert error.check == "no_position"
        assert "Image Position (Patient) (0020,0032) must be 3 numbers" in str(error)


class TestOtherFiles:
    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("006.dcm", b"", "empty (0 bytes)"),
            ("006", b"", "empty (0 bytes)"),
            ("006.dcm", b"<html>502 Bad Gateway</html>", "is a web page or XML"),
            ("006.DCM", b'\n<?xml version="1.0"?><Error/>', "is a web page or XML"),
            ("006.dcm", b'{"error": 404}', "is JSON"),
            ("006.dcm.gz", gzip.compress(b"x", mtime=0), "is compressed by gzip"),
            ("006.dcm", gzip.compress(b"x", mtime=0), "is compressed by gzip"),
            ("006.ima", b"PK\x03\x04rest", "is a zip archive"),
            ("006.dcm", b"\x89PNG\r\n", "is a PNG picture"),
            ("006.dcm", b"\xff\xd8\xff\xe0", "is a JPEG picture"),
            ("006.dcm", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
            ("006.dcm.part", b"\x01\x02", "is not DICOM"),
            ("1.2.840.6", bytes(1000), "is not DICOM"),
            ("006.dcm", bytes(128) + b"DICM", "absent"),
        ],
    )
    def test_an_unreadable_file_named_like_a_slice_is_refused(
        self, tmp_path: Path, name: str, content: bytes, words: str
    ) -> None:
        write_classic(tmp_path, STACK)
        (tmp_path / name).write_bytes(content)
        error = str(refusal(tmp_path))
        assert name in error
        assert words in error

    def test_a_link_to_an_absent_file_is_refused(self, tmp_path: Path) -> None:
        write_classic(tmp_path, STACK)
        (tmp_path / "006.dcm").symlink_to(tmp_path / "annex" / "object")
        assert "006.dcm is a link to a file that is absent" in str(refusal(tmp_path))

    def test_reports_pictures_and_system_files_are_ignored(self, tmp_path: Path) -> None:
        write_classic(tmp_path, STACK, name="IM{:03d}")
        for name in (
            ".DS_Store",
            "._IM001",
            "Thumbs.db",
            "desktop.ini",
            "DICOMDIR",
            "README",
            "report.PDF",
            "notes.txt",
        ):
            (tmp_path / name).write_bytes(b"\0\1\2\3 no slice")
        (tmp_path / "series.json").write_text(json.dumps({"EchoTime": 0.1}))
        (tmp_path / "t2.nii.gz").write_bytes(gzip.compress(b"converted"))
        assert read_volume(tmp_path).geometry.shape_vox == (6, 5, 4)

    @pytest.mark.parametrize(
        "sop_class",
        [
            "1.2.840.10008.5.1.4.1.1.88.33",
            "1.2.840.10008.5.1.4.1.1.11.1",
            "1.2.840.10008.5.1.4.1.1.66",
            "1.3.12.2.1107.5.9.1",
        ],
    )
    def test_reports_presentation_states_and_raw_data_are_ignored(self, tmp_path: Path, sop_class: str) -> None:
        write_report(write_classic(tmp_path, STACK) / "099.dcm", sop_class)
        assert read_volume(tmp_path).geometry.shape_vox == (6, 5, 4)

    def test_an_image_without_pixels_is_refused(self, tmp_path: Path) -> None:
        write_classic(tmp_path, STACK, edit=lambda z, one: delattr(one, "PixelData") if z == 3 else None)
        assert "003.dcm: Pixel Data (7FE0,0010) is absent" in str(refusal(tmp_path))

    @pytest.mark.parametrize("write", KINDS)
    def test_fewer_pixels_than_declared_are_refused(self, tmp_path: Path, write: Callable[..., Path]) -> None:
        folder = write(tmp_path, STACK)
        path = sorted(folder.iterdir())[-1]
        whole = path.read_bytes()
        for removed in (1, 30):
            path.write_bytes(whole[:-removed])
            assert f"{path.name} is incomplete: it has" in str(refusal(folder))

    def test_too_short_pixel_data_are_refused(self, tmp_path: Path) -> None:
        write_classic(tmp_path, STACK, edit=lambda z, one: setattr(one, "PixelData", bytes(30)) if z == 3 else None)
        assert "003.dcm is incomplete: it has 30 of 40 bytes of pixels" in str(refusal(tmp_path))

    @pytest.mark.filterwarnings("ignore:End of file reached")
    def test_a_truncated_compressed_file_is_refused(self, tmp_path: Path) -> None:
        folder = write_enhanced(tmp_path, LARGER, edit_file=lambda one: one.compress(RLELossless))
        assert read_volume(folder).geometry.shape_vox == (6, 50, 40)
        path = folder / "IM0001.dcm"
        path.write_bytes(path.read_bytes()[:-40])
        assert "IM0001.dcm is a DICOM file that is damaged, incomplete" in str(refusal(folder))


class TestCopies:
    @pytest.mark.parametrize("write", KINDS)
    def test_a_duplicated_series_is_refused(self, tmp_path: Path, write: Callable[..., Path]) -> None:
        folder = write(tmp_path, STACK)
        for path in list(folder.iterdir()):
            shutil.copy(path, path.with_name(f"{path.stem} (1).dcm"))
        error = refusal(folder)
        assert error.check == "identical_files"
        assert "at 6 positions: identical copies, such as" in str(error)
        assert "delete one set" in str(error)

    def test_a_duplicated_file_is_refused(self, tmp_path: Path) -> None:
        write_classic(tmp_path, STACK)
        shutil.copy(tmp_path / "003.dcm", tmp_path / "003 (1).dcm")
        assert "identical copies, such as 003 (1).dcm and 003.dcm" in str(refusal(tmp_path))

    def test_other_pixels_under_one_uid_are_not_duplicates(self, tmp_path: Path) -> None:
        write_classic(tmp_path, STACK)
        write_classic(tmp_path, replace(STACK, voxels=STACK.voxels + 1), name="second{}.dcm")
        assert refusal(tmp_path).check == "several_volumes"

    @pytest.mark.parametrize(
        ("keyword", "name"), [("PatientID", "Patient ID (0010,0020)"), ("StudyInstanceUID", "(0020,000d)")]
    )
    def test_slices_of_two_patients_or_studies_are_refused_without_naming_them(
        self, tmp_path: Path, keyword: str, name: str
    ) -> None:
        write_classic(tmp_path, STACK, edit=lambda z, one: setattr(one, keyword, "1.23456") if z == 4 else None)
        error = refusal(tmp_path)
        assert error.check == "several_series"
        assert name.lower() in str(error).lower()
        assert "1.23456" not in str(error)


def test_warnings_of_itk_are_off_only_while_files_are_read(tmp_path: Path) -> None:
    assert sitk.ProcessObject.GetGlobalWarningDisplay()
    read_volume(write_classic(tmp_path, STACK))
    assert sitk.ProcessObject.GetGlobalWarningDisplay()


def test_warnings_stay_off_until_the_last_thread_has_read() -> None:
    entered, leave = threading.Event(), threading.Event()

    def read() -> None:
        with without_itk_warnings():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=read)
    thread.start()
    entered.wait(10)
    with without_itk_warnings():
        pass
    assert not sitk.ProcessObject.GetGlobalWarningDisplay()
    leave.set()
    thread.join()
    assert sitk.ProcessObject.GetGlobalWarningDisplay()


def _stored_origin(volume: Volume) -> np.ndarray:
    """Return the index, in the LPS array, of the voxel that the files store first."""
    index = np.arange(volume.array.size).reshape(volume.array.shape)
    first = as_stored(replace(volume, array=index.astype(np.int32))).array[0, 0, 0]
    return np.array(np.unravel_index(first, volume.array.shape))


def _uid(number: int) -> Callable[[Dataset], None]:
    def edit(one: Dataset) -> None:
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.9.{number}"

    return edit


def _compressed(scratch: Path, voxels: np.ndarray, compressor: str) -> Callable[[Dataset], None]:
    """Return an edit that compresses the frames as GDCM does; pydicom has no encoder for these."""

    def edit(one: Dataset) -> None:
        writer = sitk.ImageFileWriter()
        writer.SetFileName(str(scratch))
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        writer.Execute(sitk.GetImageFromArray(voxels))
        source = pydicom.dcmread(scratch)
        one.PixelData = source.PixelData
        one["PixelData"].is_undefined_length = True
        one.file_meta.TransferSyntaxUID = source.file_meta.TransferSyntaxUID
        assert one.file_meta.TransferSyntaxUID.is_compressed

    return edit
