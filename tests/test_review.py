"""Review of predictions: the page, and training with corrected masks."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from prostate_seg.common.files import read_json
from prostate_seg.data.cases import discover_cases
from prostate_seg.reporting.pages.review_page import write_review
from tests.project_helpers import SMALL
from tests.stage_helpers import run_stages

PATTERN = "^([^_]+)"
NETWORK = [one for one in SMALL if not one.startswith(("data.", "fold."))]


def row(name: str, **values: object) -> dict[str, object]:
    both = {
        "name": name,
        "volume_ml": 40.0,
        "num_slices": 12,
        "mask": f"masks/{name}.nii.gz",
        "input": f"in/{name}.mha",
    }
    return {**both, "model": "prostate_seg version 3", "model_md5": "0" * 32, **values}


def volumes() -> pd.DataFrame:
    columns = ["mean_confidence", "fold_agreement", "expected_dice", "dice_lower_bound", "verdict", "warnings", "error"]
    rows = [
        row("broken", error="it has no <spacing>"),
        row("a/b #1", expected_dice=0.6, dice_lower_bound=0.4, verdict="reject", warnings="gland of 9 mL; no apex"),
        row("c", expected_dice=0.92, dice_lower_bound=0.86, verdict="accept", warnings=""),
    ]
    return pd.DataFrame(rows, columns=[*row("x"), *columns])


def test_page_lists_studies_in_order_with_reasons_and_overlays(tmp_path: Path) -> None:
    write_review(tmp_path, volumes())
    page = (tmp_path / "review.html").read_text()
    assert [page.index(text) for text in ("broken: refused", "a/b #1: reject", "c: accept")] == sorted(
        page.index(text) for text in ("broken: refused", "a/b #1: reject", "c: accept")
    )
    assert "1 reject, 1 accept, 1 refused." in page
    assert "it has no &lt;spacing&gt;" in page
    assert "<li>gland of 9 mL</li>\n<li>no apex</li>" in page
    assert 'src="overlays/a/b%20%231.png"' in page
    assert "expected Dice <strong>0.60</strong>, at least 0.40" in page
    assert "<script" not in page


def test_corrected_masks_are_cases_of_a_data_folder_with_their_author_and_model(tmp_path: Path) -> None:
    write_review(tmp_path, volumes())
    for kind, suffix in (("images", ".mha"), ("masks", ".nii.gz")):
        (tmp_path / "corrected" / kind / f"a_b #1{suffix}").write_bytes(b"a file")
    (case,), findings = discover_cases(tmp_path / "corrected", patient_pattern=PATTERN, exclude=())
    assert case.attributes["reference_by"] == "corrected"
    assert case.attributes["corrected_from"] == "prostate_seg version 3"
    assert findings == []


@pytest.mark.slow
def test_training_with_corrected_masks_is_compared_with_training_without_them(tmp_path: Path) -> None:
    def run(folder: str, *arguments: str) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        done = run_stages(tmp_path / folder, *arguments, "mlflow=off")
        assert done.returncode == 0, done.stderr

    phantom = [one for one in SMALL if one.startswith("data.") and "num_patients" not in one]
    for folder, seed, num_patients in (("own", 1, 3), ("new", 2, 2), ("external", 3, 3)):
        run(folder, "stage=fetch", *phantom, f"data.phantom.num_patients={num_patients}", f"seed={seed}")
    rename(tmp_path / "new" / "data", "n")
    rename(tmp_path / "external" / "data", "e")
    test = f"evaluate.external_root={tmp_path}/external/data"
    science = ("data=folder", "fold=all", *NETWORK, test)
    run("before", "stage=preprocess,prepare,train,evaluate", *science, f"data.root={tmp_path}/own/data")
    scans = f"predict.input={tmp_path}/new/data/images"
    run("before", "stage=predict", *science, f"data.root={tmp_path}/own/data", scans)

    corrected = tmp_path / "before" / "predictions" / "corrected"
    together = tmp_path / "together"
    shutil.copytree(tmp_path / "own" / "data", together)
    # The reader's corrections are the references.
    for image in sorted((tmp_path / "new" / "data" / "images").iterdir()):
        mask = next((tmp_path / "new" / "data" / "masks").glob(f"{image.name.split('.')[0]}.*"))
        shutil.copy(image, together / "images")
        shutil.copy(mask, together / "masks")
    shutil.copy(corrected / "cases.csv", together / "cases.csv")
    run("after", "stage=preprocess,prepare,train,evaluate", *science, f"data.root={together}")
    dataset = pd.read_csv(tmp_path / "after" / "preprocess" / "dataset.csv")
    assert (dataset["reference_by"] == "corrected").sum() == 2
    folders = ",".join(f"{tmp_path}/{name}/evaluation_external" for name in ("before", "after"))
    run("after", "stage=compare", f"compare.runs=[{folders}]")
    (comparison,) = read_json(tmp_path / "after" / "comparison" / "comparison.json")["comparisons"]
    dice = next(one for one in comparison["rows"] if one["metric"] == "dice")
    assert dice["num_cases"] == 3


def rename(data: Path, prefix: str) -> None:
    """Put a prefix before the name of each image and mask, so that the patients of two phantoms have other ids."""
    (data / "cases.csv").unlink(missing_ok=True)
    for kind in ("images", "masks"):
        for file in list((data / kind).iterdir()):
            file.rename(file.with_name(f"{prefix}{file.name}"))
