"""Any input becomes a list of studies with unique names, or is refused with a message."""

import json
import os
from pathlib import Path

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from prostate_seg.common.errors import InputError
from prostate_seg.data.scans import ScanList, find_scans

DICOM = b"\0" * 128 + b"DICM" + b"rest"


def touch(root: Path, *names: str, content: bytes = b"") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def names(root: Path, pattern: str = "*") -> list[str]:
    return [scan.name for scan in find_scans(root, pattern=pattern).scans]


def test_a_file_is_one_study_named_without_its_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "10001_1.nii.gz")
    (scan,) = find_scans(tmp_path / "10001_1.nii.gz", pattern="*.mha").scans
    assert (scan.name, scan.is_dicom) == ("10001_1", False)


def test_a_folder_of_dicom_files_is_one_series(tmp_path: Path) -> None:
    touch(tmp_path / "series", "IM0001", "IM0002", content=DICOM)
    (scan,) = find_scans(tmp_path / "series", pattern="*").scans
    assert (scan.name, scan.is_dicom) == ("series", True)


def test_a_folder_of_patients_contains_files_and_series_at_any_depth(tmp_path: Path) -> None:
    touch(tmp_path, "a/t2.mha", "a/notes.txt", "b/visit 1/t2w.nii", ".hidden/x.mha", "b/DICOMDIR")
    touch(tmp_path, "c/study/axial/1.dcm", "c/study/axial/2.dcm")
    assert names(tmp_path) == ["a/t2", "b/visit 1/t2w", "c/study/axial"]


def test_pattern_selects_by_file_name_or_by_the_folder_of_a_series(tmp_path: Path) -> None:
    touch(tmp_path, "1/1_t2w.mha", "1/1_adc.mha")
    touch(tmp_path, "2/ax_t2w/1.dcm", "2/dwi/1.dcm")
    assert names(tmp_path, "*_t2w.mha") == ["1/1_t2w"]
    assert names(tmp_path, "*t2w*") == ["1/1_t2w", "2/ax_t2w"]


def test_masks_of_a_data_set_are_not_studies(tmp_path: Path) -> None:
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
def test_inputs_without_studies_are_refused(tmp_path: Path, files: list[str], asked: str, words: str) -> None:
    touch(tmp_path, *files)
    with pytest.raises(InputError, match=r"predict\.input") as refusal:
        find_scans(tmp_path / asked, pattern="*")
    assert words in str(refusal.value)


def test_a_pattern_without_matches_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "1.mha")
    with pytest.raises(InputError, match=r"matches predict.pattern \*_t2w.mha"):
        find_scans(tmp_path, pattern="*_t2w.mha")


def left_out(found: ScanList) -> str:
    return "\n".join(found.left_out_lines)


def nnunet_set(root: Path, *, t2_is: int = 0) -> None:
    images = [f"case_{case}_000{channel}.nii.gz" for case in (1, 2) for channel in range(3)]
    touch(root / "imagesTr", *images, "case_3.nii.gz")
    touch(root / "imagesTs", *images)
    touch(root, "labelsTr/case_1.nii.gz", "labelsTs/case_1.nii.gz")
    channels = {str((t2_is + number) % 3): name for number, name in enumerate(("T2", "ADC", "HBV"))}
    (root / "dataset.json").write_text(json.dumps({"channel_names": channels}))


def test_only_the_t2_channel_of_nnunet_image_folders_is_selected(tmp_path: Path) -> None:
    nnunet_set(tmp_path, t2_is=1)
    found = find_scans(tmp_path, pattern="*")
    assert [scan.name for scan in found.scans] == [
        "imagesTr/case_1_0001",
        "imagesTr/case_2_0001",
        "imagesTs/case_1_0001",
        "imagesTs/case_2_0001",
    ]
    assert "imagesTs/, sub-*/): labelsTr, labelsTs" in left_out(found)
    assert "left out: 8 of other channels than T2: imagesTr/case_1_0000.nii.gz" in left_out(found)
    assert "left out: 1 without the number of a channel, such as _0000" in left_out(found)


@pytest.mark.parametrize("folder", ["imagesTr", "imagesTs"])
def test_channels_are_recognised_in_a_single_nnunet_folder(tmp_path: Path, folder: str) -> None:
    nnunet_set(tmp_path)
    assert names(tmp_path / folder) == ["case_1_0000", "case_2_0000"]
    assert names(tmp_path / folder, "*_0001.*") == ["case_1_0001", "case_2_0001"]


@pytest.mark.parametrize("folder", ["imagesTs", "for nnUNetv2_predict"])
def test_unnamed_channels_are_refused_with_a_pattern_that_selects_one(tmp_path: Path, folder: str) -> None:
    touch(tmp_path / folder, "a_0000.nii.gz", "a_0001.nii.gz")
    with pytest.raises(InputError, match=r"channels 0000, 0001 T2, names nothing(.|\n)*predict\.pattern='\*_0000\.\*'"):
        names(tmp_path / folder)
    assert names(tmp_path / folder, "*_0000.*") == ["a_0000"]


def test_a_folder_without_the_t2_channel_is_refused(tmp_path: Path) -> None:
    nnunet_set(tmp_path)
    for folder in ("imagesTr", "imagesTs"):
        for path in (tmp_path / folder).iterdir():
            if not path.name.endswith("_0001.nii.gz"):
                path.unlink()
    with pytest.raises(InputError, match="one of the channels 0001 T2, names 0000 T2, 0001 ADC"):
        names(tmp_path)
    assert names(tmp_path / "imagesTs", "*_0001.*") == ["case_1_0001", "case_2_0001"]


def test_study_numbers_are_not_channels(tmp_path: Path) -> None:
    touch(tmp_path, "patient_0001.nii.gz", "patient_0002.nii.gz", "10001_1000.mha")
    assert names(tmp_path) == ["10001_1000", "patient_0001", "patient_0002"]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("", ["sub-01/anat/sub-01_T2w", "sub-02/ses-1/anat/sub-02_ses-1_T2w"]),
        ("sub-01", ["anat/sub-01_T2w"]),
        ("sub-01/anat", ["sub-01_T2w"]),
        ("..", ["bids/sub-01/anat/sub-01_T2w", "bids/sub-02/ses-1/anat/sub-02_ses-1_T2w"]),
    ],
)
def test_only_t2w_images_of_bids_are_selected_at_any_level(tmp_path: Path, part: str, expected: list[str]) -> None:
    touch(
        tmp_path / "bids",
        "sub-01/anat/sub-01_T2w.nii.gz",
        "sub-01/anat/sub-01_acq-sag_T2w.nii.gz",
        "sub-01/anat/sub-01_PDw.nii.gz",
    )
    touch(tmp_path / "bids", "sub-01/dwi/sub-01_dwi.nii.gz", "sub-02/ses-1/anat/sub-02_ses-1_T2w.nii.gz")
    touch(tmp_path / "bids", "derivatives/manual/sub-01/anat/sub-01_mask.nii.gz", "sourcedata/sub-01/t2.nii.gz")
    assert names(tmp_path / "bids" / part) == expected


def test_images_of_a_data_set_can_have_any_name(tmp_path: Path) -> None:
    touch(tmp_path, "set/images/prostate_seg_1.mha", "set/masks/prostate_seg_1.nii.gz", "set/extra/prostate_2.mha")
    assert names(tmp_path / "set" / "images") == ["prostate_seg_1"]
    found = find_scans(tmp_path, pattern="*")
    assert [scan.name for scan in found.scans] == ["set/images/prostate_seg_1"]
    assert "left out: 2 outside the image folders of data sets (" in left_out(found)
    assert "): set/extra, set/masks" in left_out(found)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["10001_1.nii.gz", "10001_1_mask.nii.gz", "10001_1_seg.nii.gz", "10001_1-label.nii.gz"], ["10001_1"]),
        (["1/t2.nii.gz", "1/adc.nii.gz", "1/dwi.nii.gz", "1/t2_anatomy_reader1.nii.gz", "1/t2_tumor_reader1.nii.gz"], ["1/t2"]),
        ([f"10000_1000000_{name}.mha" for name in ("t2w", "adc", "hbv", "cor", "sag")], ["10000_1000000_t2w"]),
        (["Case00.mhd", "Case00_segmentation.mhd"], ["Case00"]),
        (["p/T2/a.nii", "p/ADC/a.nii", "p/DWI b1400/a.nii", "p/T2 masks/a.nii", "Segmentations/a.nii"], ["p/T2/a"]),
        (["MR T2 DWI DCE/t2.nii", "MR T2 DWI DCE/t1.nii", "MR T2 DWI DCE/B800.nii"], ["MR T2 DWI DCE/t2"]),
        (["B1013.nii", "Masking_1.nii", "correction.nii", "t2_trace.nii"], ["B1013", "Masking_1", "correction", "t2_trace"]),
    ],
)  # fmt: skip
def test_masks_and_other_sequences_are_recognised_by_name(
    tmp_path: Path, files: list[str], expected: list[str]
) -> None:
    touch(tmp_path, *files)
    found = find_scans(tmp_path, pattern="*")
    assert [scan.name for scan in found.scans] == expected
    assert bool(found.left_out) == (len(files) > len(expected))


def test_excluded_files_are_listed_with_the_reason(tmp_path: Path) -> None:
    touch(tmp_path, "t2.mha", *(f"{number}_adc.mha" for number in range(7)), "scan.zip", "old.hdr")
    lines = find_scans(tmp_path, pattern="*").left_out_lines
    assert lines == [
        "left out: 2 archives or files of formats that are not read (unpack or convert them): old.hdr, scan.zip",
        "left out: 7 other sequences or planes by their name (predict.pattern with the same word takes them): "
        "0_adc.mha, 1_adc.mha, 2_adc.mha, 3_adc.mha, 4_adc.mha and 2 more",
    ]


def test_a_matching_pattern_and_a_single_file_are_always_selected(tmp_path: Path) -> None:
    touch(tmp_path, "1_sag.mha", "1_adc.mha", "1_t2w.mha")
    assert names(tmp_path, "*_sag.mha") == ["1_sag"]
    assert names(tmp_path / "1_adc.mha") == ["1_adc"]


def test_only_other_sequences_are_refused_with_the_excluded_files(tmp_path: Path) -> None:
    touch(tmp_path, "1_adc.mha")
    with pytest.raises(InputError, match=r"no image file(.|\n)*left out: 1 other sequences .*1_adc\.mha"):
        names(tmp_path)


def earlier_output(folder: Path) -> None:
    touch(folder, "masks/a/1.mha", "overlays/a/1.png", "records/a/1.json", "dicom_seg/s.dcm", "volumes.csv")


@pytest.mark.parametrize("place", [".", "predictions", "a/old results"])
def test_outputs_of_earlier_predictions_are_no_input(tmp_path: Path, place: str) -> None:
    touch(tmp_path, "a/1.mha", "2.mha")
    earlier_output(tmp_path / place)
    assert names(tmp_path) == ["2", "a/1"]
    with pytest.raises(InputError, match="results of an earlier prediction"):
        names(tmp_path / place / "masks")


def test_an_output_with_masks_only_is_no_input(tmp_path: Path) -> None:
    touch(tmp_path, "1.mha", "out/overlays/1.mha")
    assert [scan.name for scan in find_scans(tmp_path, pattern="*", output=tmp_path / "out").scans] == ["1"]


def test_only_the_originals_of_a_workspace_are_selected(tmp_path: Path) -> None:
    touch(tmp_path, "data/images/1_1.mha", "data/masks/1_1.nii.gz")
    touch(tmp_path, "preprocess/contract.json", "preprocess/images/1_1.nii.gz", "preprocess/masks/1_1.nii.gz")
    touch(tmp_path, "evaluation/cases.csv", "evaluation/masks/fold0/1_1.nii.gz")
    touch(tmp_path, "venv/pyvenv.cfg", "venv/lib/nibabel/tests/data/example.nii.gz")
    earlier_output(tmp_path / "predictions")
    assert names(tmp_path) == ["data/images/1_1"]


@pytest.mark.parametrize("folder", ["set/masks", "nnunet/labelsTr"])
def test_a_folder_of_reference_masks_is_refused(tmp_path: Path, folder: str) -> None:
    touch(tmp_path, "set/images/1.mha", "set/masks/1.mha", "nnunet/imagesTr/1_0000.mha", "nnunet/labelsTr/1.mha")
    with pytest.raises(InputError, match="holds reference masks, and images are segmented"):
        names(tmp_path / folder)


def test_each_real_file_and_folder_is_selected_once_by_its_own_name(tmp_path: Path) -> None:
    touch(tmp_path / "in", "b/1.mha", "b/series/1.dcm")
    (tmp_path / "in" / "a").symlink_to("b")
    (tmp_path / "in" / "a.mha").symlink_to("b/1.mha")
    (tmp_path / "in" / "b" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "b" / "up").symlink_to(tmp_path)
    found = find_scans(tmp_path / "in", pattern="*")
    assert [scan.name for scan in found.scans] == ["b/1", "b/series"]
    assert "links to what is listed already, or back to predict.input: a, a.mha, b/back, b/up" in left_out(found)


def test_links_to_other_folders_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path / "archive", "x/series/1.dcm", "x/2.mha", "labelsTr/1.mha")
    (tmp_path / "archive" / "x" / "loop").symlink_to(tmp_path / "archive" / "x")
    (tmp_path / "in").mkdir()
    for name, target in (("p1", "x"), ("p2", "x/series"), ("p3", "x"), ("refs", "labelsTr")):
        (tmp_path / "in" / name).symlink_to(tmp_path / "archive" / target)
    found = find_scans(tmp_path / "in", pattern="*")
    assert [scan.name for scan in found.scans] == ["p1/2", "p1/series"]
    assert "masks by their name" in left_out(found)


def test_broken_links_are_reported(tmp_path: Path) -> None:
    touch(tmp_path, "1.mha")
    for name, target in (("2.mha", "gone.mha"), ("series", "/absent"), ("circle", "circle"), ("notes.txt", "gone.txt")):
        (tmp_path / name).symlink_to(target)
    found = find_scans(tmp_path, pattern="*")
    assert [scan.name for scan in found.scans] == ["1"]
    assert found.unreadable == {
        "2.mha": "broken link to gone.mha; restore or remove it",
        "circle": "broken link to circle; restore or remove it",
        "series": "broken link to /absent; restore or remove it",
    }
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(InputError, match="which is a broken link to gone"):
        names(tmp_path / "link")


def test_unreadable_folders_and_files_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "1.mha", "closed/2.mha", "closed too/IM0001")
    real_iterdir, real_open = Path.iterdir, Path.open

    def refuse(path: Path) -> None:
        if path.name in ("closed", "IM0001"):
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", lambda path: (refuse(path), real_iterdir(path))[1])
    monkeypatch.setattr(Path, "open", lambda path, *args, **more: (refuse(path), real_open(path, *args, **more))[1])
    found = find_scans(tmp_path, pattern="*")
    assert [scan.name for scan in found.scans] == ["1"]
    assert set(found.unreadable) == {"closed", "closed too/IM0001"}
    assert "cannot be read (Permission denied)" in found.unreadable["closed"]


def test_names_can_contain_any_character(tmp_path: Path) -> None:
    odd = ["a (1)", "a=b", "a#1", "O'Neil", "Müller ä", "two\nlines", 'comma, and "quotes"', "$x$"]
    touch(tmp_path, *(f"{name}.nii.gz" for name in odd))
    assert names(tmp_path) == sorted(odd)


def test_a_name_that_is_not_utf8_is_reported(tmp_path: Path) -> None:
    touch(tmp_path, "1.mha")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller.mha")).touch()
    assert find_scans(tmp_path, pattern="*").unreadable == {"M\\xfcller.mha": "its name is not in UTF-8; rename it"}


def write_dicom(path: Path, modality: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    one = Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one.SOPClassUID, one.SOPInstanceUID, one.Modality = "1.2.840.10008.5.1.4.1.1.4", "1.2.3", modality
    one.save_as(path, enforce_file_format=True)


def test_dicom_objects_other_than_mr_images_are_excluded(tmp_path: Path) -> None:
    write_dicom(tmp_path / "1" / "t2" / "1.dcm", "MR")
    write_dicom(tmp_path / "1" / "result" / "1.dcm", "SEG")
    write_dicom(tmp_path / "1" / "t2 and object" / "0.dcm", "SEG")
    write_dicom(tmp_path / "1" / "t2 and object" / "1.dcm", "MR")
    write_dicom(tmp_path / "1" / "t2_tse_sag" / "1.dcm", "MR")
    found = find_scans(tmp_path, pattern="*")
    assert [scan.name for scan in found.scans] == ["1/t2", "1/t2 and object"]
    assert "left out: 1 DICOM objects of modality SEG, not MR: 1/result" in left_out(found)
    assert "1/t2_tse_sag" in left_out(found)
    assert names(tmp_path / "1" / "result") == ["result"]  # given as a single file


def test_a_series_above_patient_folders_is_one_study(tmp_path: Path) -> None:
    touch(tmp_path / "all", "stray.dcm", "a/1.dcm", "b/t2.mha")
    assert names(tmp_path / "all") == ["a", "all", "b/t2"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("IM0001", DICOM, "is one DICOM file, and a study is the folder"),
        ("slice.dcm", b"", "is one DICOM file, and a study is the folder"),
        ("scans.zip", b"PK", "is an archive; unpack it"),
        ("scans.tar.gz", b"", "is an archive; unpack it"),
    ],
)
def test_a_single_file_that_is_not_a_study_is_refused_with_the_next_step(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    touch(tmp_path, name, content=content)
    with pytest.raises(InputError, match=words):
        names(tmp_path / name)
