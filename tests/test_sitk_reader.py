"""MetaImage and NRRD headers: a spacing that is not stated in mm is refused by its key, an absent orientation is a warning."""

from pathlib import Path

import numpy as np
import pytest

from prostate_seg.common.errors import VolumeError
from prostate_seg.imaging.image_io import read_volume

VOXELS = np.arange(120, dtype="<i2").tobytes()
AXES = "space directions: (0.5,0,0) (0,0.5,0) (0,0,3)\n"
LPS = "space: left-posterior-superior\n"
TRANSFORM = "TransformMatrix = 1 0 0 0 1 0 0 0 1\n"


def meta_image(path: Path, fields: str, *, sizes: str = "6 5 4") -> Path:
    """Write a .mha, or a .mhd with its voxels, of 6 x 5 x 4 voxels and these fields."""
    data = "LOCAL" if path.suffix == ".mha" else "a.raw"
    header = (
        f"ObjectType = Image\nNDims = {len(sizes.split())}\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        f"DimSize = {sizes}\n{fields}ElementType = MET_SHORT\nElementDataFile = {data}\n"
    )
    if path.suffix == ".mhd":
        (path.parent / "a.raw").write_bytes(VOXELS)
    path.write_bytes(header.encode() + (VOXELS if path.suffix == ".mha" else b""))
    return path


def nrrd(folder: Path, fields: str, *, sizes: str = "6 5 4") -> Path:
    """Write a .nrrd of 6 x 5 x 4 voxels and these fields."""
    size = f"dimension: {len(sizes.split())}\nsizes: {sizes}\n"
    header = f"NRRD0005\ntype: short\n{size}encoding: raw\nendian: little\n{fields}\n"
    (folder / "a.nrrd").write_bytes(header.encode() + VOXELS)
    return folder / "a.nrrd"


def refusal(path: Path) -> VolumeError:
    with pytest.raises(VolumeError) as caught:
        read_volume(path)
    return caught.value


def warnings(path: Path) -> list[str]:
    return [warning.check for warning in read_volume(path).warnings]


class TestMetaImage:
    @pytest.mark.parametrize("name", ["a.mha", "a.mhd"])
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ("", "ElementSpacing is absent"),
            ("elementspacing = 0.5 0.5 3\n", "ElementSpacing is absent"),
            (
                "ElementSize = 0.5 0.5 3\n",
                "ElementSpacing is absent from the header (ElementSize is the size of a voxel",
            ),
            ("ElementSpacing = 0,5 0,5 3,0\n", "ElementSpacing is 0,5 0,5 3,0"),
            ("ElementSpacing = 0.5, 0.5, 3.0\n", "ElementSpacing is 0.5, 0.5, 3.0"),
            ("ElementSpacing = 0.5 0.5 0\n", "ElementSpacing is 0.5 0.5 0"),
            ("ElementSpacing = 0.5 0.5 -3\n", "ElementSpacing is 0.5 0.5 -3"),
            ("ElementSpacing = 0.5 0.5 nan\n", "ElementSpacing is 0.5 0.5 nan"),
            ("ElementSpacing = 0.5 0.5 inf\n", "ElementSpacing is 0.5 0.5 inf"),
            ("ElementSpacing = 0.5 0.5\n", "ElementSpacing is 0.5 0.5;"),
            ("ElementSpacing =\n", "ElementSpacing is empty"),
            ("ElementSpacing = 0.5 0.5 3\nElementSpacing = x y z\n", "ElementSpacing is x y z"),
        ],
    )
    def test_an_absent_spacing_is_refused_with_its_key(
        self, tmp_path: Path, name: str, fields: str, message: str
    ) -> None:
        error = refusal(meta_image(tmp_path / name, fields + TRANSFORM))
        assert error.check == "no_spacing"
        assert message in str(error)

    @pytest.mark.parametrize(
        "line", ["ElementSpacing = 0.5 0.5 3\r\n", "  ElementSpacing: 0.5\t0.5 3 \n", "ElementSpacing=5e-1 .5 3\n"]
    )
    def test_a_spacing_is_read_in_every_notation(self, tmp_path: Path, line: str) -> None:
        path = meta_image(tmp_path / "a.mha", line + TRANSFORM)
        assert read_volume(path).geometry.spacing_mm == (3, 0.5, 0.5)
        assert warnings(path) == []

    @pytest.mark.parametrize(("unit", "is_read"), [("cm", False), ("um", False), ("mm", True), ("?", True)])
    def test_only_mm_is_read(self, tmp_path: Path, unit: str, is_read: bool) -> None:
        path = meta_image(tmp_path / "a.mha", f"DistanceUnits = {unit}\nElementSpacing = 0.5 0.5 3\n{TRANSFORM}")
        if is_read:
            assert read_volume(path).geometry.spacing_mm == (3, 0.5, 0.5)
        else:
            error = refusal(path)
            assert error.check == "not_in_mm"
            assert f"DistanceUnits is {unit}" in str(error)

    @pytest.mark.parametrize(
        "line",
        ["Offset = 1,5 2 3\n", "Position = 1 x 3\n", "TransformMatrix = 1 0 0 0 1 0 0 0 1,0\n", "Origin = nan 0 0\n"],
    )
    def test_a_position_that_is_not_a_number_is_refused_with_its_key(self, tmp_path: Path, line: str) -> None:
        error = refusal(meta_image(tmp_path / "a.mha", "ElementSpacing = 0.5 0.5 3\n" + line))
        assert error.check == "implausible_grid"
        assert line.split()[0] in str(error)

    @pytest.mark.parametrize("key", ["TransformMatrix", "Rotation", "Orientation", None])
    def test_an_absent_orientation_is_a_warning(self, tmp_path: Path, key: str | None) -> None:
        line = "" if key is None else f"{key} = 1 0 0 0 1 0 0 0 1\n"
        path = meta_image(tmp_path / "a.mha", f"ElementSpacing = 0.5 0.5 3\n{line}")
        assert warnings(path) == (["no_orientation"] if key is None else [])

    def test_a_single_image_is_refused_as_such(self, tmp_path: Path) -> None:
        assert refusal(meta_image(tmp_path / "a.mha", "ElementSpacing = 1 1\n", sizes="6 20")).check == "not_3d"


class TestNrrd:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ("", "neither space directions nor spacings"),
            ("axis mins: 0 0 0\naxis maxs: 3 2.5 12\n", "neither space directions nor spacings"),
            ("thicknesses: nan nan 3\n", "neither space directions nor spacings"),
            (LPS, "space is left-posterior-superior without space directions"),
            (LPS + "spacings: 0.5 0.5 3\n", "space is left-posterior-superior without space directions"),
            ("spacings: 0,5 0,5 3\n", "spacings is 0,5 0,5 3"),
            ("spacings: nan nan nan\n", "spacings is nan nan nan"),
            ("spacings: 0.5 0.5 nan\n", "spacings is 0.5 0.5 nan"),
            ("spacings: 0.5 0.5 -3\n", "spacings is 0.5 0.5 -3"),
            ("spacings: 0.5 0.5 0\n", "spacings is 0.5 0.5 0"),
            (LPS + "space directions: (0.5,0,0) (0,0.5,0) none\n", "space directions are (0.5,0,0) (0,0.5,0) none"),
            (LPS + "space directions: (0.5,0,0) (0,0.5,0) (0,0,nan)\n", "(0,0,nan)"),
            (LPS + "space directions: (0.5,0,0) (0,0.5,0) (0,0,0)\n", "(0,0,0)"),
            (LPS + "space directions: (0,5,0,0) (0,0,5,0) (0,0,3)\n", "space directions are (0,5,0,0)"),
        ],
    )
    def test_an_absent_spacing_is_refused_with_its_key(self, tmp_path: Path, fields: str, message: str) -> None:
        error = refusal(nrrd(tmp_path, fields))
        assert error.check == "no_spacing"
        assert message in str(error)

    @pytest.mark.parametrize("unit", ["cm", "m", "um", "µm", "in"])
    @pytest.mark.parametrize("fields", [LPS + AXES + "space units", "spacings: 0.5 0.5 3\nunits"])
    def test_another_unit_than_mm_is_refused(self, tmp_path: Path, fields: str, unit: str) -> None:
        error = refusal(nrrd(tmp_path, f'{fields}: "{unit}" "{unit}" "{unit}"\n'))
        assert error.check == "not_in_mm"
        assert f"units is {unit};" in str(error)

    @pytest.mark.parametrize("unit", ["mm", "millimeter", ""])
    def test_mm_and_no_unit_are_read(self, tmp_path: Path, unit: str) -> None:
        path = nrrd(tmp_path, LPS + AXES + f'space units: "{unit}" "{unit}" "{unit}"\n')
        assert read_volume(path).geometry.spacing_mm == (3, 0.5, 0.5)
        assert warnings(path) == []

    @pytest.mark.parametrize(
        ("space", "origin"), [("LPS", (1, 2, 3)), ("right-anterior-superior", (-3.5, -4, 3)), ("LAS", (1, -4, 3))]
    )
    def test_patient_spaces_are_converted_to_lps(
        self, tmp_path: Path, space: str, origin: tuple[float, float, float]
    ) -> None:
        """The first voxel of a RAS file, at (1, 2, 3) RAS, is the last along x and y in LPS."""
        path = nrrd(tmp_path, f"space: {space}\n{AXES}space origin: (1,2,3)\n")
        assert read_volume(path).geometry.origin_mm == pytest.approx(origin)
        assert warnings(path) == []

    @pytest.mark.parametrize(
        "fields",
        [
            "spacings: 0.5 0.5 3\n",
            f"space: scanner-xyz\n{AXES}",
            f"space: 3D-right-handed\n{AXES}",
            f"space dimension: 3\n{AXES}",
        ],
    )
    def test_a_space_without_a_patient_is_a_warning(self, tmp_path: Path, fields: str) -> None:
        path = nrrd(tmp_path, fields)
        assert warnings(path) == ["no_orientation"]
        assert read_volume(path).geometry.spacing_mm == (3, 0.5, 0.5)

    @pytest.mark.parametrize(
        ("fields", "sizes"),
        [
            (LPS + "space directions: none (0.5,0,0) (0,0.5,0) (0,0,3)\nkinds: list domain domain domain\n", "1 6 5 4"),
            (LPS + "space directions: (0.5,0,0) (0,0.5,0) (0,0,3) none\nkinds: domain domain domain list\n", "6 5 4 1"),
            ("spacings: 0.5 0.5 3 nan\n", "6 5 4 1"),
        ],
    )
    def test_axes_of_length_one_outside_of_space_need_no_spacing(self, tmp_path: Path, fields: str, sizes: str) -> None:
        assert read_volume(nrrd(tmp_path, fields, sizes=sizes)).geometry.spacing_mm == (3, 0.5, 0.5)

    def test_comments_and_key_values_are_not_fields(self, tmp_path: Path) -> None:
        path = nrrd(tmp_path, f'# spacings: 1 1 1\nunits:=cm\nspace units:="cm"\n{LPS}{AXES}')
        assert read_volume(path).geometry.spacing_mm == (3, 0.5, 0.5)
