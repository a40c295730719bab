"""Whatever a person points at becomes a list of studies with names of their own, or is refused in words."""

from pathlib import Path

import pytest

from prostate_seg.data.scans import find_scans
from prostate_seg.errors import InputError

DICOM = b"\0" * 128 + b"DICM" + b"rest"


def touch(root: Path, *names: str, content: bytes = b"") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def names(root: Path, pattern: str = "*") -> list[str]:
    return [scan.name for scan in find_scans(root, pattern=pattern)]


def test_a_file_is_one_study_named_without_its_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "10001_1.nii.gz")
    (scan,) = find_scans(tmp_path / "10001_1.nii.gz", pattern="*.mha")
    assert (scan.name, scan.is_dicom) == ("10001_1", False)


def test_a_folder_of_files_in_it_is_one_dicom_series(tmp_path: Path) -> None:
    touch(tmp_path / "series", "IM0001", "IM0002", content=DICOM)
    (scan,) = find_scans(tmp_path / "series", pattern="*")
    assert (scan.name, scan.is_dicom) == ("series", True)


def test_a_folder_of_patients_holds_files_and_series_of_any_depth(tmp_path: Path) -> None:
    touch(tmp_path, "a/t2.mha", "a/notes.txt", "b/visit 1/t2w.nii", ".hidden/x.mha", "b/DICOMDIR")
    touch(tmp_path, "c/study/axial/1.dcm", "c/study/axial/2.dcm")
    assert names(tmp_path) == ["a/t2", "b/visit 1/t2w", "c/study/axial"]


def test_pattern_chooses_by_file_name_or_by_the_folder_of_a_series(tmp_path: Path) -> None:
    touch(tmp_path, "1/1_t2w.mha", "1/1_adc.mha")
    touch(tmp_path, "2/ax_t2w/1.dcm", "2/dwi/1.dcm")
    assert names(tmp_path, "*_t2w.mha") == ["1/1_t2w"]
    assert names(tmp_path, "*t2w*") == ["1/1_t2w", "2/ax_t2w"]


def test_masks_of_a_data_set_are_no_studies(tmp_path: Path) -> None:
    touch(tmp_path, "t2w/images/1_1.mha", "t2w/masks/1_1.nii.gz")
    assert names(tmp_path) == ["t2w/images/1_1"]
    assert names(tmp_path / "t2w") == ["images/1_1"]


@pytest.mark.parametrize(
    ("files", "asked", "words"),
    [
        ([], "absent", "there is no file or folder"),
        (["notes.txt"], "", "no image file and no DICOM series lies in"),
        (["notes.txt"], "notes.txt", "is no image by its suffix"),
        (["a/1.mha", "a/1.nii.gz"], "", "a/1: 1.mha, 1.nii.gz"),
    ],
)
def test_what_is_no_list_of_studies_is_refused(tmp_path: Path, files: list[str], asked: str, words: str) -> None:
    touch(tmp_path, *files)
    with pytest.raises(InputError, match=r"predict\.input") as refusal:
        find_scans(tmp_path / asked, pattern="*")
    assert words in str(refusal.value)


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "1.mha")
    with pytest.raises(InputError, match=r"matches predict.pattern \*_t2w.mha"):
        find_scans(tmp_path, pattern="*_t2w.mha")
