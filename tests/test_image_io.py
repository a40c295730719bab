"""Reading and writing volumes: equal voxels and positions in all formats and orientations, and a named check per refusal."""

import gzip
import itertools
import os
import pickle
import re
import shutil
import struct
import time
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import SimpleITK as sitk

from prostate_seg.common.errors import InputError, VolumeError
from prostate_seg.common.files import md5_of
from prostate_seg.imaging.geometry import Volume
from prostate_seg.imaging.image_io import content_md5, read_volume, to_sitk, write_volume

FORMATS = [".nii.gz", ".nii", ".mha", ".nrrd"]
CODES = [
    "".join(letters) for pairs in itertools.permutations(["LR", "PA", "SI"]) for letters in itertools.product(*pairs)
]
GEOMETRY_TOLERANCE = {".nii.gz": 1e-5, ".nii": 1e-5}
"""NIfTI headers are float32."""

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
TILTED = (1.0, 0.0, 0.0, 0.0, 0.96, -0.28)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)


def synthetic_image(*, dtype: str = "int16", direction: np.ndarray | None = None) -> sitk.Image:
    """Return a 4 x 5 x 6 (z, y, x) image with distinct voxels on an oblique grid."""
    array = np.random.default_rng(0).permutation(120).reshape(4, 5, 6).astype(dtype)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.5, 0.75, 3.0))
    image.SetOrigin((-57.25, -82.5, -27.125))
    image.SetDirection((rotation(0.32, 0.06) if direction is None else direction).ravel().tolist())
    return image


def rotation(about_x: float, about_z: float) -> np.ndarray:
    cos_x, sin_x, cos_z, sin_z = np.cos(about_x), np.sin(about_x), np.cos(about_z), np.sin(about_z)
    around_x = np.array([[1, 0, 0], [0, cos_x, -sin_x], [0, sin_x, cos_x]])
    return around_x @ np.array([[cos_z, -sin_z, 0], [sin_z, cos_z, 0], [0, 0, 1]])


def assert_same_image(actual: sitk.Image, expected: sitk.Image, *, tolerance: float = 1e-6) -> None:
    np.testing.assert_array_equal(sitk.GetArrayFromImage(actual), sitk.GetArrayFromImage(expected))
    np.testing.assert_allclose(actual.GetSpacing(), expected.GetSpacing(), atol=tolerance)
    np.testing.assert_allclose(actual.GetOrigin(), expected.GetOrigin(), atol=tolerance)
    np.testing.assert_allclose(actual.GetDirection(), expected.GetDirection(), atol=tolerance)


def assert_same_volume(actual: Volume, expected: Volume, *, tolerance: float = 1e-6) -> None:
    assert_same_image(to_sitk(actual), to_sitk(expected), tolerance=tolerance)


def refusal(path: Path) -> VolumeError:
    with pytest.raises(VolumeError) as caught:
        read_volume(path)
    return caught.value


def write_image(path: Path, image: sitk.Image, *, compressed: bool = True) -> Path:
    sitk.WriteImage(image, str(path), compressed)
    return path


def write_slice(
    path: Path,
    *,
    position: Sequence[float],
    axes: Sequence[float] = AXIAL,
    pixels: np.ndarray | None = None,
    series_uid: str = "1.2.3.1",
    pixel_spacing_mm: float = 0.5,
    slope: float | None = None,
) -> None:
    """Write a DICOM file; by default its pixels, 4 rows and 5 columns, are the digits of the file name."""
    value = int(re.sub(r"\D", "", path.stem) or 0)
    image = sitk.GetImageFromArray((np.full((4, 5), value, np.int16) if pixels is None else pixels)[np.newaxis])
    image.SetSpacing((pixel_spacing_mm, pixel_spacing_mm, 9.0))
    image.SetOrigin(position)
    image.SetDirection(np.column_stack([axes[:3], axes[3:], np.cross(axes[:3], axes[3:])]).ravel().tolist())
    tags = {"0008|0060": "MR", "0020|000d": "1.2.3", "0020|000e": series_uid}
    if slope is not None:
        stored = {"0028|0100": "16", "0028|0101": "16", "0028|0102": "15", "0028|0103": "1"}
        tags |= {"0028|1053": str(slope), "0028|1052": "0", **stored}
    for key, text in tags.items():
        image.SetMetaData(key, text)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(path))
    writer.Execute(image)


def write_stack(folder: Path, *, positions_mm: Sequence[float], first: int = 1, **of_slice: object) -> Path:
    """Write a DICOM slice at each position along the normal, named by its number."""
    folder.mkdir(exist_ok=True)
    axes = np.array(of_slice.get("axes", AXIAL))
    normal = np.cross(axes[:3], axes[3:])
    for number, position_mm in enumerate(positions_mm, start=first):
        write_slice(folder / f"{number:02d}.dcm", position=(position_mm * normal).tolist(), **of_slice)  # type: ignore[arg-type]
    return folder


class TestOrientation:
    @pytest.mark.parametrize("suffix", [".mha", ".nii.gz"])
    def test_all_48_storage_orientations_round_trip_exactly(self, tmp_path: Path, suffix: str) -> None:
        base = synthetic_image()
        tolerance = GEOMETRY_TOLERANCE.get(suffix, 1e-6)
        assert len(set(CODES)) == 48
        for code in CODES:
            stored = sitk.DICOMOrient(base, code)
            volume = read_volume(write_image(tmp_path / f"{code}{suffix}", stored))
            assert volume.stored_orientation == code
            assert_same_image(to_sitk(volume), base, tolerance=tolerance)
            write_volume(tmp_path / f"back_{code}{suffix}", volume)
            assert_same_image(sitk.ReadImage(str(tmp_path / f"back_{code}{suffix}")), stored, tolerance=tolerance)

    def test_scans_at_exactly_45_degrees_round_trip_exactly(self, tmp_path: Path) -> None:
        for about_x, about_z in itertools.product(np.deg2rad([-135, -45, 45, 90, 135]), repeat=2):
            stored = synthetic_image(direction=rotation(about_x, about_z))
            volume = read_volume(write_image(tmp_path / "stored.mha", stored))
            write_volume(tmp_path / "back.mha", volume)
            assert_same_image(sitk.ReadImage(str(tmp_path / "back.mha")), stored)

    def test_a_voxel_keeps_its_world_position(self, tmp_path: Path) -> None:
        stored = sitk.DICOMOrient(synthetic_image(), "ASR")
        volume = read_volume(write_image(tmp_path / "stored.mha", stored))
        index = np.argwhere(volume.array == stored[3, 2, 1])[0]
        point = stored.TransformIndexToPhysicalPoint((3, 2, 1))
        np.testing.assert_allclose(volume.geometry.to_world(index), point, atol=1e-9)


class TestWriting:
    @pytest.mark.parametrize("suffix", FORMATS)
    @pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32"])
    def test_dtypes_round_trip(self, tmp_path: Path, suffix: str, dtype: str) -> None:
        volume = read_volume(write_image(tmp_path / f"a{suffix}", synthetic_image(dtype=dtype)))
        assert volume.array.dtype == dtype
        write_volume(tmp_path / f"b{suffix}", volume)
        again = read_volume(tmp_path / f"b{suffix}")
        assert again.array.dtype == dtype
        assert_same_volume(again, volume, tolerance=GEOMETRY_TOLERANCE.get(suffix, 1e-6))

    def test_float64_is_read_as_float32(self, tmp_path: Path) -> None:
        assert (
            read_volume(write_image(tmp_path / "a.nii.gz", synthetic_image(dtype="float64"))).array.dtype == np.float32
        )

    def test_bool_is_written_as_uint8(self, tmp_path: Path) -> None:
        volume = read_volume(write_image(tmp_path / "a.mha", synthetic_image()))
        write_volume(tmp_path / "b.nii.gz", replace(volume, array=volume.array > 60))
        again = read_volume(tmp_path / "b.nii.gz").array
        assert again.dtype == np.uint8
        np.testing.assert_array_equal(again, volume.array > 60)

    def test_non_contiguous_views_are_written_correctly(self, tmp_path: Path) -> None:
        volume = read_volume(write_image(tmp_path / "a.mha", synthetic_image()))
        write_volume(tmp_path / "b.mha", replace(volume, array=volume.array[::-1]))
        np.testing.assert_array_equal(read_volume(tmp_path / "b.mha").array, volume.array[::-1])

    def test_equal_volumes_give_equal_bytes(self, tmp_path: Path) -> None:
        volume = read_volume(write_image(tmp_path / "a.mha", synthetic_image()))
        for folder in ("one", "another"):
            for suffix in FORMATS:
                write_volume(tmp_path / folder / f"{folder}{suffix}", volume)
            if folder == "one":
                time.sleep(1.1)  # gzip headers count time in seconds
        for suffix in FORMATS:
            one, another = (tmp_path / folder / f"{folder}{suffix}" for folder in ("one", "another"))
            assert one.read_bytes() == another.read_bytes(), suffix

    def test_a_failed_write_leaves_the_previous_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        volume = read_volume(write_image(tmp_path / "a.mha", synthetic_image()))
        before = (tmp_path / "a.mha").read_bytes()

        def run_out_of_disk(image: sitk.Image, path: str, **_: object) -> None:
            Path(path).write_bytes(b"half")
            raise RuntimeError("no space left")

        monkeypatch.setattr(sitk, "WriteImage", run_out_of_disk)
        with pytest.raises(RuntimeError, match="no space left"):
            write_volume(tmp_path / "a.mha", volume)
        assert (tmp_path / "a.mha").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["a.mha"]

    @pytest.mark.parametrize("name", ["a.mhd", "a.png", "a"])
    def test_a_suffix_of_another_format_is_refused(self, tmp_path: Path, name: str) -> None:
        volume = read_volume(write_image(tmp_path / "a.mha", synthetic_image()))
        with pytest.raises(InputError, match=re.escape(f"not as {name}")):
            write_volume(tmp_path / name, volume)


class TestNames:
    @pytest.mark.parametrize("suffix", FORMATS)
    @pytest.mark.parametrize("form", ["NFC", "NFD"])
    def test_file_names_with_spaces_and_non_ascii_letters(self, tmp_path: Path, suffix: str, form: str) -> None:
        folder = tmp_path / unicodedata.normalize(form, "Müller Øre 前列腺")  # type: ignore[arg-type]
        folder.mkdir()
        volume = read_volume(write_image(tmp_path / "a.mha", synthetic_image()))
        write_volume(folder / f"Ätna 1 é{suffix}", volume)
        assert_same_volume(read_volume(folder / f"Ätna 1 é{suffix}"), volume, tolerance=1e-5)

    @pytest.mark.parametrize("suffix", [".NII.GZ", ".NII", ".MHA", ".NRRD"])
    def test_upper_case_suffixes(self, tmp_path: Path, suffix: str) -> None:
        source = write_image(tmp_path / f"a{suffix.lower()}", synthetic_image())
        source.rename(tmp_path / f"B{suffix}")
        assert_same_image(to_sitk(read_volume(tmp_path / f"B{suffix}")), synthetic_image(), tolerance=1e-5)

    def test_nifti_suffix_of_mixed_case_is_read(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a.nii.gz", synthetic_image()).rename(tmp_path / "a.Nii.Gz")
        assert_same_image(to_sitk(read_volume(tmp_path / "a.Nii.Gz")), synthetic_image(), tolerance=1e-5)

    def test_nii_gz_beside_a_nii_of_the_same_name_is_read_correctly(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a.nii.gz", synthetic_image())
        write_image(tmp_path / "a.nii", synthetic_image() * 0)
        assert sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.nii.gz"))).max() == 0  # voxels of the wrong file
        assert_same_image(to_sitk(read_volume(tmp_path / "a.nii.gz")), synthetic_image(), tolerance=1e-5)
        assert read_volume(tmp_path / "a.nii").array.max() == 0

    @pytest.mark.parametrize("suffix", [".hdr", ".img"])
    def test_a_pair_of_header_and_voxels_is_refused_with_the_next_step(self, tmp_path: Path, suffix: str) -> None:
        (tmp_path / f"a{suffix}").write_bytes(bytes(352))
        assert "convert it (a pair of .hdr and .img too)" in str(refusal(tmp_path / f"a{suffix}"))

    def test_an_unknown_suffix_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_bytes(b"\xff\xd8")
        assert refusal(tmp_path / "a.jpg").check == "unknown_suffix"

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        assert refusal(tmp_path / "a.mha").check == "missing_file"


class TestDamage:
    @pytest.mark.parametrize("compressed", [True, False])
    @pytest.mark.parametrize("suffix", FORMATS)
    def test_a_file_truncated_at_any_position_is_refused(self, tmp_path: Path, suffix: str, compressed: bool) -> None:
        whole = write_image(tmp_path / f"whole{suffix}", noise_image(), compressed=compressed).read_bytes()
        cut = tmp_path / f"cut{suffix}"
        for length in [1, 3, 40, 200, 348, 352, 353, 400, 1000, len(whole) // 2, len(whole) - 30]:
            cut.write_bytes(whole[:length])
            assert refusal(cut).check == "unreadable", length

    @pytest.mark.parametrize("missing", [1, 4, 8])
    @pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
    def test_a_truncated_checksum_is_refused(self, tmp_path: Path, suffix: str, missing: int) -> None:
        path = write_image(tmp_path / f"a{suffix}", noise_image())
        path.write_bytes(path.read_bytes()[:-missing])
        assert refusal(path).check == "unreadable"

    @pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
    def test_a_changed_byte_is_refused(self, tmp_path: Path, suffix: str) -> None:
        path = write_image(tmp_path / f"a{suffix}", noise_image())
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 0xFF
        path.write_bytes(damaged)
        error = refusal(path)
        assert error.check == "unreadable"
        assert "copy or export it again" in str(error)

    def test_a_compressed_mha_with_too_few_voxels_is_refused(self, tmp_path: Path) -> None:
        path = write_image(tmp_path / "a.mha", noise_image())
        header, _, _ = path.read_bytes().partition(b"LOCAL\n")
        voxels = zlib.compress(bytes(1000))
        header = re.sub(rb"CompressedDataSize = \d+", b"CompressedDataSize = %d" % len(voxels), header)
        path.write_bytes(header + b"LOCAL\n" + voxels)
        assert "it has 1000 of 16000 bytes" in str(refusal(path))

    @pytest.mark.parametrize("compressed", [True, False])
    def test_an_mhd_is_read_with_its_voxel_file_and_refused_without(self, tmp_path: Path, compressed: bool) -> None:
        path = write_image(tmp_path / "ä 1.mhd", noise_image(), compressed=compressed)
        assert_same_image(to_sitk(read_volume(path)), noise_image())
        (voxels,) = set(tmp_path.iterdir()) - {path}
        voxels.write_bytes(voxels.read_bytes()[:-9])
        assert refusal(path).check == "unreadable"
        voxels.unlink()
        assert refusal(path).check == "unreadable"

    def test_gzip_in_several_members_is_read(self, tmp_path: Path) -> None:
        plain = write_image(tmp_path / "a.nii", noise_image()).read_bytes()
        (tmp_path / "b.nii.gz").write_bytes(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]) + b"rest")
        assert_same_image(to_sitk(read_volume(tmp_path / "b.nii.gz")), noise_image(), tolerance=1e-5)

    def test_nifti_is_read_with_either_suffix(self, tmp_path: Path) -> None:
        write_image(tmp_path / "a.nii", noise_image()).rename(tmp_path / "b.nii.gz")
        write_image(tmp_path / "a.nii.gz", noise_image()).rename(tmp_path / "b.nii")
        for name in ("b.nii.gz", "b.nii"):
            assert_same_image(to_sitk(read_volume(tmp_path / name)), noise_image(), tolerance=1e-5)

    @pytest.mark.parametrize("suffix", [*FORMATS, ".mhd"])
    def test_a_file_of_another_type_is_refused(self, tmp_path: Path, suffix: str) -> None:
        (tmp_path / f"a{suffix}").write_bytes(b"<html>404 not found</html>" * 50)
        assert refusal(tmp_path / f"a{suffix}").check == "unreadable"

    def test_an_empty_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.nii.gz").touch()
        assert "0 bytes" in str(refusal(tmp_path / "a.nii.gz"))

    def test_a_header_without_a_usable_grid_is_refused(self, tmp_path: Path) -> None:
        path = write_image(tmp_path / "a.mha", synthetic_image(direction=np.eye(3)), compressed=False)
        whole = path.read_bytes()
        zeros = b"0 0 0 0 0 0 0 0 0"
        for old, new, message in [
            (b"0.5 0.75", b"0.5 0.0", "ElementSpacing is 0.5 0.0 3"),
            (b"1 0 0 0 1 0 0 0 1", zeros, "Refusing to change"),
        ]:
            assert old in whole
            path.write_bytes(whole.replace(old, new))
            assert message in str(refusal(path))

    @pytest.mark.parametrize("suffix", [*FORMATS, ".mhd"])
    @pytest.mark.parametrize(("size_xyz", "check"), [((600, 600, 600), "unreadable"), ((4000, 4000, 40), "too_large")])
    def test_a_header_that_declares_too_many_voxels_is_refused_at_once(
        self, tmp_path: Path, suffix: str, size_xyz: tuple[int, int, int], check: str
    ) -> None:
        path = write_image(tmp_path / f"a{suffix}", noise_image(), compressed=False)
        change_header_size(path, size_xyz)
        before, started = psutil.Process().memory_info().rss, time.monotonic()
        assert refusal(path).check == check
        assert time.monotonic() - started < 5
        assert psutil.Process().memory_info().rss - before < 64 * 2**20

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
    def test_voxels_from_a_pipe_are_refused(self, tmp_path: Path) -> None:
        path = write_image(tmp_path / "a.mhd", noise_image(), compressed=False)
        (tmp_path / "a.raw").unlink()
        os.mkfifo(tmp_path / "a.raw")
        assert "that is no file" in str(refusal(path))

    @pytest.mark.parametrize("spacing_mm", [(0.5, 0.5, 1e6), (0.5, 0.5, 1e-4), (60.0, 60.0, 3.0)])
    def test_implausible_voxel_edges_are_refused(self, tmp_path: Path, spacing_mm: tuple[float, ...]) -> None:
        image = noise_image()
        image.SetSpacing(spacing_mm)
        assert refusal(write_image(tmp_path / "a.mha", image)).check == "implausible_grid"

    @pytest.mark.parametrize("axes", [b"1 0 0 0.5 1 0 0 0 1", b"9 0 0 0 1 0 0 0 1"])
    def test_sheared_or_scaled_axes_are_refused(self, tmp_path: Path, axes: bytes) -> None:
        path = write_image(tmp_path / "a.mha", noise_image(), compressed=False)
        assert b"1 0 0 0 1 0 0 0 1" in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(b"1 0 0 0 1 0 0 0 1", axes))
        assert refusal(path).check == "sheared_axes"

    @pytest.mark.parametrize("num_dimensions", [b"2147483647", b"-1", b"99"])
    def test_a_number_of_dimensions_that_crashes_metaio_is_refused(self, tmp_path: Path, num_dimensions: bytes) -> None:
        path = write_image(tmp_path / "a.mhd", noise_image())
        path.write_bytes(path.read_bytes().replace(b"NDims = 3", b"NDims = " + num_dimensions))
        assert refusal(path).check == "not_3d"

    @pytest.mark.parametrize("line", [b"space directions: (1,0,0) (0,1,0) (0,%s,3)", b"%s", b"kinds: %s"])
    def test_a_header_line_that_crashes_teem_is_refused(self, tmp_path: Path, line: bytes) -> None:
        path = write_image(tmp_path / "a.nrrd", noise_image())
        content = path.read_bytes()
        path.write_bytes(content.replace(b"endian:", line % (b"x" * 5000) + b"\nendian:"))
        assert "longer than 500 characters" in str(refusal(path))
        for text in (b"# %s", b"content: %s", b"key:=%s"):
            path.write_bytes(content.replace(b"endian:", text % (b"x" * 5000) + b"\nendian:"))
            assert_same_image(to_sitk(read_volume(path)), noise_image())

    def test_a_file_without_read_permission_is_refused(self, tmp_path: Path) -> None:
        path = write_image(tmp_path / "a.mhd", noise_image(), compressed=False)
        header = path.read_bytes()
        for name in (b"a" * 5000, b" ", b"."):  # file systems refuse the first
            path.write_bytes(header.replace(b"a.raw", name))
            assert refusal(path).check == "unreadable"

    def test_a_position_that_is_not_a_number_is_refused(self, tmp_path: Path) -> None:
        path = write_image(tmp_path / "a.nii", noise_image())
        header = bytearray(path.read_bytes())
        struct.pack_into("<f", header, 324, float("nan"))  # srow_z[3]
        path.write_bytes(header)
        assert refusal(path).check == "implausible_grid"

    def test_the_error_has_no_memory_address_and_no_source_line(self, tmp_path: Path) -> None:
        (tmp_path / "a.mha").write_bytes(b"nothing")
        assert not re.search(r"0x|\.cxx|\.hxx", str(refusal(tmp_path / "a.mha")))

    def test_the_error_can_be_pickled(self) -> None:
        error = pickle.loads(pickle.dumps(VolumeError("a gap", "missing_slice")))
        assert (str(error), error.check) == ("a gap", "missing_slice")


def change_header_size(path: Path, size_xyz: Sequence[int]) -> None:
    """Change the size in a header but not the voxels."""
    is_gzip = path.name.endswith(".gz")
    content = gzip.decompress(path.read_bytes()) if is_gzip else path.read_bytes()
    if ".nii" in path.name:
        content = content[:42] + struct.pack("<3h", *size_xyz) + content[48:]
    else:
        key = b"sizes:" if path.suffix == ".nrrd" else b"DimSize ="
        content = re.sub(key + rb"[^\n]*", key + b" %d %d %d" % tuple(size_xyz), content)
    path.write_bytes(gzip.compress(content) if is_gzip else content)


def noise_image() -> sitk.Image:
    """Return an image of 16,000 incompressible bytes."""
    image = sitk.GetImageFromArray(np.random.default_rng(1).integers(0, 2**15, (8, 25, 40), dtype=np.int16))
    image.SetSpacing((0.5, 0.5, 3.0))
    return image


class TestDimensions:
    @pytest.mark.parametrize("suffix", FORMATS)
    def test_a_series_of_volumes_is_refused(self, tmp_path: Path, suffix: str) -> None:
        image = sitk.GetImageFromArray(np.zeros((3, 4, 5, 6), np.int16), isVector=False)
        error = refusal(write_image(tmp_path / f"a{suffix}", image))
        assert error.check == "not_3d"
        assert "6 x 5 x 4 x 3 voxels" in str(error)

    @pytest.mark.parametrize("suffix", FORMATS)
    def test_a_fourth_dimension_of_one_is_dropped(self, tmp_path: Path, suffix: str) -> None:
        path = write_image(tmp_path / f"a{suffix}", sitk.JoinSeries([synthetic_image()]))
        assert_same_image(to_sitk(read_volume(path)), synthetic_image(), tolerance=1e-5)

    @pytest.mark.parametrize("suffix", FORMATS)
    def test_a_single_image_is_refused(self, tmp_path: Path, suffix: str) -> None:
        assert refusal(write_image(tmp_path / f"a{suffix}", synthetic_image()[:, :, 1])).check == "not_3d"

    @pytest.mark.parametrize("suffix", FORMATS)
    def test_vectors_and_colours_are_refused(self, tmp_path: Path, suffix: str) -> None:
        for num_components, dtype in [(2, np.float32), (3, np.uint8)]:
            image = sitk.GetImageFromArray(np.zeros((4, 5, 6, num_components), dtype), isVector=True)
            error = refusal(write_image(tmp_path / f"a{suffix}", image))
            assert error.check == "vector_pixels"
            assert f"{num_components} components" in str(error)

    @pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
    def test_complex_voxels_are_refused(self, tmp_path: Path, suffix: str) -> None:
        image = sitk.GetImageFromArray(np.ones((4, 5, 6), np.complex64))
        assert refusal(write_image(tmp_path / f"a{suffix}", image)).check == "complex_pixels"


class TestDicom:
    def test_slices_are_sorted_by_position_and_spaced_by_it(self, tmp_path: Path) -> None:
        write_stack(tmp_path, positions_mm=[6, 0, 9, 3], axes=TILTED)
        volume = read_volume(tmp_path)
        np.testing.assert_array_equal(volume.array[:, 0, 0], [2, 4, 1, 3])
        np.testing.assert_allclose(volume.geometry.spacing_mm, (3, 0.5, 0.5))
        np.testing.assert_allclose(volume.geometry.origin_mm, (0, 0, 0))
        np.testing.assert_allclose(volume.geometry.to_world((3, 0, 0)), 9 * np.cross(TILTED[:3], TILTED[3:]), atol=1e-9)

    def test_a_sagittal_series_is_read_to_lps(self, tmp_path: Path) -> None:
        volume = read_volume(write_stack(tmp_path, positions_mm=[0, 3, 6, 9], axes=SAGITTAL))
        assert volume.stored_orientation == "PIR"
        assert volume.geometry.shape_vox == (4, 5, 4)
        np.testing.assert_array_equal(volume.array[0, 0], [4, 3, 2, 1])

    def test_other_files_in_the_folder_are_skipped(self, tmp_path: Path) -> None:
        write_stack(tmp_path, positions_mm=[0, 3, 6])
        (tmp_path / "report.txt").write_text("no tumour")
        (tmp_path / ".DS_Store").write_bytes(bytes(200))
        (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(99))
        (tmp_path / "empty").touch()
        assert read_volume(tmp_path).geometry.shape_vox == (3, 4, 5)

    def test_names_with_spaces_and_other_letters(self, tmp_path: Path) -> None:
        folder = write_stack(tmp_path / "Jürgen 2 é", positions_mm=[0, 3, 6])
        (folder / "01.dcm").rename(folder / "Bild ö 01")
        assert read_volume(folder).geometry.shape_vox == (3, 4, 5)

    def test_a_missing_slice_is_refused_with_its_position(self, tmp_path: Path) -> None:
        error = refusal(write_stack(tmp_path, positions_mm=[0, 3, 6, 12, 15]))
        assert error.check == "missing_slice"
        assert (
            "slices 3 and 4 of 5 (03.dcm and 04.dcm, at 6.00 and 12.00 mm along the normal) are 6.00 mm apart"
            in str(error)
        )

    def test_a_missing_slice_among_three_is_refused(self, tmp_path: Path) -> None:
        assert refusal(write_stack(tmp_path, positions_mm=[0, 3, 9])).check == "missing_slice"

    def test_positions_rounded_to_a_tenth_are_accepted(self, tmp_path: Path) -> None:
        volume = read_volume(write_stack(tmp_path, positions_mm=[0, 3.3, 6.6, 9.9, 13.3, 16.6, 19.9]))
        np.testing.assert_allclose(volume.geometry.spacing_mm[0], 19.9 / 6)

    def test_two_volumes_at_the_same_positions_are_refused(self, tmp_path: Path) -> None:
        error = refusal(write_stack(tmp_path, positions_mm=[0, 3, 6, 0, 3, 6]))
        assert error.check == "several_volumes"
        assert "6 files at 3 positions" in str(error)

    def test_mixed_orientations_are_refused_with_their_numbers(self, tmp_path: Path) -> None:
        write_stack(tmp_path, positions_mm=[0, 3, 6])
        error = refusal(write_stack(tmp_path, positions_mm=[0, 3], axes=SAGITTAL, first=4))
        assert error.check == "mixed_orientations"
        assert "3 axial" in str(error)
        assert "2 sagittal" in str(error)

    def test_two_series_are_refused(self, tmp_path: Path) -> None:
        write_stack(tmp_path, positions_mm=[0, 3, 6])
        error = refusal(write_stack(tmp_path, positions_mm=[9, 12], first=4, series_uid="1.2.3.2"))
        assert error.check == "several_series"
        assert "3 files of 1.2.3.1, 2 files of 1.2.3.2" in str(error)

    @pytest.mark.parametrize("other", [{"pixels": np.zeros((5, 5), np.int16)}, {"pixel_spacing_mm": 0.6}])
    def test_slices_of_different_pixels_are_refused(self, tmp_path: Path, other: dict[str, object]) -> None:
        write_stack(tmp_path, positions_mm=[0, 3, 6])
        error = refusal(write_stack(tmp_path, positions_mm=[9], first=4, **other))
        assert error.check == "mixed_pixels"
        assert "01.dcm 5 columns x 4 rows, 0.5 x 0.5 mm" in str(error)

    def test_a_sheared_stack_is_refused(self, tmp_path: Path) -> None:
        for number in range(4):
            write_slice(tmp_path / f"{number}.dcm", position=(0.0, 0.5 * number, 3.0 * number))
        assert refusal(tmp_path).check == "sheared_series"

    def test_slices_without_positions_are_refused(self, tmp_path: Path) -> None:
        for path in write_stack(tmp_path, positions_mm=[0, 3, 6]).iterdir():
            position, unknown = b"\x20\x00\x32\x00", b"\x20\x00\x33\x00"
            path.write_bytes(path.read_bytes().replace(position, unknown))
        error = refusal(tmp_path)
        assert error.check == "no_position"
        assert "3 of 3 DICOM files" in str(error)

    def test_a_single_slice_is_refused(self, tmp_path: Path) -> None:
        assert refusal(write_stack(tmp_path, positions_mm=[0])).check == "not_3d"

    def test_a_single_multi_frame_file_is_read(self, tmp_path: Path) -> None:
        image = synthetic_image(dtype="uint16", direction=np.eye(3))
        write_image(tmp_path / "a.dcm", image, compressed=False)
        assert_same_image(to_sitk(read_volume(tmp_path)), image)

    def test_a_multi_frame_file_among_others_is_refused(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            image = synthetic_image(dtype="uint16", direction=np.eye(3))
            image.SetMetaData("0020|000e", "1.2.3.1")
            writer = sitk.ImageFileWriter()
            writer.KeepOriginalImageUIDOn()
            writer.SetFileName(str(tmp_path / f"{name}.dcm"))
            writer.Execute(image)
        assert refusal(tmp_path).check == "several_volumes"

    def test_each_slice_is_rescaled_by_its_own_slope(self, tmp_path: Path) -> None:
        for number, slope in enumerate([1, 0.25, 0.5]):
            pixels = np.full((4, 5), 3 * slope, np.float64 if slope < 1 else np.int16)
            write_slice(tmp_path / f"{number}.dcm", position=(0, 0, 3.0 * number), pixels=pixels, slope=slope)
        np.testing.assert_array_equal(read_volume(tmp_path).array[:, 0, 0], [3, 0.75, 1.5])

    def test_a_truncated_slice_is_refused_with_its_name(self, tmp_path: Path) -> None:
        write_stack(tmp_path, positions_mm=[0, 3, 6])
        whole = (tmp_path / "02.dcm").read_bytes()
        for length in (140, 300, len(whole) - 7):
            (tmp_path / "02.dcm").write_bytes(whole[:length])
            error = refusal(tmp_path)
            assert error.check == "unreadable"
            assert "02.dcm" in str(error)

    def test_an_lfs_pointer_in_the_series_is_refused(self, tmp_path: Path) -> None:
        write_stack(tmp_path, positions_mm=[0, 3, 6])
        (tmp_path / "04.dcm").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        assert refusal(tmp_path).check == "lfs_pointer"

    def test_a_folder_without_dicom_is_refused_with_its_content(self, tmp_path: Path) -> None:
        write_image(tmp_path / "10000_1000000_t2w.mha", synthetic_image())
        (tmp_path / "series").mkdir()
        error = refusal(tmp_path)
        assert error.check == "no_dicom"
        assert "1 other files, such as 10000_1000000_t2w.mha; 1 folders" in str(error)


class TestRealData:
    def test_every_real_study_round_trips_exactly(self, shared_data: Path, tmp_path: Path) -> None:
        for path in sorted((shared_data / "t2w").glob("*/*")):
            write_volume(tmp_path / path.name, read_volume(path))
            assert_same_image(sitk.ReadImage(str(tmp_path / path.name)), sitk.ReadImage(str(path)))

    def test_a_mask_on_an_mha_grid_can_be_written_as_nifti(self, shared_data: Path, tmp_path: Path) -> None:
        image = read_volume(shared_data / "t2w" / "images" / "11373_1001396.mha")
        write_volume(tmp_path / "mask.nii.gz", replace(image, array=image.array > 200))
        assert image.geometry.is_same_grid(read_volume(tmp_path / "mask.nii.gz").geometry)

    def test_a_dicom_series_equals_the_mha_made_of_it(self, shared_data: Path) -> None:
        series = read_volume(shared_data / "dicom" / "11373_1001396")
        image = read_volume(shared_data / "t2w" / "images" / "11373_1001396.mha")
        assert series.array.dtype == image.array.dtype
        assert_same_volume(series, image)

    def test_file_names_do_not_matter_for_a_dicom_series(self, shared_data: Path, tmp_path: Path) -> None:
        files = sorted((shared_data / "dicom" / "11373_1001396").iterdir())
        for number in np.random.default_rng(0).permutation(len(files)):
            shutil.copy(files[number], tmp_path / f"IM{(number * 7) % 19:03d}")
        assert_same_volume(read_volume(tmp_path), read_volume(shared_data / "dicom" / "11373_1001396"))

    @pytest.mark.parametrize(
        ("name", "check", "text"),
        [
            ("dicom_missing_slice", "missing_slice", "6.00 mm apart, and slices are usually 3.00 mm apart"),
            ("dicom_three_b_values_in_one_folder", "several_volumes", "57 files at 19 positions: not one volume"),
            ("dicom_mixed_orientations", "mixed_orientations", "13 files in 3 orientations"),
            ("lfs_pointer.mha", "lfs_pointer", "git lfs pull"),
        ],
    )
    def test_damaged_real_data_are_refused_with_their_name(
        self, shared_data: Path, name: str, check: str, text: str
    ) -> None:
        error = refusal(shared_data / "ugly" / name)
        assert error.check == check
        assert text in str(error)

    @pytest.mark.parametrize("part", [0.0002, 0.1, 0.5, 0.9999])
    @pytest.mark.parametrize("name", ["p158020_1.nii.gz", "11373_1001396.mha"])
    def test_truncated_real_files_are_refused(self, shared_data: Path, tmp_path: Path, name: str, part: float) -> None:
        whole = (shared_data / "t2w" / "images" / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: int(part * len(whole))])
        assert refusal(tmp_path / name).check == "unreadable"


def test_itk_writes_nothing_to_stderr_about_readable_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], shared_data: Path
) -> None:
    write_volume(tmp_path / "a.nii.gz", read_volume(shared_data / "dicom" / "11373_1001396"))
    read_volume(tmp_path / "a.nii.gz")
    assert capfd.readouterr().err == ""


def test_a_geometry_has_the_reverse_of_sitks_order(tmp_path: Path) -> None:
    geometry = read_volume(write_image(tmp_path / "a.mha", synthetic_image(direction=np.eye(3)))).geometry
    assert geometry.shape_vox == (4, 5, 6)
    assert geometry.spacing_mm == (3.0, 0.75, 0.5)


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_a_linked_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "link.nrrd").symlink_to(write_image(tmp_path / "a.nrrd", synthetic_image()))
    assert_same_image(to_sitk(read_volume(tmp_path / "link.nrrd")), synthetic_image())


def test_md5_of_an_mhd_depends_on_its_voxel_file(tmp_path: Path) -> None:
    for value in (1, 2):
        (tmp_path / str(value)).mkdir()
        sitk.WriteImage(sitk.Image([4, 4, 4], sitk.sitkUInt8) + value, str(tmp_path / str(value) / "a.mhd"))
    first, second = (tmp_path / name / "a.mhd" for name in ("1", "2"))
    assert first.read_bytes() == second.read_bytes()
    assert content_md5(first) != content_md5(second)


def test_md5_of_a_nrrd_depends_on_a_voxel_file_if_it_names_one(tmp_path: Path) -> None:
    whole = write_image(tmp_path / "whole.nrrd", synthetic_image())
    assert content_md5(whole) == md5_of(whole)
    header = whole.read_bytes().partition(b"\n\n")[0].replace(b"encoding: gzip", b"encoding: raw")
    (tmp_path / "a.nrrd").write_bytes(header + b"\ndata file: a.raw\n")
    md5s = set()
    for value in (1, 2):
        (tmp_path / "a.raw").write_bytes(np.full_like(sitk.GetArrayFromImage(synthetic_image()), value).tobytes())
        assert (read_volume(tmp_path / "a.nrrd").array == value).all()
        md5s.add(content_md5(tmp_path / "a.nrrd"))
    assert len(md5s) == 2


def test_md5_of_an_mhd_whose_header_cannot_be_used_is_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.mhd").write_text("NDims = 9\nElementDataFile = a.raw\n")
    assert content_md5(tmp_path / "a.mhd") == md5_of(tmp_path / "a.mhd")
