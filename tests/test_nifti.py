"""NIfTI files: positions and values equal nibabel's, masks share the grid of their image, contradictory headers are refused."""

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

from prostate_seg.common.errors import VolumeError
from prostate_seg.imaging.geometry import Volume
from prostate_seg.imaging.image_io import as_stored, read_volume, write_volume
from tests.nifti_helpers import LPS_FROM_RAS, SPACING_MM, affine, image_array, nifti_bytes, pixdim, write_nifti_file


def refusal(path: Path) -> VolumeError:
    with pytest.raises(VolumeError) as caught:
        read_volume(path)
    return caught.value


def checks(volume: Volume) -> list[str]:
    return [warning.check for warning in volume.warnings]


def predict_mask(path: Path, volume: Volume) -> nibabel.Nifti1Image:
    """Write a mask for a volume as stage=predict does, and return what nibabel reads."""
    write_volume(path, volume.with_mask(volume.array > 60))
    return nibabel.load(path)


def largest_difference_mm(volume: Volume, image: nibabel.Nifti1Image) -> float:
    """Return the largest distance of the eight corners of a volume from nibabel's, for any order of axes."""
    ours = volume.geometry.corners_mm @ LPS_FROM_RAS
    ends = np.stack(np.meshgrid(*[(0, size - 1) for size in image.shape[:3]], indexing="ij"), axis=-1).reshape(-1, 3)
    theirs = nibabel.affines.apply_affine(image.affine, ends)
    apart = np.linalg.norm(ours[:, np.newaxis] - theirs[np.newaxis], axis=-1)
    return float(apart.min(axis=1).max())


def voxel_difference_mm(volume: Volume, image: nibabel.Nifti1Image) -> float:
    """Return the largest distance between voxels of equal value in our reading and in nibabel's; values must be distinct."""
    ours = volume.geometry.to_world(np.argwhere(volume.array > -1)) @ LPS_FROM_RAS
    data = np.asarray(image.dataobj)
    theirs = nibabel.affines.apply_affine(image.affine, np.argwhere(data > -1))
    return float(np.abs(ours[np.argsort(volume.array.ravel())] - theirs[np.argsort(data.ravel())]).max())


@st.composite
def headers(draw: st.DrawFn) -> dict[str, object]:
    """Generate forms, codes, spacings, handedness, version and byte order of a consistent header."""
    spacing = draw(st.tuples(*[st.floats(0.25, 5.0, width=32)] * 3))
    form = affine(
        spacing,
        angles=draw(st.tuples(*[st.floats(-np.pi, np.pi)] * 3)),
        flips=draw(st.tuples(*[st.sampled_from([-1, 1])] * 3)),
        origin_mm=draw(st.tuples(*[st.floats(-500, 500)] * 3)),
    )
    forms = dict.fromkeys(draw(st.sets(st.sampled_from(["sform", "qform"]))), form)
    header = {"kind": draw(st.sampled_from([Nifti1Header, Nifti2Header])), "endianness": draw(st.sampled_from("<>"))}
    header |= {f"{name}_code": draw(st.integers(1, 5)) for name in forms} | forms
    header["xyzt_units"] = draw(st.sampled_from([0, 2, 10]))
    return header if "qform" in forms else header | {"pixdim": pixdim(*spacing, qfac=draw(st.sampled_from([-1, 0, 1])))}


class TestAgreementWithNibabel:
    @settings(
        max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(header=headers())
    def test_grid_and_mask_equal_those_of_nibabel(self, tmp_path: Path, header: dict[str, object]) -> None:
        array = np.random.default_rng(0).permutation(1200).reshape(2, 3, 200).astype("int16")
        path = write_nifti_file(tmp_path / "image.nii", array, **header)
        image, volume = nibabel.load(path), read_volume(path)
        assert voxel_difference_mm(volume, image) < 1e-3
        assert np.array_equal(as_stored(volume).array.T, np.asarray(image.dataobj))
        mask = predict_mask(tmp_path / "mask.nii", volume)
        assert np.abs(mask.affine - image.affine).max() < 1e-4
        assert np.array_equal(np.asarray(mask.dataobj), np.asarray(image.dataobj) > 60)
        assert np.abs(mask.get_sform() - mask.get_qform()).max() < 1e-3
        assert volume.nifti_form is not None
        assert mask.header["sform_code"] == mask.header["qform_code"] == volume.nifti_form.code
        assert mask.header.get_xyzt_units()[0] == "mm"
        assert volume.geometry.is_same_grid(read_volume(tmp_path / "mask.nii").geometry)

    @pytest.mark.parametrize(
        "forms", [{"sform": affine()}, {"qform": affine()}, {"sform": affine(), "qform": affine()}, {}]
    )
    def test_simpleitk_reads_mask_and_image_on_one_grid(self, tmp_path: Path, forms: dict[str, np.ndarray]) -> None:
        path = write_nifti_file(tmp_path / "image.nii.gz", **forms)
        predict_mask(tmp_path / "mask.nii.gz", read_volume(path))
        image, mask = (sitk.ReadImage(str(tmp_path / f"{name}.nii.gz")) for name in ("image", "mask"))
        for of_image, of_mask in [
            (image.GetOrigin(), mask.GetOrigin()),
            (image.GetSpacing(), mask.GetSpacing()),
            (image.GetDirection(), mask.GetDirection()),
        ]:
            np.testing.assert_allclose(of_mask, of_image, atol=1e-5)

    def test_a_volume_of_another_format_is_written_with_both_forms_in_scanner_space(self, tmp_path: Path) -> None:
        volume = read_volume(write_nifti_file(tmp_path / "a.nii", sform=affine(), sform_code=4))
        write_volume(tmp_path / "a.mha", volume)
        written = predict_mask(tmp_path / "mask.nii.gz", read_volume(tmp_path / "a.mha"))
        assert (written.header["sform_code"], written.header["qform_code"]) == (1, 1)
        np.testing.assert_allclose(written.get_sform(), affine(), atol=1e-4)
        np.testing.assert_allclose(written.get_qform(), affine(), atol=1e-4)

    @pytest.mark.parametrize(
        "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32"]
    )
    def test_dtypes_are_kept(self, tmp_path: Path, dtype: str) -> None:
        path = write_nifti_file(tmp_path / "a.nii", image_array(dtype), sform=affine(), endianness=">")
        volume = read_volume(path)
        assert volume.array.dtype == np.dtype(dtype)
        assert np.array_equal(as_stored(volume).array.T, image_array(dtype))

    def test_float64_becomes_float32(self, tmp_path: Path) -> None:
        volume = read_volume(write_nifti_file(tmp_path / "a.nii", image_array("float64"), sform=affine()))
        assert volume.array.dtype == np.float32
        assert np.array_equal(as_stored(volume).array.T, image_array("float32"))

    @pytest.mark.parametrize("dtype", ["int16", "uint8", "float32"])
    @pytest.mark.parametrize("slope", [0.0, 1.0, 0.1, -2.5, np.nan, np.inf])
    @pytest.mark.parametrize("intercept", [0.0, -1024.0])
    def test_voxels_are_scaled_as_nibabel_scales_them(
        self, tmp_path: Path, dtype: str, slope: float, intercept: float
    ) -> None:
        scale = {"scl_slope": slope, "scl_inter": intercept}
        path = write_nifti_file(tmp_path / "a.nii.gz", image_array(dtype), sform=affine(), **scale)
        expected = nibabel.load(path).get_fdata().astype(np.float32)
        assert np.array_equal(as_stored(read_volume(path)).array.T.astype(np.float32), expected)

    def test_a_slope_without_a_finite_intercept_is_refused(self, tmp_path: Path) -> None:
        path = write_nifti_file(tmp_path / "a.nii", sform=affine(), scl_slope=2.0, scl_inter=np.nan)
        assert "invalid intercept nan" in str(refusal(path))


class TestSpacing:
    @pytest.mark.parametrize("bad", [0.0, -3.0, np.nan, np.inf])
    @pytest.mark.parametrize("forms", [{}, {"sform": affine()}])
    def test_a_spacing_that_is_not_a_positive_number_is_refused(
        self, tmp_path: Path, bad: float, forms: dict[str, np.ndarray]
    ) -> None:
        error = refusal(write_nifti_file(tmp_path / "a.nii", **forms, pixdim=pixdim(0.5, 0.75, bad)))
        assert error.check == "no_spacing"
        assert f"pixdim[1] to [3] are 0.5 x 0.75 x {bad:g}" in str(error)

    @pytest.mark.parametrize(("unit", "name"), [(1, "meter"), (3, "micron"), (11, "micron"), (5, "not defined")])
    def test_another_unit_than_mm_is_refused(self, tmp_path: Path, unit: int, name: str) -> None:
        error = refusal(write_nifti_file(tmp_path / "a.nii", sform=affine(), xyzt_units=unit))
        assert error.check == "not_in_mm"
        assert name in str(error)

    @pytest.mark.parametrize("unit", [0, 2, 10, 18])
    def test_mm_and_no_unit_are_read(self, tmp_path: Path, unit: int) -> None:
        volume = read_volume(write_nifti_file(tmp_path / "a.nii", sform=affine(), xyzt_units=unit))
        assert volume.geometry.spacing_mm == SPACING_MM[::-1]

    @pytest.mark.parametrize("stated", [(0.5, 0.75, 1.0), (3.0, 0.75, 0.5), (0.52, 0.75, 3.0)])
    def test_an_sform_that_contradicts_pixdim_is_refused_with_both(
        self, tmp_path: Path, stated: tuple[float, float, float]
    ) -> None:
        error = refusal(write_nifti_file(tmp_path / "a.nii", sform=affine(), pixdim=pixdim(*stated)))
        assert error.check == "spacings_differ"
        assert "0.5 x 0.75 x 3 mm by its sform" in str(error)
        assert " x ".join(f"{value:g}" for value in stated) + " mm by pixdim" in str(error)

    def test_a_rounded_pixdim_is_accepted_and_the_sform_is_used(self, tmp_path: Path) -> None:
        path = write_nifti_file(tmp_path / "a.nii", sform=affine(), pixdim=pixdim(0.5, 0.752, 3.0))
        assert read_volume(path).geometry.spacing_mm == pytest.approx(SPACING_MM[::-1], rel=1e-6)


class TestOrientation:
    @pytest.mark.parametrize(
        "moved", [{"origin_mm": (87.25, 82.5, -27.125)}, {"angles": (0.1, 0.1, 0.06)}, {"flips": (1, -1, -1)}]
    )
    def test_forms_that_differ_are_a_warning_with_both_and_the_sform_is_used(
        self, tmp_path: Path, moved: dict[str, Sequence[float]]
    ) -> None:
        path = write_nifti_file(tmp_path / "a.nii", sform=affine(), qform=affine(**moved))  # type: ignore[arg-type]
        volume = read_volume(path)
        assert checks(volume) == ["forms_differ"]
        assert "(57.25, 82.5, -27.12) mm RAS and axes LPS by the sform, which is used" in volume.warnings[0].message
        assert "by the qform" in volume.warnings[0].message
        image = nibabel.load(path)
        assert voxel_difference_mm(volume, image) < 1e-3
        assert np.abs(predict_mask(tmp_path / "mask.nii", volume).affine - image.affine).max() < 1e-4

    def test_the_distance_of_two_forms_is_stated(self, tmp_path: Path) -> None:
        moved = affine(origin_mm=(87.25, 82.5, -27.125))
        volume = read_volume(write_nifti_file(tmp_path / "a.nii", sform=affine(), qform=moved))
        assert "put the volume 30.0 mm apart" in volume.warnings[0].message

    def test_a_quaternion_rounded_to_float32_is_accepted(self, tmp_path: Path) -> None:
        path = write_nifti_file(tmp_path / "a.nii", sform=affine(), qform=affine())
        assert checks(read_volume(path)) == []

    @pytest.mark.parametrize("field", [{"quatern_b": 2.0}, {"quatern_c": np.nan}, {"qoffset_x": np.inf}])
    def test_a_qform_that_is_no_rotation_is_a_warning_beside_an_sform_and_an_error_alone(
        self, tmp_path: Path, field: dict[str, float]
    ) -> None:
        volume = read_volume(write_nifti_file(tmp_path / "a.nii", sform=affine(), qform=affine(), **field))
        assert checks(volume) == ["forms_differ"]
        assert refusal(write_nifti_file(tmp_path / "b.nii", qform=affine(), **field)).check in (
            "unreadable",
            "sheared_axes",
            "implausible_grid",
        )

    def test_a_file_without_any_form_is_read_as_nibabel_does_with_a_warning(self, tmp_path: Path) -> None:
        path = write_nifti_file(tmp_path / "a.nii.gz")
        volume, image = read_volume(path), nibabel.load(path)
        assert checks(volume) == ["no_orientation"]
        assert "no orientation is stated" in volume.warnings[0].message
        assert voxel_difference_mm(volume, image) < 1e-3
        mask = predict_mask(tmp_path / "mask.nii.gz", volume)
        np.testing.assert_allclose(mask.affine, image.affine)
        assert checks(read_volume(tmp_path / "mask.nii.gz")) == ["no_orientation"]

    def test_a_channel_of_a_file_without_form_is_where_nibabel_puts_it(self, tmp_path: Path) -> None:
        path = write_nifti_file(tmp_path / "a.nii", np.stack([image_array(), image_array()], axis=-1))
        volume = read_volume(path, channel=1)
        write_volume(tmp_path / "b.nii", volume)
        np.testing.assert_allclose(nibabel.load(tmp_path / "b.nii").affine, nibabel.load(path).affine)
        assert largest_difference_mm(volume, nibabel.load(path)) < 1e-3

    def test_a_mask_without_form_is_on_the_grid_of_an_image_only_where_nibabel_puts_both(self, tmp_path: Path) -> None:
        mask = read_volume(write_nifti_file(tmp_path / "mask.nii"))
        tilted = read_volume(write_nifti_file(tmp_path / "tilted.nii", sform=affine()))
        centred = read_volume(
            write_nifti_file(tmp_path / "centred.nii", sform=nibabel.load(tmp_path / "mask.nii").affine)
        )
        assert not mask.geometry.is_same_grid(tilted.geometry)
        assert mask.geometry.is_same_grid(centred.geometry)

    @pytest.mark.parametrize("decimals", [2, 3, 4])
    def test_an_sform_rounded_to_decimals_is_read_as_the_nearest_rotation(self, tmp_path: Path, decimals: int) -> None:
        """Each corner is within shear x extent of nibabel's, which keeps sheared axes."""
        array = np.zeros((120, 120, 20), np.int16)
        form = np.round(affine((1, 1, 3)), decimals)
        path = write_nifti_file(tmp_path / "a.nii", array, sform=form, pixdim=pixdim(1, 1, 3))
        volume, image = read_volume(path), nibabel.load(path)
        direction = np.reshape(volume.geometry.direction, (3, 3))
        np.testing.assert_allclose(direction.T @ direction, np.eye(3), atol=1e-12)
        cosines = form[:3, :3] / np.linalg.norm(form[:3, :3], axis=0)
        lean = np.abs(cosines.T @ cosines - np.eye(3)).max()
        moved_mm = largest_difference_mm(volume, image)
        assert 0 < moved_mm <= lean * volume.geometry.diagonal_mm
        assert checks(volume) == (["rounded_axes"] if moved_mm > 0.1 else [])
        np.testing.assert_array_equal(predict_mask(tmp_path / "mask.nii", volume).affine, image.affine)

    def test_an_sform_sheared_by_a_thousandth_is_read(self, tmp_path: Path) -> None:
        form = np.round(affine(), 3)
        form[1, 0] += 0.0015
        assert read_volume(write_nifti_file(tmp_path / "a.nii", sform=form)).geometry.spacing_mm == pytest.approx(
            SPACING_MM[::-1], rel=2e-3
        )

    @pytest.mark.parametrize("entry", [{(1, 0): 0.1}, {(0, 0): np.nan}, {(2, 2): np.inf}, {(0, 2): 1.5}])
    def test_a_sheared_sform_is_refused(self, tmp_path: Path, entry: dict[tuple[int, int], float]) -> None:
        form = affine(angles=(0, 0, 0))
        for index, value in entry.items():
            form[index] = value
        assert refusal(write_nifti_file(tmp_path / "a.nii", sform=form)).check == "sheared_axes"

    @pytest.mark.parametrize("columns", [[0], [0, 1, 2]])
    def test_an_sform_with_columns_of_zeros_is_refused(self, tmp_path: Path, columns: list[int]) -> None:
        form = affine()
        form[:, columns] = 0
        error = refusal(write_nifti_file(tmp_path / "a.nii", sform=form))
        assert error.check == "sheared_axes"
        assert "rows of its affine are" in str(error)

    def test_an_sform_of_two_parallel_axes_is_refused(self, tmp_path: Path) -> None:
        form = affine((1, 1, 1))
        form[:, 1] = form[:, 0]
        assert refusal(write_nifti_file(tmp_path / "a.nii", sform=form, pixdim=pixdim(1, 1, 1))).check == "sheared_axes"


class TestHeader:
    @pytest.mark.parametrize("kind", [Nifti1Header, Nifti2Header])
    @pytest.mark.parametrize("endianness", ["<", ">"])
    def test_both_versions_and_byte_orders_are_read(self, tmp_path: Path, kind: type, endianness: str) -> None:
        path = write_nifti_file(tmp_path / "a.nii.gz", sform=affine(), kind=kind, endianness=endianness)
        volume = read_volume(path)
        assert np.array_equal(as_stored(volume).array.T, image_array())
        assert voxel_difference_mm(volume, nibabel.load(path)) < 1e-3

    def test_the_header_of_a_pair_is_refused(self, tmp_path: Path) -> None:
        error = refusal(write_nifti_file(tmp_path / "a.nii", sform=affine(), magic=b"ni1"))
        assert "pair of .hdr and .img" in str(error)

    def test_a_header_extension_is_skipped(self, tmp_path: Path) -> None:
        content = nifti_bytes(image_array(), sform=affine(), vox_offset=400)
        (tmp_path / "a.nii").write_bytes(content[:348] + bytes([1, 0, 0, 0]) + b"\xff" * 48 + content[352:])
        assert np.array_equal(as_stored(read_volume(tmp_path / "a.nii")).array.T, image_array())

    @pytest.mark.parametrize("fields", [{"datatype": 1}, {"datatype": 999}, {"vox_offset": 100}])
    def test_headers_that_nibabel_cannot_use_are_refused(self, tmp_path: Path, fields: dict[str, int]) -> None:
        error = refusal(write_nifti_file(tmp_path / "a.nii", sform=affine(), **fields))
        assert error.check == "unreadable"
        assert "NIfTI header cannot be used" in str(error)

    @pytest.mark.parametrize("size", [0, -1, 5000])
    def test_implausible_sizes_are_refused(self, tmp_path: Path, size: int) -> None:
        path = write_nifti_file(tmp_path / "a.nii", sform=affine(), dim=[3, 6, 5, size, 1, 1, 1, 1])
        assert refusal(path).check == "too_large"

    @pytest.mark.parametrize(
        ("shape", "dtype", "check"),
        [
            ((6, 5, 4, 3), "int16", "not_3d"),
            ((6, 5, 4, 1, 3), "float32", "vector_pixels"),
            ((6, 5, 4, 2, 3), "int16", "not_3d"),
            ((6, 5), "int16", "not_3d"),
            ((6, 5, 4), "complex64", "complex_pixels"),
            ((6, 5, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")], "vector_pixels"),
        ],
    )
    def test_volumes_that_are_not_scalar_are_refused(
        self, tmp_path: Path, shape: tuple[int, ...], dtype: object, check: str
    ) -> None:
        array = np.zeros(shape, np.dtype(dtype))  # type: ignore[call-overload]
        assert refusal(write_nifti_file(tmp_path / "a.nii", array, sform=affine())).check == check

    def test_a_fourth_dimension_of_one_is_dropped_and_a_channel_can_be_chosen(self, tmp_path: Path) -> None:
        volumes = np.stack([image_array(), image_array() + 200], axis=-1)
        one = write_nifti_file(tmp_path / "one.nii", volumes[..., :1], sform=affine())
        two = write_nifti_file(tmp_path / "two.nii", volumes, sform=affine())
        five = write_nifti_file(tmp_path / "five.nii", volumes[..., :1, np.newaxis], sform=affine())
        assert np.array_equal(as_stored(read_volume(five)).array.T, volumes[..., 0])
        assert np.array_equal(as_stored(read_volume(one)).array.T, volumes[..., 0])
        assert np.array_equal(as_stored(read_volume(two, channel=1)).array.T, volumes[..., 1])

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("kind", [Nifti1Header, Nifti2Header])
    def test_a_header_with_damaged_bytes_is_read_or_refused(self, tmp_path: Path, kind: type) -> None:
        rng = np.random.default_rng(0)
        whole = nifti_bytes(image_array(), sform=affine(), qform=affine(), kind=kind)
        numbers = [np.float32(value).tobytes() for value in (np.nan, np.inf, 0, -1, 1e30)] + [b"\xff\xff\xff\xff"]
        num_refused = 0
        for _ in range(300):
            content, at = bytearray(whole), 4 * int(rng.integers(10, 87))
            content[at : at + 4] = rng.choice(np.array(numbers, dtype=object))
            (tmp_path / "a.nii").write_bytes(content)
            try:
                read_volume(tmp_path / "a.nii")
            except VolumeError:
                num_refused += 1
        assert 30 < num_refused < 270

    def test_a_vox_offset_that_is_not_a_number_is_refused(self, tmp_path: Path) -> None:
        path = write_nifti_file(tmp_path / "a.nii", sform=affine(), vox_offset=np.nan)
        assert "NIfTI header cannot be used" in str(refusal(path))

    def test_nibabel_writes_nothing_to_stderr(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        read_volume(write_nifti_file(tmp_path / "a.nii", sform=affine(), bitpix=8, pixdim=pixdim(*SPACING_MM, qfac=0)))
        assert capfd.readouterr().err == ""
