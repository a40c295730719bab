"""Stage fetch: public data from a server, a mirror or a folder; resumed; never mixed; always with a licence."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from filelock import FileLock

from prostate_seg.common.errors import InputError
from prostate_seg.config import schema as config
from prostate_seg.config.schema import DataSource
from prostate_seg.config.workspace import StageResult, workspace_of
from prostate_seg.data.cases import discover_cases
from prostate_seg.data.public.public_sets import PUBLIC_SETS
from prostate_seg.imaging.image_io import read_volume
from prostate_seg.stages import fetch
from tests.conftest import Launch, composed
from tests.test_unpack import four_dimensional, packed
from tests.unreliable_server import unreliable_server

FetchHere = Callable[..., StageResult]


@pytest.fixture
def fetch_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FetchHere:
    """Run the stage in a new workspace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prostate_seg.data.public.download.MARGIN_BYTES", 0)

    def run(*overrides: str) -> StageResult:
        cfg = config.parse(composed("stage=fetch", "paths.cache=cache", *overrides))
        return fetch.run(cfg, workspace_of(cfg))

    return run


def publish(monkeypatch: pytest.MonkeyPatch, name: str, archives: dict[str, bytes]) -> None:
    """Replace the published checksums by those of synthetic archives."""
    about = PUBLIC_SETS[name]
    changed = tuple(
        dataclasses.replace(one, checksum=f"sha256:{hashlib.sha256(archives[one.name]).hexdigest()}")
        if one.checksum and one.name in archives
        else one
        for one in about.archives
    )
    monkeypatch.setitem(PUBLIC_SETS, name, dataclasses.replace(about, archives=changed))


def picai_archives(tmp_path: Path) -> dict[str, bytes]:
    """Return archives of two folds with two studies each, and of the masks of all and of one further study."""
    made = tmp_path / "made"
    studies = {0: ["10000_1000000", "10001_1000001"], 1: ["10002_1000002", "10129_1000130"]}
    archives = {}
    for fold, names in studies.items():
        members = {
            f"{n.split('_')[0]}/{n}_{kind}.mha": f"{kind} of {n}".encode() for n in names for kind in ("t2w", "adc")
        }
        name = f"picai_public_images_fold{fold}.zip"
        archives[name] = packed(made / name, members).read_bytes()
    top = "picai_labels-main"
    masks = f"{top}/anatomical_delineations/whole_gland"
    labels = {
        **{f"{masks}/AI/Bosma22b/{n}.nii.gz": b"ai" for names in studies.values() for n in names},
        **{f"{masks}/AI/Guerbet23/{n}.nii.gz": b"other" for n in studies[0]},
        f"{masks}/AI/Bosma22b/10999_1000999.nii.gz": b"of no image",
        f"{masks}/human_expert/10001_1000001.nii.gz": b"human",
        f"{top}/clinical_information/marksheet.csv": b"patient_id,study_id,center\n10000,1000000,RUMC\n10002,1000002,ZGT\n",
    }
    archives["picai_labels.zip"] = packed(made / "picai_labels.zip", labels).read_bytes()
    return archives


def mirrored(name: str, archives: dict[str, bytes]) -> dict[str, bytes]:
    """Return the archives by their path on a mirror."""
    urls = {one.name: one.url.split("://")[1].split("?")[0] for one in PUBLIC_SETS[name].archives}
    return {f"/mirror/{urls[key]}": content for key, content in archives.items()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_source_of_the_config_is_known_and_uses_https() -> None:
    assert set(get_args(DataSource)) == {"folder", "phantom", *PUBLIC_SETS}
    for about in PUBLIC_SETS.values():
        assert about.licence
        assert about.cite
        for archive in about.archives:
            assert archive.url.startswith("https://")
            length = {"md5": 32, "sha256": 64}
            if archive.checksum is not None:
                algorithm, _, digits = archive.checksum.partition(":")
                assert len(digits) == length[algorithm]
    unpublished = [one.name for about in PUBLIC_SETS.values() for one in about.archives if one.checksum is None]
    assert unpublished == ["picai_labels.zip"]


def test_picai_stores_automatic_and_manual_masks_in_separate_folders(
    tmp_path: Path, fetch_here: FetchHere, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    archives = picai_archives(tmp_path)
    publish(monkeypatch, "picai", archives)
    caplog.set_level("INFO")
    with unreliable_server(mirrored("picai", archives), "503", "break") as server:
        origin = f"fetch.origin={server.address}/mirror/"
        result = fetch_here("data=picai", "fetch.parts=[fold0,fold1]", origin)
    ids = ["10000_1000000", "10001_1000001", "10002_1000002", "10129_1000130"]
    data = tmp_path / "data"
    assert names_in(data / "images") == [f"{one}.mha" for one in ids]
    assert (data / "images" / f"{ids[0]}.mha").read_bytes() == b"t2w of 10000_1000000"
    assert names_in(data / "masks") == [f"{one}.nii.gz" for one in ids]
    assert (data / "masks" / f"{ids[1]}.nii.gz").read_bytes() == b"ai"
    assert names_in(data / "masks_human") == ["10001_1000001.nii.gz"]
    assert result.metrics == {"fetch/num_images": 4, "fetch/num_masks": 4}
    table = pd.read_csv(data / "cases.csv", dtype=str, keep_default_na=False)
    assert list(table["case_id"]) == ids
    assert set(table["reference_by"]) == {"AI model Bosma22b"}
    assert list(table["centre"]) == ["RUMC", "", "ZGT", ""]
    assert "CC BY-NC 4.0" in (data / "LICENCE.txt").read_text()
    note = json.loads((data / "SOURCE.json").read_text())
    assert note["archives"]["picai_public_images_fold1.zip"]["is_published"] is True
    md5 = hashlib.md5(archives["picai_labels.zip"]).hexdigest()
    assert note["archives"]["picai_labels.zip"]["checksum"] == f"md5:{md5}"
    assert note["archives"]["picai_labels.zip"]["is_published"] is False
    assert "CC BY-NC 4.0" in caplog.text
    assert "doi:10.5281/zenodo.6624726" in caplog.text
    assert "no checksum is published" in caplog.text
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []
    cases, findings = discover_cases(data, patient_pattern="^([^_]+)", exclude=[])
    assert [case.patient_id for case in cases] == ["10000", "10001", "10002", "10129"]
    assert findings == []


def test_a_stopped_fetch_resumes_with_missing_files(
    tmp_path: Path, fetch_here: FetchHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives = picai_archives(tmp_path)
    publish(monkeypatch, "picai", archives)
    both = ["data=picai", "fetch.parts=[fold0,fold1]"]
    content = mirrored("picai", archives)
    absent = {path: one for path, one in content.items() if "fold1" not in path}
    with unreliable_server(absent) as server:
        with pytest.raises(InputError, match=r"fold1\.zip: the server answers 404"):
            fetch_here(*both, f"fetch.origin={server.address}/mirror")
        server.files = content
        (tmp_path / "data" / "images" / ".tmp-half").mkdir()
        fetch_here(*both, f"fetch.origin={server.address}/mirror")
        asked = [path.rpartition("/")[2] for path in server.paths]
        assert asked == [*(f"picai_public_images_fold{fold}.zip" for fold in (0, 1, 1)), "main.zip"]
        assert len(names_in(tmp_path / "data" / "images")) == 4
        server.paths.clear()
        fetch_here(*both, f"fetch.origin={server.address}/mirror")
        assert server.paths == []
        (tmp_path / "data" / "images" / "10002_1000002.mha").unlink()
        fetch_here(*both, f"fetch.origin={server.address}/mirror")
        assert [path.rpartition("/")[2] for path in server.paths] == ["picai_public_images_fold1.zip"]


def test_further_parts_add_masks_and_rows_and_keep_other_columns(
    tmp_path: Path, fetch_here: FetchHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives = picai_archives(tmp_path)
    publish(monkeypatch, "picai", archives)
    origin = f"fetch.origin={tmp_path / 'made'}"
    fetch_here("data=picai", "fetch.parts=[fold0]", origin)
    table = tmp_path / "data" / "cases.csv"
    table.write_text(table.read_text().replace("reference_by", "reference_by,coil").replace("Bosma22b", "Bosma22b,yes"))
    fetch_here("data=picai", "fetch.parts=[fold0,fold1]", origin)
    rows = pd.read_csv(table, dtype=str, keep_default_na=False)
    assert list(rows["coil"]) == ["yes", "yes", "", ""]
    assert len(names_in(tmp_path / "data" / "masks")) == 4
    with pytest.raises(InputError, match=r"fetch\.parts: fold1 was fetched before"):
        fetch_here("data=picai", "fetch.parts=[fold0]", origin)
    assert len(names_in(tmp_path / "made")) == 3


def test_masks_that_changed_at_the_source_are_not_mixed(
    tmp_path: Path, fetch_here: FetchHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives = picai_archives(tmp_path)
    publish(monkeypatch, "picai", archives)
    origin = f"fetch.origin={tmp_path / 'made'}"
    fetch_here("data=picai", "fetch.parts=[fold0]", origin)
    packed(tmp_path / "made" / "picai_labels.zip", {"whole_gland/AI/Bosma22b/10002_1000002.nii.gz": b"new"})
    with pytest.raises(InputError, match=r"picai_labels\.zip: must be the file of the first download, md5:"):
        fetch_here("data=picai", "fetch.parts=[fold0,fold1]", origin)
    assert len(names_in(tmp_path / "data" / "masks")) == 2


def test_a_file_with_another_checksum_is_refused_and_downloaded_again(
    tmp_path: Path, fetch_here: FetchHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives = picai_archives(tmp_path)
    publish(monkeypatch, "picai", archives)
    with unreliable_server(mirrored("picai", archives), "garbled") as server:
        arguments = ["data=picai", "fetch.parts=[fold0]", f"fetch.origin={server.address}/mirror"]
        with pytest.raises(InputError, match=r"fold0\.zip: the file must have sha256:"):
            fetch_here(*arguments)
        assert not (tmp_path / "data" / "images").exists()
        fetch_here(*arguments)
    assert len(names_in(tmp_path / "data" / "images")) == 2


def test_decathlon_gives_t2_and_zones_of_one_patient_per_study(
    tmp_path: Path, fetch_here: FetchHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    voxels = four_dimensional(tmp_path / "four.nii.gz")
    zones = (tmp_path / "four.nii.gz").read_bytes()
    members = {}
    for number in ("00", "47"):
        members[f"Task05_Prostate/imagesTr/prostate_{number}.nii.gz"] = (tmp_path / "four.nii.gz").read_bytes()
        members[f"Task05_Prostate/imagesTr/._prostate_{number}.nii.gz"] = b"what macOS leaves"
        members[f"Task05_Prostate/labelsTr/prostate_{number}.nii.gz"] = zones
    members["Task05_Prostate/imagesTs/prostate_03.nii.gz"] = b"without mask"
    archive = packed(tmp_path / "made" / "Task05_Prostate.tar", members)
    publish(monkeypatch, "decathlon", {archive.name: archive.read_bytes()})
    fetch_here("data=decathlon", f"fetch.origin={archive.parent}")
    data = tmp_path / "data"
    assert names_in(data / "images") == names_in(data / "masks") == ["prostate-00.nii.gz", "prostate-47.nii.gz"]
    assert np.array_equal(read_volume(data / "images" / "prostate-47.nii.gz").array, voxels[0])
    pattern = config.parse(composed("data=decathlon")).data.patient_pattern
    cases, _ = discover_cases(data, patient_pattern=pattern, exclude=[])
    assert [case.patient_id for case in cases] == ["prostate-00", "prostate-47"]


def test_prostate158_takes_t2_and_the_zones_of_the_first_reader(
    tmp_path: Path, fetch_here: FetchHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = "prostate158_train/train/020"
    names = ("t2", "adc", "dwi", "t2_anatomy_reader1", "t2_anatomy_reader2", "t2_tumor_reader1")
    archive = packed(
        tmp_path / "made" / "prostate158_train.zip", {f"{folder}/{name}.nii.gz": name.encode() for name in names}
    )
    publish(monkeypatch, "prostate158", {archive.name: archive.read_bytes()})
    fetch_here("data=prostate158", f"fetch.origin={archive.parent}")  # without the test studies
    assert (tmp_path / "data" / "images" / "p158020.nii.gz").read_bytes() == b"t2"
    assert (tmp_path / "data" / "masks" / "p158020.nii.gz").read_bytes() == b"t2_anatomy_reader1"


def write_mhd(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.6, 0.6, 3.6))
    sitk.WriteImage(image, str(path))


def test_promise12_becomes_one_file_per_image_and_mask(
    tmp_path: Path, fetch_here: FetchHere, caplog: pytest.LogCaptureFixture
) -> None:
    image = np.random.default_rng(0).integers(0, 900, size=(5, 12, 10)).astype(np.int16)
    mask = (image > 450).astype(np.int8)
    origin = tmp_path / "unpacked"
    for part, name in ((1, "Case00"), (2, "Case13")):
        write_mhd(origin / f"part{part}" / f"{name}.mhd", image)
        write_mhd(origin / f"part{part}" / f"{name}_segmentation.mhd", mask)
    write_mhd(origin / "test" / "Case50.mhd", image)
    fetch_here("data=promise12", f"fetch.origin={origin}")
    data = tmp_path / "data"
    assert names_in(data / "images") == names_in(data / "masks") == ["Case00.mha", "Case13.mha"]
    volume = read_volume(data / "images" / "Case13.mha")
    assert np.array_equal(volume.array, image)
    assert volume.geometry.spacing_mm == pytest.approx((3.6, 0.6, 0.6))
    assert np.array_equal(read_volume(data / "masks" / "Case13.mha").array, mask)
    assert "left out, as image or mask is missing: Case50.mhd" in caplog.text
    assert "LICENSE.TXT" in (data / "LICENCE.txt").read_text()


def test_promise12_reports_a_truncated_file_and_resumes_once_it_is_fixed(tmp_path: Path, fetch_here: FetchHere) -> None:
    image = np.ones((5, 12, 10), np.int16)
    for name in ("Case00", "Case00_segmentation"):
        write_mhd(tmp_path / "in" / f"{name}.mhd", image)
    raw = tmp_path / "in" / "Case00_segmentation.raw"
    whole = raw.read_bytes()
    raw.write_bytes(whole[:-9])
    with pytest.raises(InputError, match=r"Case00_segmentation\.mhd: "):
        fetch_here("data=promise12", f"fetch.origin={tmp_path / 'in'}")
    raw.write_bytes(whole)
    fetch_here("data=promise12", f"fetch.origin={tmp_path / 'in'}")
    assert names_in(tmp_path / "data" / "masks") == ["Case00.mha"]


def test_two_data_sets_are_not_mixed(tmp_path: Path, fetch_here: FetchHere, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, "picai", picai_archives(tmp_path))
    fetch_here("data=picai", "fetch.parts=[fold0]", f"fetch.origin={tmp_path / 'made'}")
    with pytest.raises(InputError, match="holds data=picai, and data=decathlon is not mixed with it"):
        fetch_here("data=decathlon", f"fetch.origin={tmp_path / 'made'}")
    with pytest.raises(InputError, match="holds images that are not a phantom"):
        fetch_here("data=phantom")
    (tmp_path / "data" / "SOURCE.json").unlink()
    with pytest.raises(InputError, match="holds images of unknown origin"):
        fetch_here("data=picai", f"fetch.origin={tmp_path / 'made'}")


def test_a_second_fetch_in_the_same_workspace_is_refused(tmp_path: Path, fetch_here: FetchHere) -> None:
    (tmp_path / "cache").mkdir()
    with (
        FileLock(tmp_path / "cache" / "fetch.lock"),
        pytest.raises(InputError, match="another stage=fetch is at work"),
    ):
        fetch_here("data=decathlon", f"fetch.origin={tmp_path}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["data=picai", "fetch.parts=[fold5]"],
            "fetch.parts: must be some of fold0, fold1, fold2, fold3, fold4, is [fold5]",
        ),
        (["data=prostate158", "fetch.parts=[]"], "fetch.parts: must be some of train, test, is []"),
        (
            ["data=decathlon", "fetch.origin=nowhere"],
            "nowhere/Task05_Prostate.tar is absent: download it from https://msd",
        ),
        (["data=promise12"], "fetch.origin must be the folder with the unpacked training data, is null"),
        (
            ["data=promise12", "fetch.origin=.", "fetch.parts=[a]"],
            "fetch.parts: must be null, as data=promise12 has no parts",
        ),
        (["data=promise12", "fetch.origin=."], "has no CaseNN.mhd with a CaseNN_segmentation.mhd"),
    ],
)
def test_unavailable_data_are_refused_with_the_reason(
    fetch_here: FetchHere, arguments: list[str], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        fetch_here(*arguments)
    assert message in str(refused.value)


def test_a_refused_archive_ends_with_a_message_and_exit_code_1(tmp_path: Path, launch: Launch) -> None:
    (tmp_path / "Task05_Prostate.tar").write_bytes(b"not the archive")
    done = launch("stage=fetch", "data=decathlon", "fetch.origin=.", "mlflow=off")
    assert done.returncode == 1
    assert "CC BY-SA 4.0" in done.stdout
    assert "Task05_Prostate.tar: the file must have md5:35138f08b1efaef89d7424d2bcc928db, has md5:" in done.stderr
    assert "Traceback" not in done.stderr
