"""From training to a champion that other people and programs can use: one story, because each step rests on those before."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import pytest
import SimpleITK as sitk
from mlflow.entities.model_registry import ModelVersion

from prostate_seg.common.files import read_json
from prostate_seg.imaging.image_io import read_volume
from tests.imaging_helpers import dice
from tests.project_helpers import Project, clean_environment, free_port, until, uses_stack
from tests.server_helpers import answers
from tests.stack_helpers import bucket_of, stack_of

pytestmark = pytest.mark.slow

NAME = "prostate_seg"
NETWORKS = ("model.channels=[8,16,32]", "model.strides=[[2,2],[2,2]]")
TRAINED = (*NETWORKS, "train.steps_per_epoch=30", "train.max_epochs=4")
BARELY = (*NETWORKS, "train.steps_per_epoch=2", "train.max_epochs=1", "seed=2")
LENIENT = (
    "register.promote=true",
    "register.min_test_patients=2",
    "register.min_dice=0",
    "register.max_failure_fraction=1",
)


def run(project: Project, *arguments: str, code: int = 0) -> str:
    done = project.run(*arguments)
    text = done.stdout + done.stderr
    assert done.returncode == code, text
    assert "Traceback" not in text
    return text


def version(project: Project, number: int) -> ModelVersion:
    return project.client.get_model_version(NAME, str(number))


def aliases(project: Project) -> dict[str, str]:
    return {alias: str(number) for alias, number in project.client.get_registered_model(NAME).aliases.items()}


def moves(project: Project) -> list[dict[str, Any]]:
    tags = project.client.get_registered_model(NAME).tags
    return [json.loads(tags[key]) for key in sorted(tags) if key.startswith("move.")]


def files_of(project: Project, number: int) -> Path:
    """Return a copy of the files of a version."""
    mlflow.set_tracking_uri(project.store)
    return Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}/{number}"))


def change_file(project: Project, number: int, name: str, text: str) -> None:
    """Write into a version, behind the back of the registry."""
    model_id = str(version(project, number).source).removeprefix("models:/")
    if uses_stack():
        stack = stack_of(project.folder).stack
        store, place = bucket_of(stack), {"Bucket": stack.settings["S3_BUCKET"]}
        keys = [entry["Key"] for entry in store.list_objects_v2(**place)["Contents"]]
        (key,) = (key for key in keys if key.endswith(f"/{model_id}/artifacts/{name}"))
        store.put_object(**place, Key=key, Body=text.encode())
    else:
        (file,) = project.folder.glob(f"mlruns/**/{model_id}/artifacts/{name}")
        file.write_text(text)


def test_from_training_to_a_champion_that_others_use(
    tmp_path: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    project = Project(tmp_path)
    run(project, "-m", "stage=fetch,preprocess,prepare,train,evaluate", *TRAINED)
    a_registered_version_knows_where_it_comes_from(project)
    the_gate_refuses_and_says_why(project)
    a_champion_moves_with_its_reasons(project)
    a_worse_version_is_refused_and_forced_only_with_a_reason(project)
    an_oracle_crop_and_a_leak_are_refused(project)
    predicted = the_champion_segments_one_study_in_every_format(project, shared_data)
    a_server_answers_with_the_same_mask(project, shared_data, predicted)
    a_clean_environment_gives_the_same_mask(project, shared_data, predicted, tmp_path_factory.mktemp("clean"))


def a_registered_version_knows_where_it_comes_from(project: Project) -> None:
    text = run(project, "stage=register", "register.onnx=true")
    assert "registered as prostate_seg version 1" in text
    assert text.count("as ONNX: at most") == 2
    assert aliases(project) == {"challenger": "1"}
    one = version(project, 1)
    assert one.tags["evaluation_run_id"] == project.only(stage="evaluate").info.run_id
    assert one.tags["training_run_ids"] == project.only(stage="train", level="stage").info.run_id
    assert one.run_id == project.only(stage="register").info.run_id
    assert one.tags["leak_gate"] == "passed"
    files = files_of(project, 1)
    inside = {path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file()}
    networks = {"weights.safetensors", "recipe.json", "network.onnx"}
    assert {f"data/networks/fold{number}/{name}" for number in (0, 1) for name in networks} <= inside
    assert {
        f"data/networks/{name}" for name in ("model_card.md", "segmentation.json", "evaluation/cases.csv")
    } <= inside
    assert not [name for name in inside if name.endswith((".pkl", ".pt", ".pth"))]
    card = (files / "data/networks/model_card.md").read_text()
    assert "a phantom, drawn" in card


def the_gate_refuses_and_says_why(project: Project) -> None:
    text = run(project, "stage=register", "register.onnx=true", "register.promote=true", code=1)
    for words in (
        "prostate_seg version 1 is this already",
        "prostate_seg version 1 does not become champion",
        "refused  test patients  4 test patients, at least 20",
        "passed   leaks",
    ):
        assert words in text
    assert aliases(project) == {"challenger": "1"}
    assert [one.info.status for one in project.runs(stage="register")] == ["FINISHED", "FAILED"]
    assert len(project.client.search_model_versions(f"name = '{NAME}'")) == 1


def a_champion_moves_with_its_reasons(project: Project) -> None:
    training = project.only(stage="train", level="stage").info.run_id
    text = run(project, "stage=register", "register.onnx=true", f"register.run={training}", *LENIENT)
    assert "prostate_seg version 1 is champion now" in text
    assert aliases(project) == {"champion": "1"}
    first, second, third = moves(project)
    assert (first["alias"], first["from"], first["to"]) == ("challenger", None, "1")
    assert (second["alias"], second["from"], second["to"]) == ("champion", None, "1")
    assert "passed the gate; there is no champion yet" in second["why"]
    assert (third["alias"], third["from"], third["to"]) == ("challenger", "1", None)
    assert all(re.match(r"\S+@\S+$", move["by"]) and move["at"].startswith("20") for move in (first, second, third))


def a_worse_version_is_refused_and_forced_only_with_a_reason(project: Project) -> None:
    run(project, "-m", "stage=train,evaluate", *BARELY, "mlflow.name=barely")
    text = run(project, "stage=register", "mlflow.name=barely", "register.promote=true", code=1)
    assert "prostate_seg version 2 does not become champion: test patients, Dice, failures, better\n" in text
    for words in ("refused  Dice", "refused  failures       4 of 4 cases failed"):
        assert words in text
    text = run(project, "stage=register", "mlflow.name=barely", *LENIENT, code=1)
    assert "prostate_seg version 2 does not become champion: better\n" in text
    assert "on the same 4 cases of 4 patients, 95% interval" in text
    assert aliases(project) == {"champion": "1", "challenger": "2"}
    run(project, "stage=register", "mlflow.name=barely", *LENIENT, "register.force=true", "register.reason='a drill'")
    assert aliases(project) == {"champion": "2"}
    forced = next(move for move in reversed(moves(project)) if move["alias"] == "champion")
    assert (forced["from"], forced["to"]) == ("1", "2")
    assert forced["why"] == "a drill; forced although refused by: better"
    assert not forced["why"].startswith("passed")


def an_oracle_crop_and_a_leak_are_refused(project: Project) -> None:
    """Let what version 2 showed be what no honest evaluation shows, and ask for it again."""
    project.client.set_registered_model_alias(NAME, "champion", "1")
    name = "data/networks/evaluation/metrics.json"
    summary = read_json(files_of(project, 2) / name)
    summary["leak_gate"]["checks"]["identical voxels"] = "2 pairs"
    change_file(project, 2, name, json.dumps(summary | {"oracle_crop": True}))
    shutil.rmtree(project.folder / ".cache" / "models")
    text = run(project, "stage=register", "mlflow.name=barely", *LENIENT, code=1)
    assert "prostate_seg version 2 does not become champion: leaks, oracle crop, better\n" in text
    assert "identical voxels: 2 pairs" in text
    assert "train with preprocess.crop=center" in text
    assert aliases(project) == {"champion": "1"}


def the_champion_segments_one_study_in_every_format(project: Project, shared_data: Path) -> Path:
    """Return the mask of the .mha file."""
    file, scans = shared_data / "t2w/images/11373_1001396.mha", project.folder / "scans"
    shutil.copytree(shared_data / "dicom/11373_1001396", scans / "series")
    shutil.copy(file, scans / "meta.mha")
    sitk.WriteImage(sitk.ReadImage(str(file)), str(scans / "nifti.nii.gz"))
    text = run(project, "stage=predict", f"predict.model=models:/{NAME}@champion", "predict.input=scans")
    assert "2 networks of prostate_seg version 1" in text
    mask = project.folder / "predictions/masks/meta.mha"
    by_file = read_volume(mask)
    assert by_file.array.any()
    for name in ("series.nii.gz", "nifti.nii.gz"):
        other = read_volume(mask.with_name(name))
        assert other.geometry.is_same_grid(by_file.geometry)
        assert dice(other.array, by_file.array) >= 0.995
    offline = ("stage=predict", f"predict.model={files_of(project, 1) / 'data/networks'}", "mlflow=off")
    run(project, *offline, "predict.input=scans/meta.mha", "predict.output=onnx", "predict.backend=onnx")
    by_onnx = read_volume(project.folder / "onnx/masks/meta.mha")
    assert dice(by_onnx.array, by_file.array) > 0.98  # torch computes in bfloat16 where it can
    return mask


def a_server_answers_with_the_same_mask(project: Project, shared_data: Path, predicted: Path) -> None:
    file = shared_data / "t2w/images/11373_1001396.mha"
    port = free_port()
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # mlflow starts uvicorn by its name
    environment = clean_environment() | {
        "MLFLOW_TRACKING_URI": project.store,
        "PATH": programs,
    }
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", f"models:/{NAME}@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    with (project.folder / "serve.log").open("w") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, cwd=project.folder, start_new_session=True
        )
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}/ping"), 120)
        rows = [{"content": base64.b64encode(file.read_bytes()).decode()}, {"path": str(file)}, {"path": "/absent.mha"}]
        by_content, by_path, absent = (_ask(port, row) for row in rows)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, 15)
        server.wait(30)
    served = project.folder / "served.nii.gz"
    served.write_bytes(base64.b64decode(by_content["mask"]))
    assert by_path["mask"] == by_content["mask"]
    assert dice(read_volume(served).array, read_volume(predicted).array) == 1.0
    assert absent["mask"] is None
    assert "there is no such file" in absent["error"]


def _ask(port: int, row: dict[str, str]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        data=json.dumps({"dataframe_records": [row]}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        (answer,) = json.loads(reply.read())["predictions"]
    return dict(answer)


CLEAN = """
import sys
import mlflow.pyfunc
import pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
rows = model.predict(pd.DataFrame({"path": sys.argv[2:]}))
import prostate_seg
assert sys.argv[1] in prostate_seg.__file__, prostate_seg.__file__
print(*rows["volume_ml"], *rows["error"])
"""


def a_clean_environment_gives_the_same_mask(project: Project, shared_data: Path, predicted: Path, folder: Path) -> None:
    files = files_of(project, 1)
    environment = {key: value for key, value in clean_environment().items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "--requirement", files / "requirements.txt"], check=True, env=environment, cwd=folder)
    images = [shared_data / "t2w/images" / name for name in ("11373_1001396.mha", "p158020_1.nii.gz")]
    done = subprocess.run(
        [python, "-c", CLEAN, files, *images], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first_ml, _, *errors = done.stdout.split()[-4:]
    assert errors == ["None", "None"]
    mask = read_volume(predicted)
    assert float(first_ml) == pytest.approx(mask.array.sum() * mask.geometry.voxel_volume_ml)
