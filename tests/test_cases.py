"""Discovery of cases: pairs by name, a finding for every file without a partner, and attributes from cases.csv."""

import re
import unicodedata
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.data.cases import RESERVED, Case, discover_cases, read_attributes
from prostate_seg.data.dataset import OWN_COLUMNS
from prostate_seg.imaging.geometry import Finding
from prostate_seg.segmentation.metrics import CaseMetrics

PATTERN = "^([^_]+)"


def folder_with(
    root: Path, *, images: Collection[str] = ("1_1.mha",), masks: Collection[str] = ("1_1.nii.gz",)
) -> Path:
    """Create empty files; a name that ends in a slash becomes a folder."""
    for folder, names in (("images", images), ("masks", masks)):
        (root / folder).mkdir(parents=True)
        for name in names:
            path = root / folder / name
            path.mkdir() if name.endswith("/") else path.touch()
    return root


def discover(
    root: Path, *, patient_pattern: str = PATTERN, exclude: Collection[str] = (), **options: bool
) -> tuple[list[Case], list[Finding]]:
    return discover_cases(root, patient_pattern=patient_pattern, exclude=exclude, **options)


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def ids(cases: list[Case]) -> list[str]:
    return [case.case_id for case in cases]


def test_image_and_mask_of_one_name_are_a_case(tmp_path: Path) -> None:
    folder_with(tmp_path, images=["20_7.NII.GZ", "10_3.mha"], masks=["10_3.nii.gz", "20_7.nrrd"])
    cases, findings = discover(tmp_path)
    assert findings == []
    assert cases == [
        Case(
            case_id="10_3",
            patient_id="10",
            study_id="3",
            image=tmp_path / "images" / "10_3.mha",
            mask=tmp_path / "masks" / "10_3.nii.gz",
        ),
        Case(
            case_id="20_7",
            patient_id="20",
            study_id="7",
            image=tmp_path / "images" / "20_7.NII.GZ",
            mask=tmp_path / "masks" / "20_7.nrrd",
        ),
    ]


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nii", ".nii.gz", ".nrrd", ".Nrrd", ".MHA"])
def test_every_suffix_is_removed_completely(tmp_path: Path, suffix: str) -> None:
    cases, findings = discover(folder_with(tmp_path, images=[f"1_1{suffix}"]))
    assert (ids(cases), findings) == (["1_1"], [])


def test_a_folder_can_be_an_image(tmp_path: Path) -> None:
    cases, findings = discover(folder_with(tmp_path, images=["1_1/", "2.5_1/"], masks=["1_1.mha", "2.5_1.mha"]))
    assert findings == []
    assert [case.image.name for case in cases] == ["1_1", "2.5_1"]


def test_dots_and_spaces_are_part_of_the_name(tmp_path: Path) -> None:
    names = ["a.b 1.5T_é ü.mha"]
    cases, findings = discover(folder_with(tmp_path, images=names, masks=names))
    assert (ids(cases), findings) == (["a.b 1.5T_é ü"], [])


def test_names_are_compared_in_normalised_unicode(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Müller_Bérénice") for form in ("NFC", "NFD"))
    assert composed != decomposed
    folder_with(tmp_path, images=[f"{decomposed}.mha"], masks=[f"{composed}.nii.gz"])
    cases, findings = discover(tmp_path)
    assert (ids(cases), findings) == ([composed], [])
    assert cases[0].patient_id == "Müller"
    assert cases[0].image.is_file()
    assert discover(tmp_path, exclude=[decomposed]) == ([], [])


def test_an_image_without_mask_is_an_error_only_where_masks_are_needed(tmp_path: Path) -> None:
    folder_with(tmp_path, images=["1_1.mha", "2_1.mha"])
    cases, findings = discover(tmp_path)
    assert ids(cases) == ["1_1"]
    finding = only(findings)
    assert (finding.check, finding.case_id, finding.is_error) == ("image_without_mask", "2_1", True)
    assert "images/2_1.mha" in finding.message
    cases, findings = discover(tmp_path, masks_required=False)
    assert [case.mask is None for case in cases] == [False, True]
    assert findings == []


def test_a_mask_without_image_is_an_error(tmp_path: Path) -> None:
    cases, findings = discover(folder_with(tmp_path, masks=["1_1.nii.gz", "3_1.nii.gz"]))
    assert ids(cases) == ["1_1"]
    finding = only(findings)
    assert (finding.check, finding.case_id, finding.is_error) == ("mask_without_image", "3_1", True)


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_two_files_of_one_name_are_an_error_with_both_names(tmp_path: Path, folder: str) -> None:
    folder_with(tmp_path)
    (tmp_path / folder / "1_1.mha").touch()
    (tmp_path / folder / "1_1.nii.gz").touch()
    cases, findings = discover(tmp_path)
    assert cases == []
    finding = only(findings)
    assert (finding.check, finding.is_error) == ("duplicate_stem", True)
    assert f"{folder}/1_1.mha and {folder}/1_1.nii.gz" in finding.message


def test_one_name_in_two_unicode_forms_is_a_duplicate(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "é_1.mha") for form in ("NFC", "NFD")]
    if len(list((folder_with(tmp_path, images=names) / "images").iterdir())) == 1:
        pytest.skip("this file system takes both forms for one")
    _, findings = discover(tmp_path)
    assert "duplicate_stem" in {finding.check for finding in findings}


def test_a_folder_beside_a_file_of_its_name_is_a_duplicate(tmp_path: Path) -> None:
    _, findings = discover(folder_with(tmp_path, images=["1_1.mha", "1_1/"]))
    assert only(findings).check == "duplicate_stem"


def test_other_files_are_a_warning_unless_they_are_expected(tmp_path: Path) -> None:
    quiet = ["1_1.zraw", "README.md", "license", ".DS_Store", ".gitignore", "1_1.mhd.dvc", "notes.txt"]
    folder_with(tmp_path, images=["1_1.mhd", "1_1.png", ".mha", *quiet], masks=["1_1.mhd", "1_1.raw", "labels.csv"])
    cases, findings = discover(tmp_path)
    assert ids(cases) == ["1_1"]
    assert {(finding.check, finding.is_error, finding.case_id) for finding in findings} == {
        ("ignored_file", False, "1_1.png"),
        ("ignored_file", False, "labels.csv"),
    }


def test_excluded_cases_have_no_findings(tmp_path: Path) -> None:
    folder_with(tmp_path, images=["1_1.mha", "2_1.mha", "3_1.mha", "3_1.nii"], masks=["1_1.mha", "3_1.mha", "4_1.mha"])
    cases, findings = discover(tmp_path, exclude=["2_1", "3_1", "4_1"])
    assert (ids(cases), findings) == (["1_1"], [])


def test_excluding_an_unknown_case_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    folder_with(tmp_path)
    with pytest.raises(
        InputError, match=rf"data\.exclude: .* {tmp_path}, which has no 1_l \(did you mean 1_1\?\), ghost\n"
    ):
        discover(tmp_path, exclude=["1_l", "1_1", "ghost"])
    assert discover(tmp_path, exclude=["1_1", "ghost"], exclude_others=True) == ([], [])


@pytest.mark.parametrize(
    ("case_id", "pattern", "patient_id", "study_id"),
    [
        ("10000_1000000", PATTERN, "10000", "1000000"),
        ("10795_1000811b", PATTERN, "10795", "1000811b"),
        ("10000_1000000_t2w", PATTERN, "10000", "1000000_t2w"),
        ("lonely", PATTERN, "lonely", ""),
        ("siteA_007_2", "^(site[A-Z]_[0-9]+)", "siteA_007", "2"),
        ("ProstateX-0001", "^(.+)$", "ProstateX-0001", ""),
        ("study12_of_P7", "(P[0-9]+)$", "P7", ""),
    ],
)
def test_patient_and_study_come_from_the_name(
    tmp_path: Path, case_id: str, pattern: str, patient_id: str, study_id: str
) -> None:
    folder_with(tmp_path, images=[f"{case_id}.mha"], masks=[f"{case_id}.mha"])
    (case,), findings = discover(tmp_path, patient_pattern=pattern)
    assert (case.patient_id, case.study_id, findings) == (patient_id, study_id, [])


@pytest.mark.parametrize("pattern", ["^([0-9]{5})_", "^x?(y*)"])
def test_a_name_without_a_patient_is_an_error(tmp_path: Path, pattern: str) -> None:
    cases, findings = discover(folder_with(tmp_path), patient_pattern=pattern)
    assert cases == []
    finding = only(findings)
    assert (finding.check, finding.case_id, finding.is_error) == ("no_patient_id", "1_1", True)
    assert repr(pattern) in finding.message


@pytest.mark.parametrize("missing", ["images", "masks"])
def test_a_missing_folder_is_refused_with_the_expected_layout(tmp_path: Path, missing: str) -> None:
    folder_with(tmp_path, images=[], masks=[])
    (tmp_path / missing).rmdir()
    text = re.escape(str(tmp_path / missing)) + r"; expected are images/ and masks/(.|\n)*Set data\.root"
    with pytest.raises(InputError, match=text):
        discover(tmp_path)


def test_masks_can_be_absent_if_they_are_not_needed(tmp_path: Path) -> None:
    (folder_with(tmp_path, masks=[]) / "masks").rmdir()
    cases, findings = discover(tmp_path, masks_required=False)
    assert (ids(cases), findings) == (["1_1"], [])


def test_no_images_at_all_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no image in"):
        discover(folder_with(tmp_path, images=["README.md"]))


def test_real_data_are_found(shared_data: Path) -> None:
    cases, findings = discover(shared_data / "t2w")
    assert findings == []
    assert ids(cases) == ["10795_1000811", "10795_1000811b", "11373_1001396", "p158020_1", "p158021_1"]
    assert [case.patient_id for case in cases] == ["10795", "10795", "11373", "p158020", "p158021"]


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("10001_1", "10001_1_mask"),
        ("10001_1_t2w", "10001_1"),
        ("10001_1_0000", "10001_1"),
        ("10001_1_T2W", "10001_1-prostate_seg"),
        ("Case_1", "case_1"),
    ],
)
def test_names_that_differ_by_a_common_suffix_are_reported_together(tmp_path: Path, image: str, mask: str) -> None:
    folder_with(tmp_path, images=[f"{image}.mha", "2_1.mha"], masks=[f"{mask}.mha", "2_1.mha", "3_1.mha"])
    cases, findings = discover(tmp_path)
    assert ids(cases) == ["2_1"]
    messages = {one.case_id: one.message for one in findings}
    assert f"if it belongs to masks/{mask}.mha, give both one name" in messages[image]
    assert f"if it belongs to images/{image}.mha, give both one name" in messages[mask]
    assert "add it, or list it under data.exclude" in messages["3_1"]


def test_files_of_file_managers_are_ignored(tmp_path: Path) -> None:
    names = ["1_1.mha", "Thumbs.db", "desktop.ini", "._1_1.mha", ".DS_Store"]
    cases, findings = discover(folder_with(tmp_path, images=names, masks=names))
    assert (ids(cases), findings) == (["1_1"], [])


def folder_with_table(folder: Path, text: str) -> Path:
    """Write cases.csv beside two cases."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
        for case_id in ("007_1", "008_1"):
            (folder / kind / f"{case_id}.mha").touch()
    (folder / "cases.csv").write_text(text, encoding="utf-8-sig")  # byte order mark of spreadsheet programs
    return folder


def test_values_stay_text_and_a_case_without_a_row_is_unknown_and_named(tmp_path: Path) -> None:
    root = folder_with_table(tmp_path, "case_id,centre,scanner\n007_1,01,NA\n")
    cases, findings = discover_cases(root, patient_pattern="^([^_]+)", exclude=[])
    assert [case.attributes for case in cases] == [{"centre": "01", "scanner": "NA"}, {"centre": "", "scanner": ""}]
    assert [(finding.case_id, finding.check, finding.is_error) for finding in findings] == [
        ("008_1", "no_attributes", False)
    ]


def test_empty_rows_and_columns_of_spreadsheet_programs_are_ignored(tmp_path: Path) -> None:
    folder = folder_with_table(tmp_path, "case_id,centre,,\n007_1,a,,\n,,,\n,,,\n")
    assert read_attributes(folder) == {"007_1": {"centre": "a"}}


def test_folder_without_the_table_has_no_attributes(tmp_path: Path) -> None:
    assert read_attributes(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,centre\n007_1,a\n", "must have a column case_id, has id, centre"),
        ("case_id,centre\n007_1,a\n007_1,b\n", "must have one row per case, has several of 007_1"),
        ("case_id,dice,all\n007_1,1,x\n", "dice, all: columns of the project's own tables"),
        ("case_id,a\n1,2,3\n4\n5,6,7,8\n", "cannot be read"),
        ("case_id,centre\n007_1,a,\n008_1,b,\n", "a value for each of the 2 columns of the header, and has more"),
        ("case_id,centre\nu\u0308_1,a\n\u00fc_1,b\n", "must have one row per case, has several of \u00fc_1"),
    ],
)
def test_table_that_cannot_be_joined_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_attributes(folder_with_table(tmp_path, text))


def test_no_column_of_our_own_tables_can_be_taken() -> None:
    assert {*OWN_COLUMNS, *(field.name for field in fields(CaseMetrics))} <= RESERVED
