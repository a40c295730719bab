"""nnU-Net and BIDS layouts are read; ambiguous folders are refused."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from prostate_seg.common.errors import InputError
from prostate_seg.data.cases import Case, discover_cases
from prostate_seg.data.layouts import has_images
from prostate_seg.imaging.geometry import Finding


def folder_with(root: Path, names: Iterable[str], *, channels: Mapping[str, object] | None = None) -> Path:
    """Create empty files and, if channels are given, a dataset.json."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    if channels is not None:
        (root / "dataset.json").write_text(json.dumps(channels))
    return root


def found(root: Path, *, masks_required: bool = True) -> tuple[dict[str, tuple[str, str | None]], list[Finding]]:
    """Return image and mask by case id, relative to the root."""
    cases, findings = discover_cases(root, patient_pattern="^([^_]+)", exclude=[], masks_required=masks_required)
    return {case.case_id: _relative(case, root) for case in cases}, findings


def _relative(case: Case, root: Path) -> tuple[str, str | None]:
    mask = None if case.mask is None else case.mask.relative_to(root).as_posix()
    return case.image.relative_to(root).as_posix(), mask


NNUNET = ["imagesTr/7_1_0000.nii.gz", "imagesTr/7_1_0001.nii.gz", "labelsTr/7_1.nii.gz", "imagesTs/8_1_0000.nii.gz"]


@pytest.mark.parametrize(
    ("channels", "number"),
    [
        ({"channel_names": {"0": "T2W", "1": "ADC"}}, "0000"),
        ({"channel_names": {"0": "ADC", "1": "t2"}}, "0001"),
        ({"modality": {"0": "T2", "1": "ADC"}}, "0000"),
    ],
)
def test_nnunet_channel_named_t2_is_used(tmp_path: Path, channels: dict[str, object], number: str) -> None:
    cases, findings = found(folder_with(tmp_path, NNUNET, channels=channels))
    assert cases == {"7_1": (f"imagesTr/7_1_{number}.nii.gz", "labelsTr/7_1.nii.gz")}
    assert findings == []


@pytest.mark.parametrize("channels", [None, {}, {"channel_names": {"0": "MRI"}}])
def test_nnunet_with_a_single_channel_needs_no_name_for_it(tmp_path: Path, channels: dict[str, object] | None) -> None:
    cases, _ = found(folder_with(tmp_path, ["imagesTr/7_1_0000.mha", "labelsTr/7_1.mha"], channels=channels))
    assert cases == {"7_1": ("imagesTr/7_1_0000.mha", "labelsTr/7_1.mha")}


@pytest.mark.parametrize(
    ("channels", "named"),
    [
        (None, "nothing, as it is absent or names none"),
        ({"channel_names": {"0": "MRI", "1": "ADC"}}, "0000 MRI, 0001 ADC"),
        ({"channel_names": {"0": "T2 axial", "1": "T2 sagittal"}}, "0000 T2 axial, 0001 T2 sagittal"),
        ({"channel_names": {"0": "ADC", "2": "T2"}}, "0000 ADC, 0002 T2"),
    ],
)
def test_nnunet_channels_of_which_none_or_several_are_t2_are_refused(
    tmp_path: Path, channels: dict[str, object] | None, named: str
) -> None:
    with pytest.raises(InputError) as refused:
        found(folder_with(tmp_path, NNUNET, channels=channels))
    assert f"must name one of the channels 0000, 0001 T2, names {named}\n" in str(refused.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"channel_names": {"a": "T2"}}'])
def test_an_unreadable_dataset_json_is_reported(tmp_path: Path, text: str) -> None:
    folder_with(tmp_path, NNUNET)
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=r"dataset\.json: cannot be read"):
        found(tmp_path)


def test_nnunet_cases_without_image_or_label_are_errors(tmp_path: Path) -> None:
    names = ["imagesTr/1_1_0000.mha", "imagesTr/2_1_0000.mha", "labelsTr/2_1.mha", "labelsTr/3_1.mha"]
    cases, findings = found(folder_with(tmp_path, names))
    assert list(cases) == ["2_1"]
    assert {(one.case_id, one.check) for one in findings} == {
        ("1_1", "image_without_mask"),
        ("3_1", "mask_without_image"),
    }


def test_nnunet_files_without_a_channel_number_are_reported_and_alone_refused(tmp_path: Path) -> None:
    _, findings = found(folder_with(tmp_path, [*NNUNET[:1], NNUNET[2], "imagesTr/other.nii.gz"]))
    assert [(one.case_id, one.check) for one in findings] == [("other.nii.gz", "ignored_file")]
    root = folder_with(tmp_path / "msd", ["imagesTr/prostate_00.nii.gz", "labelsTr/prostate_00.nii.gz"])
    with pytest.raises(InputError, match=r"must end in a channel(.|\n)*stage=fetch data=decathlon"):
        found(root)


def test_nnunet_without_labels_is_refused_unless_none_are_needed(tmp_path: Path) -> None:
    root = folder_with(tmp_path, NNUNET[:1])
    with pytest.raises(InputError, match=r"there is no folder .*labelsTr; expected are"):
        found(root)
    assert found(root, masks_required=False)[0] == {"7_1": ("imagesTr/7_1_0000.nii.gz", None)}


def test_bids_pairs_images_with_masks_of_derivatives(tmp_path: Path) -> None:
    masks = "derivatives/manual"
    names = [
        "sub-01/anat/sub-01_T2w.nii.gz",
        "sub-01/anat/sub-01_T2w.json",
        "sub-01/dwi/sub-01_dwi.nii.gz",
        f"{masks}/sub-01/anat/sub-01_space-T2w_label-prostate_mask.nii.gz",
        "sub-02/ses-1/anat/sub-02_ses-1_acq-ax_run-1_T2w.nii.gz",
        "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz",
        f"{masks}/sub-02/ses-1/anat/sub-02_ses-1_acq-ax_run-1_desc-zones_dseg.nii.gz",
        "sub-02/ses-2/anat/sub-02_ses-2_T2w.nii.gz",
        f"{masks}/sub-02/ses-2/anat/sub-02_ses-2_T2w_seg.nii.gz",
        f"{masks}/sub-02/ses-2/anat/sub-02_ses-2_probseg.nii.gz",
        "participants.tsv",
    ]
    root = folder_with(tmp_path, names)
    cases, findings = found(root)
    assert findings == []
    assert cases == {
        "sub-01": (names[0], names[3]),
        "sub-02_ses-1_acq-ax_run-1": (names[4], names[6]),
        "sub-02_ses-2": (names[7], names[8]),
    }
    both, _ = discover_cases(root, patient_pattern="^([^_]+)", exclude=[])
    assert [case.patient_id for case in both] == ["sub-01", "sub-02", "sub-02"]


def test_several_bids_masks_of_an_image_are_reported(tmp_path: Path) -> None:
    folder = "derivatives/manual/sub-01/anat/sub-01"
    root = folder_with(
        tmp_path, ["sub-01/anat/sub-01_T2w.nii.gz", f"{folder}_label-PZ_mask.nii.gz", f"{folder}_label-TZ_mask.nii.gz"]
    )
    cases, findings = found(root)
    assert (cases, [one.check for one in findings]) == ({}, ["duplicate_stem"])
    assert "label-PZ" in findings[0].message
    assert "label-TZ" in findings[0].message


def test_bids_without_masks_is_refused_unless_none_are_needed(tmp_path: Path) -> None:
    root = folder_with(tmp_path, ["sub-01/anat/sub-01_T2w.nii.gz"])
    with pytest.raises(InputError, match=r"derivatives: has no mask such as derivatives/manual"):
        found(root)
    assert found(root, masks_required=False)[0] == {"sub-01": ("sub-01/anat/sub-01_T2w.nii.gz", None)}


def test_bids_without_t2_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no image in"):
        found(folder_with(tmp_path, ["sub-01/anat/sub-01_T1w.nii.gz", "derivatives/m/sub-01_mask.nii.gz"]))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["images/1_1.mha", *NNUNET], "images/ or masks/ and imagesTr/"),
        (["masks/1_1.mha", "sub-01/anat/sub-01_T2w.nii.gz"], "images/ or masks/ and sub-*/"),
        ([*NNUNET, "sub-01/ses-1/anat/sub-01_ses-1_T2w.nii.gz"], "imagesTr/ and sub-*/"),
    ],
)
def test_a_folder_with_two_layouts_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(InputError) as refused:
        found(folder_with(tmp_path, names))
    assert f"{tmp_path} must have one layout, has {message}\n" in str(refused.value)


def test_a_folder_with_images_is_distinguished_from_one_without(tmp_path: Path) -> None:
    assert not has_images(folder_with(tmp_path / "none", ["a/b.mha"]))
    for name in ("images/1.mha", "imagesTr/1_0000.mha", "sub-1/anat/sub-1_T2w.nii"):
        assert has_images(folder_with(tmp_path / name[:7].replace("/", ""), [name]))


def test_nnunet_label_is_reported_with_its_image_without_a_channel_number(tmp_path: Path) -> None:
    names = ["imagesTr/p_1_0000.nii.gz", "imagesTr/p_3.nii.gz", "labelsTr/p_1.nii.gz", "labelsTr/p_3.nii.gz"]
    cases, findings = found(folder_with(tmp_path, names))
    assert list(cases) == ["p_1"]
    assert [(one.case_id, one.check) for one in findings] == [("p_3", "mask_without_image")]
    assert "imagesTr/p_3.nii.gz" in findings[0].message
    assert "its name has no channel number; rename it to p_3_0000.nii.gz" in findings[0].message


def test_nnunet_case_without_the_t2_channel_is_reported_with_its_channels(tmp_path: Path) -> None:
    names = [*NNUNET, "imagesTr/9_1_0001.nii.gz", "labelsTr/9_1.nii.gz"]
    _, findings = found(folder_with(tmp_path, names, channels={"channel_names": {"0": "T2", "1": "ADC"}}))
    assert [(one.case_id, one.check) for one in findings] == [("9_1", "mask_without_image")]
    assert "it is channel 0001, and the T2-weighted one is 0000; add that" in findings[0].message
    (tmp_path / "labelsTr/9_1.nii.gz").unlink()
    _, findings = found(tmp_path)
    assert [(one.case_id, one.is_error) for one in findings] == [("9_1_0001.nii.gz", False)]


@pytest.mark.parametrize("name", ["ADC", "dwi b800", "T1w", "CT"])
def test_nnunet_single_channel_of_another_sequence_is_refused(tmp_path: Path, name: str) -> None:
    root = folder_with(tmp_path, ["imagesTr/7_1_0000.mha", "labelsTr/7_1.mha"], channels={"channel_names": {"0": name}})
    with pytest.raises(InputError, match=f"must name one of the channels 0000 T2, names 0000 {name}"):
        found(root)


def test_bids_mask_of_another_organ_is_not_read(tmp_path: Path) -> None:
    folder = "derivatives/manual/sub-01/anat/sub-01"
    names = [f"{folder}_label-{label}_mask.nii.gz" for label in ("prostate", "bladder", "lesion")]
    root = folder_with(tmp_path, ["sub-01/anat/sub-01_T2w.nii.gz", *names])
    cases, findings = found(root)
    assert cases == {"sub-01": ("sub-01/anat/sub-01_T2w.nii.gz", names[0])}
    assert [(one.check, one.is_error) for one in findings] == [("ignored_file", False)] * 2
    assert (
        "sub-01_label-bladder_mask.nii.gz is not read: it marks 'bladder', which is not the gland"
        in findings[0].message
    )
    (root / names[0]).unlink()
    with pytest.raises(InputError, match="has no mask such as"):
        found(root)


def test_dicom_files_without_a_folder_of_their_own_are_refused(tmp_path: Path) -> None:
    root = folder_with(tmp_path, ["images/001.DCM", "images/002.DCM", "masks/10001_1.nii.gz"])
    with pytest.raises(InputError, match="a DICOM series must be a folder of its own, such as images/10001_1/00"):
        found(root)
