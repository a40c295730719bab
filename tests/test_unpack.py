"""Archives: only selected members are extracted, none outside of the folder, and interrupted unpacking resumes."""

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from prostate_seg.common.errors import InputError
from prostate_seg.data.public.unpack import Rule, unpack
from prostate_seg.imaging.image_io import read_volume

IMAGES = Rule(member=r"([0-9]+_[0-9]+)_t2w\.mha", target="images/{}.mha")
MASKS = Rule(member=r"gland/([0-9]+_[0-9]+)\.nii\.gz", target="masks/{}.nii.gz", with_image_only=True)


def packed(path: Path, members: Mapping[str, bytes]) -> Path:
    """Create a .zip or .tar archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    return path


def taken(archive: Path, folder: Path, *rules: Rule) -> list[str]:
    return unpack(archive, folder, rules=rules, advance=lambda *_: None)


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_only_selected_series_are_extracted(tmp_path: Path, suffix: str) -> None:
    members = {"10000/10000_1000000_t2w.mha": b"t2", "10000/10000_1000000_adc.mha": b"adc", "README.md": b"x"}
    archive = packed(tmp_path / f"a{suffix}", members)
    assert taken(archive, tmp_path / "data", IMAGES) == ["images/10000_1000000.mha"]
    files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert [(path.name, path.read_bytes()) for path in files] == [("10000_1000000.mha", b"t2")]


def test_only_masks_of_existing_studies_are_extracted(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1_1.mha").touch()
    archive = packed(tmp_path / "a.zip", {"x/gland/1_1.nii.gz": b"1", "x/gland/2_2.nii.gz": b"2"})
    assert taken(archive, tmp_path, MASKS) == ["masks/1_1.nii.gz"]
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["1_1.nii.gz"]


def test_existing_files_are_kept_and_incomplete_ones_replaced(tmp_path: Path) -> None:
    archive = packed(tmp_path / "a.zip", {"1_1_t2w.mha": b"one", "2_2_t2w.mha": b"two"})
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1_1.mha").write_bytes(b"ONE")
    (tmp_path / "images" / "2_2.mha").write_bytes(b"t")
    counted: list[tuple[int, int]] = []
    written = unpack(archive, tmp_path, rules=[IMAGES], advance=lambda *numbers: counted.append(numbers))
    assert written == ["images/1_1.mha", "images/2_2.mha"]
    assert counted == [(1, 2), (2, 2)]
    assert (tmp_path / "images" / "1_1.mha").read_bytes() == b"ONE"
    assert (tmp_path / "images" / "2_2.mha").read_bytes() == b"two"


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
@pytest.mark.parametrize(
    "name", ["../1_1_t2w.mha", "/etc/1_1_t2w.mha", "a/../../x.txt", "..\\1_1_t2w.mha", "C:/1_1_t2w.mha"]
)
def test_a_member_outside_the_archives_folder_is_refused(tmp_path: Path, suffix: str, name: str) -> None:
    archive = packed(tmp_path / "in" / f"a{suffix}", {"1_1_t2w.mha": b"fine", name: b"evil"})
    with pytest.raises(InputError, match="must lie inside the archive's folder, and .*nothing was unpacked"):
        taken(archive, tmp_path / "in" / "data", IMAGES)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [archive.name]


def test_a_symbolic_link_in_an_archive_is_not_followed(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("1_1_t2w.mha")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(InputError, match="has no file such as"):
        taken(tmp_path / "a.tar", tmp_path / "data", IMAGES)


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_a_damaged_archive_is_reported_and_leaves_no_partial_file(tmp_path: Path, suffix: str) -> None:
    content = np.random.default_rng(0).bytes(200_000)
    archive = packed(tmp_path / f"a{suffix}", {"1_1_t2w.mha": content})
    archive.write_bytes(archive.read_bytes()[:100_000])
    with pytest.raises(InputError, match="is damaged or incomplete"):
        taken(archive, tmp_path / "data", IMAGES)
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


def test_a_flipped_bit_is_detected(tmp_path: Path) -> None:
    archive = packed(tmp_path / "a.zip", {"1_1_t2w.mha": np.random.default_rng(0).bytes(5000)})
    damaged = bytearray(archive.read_bytes())
    damaged[2000] ^= 1
    archive.write_bytes(damaged)
    with pytest.raises(InputError, match="is damaged or incomplete"):
        taken(archive, tmp_path / "data", IMAGES)
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


def test_an_archive_without_selected_members_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no file such as .*_t2w.*; its source has changed its layout"):
        taken(packed(tmp_path / "a.zip", {"a.txt": b"x"}), tmp_path, IMAGES)


def test_a_disk_that_is_too_small_is_reported_before_the_first_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prostate_seg.data.public.download.MARGIN_BYTES", 1 << 60)
    archive = packed(tmp_path / "a.zip", {"1_1_t2w.mha": b"1"})
    with pytest.raises(InputError, match=r"unpacking a\.zip needs .*\n.*: data\.root=DIR"):
        taken(archive, tmp_path / "data", IMAGES)
    assert not (tmp_path / "data").exists()


def four_dimensional(path: Path) -> np.ndarray:
    """Write two channels on an oblique grid, as the Decathlon does; return their voxels [C, Z, Y, X]."""
    voxels = np.random.default_rng(1).integers(0, 900, size=(2, 5, 12, 10)).astype(np.float32)
    parts = [sitk.GetImageFromArray(channel) for channel in voxels]
    for part in parts:
        part.SetSpacing((0.6, 0.6, 3.6))
        part.SetOrigin((10.0, -20.0, 30.0))
        part.SetDirection((1, 0, 0, 0, 0.96, -0.28, 0, 0.28, 0.96))
    sitk.WriteImage(sitk.JoinSeries(parts), str(path))
    return voxels


def test_one_channel_of_a_four_dimensional_image_is_split_out_on_its_own_grid(tmp_path: Path) -> None:
    voxels = four_dimensional(tmp_path / "four.nii.gz")
    archive = packed(tmp_path / "a.tar", {"T/imagesTr/prostate_07.nii.gz": (tmp_path / "four.nii.gz").read_bytes()})
    for channel in (0, 1):
        rule = Rule(member=r"imagesTr/prostate_([0-9]+)\.nii\.gz", target="images/p-{}.nii.gz", channel=channel)
        assert taken(archive, tmp_path / str(channel), rule) == ["images/p-07.nii.gz"]
        volume = read_volume(tmp_path / str(channel) / "images" / "p-07.nii.gz")
        assert np.array_equal(volume.array, voxels[channel])
        assert volume.geometry.spacing_mm == pytest.approx((3.6, 0.6, 0.6), rel=1e-6)
        assert volume.geometry.origin_mm == pytest.approx((10.0, -20.0, 30.0), rel=1e-5)
        assert volume.geometry.direction == pytest.approx((1, 0, 0, 0, 0.96, -0.28, 0, 0.28, 0.96), abs=1e-6)
        assert sorted(path.name for path in (tmp_path / str(channel)).iterdir()) == ["images"]


def test_a_missing_channel_is_refused_with_the_name_of_the_file(tmp_path: Path) -> None:
    four_dimensional(tmp_path / "four.nii.gz")
    archive = packed(tmp_path / "a.tar", {"imagesTr/prostate_07.nii.gz": (tmp_path / "four.nii.gz").read_bytes()})
    rule = Rule(member=r"imagesTr/prostate_([0-9]+)\.nii\.gz", target="images/{}.nii.gz", channel=2)
    with pytest.raises(InputError, match=r"imagesTr/prostate_07\.nii\.gz: a volume has three dimensions"):
        taken(archive, tmp_path, rule)
