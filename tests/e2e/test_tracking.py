"""Records of real command lines: run tree, statuses, superseded runs, and no secrets."""

import contextlib
import hashlib
import json
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from mlflow import MlflowClient

from prostate_seg.common.address import shown_address
from prostate_seg.common.files import md5_of_text
from prostate_seg.config.workspace import Workspace
from prostate_seg.provenance.code_digests import code_listing
from prostate_seg.provenance.record import path_of
from tests.conftest import ROOT
from tests.project_helpers import (
    FAULTY,
    Project,
    clean_environment,
    copy_of,
    dvc_md5,
    only_in_hard_use,
    until,
    wait_for,
)
from tests.server_helpers import mlflow_server


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """The data of the finished pipeline, without a store."""
    for name in ("data", "preprocess", "prepared"):
        shutil.copytree(finished.folder / name, tmp_path / name)
    return Project(tmp_path)


def test_chain_of_stages_is_one_pipeline_with_a_run_per_stage_and_fold(finished: Project) -> None:
    pipeline = finished.only(level="pipeline")
    stages = finished.runs(level="stage")
    assert [run.info.run_name for run in stages] == ["fetch", "preprocess", "prepare", "train", "evaluate"]
    assert {run.data.tags["mlflow.parentRunId"] for run in stages} == {pipeline.info.run_id}
    folds = finished.runs(level="fold")
    assert [run.data.tags["fold"] for run in folds] == ["0", "1"]
    assert {run.data.tags["mlflow.parentRunId"] for run in folds} == {
        finished.only(level="stage", stage="train").info.run_id
    }
    for run in finished.runs():
        assert run.info.status == "FINISHED"
        assert {"level", "pipeline", "stage", "fold", "sweep"} <= set(run.data.tags)


def test_every_level_has_aggregate_metrics(finished: Project) -> None:
    pipeline, train = finished.only(level="pipeline"), finished.only(level="stage", stage="train")
    folds = [run.data.metrics["val/best_dice"] for run in finished.runs(level="fold")]
    assert train.data.metrics["val/best_dice"] == pytest.approx(sum(folds) / 2)
    assert pipeline.data.metrics["val/best_dice"] == train.data.metrics["val/best_dice"]
    evaluate = finished.only(level="stage", stage="evaluate")
    assert pipeline.data.metrics["test/dice"] == evaluate.data.metrics["test/dice"]


def test_each_fold_has_a_point_per_epoch_and_a_figure(finished: Project) -> None:
    for run in finished.runs(level="fold"):
        losses = finished.client.get_metric_history(run.info.run_id, "train/loss")
        assert [point.step for point in losses] == [1, 2]
        looks = finished.client.get_metric_history(run.info.run_id, "val/dice")
        assert [point.step for point in looks] == [2]  # two steps are too few for validation after each epoch
        assert max(point.value for point in looks) == pytest.approx(run.data.metrics["val/best_dice"])
        assert finished.artifacts(run) == {"figures/history.png"}


def test_stage_logs_settings_code_packages_machine_and_files(finished: Project) -> None:
    run = finished.only(level="stage", stage="evaluate")
    assert run.data.params["data.phantom.num_patients"] == "4"
    assert run.data.params["preprocess.spacing_mm"] == "[3.0, 0.8, 0.8]"
    assert run.data.params["seed"] == "12345"
    assert not [key for key in run.data.params if key.startswith(("paths", "machine", "mlflow", "doctor"))]
    tags = run.data.tags
    assert "stage=evaluate" in tags["overrides"]
    assert tags["machine.host"] == socket.gethostname()
    assert {"machine.cpu", "machine.gpu", "package.torch", "package.mlflow", "command"} <= set(tags)
    assert {
        "config.yaml", "packages.txt", "provenance.json", "hydra/config.yaml", "hydra/overrides.yaml", "hydra/hydra.yaml",
        "log/prostate_seg.log", "figures/worst.png", "figures/best.png", "figures/cases.png", "tables/metrics.json",
        "tables/cases.csv",
    } <= finished.artifacts(run)  # fmt: skip
    assert {one.dataset.name for one in run.inputs.dataset_inputs} == {
        "model",
        "prepared/kfold.json",
        "data",
        "preprocess",
    }
    log = finished.client.download_artifacts(run.info.run_id, "log/prostate_seg.log")
    assert "evaluate FINISHED after" in Path(log).read_text()


def test_every_hash_in_a_run_equals_that_of_dvc_add(finished: Project, tmp_path: Path) -> None:
    workspace = Workspace(root=finished.folder, data=finished.folder / "data", cache=finished.folder / ".cache")
    wanted: dict[Path, str] = {}
    for run in finished.runs(level="stage"):
        for key, value in run.data.tags.items():
            kind, _, name = key.partition("/")
            if kind in ("md5.inputs", "md5.outputs"):
                wanted[path_of(name, workspace)] = value
        record = json.loads(Path(finished.client.download_artifacts(run.info.run_id, "provenance.json")).read_text())
        wanted |= {ROOT / name: md5 for name, md5 in record["code"].items()}
        listing = Path(finished.client.download_artifacts(run.info.run_id, "code.txt"))
        assert run.data.tags["md5.code"] == hashlib.md5(listing.read_bytes()).hexdigest()
    assert {path.name for path in wanted} >= {"data", "preprocess", "kfold.json", "model", "evaluation"}
    copies: dict[Path, str] = {}
    (tmp_path / "copies").mkdir()
    for number, (path, md5) in enumerate(wanted.items()):
        copy = tmp_path / "copies" / f"{number}_{path.name}"
        shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
        copies[copy] = md5
    (tmp_path / "repository").mkdir()
    theirs = dvc_md5(tmp_path / "repository", *copies)
    assert {copy.name: md5 for copy, md5 in copies.items()} == theirs
    assert len(theirs) > 40


def test_stage_records_its_upstream_runs(finished: Project) -> None:
    tags = finished.only(level="stage", stage="evaluate").data.tags
    for stage in ("fetch", "preprocess", "prepare", "train"):
        assert tags[f"previous_run_id.{stage}"] == finished.only(level="stage", stage=stage).info.run_id


def test_ds_version_mirrors_the_runs(finished: Project) -> None:
    entries = json.loads((finished.folder / "DS_VERSION.json").read_text())["stages"]
    for stage, entry in entries.items():
        run = finished.only(level="stage", stage=stage)
        assert entry["run_id"] == run.info.run_id
        for kind in ("inputs", "outputs"):
            for key, md5 in entry[kind].items():
                assert run.data.tags[f"md5.{kind}/{key}"] == md5
        assert run.data.tags["md5.code"] == md5_of_text(code_listing(entry["code_digests"]))
    assert list(entries) == ["evaluate", "fetch", "prepare", "preprocess", "train"]


def test_finished_rerun_supersedes_the_stage_and_a_failed_one_does_not(project: Project) -> None:
    assert project.run("stage=prepare").returncode == 0
    first = project.only(level="stage").info.run_id
    assert project.run("raise", "preprocess", "stage=preprocess", program=str(FAULTY)).returncode == 1
    assert project.run("stage=prepare", "fold.num_folds=9").returncode == 1  # 4 patients
    assert first in {run.info.run_id for run in project.runs(level="stage", stage="prepare")}
    assert project.run("stage=prepare").returncode == 0
    second = project.only(level="stage", stage="prepare")
    assert second.info.run_id != first
    gone = [run for run in project.runs(deleted=True) if run.info.run_id == first]
    assert gone[0].data.tags["superseded_by"] == second.info.run_id
    assert project.run("stage=prepare", "mlflow.on_rerun=keep").returncode == 0
    assert len(project.runs(level="stage", stage="prepare")) == 2


@pytest.mark.slow
def test_folds_trained_separately_do_not_supersede_each_other(project: Project) -> None:
    for index in (0, 1):
        assert project.run("stage=train", f"fold.index={index}").returncode == 0
    assert [run.data.tags["folds"] for run in project.runs(level="stage")] == ["0", "1"]
    assert project.run("stage=train").returncode == 0
    assert project.only(level="stage").data.tags["folds"] == "0,1"
    assert [run.data.tags["fold"] for run in project.runs(level="fold")] == ["0", "1"]


@pytest.mark.slow
def test_fresh_pipeline_does_not_change_the_previous_one(project: Project) -> None:
    assert project.run("stage=prepare").returncode == 0
    assert project.run("stage=prepare", "mlflow.fresh=true").returncode == 0
    assert len(project.runs(level="pipeline")) == 2
    assert len(project.runs(level="stage")) == 2


@pytest.mark.file_store
def test_new_name_links_what_it_reuses(finished: Project, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path / "copy")
    assert project.run("stage=evaluate", "mlflow.name=second").returncode == 0
    linked = project.runs(level="stage", pipeline="second")
    origins = {run.info.run_name: run.data.tags.get("reused_from") for run in linked}
    old = {run.info.run_name: run.info.run_id for run in project.runs(level="stage", pipeline="baseline")}
    assert origins == {name: old[name] for name in ("fetch", "preprocess", "prepare", "train")} | {"evaluate": None}
    pipeline = project.only(level="pipeline", pipeline="second")
    assert {"val/best_dice", "test/dice"} <= set(pipeline.data.metrics)
    assert project.run("stage=prepare", "mlflow.name=second").returncode == 0
    assert "reused_from" not in project.only(pipeline="second", stage="prepare").data.tags


@pytest.mark.file_store
def test_verify_reports_no_change_and_then_each_change(finished: Project, tmp_path: Path) -> None:
    project = copy_of(finished, tmp_path / "copy")
    pipeline = finished.only(level="pipeline").info.run_id
    for what in ([], [f"verify.run={pipeline}"], [f"verify.run={finished.only(level='fold', fold='1').info.run_id}"]):
        done = project.run("stage=verify", *what)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "0 changed, 0 missing" in done.stdout
    (project.folder / "model" / "fold0" / "history.csv").write_text("spoilt")
    (project.folder / "prepared" / "kfold.json").unlink()
    train = finished.only(level="stage", stage="train").info.run_id
    done = project.run("stage=verify", f"verify.run={train}", "train.learning_rate=0.1")
    assert done.returncode == 1
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["train", "outputs", "changed", "model"] in lines
    assert ["changed", "fold0/history.csv"] in lines
    assert ["train", "inputs", "missing", "prepared/kfold.json"] in lines
    assert ["train", "config", "changed", "train.learning_rate:", "0.003", "->", "0.1"] in lines
    assert "Traceback" not in done.stderr
    rows = json.loads(project.run("stage=verify", f"verify.run={train}", "verify.format=json").stdout)
    assert {row["name"] for row in rows if row["verdict"] != "same"} == {"model", "prepared/kfold.json"}
    assert len(project.runs(level="stage")) == 5  # a stage that only reports records no run


def test_verify_of_an_unknown_run_is_refused(finished: Project) -> None:
    done = finished.run("stage=verify", "verify.run=0123")
    assert done.returncode == 1
    assert f"there is no run 0123 in {shown_address(finished.store)}" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", pytest.param("joblib", marks=only_in_hard_use)])
def test_sweep_is_a_parent_run_of_its_trials(project: Project, launcher: str) -> None:
    extra = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    grid = ["model=unet,attention_unet", "fold.index=0,1"]
    done = project.run("-m", "stage=train", *grid, f"hydra/launcher={launcher}", *extra)
    assert done.returncode == 0, done.stdout + done.stderr
    pipeline, sweep = project.only(level="pipeline"), project.only(level="sweep")
    assert sweep.data.tags["mlflow.parentRunId"] == pipeline.info.run_id
    trials = sorted(project.runs(level="trial"), key=lambda run: str(run.info.run_name))
    assert [run.info.run_name for run in trials] == [f"trial {number}" for number in range(4)]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {sweep.info.run_id}
    assert {run.data.tags["sweep"] for run in project.runs(level="fold")} == {sweep.info.run_name}
    best = max(trials, key=lambda run: run.data.metrics["objective"])
    assert sweep.data.tags["best_run_id"] == best.info.run_id
    assert sweep.data.metrics["sweep/num_finished"] == 4
    assert {run.info.status for run in project.runs()} == {"FINISHED"}


def test_sweep_with_a_failed_trial_is_failed(project: Project) -> None:
    done = project.run("-m", "stage=prepare", "fold.num_folds=9,2")
    assert done.returncode == 1
    states = {run.info.run_name: run.info.status for run in project.runs()}
    assert states["trial 0"] == "FAILED"
    assert states[project.only(level="sweep").info.run_name] == "FAILED"
    assert "RUNNING" not in states.values()


ENDS = [
    # fault, signal, exit code, status of the run right after, status after the next start
    ("raise", None, 1, "FAILED", "FAILED"),
    ("exit3", None, 3, "FAILED", "FAILED"),
    ("exit0", None, 1, "FAILED", "FAILED"),
    ("hang", signal.SIGINT, 130, "KILLED", "KILLED"),
    ("hang", signal.SIGTERM, 143, "KILLED", "KILLED"),
    ("hang", signal.SIGKILL, -9, "RUNNING", "KILLED"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "stage"), [("preprocess", "preprocess"), ("fold1", "train")])
def test_status_after_every_kind_of_end(project: Project, place: str, stage: str) -> None:
    shown = []
    level, num_runs = ("fold", 2) if place == "fold1" else ("stage", 1)
    for fault, sent, code, at_once, later in ENDS:
        name = f"{fault} {sent.name if sent else ''}".strip()
        arguments = (f"stage={stage}", f"mlflow.name={name}", "machine.resume=never")
        process = project.start(fault, place, *arguments, program=str(FAULTY))
        if sent is not None:
            wait_for(project.folder / "hanging")
            until(lambda name=name: len(project.runs(pipeline=name, level=level)) == num_runs, 60)  # the store has it
            process.send_signal(sent)
        out, _ = process.communicate(timeout=120)
        (project.folder / "hanging").unlink(missing_ok=True)
        assert process.returncode == code, out
        assert project.only(pipeline=name, level="stage").info.status == at_once, name
        shown.append((name, later))
    assert project.run("stage=prepare", "mlflow.name=next").returncode == 0
    for name, later in shown:
        assert {run.info.status for run in project.runs(pipeline=name, level="stage")} == {later}, name
        assert {run.info.status for run in project.runs(pipeline=name, level="pipeline")} == {later}, name
        folds = {run.data.tags["fold"]: run.info.status for run in project.runs(pipeline=name, level="fold")}
        assert folds == ({"0": "FINISHED", "1": later} if place == "fold1" else {}), name
    assert not [run for run in project.runs() if run.info.status == "RUNNING"]


@pytest.mark.slow
def test_interrupted_sweep_and_its_trial_are_killed(project: Project) -> None:
    process = project.start("hang", "fold1", "-m", "stage=train", "train.learning_rate=1e-3,2e-3", program=str(FAULTY))
    wait_for(project.folder / "hanging")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    assert {run.info.run_name: run.info.status for run in project.runs(level="trial")} == {"trial 0": "KILLED"}
    assert project.only(level="sweep").info.status == "KILLED"
    assert project.only(level="pipeline").info.status == "KILLED"


@pytest.mark.slow
def test_doctor_closes_orphans_and_reports_problems(project: Project) -> None:
    process = project.start("hang", "preprocess", "stage=preprocess", program=str(FAULTY))
    wait_for(project.folder / "hanging")
    process.kill()
    process.communicate()
    done = project.run("stage=doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of killed processes closed, 0 running" in done.stdout
    assert "ok   python     3." in done.stdout
    assert {run.info.status for run in project.runs()} == {"KILLED"}
    (project.folder / "DS_VERSION.json").write_text("{")
    done = project.run("stage=doctor", "mlflow=server", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "BAD  record" in done.stdout
    assert "BAD  tracking   the tracking store http://127.0.0.1:9 cannot be used" in done.stdout
    assert "fix: mv DS_VERSION.json" in done.stdout


@pytest.mark.slow
def test_failure_while_closing_ends_with_1_and_leaves_no_run_open(project: Project) -> None:
    done = project.run("raise", "close", "stage=prepare", program=str(FAULTY))
    assert done.returncode == 1
    assert "built-in fault" in done.stderr
    assert project.run("stage=prepare", "mlflow.on_rerun=keep").returncode == 0
    assert [run.info.status for run in project.runs(level="stage")] == ["KILLED", "FINISHED"]


def test_config_without_the_callback_is_refused(project: Project) -> None:
    done = project.run("stage=prepare", "~hydra.callbacks.tracking")
    assert done.returncode == 1
    assert "this config has no tracking callback" in done.stderr


def test_tracking_off_records_only_in_the_workspace(project: Project) -> None:
    assert project.run("stage=prepare", "mlflow=off").returncode == 0
    assert not (project.folder / "mlflow.db").exists()
    assert json.loads((project.folder / "DS_VERSION.json").read_text())["stages"]["prepare"]["run_id"] is None
    assert project.run("stage=verify", "mlflow=off").returncode == 0


def test_run_id_in_the_environment_is_ignored_with_a_warning(project: Project) -> None:
    done = project.run("stage=prepare", MLFLOW_RUN_ID="0123456789abcdef0123456789abcdef")
    assert done.returncode == 0
    assert "MLFLOW_RUN_ID=0123456789abcdef0123456789abcdef is ignored" in done.stdout
    run = project.only(level="stage")
    assert run.data.tags["mlflow.parentRunId"] == project.only(level="pipeline").info.run_id


@pytest.mark.slow
def test_unreachable_store_stops_the_run_within_ten_seconds(project: Project) -> None:
    with unresponsive_port() as silent:
        for port in (9, silent):
            start = time.monotonic()
            done = project.run(
                "stage=prepare", "mlflow=server", f"mlflow.tracking_uri=http://ann:hunter2@127.0.0.1:{port}"
            )
            took = time.monotonic() - start
            assert done.returncode == 1
            assert f"the tracking store http://127.0.0.1:{port} cannot be used" in done.stderr
            assert "mlflow=off" in done.stderr
            assert "hunter2" not in done.stdout + done.stderr
            assert "Traceback" not in done.stderr
            assert took < 30, took  # MLflow's own retries take minutes; the documented ten seconds need an idle machine
    assert not (project.folder / "DS_VERSION.json").exists()


@pytest.mark.slow
@pytest.mark.file_store
def test_store_whose_creation_was_killed_is_created_again(project: Project) -> None:
    killed = project.run("kill", "tables", "stage=prepare", program=str(FAULTY))
    assert killed.returncode == -9
    assert not (project.folder / "mlflow.db").exists()
    done = project.run("stage=prepare")
    assert done.returncode == 0, done.stdout + done.stderr
    assert project.only(level="stage").info.status == "FINISHED"
    assert not list(project.folder.glob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.file_store
def test_locked_database_stops_the_run_with_a_message(project: Project) -> None:
    assert project.run("stage=prepare").returncode == 0
    with contextlib.closing(sqlite3.connect(project.folder / "mlflow.db")) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        done = project.run("stage=prepare")
    assert done.returncode == 1
    assert "cannot be used: database is locked" in done.stderr


SECRETS = {
    "MY_SERVICE_TOKEN": "planted-token-0123456789",
    "AWS_SECRET_ACCESS_KEY": "plantedAwsKey0123456789",
    "DATABASE_URL": "postgresql://ann:planted-db-password@db/x",
}


@pytest.mark.file_store
def test_no_planted_secret_reaches_the_store(project: Project) -> None:
    remote = "https://ann:planted-remote-password@git.example.org/x.git"
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    (project.folder / "settings.py").write_text("x = 1\n")
    for command in (
        ["init", "-q"],
        ["remote", "add", "origin", remote],
        ["add", "settings.py"],
        ["commit", "-qm", "x"],
    ):
        subprocess.run([*git, *command], cwd=project.folder, check=True)
    (project.folder / "settings.py").write_text("x = 2\npassword = 'planted-in-diff'\n# planted-token-0123456789\n")
    overrides = [
        "data.patient_pattern='^(planted-token-0123456789|[^_]+)'",
        "+hydra.job.env_set.X_PASSWORD=planted-env-set",
        "+hydra.job.env_set.URL='http://ann:planted-url-password@host/'",
    ]
    done = project.run("stage=preprocess", *overrides, **SECRETS)
    assert done.returncode == 0, done.stdout + done.stderr
    files = [project.folder / "mlflow.db", *(project.folder / "mlruns").rglob("*"), project.folder / "DS_VERSION.json"]
    texts = {path: path.read_bytes() for path in files if path.is_file()}
    assert any(path.name == "git.diff" and b"x = 2" in text for path, text in texts.items())
    assert any(path.name == "hydra.yaml" for path in texts)
    assert not [path for path, text in texts.items() if b"planted-" in text or b"plantedAws" in text]
    assert project.only(level="stage").data.tags["git.dirty"] == "true"
    assert project.only(level="stage").data.tags["git.remote"] == "https://[redacted]@git.example.org/x.git"


def test_password_in_an_override_is_in_no_file_and_no_message(project: Project) -> None:
    uri = "mlflow.tracking_uri='http://ann:planted-password@127.0.0.1:9'"
    refused = project.run("stage=prepare", "mlflow=server", uri)
    failed = project.run(
        "raise", "preprocess", "stage=preprocess", "mlflow=off", "+x='t://a:planted-password@b'", program=str(FAULTY)
    )
    fails = project.run(
        "raise", "preprocess", "stage=preprocess", "data.exclude=['t://ann:planted-password@host']", "mlflow=off",
        program=str(FAULTY), PROSTATE_SEG_DEBUG="1",
    )  # fmt: skip
    assert [done.returncode for done in (refused, fails)] == [1, 1]
    assert failed.returncode == 2
    assert "Error executing job with overrides" not in fails.stderr
    for done in (refused, failed, fails):
        assert "planted-password" not in done.stdout + done.stderr
    files = [path for path in project.folder.rglob("*") if path.is_file()]
    assert [path for path in files if path.name == "overrides.yaml" and "[redacted]" in path.read_text()]
    assert [path for path in files if b"planted-password" in path.read_bytes()] == []


@pytest.mark.slow
@pytest.mark.file_store
@only_in_hard_use
def test_leader_election_of_eight_processes_on_a_new_store_each_time(tmp_path: Path) -> None:
    num_times = 20
    program = Path(__file__).with_name("start_together.py")
    composed = Project(tmp_path).run("stage=prepare", "--cfg", "job", "--resolve")
    (tmp_path / "config.yaml").write_text(composed.stdout)
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "config.yaml"), str(num_times)],
        cwd=tmp_path,
        env=clean_environment() | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["experiments 1 parents 1 children 8 finished 9 errors 0"] * num_times, (
        done.stderr
    )


def require_success(starts: Sequence[subprocess.Popen[str]]) -> None:
    """Wait for processes; fail with the output of those whose exit code is not 0."""
    texts = [start.communicate(timeout=300)[0] for start in starts]
    failed = [
        f"exit {start.returncode}:\n{text}" for start, text in zip(starts, texts, strict=True) if start.returncode
    ]
    assert not failed, "\n".join(failed)


@pytest.mark.slow
def test_processes_that_start_together_on_a_new_store_share_one_pipeline(project: Project) -> None:
    for number in range(8):
        for name in ("data", "preprocess"):
            shutil.copytree(project.folder / name, project.folder / f"workspace{number}" / name)
    starts = [project.start("stage=prepare", f"paths.root=workspace{number}") for number in range(8)]
    require_success(starts)
    pipeline = project.only(level="pipeline")
    stages = project.runs(level="stage")
    assert len(stages) == 8
    assert {run.data.tags["mlflow.parentRunId"] for run in stages} == {pipeline.info.run_id}
    assert {run.info.status for run in project.runs()} == {"FINISHED"}


@pytest.mark.slow
def test_workspaces_that_start_together_on_a_server_share_one_pipeline(project: Project) -> None:
    for number in range(4):
        for name in ("data", "preprocess"):
            shutil.copytree(project.folder / name, project.folder / f"place{number}" / name)
    with mlflow_server(project.folder / "server") as address:
        starts = [
            Project(project.folder / f"place{number}").start(
                "stage=prepare", "mlflow=server", MLFLOW_TRACKING_URI=address
            )
            for number in range(4)
        ]
        require_success(starts)
        client = MlflowClient(tracking_uri=address)
        experiment = client.get_experiment_by_name("prostate_seg")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        (pipeline,) = (run for run in runs if run.data.tags["level"] == "pipeline")
        stages = [run for run in runs if run.data.tags["level"] == "stage"]
        assert {run.data.tags["mlflow.parentRunId"] for run in stages} == {pipeline.info.run_id}
        assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.slow
def test_server_records_the_same_with_system_metrics(project: Project) -> None:
    with mlflow_server(project.folder / "server") as address:
        done = project.run(
            "stage=train", "fold.index=0", "mlflow=server", "mlflow.system_metrics=true",
            MLFLOW_TRACKING_URI=address, MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL="1",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        client = MlflowClient(tracking_uri=address)
        experiment = client.get_experiment_by_name("prostate_seg")
        assert experiment is not None
        runs = {run.data.tags["level"]: run for run in client.search_runs([experiment.experiment_id])}
        assert {level: run.info.status for level, run in runs.items()} == dict.fromkeys(
            ("pipeline", "stage", "fold"), "FINISHED"
        )
        assert [key for key in runs["stage"].data.metrics if key.startswith("system/")]
        assert "provenance.json" in {info.path for info in client.list_artifacts(runs["stage"].info.run_id)}
        verified = project.run(
            "stage=verify", f"verify.run={runs['stage'].info.run_id}", "fold.index=0", "mlflow=server",
            MLFLOW_TRACKING_URI=address,
        )  # fmt: skip
        assert verified.returncode == 0, verified.stdout + verified.stderr
    assert not (project.folder / "mlflow.db").exists()


@contextlib.contextmanager
def unresponsive_port() -> Iterator[int]:
    """A port that accepts connections and never responds."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen(16)
        yield int(one.getsockname()[1])
